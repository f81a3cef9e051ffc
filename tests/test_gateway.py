"""The gateway over real sockets: what passes through it, where requests go, and that each of them ends once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from pathlib import Path

import aiohttp
import openai
import pytest
from serving import MODELS, WAIT, Loop, OddServer, begin_stream, chat, client, emulated, fleet_options, gateway_of

from jaxroute.config import load_config
from jaxroute.decisions import read_decisions
from jaxroute.gateway.fleet import read_fleet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def site():
    return load_config(["site=edge3"]).site


@pytest.fixture(scope="session")
def running(loop, site, tmp_path_factory):
    """An emulated fleet and a gateway in front of it."""
    folder = tmp_path_factory.mktemp("gateway")

    async def start():
        fleet = emulated(site, lengths=8)
        await fleet.start()
        options = fleet_options(
            fleet.urls,
            site.models,
            speed=20.0,
            shadow=["shortest_queue", "round_robin"],
            classes={"standard": {"normalised": 0.5}, "hurried": {"ttft": 0.001, "decline": False}},
        )
        context = gateway_of(folder, options)
        return fleet, context, await context.__aenter__()

    fleet, context, gateway = loop.run(start())
    yield gateway, fleet, folder
    loop.run(context.__aexit__(None, None, None))
    loop.run(fleet.stop())


async def ask(gateway, body, path="chat/completions", headers=None):
    """Status, headers and body of an answer."""
    async with client() as session, session.post(f"{gateway.url}/v1/{path}", json=body, headers=headers) as response:
        return response.status, response.headers, await response.read()


def ended(folder):
    """Records of the log, by id."""
    return {record["id"]: record for record in read_decisions(folder / "decisions.jsonl").records}


async def settled(gateway):
    """Wait until all that was said has been logged."""
    while gateway.proxy.exchanges:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(gateway.proxy.recorder.flush)


def events(stream):
    return [json.loads(data) for data in re.findall(rb"^data: (\{.*\})$", stream, re.M)]


# --- What clients see ---------------------------------------------------------------------------------------


def test_the_openai_package_works_with_it(running):
    gateway, _, _ = running
    api = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=WAIT, max_retries=0)
    names = [model.id for model in api.models.list()]
    assert names == ["auto", *MODELS]
    stream = api.chat.completions.create(**chat(max_tokens=5), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert len(text.split()) == 5
    # One piece, with what the gateway says of it.
    raw = api.chat.completions.with_raw_response.create(**chat(max_tokens=5))
    assert raw.parse().usage.completion_tokens == 5
    assert raw.headers["x-jaxroute-expert"] in MODELS
    assert raw.headers["x-jaxroute-policy"] == "impact_greedy"
    assert float(raw.headers["x-jaxroute-decision-ms"]) > 0
    completion = api.completions.create(model=MODELS[1], prompt="one", max_tokens=4)
    assert completion.model == MODELS[1]
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-7' does not exist; choose from auto"):
        api.chat.completions.create(**chat() | {"model": "gpt-7"})


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_shown_to_those_who_asked_for_it(running, loop, wanted):
    gateway, _, folder = running
    more = {"stream_options": {"include_usage": True}} if wanted else {}

    async def run():
        _, headers, stream = await ask(gateway, chat(stream=True, max_tokens=6, **more))
        await settled(gateway)
        return headers, stream

    headers, stream = loop.run(run())
    assert stream.endswith(b"data: [DONE]\n\n")
    assert [bool(event.get("usage")) for event in events(stream)].count(True) == wanted
    record = ended(folder)[headers["x-jaxroute-request-id"]]
    assert (record["output_tokens"], record["tokens_from"]) == (6, "usage")


def test_a_named_model_gets_its_requests_and_auto_is_routed(running, loop):
    gateway, _, folder = running

    async def run():
        answers = [await ask(gateway, chat(max_tokens=2) | {"model": model}) for model in [*MODELS, "auto"]]
        await settled(gateway)
        return [headers for _, headers, _ in answers]

    answers = loop.run(run())
    assert [headers["x-jaxroute-expert"] for headers in answers[:3]] == MODELS
    records = ended(folder)
    named = [records[headers["x-jaxroute-request-id"]]["named"] for headers in answers]
    assert named == [*MODELS, None]
    # At leisure, the one of the best quality.
    assert answers[3]["x-jaxroute-expert"] == MODELS[2]


def test_limits_and_predictions_come_from_headers_or_the_class(running, loop):
    gateway, _, folder = running
    asked = [
        {},
        {"x-jaxroute-class": "hurried"},
        {"x-jaxroute-ttft-ms": "500", "x-jaxroute-tpot-ms": "30"},
        {"x-slo-ttft-ms": "400", "x-slo-tpot-ms": "20", "x-jaxroute-ttft-ms": "300"},
        {"x-jaxroute-quality": "0.9,0.1,0.1", "x-jaxroute-tokens": "12"},
    ]

    async def run():
        answers = [await ask(gateway, chat(max_tokens=2), headers=headers) for headers in asked]
        await settled(gateway)
        return [headers for _, headers, _ in answers]

    answers = loop.run(run())
    records = ended(folder)
    found = [records[headers["x-jaxroute-request-id"]] for headers in answers]
    assert [record["limits"] for record in found] == [
        {"normalised": 0.5},
        {"ttft": 0.001},
        {"ttft": 0.5, "tpot": 0.03},
        {"ttft": 0.3, "tpot": 0.02},
        {"normalised": 0.5},
    ]
    assert [record["class"] for record in found[:2]] == ["standard", "hurried"]
    assert found[0]["predicted"] == {"quality": [0.5, 0.6, 0.7], "output_tokens": [50.0, 50.0, 50.0]}
    assert found[4]["predicted"] == {"quality": [0.9, 0.1, 0.1], "output_tokens": [12.0, 12.0, 12.0]}
    assert found[4]["expert"] == MODELS[0]


@pytest.mark.parametrize(
    ("change", "headers", "status", "code"),
    [
        ({"messages": None}, {}, 400, "invalid_request"),
        ({"messages": "hello"}, {}, 400, "invalid_request"),
        ({"messages": []}, {}, 400, "invalid_request"),
        ({"model": 7}, {}, 404, "model_not_found"),
        ({"stream": "yes"}, {}, 400, "invalid_request"),
        ({}, {"x-jaxroute-class": "urgent"}, 400, "unknown_class"),
        ({}, {"x-jaxroute-ttft-ms": "-1"}, 400, "invalid_limit"),
        ({}, {"x-jaxroute-ttft-ms": "0"}, 400, "invalid_limit"),
        ({}, {"x-jaxroute-ttft-ms": "5e-324"}, 400, "invalid_limit"),
        ({}, {"x-jaxroute-tpot-ms": "nan"}, 400, "invalid_limit"),
        ({}, {"x-slo-tpot-ms": "soon"}, 400, "invalid_header"),
        ({}, {"x-jaxroute-quality": "0.1,0.2"}, 400, "invalid_header"),
        ({}, {"x-jaxroute-quality": "0.1,0.2,1.2"}, 400, "invalid_header"),
        ({}, {"x-jaxroute-tokens": "0"}, 400, "invalid_header"),
        ({}, {"x-jaxroute-local-only": "maybe"}, 400, "invalid_header"),
    ],
)
def test_what_cannot_be_understood_gets_an_error_object(running, loop, change, headers, status, code):
    gateway, _, _ = running
    got, _, body = loop.run(ask(gateway, chat() | change, headers=headers))
    error = json.loads(body)["error"]
    assert (got, error["code"]) == (status, code)
    assert error["message"]
    assert error["type"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_gets_an_error_object(running, loop, raw):
    gateway, _, _ = running

    async def run():
        async with client() as session, session.post(f"{gateway.url}/v1/completions", data=raw) as response:
            return response.status, await response.json()

    status, body = loop.run(run())
    assert (status, body["error"]["code"]) == (400, "invalid_json")


def test_unknown_pages_and_methods_get_an_error_object(running, loop):
    gateway, _, _ = running

    async def run():
        async with client() as session:
            async with session.get(f"{gateway.url}/v1/files") as response:
                missing = response.status, (await response.json())["error"]["message"]
            async with session.get(f"{gateway.url}/v1/completions") as response:
                wrong = response.status, (await response.json())["error"]["message"]
        return missing, wrong

    assert loop.run(run()) == (
        (404, "GET /v1/files is not served here"),
        (405, "GET /v1/completions is not served here"),
    )


def test_a_decision_is_explained_in_the_answer_and_afterwards(running, loop):
    gateway, _, _ = running

    async def run():
        explain = {"x-jaxroute-explain": "1"}
        _, headers, _ = await ask(gateway, chat(max_tokens=2), headers=explain)
        _, _, stream = await ask(gateway, chat(max_tokens=2, stream=True), headers=explain)
        await settled(gateway)
        async with client() as session:
            async with session.get(f"{gateway.url}/decisions/{headers['x-jaxroute-request-id']}") as response:
                later = await response.json()
            async with session.get(f"{gateway.url}/decisions/req-0") as response:
                unknown = response.status
        return json.loads(headers["x-jaxroute-decision"]), stream, later, unknown

    in_header, stream, later, unknown = loop.run(run())
    comment = re.match(rb": jaxroute (\{.*\})\n\n", stream)
    for record in (in_header, json.loads(comment[1]), later):
        assert len(record["expected"]["qos_loss"]) == len(record["logits"][:3]) == 3
        assert record["shadow"].keys() == {"shortest_queue", "round_robin"}
        assert record["propensity"] == 1
    assert later["outcome"] == "completed"
    assert later["why"].startswith("impact_greedy chose gemma-2-27b-it: quality .70, in time with 100 %")
    assert unknown == 404


def test_metrics_count_what_ends(running, loop):
    gateway, _, _ = running

    async def page():
        await settled(gateway)
        async with client() as session, session.get(f"{gateway.url}/metrics") as response:
            text = await response.text()
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.M)}

    async def run():
        before = await page()
        await ask(gateway, chat(max_tokens=2) | {"model": MODELS[0]})
        await ask(gateway, chat() | {"model": "none"})
        return before, await page()

    before, after = loop.run(run())
    grown = {name for name in after if after[name] > before.get(name, 0)}
    ended_there = f'jaxroute_requests_total{{expert="{MODELS[0]}",outcome="completed",service_class="standard"}}'
    assert after[ended_there] == before.get(ended_there, 0) + 1
    refused = 'jaxroute_refused_total{code="model_not_found"}'
    assert after[refused] == before.get(refused, 0) + 1
    assert {f'jaxroute_output_tokens_total{{expert="{MODELS[0]}"}}', "jaxroute_decision_seconds_count"} <= grown
    assert after["jaxroute_in_flight"] == 0


# --- What passes through ------------------------------------------------------------------------------------

ODD = (
    b": a comment\n\n"
    b'data: {"id":"1","choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"extra":[2.50,"\xc3\xa9"]}\n\n'
    b'event: note\r\nid: 7\r\ndata: {"choices":[{"delta":{"content":"\xf0\x9f\x98\x80 na\xc3\xafve"}}]}\r\n\r\n'
    b'data: {"choices":[{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"{"}}]}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"logprobs":{"content":[{"token":"a"},{"token":"b"}]},'
    b'"finish_reason":"stop"}]}\n\n'
)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":17}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="session")
def odd(loop, tmp_path_factory):
    """An odd server with a gateway of one expert up: ask for `gemma-2-2b-it`."""
    folder = tmp_path_factory.mktemp("odd")

    async def start():
        server = OddServer(None)
        await server.__aenter__()
        urls = [server.url, "http://127.0.0.1:9/v1", "http://127.0.0.1:11/v1"]
        # Its failures are the tests' doing.
        health = {"interval_s": 0.1, "timeout_s": 2, "failures": 100}
        context = gateway_of(folder, fleet_options(urls, MODELS, health=health))
        return server, context, await context.__aenter__()

    server, context, gateway = loop.run(start())

    def serve(answer):
        server.answer = answer
        server.seen.clear()
        server.aborted = 0
        for event in (server.arrived, server.left):
            event.clear()
        gateway.proxy.servers[0].takes_options = gateway.proxy.servers[0].tells_usage = True
        gateway.proxy.characters_per_token = 4.0
        return gateway, server, folder

    yield serve
    loop.run(context.__aexit__(None, None, None))
    loop.run(server.__aexit__())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_events_and_characters_split_anywhere_pass_byte_for_byte(odd, loop, size):
    async def answer(request):
        response = await begin_stream(request)
        whole = ODD + USAGE + DONE
        for start in range(0, len(whole), size):
            await response.write(whole[start : start + size])
            await asyncio.sleep(0)
        return response

    gateway, _, folder = odd(answer)

    async def run():
        _, headers, hidden = await ask(gateway, chat(stream=True))
        _, _, shown = await ask(gateway, chat(stream=True, stream_options={"include_usage": True}))
        await settled(gateway)
        return headers["x-jaxroute-request-id"], hidden, shown

    request_id, hidden, shown = loop.run(run())
    assert hidden == ODD + DONE
    assert shown == ODD + USAGE + DONE
    record = ended(folder)[request_id]
    assert (record["output_tokens"], record["prompt_tokens"], record["tokens_from"]) == (17, 9, "usage")


def test_fields_that_the_gateway_does_not_know_pass_both_ways(odd, loop):
    body = chat(
        n=2,
        logprobs=True,
        top_logprobs=3,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        tool_choice="auto",
        seed=12345678901234567890,
        temperature=0.1,
        private={"deep": [None, True, "é"]},
    )
    reply = (
        b'{"choices": [{"message": {"tool_calls": [{"id": "1"}]}}], "usage": {"completion_tokens": 3}, "more": 1.50}'
    )

    async def answer(request):
        return aiohttp.web.Response(body=reply, content_type="application/json", headers={"x-own": "kept"})

    gateway, server, _ = odd(answer)
    status, headers, got = loop.run(ask(gateway, body))
    assert (status, got, headers["x-own"]) == (200, reply, "kept")
    assert server.seen[0] == body | {"model": MODELS[0]}


def test_a_server_that_refuses_stream_options_is_asked_without(odd, loop):
    """Its tokens are counted by log probabilities, or else estimated, and marked so."""

    async def answer(request):
        body = await request.json()
        if "stream_options" in body:
            message = {"error": {"message": "Unrecognized request argument: stream_options"}}
            return aiohttp.web.json_response(message, status=400)
        response = await begin_stream(request)
        plain = b'data: {"choices":[{"delta":{"content":"four characters a token"},"finish_reason":"stop"}]}\n\n'
        await response.write((ODD if body.get("logprobs") else plain) + DONE)
        return response

    gateway, server, folder = odd(answer)

    async def run():
        answers = [await ask(gateway, chat(stream=True, **more)) for more in ({"logprobs": True}, {})]
        await settled(gateway)
        return answers

    answers = loop.run(run())
    assert [status for status, _, _ in answers] == [200, 200]
    assert answers[0][2] == ODD + DONE
    records = [ended(folder)[headers["x-jaxroute-request-id"]] for _, headers, _ in answers]
    assert [(record["output_tokens"], record["tokens_from"]) for record in records] == [(2, "logprobs"), (6, "length")]
    # Once refused, it is not asked again.
    assert ["stream_options" in body for body in server.seen] == [True, False, False]


def test_a_server_that_forgets_usage_is_read_from_then_on(odd, loop):
    async def answer(request):
        response = await begin_stream(request)
        await response.write(ODD + DONE)
        return response

    gateway, _, folder = odd(answer)

    async def run():
        answers = [await ask(gateway, chat(stream=True)) for _ in range(2)]
        await settled(gateway)
        return [ended(folder)[headers["x-jaxroute-request-id"]] for _, headers, _ in answers]

    first, second = loop.run(run())
    assert (first["outcome"], first["output_tokens"], first["tokens_from"]) == ("completed", None, "not told")
    assert (second["output_tokens"], second["tokens_from"]) == (2, "logprobs")


@pytest.mark.parametrize("moment", ["before the answer", "before the first token", "in mid-stream", "without a stream"])
def test_a_client_that_leaves_is_seen_by_the_server(odd, loop, moment):
    async def answer(request):
        if moment in ("before the first token", "in mid-stream"):
            response = await begin_stream(request)
            if moment == "in mid-stream":
                await response.write(ODD)
        await asyncio.sleep(WAIT)

    gateway, server, folder = odd(answer)

    async def run():
        async with client() as session:
            post = session.post(f"{gateway.url}/v1/chat/completions", json=chat(stream=moment != "without a stream"))
            task = asyncio.ensure_future(post)
            await server.arrived.wait()
            if moment == "in mid-stream":
                response = await task
                await response.content.readany()
                response.close()
            task.cancel()
            await server.left.wait()
        await settled(gateway)
        return max(ended(folder).values(), key=lambda record: record["arrival_time"])

    record = loop.run(run())
    assert (record["outcome"], record["status"], record["qos"]) == ("cancelled", 499, None)
    assert server.aborted == 1
    # The router counts it no longer.
    assert gateway.proxy.policies.router.loads.waiting.sum() + gateway.proxy.policies.router.loads.running.sum() == 0


@pytest.mark.parametrize(
    ("status", "seen", "code"),
    [
        (400, 400, "theirs"),
        (404, 404, "theirs"),
        (401, 502, "server_failed"),
        (429, 429, "queue_full"),
        (500, 502, "server_failed"),
    ],
)
def test_a_server_that_refuses_is_heard(odd, loop, status, seen, code):
    async def answer(request):
        return aiohttp.web.json_response({"error": {"message": "no", "code": "theirs"}}, status=status)

    gateway, _, folder = odd(answer)
    got, headers, body = loop.run(ask(gateway, chat()))
    assert (got, json.loads(body)["error"]["code"]) == (seen, code)
    loop.run(settled(gateway))
    record = ended(folder)[headers["x-jaxroute-request-id"]]
    assert record["outcome"] == ("rejected" if status == 429 else "failed")
    assert ("retry-after" in headers) == (seen != status or status == 429)


def test_an_answer_that_breaks_off_ends_with_an_error_event(odd, loop):
    async def answer(request):
        response = await begin_stream(request)
        await response.write(ODD[: ODD.index(b'data: {"choices":[{"index":1')] + b'data: {"half')
        request.transport.abort()
        return response

    gateway, _, folder = odd(answer)
    status, headers, stream = loop.run(ask(gateway, chat(stream=True)))
    assert status == 200
    assert b"half" not in stream
    last = events(stream)[-1]
    assert last["error"]["code"] == "server_failed"
    loop.run(settled(gateway))
    record = ended(folder)[headers["x-jaxroute-request-id"]]
    assert (record["outcome"], record["in_time"], record["qos"]) == ("failed", False, 0)
    # As the openai package has it.
    api = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=WAIT, max_retries=0)
    with pytest.raises(openai.APIError, match="the server failed"):
        list(api.chat.completions.create(**chat(), stream=True))


def test_an_answer_that_just_ends_is_no_answer(odd, loop):
    """Not before its first token, when another server is tried; and not after it."""

    async def answer(request):
        response = await begin_stream(request)
        if (await request.json()).get("user") == "late":
            await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
        return response

    gateway, _, _ = odd(answer)
    status, _, body = loop.run(ask(gateway, chat(stream=True)))
    assert (status, json.loads(body)["error"]["code"]) == (502, "server_failed")
    status, _, stream = loop.run(ask(gateway, chat(stream=True, user="late")))
    assert (status, events(stream)[-1]["error"]["code"]) == (200, "server_failed")


# --- Keys and bounds ----------------------------------------------------------------------------------------


def test_keys_bounds_and_large_bodies(loop, site, tmp_path, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "sk-theirs")
    key = "a client's"

    async def run():
        async with OddServer(None) as server:
            release = asyncio.Event()

            async def answer(request):
                await release.wait()
                return aiohttp.web.json_response({"choices": [], "usage": {"completion_tokens": 1}})

            server.answer = answer
            options = fleet_options(
                [server.url, "http://127.0.0.1:9/v1", "http://127.0.0.1:11/v1"],
                MODELS,
                keys=[hashlib.sha256(key.encode()).hexdigest()],
                limits={"in_flight": 1, "body_bytes": 10_000},
            )
            options["experts"][0]["key_env"] = "THEIR_KEY"
            found = {}
            async with gateway_of(tmp_path, options) as gateway, client() as session:

                async def status(headers, body=None, path="v1/completions"):
                    post = session.post(f"{gateway.url}/{path}", json=body or {"prompt": "x"}, headers=headers)
                    async with post as response:
                        return response.status

                right = {"authorization": f"Bearer {key}"}
                found["no key"] = await status({}), await status({"authorization": "Bearer b"})
                async with session.get(f"{gateway.url}/metrics") as response:
                    found["metrics"] = response.status
                async with session.get(f"{gateway.url}/health") as response:
                    found["health"] = response.status
                async with session.get(f"{gateway.url}/", params={"key": key}) as response:
                    found["page"] = response.status
                found["large"] = await status(right, {"prompt": "x" * 20_000})

                async def slowly():
                    for _ in range(100):
                        yield b"x" * 1000

                try:
                    async with session.post(f"{gateway.url}/v1/completions", data=slowly(), headers=right) as response:
                        found["large, of unknown length"] = response.status
                except aiohttp.ClientError:
                    found["large, of unknown length"] = 413
                first = asyncio.ensure_future(status(right))
                await server.arrived.wait()
                found["too many"] = await status(right)
                release.set()
                found["first"] = await first
            found["their key"] = server.headers["authorization"]
            return found

    assert loop.run(run()) == {
        "no key": (401, 401),
        "metrics": 401,
        "health": 200,
        "page": 200,
        "large": 413,
        "large, of unknown length": 413,
        "too many": 429,
        "first": 200,
        "their key": "Bearer sk-theirs",
    }
    assert key not in (tmp_path / "decisions.jsonl").read_text()


# --- Documents ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def test_dashboard_and_alerts_name_metrics_that_exist(running, loop):
    gateway, _, _ = running

    async def run():
        async with client() as session, session.get(f"{gateway.url}/metrics") as response:
            return await response.text()

    known = set(re.findall(r"^# TYPE (\w+) (?:counter|gauge)$", loop.run(run()), re.M))
    known |= {
        f"{name}{end}"
        for name in re.findall(r"^# TYPE (\w+) histogram$", loop.run(run()), re.M)
        for end in ("_bucket", "_count", "_sum")
    }
    for text in ("docs/gateway.md", "docs/examples/gateway-dashboard.json"):
        named = set(re.findall(r"\bjaxroute_\w+", (ROOT / text).read_text()))
        assert len(named) > 5
        assert named <= known
    panels = json.loads((ROOT / "docs/examples/gateway-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_field_of_the_log_is_documented(running, loop):
    gateway, _, folder = running

    async def run():
        await ask(gateway, chat(max_tokens=1))
        await settled(gateway)

    loop.run(run())
    page = (ROOT / "docs/gateway.md").read_text().partition("## The decision log")[2]
    documented = set(re.findall(r"`(\w+)`", page))
    assert next(iter(ended(folder).values())).keys() - {"format"} <= documented


def test_the_fleet_file_of_the_quick_start_is_right(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_KEY", "sk-1")
    text = re.search(r"```yaml\n(# fleet.yaml.*?)```", (ROOT / "docs/gateway.md").read_text(), re.S)[1]
    (tmp_path / "fleet.yaml").write_text(text)
    fleet = read_fleet(tmp_path / "fleet.yaml")
    assert [expert.model for expert in fleet.experts] == ["google/gemma-2-9b-it", "google/gemma-2-27b-it"]
    assert fleet.usual_class == "standard"

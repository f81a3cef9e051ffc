"""A policy of ours in the real LiteLLM: where requests go, what the router learns of them, and that each ends once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web
from serving import MODELS, WAIT, OddServer, begin_stream, client, emulated, fleet_options, write_fleet

from jaxroute.commands.fleets import load_fleet
from jaxroute.decisions import read_decisions
from jaxroute.errors import UserError

# Or it asks the network, at its import and for tokenizers.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "LITELLM_MASTER_KEY": "sk-test"}
litellm = pytest.importorskip("litellm", reason="litellm is not installed; docs/gateway.md says how to run this")
from jaxroute.adapters.litellm import RoutingStrategy  # noqa: E402

pytestmark = pytest.mark.slow

KEY = {"authorization": "Bearer sk-test"}
MESSAGES = [{"role": "user", "content": "What is an edge?"}]


@pytest.fixture(scope="module")
def servers(loop, site):
    fleet = emulated(site, lengths=6)
    loop.run(fleet.start())
    yield fleet
    loop.run(fleet.stop())


def deployments(urls):
    """LiteLLM's list: all servers by the name auto, and each by its own."""
    return [
        {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_base": url, "api_key": "none"}}
        for url, model in zip(urls, MODELS, strict=True)
        for name in ("auto", model)
    ]


def in_turn(records):
    """Whether the servers got the requests in turn, from whichever on."""
    numbers = [record["choice"] for record in records]
    return numbers == [(numbers[0] + n) % len(MODELS) for n in range(len(numbers))]


class Strategy:
    """LiteLLM's router with our strategy, for as long as the block."""

    def __init__(self, folder, urls, *, retries=2, models=None, **options):
        self.folder = folder
        path = write_fleet(folder / "fleet.yaml", fleet_options(urls, MODELS, speed=20.0, **options))
        self.strategy = RoutingStrategy(*load_fleet(path), folder)
        self.router = litellm.Router(model_list=models or deployments(urls), num_retries=retries)

    def __enter__(self):
        self.strategy.attach(self.router)
        return self

    def __exit__(self, *error):
        self.strategy.close()

    async def ask(self, model="auto", stream=False, headers=None, **more):
        """Ask, and return what has come of the answer's text."""
        metadata = {"headers": headers or {}}
        answer = await self.router.acompletion(
            model=model, messages=MESSAGES, stream=stream, metadata=metadata, max_tokens=5, **more
        )
        if not stream:
            return answer.choices[0].message.content
        return "".join([part.choices[0].delta.content or "" async for part in answer if part.choices])

    async def records(self):
        """What the log says once all has ended."""
        dispatcher = self.strategy.dispatcher
        while dispatcher.exchanges:
            gc.collect()
            await asyncio.sleep(0.01)
        await asyncio.to_thread(dispatcher.recorder.flush)
        loads = dispatcher.policies.router.loads
        assert not loads.running.any()
        assert not loads.waiting.any()
        return read_decisions(self.folder / "decisions.jsonl").records


@pytest.mark.parametrize("stream", [False, True])
def test_it_chooses_and_learns_what_came_of_it(loop, servers, tmp_path, stream):
    with Strategy(tmp_path, servers.urls, policy="round_robin") as of:

        async def run():
            more = {"stream_options": {"include_usage": True}} if stream else {}
            texts = [await of.ask(stream=stream, **more) for _ in range(4)]
            return texts, await of.records()

        texts, records = loop.run(run())
    assert [len(text.split()) for text in texts] == [5] * 4
    assert in_turn(records)
    assert [(record["outcome"], record["output_tokens"]) for record in records] == [("completed", 5)] * 4
    assert all((record["ttft"] is not None) == stream for record in records)
    assert all(record["expected"] for record in records)


def test_a_name_of_one_server_goes_there_whatever_the_policy_says(loop, servers, tmp_path):
    with Strategy(tmp_path, servers.urls, policy="quality_only") as of:

        async def run():
            await of.ask(MODELS[0])
            await of.ask("auto")
            return await of.records()

        records = loop.run(run())
    assert [(record["expert"], record["named"]) for record in records] == [(MODELS[0], MODELS[0]), (MODELS[2], None)]


@pytest.mark.parametrize("retries", [None, 3])
def test_a_declined_request_is_a_rate_limit_and_goes_nowhere(loop, servers, tmp_path, retries):
    # No server can answer within 1 microsecond.
    hurried = {"hurried": {"ttft": 1e-6}, "kept": {"ttft": 1e-6, "decline": False}}
    with Strategy(tmp_path, servers.urls, policy="impact_greedy+decline", classes=hurried) as of:

        async def run():
            more = {} if retries is None else {"num_retries": retries}
            with pytest.raises(litellm.RateLimitError, match="declined: the request is worth less") as error:
                await of.ask(**more)
            assert error.value.headers["retry-after"] == "1"
            await of.ask(headers={"X-Jaxroute-Class": "kept"})
            return await of.records()

        records = loop.run(run())
    assert [record["outcome"] for record in records] == ["declined", "completed"]


def test_what_cannot_be_understood_is_a_bad_request(loop, servers, tmp_path):
    with Strategy(tmp_path, servers.urls) as of, pytest.raises(litellm.BadRequestError, match="no class 'gold'"):
        loop.run(of.ask(headers={"x-jaxroute-class": "gold"}))


def test_what_a_server_has_failed_goes_elsewhere_and_stands_in_the_log_once(loop, servers, tmp_path):
    async def broken(request):
        return web.json_response({"error": {"message": "broken"}}, status=500)

    async def run():
        async with OddServer(broken) as odd:
            urls = [*servers.urls[:2], odd.url]
            with Strategy(tmp_path, urls, policy="quality_only") as of:
                return await of.ask(), await of.records(), len(odd.seen)

    text, (record,), tried = loop.run(run())
    assert text
    assert tried == 1
    assert record["outcome"] == "completed"
    assert record["expert"] == MODELS[1]
    assert [one["expert"] for one in record["tries"]] == [MODELS[2]]


def test_a_request_that_every_server_fails_has_failed(loop, tmp_path):
    async def broken(request):
        return web.json_response({"error": {"message": "broken"}}, status=500)

    async def run():
        async with OddServer(broken) as a, OddServer(broken) as b, OddServer(broken) as c:
            with Strategy(tmp_path, [a.url, b.url, c.url]) as of:
                with pytest.raises(litellm.InternalServerError):
                    await of.ask()
                return await of.records()

    (record,) = loop.run(run())
    assert (record["outcome"], record["status"], len(record["tries"])) == ("failed", 500, 3)


@pytest.mark.parametrize("ending", ["cut", "left"])
def test_an_answer_that_breaks_off_ends_once(loop, servers, tmp_path, ending):
    async def half(request):
        response = await begin_stream(request)
        delta = {"index": 0, "delta": {"role": "assistant", "content": "one"}, "finish_reason": None}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "x", "choices": [delta]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        if ending == "left":
            await asyncio.sleep(WAIT)
        request.transport.close()
        return response

    async def run():
        async with OddServer(half) as odd:
            with Strategy(tmp_path, [*servers.urls[:2], odd.url], policy="quality_only", retries=0) as of:
                answer = await of.router.acompletion(model="auto", messages=MESSAGES, stream=True)
                if ending == "cut":
                    with pytest.raises(litellm.APIConnectionError):
                        [part async for part in answer]
                else:
                    await anext(answer)
                    await answer.aclose()
                del answer
                return await of.records()

    (record,) = loop.run(run())
    assert record["outcome"] == {"cut": "failed", "left": "cancelled"}[ending]
    assert record["ttft"] is not None


def test_every_server_of_the_fleet_must_be_known_to_litellm(servers, tmp_path):
    of = Strategy(tmp_path, servers.urls, models=deployments(servers.urls)[:4])
    with pytest.raises(UserError, match=f"{servers.urls[2]} is in the fleet file and no deployment of LiteLLM"):
        of.strategy.attach(of.router)
    of.strategy.close()


def test_threads_are_refused(servers, tmp_path):
    with Strategy(tmp_path, servers.urls) as of, pytest.raises(NotImplementedError, match="use acompletion"):
        of.router.get_available_deployment("auto", messages=MESSAGES, request_kwargs={})


def test_the_proxy_uses_it(servers, tmp_path):
    pytest.importorskip("litellm.proxy.proxy_server", reason="litellm[proxy] is not installed")
    write_fleet(tmp_path / "fleet.yaml", fleet_options(servers.urls, MODELS, speed=20.0, policy="round_robin"))
    config = {
        "model_list": deployments(servers.urls),
        "litellm_settings": {"callbacks": "routing.strategy"},
    }
    (tmp_path / "litellm.yaml").write_text(json.dumps(config))
    (tmp_path / "routing.py").write_text(
        "from pathlib import Path\n"
        "from jaxroute.adapters.litellm import RoutingStrategy\n"
        "from jaxroute.commands.fleets import load_fleet\n"
        'folder = Path(__file__).parent\nstrategy = RoutingStrategy(*load_fleet(folder / "fleet.yaml"), folder)\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("litellm"), "--config", tmp_path / "litellm.yaml"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"],
        cwd=tmp_path,
        env=os.environ | {"LITELLM_LOG": "ERROR"},
    )
    url = f"http://127.0.0.1:{port}"

    async def run():
        async with client() as session:
            up = False
            while not up:
                assert process.poll() is None
                await asyncio.sleep(0.1)
                with contextlib.suppress(OSError):
                    async with session.get(f"{url}/health/liveliness") as response:
                        up = response.status == 200
            for stream in (False, True, True):
                body = {"model": "auto", "messages": MESSAGES, "max_tokens": 5, "stream": stream}
                async with session.post(f"{url}/v1/chat/completions", json=body, headers=KEY) as response:
                    assert response.status == 200, await response.text()
                    await response.read()
            headers = KEY | {"x-jaxroute-class": "gold"}
            async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status == 400
                assert "no class 'gold'" in await response.text()
        async with asyncio.timeout(WAIT):
            while len(read_decisions(tmp_path / "decisions.jsonl").records) < 3:
                await asyncio.sleep(0.05)

    try:
        asyncio.run(run())  # without the limit of other tests: the proxy may need a minute to start
    finally:
        process.terminate()
        process.wait()
    records = read_decisions(tmp_path / "decisions.jsonl").records
    assert in_turn(records)
    assert {record["outcome"] for record in records} == {"completed"}

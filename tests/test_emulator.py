"""Emulated servers: timed as the reference says, in OpenAI's words, with vLLM's metrics, and broken on request."""

from __future__ import annotations

import asyncio
import json
import math
import time

import numpy as np
import pytest
from serving import ODD_BODIES, client, emulated

from jaxroute.errors import UserError
from jaxroute.gateway.emulator import Answer, EmulatedFleet, LiveExpert
from jaxroute.gateway.health import gauges
from jaxroute.serving import SiteConfig, build_site
from jaxroute.serving.reference import Expert, Request, simulate

pytestmark = pytest.mark.slow


class Emissions(Answer):
    """Notes when each token was generated."""

    def __init__(self, request):
        self.request, self.times = request, []

    def emit(self, at):
        self.times.append(at)


@pytest.mark.parametrize("seed", range(4))
def test_it_generates_every_token_when_the_reference_does(site, seed):
    """However the clock ticks between two events."""
    rng = np.random.default_rng(seed)
    of_site = {name: np.asarray(column)[:1] for name, column in build_site(site)._asdict().items()}
    of_site |= {"kv_capacity": np.array([1500]), "max_num_seqs": np.array([6])}
    arrival = np.cumsum(rng.exponential(0.15, 80))
    prompt, output = rng.integers(1, 400, 80), rng.integers(1, 200, 80)
    expected = simulate(of_site, arrival, prompt, output, np.zeros(80, int))
    assert expected.preemptions.sum() > 0
    assert (expected.status == 1).any()

    expert = LiveExpert(index=0, **{name: column[0].item() for name, column in of_site.items()})
    answers = []
    for number, at in enumerate(arrival.tolist()):
        while (event := expert.next_time()) is not None and event < at:
            # A timer is always a little late.
            expert.advance(min(event + rng.exponential(0.01), at))
        request = Request(number, at, at + expert.network_delay, int(prompt[number]), int(output[number]))
        assert expert.arrive(request) == (expected.status[number] == 0)
        answers.append(Emissions(request))
        if expected.status[number] == 0:
            expert.answers[number] = answers[-1]
    expert.advance(math.inf)
    for number, answer in enumerate(answers):
        if expected.status[number] == 0:
            assert len(answer.times) == output[number]
            assert answer.times[0] - arrival[number] == expected.ttft[number]
            assert answer.times[-1] - arrival[number] == expected.latency[number]


def test_a_request_that_goes_away_leaves_its_seat_to_others():
    expert = LiveExpert(0, 0.0, 0.01, 0.0, 0.0, 0.0, 1, 100, 4, 1000, 0.0)
    first, second = (Request(number, 0.0, 0.0, 10, 5) for number in range(2))
    for request in (first, second):
        expert.answers[request.index] = Emissions(request)
        assert expert.arrive(request)
    kept = expert.answers[1]
    expert.advance(0.015)
    assert expert.running == [first]
    expert.abort(first)
    expert.advance(math.inf)
    # The iteration that the first was in ends when it would have, at .02; then come five of the second.
    np.testing.assert_allclose(kept.times, 0.02 + 0.01 * np.arange(1, 6))
    assert not expert.answers.keys() - {1}


async def post(session, url, path="completions", **body):
    async with session.post(f"{url}/{path}", json={"model": "m", "prompt": "one two", **body}) as response:
        return response.status, await response.json()


def test_answers_have_the_length_that_was_asked_for(site, loop):
    async def run():
        fleet = emulated(site, lengths=7)
        await fleet.start()
        async with client() as session:
            url = fleet.urls[0]
            whole, cut, longer = [
                (await post(session, url, **more))[1]
                for more in ({}, {"max_tokens": 3}, {"max_tokens": 12, "ignore_eos": True})
            ]
            ids = (await post(session, url, prompt=[5] * 40))[1]
            chat = (await post(session, url, "chat/completions", messages=[{"role": "user", "content": "x" * 40}]))[1]
        await fleet.stop()
        return whole, cut, longer, ids, chat

    whole, cut, longer, ids, chat = loop.run(run())
    for answer, tokens, reason in ((whole, 7, "stop"), (cut, 3, "length"), (longer, 12, "length")):
        assert answer["usage"]["completion_tokens"] == tokens
        assert answer["choices"][0]["finish_reason"] == reason
        assert len(answer["choices"][0]["text"].split()) == tokens
    assert ids["usage"]["prompt_tokens"] == 40
    assert chat["usage"]["prompt_tokens"] == 10
    assert chat["choices"][0]["message"]["role"] == "assistant"


def test_seed_names_the_prompt_of_the_bank(site, loop):
    async def run():
        fleet = EmulatedFleet(site, np.arange(1, 31).reshape(10, 3), speed=50)
        await fleet.start()
        async with client() as session:
            answers = [await post(session, fleet.urls[1], seed=seed) for seed in (0, 4, 14)]
        await fleet.stop()
        return [answer["usage"]["completion_tokens"] for _, answer in answers]

    assert loop.run(run()) == [2, 14, 14]


def test_a_stream_takes_the_time_of_the_site_and_tells_its_usage(site, loop):
    expert = site.experts[0]
    speed, tokens = 20.0, 40

    async def run():
        fleet = emulated(site, speed=speed)
        await fleet.start()
        start = time.monotonic()
        body = {"prompt": [1] * 100, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        async with client() as session, session.post(f"{fleet.urls[0]}/completions", json=body) as response:
            stream = await response.text()
        took = time.monotonic() - start
        await fleet.stop()
        return stream, took

    stream, took = loop.run(run())
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]).split()) == tokens
    # No token before its time: the network twice, and an iteration per token.
    least = 2 * expert.network_delay + tokens * (expert.iteration_overhead + expert.weight_load)
    assert took * speed >= least


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_no_field_of_a_body_makes_it_fail(site, loop, path):
    async def run():
        fleet = emulated(site, lengths=3, speed=50)
        await fleet.start()
        statuses = set()
        async with client() as session:
            for body in ODD_BODIES:
                async with session.post(f"{fleet.urls[0]}/{path}", json=body) as response:
                    answer = await response.read()
                    assert response.status in (200, 400), (body, answer)
                    statuses.add(response.status)
        await fleet.stop()
        return statuses

    assert loop.run(run()) == {200, 400}


def test_it_is_full_when_the_site_says_so_and_refuses_what_it_cannot_hold(site, loop):
    seats = site.experts[0].max_num_seqs + site.experts[0].max_waiting

    async def run():
        fleet = emulated(site, lengths=500, speed=0.5)
        await fleet.start()
        url = fleet.urls[0]
        async with client() as session:
            streams = []
            for number in range(seats):
                streams.append(await session.post(f"{url}/completions", json={"prompt": "x", "stream": True}))
                if number < site.experts[0].max_num_seqs:
                    # On their way, requests count as waiting.
                    await streams[-1].content.readany()
            full = await post(session, url)
            long = await post(session, url, prompt=[1] * site.experts[0].kv_capacity)
            async with session.get(url.replace("/v1", "/metrics")) as response:
                page = await response.text()
            for stream in streams:
                stream.close()
            while fleet.servers[0].expert.answers:
                await asyncio.sleep(0.01)
        await fleet.stop()
        return full, long, page, fleet.servers[0].expert

    full, long, page, expert = loop.run(run())
    assert full[0] == 429
    assert full[1]["error"]["code"] == "queue_full"
    assert long[0] == 400
    assert long[1]["error"]["code"] == "context_length_exceeded"
    figures = gauges(page)
    assert figures["running"] == site.experts[0].max_num_seqs
    assert figures["waiting"] == site.experts[0].max_waiting
    assert 0 < figures["kv_share"] < 1
    # Whoever left holds no seat.
    assert not expert.running
    assert not expert.waiting


def test_it_fails_hangs_slows_and_cuts_on_request_and_recovers(site, loop):
    async def run():
        fleet = emulated(site, lengths=30)
        await fleet.start()
        url, root = fleet.urls[0], fleet.urls[0].removesuffix("/v1")
        found = {}
        async with client() as session:

            async def order(**fault):
                async with session.post(f"{root}/emulator", json=fault) as response:
                    return response.status

            async def health(timeout=None):
                async with asyncio.timeout(timeout), session.get(f"{root}/health") as response:
                    return response.status

            await order(fault="fail")
            found["fail"] = await health(), (await post(session, url))[0]
            await order(fault="hang")
            try:
                found["hang"] = await health(0.2)
            except TimeoutError:
                found["hang"] = "hangs"
            await order(fault="cut")
            async with session.post(f"{url}/completions", json={"prompt": "x", "stream": True}) as response:
                try:
                    found["cut"] = await response.read()
                except Exception as error:
                    found["cut"] = type(error).__name__
            await order(fault="slow", factor=7)
            found["slow"] = fleet.servers[0].expert.slowdown, (await post(session, url))[0]
            found["unknown"] = await order(fault="explode"), await order(fault="slow", factor="x")
            await order(fault="recover")
            found["recover"] = await health(), (await post(session, url))[0], fleet.servers[0].expert.slowdown
        await fleet.stop()
        return found

    assert loop.run(run()) == {
        "fail": (503, 503),
        "hang": "hangs",
        "cut": "ClientPayloadError",
        "slow": (7, 200),
        "unknown": (400, 400),
        "recover": (200, 200, 1),
    }


def test_a_port_in_use_is_said_in_one_line(site, loop):
    async def run():
        fleet = emulated(SiteConfig(site.name, site.experts[:1]))
        await fleet.start()
        try:
            other = EmulatedFleet(SiteConfig(site.name, site.experts[:1]), np.ones((1, 1), int), port=fleet.ports[0])
            with pytest.raises(UserError, match=rf"127.0.0.1:{fleet.ports[0]} cannot be listened on .*--port"):
                await other.start()
        finally:
            await fleet.stop()

    loop.run(run())


@pytest.mark.parametrize(
    ("options", "message"), [({"speed": 0}, "--speed=0 must be above 0"), ({"port": 70000}, "--port=70000 must be")]
)
def test_mistakes_are_said_in_one_line(site, options, message):
    with pytest.raises(UserError, match=message):
        EmulatedFleet(site, np.ones((1, 3), int), **options)


def test_the_reference_has_no_fields_that_the_emulator_does_not_set(site):
    """Whatever a site says of an expert reaches the emulated one."""
    expert = emulated(site).servers[1].expert
    for name in build_site(site)._asdict():
        assert getattr(expert, name) == getattr(site.experts[1], name)
    assert isinstance(expert, Expert)

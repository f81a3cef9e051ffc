"""What goes wrong around the gateway: servers that fail, policies that fail, a full disk, a restart, a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from serving import (
    MODELS,
    WAIT,
    OddServer,
    begin_stream,
    chat,
    client,
    emulated,
    fleet_options,
    gateway_of,
    write_fleet,
)

from jaxroute.commands.fleets import load_fleet
from jaxroute.decisions import read_decisions
from jaxroute.errors import UserError
from jaxroute.fitting import read_log
from jaxroute.gateway.artefact import FIELDS
from jaxroute.gateway.guard import LATE, OUTSIDE, RAISED, Guard, Trained
from jaxroute.gateway.service import Gateway
from jaxroute.workloads import read_trace

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9/v1"


async def ask(session, gateway, body, headers=None):
    async with session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, response.headers, await response.read()


async def fault(session, fleet, expert, name, **more):
    order = {"fault": name, **more}
    async with session.post(fleet.urls[expert].replace("/v1", "/emulator"), json=order) as response:
        assert response.status == 200


async def until(condition):
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.005)


def records(folder):
    return read_decisions(folder / "decisions.jsonl").records


# --- Servers ------------------------------------------------------------------------------------------------


def test_a_request_whose_server_fails_is_answered_by_another(loop, site, tmp_path):
    """Before the first token; and it counts as one arrival, of its first time."""

    async def run():
        async with OddServer(None) as broken:

            async def answer(request):
                request.transport.abort()
                return web.Response()

            broken.answer = answer
            fleet = emulated(site)
            await fleet.start()
            # The best expert is the one that breaks, and says that all is well.
            health = {"interval_s": WAIT, "failures": 2}
            options = fleet_options([*fleet.urls[:2], broken.url], MODELS, speed=20.0, health=health)
            async with gateway_of(tmp_path, options) as gateway, client() as session:
                answers = [await ask(session, gateway, chat(max_tokens=3, stream=True)) for _ in range(3)]
                await until(lambda: not gateway.proxy.exchanges)
                up = list(gateway.proxy.health.up)
            await fleet.stop()
            return answers, up, len(broken.seen)

    answers, up, asked = loop.run(run())
    assert [status for status, _, _ in answers] == [200] * 3
    assert all(body.endswith(b"data: [DONE]\n\n") for _, _, body in answers)
    found = records(tmp_path)
    assert [record["outcome"] for record in found] == ["completed"] * 3
    # Two failures in a row, and nobody asks it any more.
    assert asked == 2
    assert up == [True, True, False]
    assert [[one["expert"] for one in record["tries"]] for record in found] == [[MODELS[2]], [MODELS[2]], []]


def test_a_hung_server_gives_its_waiting_requests_to_others(loop, site, tmp_path):
    """Its probes fail, and whatever has not begun to answer is routed again; once it recovers, it is used again."""

    async def run():
        fleet = emulated(site, lengths=4)
        await fleet.start()
        health = {"interval_s": 0.05, "timeout_s": 0.5, "failures": 2}
        options = fleet_options(fleet.urls, MODELS, speed=20.0, health=health)
        async with gateway_of(tmp_path, options) as gateway, client() as session:
            await fault(session, fleet, 2, "hang")
            status, headers, _ = await ask(session, gateway, chat(stream=True))
            assert not gateway.proxy.health.up[2]
            async with session.get(f"{gateway.url}/v1/models") as response:
                models = {model["id"]: model["up"] for model in (await response.json())["data"]}
            named, _, body = await ask(session, gateway, chat() | {"model": MODELS[2]})
            await fault(session, fleet, 2, "recover")
            await until(lambda: gateway.proxy.health.up[2])
            again, headers_again, _ = await ask(session, gateway, chat(stream=True))
            await until(lambda: not gateway.proxy.exchanges)
        await fleet.stop()
        return status, headers["x-jaxroute-expert"], models, (named, json.loads(body)), again, headers_again

    status, expert, models, (named, error), again, headers_again = loop.run(run())
    assert (status, expert) == (200, MODELS[1])
    assert models == {"auto": True, MODELS[0]: True, MODELS[1]: True, MODELS[2]: False}
    assert (named, error["error"]["code"]) == (503, "no_server")
    assert (again, headers_again["x-jaxroute-expert"]) == (200, MODELS[2])
    first = records(tmp_path)[0]
    assert [one["expert"] for one in first["tries"]] == [MODELS[2]]
    assert first["outcome"] == "completed"


def test_a_server_that_is_not_there_at_the_start_is_down_and_the_others_serve(loop, site, tmp_path):
    async def run():
        fleet = emulated(site)
        await fleet.start()
        options = fleet_options([*fleet.urls[:2], NOWHERE], MODELS, speed=20.0)
        async with gateway_of(tmp_path, options) as gateway, client() as session:
            up = list(gateway.proxy.health.up)
            status, headers, _ = await ask(session, gateway, chat(max_tokens=2))
            async with session.get(f"{gateway.url}/health") as response:
                health = response.status
        await fleet.stop()
        return up, status, headers["x-jaxroute-expert"], health

    assert loop.run(run()) == ([True, True, False], 200, MODELS[1], 200)


def test_without_any_server_a_request_is_refused_and_so_is_health(loop, site, tmp_path):
    async def run():
        urls = [NOWHERE, NOWHERE.replace(":9", ":11"), NOWHERE.replace(":9", ":13")]
        async with gateway_of(tmp_path, fleet_options(urls, MODELS)) as gateway, client() as session:
            status, headers, body = await ask(session, gateway, chat())
            async with session.get(f"{gateway.url}/health") as response:
                return status, headers["retry-after"], json.loads(body)["error"]["code"], response.status

    assert loop.run(run()) == (503, "1", "no_server", 503)
    assert records(tmp_path)[0]["outcome"] == "rejected"


def test_every_request_ends_once_while_servers_fail_hang_slow_down_cut_and_restart(loop, site, tmp_path):
    async def run():
        fleet = emulated(site, lengths=12)
        await fleet.start()
        health = {"interval_s": 0.05, "timeout_s": 0.2, "failures": 2}
        options = fleet_options(fleet.urls, MODELS, speed=20.0, health=health, limits={"first_byte_s": 1.0})
        ends = []
        async with gateway_of(tmp_path, options) as gateway, client() as session:
            done = asyncio.Event()

            async def clients(number):
                while not done.is_set():
                    status, headers, body = await ask(session, gateway, chat(stream=True, seed=number))
                    ends.append((headers["x-jaxroute-request-id"], status, body))

            tasks = [asyncio.create_task(clients(number)) for number in range(8)]
            for expert, name in ((2, "fail"), (1, "cut"), (0, "hang"), (2, "slow")):
                before = len(ends)
                await fault(session, fleet, expert, name)
                await until(lambda before=before: len(ends) > before + 25)
                await fault(session, fleet, expert, "recover")
                await until(lambda: all(gateway.proxy.health.up))
            before = len(ends)
            await fleet.stop([1])
            await until(lambda: len(ends) > before + 25)
            await fleet.start([1])
            await until(lambda: all(gateway.proxy.health.up))
            done.set()
            await asyncio.gather(*tasks)
            await until(lambda: not gateway.proxy.exchanges)
            loads = gateway.proxy.policies.router.loads
        await fleet.stop()
        return ends, loads

    ends, loads = loop.run(run())
    found = {record["id"]: record for record in records(tmp_path)}
    assert len(found) == len(records(tmp_path)) == len(ends)
    assert loads.running.sum() == loads.waiting.sum() == 0
    for request_id, status, body in ends:
        record = found[request_id]
        if status == 200 and body.endswith(b"data: [DONE]\n\n"):
            assert record["outcome"] == "completed"
            assert record["output_tokens"] == 12
        elif status == 200:
            assert json.loads(body.rsplit(b"data: ", 1)[1])["error"]["code"] == "server_failed"
            assert record["outcome"] == "failed"
        else:
            assert json.loads(body)["error"]["code"] in ("server_failed", "no_server", "queue_full", "timeout")
            assert record["status"] == status
    outcomes = [record["outcome"] for record in found.values()]
    assert outcomes.count("completed") > 0.8 * len(outcomes)
    assert "failed" in outcomes  # the answers that were cut


# --- Away ---------------------------------------------------------------------------------------------------


def test_what_is_not_worth_its_seat_is_declined_at_once_unless_its_class_forbids(loop, site, tmp_path):
    async def run():
        fleet = emulated(site)
        await fleet.start()
        options = fleet_options(
            fleet.urls,
            MODELS,
            speed=20.0,
            policy="impact_greedy+decline",
            classes={"standard": {"normalised": 1e-5}, "firm": {"normalised": 1e-5, "decline": False}},
        )
        async with gateway_of(tmp_path, options) as gateway, client() as session:
            answers = [
                await ask(session, gateway, chat(max_tokens=2) | more, headers)
                for more, headers in (({}, None), ({}, {"x-jaxroute-class": "firm"}), ({"model": MODELS[0]}, None))
            ]
            await until(lambda: not gateway.proxy.exchanges)
        await fleet.stop()
        return answers

    declined, firm, named = loop.run(run())
    assert declined[0] == 429
    assert json.loads(declined[2])["error"]["code"] == "declined"
    assert declined[1]["retry-after"] == "1"
    assert "x-jaxroute-expert" not in declined[1]
    assert firm[0] == named[0] == 200
    found = records(tmp_path)
    assert [record["outcome"] for record in found] == ["declined", "completed", "completed"]
    assert [record["choice"] for record in found] == [-1, *(found[1]["choice"], 0)]
    assert found[0]["qos"] == 0


def test_with_a_cloud_it_goes_there_unless_it_must_not_leave(loop, site, tmp_path):
    async def run():
        async def answer(request):
            usage = {"prompt_tokens": 100, "completion_tokens": 50}
            return web.json_response({"choices": [{"message": {"content": "from afar"}}], "usage": usage})

        async with OddServer(answer) as server:
            fleet = emulated(site)
            await fleet.start()
            cloud = {"url": server.url, "model": "large", "price_per_request": 0.01, "price_per_1k_tokens": 0.1}
            options = fleet_options(
                fleet.urls,
                MODELS,
                speed=20.0,
                policy="impact_greedy+decline",
                classes={"standard": {"e2e": 3.0}},
                # Nothing at the site is any good.
                experts=[
                    {"url": url, "model": model, "quality": 0.0} for url, model in zip(fleet.urls, MODELS, strict=True)
                ],
                cloud=cloud,
            )
            async with gateway_of(tmp_path, options) as gateway, client() as session:
                away = await ask(session, gateway, chat())
                local = await ask(session, gateway, chat(), {"x-jaxroute-local-only": "1"})
                await until(lambda: not gateway.proxy.exchanges)
                server.answer = lambda request: web_error()
                back = await ask(session, gateway, chat())
                await until(lambda: not gateway.proxy.exchanges)
            await fleet.stop()
            return away, local, back, server.seen

    async def web_error():
        return web.Response(status=500)

    away, local, back, seen = loop.run(run())
    assert (away[0], away[1]["x-jaxroute-expert"]) == (200, "cloud")
    assert seen[0]["model"] == "large"
    assert (local[0], json.loads(local[2])["error"]["code"]) == (429, "declined")
    # A cloud that fails is not asked twice.
    assert json.loads(back[2])["error"]["code"] == "declined"
    found = records(tmp_path)
    assert (found[0]["expert"], found[0]["outcome"], found[0]["spent"]) == ("cloud", "completed", 0.01 + 0.1 * 0.15)
    assert found[0]["cloud"]["quality"] == pytest.approx(0.8)
    assert [one["expert"] for one in found[2]["tries"]] == ["cloud"]


# --- The guard ----------------------------------------------------------------------------------------------

SITE = np.full((len(FIELDS["site"]), 3), 10.0)
SEEN = tuple(np.ones(shape, np.float32) for shape in ((len(FIELDS["batch"]), 4, 3), (len(FIELDS["experts"]), 3)))
SEEN = (*SEEN, np.ones(len(FIELDS["arrival"]), np.float32))


def fallback(*seen):
    return 1, np.array([0.0, 1.0, 0.0]), 0.5


def choice(guard):
    return int(guard(*SEEN)[0]), guard.reason


def test_a_policy_that_raises_is_replaced():
    def broken(*seen):
        raise RuntimeError("no weights")

    guard = Guard(broken, fallback, seconds=WAIT, site=SITE)
    assert choice(guard) == (1, RAISED)
    assert guard.detail == "RuntimeError: no weights"
    guard.close()


@pytest.mark.parametrize("answer", [(7, [0, 1, 2], 0), (0, [0, np.nan, 2], 0), (0, [0, 1], 0), ("x", [0, 1, 2], 0)])
def test_a_policy_that_makes_no_sense_is_replaced(answer):
    guard = Guard(lambda *seen: answer, fallback, seconds=WAIT, site=SITE)
    assert choice(guard) == (1, RAISED)
    guard.close()


def test_a_policy_that_sleeps_holds_up_nobody_and_is_used_again_once_it_wakes():
    awake, answered = threading.Event(), threading.Event()

    def slow(*seen):
        awake.wait(WAIT)
        answered.set()
        return 2, np.zeros(3), 0.0

    guard = Guard(slow, fallback, seconds=0.05, site=SITE)
    assert choice(guard) == (1, LATE)
    assert choice(guard) == (1, LATE)
    assert guard.detail == "an earlier decision is still being taken"
    awake.set()
    answered.wait(WAIT)
    guard._seconds = WAIT
    while (latest := choice(guard))[1] == LATE:
        pass
    assert latest == (2, None)
    guard.close()


@pytest.mark.parametrize(
    ("trained", "detail"),
    [
        (Trained(3, 9.0, 10, 10.0), None),
        (Trained(2, 9.0, 10, 10.0), "3 experts, and 2 in training"),
        (Trained(3, 9.0, 0, 10.0), "a prompt of 1 tokens, and 0 in training"),
        (Trained(3, 9.0, 10, 0.5), "an answer of 1 predicted tokens, and 0 in training"),
        (Trained(3, 0.1, 10, 10.0), "3.3 times the greatest load in training"),
    ],
)
def test_what_is_greater_than_in_training_is_the_fallbacks(trained, detail):
    guard = Guard(lambda *seen: (2, np.zeros(3), 0.0), fallback, seconds=WAIT, site=SITE, trained=trained)
    assert choice(guard) == ((1, OUTSIDE) if detail else (2, None))
    assert guard.detail == detail
    guard.close()


def test_the_gateway_answers_whatever_its_policy_does_and_counts_it(loop, site, tmp_path):
    async def run():
        fleet = emulated(site)
        await fleet.start()
        options = fleet_options(fleet.urls, MODELS, speed=20.0, policy="round_robin", fallback="quality_only")
        async with gateway_of(tmp_path, options) as gateway, client() as session:
            guard = gateway.proxy.policies.guard
            usual = guard._decide
            guard._decide = lambda *seen: 1 / 0
            broken = await ask(session, gateway, chat(max_tokens=2))
            guard._decide, guard._trained = usual, Trained(2, 9e9, 9999, 9e9)
            larger = await ask(session, gateway, chat(max_tokens=2))
            guard._trained = None
            fine = await ask(session, gateway, chat(max_tokens=2))
            await until(lambda: not gateway.proxy.exchanges)
            async with session.get(f"{gateway.url}/metrics") as response:
                page = await response.text()
        await fleet.stop()
        return broken, larger, fine, page

    broken, larger, fine, page = loop.run(run())
    for answer in (broken, larger):
        assert (answer[0], answer[1]["x-jaxroute-policy"], answer[1]["x-jaxroute-expert"]) == (
            *(200, "quality_only"),
            MODELS[2],
        )
    assert fine[1]["x-jaxroute-policy"] == "round_robin"
    assert 'jaxroute_fallbacks_total{reason="raised"} 1.0' in page
    assert 'jaxroute_fallbacks_total{reason="outside training"} 1.0' in page
    found = records(tmp_path)
    assert [record["guard"] for record in found] == [RAISED, OUTSIDE, None]
    assert [record["fallback"] for record in found] == ["quality_only", "quality_only", None]


# --- Log, reload, restart -----------------------------------------------------------------------------------


def test_the_log_is_rotated_and_keeps_prompts_only_if_told(loop, site, tmp_path):
    async def run(folder, **log):
        fleet = emulated(site)
        await fleet.start()
        folder.mkdir()
        options = fleet_options(fleet.urls, MODELS, speed=20.0, log={"path": "log/d.jsonl", **log})
        async with gateway_of(folder, options) as gateway, client() as session:
            for _ in range(6):
                await ask(session, gateway, chat(max_tokens=1))
        await fleet.stop()

    loop.run(run(tmp_path / "a", rotate_bytes=2000, keep=3))
    loop.run(run(tmp_path / "b", prompts=True))
    files = sorted(path.name for path in (tmp_path / "a/log").iterdir())
    assert files == ["d.jsonl", "d.jsonl.1", "d.jsonl.2", "d.jsonl.3"]
    assert all("an edge" not in path.read_text() for path in (tmp_path / "a/log").iterdir())
    assert {record["prompt"] for record in read_decisions(tmp_path / "b/log/d.jsonl").records} == {"What is an edge?"}


def test_torn_lines_are_skipped_and_counted_and_cost_no_other_line(loop, site, tmp_path):
    async def run():
        fleet = emulated(site, lengths=3)
        await fleet.start()
        options = fleet_options(fleet.urls, MODELS, speed=20.0)
        for _ in range(2):
            async with gateway_of(tmp_path, options) as gateway, client() as session:
                await asyncio.gather(*(ask(session, gateway, chat(stream=True)) for _ in range(20)))
            with open(tmp_path / "decisions.jsonl", "ab") as file:
                file.write(b'{"format":"jaxroute-decision","id":"req-')
        await fleet.stop()

    loop.run(run())
    path = tmp_path / "decisions.jsonl"
    log = read_decisions(path)
    assert (len(log.records), log.torn) == (40, 2)
    times = [record["arrival_time"] for record in log.records]
    assert times == sorted(times)
    # Read as it is by the commands trace and calibrate.
    trace = read_trace(path)
    completed = [record for record in log.records if record["outcome"] == "completed"]
    assert (trace.format, len(trace.arrival_time), trace.torn) == ("gateway", len(completed), 2)
    assert trace.failed == 40 - len(completed)
    with pytest.raises(UserError, match=r"has requests of .*; name one of them, such as .*decisions.jsonl#"):
        read_log(path)
    experts = [record["expert"] for record in completed]
    most = max(set(experts), key=experts.count)
    if experts.count(most) >= 30:
        assert len(read_log(f"{path}#{most}").ttft) == experts.count(most)
    else:
        with pytest.raises(UserError, match=f"has {experts.count(most)} requests; a calibration needs at least 30"):
            read_log(f"{path}#{most}")


def test_a_reload_changes_the_policy_and_drops_nothing(loop, site, tmp_path):
    async def run():
        release = asyncio.Event()

        async def answer(request):
            response = await begin_stream(request)
            await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
            await release.wait()
            await response.write(b'data: {"choices":[],"usage":{"completion_tokens":9}}\n\ndata: [DONE]\n\n')
            return response

        async with OddServer(answer) as patient:
            fleet = emulated(site)
            await fleet.start()
            options = fleet_options([*fleet.urls[:2], patient.url], MODELS, speed=20.0, policy="quality_only")
            async with gateway_of(tmp_path, options) as gateway, client() as session:
                before = [asyncio.create_task(ask(session, gateway, chat(stream=True))) for _ in range(2)]
                await until(lambda: len(patient.seen) == 2)
                write_fleet(tmp_path / "fleet.yaml", options | {"policy": "shortest_queue"})
                await gateway.reload()
                loads = gateway.proxy.policies.router.loads
                after = await ask(session, gateway, chat(max_tokens=2))
                # A mistake leaves all as it is.
                write_fleet(tmp_path / "fleet.yaml", options | {"policy": "shortest_qeue"})
                await gateway.reload()
                still = await ask(session, gateway, chat(max_tokens=2))
                release.set()
                answers = await asyncio.gather(*before)
                await until(lambda: not gateway.proxy.exchanges)
                empty = gateway.proxy.policies.router.loads
            await fleet.stop()
        return answers, loads, after, still, empty

    answers, loads, after, still, empty = loop.run(run())
    assert all(status == 200 and body.endswith(b"data: [DONE]\n\n") for status, _, body in answers)
    # The new policy knows of those in flight.
    assert (loads.running + loads.waiting).tolist() == [0, 0, 2]
    assert after[1]["x-jaxroute-policy"] == still[1]["x-jaxroute-policy"] == "shortest_queue"
    assert after[1]["x-jaxroute-expert"] == MODELS[0]
    assert (empty.running + empty.waiting).sum() == 0
    found = records(tmp_path)
    assert [record["outcome"] for record in found] == ["completed"] * 4
    assert [record["policy"] for record in found] == ["quality_only"] * 2 + ["shortest_queue"] * 2


def test_stopping_ends_what_is_in_flight_and_takes_no_more(loop, site, tmp_path):
    async def run():
        fleet = emulated(site, lengths=100)
        await fleet.start()
        async with client() as session:
            context = gateway_of(tmp_path, fleet_options(fleet.urls, MODELS, speed=20.0))
            gateway = await context.__aenter__()
            begun = asyncio.create_task(ask(session, gateway, chat(stream=True)))
            await until(lambda: gateway.proxy.exchanges)
            await context.__aexit__(None, None, None)
            status, _, body = await begun
        await fleet.stop()
        return status, body

    status, body = loop.run(run())
    assert status == 200
    assert body.endswith(b"data: [DONE]\n\n")
    assert [record["outcome"] for record in records(tmp_path)] == ["completed"]


@pytest.fixture
def commands(tmp_path):
    """Starts commands of jaxroute as processes, which end with the test."""
    root = Path(__file__).parents[1]
    started = []

    def start(module, *words):
        command = [sys.executable, "-m", module, *words]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(WAIT)
        process.stdout.close()


def test_the_commands_start_reload_are_killed_and_start_again(loop, commands, tmp_path):
    emulator = commands("jaxroute.emulate", "site=edge3", "--port", "0", "--speed", "20", "--fleet", "fleet.yaml")
    assert [emulator.stdout.readline().split()[1] for _ in range(3)] == MODELS
    assert emulator.stdout.readline() == "Use it with: python -m jaxroute.gateway fleet.yaml\n"

    def gateway():
        process = commands("jaxroute.gateway", "fleet.yaml", "--listen", "127.0.0.1:0")
        line = process.stdout.readline()
        assert "impact_greedy+rate_price, 3 experts" in line
        return process, line.split()[0]

    async def load(url, process):
        """Ask until the gateway is killed; returns how many were answered."""
        answered = 0

        async def one(session):
            nonlocal answered
            while True:
                async with session.post(
                    f"{url}/v1/chat/completions", json=chat(stream=True, seed=answered)
                ) as response:
                    await response.read()
                answered += 1
                if answered == 60:
                    process.kill()

        async with client() as session:
            await asyncio.gather(*(one(session) for _ in range(6)), return_exceptions=True)
        return answered

    process, url = gateway()
    answered = loop.run(load(url, process))
    log = read_decisions(tmp_path / "decisions.jsonl")
    assert log.torn <= 1
    assert 0 < len(log.records) <= answered + 6

    process, url = gateway()

    async def once(policy):
        """Ask until this policy decides; it may decline."""
        async with client() as session:
            while True:
                async with session.post(f"{url}/v1/chat/completions", json=chat(max_tokens=1)) as response:
                    if response.headers["x-jaxroute-policy"] == policy:
                        return response.status

    assert loop.run(once("impact_greedy+rate_price")) in (200, 429)
    text = (tmp_path / "fleet.yaml").read_text()
    (tmp_path / "fleet.yaml").write_text(text.replace("impact_greedy+rate_price", "shortest_queue"))
    process.send_signal(signal.SIGHUP)
    assert loop.run(once("shortest_queue")) == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT) == 0
    assert read_decisions(tmp_path / "decisions.jsonl").torn == log.torn
    emulator.send_signal(signal.SIGINT)
    assert emulator.wait(WAIT) == 0


def test_a_port_in_use_a_log_that_cannot_be_written_and_a_public_address_are_refused(loop, site, tmp_path):
    async def run():
        fleet = emulated(site)
        await fleet.start()
        path = tmp_path / "fleet.yaml"
        busy = f"127.0.0.1:{fleet.ports[0]}"
        write_fleet(path, fleet_options(fleet.urls, MODELS, listen=busy))
        try:
            with pytest.raises(UserError, match=rf"listen={busy} cannot be listened on"):
                await (await asyncio.to_thread(Gateway, lambda: load_fleet(path), tmp_path)).start()
        finally:
            await fleet.stop()
        write_fleet(path, fleet_options(fleet.urls, MODELS, log={"path": "fleet.yaml/d.jsonl"}))
        with pytest.raises(UserError, match=r"log.path: .*/fleet.yaml/d.jsonl cannot be written"):
            await (await asyncio.to_thread(Gateway, lambda: load_fleet(path), tmp_path)).start()
        write_fleet(path, fleet_options(fleet.urls, MODELS, listen="0.0.0.0:0"))
        with pytest.raises(UserError, match=r"listen=0.0.0.0:0 can be reached from other machines.*--insecure"):
            await asyncio.to_thread(Gateway, lambda: load_fleet(path), tmp_path)
        await asyncio.to_thread(lambda: Gateway(lambda: load_fleet(path), tmp_path, insecure=True))

    loop.run(run())

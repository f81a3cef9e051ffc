"""What the gateway does in trouble: servers that fail under load, and clients that misbehave.

`python -m benchmarks.gateway_trouble [--quick]` starts emulated servers and a gateway as processes of their own.

- *Faults*: the same load twice, once undisturbed, once with a server in turn failing, hanging, slow and cutting its
  streams. It prints how requests ended, whether the log has each of them once, and the average QoS of both.
- *Abuse*: clients that connect and vanish, malformed bodies, a body of 100 MB. It prints the gateway's memory before
  and after, and how malformed bodies were answered.

It writes outputs/benchmarks/gateway_trouble.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.table import Table

from benchmarks.gateway import gateway, prompts_of, servers
from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.decisions import read_decisions
from jaxroute.devices import use_compilation_cache
from jaxroute.gateway.load import Planned, Sent, poisson, send_all
from jaxroute.scenarios import build_env

FAULTS: tuple[dict[str, Any], ...] = (
    {"fault": "fail"},
    {"fault": "hang"},
    {"fault": "slow", "factor": 4.0},
    {"fault": "cut"},
)
POLICY = "impact_greedy+rate_price"


async def disturb(experts: Sequence[dict[str, Any]], seconds: float) -> None:
    """Break one server after the other, in another way each time, for half of the time that there is for it."""
    turns = 2 * len(FAULTS)
    async with aiohttp.ClientSession() as session:
        for number in range(turns):
            url = experts[number % len(experts)]["url"].removesuffix("/v1") + "/emulator"
            for change in (FAULTS[number % len(FAULTS)], {"fault": "recover"}):
                await asyncio.sleep(seconds / turns / 2)
                async with session.post(url, json=change) as response:
                    assert response.status == 200


def under_load(seconds: float, rate: float, *, faults: bool, folder: Path) -> dict[str, Any]:
    """Send a load, disturbed or not, and compare what clients saw with what the log says."""
    config = load_config(["site=edge6"])
    _, params = build_env(config)
    shares = {requirement.name: requirement.share for requirement in config.workload.requirements}
    stream = poisson(rate, len(params.bank.prompt_tokens), shares, seed=0)
    planned: list[Planned] = list(itertools.takewhile(lambda plan: plan.at < seconds, stream))
    folder.mkdir()
    log = folder / "log.jsonl"
    health = {"interval_s": 1.0, "timeout_s": 2.0}
    with (
        servers(["site=edge6"], 1.0, folder) as fleet,
        gateway(
            fleet | {"policy": POLICY}, folder, log={"path": str(log)}, health=health, limits={"first_byte_s": 20.0}
        ) as (url, _),
    ):

        async def run() -> list[Sent]:
            trouble = asyncio.ensure_future(disturb(fleet["experts"], seconds)) if faults else None
            sent = await send_all(f"{url}/v1", planned, prompts_of(params))
            if trouble is not None:
                await trouble
            return sent

        sent = asyncio.run(run())
    records = read_decisions(log).records
    seen = collections.Counter(
        "completed" if one.whole else "broken off" if one.status == 200 else str(one.code) for one in sent
    )
    qos = [record["qos"] for record in records if record["qos"] is not None]
    return {
        "requests": len(sent),
        "clients_saw": dict(seen),
        "log_says": dict(collections.Counter(record["outcome"] for record in records)),
        "each_once": len({record["id"] for record in records}) == len(records) == len(sent),
        "routed_again": sum(bool(record["tries"]) for record in records),
        "average_qos": float(np.mean(qos)),
    }


# --- Abuse --------------------------------------------------------------------------------------------------


def resident(pid: int) -> float:
    """Memory of a process, MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


async def vanish(url: str, count: int, rng: random.Random) -> None:
    """Connect, send a request or a part of it, and leave."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "auto", "prompt": "x", "stream": True}).encode()
    whole = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.5 else whole)
        await writer.drain()
        if rng.random() < 0.5:
            await asyncio.wait((asyncio.ensure_future(reader.read(1000)),), timeout=0.2)
        writer.transport.abort()

    for _ in range(count // 20):
        await asyncio.gather(*(one() for _ in range(20)))


async def malformed(url: str, count: int, rng: random.Random) -> collections.Counter[int]:
    """Send bodies with bytes changed, cut and doubled; returns how often each status came."""
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    found: collections.Counter[int] = collections.Counter()
    async with aiohttp.ClientSession() as session:

        async def one() -> None:
            changed = bytearray(body)
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(changed))
                changed[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            async with session.post(f"{url}/v1/chat/completions", data=bytes(changed)) as response:
                await response.read()
                found[response.status] += 1

        for _ in range(count // 20):
            await asyncio.gather(*(one() for _ in range(20)))
    return found


async def huge(url: str) -> int:
    """Send a body of 100 MB piece by piece; returns the status, 413 if the connection was closed on it."""

    async def pieces() -> Any:
        for _ in range(1000):
            yield b"x" * 100_000

    try:
        post = aiohttp.request("POST", f"{url}/v1/completions", data=pieces())
        async with post as response:
            return response.status
    except aiohttp.ClientError:
        return 413


def abused(count: int, folder: Path) -> dict[str, Any]:
    """Abuse a gateway twice, and compare its memory after each time."""
    folder.mkdir()
    rng = random.Random(0)
    # The fallback is quick, whatever the load; nothing is declined.
    options = {"policy": "round_robin", "log": {"path": None}}
    with (
        servers(["site=edge6"], 20.0, folder) as fleet,
        gateway(fleet | options, folder) as (url, process),
    ):
        memory = [resident(process.pid)]
        statuses: collections.Counter[int] = collections.Counter()
        for _ in range(2):
            asyncio.run(vanish(url, count // 10, rng))
            statuses += asyncio.run(malformed(url, count, rng))
            statuses[asyncio.run(huge(url))] += 1
            memory.append(resident(process.pid))
    return {"memory_mib": memory, "statuses": dict(statuses)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one minute of load, and less abuse")
    chosen = parser.parse_args(argv)
    use_compilation_cache()
    seconds, rate, count = (60.0, 6.0, 2000) if chosen.quick else (600.0, 6.0, 10_000)
    with tempfile.TemporaryDirectory() as name:
        figures = {
            "undisturbed": under_load(seconds, rate, faults=False, folder=Path(name) / "calm"),
            "faults": under_load(seconds, rate, faults=True, folder=Path(name) / "faults"),
            "abuse": abused(count, Path(name) / "abuse"),
        }
    table = Table("", "requests", "clients saw", "routed again", "each once in the log", "average QoS", title="trouble")
    for way in ("undisturbed", "faults"):
        row = figures[way]
        saw = ", ".join(f"{number} {what}" for what, number in sorted(row["clients_saw"].items()))
        table.add_row(
            *(way, str(row["requests"]), saw, str(row["routed_again"])),
            *("yes" if row["each_once"] else "no", f"{row['average_qos']:.3f}"),
        )
    print("abuse:", figures["abuse"])
    publish("gateway_trouble", table, figures, {}, remember=False)


if __name__ == "__main__":
    main()

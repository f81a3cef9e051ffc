"""What the gateway costs, and whether it decides as the environment does.

`python -m benchmarks.gateway [--quick]` starts emulated servers and a gateway as processes of their own.

- *Overhead*: clients in a closed loop, at 1, 16 and 64 streams, directly at the servers (in turn) and through the
  gateway (policy `round_robin`, which does the same), block by block in turn. It prints the time to the first token,
  what the way adds to it, the requests per second, and those per second of a core's time that the proxy uses.
  `--litellm` and `--vllm-router` name executables of these two, to compare with; each from an environment of its own.
- *Parity*: an episode of the environment, with what its policy chose, is sent to the gateway at the same times. It
  prints how often the gateway chose the same, and the average QoS of both.

It writes outputs/benchmarks/gateway.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from omegaconf import OmegaConf
from rich.table import Table

from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.decisions import read_decisions
from jaxroute.devices import use_compilation_cache
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.gateway.load import Planned, Prompts, Sent, send_all
from jaxroute.policies import Policy, rules_named
from jaxroute.runs import read_policy
from jaxroute.scenarios import build_env

STREAMS = (1, 16, 64)
TOKENS = 16
"""Of an answer in the overhead's benchmark; every answer of the bank to this prompt is longer."""
KEY = "sk-benchmark"
"""LiteLLM wants one."""
MESSAGES = [{"role": "user", "content": "word " * 80}]


# --- Parity -------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """An episode of the environment."""

    times: Float[np.ndarray, "request"]
    """Of arrival, s."""
    rows: Int[np.ndarray, "request"]
    """In the bank."""
    classes: Int[np.ndarray, "request"]
    choices: Int[np.ndarray, "request"]
    """What the policy chose, or would have chosen: an expert, or one more than the last for away."""
    qos: Float[np.ndarray, "request"]
    """nan where a request had not ended yet."""


def played(
    env: EdgeRouting,
    params: EnvParams,
    policy: Policy,
    requests: int,
    *,
    seed: int = 0,
    done: Int[np.ndarray, "request"] | None = None,
) -> Episode:
    """Let a policy play an episode in the environment; or do what was `done`, and note what it would have chosen.

    Two routers that differ once see other sites ever after, so each choice is compared in the place of the other's.
    """
    policy_params = policy.params

    def step(carry: Any, given: Any) -> Any:
        obs, state, memory = carry
        key, forced = given
        key_act, key_env = jax.random.split(key)
        preferred, memory = policy.act(policy_params, obs, key_act, memory)
        action = preferred if done is None else forced
        request = state.request
        obs, state, _, _, _, info = env.step(key_env, state, action, params)
        kept = {name: info[name] for name in ("gap", "ended", "request", "qos", "rejected", "declined")}
        return (obs, state, memory), (request.row, request.limits, preferred, kept)

    @jax.jit
    def run(key: Any) -> Any:
        key_reset, key_steps = jax.random.split(key)
        begin = (*env.reset(key_reset, params), jax.tree.map(jnp.asarray, policy.memory))
        forced = jnp.zeros(requests, jnp.int32) if done is None else jnp.asarray(done, jnp.int32)
        return jax.lax.scan(step, begin, (jax.random.split(key_steps, requests), forced))[1]

    rows, limits, actions, info = jax.device_get(run(jax.random.key(seed)))
    classes = np.zeros(requests, int)
    for name, of_class in params.limits._asdict().items():
        if of_class is not None:
            classes = np.abs(getattr(limits, name)[:, None] - np.asarray(of_class)).argmin(1)
    qos = np.full(requests, np.nan)
    steps, slots, experts = np.nonzero(info["ended"])
    qos[info["request"][steps, slots, experts]] = info["qos"][steps, slots, experts]
    qos[info["rejected"] | info["declined"]] = 0
    times = np.concatenate([[0.0], np.cumsum(info["gap"].astype(np.float64))[:-1]])
    return Episode(times, rows, classes, actions, qos)


def planned_of(episode: Episode, names: Sequence[str], speed: float) -> list[Planned]:
    """Return the episode's requests for a gateway whose servers are `speed` times as quick."""
    columns = zip(episode.times / speed, episode.rows, episode.classes, strict=True)
    return [Planned(float(at), int(row), names[of_class]) for at, row, of_class in columns]


def choices_of(sent: Sequence[Sent], models: Sequence[str]) -> Int[np.ndarray, "request"]:
    """Return what the gateway chose: an expert, one more than the last for away, -1 if it refused for other reasons."""
    return np.array(
        [models.index(one.expert) if one.expert else len(models) if one.code == "declined" else -1 for one in sent]
    )


def prompts_of(params: EnvParams) -> Prompts:
    """Return what a client knows of the bank."""
    return Prompts(*(np.asarray(getattr(params.bank, name)) for name in Prompts._fields))


def policy_named(name: str) -> Policy:
    """Return a rule, or a pretrained router."""
    if name.partition("+")[0].isidentifier() and not (Path("jaxroute/pretrained") / name).exists():
        return rules_named([name])[0]
    return read_policy(Path("pretrained") / name).policy


# --- Processes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(options: Sequence[str], speed: float, folder: Path) -> Any:
    """Run emulated servers as a process; gives their fleet file's options."""
    path = folder / "emulated.yaml"
    command = [sys.executable, "-m", "jaxroute.emulate", *options, "--port=0", f"--speed={speed}", f"--fleet={path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Use it"):
            if process.poll() is not None:
                raise RuntimeError("the emulated servers have not started")
        yield OmegaConf.to_container(OmegaConf.load(path))
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def gateway(fleet: dict[str, Any], folder: Path, **options: Any) -> Any:
    """Run a gateway as a process; gives its address."""
    path = folder / f"{time.monotonic_ns()}.yaml"
    # The machine is shared with clients and servers: a late decision is no news here.
    usual = {"listen": "127.0.0.1:0", "guard": {"decision_ms": 1000.0}, "health": {"timeout_s": 10.0}}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(fleet | usual | options)))
    process = subprocess.Popen([sys.executable, "-m", "jaxroute.gateway", path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0], process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def litellm(executable: Path, fleet: dict[str, Any], folder: Path) -> Any:
    """Run LiteLLM's proxy as a process, with the same servers behind one name; gives its address."""
    models = [
        {
            "model_name": "auto",
            # A name whose tokenizer it has; of others it asks the network. Emulated servers take any.
            "litellm_params": {"model": "openai/gpt-4o", "api_base": expert["url"], "api_key": "none"},
        }
        for expert in fleet["experts"]
    ]
    path = folder / "litellm.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"model_list": models})))
    more = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": KEY}
    with rival([executable, "--config", path, "--telemetry", "False"], "/health/liveliness", more) as running:
        yield running


@contextlib.contextmanager
def vllm_router(executable: Path, fleet: dict[str, Any], folder: Path) -> Any:
    """Run vLLM's router as a process, with the same servers in turn; gives its address."""
    urls = [expert["url"].removesuffix("/v1") for expert in fleet["experts"]]
    options = ["--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"]
    options += ["--log-dir", str(folder)]
    with rival([executable, "--worker-urls", *urls, *options], "/health", {}) as running:
        yield running


@contextlib.contextmanager
def rival(command: Sequence[Any], alive: str, environment: dict[str, str]) -> Any:
    """Run a proxy as a process, and wait until its page `alive` is there; gives its address."""
    port = free_port()
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_until_alive(f"{url}{alive}", process))
        yield url, process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _until_alive(url: str, process: subprocess.Popen) -> None:
    async with aiohttp.ClientSession() as session:
        while process.poll() is None:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError(f"{process.args} has not started")


# --- Overhead -----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of requests in a closed loop."""

    ttft: Float[np.ndarray, "request"]
    """s."""
    rate: float
    """Requests per second."""


async def closed_loop(urls: Sequence[str], models: Sequence[str], streams: int, requests: int) -> Block:
    """Let `streams` clients ask one after the other, at the addresses in turn."""
    turns = itertools.cycle(zip(urls, models, strict=True))
    left, ttft = requests, []

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            url, model = next(turns)
            body = {"model": model, "messages": MESSAGES, "max_tokens": TOKENS, "stream": True}
            start = time.perf_counter()
            headers = {"authorization": f"Bearer {KEY}"}
            async with session.post(f"{url}/chat/completions", json=body, headers=headers) as response:
                if response.status != 200:
                    raise RuntimeError(await response.text())
                await response.content.readany()
                ttft.append(time.perf_counter() - start)
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(one(session) for _ in range(streams)))
        return Block(np.array(ttft), requests / (time.perf_counter() - start))


def overhead(
    fleet: dict[str, Any], proxies: dict[str, tuple[str, int]], blocks: int, requests: int
) -> list[dict[str, Any]]:
    """Measure direct and through each proxy, in turn.

    Args:
        fleet: the servers.
        proxies: address and process of each.
        blocks: of requests, per way and number of streams.
        requests: of a block.
    """
    experts = fleet["experts"]
    ways = {"direct": ([expert["url"] for expert in experts], [expert["model"] for expert in experts])}
    ways |= {name: ([f"{url}/v1"], ["auto"]) for name, (url, _) in proxies.items()}
    rows: list[dict[str, Any]] = []
    for streams in STREAMS:
        found: dict[str, list[Block]] = {way: [] for way in ways}
        cpu = dict.fromkeys(ways, 0.0)
        for _ in range(blocks):
            for way, (urls, models) in ways.items():
                pid = proxies[way][1] if way in proxies else None
                before = cpu_seconds(pid) if pid else 0.0
                found[way].append(asyncio.run(closed_loop(urls, models, streams, requests)))
                cpu[way] += cpu_seconds(pid) - before if pid else 0.0
        direct: tuple[float, float] | None = None
        for way, of_way in found.items():
            ttft = np.concatenate([block.ttft for block in of_way])
            median, high = (1000 * float(value) for value in np.percentile(ttft, (50, 99)))
            direct = direct or (median, high)
            rows.append(
                {
                    "streams": streams,
                    "way": way,
                    "p50_ms": median,
                    "p99_ms": high,
                    "added_p50_ms": median - direct[0],
                    "added_p99_ms": high - direct[1],
                    "rate": float(np.median([block.rate for block in of_way])),
                    "per_core": blocks * requests / cpu[way] if cpu[way] else None,
                }
            )
    return rows


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- All of it ----------------------------------------------------------------------------------------------


def parity(options: Sequence[str], name: str, requests: int, speed: float, folder: Path) -> dict[str, float]:
    """Compare the gateway with the environment on one episode."""
    config = load_config(options)
    env, params = build_env(config)
    episode = played(env, params, policy_named(name), requests)
    names = [requirement.name for requirement in config.workload.requirements]
    log = folder / f"parity-{name}.jsonl"
    own = folder / name
    own.mkdir()
    with (
        servers(options, speed, own) as fleet,
        gateway(fleet | {"policy": name}, own, log={"path": str(log)}) as (url, _),
    ):
        sent = asyncio.run(send_all(f"{url}/v1", planned_of(episode, names, speed), prompts_of(params)))
    choices = choices_of(sent, config.site.models)
    preferred = played(env, params, policy_named(name), requests, done=choices).choices
    records = read_decisions(log).records
    quality = np.asarray(params.bank.quality)
    in_time = np.array([bool(record["in_time"]) for record in records])
    known = np.isfinite(episode.qos)
    served = np.minimum(choices, len(config.site.models) - 1)
    qos = np.where(in_time & (choices >= 0), quality[episode.rows, served], 0.0)
    error = np.std(qos[known] - episode.qos[known]) / np.sqrt(known.sum())
    return {
        "requests": requests,
        "same": float((choices == preferred).mean()),
        "declined": float((choices == len(config.site.models)).mean()),
        "qos_gateway": float(qos[known].mean()),
        "qos_environment": float(episode.qos[known].mean()),
        "qos_difference_ci95": float(1.96 * error),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--only", choices=("overhead", "parity"))
    parser.add_argument("--litellm", type=Path, metavar="EXECUTABLE", help="LiteLLM's proxy, to compare with")
    parser.add_argument("--vllm-router", type=Path, metavar="EXECUTABLE", help="vLLM's router, likewise")
    chosen = parser.parse_args(argv)
    use_compilation_cache()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = Table(title="gateway")
        if chosen.only != "parity":
            # Ten times as quick as a real site, so that servers do not hold up the clients, and with longer queues, as
            # all clients begin at once.
            room = [f"site.experts.{expert}.max_waiting=64" for expert in range(6)]
            with contextlib.ExitStack() as stack:
                fleet = stack.enter_context(servers(["site=edge6", *room], 10.0, folder))
                options = {"policy": "round_robin", "log": {"path": None}}
                url, process = stack.enter_context(gateway(fleet | options, folder))
                proxies = {"gateway": (url, process.pid)}
                for rival_name, executable in (("litellm", chosen.litellm), ("vllm_router", chosen.vllm_router)):
                    if executable is None:
                        print(f"{rival_name} is left out: no executable is given")
                        continue
                    of_rival = litellm if rival_name == "litellm" else vllm_router
                    url, process = stack.enter_context(of_rival(executable, fleet, folder))
                    proxies[rival_name] = (url, process.pid)
                rows = overhead(fleet, proxies, *((2, 100) if chosen.quick else (6, 400)))
            figures["overhead"] = rows
            for column in ("streams", "way", "first token, p50", "p99", "added, p50", "p99", "requests/s", "per core"):
                table.add_column(column, justify="right")
            for row in rows:
                times = [f"{row[name]:.1f} ms" for name in ("p50_ms", "p99_ms", "added_p50_ms", "added_p99_ms")]
                per_core = f"{row['per_core']:.0f}" if row["per_core"] else ""
                table.add_row(f"{row['streams']}", row["way"], *times, f"{row['rate']:.0f}", per_core)
        if chosen.only != "overhead":
            for policy in ("impact_greedy+rate_price", "edge6"):
                requests = 120 if chosen.quick else 800
                figures[f"parity {policy}"] = parity(["site=edge6"], policy, requests, 1.0, folder)
                print(policy, figures[f"parity {policy}"])
        main_figures = {
            f"first token at {row['streams']} streams, ms": row["p50_ms"]
            for row in figures.get("overhead", [])
            if row["way"] == "gateway"
        }
        publish("gateway", table, figures, main_figures, remember=not chosen.quick and chosen.only is None)


if __name__ == "__main__":
    main()

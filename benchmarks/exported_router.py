"""What a router loses when it is exported, and what a decision of it costs.

`python -m benchmarks.exported_router [--run RUN] [--quick]` exports the router of a run, or of a network fresh from
initialisation, and lets it drive the environment from what a gateway tells it. All rows meet the same requests at the
same times. It prints the average QoS, how often the exported router chose what the policy in the environment would have
chosen in its place, and the time of `Router.route` on one CPU core; it writes outputs/benchmarks/exported_router.json.
"""

from __future__ import annotations

import argparse
import heapq
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray
from rich.table import Table

from benchmarks.measure import in_own_process
from benchmarks.publish import publish
from jaxroute.config import load_config, read_config
from jaxroute.devices import use_compilation_cache
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import episode_keys, keys_of_episode, keys_of_step
from jaxroute.evaluation.statistics import mean_ci95, paired_difference
from jaxroute.gateway import CLOUD, DECLINED, Router
from jaxroute.networks import build_network
from jaxroute.runs import CONFIG_FILE, TrainedPolicy, load_policy, run_of, save_params, write_config
from jaxroute.scenarios import build_env, on_test_prompts
from jaxroute.serving import computed, generated, running_and_waiting
from jaxroute.training.export import export_router

EVERYTHING, STREAMING, ENDS = "everything", "first tokens and ends", "ends"
"""What the router is told: at each decision how far every request is, as the environment's policy knows it; when first
and last tokens have come back; or only the last ones."""

SEED = 1_000_000


class Played(NamedTuple):
    """Episodes side by side; leading axes step and episode."""

    counts: Bool[np.ndarray, "step episode"]
    """False once the episode is over."""
    again: Bool[np.ndarray, "step episode"]
    """A request that a failed expert has given back."""
    chosen: Int[np.ndarray, "step episode"]
    """The action: an expert, or one more than the last for away."""
    preferred: Int[np.ndarray, "step episode"]
    """What the policy in the environment would have chosen there."""
    logits: Float[np.ndarray, "step episode action"]
    """Of the exported router; nan where the policy drives."""
    policy_logits: Float[np.ndarray, "step episode action"]
    seconds: Float[np.ndarray, "step episode"]
    """Time of `Router.route`; nan where the policy drives."""
    qos: Float[np.ndarray, "episode request"]
    """nan where a request has not ended."""


class _Seen(NamedTuple):
    """What the host is given of each step; leading axis episode."""

    preferred: Any
    logits: Any
    step: Any
    request: Any
    up: Any
    running: Any
    waiting: Any
    slots: dict[str, Any]
    """Of the requests at each expert, `(expert, slot)` as the masks before."""
    info: Any
    """Of the step that led here; None at the start."""


def play(
    env: EdgeRouting,
    params: EnvParams,
    policy: TrainedPolicy,
    routers: list[Router] | None,
    told: str,
    *,
    episodes: int,
    requests: int,
    seed: int = SEED,
) -> Played:
    """Let `routers`, one per episode, or else the policy drive the first `episodes` episodes of an evaluation."""
    reset_keys, step_keys = jax.vmap(lambda key: keys_of_episode(key, requests))(episode_keys(seed, episodes))
    params_of_policy = policy.params
    carry, seen = _begin(env, policy.network, params, params_of_policy, reset_keys)
    gateways = [_Gateway(router, params, told) for router in routers or []]
    qos = np.full((episodes, requests), np.nan)
    rows = []
    while True:
        seen = jax.device_get(seen)
        counts = seen.step < requests
        if not counts.any():
            break
        chosen, logits = seen.preferred.copy(), np.full_like(seen.logits, np.nan)
        seconds = np.full(episodes, np.nan)
        for e, gateway in enumerate(gateways):
            if counts[e]:
                chosen[e], seconds[e] = gateway.route(jax.tree.map(lambda leaf, e=e: leaf[e], seen))
                logits[e] = gateway.router.logits
        rows.append((counts, seen.request.age > 0, chosen, seen.preferred, logits, seen.logits, seconds))
        routed = seen.request.number
        carry, seen = _step(env, policy.network, params, params_of_policy, step_keys, carry, jnp.asarray(chosen))
        info = jax.device_get(seen.info)
        for e in np.flatnonzero(counts):
            of_episode = jax.tree.map(lambda leaf, e=e: leaf[e], info)
            for name in ("ended", "lost"):
                at = of_episode[name]
                qos[e, of_episode["request"][at]] = of_episode["qos"][at] if name == "ended" else 0
            if of_episode["rejected"]:
                qos[e, routed[e]] = 0
                if gateways:
                    gateways[e].router.rejected(int(routed[e]))
            if of_episode["declined"]:
                qos[e, routed[e]] = 0
            elif "cloud" in of_episode and of_episode["cloud"].sent:
                qos[e, routed[e]] = of_episode["cloud"].qos
    return Played(*(np.stack(column) for column in zip(*rows, strict=True)), qos)


class _Gateway:
    """Tells a router what a gateway would learn of one episode, when it would."""

    def __init__(self, router: Router, params: EnvParams, told: str) -> None:
        self.router, self.told = router, told
        self.network_delay = np.asarray(params.site.network_delay)
        cloud = params.cloud
        self.cloud = cloud and np.stack([cloud.predicted_quality, cloud.predicted_output_tokens])
        """Its columns of the bank's predictions, (2, prompt)."""
        self.now = 0.0
        self.arrival: dict[int, float] = {}
        self.routed: dict[int, float] = {}
        self.in_flight: set[int] = set()
        self.at_cloud: set[int] = set()
        self.first_token_known: set[int] = set()
        self.up = np.ones(len(router.experts), bool)
        self.coming: list[tuple[float, int, int]] = []
        """Time, request, and tokens of the whole answer or 0 for a first token."""

    def route(self, seen: _Seen) -> tuple[int, float]:
        """Tell what has happened since the latest decision, and return the next one and how long it took, s."""
        if seen.info is not None:
            self.now += float(seen.info["gap"])
            self._listen(seen)
        request = seen.request
        number = int(request.number)
        again = float(request.age) > 0
        self.arrival.setdefault(number, self.now)
        self.routed[number] = self.now
        predictions = np.stack([request.predicted_quality, request.predicted_output_tokens])
        if self.cloud is not None:
            predictions = np.concatenate([predictions, self.cloud[:, request.row][:, None]], axis=1)
        started = time.perf_counter()
        where = self.router.route(
            number,
            now=self.now,
            prompt_tokens=int(request.prompt_tokens),
            **{
                name: float(limit)
                for name, limit in request.limits._asdict().items()
                if limit is not None and limit < np.inf
            },
            predicted_quality=predictions[0],
            predicted_output_tokens=predictions[1],
            arrived=self.arrival[number] if again else None,
            local_only=bool(request.local_only),
        )
        seconds = time.perf_counter() - started
        self.first_token_known.discard(number)
        if where == CLOUD:
            self.at_cloud.add(number)
        elif where != DECLINED:
            self.in_flight.add(number)
        self.latest = number
        return where if where >= 0 else len(self.router.experts), seconds

    def _listen(self, seen: _Seen) -> None:
        info, slots = seen.info, seen.slots
        there = seen.running | seen.waiting
        for expert, slot in np.argwhere(there & (slots["generated"] > 0)):
            number = int(slots["request"][expert, slot])
            ttft = float(slots["ttft"][expert, slot] + self.network_delay[expert])
            self._first_token(number, self.routed[number] + ttft)
        for slot, expert in np.argwhere(info["ended"]):
            number = int(info["request"][slot, expert])
            self._first_token(number, self.arrival[number] + float(info["ttft"][slot, expert]))
            came = self.arrival[number] + float(info["latency"][slot, expert])
            heapq.heappush(self.coming, (came, number, int(info["output_tokens"][slot, expert])))
        if "cloud" in info and info["cloud"].sent:
            came = self.arrival[self.latest] + float(info["cloud"].latency)
            heapq.heappush(self.coming, (came, self.latest, int(info["cloud"].output_tokens)))
        if self.told == EVERYTHING:
            # At once what an expert has said; the cloud tells no more than its end.
            self.coming = [
                (came if number in self.at_cloud else min(came, self.now), number, tokens)
                for came, number, tokens in self.coming
            ]
            heapq.heapify(self.coming)
        while self.coming and self.coming[0][0] <= self.now:
            came, number, tokens = heapq.heappop(self.coming)
            if number in self.at_cloud:
                self.router.finished(number, now=came, output_tokens=tokens)
                self.at_cloud.discard(number)
                continue
            if number not in self.in_flight:
                continue  # of an expert that has failed since
            if tokens:
                self.router.finished(number, now=came, output_tokens=tokens)
                self.in_flight.discard(number)
            elif self.told != ENDS:
                self.router.first_token(number, now=came)
        for expert in np.flatnonzero(self.up & ~seen.up):
            self.in_flight.difference_update(self.router.expert_down(expert))
        for expert in np.flatnonzero(~self.up & seen.up):
            self.router.expert_up(expert)
        self.up = seen.up
        if self.told == EVERYTHING:
            for at in zip(*np.nonzero(there), strict=True):
                self.router.progress(
                    int(slots["request"][at]),
                    now=self.now,
                    generated=int(slots["generated"][at]),
                    kv_tokens=int(slots["computed"][at]),
                    running=bool(seen.running[at]),
                )

    def _first_token(self, number: int, came: float) -> None:
        if number not in self.first_token_known:
            self.first_token_known.add(number)
            heapq.heappush(self.coming, (came, number, 0))


def _look(network: Any, weights: Any, obs: Observation, state: EnvState, info: dict[str, Any] | None) -> _Seen:
    logits, _ = network.apply(weights, network.prepare(obs))
    running, waiting = running_and_waiting(state.site)
    slots = {
        "request": state.site.slots.request,
        "ttft": state.site.slots.ttft,
        "generated": generated(state.site),
        "computed": computed(state.site),
    }
    return _Seen(jnp.argmax(logits), logits, state.step, state.request, state.up, running, waiting, slots, info)


@partial(jax.jit, static_argnums=(0, 1))
def _begin(
    env: EdgeRouting, network: Any, params: EnvParams, weights: Any, keys: PRNGKeyArray
) -> tuple[EnvState, _Seen]:
    def one(key: PRNGKeyArray) -> tuple[EnvState, _Seen]:
        obs, state = env.reset(key, params)
        return state, _look(network, weights, obs, state, None)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    env: EdgeRouting,
    network: Any,
    params: EnvParams,
    weights: Any,
    keys: PRNGKeyArray,
    states: EnvState,
    actions: Int[Any, "episode"],
) -> tuple[EnvState, _Seen]:
    def one(keys: PRNGKeyArray, state: EnvState, action: Int[Any, ""]) -> tuple[EnvState, _Seen]:
        _, key = keys_of_step(env, keys, state)
        obs, state, _, _, _, info = env.step(key, state, action, params)
        return state, _look(network, weights, obs, state, info)

    return jax.vmap(one)(keys, states, actions)


# --- The benchmark ------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What is played, and how much of it counts."""

    run: Path
    overrides: tuple[str, ...]
    episodes: int
    requests: int
    warmup: int

    def build(self) -> tuple[EdgeRouting, EnvParams, TrainedPolicy, float]:
        """Return environment, its parameters, policy and rate."""
        config = on_test_prompts(load_config(self.overrides, read_config(run_of(self.run, "run") / CONFIG_FILE)))
        env, params = build_env(config)
        return env, params, load_policy(self.run, env, params), float(params.rate[0])

    def play(self, folder: Path, told: str | None, episodes: int | None = None) -> Played:
        """Let exported routers drive that are told so much; or, told None, the policy in the environment."""
        env, params, policy, rate = self.build()
        episodes = episodes or self.episodes
        routers = None if told is None else [Router.load(folder, rate=rate) for _ in range(episodes)]
        steps = self.requests + 2 * self.warmup
        return play(env, params, policy, routers, told or "", episodes=episodes, requests=steps)


def fresh_run(run: Path, overrides: tuple[str, ...]) -> None:
    """Write a run as training would, of a network that has learned nothing: it follows the impact estimator."""
    config = load_config(overrides)
    env, params = build_env(config)
    network, key = build_network(config.network, config.env.away), jax.random.key(0)
    initialise = jax.jit(lambda key: network.init(key, network.prepare(env.reset(key, params)[0])))
    run.mkdir(parents=True)
    write_config(run, config)
    save_params(run, 0, initialise(key))


def time_decisions(judged: Judged, folder: Path) -> dict[str, float]:
    """Time of a decision on one core, ms, and of `Router.load`, s; to be called in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    started = time.perf_counter()
    Router.load(folder)
    load = time.perf_counter() - started
    times = 1000 * judged.play(folder, STREAMING, episodes=1).seconds[judged.warmup :]
    return {"p50_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99)), "load_seconds": load}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="of a trained router; an untrained one by default")
    parser.add_argument("--quick", action="store_true", help="few requests on a small site")
    options = parser.parse_args()
    use_compilation_cache()
    overrides = ("site=edge3", "workload.rate=5") if options.quick else ()
    episodes, requests, warmup = (2, 30, 5) if options.quick else (16, 800, 300)
    with tempfile.TemporaryDirectory() as scratch:
        run, folder = options.run, Path(scratch) / "router"
        if run is None:
            run = Path(scratch) / "run"
            fresh_run(run, overrides)
        try:
            export_router(run, folder, overrides=overrides)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        judged = Judged(run, overrides, episodes, requests, warmup)
        # First, and alone, so that nothing else takes the core.
        times = in_own_process(time_decisions, judged, folder)
        table = Table("told", "average QoS", "minus the policy's", "same choice, %")
        rows: dict[str, dict[str, Any]] = {}
        reference: np.ndarray | None = None
        for told in (None, EVERYTHING, STREAMING, ENDS):
            played = judged.play(folder, told)
            qos = np.nanmean(played.qos[:, warmup : warmup + requests], axis=1)
            reference = qos if reference is None else reference
            mean, ahead = mean_ci95(qos), paired_difference(qos, reference)
            later = played.counts & (np.arange(len(played.counts)) >= warmup)[:, None]
            same = 100 * float((played.chosen == played.preferred)[later].mean())
            name = told or "the policy in the environment"
            rows[name] = {"avg_qos": mean._asdict(), "ahead": ahead._asdict(), "same_percent": same}
            compared = ("", "") if told is None else (f"{ahead.mean:+.4f} ± {ahead.ci95:.4f}", f"{same:.2f}")
            table.add_row(name, f"{mean.mean:.4f} ± {mean.ci95:.4f}", *compared)
    table.caption = (
        f"Router.route on one core: median {times['p50_ms']:.3f} ms, p99 {times['p99_ms']:.3f} ms; "
        f"Router.load {times['load_seconds']:.1f} s"
    )
    figures = {"Router.route, ms": times["p50_ms"], "Router.route p99, ms": times["p99_ms"]}
    publish("exported_router", table, {"rows": rows, "times": times}, figures, remember=not options.quick)


if __name__ == "__main__":
    main()

"""Environment steps/s and simulated output tokens/s, and where the time of a step goes.

`python -m benchmarks.engine [--quick]` prints medians of several runs and writes outputs/benchmarks/engine.json. With
`--seats 12 192`, it measures `edge6` with so many seats per expert instead, and memory and requests in proportion.
One environment step is one routed request. Routing is random at a rate that keeps each site busy. The engine alone
queues a request and advances the experts to the next; a whole step also draws requests, keeps the books, assesses the
requests in flight for the reward, and observes: graph and impact estimates for every expert. The observation's share is
what a step saves whose observation nobody reads. Environments are spread over all devices; each core of a CPU is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from rich.progress import track
from rich.table import Table

import jaxroute
from benchmarks.measure import (
    EVERYWHERE,
    SPREAD,
    busy_sites,
    compile_program,
    median_seconds,
    memory_limit,
    on_all_devices,
    one_device_per_core,
)
from benchmarks.publish import publish
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.serving import Site, SiteState, SlotStatus, advance, can_accept, enqueue, slot_status

# Requests/s by site.
_BUSY = {"edge3": 5.0, "edge6": 10.0, "edge16": 27.0, "rack4": 150.0}

# Requests/s by number of seats; beyond, seats are not what bounds a server.
_SEATS = {12: 10.0, 48: 36.0, 192: 100.0, 768: 200.0}

# A run makes about this many steps in all, so that it takes a good part of a second on two cores and on an accelerator,
# within these numbers of steps for each environment.
_STEPS_PER_RUN_ON_CPU, _STEPS_PER_RUN = 2**15, 2**22
_FEWEST_STEPS, _MOST_STEPS = 2, 256


def with_seats(seats: int) -> tuple[EdgeRouting, EnvParams]:
    """Return `edge6` with servers of so many seats, a third as many places in the queue, and memory for them."""
    env, params = jaxroute.make("edge-poisson", rate=_SEATS[seats])
    site = params.site
    site = site._replace(
        max_num_seqs=jnp.full_like(site.max_num_seqs, seats),
        max_waiting=jnp.full_like(site.max_waiting, seats // 3),
        kv_capacity=site.kv_capacity * (seats // 12),
    )
    return replace(env, num_slots=seats + seats // 3), params._replace(site=site)


def num_steps(num_envs: int) -> int:
    """Return how many steps each environment makes in one run."""
    in_all = _STEPS_PER_RUN_ON_CPU if jax.default_backend() == "cpu" else _STEPS_PER_RUN
    return min(max(in_all // num_envs, _FEWEST_STEPS), _MOST_STEPS)


def env_steps(env: EdgeRouting, *, observed: bool) -> Callable[..., tuple[Any, tuple[Array, Array]]]:
    """Return a program that steps environments under random routing and adds up the tokens of what ended."""

    def program(
        params: EnvParams, start: tuple[Observation, EnvState], keys: PRNGKeyArray
    ) -> tuple[Any, tuple[Array, Array]]:
        def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, tuple[Array, Array]]:
            _, state = carry
            (num_envs,) = state.step.shape
            key_action, key_env = jax.random.split(key)
            action = jax.random.randint(key_action, (num_envs,), 0, env.num_actions)
            obs, state, reward, _, _, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                jax.random.split(key_env, num_envs), state, action, params
            )
            # What is not kept, the compiler leaves out.
            kept = obs if observed else carry[0]
            return (kept, state), (_completed_tokens(info["ended"], info["output_tokens"]), reward.sum())

        (obs, _), totals = jax.lax.scan(step, start, keys)
        return obs, totals

    return program


def engine_steps(num_experts: int) -> Callable[..., Array]:
    """Return a program that does the same with the engine alone."""

    def program(params: EnvParams, state: SiteState, keys: PRNGKeyArray) -> Array:
        num_envs = state.clock.shape[0]
        site, bank = params.site, params.bank

        def route(
            site: Site,
            state: SiteState,
            prompt: Int[Array, ""],
            output: Int[Array, "expert"],
            action: Int[Array, ""],
            gap: Float[Array, ""],
        ) -> SiteState:
            prompt = jnp.broadcast_to(prompt, output.shape)
            chosen = (jnp.arange(num_experts) == action) & can_accept(site, state, prompt, output)
            state, _ = enqueue(state, chosen, jnp.int32(0), prompt, output)
            return advance(site, state, gap)

        def request(key: PRNGKeyArray) -> tuple[Array, Array]:
            row = jax.random.randint(key, (num_envs,), 0, bank.prompt_tokens.shape[0])
            return bank.prompt_tokens[row], bank.output_tokens[row]

        def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Array]:
            state, arriving = carry
            key_request, key_action, key_gap = jax.random.split(key, 3)
            action = jax.random.randint(key_action, (num_envs,), 0, num_experts)
            gap = jax.random.exponential(key_gap, (num_envs,)) / params.rate[0]
            state = jax.vmap(route, in_axes=(None, 0, 0, 0, 0, 0))(site, state, *arriving, action, gap)
            tokens = _completed_tokens(slot_status(state) == SlotStatus.ENDED, state.slots.output_tokens)
            return (state, request(key_request)), tokens

        return jax.lax.scan(step, (state, request(keys[0])), keys)[1]

    return program


def _completed_tokens(ended: Array, output_tokens: Array) -> Array:
    return jnp.where(ended, output_tokens, 0).astype(jnp.float32).sum()


def measure(env: EdgeRouting, params: EnvParams, num_envs: int, runs: int) -> dict[str, Any] | None:
    """Return steps/s, tokens/s and shares of time for `num_envs` environments; None if memory does not allow them."""
    obs, state = busy_sites(env, params, num_envs)
    keys = jax.random.split(jax.random.key(1), num_steps(num_envs))
    arguments = {
        "engine": (engine_steps(env.num_experts), (params, state.site, keys)),
        "unobserved": (env_steps(env, observed=False), (params, (obs, state), keys)),
        "step": (env_steps(env, observed=True), (params, (obs, state), keys)),
    }
    spread = (EVERYWHERE, SPREAD, EVERYWHERE)
    programs = {
        name: compile_program(on_all_devices(program, num_envs, spread, SPREAD), *given)
        for name, (program, given) in arguments.items()
    }
    if max(program.memory for program in programs.values()) > memory_limit():
        return None
    calls = {name: lambda name=name: programs[name].call(*arguments[name][1]) for name in programs}
    seconds = median_seconds(calls, runs)
    steps = num_envs * len(keys)
    return {
        "num_envs": num_envs,
        "engine_steps_per_second": steps / seconds["engine"],
        "engine_tokens_per_second": float(calls["engine"]().sum()) / seconds["engine"],
        "env_steps_per_second": steps / seconds["step"],
        "env_tokens_per_second": float(calls["step"]()[1][0].sum()) / seconds["step"],
        "share": {
            "advance": seconds["engine"] / seconds["step"],
            "observation": 1 - seconds["unobserved"] / seconds["step"],
            "rest": (seconds["unobserved"] - seconds["engine"]) / seconds["step"],
        },
        "compile_seconds": programs["step"].seconds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 64, 256, 320, 1024, 4096, 16384, 65536])
    parser.add_argument(
        "--seats", type=int, nargs="+", choices=_SEATS, default=[], help="of edge6, instead of all sites"
    )
    options = parser.parse_args()
    one_device_per_core()
    cases = {site: partial(jaxroute.make, "edge-poisson", site=site, rate=rate) for site, rate in _BUSY.items()}
    if options.seats:
        cases = {f"edge6, {seats} seats": partial(with_seats, seats) for seats in options.seats}
    sites, sizes, runs = list(cases), options.envs, options.runs
    if options.quick:
        sites, sizes, runs = sites[:1], [64], 2
    rows = []
    for site, num_envs in track([(site, num_envs) for site in sites for num_envs in sizes], "measuring"):
        env, params = cases[site]()
        row = measure(env, params, num_envs, runs)
        if row is not None:
            rows.append({"site": site} | row)

    table = Table(
        "site", "environments", "engine, requests/s", "env.step, steps/s", "tokens/s", "advance", "observation", "rest",
        "compilation, s", title="simulated per second of wall time; where the time of env.step goes",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["site"],
            f"{row['num_envs']:,}",
            f"{row['engine_steps_per_second']:,.0f}",
            f"{row['env_steps_per_second']:,.0f}",
            f"{row['env_tokens_per_second']:,.0f}",
            *(f"{share:.0%}" for share in row["share"].values()),
            f"{row['compile_seconds']:.1f}",
        )
    main_figures = {}
    for site in sites:
        best = [row for row in rows if row["site"] == site]
        main_figures[f"{site} engine, requests/s"] = max(row["engine_steps_per_second"] for row in best)
        main_figures[f"{site} env.step, steps/s"] = max(row["env_steps_per_second"] for row in best)
    remember = not options.quick and not options.seats and options.envs == parser.get_default("envs")
    publish("engine", table, {"runs": runs, "rows": rows}, main_figures, remember=remember)


if __name__ == "__main__":
    main()

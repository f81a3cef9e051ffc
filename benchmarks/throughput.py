"""Environment steps/s and PPO training steps/s on this machine.

`python -m benchmarks.throughput [--quick]` prints medians of several runs and writes
outputs/benchmarks/throughput.json.
One environment step is one routed request; routing is random on edge6 at 10 requests/s, which keeps the site busy.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.table import Table

import jaxroute
from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.networks import build_network
from jaxroute.ppo import make_ppo
from jaxroute.scenarios import training_env

_STEPS = 100


def time_environment(num_envs: int, runs: int) -> dict[str, float]:
    """Steps/s of random routing in `num_envs` environments, from a site that has filled up."""
    env, params = jaxroute.make("edge-poisson", rate=10.0)

    @jax.jit
    def run(state: Any, key: jax.Array) -> Any:
        def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            key_action, key_env = jax.random.split(key)
            action = jax.random.randint(key_action, (num_envs,), 0, env.num_actions)
            keys = jax.random.split(key_env, num_envs)
            obs, state, reward, _, _, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)
            # The whole observation is used, or the compiler would leave it out.
            return state, reward.sum() + sum(leaf.sum() for leaf in jax.tree.leaves(obs))

        return jax.lax.scan(step, state, jax.random.split(key, _STEPS))

    keys = jax.random.split(jax.random.key(0), num_envs)
    state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)[1]
    return _measure(lambda state, number: run(state, jax.random.key(number))[0], state, num_envs * _STEPS, runs)


def time_training(num_envs: int | None, runs: int) -> dict[str, float]:
    """Steps/s of whole PPO updates with the default network."""
    config = load_config()
    ppo = dataclasses.replace(config.ppo, num_envs=num_envs, total_steps=10**9)
    env, params = training_env(config)
    learner = make_ppo(ppo, env, params, build_network(config.network))
    state = learner.init(jax.random.key(0))
    return _measure(lambda state, number: learner.update(state)[0], state, learner.steps_per_update, runs)


def _measure(call: Callable[[Any, int], Any], state: Any, steps: int, runs: int) -> dict[str, float]:
    started = time.perf_counter()
    state = jax.block_until_ready(call(state, 0))
    first = time.perf_counter() - started
    times = []
    for number in range(1, runs + 1):
        started = time.perf_counter()
        state = jax.block_until_ready(call(state, number))
        times.append(time.perf_counter() - started)
    return {"steps_per_second": steps / statistics.median(times), "first_call_seconds": first}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small size each")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
    rows = []
    for num_envs in (64,) if options.quick else (1, 64, 256, 1024, 4096):
        rows.append({"what": "environment", "num_envs": num_envs} | time_environment(num_envs, runs))
    for num_envs in (64,) if options.quick else (256, 1024):
        rows.append({"what": "training", "num_envs": num_envs} | time_training(num_envs, runs))
    table = Table("what", "environments", "steps/s", "first call, s (compilation included)")
    for row in rows:
        speed, first = row["steps_per_second"], row["first_call_seconds"]
        table.add_row(str(row["what"]), f"{row['num_envs']:,}", f"{speed:,.0f}", f"{first:.1f}")
    publish("throughput", table, {"runs": runs, "rows": rows})


if __name__ == "__main__":
    main()

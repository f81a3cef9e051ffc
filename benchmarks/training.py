"""PPO steps/s end to end, by network and number of environments: compilation, memory, where the time goes.

`python -m benchmarks.training [--quick]` prints medians of several runs and writes outputs/benchmarks/training.json.
Settings are those of `python train.py` on this machine, apart from the ones shown. Each row is measured in a process of
its own. Shares: `environment` is a rollout with random actions; `network` is what the rollout takes longer with the
network's actions; `update` is the rest, advantages and gradient steps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray
from rich.progress import track
from rich.table import Table

from benchmarks.measure import (
    EVERYWHERE,
    SPREAD,
    in_own_process,
    median_seconds,
    on_all_devices,
    peak_memory,
    seconds_of,
)
from benchmarks.publish import publish
from jaxroute.config import Config, load_config
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.learning import Learner, PPOState, make_ppo
from jaxroute.networks import build_network
from jaxroute.scenarios import training_env
from jaxroute.training.processes import split_cpu

# Sites start idle, and fill within the steps of so many updates.
FILLING_UPDATES = 4
# Longer than any measurement, so that the learning rate stays up.
_ENDLESS = "ppo.total_steps=1000000000"


class _Setting(NamedTuple):
    config: Config
    env: EdgeRouting
    params: EnvParams
    network: nn.Module
    learner: Learner


def measure(overrides: Sequence[str], runs: int) -> dict[str, Any]:
    """Return steps/s of whole updates with these options of train.py, compilation time and peak memory."""
    return _time_updates(_set_up(overrides).learner, runs)[0]


def measure_with_shares(overrides: Sequence[str], runs: int) -> dict[str, Any]:
    """Return the same, and the shares of an update's time."""
    setting = _set_up(overrides)
    row, state = _time_updates(setting.learner, runs)
    carry = (state.env_state, state.obs, state.params)
    keys = jax.random.split(jax.random.key(1), setting.config.ppo.num_steps)
    given, returned = ((SPREAD, SPREAD, EVERYWHERE), EVERYWHERE), PartitionSpec(None, *SPREAD)

    def rollout(*, acts: bool) -> Callable[[], Any]:
        program = on_all_devices(_rollout(setting, acts=acts), setting.config.ppo.num_envs, given, returned)
        return partial(jax.jit(program), carry, keys)

    rollouts = {"environment": rollout(acts=False), "rollout": rollout(acts=True)}
    update = setting.learner.steps_per_update / row["steps_per_second"]
    seconds = median_seconds(rollouts, runs)
    share = {
        "environment": seconds["environment"] / update,
        "network": (seconds["rollout"] - seconds["environment"]) / update,
        "update": 1 - seconds["rollout"] / update,
    }
    return row | {"share": share}


def _set_up(overrides: Sequence[str]) -> _Setting:
    config = load_config([*overrides, _ENDLESS])
    split_cpu(config)  # as train.py does
    env, params = training_env(config)
    network = build_network(config.network, config.env.away)
    return _Setting(config, env, params, network, make_ppo(config.ppo, env, params, network))


def _time_updates(learner: Learner, runs: int) -> tuple[dict[str, Any], PPOState]:
    state = learner.init(jax.random.key(0))

    def update() -> Any:
        nonlocal state
        state, metrics = learner.update(state)
        return metrics

    first = seconds_of(update)
    for _ in range(FILLING_UPDATES - 1):
        update()
    seconds = statistics.median(seconds_of(update) for _ in range(runs))
    row = {
        "steps_per_second": learner.steps_per_update / seconds,
        "compile_seconds": first - seconds,
        "peak_memory_bytes": peak_memory(),
    }
    return row, state


def _rollout(setting: _Setting, *, acts: bool) -> Callable[[tuple, PRNGKeyArray], Any]:
    """Return an update's rollout, with the network's actions or with random ones."""
    env, network = setting.env, setting.network

    def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Any]:
        env_state, features, weights = carry
        (num_envs,) = env_state.step.shape
        key_action, key_env = jax.random.split(key)
        if acts:
            logits, values = jax.vmap(lambda features: network.apply(weights, features))(features)
            action = jax.random.categorical(key_action, logits)
        else:
            action, values = jax.random.randint(key_action, (num_envs,), 0, env.num_actions), jnp.zeros(num_envs)
        obs, env_state, reward, *_ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            jax.random.split(key_env, num_envs), env_state, action, setting.params
        )
        return (env_state, jax.vmap(network.prepare)(obs), weights), (features, values, reward)

    return lambda carry, keys: jax.lax.scan(step, carry, keys)[1]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--envs", type=int, nargs="+", help="256 1024 on a CPU, 1024 4096 8192 16384 on an accelerator")
    parser.add_argument("--site", help="other than edge6, with --rate")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second that site is made for")
    options = parser.parse_args()
    networks, sizes, runs, small = ["han", "mlp"], options.envs, options.runs, []
    if options.site is not None:
        small = [f"site={options.site}", f"workload.rate={options.rate}"]
    if options.quick:
        networks, sizes, runs, small = ["mlp"], [16], 2, ["site=edge3", "ppo.num_steps=4"]
    if sizes is None:
        # Asked in another process: one that holds the accelerator leaves no memory to those that measure.
        on_cpu = in_own_process(jax.default_backend) == "cpu"
        sizes = [256, 1024] if on_cpu else [1024, 4096, 8192, 16384]
    rows = []
    for network, num_envs in track([(network, size) for network in networks for size in sizes], "measuring"):
        overrides = [f"network={network}", f"ppo.num_envs={num_envs}", *small]
        rows.append({"network": network, "num_envs": num_envs} | in_own_process(measure_with_shares, overrides, runs))

    table = Table(
        "network", "environments", "steps/s", "environment", "network", "update", "compilation, s", "peak memory, GiB",
        title="PPO end to end; where the time of an update goes",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["network"],
            f"{row['num_envs']:,}",
            f"{row['steps_per_second']:,.0f}",
            *(f"{share:.0%}" for share in row["share"].values()),
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}",
        )
    best = {
        f"{network}, steps/s": max(row["steps_per_second"] for row in rows if row["network"] == network)
        for network in networks
    }
    remember = not options.quick and options.envs is None and options.site is None
    publish("training", table, {"runs": runs, "rows": rows}, best, remember=remember)


if __name__ == "__main__":
    main()

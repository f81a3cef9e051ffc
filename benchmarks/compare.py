"""What compiling the simulator is worth: plain Python, Gymnasium with stable-baselines3, and jaxroute on one machine.

`python -m benchmarks.compare [--quick]`, from the top of a checkout with the `benchmark` extra, prints medians of
several runs and writes outputs/benchmarks/compare.json. Every row simulates edge6 under Poisson arrivals at 10
requests/s. The rows that simulate take random actions; those that train run PPO with the same numbers of environments,
steps, epochs and minibatches. Python runs in one process; PyTorch and XLA use the cores they find.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import jaxroute
from benchmarks import engine, training
from benchmarks.measure import in_own_process, one_device_per_core, seconds_of
from benchmarks.publish import publish
from jaxroute.env import EnvParams

try:
    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3.common.vec_env import DummyVecEnv

    from benchmarks.gymnasium_site import GymnasiumSite
    from jaxroute.serving.reference import simulate
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: module {error.name} is missing; at the top of a checkout, run pip install -e '.[benchmark]' first"
    ) from None

_FILLING_STEPS = 200


class Sizes(NamedTuple):
    """What is measured, and how much."""

    site: str
    scenario: str
    rate: float
    requests: int
    """Served by the simulators of one site."""
    gymnasium_steps: int
    engine_envs: int
    training_envs: int
    num_steps: int
    runs: int


_FULL = Sizes(
    "edge6",
    "edge-poisson",
    10.0,
    requests=1000,
    gymnasium_steps=1000,
    engine_envs=1024,
    training_envs=256,
    num_steps=32,
    runs=3,
)
_QUICK = Sizes(
    "edge3", "edge3-poisson", 5.0, requests=30, gymnasium_steps=30, engine_envs=64, training_envs=8, num_steps=4, runs=1
)
_EPOCHS, _MINIBATCHES, _HIDDEN, _LEARNING_RATE = 2, 8, 64, 1e-3


def time_one_site(params: EnvParams, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Requests/s of the reference simulator and of `replay`, on the same requests and the same assignment."""
    generator = np.random.default_rng(0)
    arrival_time = generator.exponential(1 / sizes.rate, sizes.requests).cumsum()
    rows = generator.integers(len(params.bank.prompt_tokens), size=sizes.requests)
    prompt, output = np.asarray(params.bank.prompt_tokens)[rows], np.asarray(params.bank.output_tokens)[rows]
    assignment = generator.integers(params.site.num_experts, size=sizes.requests)
    site = {name: np.asarray(values) for name, values in params.site._asdict().items()}
    results: dict[str, Any] = {}

    def serve(name: str, call: Callable[[], Any]) -> dict[str, float]:
        def once() -> None:
            results[name] = call()

        once()
        seconds = statistics.median(seconds_of(once) for _ in range(sizes.runs))
        latency = float(np.nanmean(results[name].latency))
        return {"requests_per_second": sizes.requests / seconds, "mean_latency_seconds": latency}

    requests = jaxroute.Requests(arrival_time, prompt, output)
    return {
        "reference simulator, one site": serve(
            "reference", lambda: simulate(site, arrival_time, prompt, output, assignment)
        ),
        "jaxroute.replay, one site": serve("replay", lambda: jaxroute.replay(params.site, requests, assignment)),
    }


def time_gymnasium(params: EnvParams, sizes: Sizes) -> dict[str, float]:
    """Steps/s of one Gymnasium environment under random actions."""
    env = GymnasiumSite(params, seed=0)
    env.reset()

    def steps(count: int) -> None:
        for action in np.random.default_rng(1).integers(env.num_experts, size=count):
            env.step(action)

    steps(min(_FILLING_STEPS, sizes.gymnasium_steps))
    seconds = statistics.median(seconds_of(lambda: steps(sizes.gymnasium_steps)) for _ in range(sizes.runs))
    return {"requests_per_second": sizes.gymnasium_steps / seconds}


def time_stable_baselines3(params: EnvParams, sizes: Sizes) -> dict[str, float]:
    """PPO steps/s of stable-baselines3, from sites that have filled up."""
    count = sizes.training_envs
    update = count * sizes.num_steps
    model = stable_baselines3.PPO(
        "MlpPolicy",
        DummyVecEnv([lambda seed=seed: GymnasiumSite(params, seed) for seed in range(count)]),
        n_steps=sizes.num_steps,
        batch_size=update // _MINIBATCHES,
        n_epochs=_EPOCHS,
        learning_rate=_LEARNING_RATE,
        policy_kwargs={"net_arch": [_HIDDEN, _HIDDEN]},
        device="cpu",
        seed=0,
    )
    # As often as the rows of jaxroute update before they are timed.
    model.learn(training.FILLING_UPDATES * update)
    seconds = statistics.median(
        seconds_of(lambda: model.learn(update, reset_num_timesteps=False)) for _ in range(sizes.runs)
    )
    return {"steps_per_second": update / seconds}


def time_jaxroute_training(network: str, sizes: Sizes) -> dict[str, float]:
    """PPO steps/s of jaxroute with the same settings."""
    options = [
        f"site={sizes.site}", f"network={network}", f"workload.rate={sizes.rate}",
        "train.loads=[1,1]", "train.arrivals=null", "train.random_sites=0",
        f"ppo.num_envs={sizes.training_envs}", f"ppo.num_steps={sizes.num_steps}", f"ppo.num_epochs={_EPOCHS}",
        f"ppo.num_minibatches={_MINIBATCHES}", f"ppo.learning_rate={_LEARNING_RATE}",
    ]  # fmt: skip
    row = in_own_process(training.measure, options, sizes.runs)
    return {"steps_per_second": row["steps_per_second"]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests on a small site")
    options = parser.parse_args()
    sizes = _QUICK if options.quick else _FULL
    rows: dict[str, dict[str, float]] = {}
    one_device_per_core()
    with Console().status("measuring"):
        networks = ["mlp"] if options.quick else ["mlp", "han"]
        # First, as they need an accelerator for themselves.
        ours = {f"jaxroute PPO, {name}": time_jaxroute_training(name, sizes) for name in networks}
        env, params = jaxroute.make(sizes.scenario, rate=sizes.rate)
        rows |= time_one_site(params, sizes)
        row = engine.measure(env, params, sizes.engine_envs, sizes.runs)
        assert row is not None
        many = f"{sizes.engine_envs:,} sites"
        rows[f"jaxroute engine, {many}"] = {"requests_per_second": row["engine_steps_per_second"]}
        rows["Gymnasium environment"] = time_gymnasium(params, sizes)
        rows[f"jaxroute environment, {many}"] = {"requests_per_second": row["env_steps_per_second"]}
        rows["stable-baselines3 PPO, mlp"] = time_stable_baselines3(params, sizes)
        rows |= ours

    table = Table("what", "requests/s", "training steps/s", "times the first of its column")
    base: dict[str, float] = {}
    for name, row in rows.items():
        unit = "steps_per_second" if "steps_per_second" in row else "requests_per_second"
        row["ratio"] = row[unit] / base.setdefault(unit, row[unit])
        speed = f"{row[unit]:,.0f}"
        table.add_row(name, *((speed, "") if unit == "requests_per_second" else ("", speed)), f"{row['ratio']:,.1f}")
    versions = {
        "gymnasium": gymnasium.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "torch": torch.__version__,
    }
    figures = {
        f"{name}, {'steps' if 'steps_per_second' in row else 'requests'}/s": next(iter(row.values()))
        for name, row in rows.items()
    }
    settings = sizes._asdict() | {"epochs": _EPOCHS, "minibatches": _MINIBATCHES, "hidden": _HIDDEN}
    publish("compare", table, {"versions": versions, "settings": settings, "rows": rows}, figures,
            remember=not options.quick)  # fmt: skip


if __name__ == "__main__":
    main()

"""How the cost of an environment step grows with experts and slots, and how training spreads over devices.

`python -m benchmarks.scaling [--quick]` prints medians of several runs, writes outputs/benchmarks/scaling.json and
draws outputs/benchmarks/scaling.png. The sites repeat edge6's experts, and the request rate grows with them. A slope is
that of a straight line through the logarithms: 1 where the cost is proportional, 0 where it stays the same.

On a CPU, XLA also splits the machine into virtual devices, to train on several: strong scaling keeps the number of
environments, weak scaling keeps it per device. They share the cores, so that this shows what the split itself costs; a
gain can only come from cores that one device leaves idle.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from benchmarks import training
from benchmarks.engine import env_steps, num_steps
from benchmarks.measure import busy_sites, compile_program, in_own_process, median_seconds
from benchmarks.publish import OUTPUTS, publish
from jaxroute.config import load_config
from jaxroute.scenarios import build_env

_EXPERTS, _SLOTS = 6, 16
"""Those of edge6: one stays while the other changes."""
_RATE_PER_EXPERT = 10 / 6


def time_step(num_experts: int, num_slots: int, num_envs: int, runs: int) -> float:
    """Return the time of one step of one environment among `num_envs`, µs."""
    config = load_config()
    max_waiting = num_slots // 4
    experts = [
        dataclasses.replace(
            expert,
            max_num_seqs=num_slots - max_waiting,
            max_num_batched_tokens=max(expert.max_num_batched_tokens, num_slots),
            max_waiting=max_waiting,
        )
        for expert in (config.site.experts * num_experts)[:num_experts]
    ]
    config = dataclasses.replace(config, site=dataclasses.replace(config.site, experts=experts))
    env, params = build_env(config, rate=_RATE_PER_EXPERT * num_experts)
    keys = jax.random.split(jax.random.key(1), num_steps(num_envs))
    arguments = (params, busy_sites(env, params, num_envs), keys)
    program = compile_program(env_steps(env, observed=True), *arguments)
    seconds = median_seconds({"step": lambda: program.call(*arguments)}, runs)["step"]
    return 1e6 * seconds / (num_envs * len(keys))


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Return the fitted exponent of cost over size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main() -> None:
    """Measure, print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few small sizes")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    experts, slots, devices = [1, 2, 4, 8, 16, 32, 64], [4, 16, 64, 256, 1024], [1, 2, 4, 8]
    num_envs, runs, small = 256 if on_cpu else 8192, options.runs, []
    if options.quick:
        experts, slots, devices = [1, 2], [4, 8], [2]
        num_envs, runs, small = 16, 2, ["site=edge3", "network=mlp", "ppo.num_steps=4"]

    training_rows = []
    for kind, count in track([(kind, n) for kind in ("strong", "weak") for n in devices] if on_cpu else [], "devices"):
        total = num_envs * count if kind == "weak" else num_envs
        overrides = [f"ppo.num_envs={total}", *small]
        row = in_own_process(training.measure, overrides, runs, cpu_devices=count)
        training_rows.append({"scaling": kind, "devices": count, "num_envs": total} | row)
    step_rows: list[dict[str, Any]] = []
    shapes = [(n, _SLOTS) for n in experts] + [(_EXPERTS, n) for n in slots]
    for num_experts, num_slots in track(shapes, "sizes"):
        cost = time_step(num_experts, num_slots, num_envs, runs)
        step_rows.append({"experts": num_experts, "slots": num_slots, "microseconds": cost})

    by_experts, by_slots = step_rows[: len(experts)], step_rows[len(experts) :]
    figure = Figure(figsize=(9, 4), layout="constrained")
    slopes = {}
    for axis, name, rows in zip(
        figure.subplots(1, 2, sharey=True), ("experts", "slots"), (by_experts, by_slots), strict=True
    ):
        sizes, costs = [row[name] for row in rows], [row["microseconds"] for row in rows]
        slopes[name] = slope(sizes, costs)
        level = np.exp(np.mean(np.log(costs)) - slopes[name] * np.mean(np.log(sizes)))
        axis.loglog(sizes, costs, "o", base=2)
        axis.loglog(sizes, level * np.asarray(sizes, float) ** slopes[name], label=f"slope {slopes[name]:.2f}", base=2)
        axis.set(xlabel=name, ylabel="µs per step", title=f"{num_envs:,} environments")
        axis.legend()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUTS / "scaling.png", dpi=150)

    table = Table("what", "µs per environment step", "training steps/s", "times the first")
    for row in step_rows:
        table.add_row(f"{row['experts']} experts x {row['slots']} slots", f"{row['microseconds']:.1f}", "", "")
    for row in training_rows:
        one = next(other for other in training_rows if other["scaling"] == row["scaling"])
        row["ratio"] = row["steps_per_second"] / one["steps_per_second"]
        what = f"{row['scaling']}: {row['num_envs']:,} environments on {row['devices']} device(s)"
        table.add_row(what, "", f"{row['steps_per_second']:,.0f}", f"{row['ratio']:.2f}")
    table.caption = f"slope in experts {slopes['experts']:.2f}, in slots {slopes['slots']:.2f}"
    main_figures = {f"{row['experts']} experts x {row['slots']} slots, µs": row["microseconds"] for row in step_rows}
    publish("scaling", table, {"num_envs": num_envs, "slopes": slopes, "steps": step_rows, "training": training_rows},
            main_figures, remember=not options.quick)  # fmt: skip


if __name__ == "__main__":
    main()

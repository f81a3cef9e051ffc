"""What prefix caching costs the simulation: environment steps with it and without it, side by side.

`python -m benchmarks.caching_cost [--quick]` prints medians of runs taken in turn and writes
outputs/benchmarks/caching_cost.json. One environment step is one routed request; routing is random at a rate that
keeps each site busy. Requests of their own ("poisson") show what the bookkeeping in blocks costs, sessions ("chat") the
rest: look-ups, hits, and a prompt that grows. Without caching, these compute all of it again.
"""

from __future__ import annotations

import argparse

import jax
from rich.progress import track
from rich.table import Table

import jaxroute
from benchmarks.engine import env_steps, num_steps
from benchmarks.measure import busy_sites, compile_program, median_seconds
from benchmarks.publish import publish

# Site, workload, requests/s, environments.
_CASES = (("edge6", "poisson", 10.0, 256), ("edge6", "chat", 10.0, 256), ("rack4", "poisson", 150.0, 32),
          ("rack4", "chat", 150.0, 32))  # fmt: skip


def measure(site: str, workload: str, rate: float, num_envs: int, runs: int) -> dict[str, float | str | int]:
    """Return steps/s with and without caching, and how many times as long a step takes with it."""
    calls, steps = {}, num_steps(num_envs)
    for caching in (False, True):
        overrides = (f"site.prefix_caching={str(caching).lower()}",)
        env, params = jaxroute.make("edge-poisson", site=site, workload=workload, rate=rate, overrides=overrides)
        given = (params, busy_sites(env, params, num_envs), jax.random.split(jax.random.key(1), steps))
        program = compile_program(env_steps(env, observed=True), *given)
        calls[caching] = lambda program=program, given=given: program.call(*given)
    seconds = median_seconds(calls, runs)
    return {
        "case": f"{site}, {workload}",
        "num_envs": num_envs,
        "off_steps_per_second": steps * num_envs / seconds[False],
        "on_steps_per_second": steps * num_envs / seconds[True],
        "ratio": seconds[True] / seconds[False],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    cases = [("edge6", "poisson", 10.0, 4)] if options.quick else _CASES
    runs = 2 if options.quick else options.runs
    rows = [measure(*case, runs) for case in track(cases, "measuring")]
    table = Table("site, workload", "environments", "off, steps/s", "on, steps/s", "time with / without")
    for row in rows:
        table.add_row(
            str(row["case"]),
            str(row["num_envs"]),
            f"{row['off_steps_per_second']:,.0f}",
            f"{row['on_steps_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
        )
    main_figures = {f"{row['case']}, time with / without": float(row["ratio"]) for row in rows}
    publish("caching_cost", table, {"runs": runs, "rows": rows}, main_figures, remember=not options.quick)


if __name__ == "__main__":
    main()

"""What one routing decision costs: batch of one, as in a gateway.

`python -m benchmarks.decision [--quick]` prints the median and the 99th percentile of a compiled call, from the
observation on the host to the chosen expert on the host, for the default network, every rule and `lookahead`; it writes
outputs/benchmarks/decision.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

import jaxroute
from benchmarks.measure import busy_sites
from benchmarks.publish import publish
from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.networks import build_network
from jaxroute.policies import RULES, Policy, learned_policy
from jaxroute.policies.planning import Situation, lookahead


def time_call(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Median and 99th percentile of the time of one call, ms."""
    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        np.asarray(call())
        times.append(1000 * (time.perf_counter() - started))
    return {"p50_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99))}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few calls on a small site")
    options = parser.parse_args()
    calls = 50 if options.quick else 2000
    use_compilation_cache()
    env, params = jaxroute.make("edge3-poisson" if options.quick else "edge-poisson")
    key = jax.random.key(0)
    obs, state = jax.tree.map(lambda leaf: leaf[0], busy_sites(env, params, 1))
    config = load_config()
    network = build_network(config.network, config.env.away)
    learned = learned_policy(network, network.init(key, network.prepare(obs)))
    on_host = jax.device_get(obs)

    def decision(policy: Policy) -> Callable[[], Any]:
        decide = jax.jit(lambda obs, key: policy.act(policy.params, obs, key, policy.memory)[0])
        return lambda: decide(on_host, key)

    rows: dict[str, dict[str, float]] = {
        policy.name: time_call(decision(policy), calls) for policy in [learned, *RULES.values()]
    }
    planner = lookahead(env)
    upcoming = jax.random.split(key, planner.plans)
    plan = jax.jit(lambda obs, state, key: planner.act((), Situation(obs, state, params, upcoming), key, ())[0])
    rows["lookahead"] = time_call(lambda: plan(obs, state, key), 3 if options.quick else 20)

    table = Table("policy", "median, ms", "p99, ms")
    for name, row in rows.items():
        table.add_row(name, f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}")
    figures = {f"{name}, ms": rows[name]["p50_ms"] for name in (learned.name, "impact_greedy", "lookahead")}
    publish("decision", table, {"calls": calls, "rows": rows}, figures, remember=not options.quick)


if __name__ == "__main__":
    main()

"""Tune the rules that have a parameter, on the training workload and the training prompts only.

`python -m benchmarks.tune_rules` prints each rule's mean average QoS over the training rates for a grid of values; the
best ones stand in jaxroute/policies/rules.py.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.evaluation import evaluate_policies, summarise
from jaxroute.policies import RULES
from jaxroute.policies.rules import LEAST, MOST
from jaxroute.scenarios import training_env

GRID = {
    "quality_threshold": [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5],
    "weighted_sum": [0.0, 0.05, 0.1, 0.15, 0.2, 0.4, 0.8],
    "win_rate": [0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7],
    "slo_headroom": [LEAST, MOST],
}


def main() -> None:
    """Sweep the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    use_compilation_cache()
    config = load_config(["train.random_sites=0"])
    env, params = training_env(config)
    low, high = np.asarray(params.rate)
    rates = [float(rate) for rate in np.linspace(low, high, 4)]
    policies = [
        RULES[rule]._replace(name=f"{rule} {value:g}", params=value)
        for rule, values in GRID.items()
        for value in values
    ]
    records = evaluate_policies(
        env, params, policies, rates, seed=7, episodes=options.episodes, requests=options.requests, warmup=100
    )
    table = Table("rule", *(f"{rate:.3g} requests/s" for rate in rates), "mean")
    for policy in policies:
        qos = [float(summarise(records[rate][policy.name], 100)["avg_qos"].mean()) for rate in rates]
        table.add_row(policy.name, *(f"{value:.4f}" for value in qos), f"{np.mean(qos):.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Tune the rules and forms that have a parameter, on the training workload and the training prompts only.

`python -m benchmarks.tune_rules` prints each rule's mean average QoS over the training rates for a grid of values; the
best ones stand in jaxroute/policies/rules.py and away.py. Forms are tuned on `impact_greedy`.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.evaluation import evaluate_policies, summarise
from jaxroute.policies import RULES, with_form
from jaxroute.policies.rules import LEAST, MOST
from jaxroute.scenarios import training_env

GRID = {
    "quality_threshold": [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5],
    "weighted_sum": [0.0, 0.05, 0.1, 0.15, 0.2, 0.4, 0.8],
    "win_rate": [0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7],
    "slo_headroom": [LEAST, MOST],
    "hybrid_prob": [0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9],  # without heads, hybrid_det and hybrid_trans are the same
    "interference_aware": [(delta, theta) for theta in (0.7, 1.0, 1.4) for delta in (0.0, 0.25, 0.5, 0.75, 1.0)],
}
FORM_GRID = {
    "decline": [0.1, 0.15, 0.2, 0.25, 0.3, 0.35],
    "price": [0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
    "rate_price": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
    "saturation": [0.7, 0.8, 0.9, 1.0, 1.1],
    "predicted_latency": [0.1, 0.25, 0.5, 1.0],
    "early_rejection": [0.3, 0.5, 0.7, 0.85, 1.0],
    "token_bucket": [0.2, 0.3, 0.4, 0.5, 0.6],
}


def main() -> None:
    """Sweep the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--rules", help="only these rules and forms, separated by commas")
    options = parser.parse_args()
    only = None if options.rules is None else options.rules.split(",")
    use_compilation_cache()
    config = load_config(["train.random_sites=0"])
    env, params = training_env(config)
    low, high = np.asarray(params.rate)
    rates = [float(rate) for rate in np.linspace(low, high, 6)]
    policies = [
        RULES[rule]._replace(name=f"{rule} {value}", params=value)
        for rule, values in GRID.items()
        if only is None or rule in only
        for value in values
    ]
    for form, values in FORM_GRID.items():
        if only is not None and form not in only:
            continue
        rule = with_form("impact_greedy", form)
        policies += [rule._replace(name=f"{rule.name} {value:g}", params=((), value)) for value in values]
    records = evaluate_policies(
        env, params, policies, rates, seed=7, episodes=options.episodes, requests=options.requests, warmup=100
    )
    table = Table(Column("rule", no_wrap=True), *(f"{rate:.3g} requests/s" for rate in rates), "mean")
    for policy in policies:
        qos = [float(summarise(records[rate][policy.name], 100)["avg_qos"].mean()) for rate in rates]
        table.add_row(policy.name, *(f"{value:.4f}" for value in qos), f"{np.mean(qos):.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()

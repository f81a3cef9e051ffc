"""From a configuration and perhaps a trained policy to a judged comparison."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import jax
import numpy as np
from rich.console import Console

from jaxroute.config import Config
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.metrics import summarise
from jaxroute.evaluation.result import EvaluationResult
from jaxroute.policies import LEARNED, rules_named
from jaxroute.progress import Progress
from jaxroute.runs import TrainedPolicy, load_policy
from jaxroute.scenarios import build_env, on_test_prompts


def evaluate(config: Config, console: Console, *, command: str) -> EvaluationResult:
    """Judge the configured policies on prompts that training has not seen.

    Raises:
        UserError: an unknown policy, missing data, a checkpoint that does not exist or does not fit.
    """
    rules = rules_named(config.policies, config.env.away, config.site.prefix_caching)
    config = on_test_prompts(config)
    env, params = build_env(config)
    trained: TrainedPolicy | None = None
    if config.checkpoint is not None:
        trained = load_policy(config.checkpoint, env, params)
    policies = ([trained.policy] if trained else []) + rules
    settings = config.eval
    nominal = float(params.rate[0])
    rates = sorted({nominal * load for load in [*settings.loads, 1.0]})
    console.print(
        f"Judging {len(policies)} policies on {config.workload.name}, bank {config.bank.kind}, "
        f"site {config.site.name}: {settings.episodes} episodes of {settings.requests} requests "
        f"at {', '.join(f'{rate:.3g}' for rate in rates)} requests/s"
    )
    with Progress(console) as progress:
        progress.begin("compiling and judging", total=len(policies))
        records = evaluate_policies(
            env,
            params,
            policies,
            rates,
            seed=settings.seed,
            episodes=settings.episodes,
            requests=settings.requests,
            warmup=settings.warmup,
            on_done=lambda name: progress.advance(note=f"last: {name}"),
        )
    summaries = {
        rate: {name: summarise(episodes, settings.warmup) for name, episodes in by_policy.items()}
        for rate, by_policy in records.items()
    }
    if line := overflow_line(summaries, env.num_slots):
        console.print(line)
    return EvaluationResult(
        workload=config.workload.name,
        site=config.site.name,
        bank=config.bank.kind,
        rates=rates,
        nominal_rate=nominal,
        episodes=settings.episodes,
        requests=settings.requests,
        warmup=settings.warmup,
        reference=LEARNED if trained else None,
        expert_names=[expert.label for expert in config.site.experts],
        summaries=summaries,
        provenance={
            "command": command,
            "checkpoint": str(trained.source) if trained else "none",
            **versions(),
            "seed": str(settings.seed),
        },
    )


def overflow_line(summaries: Mapping[float, Mapping[str, Mapping[str, np.ndarray]]], num_slots: int) -> str:
    """Say where the simulation had too few slots, by how much, and what to set; nothing if they sufficed.

    Args:
        summaries: what `summarise` returns, by rate and policy.
        num_slots: the environment's.
    """
    rates = {
        (rate, name): float(np.mean(summary["overflow_rate"]))
        for rate, by_policy in summaries.items()
        for name, summary in by_policy.items()
    }
    (rate, name), share = max(rates.items(), key=lambda item: item[1])
    if share == 0:
        return ""
    return (
        f"Up to {share:.1%} of the requests ({name} at {rate:.3g} requests/s) found none of the {num_slots} slots that "
        f"the simulation has for an expert, and count with QoS 0. To simulate longer queues, set for instance "
        f"env.num_slots={2 * num_slots}"
    )


def versions() -> dict[str, str]:
    """Return what ran the evaluation."""
    return {
        "jaxroute": version("jaxroute"),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "python": platform.python_version(),
    }

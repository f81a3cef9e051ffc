"""Hybrid LLM under load: what a small LLM saves and costs when both LLMs have queues, from idle to overload.

`python -m benchmarks.hybrid` puts two LLMs of edge6 side by side, answers from the zeroeval table (graded, so that
the three scores differ), and plays the hybrid rules at thresholds from all-large to all-small beside `impact_greedy`
and a trained router. It prints average QoS, the share that the small LLM got and the quality drop, and draws
outputs/benchmarks/hybrid.png. Heads and thresholds are fitted to the train half, episodes draw from the test half.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.publish import OUTPUTS, publish
from jaxroute.banks.bank import NoWorse, RequestBank
from jaxroute.banks.tables import choose_llms, read_table, split_of_rows
from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.evaluation import EpisodeRecords, evaluate_policies, summarise
from jaxroute.evaluation.statistics import mean_ci95, paired_difference
from jaxroute.plotting import STYLE, expert_colours
from jaxroute.policies import RULES, Policy
from jaxroute.predictors.hybrid import GAP, SCORES, by_text, choose_threshold, graded, predict_no_worse
from jaxroute.predictors.model import cross_validate
from jaxroute.predictors.predictor import Answers
from jaxroute.runs import read_policy
from jaxroute.scenarios import build_env

SHARES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Cost advantages at which thresholds are set, on the train half."""
CHOSEN = "1 % drop"
ALL_LARGE = 0.999999
OTHERS = ("impact_greedy", "qos_greedy", "interference_aware", "shortest_queue", "random")
ROUTER = "jaxroute"


def bank_of(small: str, large: str, brevity: float, kind: str) -> tuple[RequestBank, dict[str, dict[str, float]]]:
    """Return the test half as a bank with predictions and scores, and each score's thresholds by name."""
    folder = Path(os.environ["JAXROUTE_DATA"]) / kind
    table = choose_llms(read_table(folder), [small, large], folder)
    quality = graded(table.quality, table.output_tokens, brevity)
    prompts = table.queries["prompt"].tolist()
    texts, answers, prompt_of_row = by_text(prompts, quality)
    train = split_of_rows(len(prompts))
    of_text = np.ones(len(texts), bool)
    of_text[prompt_of_row[~train]] = False
    scores, relaxations = predict_no_worse(texts, answers, of_text, 1)
    print(f"t of trans: {relaxations[0]:.2f}")
    predicted = cross_validate(prompts, Answers(quality, np.log(table.output_tokens)), train, table.llms)

    known = train & ~np.isnan(quality).any(axis=1) & of_text[prompt_of_row]
    to_small = {name: score[prompt_of_row][:, 0] for name, score in scores.items()}
    to_small[GAP] = predicted.predicted.quality[:, 0] - predicted.predicted.quality[:, 1]
    thresholds = {name: _thresholds(score[known], quality[known]) for name, score in to_small.items()}

    test = ~train & ~(np.isnan(quality) | np.isnan(table.output_tokens)).any(axis=1)

    def column(values: np.ndarray) -> Float[Array, "prompt expert"]:
        return jnp.asarray(values[test], jnp.float32)

    bank = RequestBank(
        prompt_tokens=jnp.asarray(table.queries["prompt_tokens"].to_numpy()[test], jnp.int32),
        quality=column(quality),
        output_tokens=jnp.asarray(np.rint(table.output_tokens[test]), jnp.int32),
        predicted_quality=column(predicted.predicted.quality),
        predicted_output_tokens=column(np.exp(predicted.predicted.log_length)),
        log_length_error=jnp.asarray(predicted.predictor.log_length_error, jnp.float32),
        no_worse=NoWorse(*(column(scores[name][prompt_of_row]) for name in SCORES)),
    )
    return bank, thresholds


def _thresholds(score: Float[np.ndarray, "prompt"], quality: Float[np.ndarray, "prompt 2"]) -> dict[str, float]:
    """Return the thresholds that give the cost advantages, and the one that the paper would choose."""
    cuts = np.quantile(score, [1 - share for share in SHARES[1:-1]])
    # The large LLM's own score, 1, exceeds even that of all-large.
    found = {"0 %": ALL_LARGE, "100 %": -1.0}
    found |= {f"{100 * share:.0f} %": float(cut) for share, cut in zip(SHARES[1:-1], cuts, strict=True)}
    both = np.stack([score, np.ones(len(score))], axis=1)
    return found | {CHOSEN: min(choose_threshold(both, quality, np.array([0.0, 1.0]), 1), ALL_LARGE)}


def policy_of(score: str, name: str, threshold: float) -> Policy:
    """Return the rule that goes by a score: of the gap that is `quality_threshold`, by the opposite of the threshold.

    Its 0 % is the better of two predicted qualities, which hardly ever is the small LLM's.
    """
    rule, value = ("quality_threshold", max(-threshold, 0.0)) if score == GAP else (f"hybrid_{score}", threshold)
    return RULES[rule]._replace(name=f"{score} {name}", params=value)


def figures_of(records: EpisodeRecords, warmup: int, of_large: np.ndarray) -> dict[str, np.ndarray]:
    """Return per episode average QoS, the small LLM's share, and the quality drop of those answered, both in %."""
    summary = summarise(records, warmup)
    return {
        "avg_qos": summary["avg_qos"],
        "to_small": 100 * summary["expert_share"][:, 0],
        "quality_drop": 100 * (1 - summary["mean_quality"] / of_large),
        "violation_rate": summary["violation_rate"],
        "rejection_rate": summary["rejection_rate"],
    }


def draw(found: dict[float, dict[str, dict[str, np.ndarray]]]) -> Figure:
    """Draw average QoS against the share that the small LLM got, a panel for each rate."""
    colours = dict(zip((*SCORES, GAP), expert_colours(4), strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(found), 3.6), layout="constrained")
        for axes, (rate, by_policy) in zip(np.ravel(figure.subplots(1, len(found))), found.items(), strict=True):
            for score, colour in colours.items():
                names = [f"{score} {100 * share:.0f} %" for share in SHARES]
                points = [[by_policy[name][key].mean() for key in ("to_small", "avg_qos")] for name in names]
                axes.plot(*np.transpose(points), "o-", color=colour, markersize=3, label=score)
                at = by_policy[f"{score} {CHOSEN}"]
                axes.plot(
                    at["to_small"].mean(), at["avg_qos"].mean(), "D", color=colour, markersize=7, fillstyle="none"
                )
            for name, mark in (("impact_greedy", "k*"), ("random", "kx"), (ROUTER, "k^")):
                at = by_policy[name]
                axes.plot(at["to_small"].mean(), at["avg_qos"].mean(), mark, label=name)
            axes.set_title(f"{rate:g} requests/s")
            axes.grid(visible=True)
        figure.axes[0].legend()
        figure.supxlabel("share of the small LLM, %")
        figure.supylabel("average QoS")
    return figure


def main() -> None:
    """Play all policies at all rates, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="Yi-1.5-9B-Chat", help="an LLM of edge6")
    parser.add_argument("--large", default="gemma-2-27b-it", help="an LLM of edge6")
    parser.add_argument("--brevity", type=float, default=0.2)
    parser.add_argument("--limit", type=float, default=0.08, help="on the normalised latency, s per token")
    parser.add_argument("--rates", default="0.25,1,2,4,8", help="requests per second")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--router", default="pretrained/edge6", help="a run directory, or pretrained/<name>")
    options = parser.parse_args()
    if "JAXROUTE_DATA" not in os.environ:
        raise SystemExit("error: set JAXROUTE_DATA to the folder that holds zeroeval/")
    use_compilation_cache()
    rates = [float(rate) for rate in options.rates.split(",")]
    config = load_config(
        [
            "bank.num_prompts=1000",
            "env.away=false",
            f"workload.requirements=[{{name: all, normalised: {options.limit:g}, share: 1}}]",
        ]
    )
    experts = {expert.model: expert for expert in config.site.experts}
    site = dataclasses.replace(config.site, experts=[experts[options.small], experts[options.large]])
    env, params = build_env(dataclasses.replace(config, site=site))
    bank, thresholds = bank_of(options.small, options.large, options.brevity, "zeroeval")
    params = params._replace(bank=bank)

    policies: list[Policy] = [
        policy_of(score, name, value) for score, of_score in thresholds.items() for name, value in of_score.items()
    ]
    policies += [RULES[name] for name in OTHERS]
    policies.append(read_policy(options.router).policy._replace(name=ROUTER))
    records = evaluate_policies(
        env,
        params,
        policies,
        rates,
        seed=5,
        episodes=options.episodes,
        requests=options.requests,
        warmup=options.warmup,
    )
    # Without queues and on the same prompts: every rate meets the same.
    of_large = summarise(records[min(rates)]["prob 0 %"], options.warmup)["mean_quality"]
    found = {
        rate: {name: figures_of(played, options.warmup, of_large) for name, played in by_policy.items()}
        for rate, by_policy in records.items()
    }

    table = Table("policy", *(f"{rate:g}/s: QoS, small %, drop %, late %" for rate in rates))
    for policy in policies:
        cells = []
        for rate in rates:
            at = found[rate][policy.name]
            cells.append(
                f"{at['avg_qos'].mean():.3f} {at['to_small'].mean():.0f} {np.nanmean(at['quality_drop']):.1f} "
                f"{100 * at['violation_rate'].mean():.0f}"
            )
        table.add_row(policy.name, *cells)
    print_best(found, thresholds)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(OUTPUTS / "hybrid.png", dpi=100)
    means = {
        f"{rate:g}": {
            name: {key: mean_ci95(values)._asdict() for key, values in at.items()} for name, at in by_policy.items()
        }
        for rate, by_policy in found.items()
    }
    publish("hybrid", table, {"options": vars(options), "thresholds": thresholds, "rates": means}, {}, remember=False)


def print_best(found: dict[float, dict[str, dict[str, np.ndarray]]], thresholds: dict[str, dict[str, float]]) -> None:
    """Print the best threshold of each score at each rate, and what the router and `impact_greedy` are ahead by."""
    for rate, by_policy in found.items():
        best = {
            score: max((f"{score} {name}" for name in of_score), key=lambda name: by_policy[name]["avg_qos"].mean())
            for score, of_score in thresholds.items()
        }
        line = ", ".join(f"{name} {by_policy[name]['avg_qos'].mean():.3f}" for name in best.values())
        strongest = max(best.values(), key=lambda name: by_policy[name]["avg_qos"].mean())
        for name in ("impact_greedy", ROUTER):
            ahead = paired_difference(by_policy[name]["avg_qos"], by_policy[strongest]["avg_qos"])
            line += f"; {name} {ahead.mean:+.4f} ± {ahead.ci95:.4f}"
        print(f"{rate:g}/s: {line}")
        for other in ("trans", GAP):
            for share in ("10 %", "20 %", "40 %"):
                ahead = paired_difference(
                    by_policy[f"prob {share}"]["avg_qos"], by_policy[f"{other} {share}"]["avg_qos"]
                )
                print(f"    prob - {other} at {share}: {ahead.mean:+.4f} ± {ahead.ci95:.4f}")


if __name__ == "__main__":
    main()

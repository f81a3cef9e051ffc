"""What a prompt tells of its answers: other heads on the same features as the predictor's, judged out of sample.

`python -m benchmarks.prompt_heads` fits each head to part of a published table and measures it on prompts of another
part, for a growing number of labelled prompts:

    mean      each LLM's mean
    record    each LLM's past record in the prompt's category, which must be known, shrunk to its mean
    nearest   kernel-weighted mean over the nearest labelled prompts, shrunk to the mean
    factors   ridge regression of prompt factors: rank 2 of the table prompt x LLM
    pairwise  the predictor's mean over LLMs, and an LLM's own part from a logistic head per pair: who wins, of those
              that differ
    jaxroute  the predictor of `python -m jaxroute predict`
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table

from benchmarks.publish import publish
from jaxroute.banks.tables import choose_llms, read_table
from jaxroute.devices import use_compilation_cache
from jaxroute.predictors.features import count, fit_features, inner_products
from jaxroute.predictors.hybrid import Texts, fit_head
from jaxroute.predictors.metrics import measure
from jaxroute.predictors.model import cross_validate
from jaxroute.predictors.predictor import Answers

POOLS = {
    "zeroeval": (
        1,
        "gemma-2-2b-it,gemma-2-9b-it,gemma-2-27b-it,Phi-3.5-mini-instruct,Qwen2-7B-Instruct,"
        "Meta-Llama-3.1-8B-Instruct,Yi-1.5-9B-Chat,Yi-1.5-34B-Chat",
    ),
    "mmlu_pro": (
        4,
        "Meta-Llama-3_1-8B-Instruct,mathstral-7B,Phi-3-mini-4k-instruct,Mistral-7B-Instruct-v0.2,Qwen1.5-7B-Chat,"
        "Yi-6b-Chat,Mixtral-8x7B-Instruct-v0.1,c4ai-command-r-v01",
    ),
}
"""Of every how many prompts one is taken, and the LLMs."""
LABELLED = (200, 400, 800, 1400)
COLUMNS = {
    "AUC": "quality_auc",
    "within LLM": "llm_auc",
    "own R2": "quality_own_r2",
    "Brier": "brier",
    "calibr.": "calibration_error",
    "routed": "routed",
}
# Set once, and not tuned.
NEIGHBOURS, SHRINKAGE, RANK, PENALTY = 40, 10.0, 2, 10.0

Quality = Float[np.ndarray, "prompt llm"]


def record(quality: Quality, category: np.ndarray, known: Bool[np.ndarray, "prompt"]) -> Quality:
    """Mean in the category, with `SHRINKAGE` prompts of the overall mean added."""
    mean = quality[known].mean(axis=0)
    predicted = np.tile(mean, (len(quality), 1))
    for name in np.unique(category):
        rows = known & (category == name)
        predicted[category == name] = (quality[rows].sum(axis=0) + SHRINKAGE * mean) / (rows.sum() + SHRINKAGE)
    return predicted


def nearest(quality: Quality, kernel: Float[np.ndarray, "prompt prompt"], known: Bool[np.ndarray, "prompt"]) -> Quality:
    """Weighted mean over the nearest labelled prompts; weights are cosines, cubed."""
    length = np.sqrt(np.diag(kernel))
    likeness = np.maximum(kernel[:, known] / length[:, None] / length[known], 0.0) ** 3
    far = np.sort(likeness, axis=1)[:, -min(NEIGHBOURS, likeness.shape[1])]
    weight = np.where(likeness >= far[:, None], likeness, 0.0)
    weight /= weight.max(axis=1, keepdims=True)
    mean = quality[known].mean(axis=0)
    return (weight @ quality[known] + SHRINKAGE * mean) / (weight.sum(axis=1, keepdims=True) + SHRINKAGE)


def factors(quality: Quality, kernel: Float[np.ndarray, "prompt prompt"], known: Bool[np.ndarray, "prompt"]) -> Quality:
    """Ridge regression of the prompts' factors, of the best approximation of rank `RANK` of the centred table."""
    mean = quality[known].mean(axis=0)
    left, size, right = np.linalg.svd(quality[known] - mean, full_matrices=False)
    of_prompt = left[:, :RANK] * size[:RANK]
    duals = np.linalg.solve(kernel[np.ix_(known, known)] + PENALTY * np.eye(known.sum()), of_prompt)
    return np.clip(mean + kernel[:, known] @ duals @ right[:RANK], 0.0, 1.0)


def pairwise(quality: Quality, texts: Texts, known: Bool[np.ndarray, "prompt"], shared: Quality) -> Quality:
    """Shared part of other predictions, and own parts from who wins: E[q_i - q_j] = (2 Pr[i wins] - 1) Pr[differ]."""
    inputs = texts.inputs(known)
    fitted = inputs[known]
    own = np.zeros_like(quality)
    num_llms = quality.shape[1]
    for i in range(num_llms):
        for j in range(i):
            gap = quality[known, i] - quality[known, j]
            wins = fit_head(fitted, np.where(gap == 0, np.nan, gap > 0))(inputs)
            expected = (2 * wins - 1) * np.mean(gap != 0)
            own[:, i] += expected / num_llms
            own[:, j] -= expected / num_llms
    return np.clip(shared.mean(axis=1, keepdims=True) + own, 0.0, 1.0)


def main() -> None:
    """Fit and measure all heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--labelled", default=",".join(map(str, LABELLED)))
    options = parser.parse_args()
    if "JAXROUTE_DATA" not in os.environ:
        raise SystemExit("error: set JAXROUTE_DATA to the folder that holds mmlu_pro/ and zeroeval/")
    use_compilation_cache()
    table = Table("bank, labelled prompts", "head", *COLUMNS)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for pool in options.pools.split(","):
        step, llms = POOLS[pool]
        folder = Path(os.environ["JAXROUTE_DATA"]) / pool
        bank = choose_llms(read_table(folder), llms.split(","), folder)
        rows = np.arange(0, len(bank.queries), step)
        prompts = bank.queries["prompt"].iloc[rows].tolist()
        category = bank.queries["category"].to_numpy()[rows]
        answers = Answers(bank.quality[rows], np.log(bank.output_tokens[rows]))
        quality = answers.quality
        order = np.random.default_rng(0).permutation(len(rows))
        test = np.zeros(len(rows), bool)
        test[order[len(rows) // 2 :]] = True
        texts = Texts(prompts)
        counts = count(prompts)
        for number in map(int, options.labelled.split(",")):
            known = np.zeros(len(rows), bool)
            known[order[: min(number, len(rows) // 2)]] = True
            kernel = inner_products(fit_features(counts.rows(np.flatnonzero(known)), 0).encode(counts)).astype(float)
            chosen = known | test
            ours = np.full_like(quality, np.nan)
            ours[chosen] = cross_validate(
                [prompts[row] for row in np.flatnonzero(chosen)], answers.rows(chosen), known[chosen], bank.llms
            ).predicted.quality
            heads = {
                "mean": np.tile(quality[known].mean(axis=0), (len(quality), 1)),
                "record": record(quality, category, known),
                "nearest": nearest(quality, kernel, known),
                "factors": factors(quality, kernel, known),
                "pairwise": pairwise(quality, texts, known, ours),
                "jaxroute": ours,
            }
            table.add_section()
            for name, predicted in heads.items():
                measured = measure(answers.rows(test), Answers(predicted[test], answers.log_length[test]))
                figures.setdefault(f"{pool}, {known.sum()}", {})[name] = measured
                table.add_row(f"{pool}, {known.sum()}", name, *(f"{measured[key]:.3f}" for key in COLUMNS.values()))
    publish("prompt_heads", table, {"figures": figures}, {}, remember=False)


if __name__ == "__main__":
    main()

"""Predictions from prompt text: jaxroute's predictor, TF-IDF ridge regression with scikit-learn, and each LLM's mean.

`JAXROUTE_DATA=<folder> python -m benchmarks.predictors [--quick]`, from the top of a checkout with the `benchmark`
extra, fits to the train half of the published tables, measures on the test half and writes
outputs/benchmarks/predictors.json. The ridge regression takes words and pairs of words, and the best of three penalties
on the test half itself, for quality and for length apart: its figures are an upper bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import timeit
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.publish import publish
from jaxroute.banks.tables import choose_llms, read_table, split_of_rows
from jaxroute.devices import use_compilation_cache
from jaxroute.predictors import Predictor
from jaxroute.predictors.metrics import measure
from jaxroute.predictors.model import cross_validate
from jaxroute.predictors.predictor import Answers

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.kernel_ridge import KernelRidge
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: module {error.name} is missing; at the top of a checkout, run pip install -e '.[benchmark]' first"
    ) from None

POOLS = {
    "mmlu_pro, 8 LLMs of 6B to 47B": (
        "mmlu_pro",
        "Meta-Llama-3_1-8B-Instruct,mathstral-7B,Phi-3-mini-4k-instruct,Mistral-7B-Instruct-v0.2,Qwen1.5-7B-Chat,"
        "Yi-6b-Chat,Mixtral-8x7B-Instruct-v0.1,c4ai-command-r-v01",
    ),
    "mmlu_pro, stand-ins for edge6": (
        "mmlu_pro",
        "gemma-7b,c4ai-command-r-v01,mathstral-7B,Meta-Llama-3_1-8B-Instruct,Qwen1.5-72B-Chat,Qwen1.5-110B",
    ),
    "zeroeval, 8 LLMs of 2B to 34B": (
        "zeroeval",
        "gemma-2-2b-it,gemma-2-9b-it,gemma-2-27b-it,Phi-3.5-mini-instruct,Qwen2-7B-Instruct,"
        "Meta-Llama-3.1-8B-Instruct,Yi-1.5-9B-Chat,Yi-1.5-34B-Chat",
    ),
    "zeroeval, edge6": (
        "zeroeval",
        "gemma-2-2b-it,Qwen2-7B-Instruct,Yi-1.5-9B-Chat,Meta-Llama-3.1-8B-Instruct,gemma-2-9b-it,gemma-2-27b-it",
    ),
}
COLUMNS = {
    "AUC": "quality_auc",
    "within LLM": "llm_auc",
    "own R2": "quality_own_r2",
    "Brier": "brier",
    "calibr.": "calibration_error",
    "length R2": "length_r2",
    "own R2 ": "length_own_r2",
    "routed": "routed",
}
PENALTIES = (1.0, 3.0, 10.0)


def main() -> None:
    """Fit and measure all three on every pool, and time single predictions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every eighth prompt of one pool")
    options = parser.parse_args()
    if "JAXROUTE_DATA" not in os.environ:
        raise SystemExit("error: set JAXROUTE_DATA to the folder that holds mmlu_pro/ and zeroeval/")
    use_compilation_cache()
    pools = dict(list(POOLS.items())[-1:]) if options.quick else POOLS
    table = Table("test half", *COLUMNS, title="predictions from prompt text")
    figures: dict[str, dict] = {}
    timings: dict[str, float] = {}
    for pool, (kind, llms) in pools.items():
        folder = Path(os.environ["JAXROUTE_DATA"]) / kind
        bank = choose_llms(read_table(folder), llms.split(","), folder)
        rows = np.arange(0, len(bank.queries), 8 if options.quick else 1)
        prompts = bank.queries["prompt"].iloc[rows].tolist()
        answers = Answers(bank.quality[rows], np.log(bank.output_tokens[rows]))
        in_train = split_of_rows(len(rows))
        test = [prompt for prompt, train in zip(prompts, in_train, strict=True) if not train]

        started = time.perf_counter()
        ours = cross_validate(prompts, answers, in_train, bank.llms)
        timings[f"{pool}: fit and cross-validation, s"] = time.perf_counter() - started
        timings[f"{pool}: one prompt, ms"] = 1000 * one_prompt_seconds(ours.predictor, test[:: len(test) // 100])
        known = answers.rows(in_train)
        ways = {
            "LLM's mean": Answers(*(np.broadcast_to(part.mean(axis=0), (len(test), part.shape[1])) for part in known)),
            "TF-IDF ridge": tfidf_ridge(prompts, answers, in_train),
            "jaxroute": ours.predicted.rows(~in_train),
        }
        figures[pool] = {way: measure(answers.rows(~in_train), predicted) for way, predicted in ways.items()}
        best = figures[pool]["jaxroute"]
        table.add_section()
        table.add_row(f"[bold]{pool}", *[""] * 7, f"{best['best_single']:.3f} to {best['oracle']:.3f}")
        for way, measured in figures[pool].items():
            table.add_row(way, *(f"{measured[name]:.3f}" for name in COLUMNS.values()))
    table.caption = "routed: quality if routed by predicted quality; above it, of the best single LLM and of the oracle"
    for name, value in timings.items():
        print(f"{name}: {value:.2f}")
    publish("predictors", table, {"figures": figures, "timings": timings}, timings, remember=not options.quick)


def one_prompt_seconds(predictor: Predictor, prompts: list[str]) -> float:
    """Time to predict one prompt alone: of several calls the fastest, of all prompts the median."""
    return statistics.median(
        min(timeit.repeat(partial(predictor, [prompt]), number=1, repeat=25)) for prompt in prompts
    )


def tfidf_ridge(prompts: list[str], answers: Answers, in_train: np.ndarray) -> Answers:
    """Predict the test half from words and pairs of words, with the penalties that are best there."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    known = vectorizer.fit_transform([prompt for prompt, train in zip(prompts, in_train, strict=True) if train])
    asked = vectorizer.transform([prompt for prompt, train in zip(prompts, in_train, strict=True) if not train])
    targets = np.concatenate(answers, axis=1)[in_train]
    truth = answers.rows(~in_train)
    candidates = []
    for penalty in PENALTIES:
        ridge = KernelRidge(alpha=penalty).fit(known, targets - targets.mean(axis=0))
        quality, log_length = np.split(ridge.predict(asked) + targets.mean(axis=0), 2, axis=1)
        candidates.append(Answers(np.clip(quality, 0, 1), log_length))
    measured = [measure(truth, candidate) for candidate in candidates]
    return Answers(
        candidates[int(np.argmax([figures["quality_auc"] for figures in measured]))].quality,
        candidates[int(np.argmax([figures["length_r2"] for figures in measured]))].log_length,
    )


if __name__ == "__main__":
    main()

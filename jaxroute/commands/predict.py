"""Predict answers from the text of the prompts: `python -m jaxroute predict BANK --out FOLDER`.

`python -m jaxroute predict hybrid BANK` judges when a small LLM is good enough (predict_hybrid.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from jaxroute.banks.tables import Table, choose_llms, read_table, split_of_rows
from jaxroute.commands import predict_hybrid
from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.config.words import command_line, path_word
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import check_new, complete_folder
from jaxroute.predictors.metrics import measure, reliability
from jaxroute.predictors.model import FOLDS, MAX_ROWS, CrossValidated, cross_validate
from jaxroute.predictors.predictor import Answers
from jaxroute.predictors.texts import texts_of

_FIGURES = {
    "quality_auc": "AUC of quality",
    "llm_auc": "AUC of quality within an LLM",
    "quality_own_r2": "R2 of quality between LLMs",
    "length_r2": "R2 of log length",
    "length_own_r2": "R2 of log length between LLMs",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "routed": "quality if routed by predicted quality",
    "best_single": "quality of the best single LLM",
    "oracle": "quality of each prompt's best LLM",
}
# Sources of predictions. Each LLM's mean and the predictor are judged on the test half; cross-validation and fits to
# the other categories are judged on the prompts that the predictor was fitted to.
_WAYS = {
    "means": "LLM's mean, test half",
    "folds": f"{FOLDS}-fold, train half",
    "categories": "category left out",
    "test": "test half",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Fit a predictor to a bank and predict its rows; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["hybrid"]:
        return predict_hybrid.main(words[1:])
    return run_command(_parser(), words, _predict)


def _parser() -> argparse.ArgumentParser:
    description = (
        "Fit a predictor of the answers' quality and length to the prompts' text. "
        "predict hybrid BANK judges when a small LLM is good enough; see predict hybrid --help."
    )
    parser = parser_of("predict", description)
    parser.add_argument("bank", type=Path, metavar="BANK", help="folder of a bank, or of published tables")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="predictions; must not exist yet")
    parser.add_argument("--models", metavar="A,B,...", help="only these LLMs; all by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds and the features (default 0)")
    return parser


def _predict(options: argparse.Namespace, console: Console) -> None:
    check_new(options.out, "--out")
    if options.seed < 0:
        raise UserError(f"--seed={options.seed} is negative: use a seed of at least 0")
    table = read_table(options.bank)
    if options.models is not None:
        table = choose_llms(table, [name.strip() for name in options.models.split(",")], options.bank)
    prompts = texts_of(table, options.bank)
    category = table.queries["category"].astype(str).tolist() if "category" in table.queries.columns else None
    truth = Answers(table.quality, np.log(table.output_tokens))
    in_train = split_of_rows(len(prompts))
    use_compilation_cache()
    with console.status("fitting"):
        result = cross_validate(prompts, truth, in_train, table.llms, category=category, seed=options.seed)

    figures = _measured(truth, result, in_train)
    per_llm = _per_llm(table, truth, result, in_train)
    per_category = _per_category(category, truth, result)
    _write(options, table, result, {"figures": figures, "llms": per_llm, "categories": per_category}, truth, in_train)
    for grid in _grids(figures, per_llm, per_category):
        console.print(grid, markup=False)
    for line in _notes(options, result, in_train, figures["folds"]):
        say(console, line)


# --- figures ------------------------------------------------------------------------------------------------


def _measured(truth: Answers, result: CrossValidated, in_train: np.ndarray) -> dict[str, dict[str, float]]:
    fitted, test = result.fitted, ~in_train
    means = Answers(*(np.broadcast_to(np.nanmean(part[fitted], axis=0), part.shape) for part in truth))
    ways = {"means": (test, means), "folds": (fitted, result.predicted)}
    if not np.isnan(result.apart.quality).all():
        ways["categories"] = (fitted, result.apart)
    ways["test"] = (test, result.predicted)
    return {way: measure(truth.rows(rows), predicted.rows(rows)) for way, (rows, predicted) in ways.items()}


def _per_llm(table: Table, truth: Answers, result: CrossValidated, in_train: np.ndarray) -> dict[str, dict[str, float]]:
    """Figures of each LLM on the test half."""
    test = ~in_train
    figures = {}
    for column, llm in enumerate(table.llms):
        own, predicted = (
            Answers(*(part[test, column : column + 1] for part in answers)) for answers in (truth, result.predicted)
        )
        known = ~np.isnan(own.quality)
        measured = measure(own, predicted)
        figures[llm] = {
            "quality": float(own.quality[known].mean()) if known.any() else math.nan,
            "predicted_quality": float(predicted.quality[known].mean()) if known.any() else math.nan,
            **{name: measured[name] for name in ("quality_auc", "brier", "length_r2")},
            "log_length_error": float(result.predictor.log_length_error[column]),
        }
    return figures


def _per_category(
    category: Sequence[str] | None, truth: Answers, result: CrossValidated
) -> dict[str, dict[str, float]]:
    """Figures within each category, predicted by fits to some of its prompts, and by fits to none of them."""
    figures: dict[str, dict[str, float]] = {}
    if category is None or np.isnan(result.apart.quality).all():
        return figures
    for name in sorted(set(category)):
        rows = result.fitted & (np.asarray(category) == name)
        if not rows.any():
            continue
        folds, apart = (
            measure(truth.rows(rows), predicted.rows(rows)) for predicted in (result.predicted, result.apart)
        )
        known = ~(np.isnan(truth.quality) | np.isnan(result.apart.quality)) & rows[:, None]
        figures[name] = {
            "prompts": int(rows.sum()),
            "quality": float(np.nanmean(truth.quality[rows])) if known.any() else math.nan,
            "predicted_quality": float(result.apart.quality[known].mean()) if known.any() else math.nan,
            **{f"{key}_folds": folds[key] for key in ("quality_auc", "length_r2")},
            **{f"{key}_apart": apart[key] for key in ("quality_auc", "length_r2")},
        }
    return figures


# --- output -------------------------------------------------------------------------------------------------


def _grids(
    figures: dict[str, dict[str, float]],
    per_llm: dict[str, dict[str, float]],
    per_category: dict[str, dict[str, float]],
) -> Iterator[Grid]:
    def grid(first: str, *others: str) -> Grid:
        return Grid(first, *(Column(name, justify="right") for name in others))

    whole = grid("out of sample", *(_WAYS[way] for way in figures))
    for name, label in _FIGURES.items():
        whole.add_row(label, *(_number(measured[name]) for measured in figures.values()))
    yield whole
    llms = grid("LLM, test half", "quality", "predicted", "AUC", "Brier", "R2 of log length", "error of log length")
    for llm, values in per_llm.items():
        llms.add_row(llm, *map(_number, values.values()))
    yield llms
    if per_category:
        left_out = ("quality", "predicted", "AUC", "left out: AUC", "R2 of log length", "left out: R2")
        names = (
            "quality",
            "predicted_quality",
            "quality_auc_folds",
            "quality_auc_apart",
            "length_r2_folds",
            "length_r2_apart",
        )
        categories = grid("category", "prompts", *left_out)
        for name, values in per_category.items():
            categories.add_row(name, str(values["prompts"]), *(_number(values[key]) for key in names))
        yield categories


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _notes(
    options: argparse.Namespace, result: CrossValidated, in_train: np.ndarray, folds: dict[str, float]
) -> Iterator[str]:
    fitted, rows = int(result.fitted.sum()), int(in_train.sum())
    why = " (the others repeat a text" + (f", or exceed {MAX_ROWS} prompts)" if fitted == MAX_ROWS else ")")
    yield f"Fitted to {fitted} of the {rows} prompts in the train half{why if fitted < rows else ''}."
    own = not (options.bank / "correct.parquet").exists() or (options.bank / "quality.parquet").exists()
    bank = ["bank=table", path_word("bank.folder", options.bank)] if own else [f"bank={options.bank.resolve().name}"]
    yield f"Use it with: {command_line('train', *bank, path_word('bank.predictions', options.out))}"
    names = ("quality_auc", "quality_own_r2", "length_r2", "length_own_r2")
    if all(folds[name] > 0 for name in names):
        strength = [f"bank.noise.{name}={folds[name]:.3f}" for name in names]
        yield f"For noise as strong, without predictions: {command_line('train', *bank, *strength)}"


def _write(
    options: argparse.Namespace,
    table: Table,
    result: CrossValidated,
    figures: dict[str, Any],
    truth: Answers,
    in_train: np.ndarray,
) -> None:
    """Write everything that a run leaves; the folder appears complete or not at all."""
    import pandas  # the table was read with it

    out = options.out
    tables = {
        "predicted_quality": result.predicted.quality,
        "predicted_output_tokens": np.exp(result.predicted.log_length),
        "log_length_error": result.predictor.log_length_error[None],
    }
    report = {"bank": str(options.bank), "models": table.llms, "seed": options.seed, **figures}
    with complete_folder(out) as draft:
        for name, values in tables.items():
            pandas.DataFrame(values, columns=table.llms).to_parquet(draft / f"{name}.parquet", index=False)
        (draft / "metrics.json").write_text(json.dumps(_without_nan(report), indent=2) + "\n", encoding="utf-8")
        _figure(truth, result, in_train).savefig(draft / "reliability.png", dpi=120)
        result.predictor.save(draft / "predictor")


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _figure(truth: Answers, result: CrossValidated, in_train: np.ndarray) -> Figure:
    """Predicted against observed, in bins of equal size."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _reliability(left, truth.quality, result.predicted.quality, in_train)
    left.set(title="quality", xlabel="predicted", ylabel="mean observed", xlim=(0, 1), ylim=(0, 1))
    _reliability(right, truth.log_length / np.log(10), result.predicted.log_length / np.log(10), in_train)
    right.set(title="log10 of output tokens", xlabel="predicted", ylabel="mean observed")
    return figure


def _reliability(
    axes: Axes, truth: Float[np.ndarray, "prompt llm"], predicted: Float[np.ndarray, "prompt llm"], in_train: np.ndarray
) -> None:
    for llm in range(truth.shape[1]):
        bins = reliability(truth[~in_train, llm], predicted[~in_train, llm])
        axes.plot(
            bins.predicted, bins.observed, color="0.8", linewidth=0.8, label="each LLM, test half" if not llm else None
        )
    for rows, label, colour in ((in_train, _WAYS["folds"], "tab:orange"), (~in_train, _WAYS["test"], "tab:blue")):
        bins = reliability(truth[rows], predicted[rows])
        axes.plot(bins.predicted, bins.observed, "o-", color=colour, label=label, markersize=4)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.legend(frameon=False)

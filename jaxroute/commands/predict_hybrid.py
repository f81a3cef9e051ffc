"""Hybrid LLM's curve of a bank: `python -m jaxroute predict hybrid BANK --small A --large B --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from jaxroute.banks.tables import Table, choose_llms, read_table, split_of_rows
from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.errors import UserError
from jaxroute.evaluation.report.write import jsonable
from jaxroute.evaluation.statistics import mean_ci95
from jaxroute.files import check_new, complete_folder
from jaxroute.plotting import STYLE, expert_colours
from jaxroute.predictors.hybrid import GAP, MAX_DROP, SCORES, Judged, by_text, graded, judge_pairs, predict_no_worse
from jaxroute.predictors.model import MIN_ANSWERS
from jaxroute.predictors.texts import texts_of

ADVANTAGES = (10, 20, 40)
"""Cost advantages, %, at which curves are read."""
_ROWS = (*SCORES, GAP, "random", "oracle")
_PANELS = 12


def main(argv: Sequence[str]) -> int:
    """Judge the scores of Hybrid LLM on pairs of a bank's LLMs; returns the exit code."""
    return run_command(_parser(), argv, _hybrid)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("predict hybrid", "Trace what a small LLM saves and costs beside a large one (Hybrid LLM).")
    parser.add_argument("bank", type=Path, metavar="BANK", help="folder of a bank, or of published tables")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="figures; must not exist yet")
    parser.add_argument("--small", metavar="A", help="the small LLM; by default each that answers worse")
    parser.add_argument("--large", metavar="B", help="the large LLM; by default each that answers better")
    parser.add_argument("--models", metavar="A,B,...", help="only these LLMs; all by default")
    parser.add_argument("--brevity", type=float, default=0.0, metavar="W", help="share of quality that brevity is")
    parser.add_argument("--splits", type=int, default=5, help="random splits of the prompts (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and the features (default 0)")
    return parser


def _hybrid(options: argparse.Namespace, console: Console) -> None:
    check_new(options.out, "--out")
    _check(options)
    table = read_table(options.bank)
    if options.models is not None:
        table = choose_llms(table, [name.strip() for name in options.models.split(",")], options.bank)
    pairs = _pairs(table, options)
    named = sorted({llm for pair in pairs for llm in pair}, key=table.llms.index)
    table = choose_llms(table, named, options.bank)
    rows = texts_of(table, options.bank)
    quality = graded(table.quality, table.output_tokens, options.brevity) if options.brevity else table.quality
    prompts, answers, prompt_of_row = by_text(rows, quality)
    columns = [(table.llms.index(small), table.llms.index(large)) for small, large in pairs]
    _check_answers(answers, table.llms, options.bank)
    with console.status("fitting"):
        judged = judge_pairs(prompts, answers, columns, splits=options.splits, seed=options.seed)
        scores = None
        if len(larges := {large for _, large in columns}) == 1:
            in_train = split_of_rows(len(rows))
            # A text with a row in the test half is not fitted to.
            of_prompt = np.ones(len(prompts), bool)
            of_prompt[prompt_of_row[~in_train]] = False
            scores, _ = predict_no_worse(prompts, answers, of_prompt, larges.pop(), seed=options.seed)

    figures = {f"{small} | {large}": _figures(splits) for (small, large), splits in zip(pairs, judged, strict=True)}
    _write(options, figures, pairs, judged, scores, prompt_of_row, table.llms)
    for (small, large), measured in zip(pairs, figures.values(), strict=True):
        console.print(_grid(small, large, measured), markup=False)
    for line in _notes(options, answers, quality, scores is not None):
        say(console, line)


def _check(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise UserError(f"--seed={options.seed} is negative: use a seed of at least 0")
    if options.splits < 1:
        raise UserError(f"--splits={options.splits} is too few: use at least 1, and 5 for intervals")
    if not 0 <= options.brevity < 1:
        raise UserError(f"--brevity={options.brevity:g} must be at least 0 and below 1: it is a share of the quality")


def _pairs(table: Table, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the pairs of small and large LLM, of which the small one answers worse unless both are named."""
    for option, name in (("--small", options.small), ("--large", options.large)):
        if name is not None:
            choose_llms(table, [name], options.bank)
            if len(table.llms) < 2:
                raise UserError(f"{option} {name}: {options.bank} has no other LLM; a pair needs two")
    if options.small is not None and options.large is not None:
        if options.small == options.large:
            raise UserError(f"--small and --large are both {options.small}: name two LLMs")
        return [(options.small, options.large)]
    with np.errstate(invalid="ignore"):
        mean = np.where(np.isnan(table.quality).all(axis=0), 0.0, np.nan_to_num(np.nanmean(table.quality, axis=0)))
    order = [table.llms[llm] for llm in np.argsort(mean, kind="stable")]
    if options.small is not None:
        return [(options.small, name) for name in order if name != options.small]
    if options.large is not None:
        return [(name, options.large) for name in order if name != options.large]
    if len(order) < 2:
        raise UserError(f"{options.bank} has no other LLM than {order[0]}; a pair needs two")
    return [(small, large) for place, small in enumerate(order) for large in order[place + 1 :]]


def _check_answers(answers: np.ndarray, llms: Sequence[str], bank: Path) -> None:
    for llm, name in enumerate(llms):
        known = int((~np.isnan(answers[:, :, llm])).any(axis=1).sum())
        if known < 4 * MIN_ANSWERS:
            raise UserError(
                f"{bank}: LLM '{name}' has answers to {known} prompts, and at least {4 * MIN_ANSWERS} are needed to "
                "fit heads, choose thresholds and judge them: leave it out with --models, or add prompts"
            )


# --- figures ------------------------------------------------------------------------------------------------


def _figures(splits: Sequence[Judged]) -> dict[str, Any]:
    """Means over splits with half-widths of their 95 % intervals."""

    def interval(values: Sequence[float]) -> dict[str, float]:
        return mean_ci95(np.array(values))._asdict()

    all_small = [judged.curves[SCORES[0]].drop_at(100) for judged in splits]
    curves: dict[str, Any] = {
        name: {
            **{f"drop_at_{at}": interval([judged.curves[name].drop_at(at) for judged in splits]) for at in ADVANTAGES},
            "mean_drop": interval([judged.curves[name].mean_drop for judged in splits]),
        }
        for name in (*SCORES, GAP, "oracle")
    }
    curves["random"] = {
        **{f"drop_at_{at}": interval([at / 100 * drop for drop in all_small]) for at in ADVANTAGES},
        "mean_drop": interval([drop / 2 for drop in all_small]),
    }
    for name in (*SCORES, GAP):
        for place, what in enumerate(("threshold", "cost_advantage", "quality_drop")):
            curves[name][f"chosen_{what}"] = interval([_finite(judged.chosen[name][place]) for judged in splits])
    return {
        "small_quality": interval([judged.quality[0] for judged in splits]),
        "large_quality": interval([judged.quality[1] for judged in splits]),
        "all_small_drop": interval(all_small),
        "t": interval([judged.t for judged in splits]),
        "scores": curves,
    }


def _finite(value: float) -> float:
    """NaN for a threshold that sends all prompts to one LLM."""
    return value if math.isfinite(value) else math.nan


# --- output -------------------------------------------------------------------------------------------------


def _grid(small: str, large: str, figures: dict[str, Any]) -> Grid:
    columns = [f"drop at {at} %" for at in ADVANTAGES]
    columns += ["mean drop", "threshold", "saves, %", "drops, %"]
    title = f"{small} ({figures['small_quality']['mean']:.3f}) for {large} ({figures['large_quality']['mean']:.3f})"
    grid = Grid(
        "score", *(Column(name, justify="right") for name in columns), title=title, title_justify="left",
        caption=f"all-large 0; all-small {_number(figures['all_small_drop'])}; t of trans {figures['t']['mean']:.2f}",
        caption_justify="left",
    )  # fmt: skip
    names = [f"drop_at_{at}" for at in ADVANTAGES]
    names += ["mean_drop", "chosen_threshold", "chosen_cost_advantage", "chosen_quality_drop"]
    for score in _ROWS:
        measured = figures["scores"][score]
        grid.add_row(score, *(_number(measured[name]) if name in measured else "" for name in names))
    return grid


def _number(interval: dict[str, float]) -> str:
    mean, half = interval["mean"], interval["ci95"]
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def _notes(options: argparse.Namespace, answers: np.ndarray, quality: np.ndarray, scored: bool) -> Iterator[str]:
    yield (
        "Cost advantage: share of prompts to the small LLM. Drop: loss of quality in % of all-large; "
        "mean over the whole curve. On the right: with the threshold that saves most at a drop of at most "
        f"{MAX_DROP:g} % on validation prompts, what it saves and drops on test prompts."
    )
    binary = bool(np.isin(quality[~np.isnan(quality)], (0.0, 1.0)).all())
    if binary:
        one = " With one answer to each prompt, det is the same score too." if answers.shape[1] == 1 else ""
        yield f"Quality is 0 or 1 here, so that every t below 1 forgives nothing: trans equals prob.{one}"
        yield "Grade it with --brevity 0.2, or use a bank of graded answers, for scores that differ."
    elif answers.shape[1] == 1:
        yield "One answer to each prompt: det equals prob. Rows of a bank with the same text are several answers."
    if scored:
        yield f"Rules hybrid_det, hybrid_prob and hybrid_trans go by these scores with: bank.hybrid={options.out}"


def _write(
    options: argparse.Namespace,
    figures: dict[str, Any],
    pairs: Sequence[tuple[str, str]],
    judged: Sequence[Sequence[Judged]],
    scores: dict[str, np.ndarray] | None,
    prompt_of_row: np.ndarray,
    llms: Sequence[str],
) -> None:
    import pandas  # the table was read with it

    report = {
        "bank": str(options.bank),
        "brevity": options.brevity,
        "splits": options.splits,
        "seed": options.seed,
        "pairs": figures,
    }
    with complete_folder(options.out) as draft:
        (draft / "hybrid.json").write_text(
            json.dumps(jsonable(report), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        _figure(pairs, judged).savefig(draft / "hybrid.png", dpi=120)
        for name, values in (scores or {}).items():
            frame = pandas.DataFrame(values[prompt_of_row], columns=list(llms))
            frame.to_parquet(draft / f"no_worse_{name}.parquet", index=False)


def _figure(pairs: Sequence[tuple[str, str]], judged: Sequence[Sequence[Judged]]) -> Figure:
    """One panel per pair, of the first dozen: curves averaged over the splits."""
    import matplotlib as mpl

    pairs, judged = pairs[:_PANELS], judged[:_PANELS]
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 4 * columns, 0.8 + 3.2 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        for axes, (small, large), splits in zip(panels, pairs, judged, strict=False):
            _panel(axes, splits)
            axes.set_title(f"{small}\nfor {large}")
        panels[0].legend()
        figure.supxlabel("cost advantage: prompts to the small LLM, %")
        figure.supylabel("quality drop, %")
    return figure


def _panel(axes: Axes, splits: Sequence[Judged]) -> None:
    at = np.arange(101)
    colours = dict(zip((*SCORES, GAP), expert_colours(4), strict=True)) | {"oracle": "#888888"}
    # Scores that are the same lie on each other: the first is the widest.
    width = dict(zip(SCORES, (4.5, 2.8, 1.2), strict=True))
    for name, colour in colours.items():
        mean = np.mean([np.interp(at, *judged.curves[name]) for judged in splits], axis=0)
        axes.plot(at, mean, color=colour, linewidth=width.get(name, 1.2), label=name)
        if splits and name in splits[0].chosen:
            _, saved, dropped = np.mean([judged.chosen[name] for judged in splits], axis=0)
            axes.plot(saved, dropped, "o", color=colour, markersize=4)
    all_small = float(np.mean([judged.curves[SCORES[0]].drop_at(100) for judged in splits]))
    axes.plot([0, 100], [0, all_small], color="black", linestyle=":", linewidth=1, label="random")
    axes.plot([0, 100], [0, all_small], "k^", markersize=4, label="all-large, all-small")
    axes.grid(visible=True)

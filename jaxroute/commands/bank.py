"""Build a bank from an evaluation, or describe what a bank holds.

python -m jaxroute bank build INPUT --out FOLDER
python -m jaxroute bank describe FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from jaxroute.banks.bank import MIN_ROWS
from jaxroute.banks.evaluations import read_evaluation
from jaxroute.banks.tables import Table, choose_llms, read_table, write_table
from jaxroute.commands.arguments import parser_of, run_chosen, run_command
from jaxroute.config.words import command_line, path_word

_COLUMNS = 7  # per printed table: long names of categories and of LLMs fit side by side


def main(argv: Sequence[str] | None = None) -> int:
    """Build or describe a bank; returns the exit code."""
    return run_command(_parser(), argv, run_chosen)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bank", "Request banks from your own evaluation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="write a bank from an evaluation")
    build.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="CSV, JSON Lines or Parquet with one row per answer (prompt, model, quality, output_tokens; optionally "
        "category, prompt_tokens); samples of lm-evaluation-harness, in a folder per model; RouterBench's CSV; or a "
        "folder with published tables",
    )
    build.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the bank; must not exist yet")
    build.set_defaults(run=_build)
    describe = commands.add_parser("describe", help="check a bank and print what it holds")
    describe.add_argument("folder", type=Path, metavar="FOLDER", help="a bank, or a folder with published tables")
    describe.set_defaults(run=_describe)
    for command in (build, describe):
        command.add_argument("--models", metavar="A,B,...", help="only these LLMs; all by default")
    return parser


def _build(options: argparse.Namespace, console: Console) -> None:
    is_bank = (options.input / "queries.parquet").exists()
    table, notes = (read_table(options.input), []) if is_bank else read_evaluation(options.input)
    table = _chosen(table, options.models, options.input)
    write_table(table, options.out)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    missing = _missing(table).sum()
    console.print(
        f"{options.out}: {len(table.queries)} prompts x {len(table.llms)} LLMs, {missing} cells missing.",
        f"Use it with: {command_line('train', 'bank=table', path_word('bank.folder', options.out))}",
        sep="\n", markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _describe(options: argparse.Namespace, console: Console) -> None:
    table = _chosen(read_table(options.folder), options.models, options.folder)
    missing = _missing(table)
    for grid in _grids(table, missing):
        console.print(grid, markup=False)
    console.print(f"{_coverage(missing)}\n{_choice(table, missing)}", markup=False, highlight=False, soft_wrap=True)


def _chosen(table: Table, models: str | None, where: Path) -> Table:
    return table if models is None else choose_llms(table, [name.strip() for name in models.split(",")], where)


def _missing(table: Table) -> Bool[np.ndarray, "prompt llm"]:
    return np.isnan(table.quality) | np.isnan(table.output_tokens)


def _grids(table: Table, missing: Bool[np.ndarray, "prompt llm"]) -> Iterator[Grid]:
    """Missing cells, mean length and mean quality of each LLM, overall and per category; the best LLM first."""
    quality = [_mean(column, 3) for column in table.quality.T]
    columns = [
        ("missing", ["", *(str(count) for count in missing.sum(axis=0))]),
        ("tokens", ["", *(_mean(column, 0) for column in table.output_tokens.T)]),
        ("quality", [str(len(missing)), *quality]),
    ]
    if "category" in table.queries.columns:
        category = table.queries["category"].astype(str).to_numpy()
        for name in np.unique(category):
            prompts = category == name
            columns.append(
                (str(name), [str(prompts.sum()), *(_mean(column, 3) for column in table.quality[prompts].T)])
            )
    order = sorted(range(len(table.llms)), key=quality.__getitem__, reverse=True)
    for start in range(0, len(columns), _COLUMNS):
        block = columns[start : start + _COLUMNS]
        grid = Grid("LLM", *(Column(name, justify="right") for name, _ in block))
        grid.add_row("prompts", *(cells[0] for _, cells in block), end_section=True)
        for llm in order:
            grid.add_row(table.llms[llm], *(cells[1 + llm] for _, cells in block))
        yield grid


def _coverage(missing: Bool[np.ndarray, "prompt llm"]) -> str:
    complete = (~missing.any(axis=1)).sum()
    few = f"; a site needs {MIN_ROWS}: choose fewer LLMs (--models) or add prompts" if complete < MIN_ROWS else ""
    return (
        f"Missing: {missing.sum()} of {missing.size} cells (no quality or no output_tokens). "
        f"Complete for these {missing.shape[1]} LLMs: {complete} of {len(missing)} prompts{few}."
    )


def _choice(table: Table, missing: Bool[np.ndarray, "prompt llm"]) -> str:
    """What choosing an LLM per prompt could gain, on the complete prompts."""
    complete = ~missing.any(axis=1)
    if not complete.any():
        return "Best single LLM and oracle: unknown, as no prompt is complete."
    quality = table.quality[complete]
    single = quality.mean(axis=0)
    return (
        f"On the complete prompts: best single LLM {table.llms[single.argmax()]} {single.max():.3f}, "
        f"oracle (the best LLM of each prompt) {quality.max(axis=1).mean():.3f}."
    )


def _mean(values: Float[np.ndarray, "prompt"], digits: int) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.{digits}f}" if len(known) else "-"

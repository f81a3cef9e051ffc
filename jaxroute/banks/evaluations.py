"""Evaluations of a user's own, brought into the form of a bank's table.

One row per answer (prompt, model, quality, output_tokens), the samples of lm-evaluation-harness, or RouterBench's CSV.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float, Int

from jaxroute.banks.tables import Table
from jaxroute.errors import UserError, did_you_mean
from jaxroute.tables import TableReader, number_remedy, open_table, pandas_for

CHARACTERS_PER_TOKEN = 4  # of English text, where nobody has counted
_NEEDED = ("prompt", "model", "quality", "output_tokens")
_OPTIONAL = ("category", "prompt_tokens")
_EXPECTED = f"one row per answer and the columns {', '.join(_NEEDED)}"
_ROWS = 4096  # at a time: prompts and answers may be long
_MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
_TRUTH = {"true": 1.0, "false": 0.0}
_RESPONSE = "|model_response"  # RouterBench: ends the name of the column with a model's answers
_SAMPLES = "samples_*.jsonl*"
# lm-evaluation-harness: scores from 0 to 1 of a single answer, the ones to prefer first.
_SCORES = ("exact_match", "pass@1", "prompt_level_strict_acc", "acc", "em", "f1")


class _Answers(NamedTuple):
    """Some answers of an evaluation, one per row."""

    places: list[int]
    prompt: list[str]
    model: list[str]
    quality: Float[np.ndarray, "row"]
    output_tokens: Float[np.ndarray, "row"]
    category: list[str] | None = None
    prompt_tokens: Float[np.ndarray, "row"] | None = None


def read_evaluation(path: Path) -> tuple[Table, list[str]]:
    """Read an evaluation: a file, or a folder with the samples that lm-evaluation-harness wrote.

    Returns:
        The table, and what its user should be told of how it was read.

    Raises:
        UserError: the file is no evaluation, a column is missing, a value is out of range, or a prompt and model come
            twice. The message names the row.

    """
    if path.is_dir():
        files = sorted(path.rglob(_SAMPLES))
        if not files:
            raise UserError(
                f"{path} holds neither a bank (queries.parquet) nor {_SAMPLES} of lm-evaluation-harness: "
                "name a folder with one of them, or a file"
            )
    else:
        files = [path]
    notes: list[str] = []
    with open_table(files[0], _EXPECTED) as table:
        if not path.is_dir() and not _is_harness(table):
            if any(name.endswith(_RESPONSE) for name in table.names):
                return _assembled(path, _router_bench(table, notes), notes), notes
            return _assembled(path, _long(table, notes), notes, table), notes
    return _assembled(path, (part for file in files for part in _harness(file, notes)), notes), notes


# --- one row per answer -------------------------------------------------------------------------------------


def _long(table: TableReader, notes: list[str]) -> Iterator[_Answers]:
    _refuse_what_has_no_answers(table)
    found = {name: table.find(name) for name in (*_NEEDED, *_OPTIONAL)}
    for name in _NEEDED:
        if found[name] is None:
            raise UserError(f"{table.path} has no column '{name}'{did_you_mean(name, table.names)}: add or rename it")
    known = {name: column for name, column in found.items() if column is not None}
    if unused := [name for name in table.names if name and name not in known.values()]:
        notes.append(f"Ignored columns: {', '.join(unused)}.")
    for places, cells in table.chunks(list(known.values()), _ROWS):
        columns = _Columns(table, places, dict(zip(known, zip(*cells, strict=True), strict=True)))
        yield _Answers(
            places,
            columns.texts("prompt"),
            columns.names("model"),
            columns.qualities("quality"),
            columns.lengths("output_tokens", may_miss=True),
            columns.names("category") if "category" in known else None,
            columns.lengths("prompt_tokens") if "prompt_tokens" in known else None,
        )


def _refuse_what_has_no_answers(table: TableReader) -> None:
    names = set(table.names)
    if {"results", "versions"} <= names or {"results", "configs"} <= names:
        what = (
            "is the summary of lm-evaluation-harness, without the answers: "
            "run it with --log_samples and give the samples_*.jsonl beside it"
        )
    elif {"request_states", "adapter_spec"} <= names:
        what = (
            "is HELM's scenario_state.json, which does not grade the answers: write a table with a row per request "
            "state (prompt: request.prompt, model: request.model, output_tokens: the number of "
            "result.completions[0].tokens) and take the quality from per_instance_stats.json"
        )
    elif {"instance_id", "stats"} <= names:
        what = (
            "is HELM's per_instance_stats.json, without prompts and answers: write a table with a row per request "
            "state of scenario_state.json and take the quality from here, by instance_id"
        )
    else:
        return
    raise UserError(f"{table.path} {what}")


class _Columns:
    """Columns of some rows, converted cell by cell."""

    def __init__(self, table: TableReader, places: list[int], cells: Mapping[str, Sequence[Any]]) -> None:
        self._table, self._places, self._cells = table, places, cells

    def texts(self, name: str) -> list[str]:
        """Return a column of texts; none may be empty."""
        cells = self._cells[name]
        texts = [cell if isinstance(cell, str) else self._text(name, row) for row, cell in enumerate(cells)]
        for row, text in enumerate(texts):
            if not text or text.isspace():
                self._reject(name, row, "is empty: fill it in")
            if not text.isascii() and not _is_unicode(text):
                self._reject(name, row, "holds half a character (a lone surrogate), which is no text: correct it")
        return texts

    def names(self, name: str) -> list[str]:
        """Return a column of names, whose spaces at either end do not count."""
        return [text.strip() for text in self.texts(name)]

    def qualities(self, name: str) -> Float[np.ndarray, "row"]:
        """Return a column of grades from 0 to 1; true and false are 1 and 0, and % is a hundredth."""
        values = self._numbers(name, _grade, "write a number from 0 to 1, or true or false")
        # Holds for NaN too.
        bad = ~((values >= 0) & (values <= 1))
        self._reject_any(name, bad, "is not from 0 to 1: rescale it, or leave the row out if it is missing")
        return values

    def lengths(self, name: str, may_miss: bool = False) -> Float[np.ndarray, "row"]:
        """Return a column of token counts above 0, NaN where one is missing."""
        values = self._numbers(name, _number, "correct it")
        bad = ~((values > 0) & np.isfinite(values)) & ~(np.isnan(values) & may_miss)
        remedy = "leave the cell empty if it is missing" if may_miss else "correct it, or leave the column out"
        self._reject_any(name, bad, f"is not above 0: {remedy}")
        return values

    def _text(self, name: str, row: int) -> str:
        cell = self._cells[name][row]
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return ""
        if isinstance(cell, int | float | Decimal):
            return str(cell)
        self._reject(name, row, f"is no text but {_kind(cell)}: write the text itself")

    def _numbers(self, name: str, convert: Callable[[Any], float], remedy: str) -> Float[np.ndarray, "row"]:
        cells = self._cells[name]
        if set(map(type, cells)) <= {float, int}:
            try:
                return np.array(cells, np.float64)
            except OverflowError:
                pass
        values = np.empty(len(cells))
        for row, cell in enumerate(cells):
            try:
                values[row] = convert(cell)
            except (ValueError, TypeError):
                self._reject(name, row, f"is not a number: {number_remedy([cell], remedy)}")
            except OverflowError:
                values[row] = math.inf
        return values

    def _reject_any(self, name: str, bad: np.ndarray, what: str) -> None:
        if bad.any():
            self._reject(name, int(np.flatnonzero(bad)[0]), what)

    def _reject(self, name: str, row: int, what: str) -> NoReturn:
        raise UserError(f"{self._table.where(self._places[row])}: {name} {_shown(self._cells[name][row])} {what}")


def _number(cell: Any) -> float:
    """Convert a cell, NaN if it is missing; text must be a number as people and programs write it.

    Raises:
        ValueError: it is no number.
        TypeError: it is no number.
        OverflowError: it is too large.
    """
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        text = cell.strip()
        return math.nan if text.casefold() in _MISSING else float(text)
    if isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
        raise TypeError("not a number")
    return float(cell)


def _grade(cell: Any) -> float:
    if isinstance(cell, bool):
        return float(cell)
    if isinstance(cell, str):
        text = cell.strip().casefold()
        if text in _TRUTH:
            return _TRUTH[text]
        if text.endswith("%"):
            return float(text[:-1]) / 100
    return _number(cell)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(cell: Any) -> str:
    return {dict: "an object", list: "a list", bytes: "bytes", bool: "true or false"}.get(
        type(cell), type(cell).__name__
    )


def _shown(cell: Any) -> str:
    """Show a cell in one line."""
    text = ascii(cell) if isinstance(cell, str) and not _is_unicode(cell) else repr(cell)
    if not isinstance(cell, str | bytes):
        text = str(cell).replace("\n", " ")
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- other evaluations --------------------------------------------------------------------------------------


def _is_harness(table: TableReader) -> bool:
    return {"doc_id", "resps"} <= set(table.names)


def _harness(path: Path, notes: list[str]) -> Iterator[_Answers]:
    """Samples of lm-evaluation-harness: a file per task, in a folder per model."""
    model = path.resolve().parent.name
    task = re.sub(r"(_\d{4}-\d\d-\d\dT.*)?\.jsonl.*$", "", path.name.removeprefix("samples_"))
    with open_table(path, "the samples of lm-evaluation-harness") as table:
        if not _is_harness(table):
            raise UserError(f"{path} is no file of samples of lm-evaluation-harness (no doc_id, resps): take it away")
        score = next((name for name in _SCORES if name in table.names), None)
        if score is None:
            raise UserError(f"{path} has none of the scores {', '.join(_SCORES)}: write a table with {_EXPECTED}")
        wanted: Any = None
        for places, cells in table.chunks(["arguments", "resps", score, "filter"], _ROWS):
            if wanted is None:
                wanted = cells[0][3]
                kept = f", filter {wanted}" if wanted is not None else ""
                notes.append(f"{model}, {task}: quality is {score}{kept}; output_tokens is estimated from the text.")
            rows = [row for row, cell in enumerate(cells) if cell[3] == wanted]
            prompts, lengths = [], []
            for row in rows:
                prompt, answers = _asked(cells[row][0]), _answered(cells[row][1])
                if prompt is None or answers is None:
                    raise UserError(
                        f"{table.where(places[row])}: no text was generated here, so that the answer's length is "
                        "unknown: use a task of the type generate_until, or write a table with a row per answer"
                    )
                prompts.append(prompt)
                lengths.append(sum(map(_estimated_tokens, answers)) / len(answers))
            own = {"prompt": prompts, "quality": [cells[row][2] for row in rows]}
            columns = _Columns(table, [places[row] for row in rows], own)
            yield _Answers(
                [places[row] for row in rows],
                columns.texts("prompt"),
                [model] * len(rows),
                columns.qualities("quality"),
                np.array(lengths, np.float64),
                [task] * len(rows),
            )


def _asked(arguments: Any) -> str | None:
    """The prompt in `arguments`: a list of lists, or since version 0.4.5 objects in an object."""
    for inner in (0, "gen_args_0"), (0, "arg_0"):
        key = next((key for key in inner if isinstance(arguments, dict if isinstance(key, str) else list)), None)
        try:
            arguments = arguments[key]
        except (KeyError, IndexError, TypeError):
            return None
    return arguments if isinstance(arguments, str) else None


def _answered(responses: Any) -> list[str] | None:
    """The generated texts in `resps`, or None: likelihoods of given answers are pairs instead."""
    texts = responses[0] if isinstance(responses, list) and len(responses) == 1 else None
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return None


def _router_bench(table: TableReader, notes: list[str]) -> Iterator[_Answers]:
    """RouterBench: a row per prompt, and per model a column of scores and one of answers."""
    names = [name.removesuffix(_RESPONSE) for name in table.names if name.endswith(_RESPONSE)]
    for name in ("prompt", *names):
        if name not in table.names:
            raise UserError(f"{table.path} has no column '{name}', which RouterBench's tables have: add it")
    category = table.find("eval_name")
    notes.append("RouterBench: output_tokens is estimated from the text of the answers.")
    wanted = ["prompt", *names, *(f"{name}{_RESPONSE}" for name in names), *([category] if category else [])]
    for places, cells in table.chunks(wanted, _ROWS // 8):
        columns = _Columns(table, places, dict(zip(wanted, zip(*cells, strict=True), strict=True)))
        for name in names:
            yield _Answers(
                places,
                columns.texts("prompt"),
                [name] * len(places),
                columns.qualities(name),
                np.array([_estimated_tokens(text) for text in columns.texts(f"{name}{_RESPONSE}")], np.float64),
                columns.names(category) if category else None,
            )


def _estimated_tokens(text: str) -> int:
    return max(round(len(text) / CHARACTERS_PER_TOKEN), 1)


# --- the table ----------------------------------------------------------------------------------------------


def _assembled(path: Path, parts: Iterator[_Answers], notes: list[str], strict: TableReader | None = None) -> Table:
    """Put answers into their cells; with `strict`, a prompt and model come once, and a prompt has one category.

    Else several answers are averaged, and the first category counts.
    """
    frames = pandas_for(path)
    prompts: dict[str, int] = {}
    models: dict[str, int] = {}
    collected: list[_Answers] = []
    cells: list[tuple[Int[np.ndarray, "row"], Int[np.ndarray, "row"]]] = []
    for part in parts:
        row = np.array([prompts.setdefault(text, len(prompts)) for text in part.prompt], np.int64)
        column = np.array([models.setdefault(name, len(models)) for name in part.model], np.int64)
        cells.append((row, column))
        collected.append(part._replace(prompt=[], model=[]))
    if not collected:
        raise UserError(f"{path} has no rows: add one per answer")
    row, column = (np.concatenate(numbers) for numbers in zip(*cells, strict=True))
    places = [place for part in collected for place in part.places]
    _, first, which = np.unique(row * len(models) + column, return_index=True, return_inverse=True)
    if len(first) < len(row):
        again = int(np.flatnonzero(first[which] != np.arange(len(row)))[0])
        if strict:
            raise UserError(
                f"{strict.where(places[again])}: prompt and model ({_shown(list(models)[column[again]])}) are those "
                f"of {strict.counted} {places[first[which[again]]]}; keep one of them, or average several answers "
                "into one row"
            )
        notes.append(f"Averaged: {len(row) - len(first)} of {len(row)} answers repeat a prompt and model.")
    queries: dict[str, Any] = {"prompt": list(prompts)}
    if all(part.category is not None for part in collected):
        category = np.array([name for part in collected for name in part.category or ()], object)
        queries["category"] = _categories(category, row, places, strict)
    if all(part.prompt_tokens is not None for part in collected):
        # LLMs count differently; the bank holds one figure per prompt.
        counted = np.concatenate([part.prompt_tokens for part in collected if part.prompt_tokens is not None])
        queries["prompt_tokens"] = np.maximum(np.rint(np.bincount(row, counted) / np.bincount(row)), 1).astype(np.int64)
    else:
        queries["prompt_tokens"] = [_estimated_tokens(text) for text in prompts]
        notes.append(f"prompt_tokens is estimated: characters / {CHARACTERS_PER_TOKEN}.")

    def averaged(values: Float[np.ndarray, "row"]) -> Float[np.ndarray, "prompt llm"]:
        total, number = np.zeros((2, len(prompts), len(models)))
        np.add.at(total, (row, column), values)
        np.add.at(number, (row, column), 1)
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    quality = averaged(np.concatenate([part.quality for part in collected]))
    output_tokens = averaged(np.concatenate([part.output_tokens for part in collected]))
    return Table(frames.DataFrame(queries), quality, np.maximum(output_tokens, 1), list(models))


def _categories(
    category: np.ndarray, row: Int[np.ndarray, "row"], places: list[int], strict: TableReader | None
) -> np.ndarray:
    """Category of each prompt."""
    first = np.unique(row, return_index=True)[1]
    other = np.flatnonzero(category != category[first[row]])
    if len(other) and strict:
        at = int(other[0])
        raise UserError(
            f"{strict.where(places[at])}: category {_shown(category[at])} where {strict.counted} "
            f"{places[first[row[at]]]} has {_shown(category[first[row[at]]])} for the same prompt; "
            "give a prompt one category"
        )
    return category[first]

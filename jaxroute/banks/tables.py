"""Tables of measured answers: published ones and a user's own, and predictions for them.

A table is a folder of Parquet files whose rows are the same prompts in the same order:

    queries.parquet         prompt_tokens; optionally prompt, category, id
    quality.parquet         one column per LLM, from 0 to 1, NaN missing
    output_tokens.parquet   one column per LLM, above 0, NaN missing

The published evaluations hold codes instead (`correct.parquet`, `out_tokens.parquet`), which are recoded on reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxroute.errors import UserError, did_you_mean
from jaxroute.files import complete_folder
from jaxroute.tables import pandas_for, reading_parquet

if TYPE_CHECKING:
    import pandas

# Codes of the published tables (shared by both evaluations).
RIGHT, WRONG, NO_ANSWER, MISSING = 1, 0, 2, 255
MISSING_LENGTH = 65535


class Table(NamedTuple):
    """What LLMs answered to prompts, on the host."""

    queries: pandas.DataFrame
    """One row per prompt: `prompt_tokens`; `prompt`, `category` and `id` where known."""
    quality: Float[np.ndarray, "prompt llm"]
    """From 0 to 1, NaN where missing."""
    output_tokens: Float[np.ndarray, "prompt llm"]
    """Length of the answer, tokens, at least 1, NaN where missing."""
    llms: list[str]
    """Names of the columns."""


class Predictions(NamedTuple):
    """Predictions for the rows of a table, NaN where there is none; one column per chosen LLM."""

    quality: Float[np.ndarray, "prompt llm"]
    output_tokens: Float[np.ndarray, "prompt llm"]
    log_length_error: Float[np.ndarray, "llm"]


# --- reading ------------------------------------------------------------------------------------------------


def read_table(folder: Path) -> Table:
    """Read and check a table, a user's own or a published one.

    Raises:
        UserError: a file is missing or cannot be read, the files do not belong together, or a value is out of range.
    """
    queries = read_parquet(folder / "queries.parquet")
    published = (folder / "correct.parquet").exists() and not (folder / "quality.parquet").exists()
    names = ("correct", "out_tokens") if published else ("quality", "output_tokens")
    quality_path, tokens_path = (folder / f"{name}.parquet" for name in names)
    cells = {path: read_parquet(path) for path in (quality_path, tokens_path)}
    for path, table in cells.items():
        if len(table) != len(queries):
            raise UserError(
                f"{path} has {len(table)} rows where queries.parquet has {len(queries)}: "
                "take the three tables from one release"
            )
    # A column of the queries, such as an id, is no LLM in the other two tables.
    llms = [str(name) for name in cells[quality_path].columns if name not in queries.columns]
    if not llms:
        raise UserError(f"{quality_path} has no column of an LLM: add one per LLM")
    for llm in cells[tokens_path].columns:
        if llm not in queries.columns and llm not in llms:
            raise UserError(
                f"{quality_path} has no column '{llm}'{did_you_mean(llm, llms)}: both tables need the same LLMs"
            )
    if "prompt_tokens" not in queries.columns:
        raise UserError(f"{folder / 'queries.parquet'} has no column 'prompt_tokens': add the prompts' token counts")
    prompt_tokens = _floats(folder / "queries.parquet", queries, ["prompt_tokens"])
    good = (prompt_tokens > 0) & np.isfinite(prompt_tokens)
    _check(good, prompt_tokens, folder / "queries.parquet", ["prompt_tokens"], "a number above 0")
    quality = _floats(quality_path, cells[quality_path], llms)
    output_tokens = _floats(tokens_path, cells[tokens_path], llms)
    if published:
        return _recoded(queries, quality, output_tokens, llms, folder)
    for path, values, good, what in (
        (quality_path, quality, (quality >= 0) & (quality <= 1), "from 0 to 1"),
        (tokens_path, output_tokens, (output_tokens > 0) & np.isfinite(output_tokens), "a number above 0"),
    ):
        _check(good | np.isnan(values), values, path, llms, f"{what}, or NaN where it is missing")
    return Table(queries, quality, np.maximum(output_tokens, 1), llms)


def _recoded(
    queries: pandas.DataFrame,
    code: Float[np.ndarray, "prompt llm"],
    tokens: Float[np.ndarray, "prompt llm"],
    llms: list[str],
    folder: Path,
) -> Table:
    """Turn a published table's codes into figures, and rename its columns to those of any table."""
    if not np.isin(code, (RIGHT, WRONG, NO_ANSWER, MISSING)).all():
        raise UserError(
            f"{folder / 'correct.parquet'} holds codes other than 0 wrong, 1 right, 2 no answer, "
            "255 missing: recode the table"
        )
    queries = queries.rename(columns={"qid": "id", "dataset": "category"})
    if "prompt" not in queries.columns and {"question", "options"} <= set(queries.columns):
        queries["prompt"] = queries["question"] + "\n" + queries["options"].astype(str)
    return Table(
        queries,
        quality=np.where(code == MISSING, np.nan, code == RIGHT),
        output_tokens=np.where(tokens == MISSING_LENGTH, np.nan, np.maximum(tokens, 1)),
        llms=llms,
    )


def read_predictions(folder: Path, llms: Sequence[str], num_rows: int) -> Predictions:
    """Read a predictor's predictions for these LLMs and a table of `num_rows` rows.

    Raises:
        UserError: a file is missing or cannot be read, lacks an LLM, or has other rows or a value out of range.
    """
    remedy = "set bank.predictions to a folder that python -m jaxroute predict wrote, or null"

    def read(name: str, rows: int, what: str) -> tuple[Path, Float[np.ndarray, "row llm"]]:
        path = folder / name
        table = read_parquet(path, remedy)
        if len(table) != rows:
            raise UserError(
                f"{path} has {len(table)} rows where {what} {rows}: run python -m jaxroute predict on this bank again"
            )
        return path, _floats(path, table, llms)

    path, quality = read("predicted_quality.parquet", num_rows, "the bank has")
    good = (quality >= 0) & (quality <= 1)
    _check(good | np.isnan(quality), quality, path, llms, "from 0 to 1, or NaN for no prediction")
    path, tokens = read("predicted_output_tokens.parquet", num_rows, "the bank has")
    good = (tokens > 0) & np.isfinite(tokens)
    _check(good | np.isnan(tokens), tokens, path, llms, "a number above 0, or NaN for no prediction")
    path, error = read("log_length_error.parquet", 1, "it should have")
    _check((error > 0) & np.isfinite(error), error, path, llms, "a number above 0")
    return Predictions(quality, tokens, error[0])


def read_no_worse(
    folder: Path, scores: Sequence[str], llms: Sequence[str], num_rows: int
) -> list[Float[np.ndarray, "prompt llm"]]:
    """Read scores of Hybrid LLM for these LLMs and a table of `num_rows` rows.

    Raises:
        UserError: a file is missing or cannot be read, lacks an LLM, or has other rows or a value out of range.
    """
    tables = []
    for score in scores:
        path = folder / f"no_worse_{score}.parquet"
        table = read_parquet(path, "set bank.hybrid to a folder that predict hybrid wrote with one --large, or null")
        if len(table) != num_rows:
            raise UserError(
                f"{path} has {len(table)} rows where the bank has {num_rows}: run python -m jaxroute predict hybrid on "
                "this bank again"
            )
        values = _floats(path, table, llms)
        _check((values >= 0) & (values <= 1), values, path, llms, "from 0 to 1")
        tables.append(values)
    return tables


def split_of_rows(num_rows: int) -> Bool[np.ndarray, "prompt"]:
    """Tell the rows of a table that are in the train half; the others are the test half.

    The halves are drawn over the rows of the file, with a constant seed, so that the same prompt stays in
    the same half for every pool of LLMs and every configured seed.
    """
    return np.random.default_rng(0).permutation(num_rows) % 2 == 0


def read_parquet(
    path: Path,
    remedy: str = "set JAXROUTE_DATA or data_dir to the folder of the published tables, or bank.folder to one that "
    "python -m jaxroute bank build wrote",
) -> pandas.DataFrame:
    """Read a whole Parquet file.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: {remedy}")
    with reading_parquet(path):
        return pandas_for(path).read_parquet(path)


def _floats(path: Path, table: pandas.DataFrame, columns: Sequence[str]) -> Float[np.ndarray, "row column"]:
    """Columns of a table as numbers."""
    values = np.empty((len(table), len(columns)))
    for column, name in enumerate(columns):
        if name not in table.columns:
            raise UserError(
                f"{path} has no column '{name}'{did_you_mean(name, table.columns)}: it needs one column per LLM"
            )
        try:
            values[:, column] = table[name].to_numpy(float, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, column '{name}': not all cells are numbers; write numbers or NaN") from error
    return values


def _check(
    good: Bool[np.ndarray, "row column"],
    values: Float[np.ndarray, "row column"],
    path: Path,
    columns: Sequence[str],
    what: str,
) -> None:
    """Report the first value that is not as it should be; rows are counted from 1."""
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise UserError(
            f"{path}, row {row + 1}, column '{columns[column]}': {values[row, column]:g} should be {what}; "
            "correct the table"
        )


# --- writing ------------------------------------------------------------------------------------------------


def choose_llms(table: Table, llms: Sequence[str], where: Path) -> Table:
    """Return the table with only these LLMs, in this order.

    Raises:
        UserError: the table lacks one of them; `where` names the table in the message.
    """
    for llm in llms:
        if llm not in table.llms:
            raise UserError(f"{where} has no LLM '{llm}'{did_you_mean(llm, table.llms)}: name some of its columns")
    chosen = [table.llms.index(llm) for llm in dict.fromkeys(llms)]
    return table._replace(
        quality=table.quality[:, chosen],
        output_tokens=table.output_tokens[:, chosen],
        llms=[table.llms[column] for column in chosen],
    )


def write_table(table: Table, folder: Path) -> None:
    """Write a table as `read_table` reads it; the folder appears complete or not at all.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    frames = pandas_for(folder)
    queries = [name for name in ("id", "prompt", "category", "prompt_tokens") if name in table.queries.columns]
    parts = {
        "queries": table.queries[queries],
        "quality": frames.DataFrame(table.quality, columns=table.llms),
        "output_tokens": frames.DataFrame(table.output_tokens, columns=table.llms),
    }
    with complete_folder(folder) as draft:
        for name, part in parts.items():
            part.to_parquet(draft / f"{name}.parquet", index=False)

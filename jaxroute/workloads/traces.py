"""Recorded request traces: a reader of published formats and of a user's own, and statistics of their arrivals."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from jaxroute.decisions import arrivals, is_decision_log, read_decisions
from jaxroute.errors import UserError
from jaxroute.files import shown
from jaxroute.tables import Chunk, TableReader, number_remedy, open_table
from jaxroute.workloads.prefixes import Prefixes, joined_prefixes, listed_prefixes, session_prefixes

# A date and a time with up to nine decimals; after them, perhaps, the offset from UTC.
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(Z|[+-]\d\d:?\d\d)?")


class Trace(NamedTuple):
    """Recorded requests in order of arrival, on the host."""

    arrival_time: Float64[np.ndarray, "request"]
    """Seconds since the first request. float64: an hour in steps of 100 ns takes 11 digits."""
    prompt_tokens: Int64[np.ndarray, "request"]
    """Tokens of the prompt."""
    output_tokens: Int64[np.ndarray, "request"]
    """Tokens generated."""
    format: str
    """Name of the format in which the file is, one of `FORMATS`, or `GATEWAY`."""
    failed: int = 0
    """Rows left out, because the format marks them as failed."""
    torn: int = 0
    """Lines left out that a gateway which was killed has left behind."""
    prefixes: Prefixes | None = None
    """What prompts have in common, if the file says so: by ids of their blocks, or by sessions."""


class Format(NamedTuple):
    """A format of traces: which columns say what, and how time is written."""

    name: str
    columns: tuple[str, str, str]
    """Of arrival time, prompt tokens and output tokens."""
    time: str
    """What a time looks like, for error messages."""
    read_times: Callable[[Sequence[Any]], Shaped[np.ndarray, "row"]]
    """Cells to numbers; raises an error that `_CELL_ERRORS` lists if one of them is no time."""
    per_second: float = 1.0
    """Units of these numbers in a second."""
    zero_is_failed: bool = False
    """Whether a request without output is one that failed."""
    kinds: tuple[str, ...] = ("csv", "json", "parquet")
    """Kinds of tables in which it comes."""
    block_size: int | None = None
    """Tokens of the blocks whose ids are in `BLOCK_IDS`, if the format has that column."""


BLOCK_IDS = "hash_ids"
"""Column of lists: one id per block of the prompt, equal for equal prefixes."""
SESSIONS = ("session", "conversation", "conversation_id")
"""Names of the column that says whose conversation a request carries on; the first that is there counts."""
_LISTED_ROWS = 1 << 14  # of a chunk with lists, whose cells take much more memory than those of numbers


_CELL_ERRORS = (ValueError, TypeError, OverflowError)


def _numbers(cells: Sequence[Any]) -> Float64[np.ndarray, "row"]:
    """Cells of text or numbers as finite numbers."""
    if bool in set(map(type, cells)):
        raise ValueError("not numbers")
    values = np.array(cells, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("not one finite number per row")
    return values


def _whole_numbers(cells: Sequence[Any]) -> Int64[np.ndarray, "row"]:
    values = _numbers(cells)
    if (values != np.rint(values)).any() or (np.abs(values) >= 2.0**53).any():
        raise ValueError("not whole numbers")
    return values.astype(np.int64)


def _milliseconds(cells: Sequence[Any]) -> Float64[np.ndarray, "row"]:
    """Numbers; quoted times are seconds in traces whose keys are otherwise Mooncake's."""
    if str in set(map(type, cells)):
        raise ValueError("not numbers")
    return _numbers(cells)


def _nanoseconds(cells: Sequence[Any]) -> Int64[np.ndarray, "row"]:
    """Dates and times in UTC, as nanoseconds; Python's datetime would cut the last of Azure's seven decimals."""
    matches = [_STAMP.fullmatch(str(cell).strip()) for cell in cells]  # NumPy alone would read "12345" as a year
    if None in matches:
        raise ValueError("not dates and times")
    found = [(match[1], match[2]) for match in matches if match]
    times = np.array([time for time, _ in found], "datetime64[ns]")
    offsets = {text: _offset(text) for text in {text for _, text in found}}
    if any(offsets.values()):
        times -= np.array([offsets[text] for _, text in found], "timedelta64[m]")
    return times.astype(np.int64)


def _offset(text: str | None) -> int:
    """Minutes ahead of UTC; without an offset, the time is UTC."""
    if text in (None, "Z"):
        return 0
    assert text is not None
    return int(text[0] + "1") * (60 * int(text[1:3]) + int(text[-2:]))


FORMATS = (
    Format(
        "Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), "a time like 2023-11-16 18:15:46.6805900",
        _nanoseconds, per_second=1e9,
    ),
    Format(
        "BurstGPT", ("Timestamp", "Request tokens", "Response tokens"), "a time in s", _numbers, zero_is_failed=True
    ),
    Format(
        "Mooncake", ("timestamp", "input_length", "output_length"), "a time in ms, not in quotes,", _milliseconds,
        per_second=1e3, kinds=("json", "parquet"), block_size=512,
    ),
    Format("table", ("arrival_time", "prompt_tokens", "output_tokens"), "a time in s", _numbers),
)  # fmt: skip
"""All formats of tables, described in docs/how-to/traces.md."""

GATEWAY = "gateway"
"""The decision log of python -m jaxroute.gateway."""


# --- reading ------------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> Trace:
    """Read a trace in one of `FORMATS`, which its name and columns tell apart.

    Args:
        path: CSV, JSON Lines or Parquet, as `jaxroute.tables.open_table` reads them. Columns may be in any order;
            others are ignored, but for `BLOCK_IDS` of a format that has blocks, and otherwise one of `SESSIONS`: they
            say what prompts have in common.

    Returns:
        The trace, R requests.

    Raises:
        UserError: a missing or unreadable file, columns of no known format, no rows, or a row that cannot be parsed,
            has negative tokens, goes back in time, or does not say what its prompt has in common with others as it
            should; the message names file, line and remedy.

    """
    if is_decision_log(path):
        return _of_gateway(path)
    parts, failed, latest = [], 0, -np.inf
    listed: list[Prefixes] = []
    sessions = _Sessions()
    with open_table(path, f"the columns of one of {_known_formats()}") as table:
        format, columns = _recognised(table)
        block_ids = table.find(BLOCK_IDS) if format.block_size else None
        session = table.find(*SESSIONS) if block_ids is None else None
        further = [name for name in (block_ids, session) if name]
        columns = columns + further
        for chunk in table.chunks(columns, _LISTED_ROWS) if block_ids else table.chunks(columns):
            numbers = chunk._replace(cells=[cells[:3] for cells in chunk.cells]) if further else chunk
            times, prompt, output = _checked(table, format, numbers, latest)
            latest = times[-1]
            kept = output > 0 if format.zero_is_failed else np.ones(len(output), bool)
            failed += int((~kept).sum())
            parts.append((times[kept], prompt[kept], output[kept]))
            if format.block_size and block_ids:
                ids = _checked_ids(table, chunk, prompt, format.block_size)
                listed.append(
                    listed_prefixes([row for row, keep in zip(ids, kept, strict=True) if keep], format.block_size)
                )
            elif session:
                sessions.add(table, session, chunk, kept)
    if not parts:
        raise UserError(f"{path} has no requests: give a file with at least one row")
    times, prompt, output = map(np.concatenate, zip(*parts, strict=True))
    if not len(times):
        raise UserError(f"{path} holds failed requests only ({failed}): give a file with at least one that succeeded")
    prefixes = None
    if listed:
        prefixes = joined_prefixes(listed)
    elif sessions.parts:
        prefixes = session_prefixes(np.concatenate(sessions.parts), prompt, output)
    return Trace((times - times[0]) / format.per_second, prompt, output, format.name, failed, prefixes=prefixes)


def _of_gateway(path: str | Path) -> Trace:
    """Return the requests of a gateway's decision log that were completed; those that failed are counted."""
    log = read_decisions(path)
    times, prompt, output = arrivals(log)
    if not len(times):
        raise UserError(f"{path} holds no request that was completed: give a log with at least one")
    return Trace(times, prompt, output, GATEWAY, len(log.records) - len(times), log.torn)


def _recognised(table: TableReader) -> tuple[Format, list[str]]:
    """Return the format that has the table's columns, and what the table calls them."""
    formats = [format for format in FORMATS if table.kind in format.kinds]
    found = [[table.find(name) for name in format.columns] for format in formats]
    for format, columns in zip(formats, found, strict=True):
        if None not in columns:
            return format, [str(name) for name in columns]
    # Names in the very case of the format count before others.
    nearest = max(formats, key=lambda format: len(set(format.columns) & set(table.names)))
    missing = [name for name in nearest.columns if table.find(name) is None]
    near = f" ({nearest.name} lacks {', '.join(missing)})" if len(missing) < len(nearest.columns) else ""
    raise UserError(
        f"{table.path}: columns of no known format in {shown(table.names)}{near}; "
        f"rename them to those of one of {_known_formats()}"
    )


def _known_formats() -> str:
    return "; ".join(f"{format.name}: {', '.join(format.columns)}" for format in FORMATS)


def _checked(
    table: TableReader, format: Format, chunk: Chunk, latest: float
) -> tuple[Shaped[np.ndarray, "row"], Int64[np.ndarray, "row"], Int64[np.ndarray, "row"]]:
    """Times, prompt and output tokens of a chunk, none of them earlier than `latest`."""

    def convert(rows: list[tuple[Any, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stamps, prompt, output = zip(*rows, strict=True)
        return format.read_times(stamps), _whole_numbers(prompt), _whole_numbers(output)

    def row_error(row: int, problem: str, remedy: str) -> UserError:
        return UserError(f"{table.where(chunk.places[row])}: {problem} {shown(chunk.cells[row])}{remedy}")

    try:
        times, prompt, output = convert(chunk.cells)
    except _CELL_ERRORS:
        for row, cells in enumerate(chunk.cells):
            try:
                convert([cells])
            except _CELL_ERRORS:
                remedy = (
                    f": {', '.join(format.columns)} should be {format.time} and two whole numbers of tokens; "
                    + number_remedy(cells, "correct or delete the row")
                )
                raise row_error(row, "cannot read", remedy) from None
        raise  # unreachable: a chunk is its rows
    negative = np.flatnonzero((prompt < 0) | (output < 0))
    if len(negative):
        raise row_error(negative[0], "negative number of tokens in", ": correct or delete the row")
    backwards = np.flatnonzero(np.diff(times, prepend=times[0] if latest == -np.inf else latest) < 0)
    if len(backwards):
        raise row_error(backwards[0], "time goes backwards in", f": sort the file by {format.columns[0]}")
    return times, prompt, output


def _checked_ids(
    table: TableReader, chunk: Chunk, prompt: Int64[np.ndarray, "row"], block_size: int
) -> list[list[int]]:
    """Return the last cells of a chunk's rows, each a list with an id per block of the prompt."""
    rows = [cells[-1] for cells in chunk.cells]
    for row, (ids, tokens) in enumerate(zip(rows, prompt.tolist(), strict=True)):
        where, blocks = table.where(chunk.places[row]), -(-tokens // block_size)
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int} or any(abs(id) >= 2**63 for id in ids):
            raise UserError(
                f"{where}: {BLOCK_IDS} is {shown([ids])}: it should be a list of whole numbers, one per block of "
                f"{block_size} tokens; correct it, or remove the column"
            )
        if len(ids) != blocks:
            raise UserError(
                f"{where}: {BLOCK_IDS} has {len(ids)} ids, and {tokens} prompt tokens are {blocks} blocks of "
                f"{block_size}; correct it, or remove the column"
            )
    return rows


class _Sessions:
    """The sessions of a trace, numbered as they come."""

    def __init__(self) -> None:
        self.parts: list[Int64[np.ndarray, "row"]] = []
        self._numbers: dict[str, int] = {}

    def add(self, table: TableReader, column: str, chunk: Chunk, kept: Bool[np.ndarray, "row"]) -> None:
        """Number the sessions in the last cells of a chunk's rows; a cell without a name is -1."""
        numbers = np.full(len(chunk.cells), -1)
        for row, cells in enumerate(chunk.cells):
            if (name := _session_name(cells[-1])) is None:
                raise UserError(
                    f"{table.where(chunk.places[row])}: {column} is {shown([cells[-1]])}: it should be text or a whole "
                    "number, or empty; correct it, or rename the column"
                )
            if name:
                numbers[row] = self._numbers.setdefault(name, len(self._numbers))
        self.parts.append(numbers[kept])


def _session_name(cell: Any) -> str | None:
    """Return what a cell calls its session, "" if nothing, None if it can be no name."""
    if cell is None or cell != cell:  # Parquet's missing number may be nan
        return ""
    if isinstance(cell, float) and cell.is_integer():  # pandas makes floats of whole numbers if one is missing
        return str(int(cell))
    return str(cell).strip() if type(cell) in (str, int) else None


# --- what arrivals are like ---------------------------------------------------------------------------------


def window_counts(arrival_time: Float64[np.ndarray, "request"], window: float) -> tuple[Int64[np.ndarray, "full"], int]:
    """Count the requests in consecutive windows that lie wholly within the trace.

    Args:
        arrival_time: s since the first request, never falling.
        window: their length, s.

    Returns:
        The counts of the windows that have a request, in order, and the number of all windows.

    """
    number = int(arrival_time[-1] // window)
    # Positions in a sorted list, not bins of a histogram: a trace may be long and sparse.
    index = (arrival_time / window).astype(np.int64)
    index = index[index < number]
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    return np.diff(starts, append=len(index)), number


def fano_factor(arrival_time: Float64[np.ndarray, "request"], window: float) -> tuple[float, int]:
    """Estimate the index of dispersion for counts: variance / mean of the requests per window; 1 for Poisson.

    Args:
        arrival_time: s since the first request, never falling.
        window: s.

    Returns:
        The factor, from the unbiased variance, and the number of windows; nan with fewer than two.

    """
    counts, number = window_counts(arrival_time, window)
    if number < 2 or not len(counts):
        return float("nan"), number
    mean = counts.sum() / number
    squares = ((counts - mean) ** 2).sum() + (number - len(counts)) * mean**2
    return float(squares / (number - 1) / mean), number


def gap_variation(arrival_time: Float64[np.ndarray, "request"]) -> float:
    """Coefficient of variation of the gaps between arrivals: standard deviation / mean; 1 for Poisson."""
    gaps = np.diff(arrival_time)
    return float(gaps.std() / gaps.mean())

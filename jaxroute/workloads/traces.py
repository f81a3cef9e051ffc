"""Recorded request traces: reading the published formats and a user's own, and what their arrivals are like."""

from __future__ import annotations

import csv
import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from jaxroute.banks.tables import read_parquet
from jaxroute.errors import UserError
from jaxroute.files import json_object, shown

# A date and a time with up to nine decimals; after them, perhaps, the offset from UTC.
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(Z|[+-]\d\d:?\d\d)?")
_CHUNK = 1 << 17  # rows: weeks of requests fit into memory as numbers, not as text


class Trace(NamedTuple):
    """Recorded requests in order of arrival, on the host.

    Attributes:
        arrival_time: seconds since the first request. float64: an hour in steps of 100 ns takes 11 digits.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens generated.
        format: name of the format in which the file is, one of `FORMATS`.
        failed: rows left out, because the format marks them as failed.

    """

    arrival_time: Float64[np.ndarray, "request"]
    prompt_tokens: Int64[np.ndarray, "request"]
    output_tokens: Int64[np.ndarray, "request"]
    format: str
    failed: int = 0


class Format(NamedTuple):
    """A format of traces: which columns say what, and how time is written."""

    name: str
    kind: str
    """Suffix of its files; .csv stands for all that are neither .jsonl nor .parquet."""
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


_CELL_ERRORS = (ValueError, TypeError, OverflowError)


def _numbers(cells: Sequence[Any]) -> Float64[np.ndarray, "row"]:
    """Cells of text or numbers as finite numbers."""
    values = np.array(cells, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("not one finite number per row")
    return values


def _whole_numbers(cells: Sequence[Any]) -> Int64[np.ndarray, "row"]:
    values = _numbers(cells)
    if (values != np.rint(values)).any() or (np.abs(values) >= 2.0**53).any():
        raise ValueError("not whole numbers")
    return values.astype(np.int64)


def _nanoseconds(cells: Sequence[Any]) -> Int64[np.ndarray, "row"]:
    """Dates and times in UTC, as nanoseconds; Python's datetime would cut the last of Azure's seven decimals."""
    matches = [_STAMP.fullmatch(str(cell).strip()) for cell in cells]  # numpy alone would read "12345" as a year
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
        "Azure", ".csv", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        "a time like 2023-11-16 18:15:46.6805900", _nanoseconds, per_second=1e9,
    ),
    Format(
        "BurstGPT", ".csv", ("Timestamp", "Request tokens", "Response tokens"), "a time in s", _numbers,
        zero_is_failed=True,
    ),
    Format(
        "Mooncake", ".jsonl", ("timestamp", "input_length", "output_length"), "a time in ms", _numbers, per_second=1e3
    ),
    Format("table", ".csv", ("arrival_time", "prompt_tokens", "output_tokens"), "a time in s", _numbers),
    Format("table", ".parquet", ("arrival_time", "prompt_tokens", "output_tokens"), "a time in s", _numbers),
)  # fmt: skip
"""All formats, described in docs/how-to/traces.md."""


# --- reading ------------------------------------------------------------------------------------------------


def read_trace(path: str | Path) -> Trace:
    """Read a trace in one of `FORMATS`, which its name and columns tell apart.

    Args:
        path: a .parquet file; or .jsonl, or CSV under any other name; these two with .gz at the end if compressed.
            Columns may be in any order; others are ignored.

    Returns:
        The trace, R requests.

    Raises:
        UserError: a missing or unreadable file, columns of no known format, no rows, or a row that cannot be parsed,
            has negative tokens or goes back in time; the message names file, line and remedy.

    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file: check the path of the trace")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    chunks = {".parquet": _parquet_chunks, ".jsonl": _jsonl_chunks}.get(kind, _csv_chunks)
    parts, failed, latest = [], 0, -np.inf
    format = None
    for format, places, cells in chunks(path):
        times, prompt, output = _checked(path, format, places, cells, latest)
        latest = times[-1]
        kept = output > 0 if format.zero_is_failed else np.ones(len(output), bool)
        failed += int((~kept).sum())
        parts.append((times[kept], prompt[kept], output[kept]))
    if format is None:
        raise UserError(f"{path} has no requests: give a file with at least one row")
    times, prompt, output = map(np.concatenate, zip(*parts, strict=True))
    if not len(times):
        raise UserError(f"{path} holds failed requests only ({failed}): give a file with at least one that succeeded")
    return Trace((times - times[0]) / format.per_second, prompt, output, format.name, failed)


_Chunk = tuple[Format, list[int], list[tuple[Any, ...]]]
"""Rows of a file: their lines, and their cells in the order of the format's columns."""


def _csv_chunks(path: Path) -> Iterator[_Chunk]:
    with _text(path) as lines:
        reader = csv.reader(lines)
        header = next(reader, None)
        if header is None:
            raise UserError(f"{path} is empty: give a file with the columns of one of {_known_formats()}")
        names = [name.strip() for name in header]
        format = _recognised(path, ".csv", names)
        # Blank lines, as editors leave at the end, are skipped.
        rows = ((reader.line_num, row) for row in reader if row)
        yield from _chunks(path, format, rows, [names.index(name) for name in format.columns])


def _jsonl_chunks(path: Path) -> Iterator[_Chunk]:
    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, text in enumerate(lines, 1):
            if text.strip():
                yield line, json_object(text, f"{path}:{line}")

    with _text(path) as lines:
        every = rows()
        if (first := next(every, None)) is None:
            raise UserError(f"{path} is empty: give a file with the keys of one of {_known_formats()}")
        format = _recognised(path, ".jsonl", list(first[1]))
        for _, places, cells in _chunks(path, format, itertools.chain([first], every), format.columns):
            for place, row in zip(places, cells, strict=True):
                # Quoted times are seconds in a trace whose keys are otherwise the same.
                if any(isinstance(cell, str | bool) for cell in row):
                    raise _unreadable(path, format, place, row)
            yield format, places, cells


def _parquet_chunks(path: Path) -> Iterator[_Chunk]:
    table = read_parquet(path)
    format = _recognised(path, ".parquet", [str(name) for name in table.columns])
    for start in range(0, len(table), _CHUNK):
        part = table[list(format.columns)].iloc[start : start + _CHUNK]
        cells = list(zip(*(part[name].tolist() for name in format.columns), strict=True))
        yield format, list(range(start + 1, start + 1 + len(cells))), cells


def _chunks(path: Path, format: Format, rows: Iterable[tuple[int, Any]], keys: Sequence[Any]) -> Iterator[_Chunk]:
    """Pick the format's columns from rows, many at a time: numpy reads a million cells as quickly as Python ten."""
    pick = itemgetter(*keys)
    places: list[int] = []
    cells: list[tuple[Any, ...]] = []
    for place, row in rows:
        try:
            cells.append(pick(row))
        except (IndexError, KeyError):
            raise _unreadable(path, format, place, row.values() if isinstance(row, dict) else row) from None
        places.append(place)
        if len(cells) == _CHUNK:
            yield format, places, cells
            places, cells = [], []
    if cells:
        yield format, places, cells


def _checked(
    path: Path, format: Format, places: list[int], cells: list[tuple[Any, ...]], latest: float
) -> tuple[Shaped[np.ndarray, "row"], Int64[np.ndarray, "row"], Int64[np.ndarray, "row"]]:
    """Times, prompt and output tokens of a chunk, none of them earlier than `latest`."""

    def convert(rows: list[tuple[Any, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stamps, prompt, output = zip(*rows, strict=True)
        return format.read_times(stamps), _whole_numbers(prompt), _whole_numbers(output)

    try:
        times, prompt, output = convert(cells)
    except _CELL_ERRORS:
        for place, row in zip(places, cells, strict=True):
            try:
                convert([row])
            except _CELL_ERRORS:
                raise _unreadable(path, format, place, row) from None
        raise  # unreachable: a chunk is its rows
    negative = np.flatnonzero((prompt < 0) | (output < 0))
    if len(negative):
        row = negative[0]
        raise UserError(
            f"{_where(path, places[row])}: negative number of tokens in {shown(cells[row])}: correct or delete the line"
        )
    backwards = np.flatnonzero(np.diff(times, prepend=times[0] if latest == -np.inf else latest) < 0)
    if len(backwards):
        row = backwards[0]
        raise UserError(
            f"{_where(path, places[row])}: time goes backwards in {shown(cells[row])}: "
            f"sort the file by {format.columns[0]}"
        )
    return times, prompt, output


def _recognised(path: Path, kind: str, names: list[str]) -> Format:
    """Return the format with these columns."""
    formats = [format for format in FORMATS if format.kind == kind]
    for format in formats:
        if set(format.columns) <= set(names):
            return format
    nearest = max(formats, key=lambda format: len(set(format.columns) & set(names)))
    missing = [name for name in nearest.columns if name not in names]
    near = f" ({nearest.name} lacks {', '.join(missing)})" if len(missing) < len(nearest.columns) else ""
    raise UserError(
        f"{_where(path, 1) if kind != '.parquet' else path}: columns of no known format in {shown(names)}{near}; "
        f"rename them to those of one of {_known_formats()}"
    )


def _known_formats() -> str:
    return "; ".join(f"{format.name} ({format.kind}): {', '.join(format.columns)}" for format in FORMATS)


def _unreadable(path: Path, format: Format, place: int, row: Iterable[Any]) -> UserError:
    return UserError(
        f"{_where(path, place)}: cannot read {shown(row)}: {', '.join(format.columns)} should be {format.time} and "
        "two whole numbers of tokens; correct or delete the line"
    )


def _where(path: Path, place: int) -> str:
    return f"{path}, row {place}" if path.suffix == ".parquet" else f"{path}:{place}"


@contextmanager
def _text(path: Path) -> Iterator[Iterable[str]]:
    """Open a file to be read line by line, decompressed."""
    try:
        if path.suffix == ".gz":
            # To its end, once: damage in the middle would look like bad rows.
            with gzip.open(path) as content:
                while content.read(1 << 20):
                    pass
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: give a CSV file, or name it .gz if it is compressed") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is named .gz and is not a complete gzip file ({error}): rename it or fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file ({error}): write it again") from error


# --- what arrivals are like ---------------------------------------------------------------------------------


def window_counts(arrival_time: Float64[np.ndarray, "request"], window: float) -> tuple[Int64[np.ndarray, "full"], int]:
    """Count the requests in windows side by side that lie wholly within the trace.

    Args:
        arrival_time: s since the first request, never falling.
        window: their length, s.

    Returns:
        The counts of the windows with any request, in order, and how many windows there are.

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

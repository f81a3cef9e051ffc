"""Reader of recorded request traces in the format of the Azure LLM inference traces (2023)."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from jaxroute.errors import UserError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?")


class Trace(NamedTuple):
    """Recorded requests in order of arrival, on the host.

    Attributes:
        arrival_time: seconds since the first request. float64: an hour in steps of 100 ns takes 11 digits.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens generated.

    """

    arrival_time: Float64[np.ndarray, "request"]
    prompt_tokens: Int64[np.ndarray, "request"]
    output_tokens: Int64[np.ndarray, "request"]


def read_azure_trace(path: str | Path) -> Trace:
    """Read a trace as published in Azure/AzurePublicDataset: plain CSV, or gzip if the name ends in .gz.

    Columns TIMESTAMP (UTC, fractions down to 100 ns), ContextTokens and GeneratedTokens, in any order; other
    columns are ignored.

    Args:
        path: the file.

    Returns:
        The trace, R requests.

    Raises:
        UserError: a missing or unreadable file, missing columns, no rows, or a row that cannot be parsed, has
            negative tokens or goes back in time; the message names file, line and remedy.

    """
    path = Path(path)
    lines = _read_text(path).splitlines()
    if not lines:
        raise UserError(f"{path} is empty: give a CSV file with the columns {', '.join(COLUMNS)}")
    reader = csv.reader(lines)
    header = [name.strip() for name in next(reader)]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)} in the header '{lines[0]}': "
            f"rename the columns to {', '.join(COLUMNS)}"
        )
    where = [header.index(name) for name in COLUMNS]
    stamps, tokens, line_numbers = [], [], []
    for row in reader:
        if not row:
            continue  # a blank line, as editors leave at the end
        line = reader.line_num
        try:
            stamp, prompt, output = (row[column] for column in where)
            stamps.append(_parse_time(stamp))
            tokens.append((int(prompt), int(output)))
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}:{line}: cannot read '{lines[line - 1]}': expected a time like "
                "2023-11-16 18:15:46.6805900 and two whole numbers of tokens; correct or delete the line"
            ) from error
        if min(tokens[-1]) < 0:
            raise UserError(
                f"{path}:{line}: negative number of tokens in '{lines[line - 1]}': correct or delete the line"
            )
        line_numbers.append(line)
    if not stamps:
        raise UserError(f"{path} has a header and no requests: give a file with at least one row")
    time = np.array(stamps)
    backwards = np.flatnonzero(np.diff(time) < np.timedelta64(0))
    if len(backwards):
        line = line_numbers[backwards[0] + 1]
        raise UserError(f"{path}:{line}: time goes backwards in '{lines[line - 1]}': sort the file by TIMESTAMP")
    count = np.array(tokens, np.int64)
    return Trace((time - time[0]) / np.timedelta64(1, "s"), count[:, 0], count[:, 1])


def _parse_time(text: str) -> np.datetime64:
    """Parse to nanoseconds; Python's datetime would cut the last of the seven digits."""
    text = text.strip()
    if not TIME.fullmatch(text):  # numpy alone would read "12345" as a year
        raise ValueError("no time")
    return np.datetime64(text, "ns")


def _read_text(path: Path) -> str:
    """Read the whole file, decompressed."""
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file: check the path of the trace")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{path} is named .gz and is not a complete gzip file ({error}): rename it to .csv or fetch it again"
            ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: give a CSV file, or name it .gz if it is compressed") from error

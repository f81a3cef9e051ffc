"""Serving logs: what a server has done with each request, from the formats in which people record it."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxroute.errors import UserError
from jaxroute.tables import json_object

MIN_REQUESTS = 30

# Names of the columns: those of `ServingLog`, and what others call them.
_COLUMNS = {
    "arrival_time": ("arrival_time", "queued_ts"),
    "first_token_time": ("first_token_time", "first_token_ts"),
    "last_token_time": ("last_token_time", "last_token_ts"),
    "prompt_tokens": ("prompt_tokens", "input_toks"),
    "output_tokens": ("output_tokens", "output_toks"),
}


class ServingLog(NamedTuple):
    """Requests that an expert has served, in order of arrival; times in s on one clock."""

    arrival_time: Float64[np.ndarray, "request"]
    first_token_time: Float64[np.ndarray, "request"]
    last_token_time: Float64[np.ndarray, "request"]
    prompt_tokens: Int[np.ndarray, "request"]
    output_tokens: Int[np.ndarray, "request"]

    @property
    def ttft(self) -> Float64[np.ndarray, "request"]:
        """Time to first token, s."""
        return self.first_token_time - self.arrival_time

    @property
    def latency(self) -> Float64[np.ndarray, "request"]:
        """Time to the last token, s."""
        return self.last_token_time - self.arrival_time


def read_log(path: str | Path) -> ServingLog:
    """Read a log: CSV or JSON lines with a row per request, or what `vllm bench serve --save-detailed` has written.

    Rows need arrival_time (or queued_ts), first_token_time (first_token_ts), last_token_time (last_token_ts), in s on
    one clock, prompt_tokens (input_toks) and output_tokens (output_toks). A name that ends in .gz is decompressed.

    Raises:
        UserError: it cannot be read, a row is incomplete or impossible, or there are fewer than 30 requests.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give a CSV, JSON or JSON lines file, or .gz of one"
        ) from None
    rows = list(_rows(path, text))
    if len(rows) < MIN_REQUESTS:
        raise UserError(f"{path} has {len(rows)} requests; a calibration needs at least {MIN_REQUESTS}")
    table = np.array([values for _, values in rows])
    where = [place for place, _ in rows]
    arrival, first, last, prompt, output = table.T
    backwards = np.diff(arrival, prepend=arrival[0]) < -60
    checks = {
        "arrives more than a minute before the row above it: has the clock jumped?": backwards,
        "has its first token before it arrives": first < arrival,
        "has its last token before its first": last < first,
        "has a time, or a number of tokens, that is not finite": ~np.isfinite(table).all(1),
        "has a negative time": (table[:, :3] < 0).any(1),
        "needs at least 1 prompt and 1 output token": (prompt < 1) | (output < 1),
    }
    for what, bad in checks.items():
        if bad.any():
            raise UserError(f"{path}:{where[int(np.argmax(bad))]}: the request {what}; correct or delete it")
    order = np.argsort(arrival, kind="stable")
    start = arrival.min()
    return ServingLog(
        *(column[order] - start for column in (arrival, first, last)),
        *(column[order].astype(np.int64) for column in (prompt, output)),
    )


def _rows(path: Path, text: str) -> Iterator[tuple[str, list[float]]]:
    """Yield each request's place in the file and its five numbers."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        yield from _vllm_rows(path, text)
        return
    if name.endswith(".csv"):
        reader = csv.DictReader(text.splitlines())
        records = ((str(reader.line_num), record) for record in reader)
    else:
        lines = enumerate(text.splitlines(), 1)
        records = ((str(number), json_object(line, f"{path}:{number}")) for number, line in lines if line.strip())
    for place, record in records:
        values = []
        for column, names in _COLUMNS.items():
            # The engine's own clock, where a row has it, is that of the other times.
            value = next((record[known] for known in reversed(names) if record.get(known) not in (None, "")), None)
            if value is None:
                raise UserError(f"{path}:{place}: {column} is missing; a row needs {', '.join(_COLUMNS)}")
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                raise UserError(
                    f"{path}:{place}: {column}={value!r} is not a number; correct or delete the row"
                ) from None
        yield place, values


def _vllm_rows(path: Path, text: str) -> Iterator[tuple[str, list[float]]]:
    """The result of vLLM's serving benchmark: a list per figure, with an entry per request."""
    try:
        result = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg})") from None
    needed = ("start_times", "ttfts", "itls", "input_lens", "output_lens")
    if not isinstance(result, dict) or (missing := [name for name in needed if name not in result]):
        lacks = "a JSON object" if not isinstance(result, dict) else ", ".join(missing)
        raise UserError(f"{path}: {lacks} missing; record it with vllm bench serve --save-result --save-detailed")
    columns = [result[name] for name in needed]
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: {', '.join(needed)} differ in length; record it again")
    for number, (start, ttft, gaps, prompt, output) in enumerate(zip(*columns, strict=True)):
        if output > 0:  # vLLM notes a request that failed without output
            yield f"request {number}", [start, start + ttft, start + ttft + sum(gaps), prompt, output]

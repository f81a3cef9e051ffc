"""Serving logs: what a server has done with each request, from the formats in which people record it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from jaxroute.decisions import is_decision_log, read_decisions, served
from jaxroute.errors import UserError
from jaxroute.files import shown
from jaxroute.tables import TableReader, number_remedy, open_table

MIN_REQUESTS = 30

# Names of the columns: those of `ServingLog`, and before them the engine's own, whose clock is that of the other times.
_COLUMNS = {
    "arrival_time": ("queued_ts", "arrival_time"),
    "first_token_time": ("first_token_ts", "first_token_time"),
    "last_token_time": ("last_token_ts", "last_token_time"),
    "prompt_tokens": ("input_toks", "prompt_tokens"),
    "output_tokens": ("output_toks", "output_tokens"),
}
_VLLM = ("start_times", "ttfts", "itls", "input_lens", "output_lens")
_RECORD_VLLM = "record it with vllm bench serve --save-result --save-detailed"
_BETWEEN_RUNS = 1.0
"""Pause between two runs in one file, s: a server has nothing to do then."""

# What is known to hold no requests, by what its columns are called, or the first of them begins with.
_NO_LOGS: tuple[tuple[set[str], str, str], ...] = (
    ({"mean_ttft_ms"}, "", f"is a benchmark's result without its requests; {_RECORD_VLLM}"),
    ({"input_config", "request_latency"}, "", "is AIPerf's summary; give the profile_export.jsonl next to it"),
    ({"Metric", "avg"}, "", "is AIPerf's summary; give the profile_export.jsonl next to it"),
    ({"qsl_idx", "seq_id"}, "", "is MLPerf LoadGen's list of answers, without times; give a log of the server's own"),
    (set(), "=====", "is a summary for people to read; give a log with a row per request"),
    ({"ContextTokens"}, "", "is a trace of arrivals, without answers; fit it with: python -m jaxroute trace fit"),
    ({"input_length", "timestamp"}, "", "is a trace of arrivals; fit it with: python -m jaxroute trace fit"),
    ({"batch", "context", "prompt", "ms"}, "", "is a profile; give --profile"),
)


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


class _Request(NamedTuple):
    """A row of a log, or an entry of a benchmark's result."""

    place: str
    values: tuple[float, ...]
    """In the order of `_COLUMNS`."""


def read_log(path: str | Path, since: float | None = None) -> ServingLog:
    """Read a serving log in one of the formats of docs/how-to/calibration.md.

    The content, not the name, tells the format. Requests that failed are left out where the format marks them. Of a
    gateway's decision log, `FILE#EXPERT` names the expert. `since` leaves out requests that arrived before, s on the
    log's clock.

    Raises:
        UserError: the file cannot be read or is no log, a request is incomplete or impossible, or there are fewer than
            30.
    """
    path = Path(path)
    file, _, expert = str(path).rpartition("#")
    if is_decision_log(file or path):
        requests = list(_gateway_requests(Path(file or path), expert if file else None))
    else:
        with open_table(path, "a row per request, or a benchmark's result") as table:
            requests = list(_requests(table))
    if since is not None:
        requests = [request for request in requests if request.values[0] >= since]
    if len(requests) < MIN_REQUESTS:
        raise UserError(f"{path} has {len(requests)} requests; a calibration needs at least {MIN_REQUESTS}")
    values = np.array([request.values for request in requests])
    arrival, first, last, prompt, output = values.T
    backwards = np.diff(arrival, prepend=arrival[0]) < -60
    checks = {
        "arrives more than a minute before the row above it: has the clock jumped?": backwards,
        "has its first token before it arrives": first < arrival,
        "has its last token before its first": last < first,
        "has a time, or a number of tokens, that is not finite": ~np.isfinite(values).all(1),
        "has a negative time": (values[:, :3] < 0).any(1),
        "needs at least 1 prompt and 1 output token": (prompt < 1) | (output < 1),
    }
    for what, bad in checks.items():
        if bad.any():
            place = requests[int(np.argmax(bad))].place
            raise UserError(f"{place}: the request {what}; correct or delete it")
    order = np.argsort(arrival, kind="stable")
    start = arrival.min()
    return ServingLog(
        *(column[order] - start for column in (arrival, first, last)),
        *(column[order].astype(np.int64) for column in (prompt, output)),
    )


def _requests(table: TableReader) -> Iterator[_Request]:
    if table.find("ttfts") and table.find("itls"):
        return _vllm_requests(table)
    if table.find("benchmarks") and table.kind == "json":
        return _guidellm_requests(table)
    if table.find("metadata") and table.find("metrics") and table.kind == "json":
        return _aiperf_requests(table)
    for names, beginning, what in _NO_LOGS:
        if names <= set(table.names) and table.names and table.names[0].startswith(beginning):
            raise UserError(f"{table.path} {what}")
    return _rows(table)


def _gateway_requests(path: Path, expert: str | None) -> Iterator[_Request]:
    """Completed streams of one expert in a gateway's decision log."""
    rows = [row for row in served(read_decisions(path), expert) if row["first_token_time"] is not None]
    experts = sorted({row["expert"] for row in rows})
    if len(experts) > 1:
        raise UserError(f"{path} has requests of {', '.join(experts)}; name one of them, such as {path}#{experts[0]}")
    if not rows:
        of = f" of {expert}" if expert else ""
        raise UserError(f"{path} has no completed stream{of}; name another expert, or stream the answers")
    for row in rows:
        yield _request(f"{path}, {row['id']}", tuple(row[column] for column in _COLUMNS))


def _rows(table: TableReader) -> Iterator[_Request]:
    """One request per row."""
    found = {column: table.find(*names) for column, names in _COLUMNS.items()}
    missing = [column for column, name in found.items() if name is None]
    if len(missing) == len(found):
        raise UserError(
            f"{table.path} is no serving log: it has the columns {shown(table.names)}; a row needs "
            f"{', '.join(_COLUMNS)}, or give what vllm bench serve --save-result --save-detailed writes"
        )
    if missing:
        raise UserError(f"{table.path}: {', '.join(missing)} is missing; a row needs {', '.join(_COLUMNS)}")
    for place, cells in table.rows([name for name in found.values() if name is not None]):
        yield _request(table.where(place), cells)


def _request(place: str, cells: tuple[Any, ...]) -> _Request:
    """Turn the cells of a request, in the order of `_COLUMNS`, into numbers."""
    values = []
    for column, cell in zip(_COLUMNS, cells, strict=True):
        if cell is None or cell == "":
            raise UserError(f"{place}: {column} is missing; correct or delete the row")
        values.append(_number(place, column, cell))
    return _Request(place, tuple(values))


def _number(place: str, name: str, cell: Any) -> float:
    try:
        if isinstance(cell, bool):
            raise TypeError
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        text = f"{name}={cell!r}" if len(repr(cell)) < 60 else f"{name}={shown(repr(cell))}"
        remedy = number_remedy([cell], "correct or delete the row")
        raise UserError(f"{place}: {text} is not a number; {remedy}") from None


def _vllm_requests(table: TableReader) -> Iterator[_Request]:
    """Results of vLLM's serving benchmark: a run per row, a list per figure, an entry per request.

    Runs follow each other, whatever their clocks say.
    """
    found = {name: table.find(name) for name in _VLLM}
    if missing := [name for name, known in found.items() if known is None]:
        raise UserError(f"{table.path}: {', '.join(missing)} missing; {_RECORD_VLLM}")
    extra = [name for name in (table.find("model_id"), table.find("errors")) if name is not None]
    names = [name for name in found.values() if name is not None] + extra
    models: dict[str, str] = {}
    now = 0.0
    for place, cells in table.rows(names):
        run = table.where(place)
        lists, row = cells[: len(_VLLM)], dict(zip(extra, cells[len(_VLLM) :], strict=True))
        for name, cell in zip(_VLLM, lists, strict=True):
            if not isinstance(cell, list):
                raise UserError(f"{run}: {name} is {shown(repr(cell))} and not a list; {_RECORD_VLLM}")
        if len({len(cell) for cell in lists}) > 1:
            raise UserError(f"{run}: {', '.join(_VLLM)} differ in length; record it again")
        models.setdefault(str(row.get("model_id")), run)
        if len(models) > 1:
            raise UserError(f"{table.path} has runs of the models {', '.join(sorted(models))}; give one log per expert")
        errors = row.get("errors")
        served = []
        for number, entries in enumerate(zip(*lists, strict=True)):
            error = errors[number] if isinstance(errors, list) and number < len(errors) else None
            if not error and not _failed(entries):
                served.append(_vllm_request(f"{run}, request {number}", entries))
        if served:
            shift = now - min(request.values[0] for request in served)
            yield from (_shifted(request, shift) for request in served)
            now = max(request.values[2] for request in served) + shift + _BETWEEN_RUNS


def _failed(entries: tuple[Any, ...]) -> bool:
    """Whether a request has no answer, as vLLM notes one that failed."""
    _, ttft, gaps, _, output = entries
    return output in (None, 0) or (ttft in (None, 0, []) and gaps in (None, []))


def _vllm_request(place: str, entries: tuple[Any, ...]) -> _Request:
    start, ttft, gaps, prompt, output = entries
    if not isinstance(gaps, list):
        gaps = [gaps]
    first = _number(place, "start_times", start) + _number(place, "ttfts", ttft)
    try:
        answer = float(sum(gaps))
    except TypeError:
        bad = next(gap for gap in gaps if not isinstance(gap, int | float))
        raise UserError(f"{place}: itls has {shown(repr(bad))}, which is not a number; delete the request") from None
    return _Request(
        place,
        (
            float(start),
            first,
            first + answer,
            _number(place, "input_lens", prompt),
            _number(place, "output_lens", output),
        ),
    )


def _shifted(request: _Request, by: float) -> _Request:
    arrival, first, last, *tokens = request.values
    return request._replace(values=(arrival + by, first + by, last + by, *tokens))


def _guidellm_requests(table: TableReader) -> Iterator[_Request]:
    """A report of GuideLLM: benchmarks, each with a list of requests that were answered."""
    for place, (benchmarks,) in table.rows(["benchmarks"]):
        for number, benchmark in enumerate(benchmarks if isinstance(benchmarks, list) else []):
            run = f"{table.where(place)}, benchmark {number}"
            requests = _entry(_entry(benchmark, "requests"), "successful")
            if not isinstance(requests, list):
                raise UserError(f"{run}: requests.successful is missing; save GuideLLM's whole report as JSON")
            for position, request in enumerate(requests):
                names = ("start_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
                cells = tuple(_entry(request, name) for name in names)
                if cells[:3] == (None, None, None):
                    raise UserError(
                        f"{run} has requests without start_time, first_token_time and last_token_time; write them as a "
                        f"table with the columns {', '.join(_COLUMNS)}"
                    )
                yield _request(f"{run}, request {position}", cells)


def _aiperf_requests(table: TableReader) -> Iterator[_Request]:
    """AIPerf's profile_export.jsonl: a request per row, with its start and a table of measurements."""
    for place, (metadata, metrics, error) in table.rows(["metadata", "metrics", "error"]):
        row = table.where(place)
        if error:
            continue
        start = _entry(metadata, "request_start_ns")
        if start is None:
            raise UserError(f"{row}: metadata.request_start_ns is missing; give AIPerf's profile_export.jsonl")
        arrival = _number(row, "request_start_ns", start) * 1e-9
        ttft, latency = (_seconds(row, metrics, name) for name in ("time_to_first_token", "request_latency"))
        prompt = _entry(_entry(metrics, "input_sequence_length"), "value")
        output = _entry(_entry(metrics, "output_sequence_length"), "value")
        yield _request(row, (arrival, arrival + ttft, arrival + latency, prompt, output))


def _seconds(place: str, metrics: Any, name: str) -> float:
    """Read a time of AIPerf's, which names its unit."""
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}
    metric = _entry(metrics, name)
    value, unit = _entry(metric, "value"), _entry(metric, "unit")
    if value is None or unit not in units:
        raise UserError(f"{place}: {name} with a unit of time is missing; run AIPerf with --streaming")
    return _number(place, name, value) * units[unit]


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None

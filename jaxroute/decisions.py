"""The decision log of a gateway: one JSON object per line and request, written when the request ends.

Fields are listed in docs/gateway.md. A process that was killed may leave a torn line; readers skip those, and say how
many there were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from jaxroute.errors import UserError

FORMAT = "jaxroute-decision"
COMPLETED, DECLINED, REJECTED, FAILED, CANCELLED = "completed", "declined", "rejected", "failed", "cancelled"
"""How a request ends."""


class DecisionLog(NamedTuple):
    """The records of a log."""

    records: list[dict[str, Any]]
    torn: int
    """Lines that could not be read."""


def is_decision_log(path: str | Path) -> bool:
    """Whether one of a file's first lines is a decision's."""
    try:
        with open(path, "rb") as file:
            # The very first may be torn.
            return any(_record(file.readline()) for _ in range(3))
    except OSError:
        return False


def read_decisions(path: str | Path, *, by_arrival: bool = True) -> DecisionLog:
    """Read a log, in order of arrival, or as it was written: in the order of the ends.

    Raises:
        UserError: it cannot be read, or holds no decision.
    """
    records, torn = [], 0
    try:
        with open(path, "rb") as file:
            for line in file:
                if not line.strip():
                    continue
                record = _record(line)
                if record is None:
                    torn += 1
                else:
                    records.append(record)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a decision log") from None
    if not records:
        raise UserError(f"{path} holds no decision; name a log that python -m jaxroute.gateway wrote")
    if by_arrival:
        records.sort(key=lambda record: record["arrival_time"])
    return DecisionLog(records, torn)


def served(log: DecisionLog, expert: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the requests that were completed, at one expert if it is named."""
    for record in log.records:
        if record["outcome"] == COMPLETED and record.get("output_tokens") and expert in (None, record.get("expert")):
            yield record


def arrivals(
    log: DecisionLog,
) -> tuple[Float64[np.ndarray, "request"], Int64[np.ndarray, "request"], Int64[np.ndarray, "request"]]:
    """Return time since the first, s, prompt tokens and output tokens of the requests that were completed."""
    rows = list(served(log))
    times = np.array([row["arrival_time"] for row in rows])
    tokens = np.array([[row["prompt_tokens"], row["output_tokens"]] for row in rows], np.int64).reshape(-1, 2)
    return times - times.min(initial=np.inf if len(times) else 0.0), tokens[:, 0], tokens[:, 1]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record; None if it is torn, or of another kind."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        fine = record["format"] == FORMAT and isinstance(record["arrival_time"], float) and record["outcome"]
    except (ValueError, KeyError, TypeError):
        return None
    return record if fine else None

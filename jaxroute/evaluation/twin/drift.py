"""When a server has changed: Page's cumulative sums of what its answers took, measured against the fit.

Each answer gives the logarithm of how long its tokens took, measured over predicted, in units of its usual spread
(E. S. Page, Continuous inspection schemes, Biometrika 41, 1954). Errors repeat from one request to the next, so the
spread is widened by that. A change of less than 2 % of a request's time matters to nobody, and counts as noise. The
same is done with the times to the first token: where tokens come as fast as ever, and first tokens late, somebody
else's requests are in the queue.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.evaluation.twin.simulate import Played

# Allowance and limit of the sums, in spreads: without a change, an alarm comes by chance once in 10^4 answers or more.
_ALLOWED, _LIMIT = 0.5, 8.0
_LEAST_SPREADS = {"speed": 0.02, "queue": 0.2}
"""What may change: how fast tokens come, and how long requests wait for the first."""
# Spreads that one answer counts at most: five slow ones are needed, however slow, or sixteen that waited, as one busy
# spell makes many wait.
_MOST = {"speed": 2.5, "queue": 1.0}
_OUTLIER = 2.5  # spreads that an error counts at most when it is asked whether errors repeat
_FEWEST = 10


class Drift(NamedTuple):
    """A change of one server."""

    server: int
    since: int
    """The request with which it began, as far as can be told."""
    found: int
    """The request at whose end it was found."""
    found_within: int
    """Answers of this server in between."""
    pace: float
    """How many times as long it has taken since."""
    kind: str
    """What takes longer: one of `_LEAST_SPREADS`."""


def ratios(recorded: Recorded, predicted: Played, draw: int = 0) -> Float[np.ndarray, "request"]:
    """Log of the measured over the predicted time of each answer's tokens; nan where there is no answer.

    Of a stream of several tokens that is the time from the first to the last, otherwise the whole.
    """
    streamed = np.isfinite(recorded.ttft) & (recorded.output_tokens > 1)
    measured = np.where(streamed, recorded.latency - recorded.ttft, recorded.latency)
    ttft, latency = predicted.ttft[draw], predicted.latency[draw]
    expected = np.where(streamed, latency - ttft, latency)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.log(measured / expected)
    return np.where(np.isfinite(values), values, np.nan)


def waits(recorded: Recorded, predicted: Played, draw: int = 0) -> Float[np.ndarray, "request"]:
    """Log of the measured over the predicted time to the first token; nan where there is none.

    A usual time is added to both, as nobody minds a millisecond that has become two.
    """
    ttft = predicted.ttft[draw]
    usual = np.ones(len(recorded.servers) + 1)
    for server in range(len(recorded.servers)):
        of = ttft[(recorded.choice == server) & np.isfinite(ttft)]
        usual[server] = np.median(of) if len(of) else 1.0
    values = np.log((recorded.ttft + usual[recorded.choice]) / (ttft + usual[recorded.choice]))
    return np.where(np.isfinite(values), values, np.nan)


def find_drift(recorded: Recorded, predicted: Played, fitted: Bool[np.ndarray, "request"]) -> list[Drift]:
    """Return the first change of each server after the first part.

    Args:
        recorded: the log.
        predicted: a replay of the choices that were made; the first draw counts.
        fitted: which requests are of the first part.
    """
    of_kind = {"speed": ratios(recorded, predicted), "queue": waits(recorded, predicted)}
    found = []
    for server in range(len(recorded.servers)):
        changes = [_change(recorded, server, kind, values, fitted) for kind, values in of_kind.items()]
        known = [change for change in changes if change is not None]
        if known:
            found.append(min(known, key=lambda change: float((recorded.arrival + recorded.latency)[change.found])))
    return found


def _change(
    recorded: Recorded,
    server: int,
    kind: str,
    values: Float[np.ndarray, "request"],
    fitted: Bool[np.ndarray, "request"],
) -> Drift | None:
    of = np.flatnonzero((recorded.choice == server) & np.isfinite(values))
    # In the order in which their ends are known.
    of = of[np.argsort((recorded.arrival + recorded.latency)[of], kind="stable")]
    before, after = of[fitted[of]], of[~fitted[of]]
    if len(before) < _FEWEST or not len(after):
        return None
    least = _LEAST_SPREADS[kind]
    usual, spread = _usual(values[before], least)
    if kind == "queue":
        # Most requests wait for nothing, and a few for long.
        spread = max(spread, float(values[before].std()))
    off = np.clip((values[after] - usual) / spread, -_MOST[kind], _MOST[kind])
    for sign in (1, -1):
        alarm = _page(sign * off)
        if alarm is None:
            continue
        begin, end = alarm
        # What has passed since is told of by the hours' errors, and needs no remedy.
        pace = float(np.median(values[after[begin:]]) if kind == "speed" else values[after[begin:]].mean())
        if abs(pace) > least:
            return Drift(server, int(after[begin]), int(after[end]), end - begin + 1, float(np.exp(pace)), kind)
    return None


def paces(
    recorded: Recorded,
    values: Float[np.ndarray, "request"],
    blocks: Int[np.ndarray, "request"],
    drifts: list[Drift],
    used: np.ndarray,
) -> Float[np.ndarray, "block server"]:
    """Return how many times as long everything takes at each server in each block of time: the median of its answers.

    Servers that have not changed keep their pace, and so do blocks of few answers that of the block before.

    Args:
        recorded: the log.
        values: what `ratios` returns.
        blocks: of each request.
        drifts: which servers have changed.
        used: which requests may be looked at.
    """
    table = np.ones((blocks.max() + 1, len(recorded.servers)))
    for drift in drifts:
        pace = 1.0
        of = (recorded.choice == drift.server) & np.isfinite(values) & used
        for block in range(len(table)):
            here = of & (blocks == block)
            if here.sum() >= 3:
                pace = float(np.exp(np.median(values[here])))
            table[block, drift.server] = pace
    return table


def _usual(values: Float[np.ndarray, "answer"], least: float) -> tuple[float, float]:
    """Median and spread, robust, and as wide as if errors did not repeat."""
    median = float(np.median(values))
    off = values - median
    spread = 1.4826 * float(np.median(np.abs(off)))
    clipped = np.clip(off, -_OUTLIER * max(spread, 1e-9), _OUTLIER * max(spread, 1e-9))
    repeated = float((clipped[1:] * clipped[:-1]).sum() / max(np.square(clipped).sum(), 1e-18))
    repeated = min(max(repeated, 0.0), 0.9)
    return median, max(spread * np.sqrt((1 + repeated) / (1 - repeated)), least)


def _page(off: Float[np.ndarray, "answer"]) -> tuple[int, int] | None:
    """Return where a rise began and where it was found; None if there was none."""
    total, begin = 0.0, 0
    for place, value in enumerate(off):
        total += value - _ALLOWED
        if total <= 0:
            total, begin = 0.0, place + 1
        elif total > _LIMIT:
            return begin, place
    return None

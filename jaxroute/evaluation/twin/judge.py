"""From a recorded log to a verdict on other policies: fit, check, remedy, counterfactual, with an error of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.evaluation.statistics import Interval, student_t_975
from jaxroute.evaluation.twin.drift import Drift, find_drift, paces, ratios
from jaxroute.evaluation.twin.others import RATES, Stream, join
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.evaluation.twin.servers import Servers, draw_lengths, fit_servers
from jaxroute.evaluation.twin.simulate import Contender, Played, simulate
from jaxroute.serving import Site
from jaxroute.workloads.limits import latencies

NUM_DRAWS = 16
"""Of coefficients and lengths."""

AGREE = 0.9
"""Least share of the shadow's choices that the twin must share."""

_BLOCKS, _HOURLY = 12, 10 * 3600.0  # blocks of a log, unless it is longer than this, s: then hours
_BEYOND, _MOST_BEYOND = 1.25, 0.1  # load beyond what was fitted to, and the share of requests that may meet it
_UNFITTED = 0.05  # share of requests that may go to servers that were not fitted
_REMEDY_ROUNDS, _MUCH_MORE = 3, 0.7

BETTER, WORSE, EQUAL, REFUSED = "better", "worse", "no difference shown", "refused"


class Pair(NamedTuple):
    """A mean, measured and predicted."""

    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1 if self.measured else math.nan


class Compared(NamedTuple):
    """Some requests, measured against predicted; times in s."""

    name: str
    requests: int
    qos: Pair
    in_time: Pair
    """Share of the requests."""
    ttft: Pair
    tpot: Pair
    e2e: Pair


class Check(NamedTuple):
    """The twin's own error, on what it was not fitted to."""

    whole: Compared
    servers: tuple[Compared, ...]
    blocks: tuple[Compared, ...]
    """Hour by hour, or twelve parts of a shorter log."""

    @property
    def error(self) -> float:
        """Of the average QoS."""
        return abs(self.whole.qos.predicted - self.whole.qos.measured)


class Judged(NamedTuple):
    """What a policy would have earned on the same arrivals."""

    name: str
    qos: float
    gain: Interval
    """Average QoS minus that of what was done."""
    violations: Interval
    """Share of requests that are late, declined or rejected, likewise."""
    busy: Interval
    """Accelerator time per request, s, likewise."""
    shares: tuple[float, ...]
    """Of the requests, per server."""
    agreement: float | None
    """With its choices in the log, as a shadow or as the policy; None if the log has none."""
    status: str
    reasons: tuple[str, ...]
    """Why there is no verdict."""


class Twin(NamedTuple):
    """All that was found."""

    recorded: Recorded
    fitted: Bool[np.ndarray, "request"]
    servers: Servers
    plain: Check
    """Without remedies."""
    remedied: Check | None
    """With the pace of each block; None if nothing has changed."""
    drifts: tuple[Drift, ...]
    pace: Float[np.ndarray, "block server"]
    """How many times as long everything takes."""
    others: tuple[Stream, ...]
    """Requests that seem to have come past the gateway."""
    policies: tuple[Judged, ...]

    @property
    def check(self) -> Check:
        """The error that counts."""
        return self.remedied or self.plain


def judge(
    recorded: Recorded,
    contenders: Sequence[Contender],
    site: Site,
    log_length_error: Float[np.ndarray, "server"],
    *,
    share: float = 0.5,
    draws: int = NUM_DRAWS,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Twin:
    """Fit the servers to the first part of a log, check the fit on the rest, and judge policies on all of it.

    Args:
        recorded: the log.
        contenders: the policies.
        site: the servers as the gateway believes them.
        log_length_error: of the predicted lengths, per server, likewise.
        share: of the requests to fit to, the earliest.
        draws: of coefficients and lengths.
        seed: of all draws.
        say: is told what is being done.
    """
    number = len(recorded.arrival)
    fitted = np.arange(number) < round(share * number)
    say("fitting the servers")
    servers = fit_servers(recorded, fitted, site, log_length_error, draws=draws, seed=seed)
    lengths = draw_lengths(recorded, servers, draws, seed + 1)
    blocks = blocks_of(recorded)
    table = np.ones((blocks.max() + 1, len(recorded.servers)))

    streams: list[Stream] = []

    def play(contender: Contender | None, *, forced: bool = False) -> Played:
        joined = join(recorded, lengths, streams, seed + 2)
        return joined.own_part(
            simulate(
                joined.recorded,
                contender,
                servers.site,
                site,
                log_length_error=log_length_error,
                output_tokens=joined.lengths,
                pace=table[blocks[np.maximum(np.cumsum(joined.own) - 1, 0)]],
                forced=np.where(joined.forced < 0, joined.recorded.choice, joined.forced) if forced else joined.forced,
                seed=seed,
            )
        )

    # Asking a policy takes nothing more, and what is compiled for it serves twice.
    anybody = contenders[0] if contenders and not recorded.refusals else None
    say("checking the fit on the rest")
    done = play(anybody, forced=True)
    plain = check(recorded, done, blocks, ~fitted)
    drifts = find_drift(recorded, done, fitted)
    remedied = None
    if drifts:
        say("following what has changed")
        # Every other request tells the pace, and the others judge it.
        odd = np.arange(number) % 2 == 1
        plain = check(recorded, done, blocks, ~fitted & ~odd)
        for _ in range(_REMEDY_ROUNDS):
            table = table * paces(recorded, ratios(recorded, done), blocks, drifts, odd)
            done = play(anybody, forced=True)
        for drift in drifts:
            # Is it slower, or do others use it? Whatever explains its times better.
            since = float(recorded.arrival[drift.since])
            there = (recorded.choice == drift.server) & odd & (recorded.arrival >= since)
            own_rate = 2 * there.sum() / max(float(recorded.arrival[-1]) - since, 1.0)
            as_fast = table.copy()
            as_fast[:, drift.server] = 1.0
            explained = [(_off(recorded, done, there), table, streams, done)]
            before = streams
            for times in RATES if drift.pace > 1 else ():
                table, streams = as_fast, [*before, Stream(drift.server, since, times * own_rate)]
                tried = play(anybody, forced=True)
                # Others must explain much more: nobody has seen them.
                explained.append((_off(recorded, tried, there) / _MUCH_MORE, table, streams, tried))
            _, table, streams, done = min(explained, key=lambda one: one[0])
        remedied = check(recorded, done, blocks, ~fitted & ~odd)
    twin = Twin(recorded, fitted, servers, plain, remedied, tuple(drifts), table, tuple(streams), ())
    if recorded.refusals:
        return twin
    judged = []
    for contender in contenders:
        say(f"judging {contender.name}")
        one = _judged(twin, contender, play(contender), done, blocks)
        agreement = None
        if (chosen := _choices_in_log(recorded, contender)) is not None:
            preferred = play(contender, forced=True).preferred[0]
            known = chosen >= 0
            agreement = float((preferred == chosen)[known].mean()) if known.any() else None
        judged.append(_with_verdict(twin, one._replace(agreement=agreement)))
    return twin._replace(policies=tuple(sorted(judged, key=lambda one: one.gain.mean, reverse=True)))


def _off(recorded: Recorded, predicted: Played, there: Bool[np.ndarray, "request"]) -> float:
    """How far off the times of some requests are, in logarithms: their tokens one by one, first tokens in the mean.

    When others' requests come nobody knows, so that no single wait can be told, only how long they are.
    """
    known = there & np.isfinite(predicted.ttft[0]) & np.isfinite(recorded.ttft)
    if not known.any():
        return math.inf
    tokens = np.nanmedian(np.abs(ratios(recorded, predicted)[known]))
    first = recorded.ttft[known].mean() / np.nanmean(predicted.ttft[:, known])
    return float(tokens) + abs(math.log(first))


def blocks_of(recorded: Recorded) -> Int[np.ndarray, "request"]:
    """Return the block of time of each request: hours of a long log, or twelve parts."""
    span = float(recorded.arrival[-1]) + 1e-9
    number = math.ceil(span / 3600) if span > _HOURLY else _BLOCKS
    # Pauses are cut, so that no block is empty for long; numbered without gaps.
    return np.unique((recorded.arrival / span * number).astype(int), return_inverse=True)[1]


def check(
    recorded: Recorded, predicted: Played, blocks: Int[np.ndarray, "request"], chosen: Bool[np.ndarray, "request"]
) -> Check:
    """Compare what was measured to a replay of the same choices, of some requests."""
    servers = tuple(
        _compared(recorded, predicted, chosen & (recorded.choice == server), name)
        for server, name in enumerate(recorded.servers)
        if (chosen & (recorded.choice == server)).any()
    )
    parts = tuple(
        _compared(recorded, predicted, chosen & (blocks == block), _time_of(recorded, blocks == block))
        for block in np.unique(blocks[chosen])
    )
    return Check(_compared(recorded, predicted, chosen, "all"), servers, parts)


def _time_of(recorded: Recorded, block: Bool[np.ndarray, "request"]) -> str:
    seconds = float(recorded.wall[block].min())
    return f"{seconds / 3600:.1f} h" if recorded.wall[-1] > _HOURLY else f"{seconds:.0f} s"


def _compared(recorded: Recorded, predicted: Played, chosen: Bool[np.ndarray, "request"], name: str) -> Compared:
    measured = latencies(recorded.ttft, recorded.latency, recorded.output_tokens)
    expected = latencies(_mean(predicted.ttft), _mean(predicted.latency), recorded.output_tokens)

    def pair(one: Any, other: Any) -> Pair:
        both = chosen & np.isfinite(one) & np.isfinite(other)
        return Pair(float(one[both].mean()), float(other[both].mean())) if both.any() else Pair(math.nan, math.nan)

    long = np.where(recorded.output_tokens > 1, 1.0, np.nan)
    return Compared(
        name,
        int(chosen.sum()),
        pair(recorded.measured_qos, predicted.qos.mean(0)),
        pair(recorded.measured_in_time.astype(float), predicted.in_time.mean(0)),
        pair(measured.ttft, expected.ttft),
        pair(measured.tpot * long, expected.tpot * long),
        pair(measured.e2e, expected.e2e),
    )


def changes(
    recorded: Recorded,
    servers: Servers,
    fitted: Bool[np.ndarray, "request"],
    site: Site,
    log_length_error: Float[np.ndarray, "server"],
) -> list[Drift]:
    """Return which servers have changed since they were fitted; the other arguments are as for `judge`."""
    best = Site(*(column[:1] for column in servers.site))
    known = np.maximum(np.rint(recorded.predicted_tokens), 1).astype(int)
    rows = np.flatnonzero(recorded.answered)
    known[rows, recorded.choice[rows]] = recorded.output_tokens[rows]
    done = simulate(
        recorded, None, best, site, log_length_error=log_length_error, output_tokens=known[None],
        pace=np.ones(known.shape),
    )  # fmt: skip
    found = find_drift(recorded, done, fitted)
    return [drift for drift in found if recorded.servers[drift.server] not in servers.why_not]


def _mean(values: Float[np.ndarray, "draw request"]) -> Float[np.ndarray, "request"]:
    """Mean over the draws in which there was an answer; nan where there was none in any."""
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


# --- Policies -----------------------------------------------------------------------------------------------


def difference(
    one: Float[np.ndarray, "draw request"],
    other: Float[np.ndarray, "draw request"],
    blocks: Int[np.ndarray, "request"],
) -> Interval:
    """Return the mean difference per request, with a 95 % interval from blocks of time and from the draws.

    Blocks: the variance of a ratio of sums over blocks, which are taken to be independent. Draws: the variance of the
    mean between draws of coefficients and lengths. Each counts with Student's t for its number.
    """
    off = one - other
    number = off.shape[1]
    mean = float(off.mean())
    sums, counts = (np.bincount(blocks, weights) for weights in (off.mean(0), np.ones(number)))
    num_blocks, draws = len(counts), len(off)
    of_blocks = num_blocks / max(num_blocks - 1, 1) * float(np.square(sums - mean * counts).sum()) / number**2
    of_draws = float(off.mean(1).var(ddof=1)) if draws > 1 else 0.0
    half = math.hypot(
        student_t_975(max(num_blocks - 1, 1)) * math.sqrt(of_blocks),
        student_t_975(max(draws - 1, 1)) * math.sqrt(of_draws),
    )
    return Interval(mean, half)


def _judged(
    twin: Twin, contender: Contender, played: Played, done: Played, blocks: Int[np.ndarray, "request"]
) -> Judged:
    servers, recorded = twin.servers, twin.recorded
    late, late_done = (1.0 - one.in_time for one in (played, done))
    counts = [float((played.choice == server).mean()) for server in range(len(recorded.servers))]
    reasons = []
    for server, name in enumerate(recorded.servers):
        if name in servers.why_not and counts[server] > _UNFITTED:
            reasons.append(f"it sends {counts[server]:.0%} to {name}, which was not fitted ({servers.why_not[name]})")
            continue
        there = played.choice == server
        crowded = there & (played.in_flight + 1 > _BEYOND * servers.most_in_flight[server] + 1)
        longer = there & (recorded.prompt_tokens > 1.5 * servers.longest_prompt[server])
        for what, beyond in (("more requests at once", crowded), ("longer prompts", longer)):
            if (part := float(beyond.mean())) > _MOST_BEYOND:
                reasons.append(f"{part:.0%} of the requests would meet {what} at {name} than it was fitted to")
    return Judged(
        contender.name,
        float(played.qos.mean()),
        difference(played.qos, done.qos, blocks),
        difference(late, late_done, blocks),
        difference(played.busy_seconds.sum(2), done.busy_seconds.sum(2), blocks),
        tuple(counts),
        None,
        EQUAL,
        tuple(reasons),
    )


def _choices_in_log(recorded: Recorded, contender: Contender) -> Int[np.ndarray, "request"] | None:
    """What the log says that a policy chose, -1 where it says nothing; None if it never does."""
    if contender.draws:
        return None
    if contender.name in recorded.shadow:
        return recorded.shadow[contender.name]
    if contender.name == recorded.policy:
        return np.where(recorded.answered, recorded.choice, -1)
    return None


def _with_verdict(twin: Twin, judged: Judged) -> Judged:
    reasons = list(judged.reasons)
    if judged.agreement is not None and judged.agreement < AGREE:
        reasons.append(
            f"in the log's places the twin's {judged.name} chooses as the log says in {judged.agreement:.0%} only"
        )
    gain, half = judged.gain
    if abs(gain) > half and abs(gain) < twin.check.error:
        reasons.append(f"its difference of {gain:+.3f} is less than the twin's own error, {twin.check.error:.3f}")
    status = BETTER if gain > half else WORSE if gain < -half else EQUAL
    return judged._replace(status=REFUSED if reasons else status, reasons=tuple(reasons))

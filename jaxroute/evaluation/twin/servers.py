"""The servers of a recorded log: each one's coefficients, fitted to the first part, with draws of what they may be.

Draws are Laplace's: normal in the logarithms of the coefficients, with the covariance of the least squares, widened by
how much a request's error repeats that of the one before it. A bootstrap over blocks of time would have to search again
for every draw, and a server's blocks are not independent anyway: a queue passes from one to the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.errors import UserError
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.fitting import Calibration, Limits, ServingLog, calibrate
from jaxroute.serving import Site

FEWEST = 20
"""Answers of a server from which on it is fitted."""

_UNFITTED = 0.25  # spread of the logarithms of times that were not fitted
_TIMES = ("weight_load", "compute_per_token", "decode_per_seq", "attention_per_token")
_DRAWN = (*_TIMES, "network_delay")
_FEWEST_LENGTHS = 20
# Answers of about the same predicted length: a sixth of a server's, and as many at least.
_NEAR, _FEWEST_NEAR = 6, 8


class Servers(NamedTuple):
    """What is known of a fleet's servers, N of them, in D draws; the first draw is the best fit."""

    site: Site
    """(D, N) each."""
    fits: tuple[Calibration | None, ...]
    """Of each server; None where it had too few answers, and the fleet file's coefficients stand."""
    why_not: dict[str, str]
    """Of each server that was not fitted."""
    most_in_flight: Int[np.ndarray, "server"]
    """Requests at once in what was fitted to."""
    longest_prompt: Int[np.ndarray, "server"]
    length_error: Float[np.ndarray, "server"]
    """Standard deviation of log(tokens / predicted tokens), of servers with hardly any answers."""


def fit_servers(
    recorded: Recorded,
    fitted: Bool[np.ndarray, "request"],
    site: Site,
    log_length_error: Float[np.ndarray, "server"],
    *,
    draws: int,
    seed: int,
) -> Servers:
    """Fit every server to the requests that it answered.

    Args:
        recorded: the log.
        fitted: its first part.
        site: the fleet file's coefficients, (N,) each: limits are taken from it, and what is not fitted.
        log_length_error: the fleet's, of servers with few answers.
        draws: D.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        name: np.repeat(np.asarray(column)[None], draws, axis=0) for name, column in site._asdict().items()
    }
    columns = {name: column.astype(float) if name in _DRAWN else column for name, column in columns.items()}
    fits: list[Calibration | None] = []
    why_not = {}
    most, longest = [], []
    for server, name in enumerate(recorded.servers):
        of = (recorded.choice == server) & np.isfinite(recorded.ttft)
        part = of & fitted
        fit = None
        # What `calibrate` judges on does not matter here, but it wants some.
        share = min(part.sum(), of.sum() - FEWEST // 2) / max(of.sum(), 1)
        if part.sum() < FEWEST or share * of.sum() < FEWEST // 2:
            why_not[name] = f"{part.sum()} of its streams are in the first part; {FEWEST} are needed"
        else:
            try:
                fit = calibrate(_log_of(recorded, of), _limits_of(site, server), float(share))
            except UserError as problem:
                why_not[name] = str(problem)
        fits.append(fit)
        if fit is not None:
            for key, values in fit.draws(draws, rng).items():
                if key in _DRAWN:
                    columns[key][1:, server] = values[1:]
                    columns[key][0, server] = fit.coefficients[key]
        else:
            for key in _TIMES:
                columns[key][1:, server] *= np.exp(rng.normal(0, _UNFITTED, draws - 1))
        most.append(recorded.most_at_once(part))
        longest.append(int(recorded.prompt_tokens[part].max(initial=0)))
    return Servers(
        Site(**columns), tuple(fits), why_not, np.array(most), np.array(longest), np.asarray(log_length_error)
    )


def draw_lengths(recorded: Recorded, servers: Servers, draws: int, seed: int) -> Int[np.ndarray, "draw request server"]:
    """Draw the length of every server's answer to every request; who answered is known to have answered so.

    What was predicted is as far off as for one of the server's answers in the log of about the same predicted length:
    long answers are less certain than short ones, and their tails are not normal. Each draw has its own sample of the
    log's answers (a bootstrap), so that few answers leave much open. A server with hardly any is as far off as its
    predictions claim.
    """
    rng = np.random.default_rng(seed)
    lengths = np.empty((draws, *recorded.predicted_tokens.shape))
    for server, predicted in enumerate(recorded.predicted_tokens.T):
        answers = np.flatnonzero(recorded.choice == server)
        if len(answers) < _FEWEST_LENGTHS:
            off = servers.length_error[server] * rng.standard_normal((draws, len(predicted)))
            lengths[:, :, server] = predicted * np.exp(np.minimum(off, 10.0))
            continue
        near = max(_FEWEST_NEAR, len(answers) // _NEAR)
        for draw in range(draws):
            sample = rng.choice(answers, len(answers))
            sample = sample[np.argsort(predicted[sample], kind="stable")]
            # A window of neighbours, which is whole at both ends too.
            middle = np.clip(np.searchsorted(predicted[sample], predicted), near // 2, len(sample) - near // 2 - 1)
            place = middle + rng.integers(-(near // 2), near // 2 + 1, len(predicted))
            like = sample[np.clip(place, 0, len(sample) - 1)]
            lengths[draw, :, server] = predicted * recorded.output_tokens[like] / predicted[like]
        # Nobody has seen it answer at greater length; it may be bound to stop.
        lengths[:, :, server] = np.minimum(lengths[:, :, server], recorded.output_tokens[answers].max())
    room = np.asarray(servers.site.kv_capacity)[0] - recorded.prompt_tokens[:, None]
    whole = np.clip(np.rint(lengths), 1, np.maximum(room, 1)).astype(int)
    rows = np.flatnonzero(recorded.answered)
    whole[:, rows, recorded.choice[rows]] = recorded.output_tokens[rows]
    return whole


def _log_of(recorded: Recorded, of: Bool[np.ndarray, "request"]) -> ServingLog:
    arrival = recorded.arrival[of]
    return ServingLog(
        arrival - arrival[0],
        arrival - arrival[0] + recorded.ttft[of],
        arrival - arrival[0] + recorded.latency[of],
        recorded.prompt_tokens[of].astype(np.int64),
        recorded.output_tokens[of].astype(np.int64),
    )


def _limits_of(site: Site, server: int) -> Limits:
    return Limits(
        max_num_seqs=int(site.max_num_seqs[server]),
        max_num_batched_tokens=int(site.max_num_batched_tokens[server]),
        iteration_overhead=float(site.iteration_overhead[server]),
        kv_capacity=int(site.kv_capacity[server]),
        network_delay=None,
    )

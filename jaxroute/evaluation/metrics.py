"""From what happened to every request to the metrics that are reported.

The formulas are those of the problem statement (see the documentation): a
request is worth the quality of its answer if the answer came in time, and
nothing if it came late, was rejected or was lost. Nobody can gain by dropping
requests, because rejected ones stay in every denominator.

All arrays here are NumPy on the host, and all arithmetic is float64.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from jaxroute.errors import UserError
from jaxroute.workloads.limits import Limits, latencies


class Outcome(IntEnum):
    """What has become of a request at the end of an episode; the first two are those of `jaxroute.replay`."""

    COMPLETED = 0
    REJECTED = 1
    IN_FLIGHT = 2
    """Still waiting or running; it is not counted."""
    LOST = 3
    """Its expert failed."""
    DECLINED = 4
    """The router sent it away, and there was no cloud for it."""
    OVERFLOWED = 5
    """Its expert would have queued it, and the simulation had no slot left for it."""


_PERCENTILES = (50, 95, 99)

LOADS = (0, 25, 50, 75, 100)
"""Where the bins of an expert's load start, its requests in flight in % of max_num_seqs; the last one is open."""


class EpisodeRecords(NamedTuple):
    """What happened to every request of independent episodes of one policy at one load, as NumPy arrays.

    The last five fields cover the time in which requests are counted: from the arrival of the first counted request to
    that of the first one that no longer counts. Arrival is at the router and "back" is back at the router, so the
    network counts both ways.
    """

    status: Int8[np.ndarray, "episode request"]
    """An `Outcome`."""
    expert: Int[np.ndarray, "episode request"]
    """The expert that it was routed to, the last time; one more than the last expert if it was sent away."""
    quality: Float[np.ndarray, "episode request"]
    """Of the answer there, in [0, 1]."""
    limits: Limits
    """Each `(episode, request)`, or None where no request has it; inf where this one has none."""
    output_tokens: Int[np.ndarray, "episode request"]
    """Length of the answer there; 0 if it was declined."""
    ttft: Float[np.ndarray, "episode request"]
    """s from arrival until the first token is back; nan unless completed."""
    latency: Float[np.ndarray, "episode request"]
    """s from arrival until the last token is back (E2E); nan unless completed."""
    preemptions: Int[np.ndarray, "episode request"]
    """How often it lost its KV cache."""
    spent: Float[np.ndarray, "episode request"]
    """What the cloud's answer has cost, in QoS; 0 for all others."""
    busy_seconds: Float[np.ndarray, "episode expert"]
    """Accelerator-seconds spent in iterations."""
    kv_token_seconds: Float[np.ndarray, "episode expert"]
    """KV tokens held, integrated over time."""
    duration: Float[np.ndarray, "episode"]
    """Simulated seconds."""
    load_counts: Float[np.ndarray, "episode expert load"]
    """Decisions at which the expert was up, by its load as the router saw it."""
    choice_counts: Float[np.ndarray, "episode expert load"]
    """Those of them that chose the expert."""


class Metric(NamedTuple):
    """What one reported number means."""

    label: str
    unit: str
    definition: str


def _latency_metrics(key: str, label: str, unit: str, definition: str) -> dict[str, Metric]:
    """Describe the mean and the percentiles of one latency."""
    metrics = {f"{key}_mean": Metric(f"{label}, mean", unit, definition)}
    for percentile in _PERCENTILES:
        metrics[f"{key}_p{percentile}"] = Metric(f"{label}, p{percentile}", unit, definition)
    return metrics


METRICS: dict[str, Metric] = {
    "avg_qos": Metric(
        "Average QoS",
        "0 to 1",
        "Sum of the quality of the answers that were in time, divided by all ended requests "
        "(completed, rejected, declined, lost and overflowed). All but the completed ones in time are worth 0.",
    ),
    "qos_per_second": Metric(
        "QoS per second", "QoS/s", "Sum of the QoS of all requests divided by the simulated seconds."
    ),
    "spent_per_request": Metric(
        "Spent in the cloud", "QoS per request", "Sum of the prices of the cloud's answers / ended requests."
    ),
    "in_time_rate": Metric(
        "In time",
        "share of ended",
        "Completed requests that keep all their limits / ended requests.",
    ),
    "violation_rate": Metric(
        "Late (violation rate)",
        "share of ended",
        "Completed requests that exceed one of their limits / ended requests.",
    ),
    **{
        f"{name}_violation_rate": Metric(
            f"Late by {label}",
            "share of ended",
            f"Completed requests that exceed their limit on {label} / ended requests.",
        )
        for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E"), ("normalised", "normalised latency"))
    },
    "rejection_rate": Metric(
        "Rejected (rejection rate)",
        "share of ended",
        "Requests turned away because the expert's queue was full or its KV cache too small / ended requests.",
    ),
    "declined_rate": Metric(
        "Declined (declined rate)",
        "share of ended",
        "Requests that the router turned away at once, to keep the seats for others / ended requests.",
    ),
    "cloud_rate": Metric("To the cloud", "share of ended", "Requests that the cloud answered / ended requests."),
    "lost_rate": Metric(
        "Lost (lost rate)", "share of ended", "Requests lost because their expert failed / ended requests."
    ),
    "overflow_rate": Metric(
        "Overflowed (overflow rate)",
        "share of ended",
        "Requests that an expert would have queued, and for which the simulation had no slot (env.num_slots) / ended "
        "requests.",
    ),
    "mean_quality": Metric(
        "Mean quality", "0 to 1", "Mean quality of the answers of completed requests, late ones included."
    ),
    "qos_per_busy_second": Metric(
        "QoS per accelerator-second",
        "QoS/s",
        "Sum of QoS divided by the seconds in which accelerators were computing, over all experts.",
    ),
    "qos_per_million_kv_token_seconds": Metric(
        "QoS per million KV token-seconds",
        "QoS per 1e6 token s",
        "Sum of QoS divided by the KV cache occupied (tokens held x seconds held, in millions).",
    ),
    **_latency_metrics(
        "ttft",
        "Time to first token (TTFT)",
        "s",
        "From the arrival at the router to the first output token back there; completed requests.",
    ),
    **_latency_metrics(
        "tpot",
        "Time per output token (TPOT)",
        "s",
        "(E2E latency - TTFT) / (output tokens - 1); completed requests with two or more output tokens.",
    ),
    **_latency_metrics(
        "normalised_latency",
        "Normalised latency",
        "s per token",
        "E2E latency / output tokens; completed requests. The classes of service of the package limit it.",
    ),
    **_latency_metrics(
        "e2e",
        "End-to-end latency (E2E)",
        "s",
        "From the arrival at the router to the last output token back there, network both ways; completed requests.",
    ),
    "goodput": Metric("Goodput", "requests/s", "Requests completed within all their limits per simulated second."),
    "tokens_per_second": Metric("Throughput", "tokens/s", "Output tokens of completed requests per simulated second."),
    "preemptions_per_request": Metric(
        "Preemptions", "per request", "Evictions from the KV cache, to be recomputed later / ended requests."
    ),
    "expert_share": Metric("Share of an expert", "share of ended", "Ended requests that were routed to it."),
    "expert_utilisation": Metric(
        "Utilisation of an expert", "share of time", "Its busy accelerator-seconds / simulated seconds."
    ),
    "expert_load": Metric(
        "Load of an expert",
        "per arrival",
        "Decisions at which it was up and the router saw less than 25, 50, 75, 100 % of its max_num_seqs in flight, "
        "or 100 % and more / arrivals.",
    ),
    "expert_choice": Metric(
        "Choice of an expert", "per arrival", "Decisions at each of these loads that sent the request to it / arrivals."
    ),
}
"""Every metric of `summarise`, in the order of the reports; late by a limit only where requests have that limit."""


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; where nothing was measured (denominator 0) the answer is nan."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _distribution(
    values: Float[np.ndarray, "episode request"], counted: Bool[np.ndarray, "episode request"]
) -> dict[str, Float[np.ndarray, "episode"]]:
    """Mean and percentiles (linear interpolation) per episode of the counted values; nan if there are none."""
    summary = np.full((len(values), 1 + len(_PERCENTILES)), np.nan)
    for episode, (row, mask) in enumerate(zip(values, counted, strict=True)):
        if mask.any():
            summary[episode] = [row[mask].mean(), *np.percentile(row[mask], _PERCENTILES)]
    names = ["mean", *(f"p{percentile}" for percentile in _PERCENTILES)]
    return dict(zip(names, summary.T, strict=True))


def summarise(records: EpisodeRecords, warmup: int = 0) -> dict[str, np.ndarray]:
    """Compute every metric of every episode; `METRICS` defines them.

    Args:
        records: what happened, for all episodes.
        warmup: the first `warmup` requests of each episode aren't counted, because they met an empty site.

    Returns:
        Metric name to values of shape (episode,), or (episode, expert) for `expert_share` and
        `expert_utilisation`, or (episode, expert, load) for `expert_load` and `expert_choice`. A value is
        nan where there was nothing to measure: no request ended, none was completed (quality,
        latencies), no time was spent.

    Raises:
        UserError: the warm-up leaves no request.
    """
    total = records.status.shape[1]
    if not 0 <= warmup < total:
        raise UserError(f"warmup={warmup} leaves nothing of {total} requests: use 0 to {total - 1}")

    status = records.status[:, warmup:]
    quality = records.quality[:, warmup:].astype(np.float64)
    tokens = records.output_tokens[:, warmup:].astype(np.float64)
    ttft = records.ttft[:, warmup:].astype(np.float64)
    latency = records.latency[:, warmup:].astype(np.float64)

    completed = status == Outcome.COMPLETED
    ended = status != Outcome.IN_FLIGHT
    measured = latencies(ttft, latency, tokens)  # only completed ones count, and they have a token
    limits = Limits(*(limit if limit is None else limit[:, warmup:].astype(np.float64) for limit in records.limits))
    in_time = completed & limits.met(measured)
    number_ended = ended.sum(axis=1)
    num_experts = records.busy_seconds.shape[1]

    def per_ended(counted: np.ndarray) -> Float[np.ndarray, "episode"]:
        return _divide(counted.sum(axis=1), number_ended)

    sum_of_qos = np.where(in_time, quality, 0.0).sum(axis=1)
    sum_of_quality = np.where(completed, quality, 0.0).sum(axis=1)
    million_kv_token_seconds = records.kv_token_seconds.sum(axis=1, dtype=np.float64) / 1e6
    summary = {
        "avg_qos": _divide(sum_of_qos, number_ended),
        "qos_per_second": _divide(sum_of_qos, records.duration),
        "spent_per_request": per_ended(np.where(ended, records.spent[:, warmup:].astype(np.float64), 0.0)),
        "in_time_rate": per_ended(in_time),
        "violation_rate": per_ended(completed & ~in_time),
        **{
            f"{name}_violation_rate": per_ended(completed & ~(value <= limit))
            for name, value, limit in zip(Limits._fields, measured, limits, strict=True)
            if limit is not None
        },
        "rejection_rate": per_ended(status == Outcome.REJECTED),
        "declined_rate": per_ended(status == Outcome.DECLINED),
        "cloud_rate": per_ended(completed & (records.expert[:, warmup:] == num_experts)),
        "lost_rate": per_ended(status == Outcome.LOST),
        "overflow_rate": per_ended(status == Outcome.OVERFLOWED),
        "mean_quality": _divide(sum_of_quality, completed.sum(axis=1)),
        "qos_per_busy_second": _divide(sum_of_qos, records.busy_seconds.sum(axis=1, dtype=np.float64)),
        "qos_per_million_kv_token_seconds": _divide(sum_of_qos, million_kv_token_seconds),
    }

    for key, values, counted in (
        ("ttft", ttft, completed),
        ("tpot", measured.tpot, completed & (tokens > 1)),
        ("normalised_latency", measured.normalised, completed),
        ("e2e", latency, completed),
    ):
        summary |= {f"{key}_{name}": value for name, value in _distribution(values, counted).items()}

    experts = np.arange(num_experts)
    routed = (records.expert[:, warmup:, None] == experts) & ended[:, :, None]
    duration = records.duration
    summary |= {
        "goodput": _divide(in_time.sum(axis=1), duration),
        "tokens_per_second": _divide(np.where(completed, tokens, 0.0).sum(axis=1), duration),
        "preemptions_per_request": per_ended(np.where(ended, records.preemptions[:, warmup:], 0)),
        "expert_share": _divide(routed.sum(axis=1), number_ended[:, None]),
        "expert_utilisation": _divide(records.busy_seconds, duration[:, None]),
        "expert_load": _divide(records.load_counts, total - warmup),
        "expert_choice": _divide(records.choice_counts, total - warmup),
    }
    return summary

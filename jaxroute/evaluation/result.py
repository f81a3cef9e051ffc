"""What an evaluation has found: policies compared on the same requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxroute.evaluation.statistics import Interval, mean_ci95, paired_difference

Summary = Mapping[str, np.ndarray]
"""The metrics of one policy at one load, as `summarise` returns them: leading axis episode, perhaps expert and load."""


def means(intervals: Any) -> Any:
    """Reduce lists of intervals, nested or not, to their means."""
    return [means(inner) for inner in intervals] if isinstance(intervals, list) else intervals.mean


@dataclass(frozen=True)
class EvaluationResult:
    """Policies compared on the same requests, at one or more loads."""

    workload: str  # name of the workload
    site: str  # name of the site
    bank: str  # name of the request bank
    rates: Sequence[float]  # requests/s, one per load
    nominal_rate: float  # requests/s, the load that is shown first; one of `rates`
    episodes: int  # independent episodes per policy and load
    requests: int  # requests per episode
    warmup: int  # of them not counted at the start
    reference: str | None  # the policy that others are compared with (the learned router), if any
    expert_names: Sequence[str]  # (expert,)
    summaries: Mapping[float, Mapping[str, Summary]]  # rate -> policy -> metric -> values per episode
    upper_references: Sequence[str] = ()  # policies that see what no router can: shown, never called the best
    provenance: Mapping[str, Any] = field(default_factory=dict)  # command, versions, seed

    def __post_init__(self) -> None:
        if self.nominal_rate not in self.rates:
            raise ValueError(f"nominal_rate {self.nominal_rate} is not one of rates {list(self.rates)}")
        for rate in self.rates:
            if rate not in self.summaries:
                raise ValueError(f"summaries lack the rate {rate}")
            if self.reference is not None and self.reference not in self.summaries[rate]:
                raise ValueError(f"summaries at rate {rate} lack the reference policy {self.reference!r}")

    @cached_property
    def intervals(self) -> dict[float, dict[str, dict[str, Any]]]:
        """Rate -> policy -> metric -> Interval, or a list (per expert) of Intervals or of lists of them (per load)."""

        def interval(values: np.ndarray) -> Any:
            if values.ndim == 1:
                return mean_ci95(values)
            return [interval(column) for column in np.moveaxis(values, 1, 0)]

        return {
            rate: {
                policy: {metric: interval(np.asarray(values)) for metric, values in summary.items()}
                for policy, summary in self.summaries[rate].items()
            }
            for rate in self.rates
        }

    def interval(self, rate: float, policy: str, metric: str) -> Interval:
        """Mean and confidence interval of one scalar metric."""
        return self.intervals[rate][policy][metric]

    def expert_means(self, rate: float, policy: str, metric: str) -> Float[np.ndarray, "expert ..."]:
        """Means over episodes of a metric with values per expert: (expert,) or (expert, load)."""
        return np.array(means(self.intervals[rate][policy][metric]))

    def ranking(self, rate: float) -> list[str]:
        """Policies from the best to the worst average QoS at one load."""

        def qos(policy: str) -> float:
            mean = self.interval(rate, policy, "avg_qos").mean
            return -math.inf if math.isnan(mean) else mean

        return sorted(self.summaries[rate], key=qos, reverse=True)

    def paired(self, rate: float, policy: str, other: str, metric: str = "avg_qos") -> Interval:
        """Average QoS (or another metric) of `policy` minus that of `other`, episode by episode."""
        summaries = self.summaries[rate]
        return paired_difference(summaries[policy][metric], summaries[other][metric])

    def paired_with_reference(self, rate: float) -> dict[str, Interval]:
        """Average QoS of the reference minus that of every other policy; empty without a reference."""
        if self.reference is None:
            return {}
        others = [policy for policy in self.summaries[rate] if policy != self.reference]
        return {policy: self.paired(rate, self.reference, policy) for policy in others}

    def best_rival(self, rate: float) -> str | None:
        """Return the best policy that could be deployed and isn't the reference, if there is any."""
        excluded = {self.reference, *self.upper_references}
        return next((policy for policy in self.ranking(rate) if policy not in excluded), None)

"""What follows from a study: every router against the best rule of each setting, and everybody's rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxroute.evaluation.result import EvaluationResult
from jaxroute.evaluation.statistics import Interval, interquartile_mean, ranks
from jaxroute.evaluation.study.planners import CLAIRVOYANT, LOOKAHEAD
from jaxroute.evaluation.study.result import StudyResult

EFFICIENCY = "qos_per_busy_second"


class Verdict(NamedTuple):
    """One router against the best rule, in one setting at one load."""

    setting: str
    rate: float  # requests/s
    router: str
    avg_qos: Interval  # mean over training seeds
    best_rule: str  # the one with the highest average QoS here
    rule_avg_qos: Interval
    difference: Interval  # router - best rule, paired by episode
    training_seeds: list[float]  # average QoS of each
    iqm: float  # interquartile mean of these
    efficiency: Interval  # QoS per accelerator-second
    rule_efficiency: Interval
    efficiency_difference: Interval  # paired by episode
    share_of_lookahead: float  # of lookahead's gain over that rule; nan if lookahead has none
    share_of_clairvoyant: float


def verdicts(study: StudyResult) -> list[Verdict]:
    """Judge every router in every setting at every load."""
    found = []
    for setting in study.settings:
        result = setting.result
        for rate in result.rates:
            rule = best_rule_of(study, result, rate)
            for router in study.routers:
                per_seed = setting.training[rate][router].mean(axis=1)
                found.append(
                    Verdict(
                        setting=setting.setting,
                        rate=rate,
                        router=router,
                        avg_qos=result.interval(rate, router, "avg_qos"),
                        best_rule=rule,
                        rule_avg_qos=result.interval(rate, rule, "avg_qos"),
                        difference=result.paired(rate, router, rule),
                        training_seeds=per_seed.tolist(),
                        iqm=interquartile_mean(per_seed),
                        efficiency=result.interval(rate, router, EFFICIENCY),
                        rule_efficiency=result.interval(rate, rule, EFFICIENCY),
                        efficiency_difference=result.paired(rate, router, rule, EFFICIENCY),
                        share_of_lookahead=share_of_gain(setting.planned, rate, router, rule, LOOKAHEAD),
                        share_of_clairvoyant=share_of_gain(setting.planned, rate, router, rule, CLAIRVOYANT),
                    )
                )
    return found


def best_rule_of(study: StudyResult, result: EvaluationResult, rate: float) -> str:
    """Return the rule with the highest average QoS at one load."""
    return next(policy for policy in result.ranking(rate) if policy in study.rules)


def share_of_gain(planned: EvaluationResult | None, rate: float, router: str, rule: str, planner: str) -> float:
    """Part of the planner's gain over the rule that the router reaches, on their common episodes."""
    if planned is None or planner not in planned.summaries[rate]:
        return math.nan
    gain = planned.paired(rate, planner, rule)
    if not gain.mean > gain.ci95:  # a share of what may be nothing means nothing
        return math.nan
    return planned.paired(rate, router, rule).mean / gain.mean


class Standing(NamedTuple):
    """One policy over all settings and loads."""

    policy: str
    mean_rank: float  # 1 is best
    best_rank: float
    worst_rank: float
    avg_qos: float  # mean over settings and loads


def standings(study: StudyResult) -> list[Standing]:
    """Rank rules and routers by average QoS in every setting at every load; the best mean rank first."""
    policies = [*study.routers, *study.rules]
    qos = np.array(
        [
            [setting.result.interval(rate, policy, "avg_qos").mean for policy in policies]
            for setting in study.settings
            for rate in setting.result.rates
        ]
    )
    places = np.array([ranks(row) for row in qos])
    columns = (places.mean(axis=0), places.min(axis=0), places.max(axis=0), qos.mean(axis=0))
    found = [Standing(policy, *map(float, row)) for policy, *row in zip(policies, *columns, strict=True)]
    return sorted(found, key=lambda standing: standing.mean_rank)

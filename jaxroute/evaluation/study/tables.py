"""A study's tables, for the terminal, Markdown and HTML, and what came out in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from jaxroute.evaluation.report.tables import counted, fixed, plus_minus, verdict_of
from jaxroute.evaluation.study.result import StudyResult
from jaxroute.evaluation.study.verdicts import best_rule_of, share_of_gain, standings, verdicts


class StudyTable(NamedTuple):
    """A table of the report, ready for the terminal, Markdown and HTML."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    coloured: int = -1  # column that is green where the router is better, red where it is worse
    verdicts: Sequence[str] = ()  # one per row


def tables(study: StudyResult) -> list[StudyTable]:
    """Return the tables over all settings, the verdicts first."""
    found = [verdict_table(study)] if study.routers else []
    if len(study.routers) > 1:
        found.append(_routers_table(study))
    found.append(_rank_table(study))
    if study.planners:
        found.append(_planner_table(study))
    if study.routers:
        found.append(_efficiency_table(study))
    return found


def verdict_table(study: StudyResult) -> StudyTable:
    """Each router against the best rule of each setting."""
    found = verdicts(study)
    rows = []
    for v in found:
        low, high = min(v.training_seeds), max(v.training_seeds)
        rows.append(
            [
                v.setting,
                f"{v.rate:.3g}",
                v.router,
                plus_minus(v.avg_qos, 3),
                v.best_rule,
                fixed(v.rule_avg_qos.mean, 3),
                plus_minus(v.difference, 4, "+"),
                f"{fixed(v.iqm, 3)} [{fixed(low, 3)}, {fixed(high, 3)}]",
                _percent(v.share_of_lookahead),
            ]
        )
    return StudyTable(
        "Routers against the best rule",
        "± is the half-width of the 95 % interval over episodes; a router's episodes are means over its training "
        "seeds. Difference: router - best rule, paired by episode. IQM: interquartile mean over training seeds "
        "[least, greatest]. Of lookahead: share of its gain over the rule, where it has one.",
        ["setting", "req/s", "router", "avg QoS", "best rule", "its QoS", "difference", "IQM", "of lookahead"],
        rows,
        coloured=6,
        verdicts=[verdict_of(v.difference) for v in found],
    )


def _routers_table(study: StudyResult) -> StudyTable:
    reference, *others = study.routers
    rows, found = [], []
    for setting in study.settings:
        for rate in setting.result.rates:
            for router in others:
                difference = setting.result.paired(rate, reference, router)
                qos = setting.result.interval(rate, router, "avg_qos")
                texts = [plus_minus(qos, 3), plus_minus(difference, 4, "+")]
                rows.append([setting.setting, f"{rate:.3g}", router, *texts])
                found.append(verdict_of(difference))
    return StudyTable(
        f"{reference} against the other routers",
        f"Difference: {reference} - the other, both means over training seeds, paired by episode.",
        ["setting", "req/s", "router", "avg QoS", "difference"],
        rows,
        coloured=4,
        verdicts=found,
    )


def _rank_table(study: StudyResult) -> StudyTable:
    return StudyTable(
        "Ranks",
        "By average QoS in every setting at every load; 1 is best.",
        ["policy", "mean rank", "best", "worst", "mean avg QoS"],
        [
            [s.policy, f"{s.mean_rank:.2f}", f"{s.best_rank:g}", f"{s.worst_rank:g}", fixed(s.avg_qos, 3)]
            for s in standings(study)
        ],
    )


def _planner_table(study: StudyResult) -> StudyTable:
    reference = study.routers[:1]
    rows = []
    for setting in study.settings:
        assert setting.planned is not None
        for rate in setting.planned.rates:
            rule = best_rule_of(study, setting.result, rate)
            columns = [rule, *study.routers, *study.planners]
            texts = [plus_minus(setting.planned.interval(rate, policy, "avg_qos"), 3) for policy in columns]
            shares = [
                _percent(share_of_gain(setting.planned, rate, router, rule, planner))
                for router in reference
                for planner in study.planners
            ]
            rows.append([setting.setting, f"{rate:.3g}", rule, *texts, *shares])
    run = next(setting.planned for setting in study.settings if setting.planned)
    return StudyTable(
        "Planners",
        f"Average QoS on {run.episodes} episodes of {run.requests:,} requests of their own, which planners, routers "
        "and the best rule have in common. Last columns: share of the planner's gain over the best rule that the "
        "router reaches, where the gain's 95 % interval excludes 0. clairvoyant sees the future: nobody can deploy it.",
        ["setting", "req/s", "best rule", "its QoS", *study.routers, *study.planners]
        + [f"{router} of {planner}" for router in reference for planner in study.planners],
        rows,
    )


def _efficiency_table(study: StudyResult) -> StudyTable:
    found = verdicts(study)
    rows = []
    for v in found:
        efficiencies = [plus_minus(v.efficiency, 3), v.best_rule, plus_minus(v.rule_efficiency, 3)]
        relative = 100 * v.efficiency_difference.mean / v.rule_efficiency.mean
        difference = plus_minus(v.efficiency_difference, 4, "+")
        rows.append([v.setting, f"{v.rate:.3g}", v.router, *efficiencies, difference, f"{relative:+.1f} %"])
    return StudyTable(
        "Resource efficiency",
        "QoS per accelerator-second, beside the rule with the best average QoS; the difference is paired by episode.",
        ["setting", "req/s", "router", "QoS/acc.-s", "best rule", "its QoS/acc.-s", "difference", "relative"],
        rows,
        coloured=6,
        verdicts=[verdict_of(v.efficiency_difference) for v in found],
    )


def _percent(share: float) -> str:
    return fixed(100 * share, 0) + ("" if math.isnan(share) else " %")


def terminal_table(table: StudyTable) -> Table:
    """Return a table for the terminal."""
    shown = Table(title=table.title, box=box.SIMPLE_HEAD, show_edge=False, padding=0, title_style="bold")
    for position, name in enumerate(table.header):
        shown.add_column(name, justify="left" if position == 0 else "right", no_wrap=name != "best rule")
    colours = {"better": "green", "worse": "red", "": ""}
    for row, verdict in zip(table.rows, table.verdicts or [""] * len(table.rows), strict=True):
        cells = list(row)
        if colours[verdict]:
            cells[table.coloured] = f"[{colours[verdict]}]{cells[table.coloured]}[/]"
        shown.add_row(*cells)
    return shown


def study_text(study: StudyResult) -> str:
    """Say in words what came out."""
    first = standings(study)[0]
    settings = sum(len(setting.result.rates) for setting in study.settings)
    sentences = []
    for router in study.routers:
        found = [verdict_of(v.difference) for v in verdicts(study) if v.router == router]
        sentences.append(f"Against the best rule of each of {settings} settings, {router} is {counted(found, 'in')}.")
    sentences.append(f"The best mean rank is that of {first.policy}, {first.mean_rank:.2f}.")
    return " ".join(sentences)

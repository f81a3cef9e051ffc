"""An evaluation in the terminal, in Markdown and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from jaxroute.evaluation.result import EvaluationResult
from jaxroute.evaluation.statistics import Interval


def fixed(value: float, digits: int) -> str:
    """Write a number with so many decimals; what is undefined is a dash."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"  # noqa: RUF001 (a dash, as in print)


def plus_minus(interval: Interval, digits: int, sign: str = "") -> str:
    """Write a mean with its half-width, if one is known."""
    if math.isnan(interval.mean):
        return fixed(interval.mean, digits)
    mean = f"{interval.mean:{sign}.{digits}f}"
    return mean if math.isnan(interval.ci95) else f"{mean} ± {interval.ci95:.{digits}f}"


class _Column(NamedTuple):
    title: str
    unit: str
    metric: str
    text: Callable[[Interval], str]


def _scaled(digits: int, factor: float = 1.0) -> Callable[[Interval], str]:
    return lambda interval: fixed(interval.mean * factor, digits)


_COLUMNS = (
    _Column("avg QoS", "", "avg_qos", lambda interval: plus_minus(interval, 3)),
    _Column("late", "%", "violation_rate", _scaled(1, 100)),
    _Column("rej.", "%", "rejection_rate", _scaled(1, 100)),
    _Column("decl.", "%", "declined_rate", _scaled(1, 100)),
    _Column("quality", "", "mean_quality", _scaled(3)),
    _Column("TTFT p95", "s", "ttft_p95", _scaled(2)),
    _Column("norm. p95", "ms/tok", "normalised_latency_p95", _scaled(1, 1000)),
    _Column("QoS", "per acc.-s", "qos_per_busy_second", _scaled(3)),
)
_CLOUD_COLUMNS = (
    _Column("cloud", "%", "cloud_rate", _scaled(1, 100)),
    _Column("spent", "per req.", "spent_per_request", _scaled(3)),
)
DETAIL_COLUMNS = (
    _Column("QoS/s", "", "qos_per_second", _scaled(2)),
    _Column("TPOT p95", "ms", "tpot_p95", _scaled(1, 1000)),
    _Column("E2E p95", "s", "e2e_p95", _scaled(1)),
    _Column("goodput", "req/s", "goodput", _scaled(2)),
    _Column("tokens/s", "", "tokens_per_second", _scaled(0)),
    _Column("preempt.", "per req.", "preemptions_per_request", _scaled(2)),
)


def columns_of(result: EvaluationResult) -> list[_Column]:
    """Return the columns of the comparison, with those of the cloud where a policy has sent requests there."""
    sent = [
        result.interval(rate, policy, "cloud_rate").mean > 0
        for rate in result.rates
        for policy in result.summaries[rate]
    ]
    return [*_COLUMNS, *(_CLOUD_COLUMNS if any(sent) else ())]


class _Row(NamedTuple):
    policy: str
    cells: list[str]  # as many as columns
    difference: str  # reference minus this policy, "" for the reference itself
    verdict: str  # "better" or "worse": the reference against this policy, if the interval excludes 0


def verdict_of(difference: Interval | None) -> str:
    """Return "better" or "worse" if the difference's interval excludes 0, else ""."""
    if difference is None or not abs(difference.mean) > difference.ci95:
        return ""
    return "better" if difference.mean > 0 else "worse"


def table_rows(result: EvaluationResult, rate: float, columns: Sequence[_Column]) -> list[_Row]:
    """Format one load, the best policy first."""
    differences = result.paired_with_reference(rate)
    rows = []
    for policy in result.ranking(rate):
        cells = [column.text(result.interval(rate, policy, column.metric)) for column in columns]
        difference = differences.get(policy)
        text = "" if difference is None else plus_minus(difference, 4, "+")
        rows.append(_Row(policy, cells, text, verdict_of(difference)))
    return rows


def results_table(result: EvaluationResult, rate: float | None = None) -> Table:
    """Return the comparison at one load (the nominal one unless told) for a terminal of 100 columns.

    "learned - it" is the paired difference in average QoS between the reference policy and the one in
    the row: green where the reference is better, red where it is worse, uncoloured where the 95 %
    interval contains 0.
    """
    rate = result.nominal_rate if rate is None else rate
    table = Table(
        title=f"{result.workload} at {rate:g} requests/s, {episodes_text(result)} of {result.requests:,} requests",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_style="bold",
        caption="± half-width of the 95 % confidence interval over episodes",
    )
    table.add_column("policy", no_wrap=True, vertical="bottom")
    columns = columns_of(result)
    for column in columns:
        header = f"{column.title} {column.unit}".strip()
        wraps = header if column.metric == "avg_qos" else header.replace(" ", "\n")
        table.add_column(wraps, justify="right", no_wrap=True, vertical="bottom")
    if result.reference is not None:
        table.add_column(f"{result.reference}\n- it", justify="right", no_wrap=True, vertical="bottom")
    colours = {"better": "green", "worse": "red", "": ""}
    for row in table_rows(result, rate, columns):
        cells = [row.policy, *row.cells]
        if result.reference is not None:
            colour = colours[row.verdict]
            cells.append(f"[{colour}]{row.difference}[/]" if colour else row.difference)
        style = "bold cyan" if row.policy == result.reference else ""
        table.add_row(*cells, style="dim italic" if row.policy in result.upper_references else style)
    return table


def markdown_table(result: EvaluationResult, rate: float | None = None) -> str:
    """Return the comparison at one load (the nominal one unless told) as a Markdown table."""
    rate = result.nominal_rate if rate is None else rate
    columns = columns_of(result)
    header = ["policy", *(f"{column.title} ({column.unit})".removesuffix(" ()") for column in columns)]
    if result.reference is not None:
        header.append(f"{result.reference} - it")
    lines = []
    for row in table_rows(result, rate, columns):
        name = f"`{row.policy}`"
        cells = [f"**{name}**" if row.policy == result.reference else name, *row.cells]
        lines.append([*cells, row.difference][: len(header)])
    return markdown(header, lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def episodes_text(result: EvaluationResult) -> str:
    """Write the number of episodes in words."""
    return f"{result.episodes} episode{'' if result.episodes == 1 else 's'}"


def summary_text(result: EvaluationResult) -> str:
    """Say in words what came out: the reference (or the best policy) against its best rival."""
    rate = result.nominal_rate
    rival = result.best_rival(rate)
    subject = result.reference or rival
    if subject is None:
        return "No policy was evaluated."
    qos = result.interval(rate, subject, "avg_qos")
    in_time = result.interval(rate, subject, "in_time_rate")
    verb = "reached" if result.reference else "was the best policy: it reached"
    sentences = [
        f"At {rate:g} requests/s on {result.workload}, {subject} {verb} an average QoS of "
        f"{plus_minus(qos, 3)} and answered {fixed(in_time.mean * 100, 1)} % of the requests in time."
    ]
    declined = result.interval(rate, subject, "declined_rate").mean
    if declined > 0:
        sentences.append(f"It declined {fixed(declined * 100, 1)} %, which count as 0.")
    if result.reference and rival:
        difference = result.paired(rate, subject, rival)
        relative = 100 * difference.mean / (qos.mean - difference.mean) if qos.mean > difference.mean else 0.0
        amount = f"{plus_minus(Interval(abs(difference.mean), difference.ci95), 4)} ({abs(relative):.1f} %)"
        if math.isnan(difference.ci95):
            words = f"{amount} {'above' if difference.mean >= 0 else 'below'}"
            note = f" ({episodes_text(result)}: too few to tell whether this is chance)"
        else:
            words = {
                "better": f"{amount} above",
                "worse": f"{amount} below",
                "": "not distinguishable from",
            }[verdict_of(difference)]
            note = f" (paired over {episodes_text(result)})"
        sentences.append(f"That is {words} the best other policy, {rival}{note}.")
        if len(result.rates) > 1 and result.episodes > 1:
            sentences.append(_over_all_loads(result, subject))
    shown = [policy for policy in result.upper_references if policy in result.summaries[rate]]
    for policy in shown:
        upper = result.interval(rate, policy, "avg_qos")
        sentences.append(f"{policy}, which sees what no router can, reached {plus_minus(upper, 3)}.")
    return " ".join(sentences)


def _over_all_loads(result: EvaluationResult, subject: str) -> str:
    """Count the loads at which the reference beats the best of the others there."""
    verdicts = []
    for rate in result.rates:
        rival = result.best_rival(rate)
        if rival is not None:
            verdicts.append(verdict_of(result.paired(rate, subject, rival)))
    return f"Against the best other policy at each of the {len(verdicts)} loads it is {counted(verdicts, 'at')}."


def counted(verdicts: Sequence[str], preposition: str) -> str:
    """Count verdicts in words."""
    return ", ".join(
        f"{words} {preposition} {verdicts.count(verdict)}"
        for verdict, words in (("better", "ahead"), ("", "level"), ("worse", "behind"))
        if verdict in verdicts
    )

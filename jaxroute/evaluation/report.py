"""Files and tables that show an evaluation: JSON, CSV, terminal, Markdown, plots and one HTML page.

Figures are built without pyplot, so that nothing here changes matplotlib's
global state or needs a display.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich import box
from rich.table import Table

from jaxroute.evaluation.metrics import METRICS
from jaxroute.evaluation.statistics import Interval, mean_ci95, paired_difference

Summary = Mapping[str, np.ndarray]
"""The metrics of one policy at one load, as `summarise` returns them: (seed,) or (seed, expert) each."""


@dataclass(frozen=True)
class EvaluationResult:
    """Policies compared on the same requests, at one or more loads."""

    workload: str  # name of the workload
    site: str  # name of the site
    bank: str  # name of the request bank
    rates: Sequence[float]  # requests/s, one per load
    nominal_rate: float  # requests/s, the load that is shown first; one of `rates`
    seeds: int  # independent episodes per policy and load
    requests: int  # requests per episode
    warmup: int  # of them not counted at the start
    reference: str | None  # the policy that others are compared with (the learned router), if any
    expert_names: Sequence[str]  # (expert,)
    summaries: Mapping[float, Mapping[str, Summary]]  # rate -> policy -> metric -> values per seed
    upper_references: Sequence[str] = ()  # policies that see what no router can: shown, never called the best
    settings: Mapping[str, Any] = field(default_factory=dict)  # provenance: version, machine, command, ...

    def __post_init__(self) -> None:
        if self.nominal_rate not in self.rates:
            raise ValueError(f"nominal_rate {self.nominal_rate} is not one of rates {list(self.rates)}")
        for rate in self.rates:
            if rate not in self.summaries:
                raise ValueError(f"summaries lack the rate {rate}")
            if self.reference is not None and self.reference not in self.summaries[rate]:
                raise ValueError(f"summaries at rate {rate} lack the reference policy {self.reference!r}")

    @cached_property
    def _intervals(self) -> dict[float, dict[str, dict[str, Any]]]:
        """Rate -> policy -> metric -> Interval, or a list of Intervals (one per expert)."""

        def interval(values: np.ndarray) -> Any:
            return mean_ci95(values) if values.ndim == 1 else [mean_ci95(column) for column in values.T]

        return {
            rate: {
                policy: {metric: interval(np.asarray(values)) for metric, values in summary.items()}
                for policy, summary in self.summaries[rate].items()
            }
            for rate in self.rates
        }

    def interval(self, rate: float, policy: str, metric: str) -> Interval:
        """Mean and confidence interval of one scalar metric."""
        return self._intervals[rate][policy][metric]

    def expert_means(self, rate: float, policy: str, metric: str) -> list[float]:
        """Means over seeds of a metric that has one value per expert, shape (expert,)."""
        return [interval.mean for interval in self._intervals[rate][policy][metric]]

    def ranking(self, rate: float) -> list[str]:
        """Policies from the best to the worst average QoS at one load."""

        def qos(policy: str) -> float:
            mean = self.interval(rate, policy, "avg_qos").mean
            return -math.inf if math.isnan(mean) else mean

        return sorted(self.summaries[rate], key=qos, reverse=True)

    def paired(self, rate: float, policy: str, other: str, metric: str = "avg_qos") -> Interval:
        """Average QoS (or another metric) of `policy` minus that of `other`, seed by seed."""
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


# --- JSON and CSV --------------------------------------------------------------------------------------


def _write(path: str | Path, content: str | bytes) -> Path:
    """Write a file at once: a reader sees the old or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _jsonable(value: Any) -> Any:
    """Turn a value into what strict JSON can hold: nan and infinities become null, the unknown a string."""
    if isinstance(value, Interval):
        return {"mean": _jsonable(value.mean), "ci95": _jsonable(value.ci95)}
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _load(result: EvaluationResult, rate: float) -> dict[str, Any]:
    """Everything measured at one load, as in results.json."""
    policies = {
        policy: {
            metric: [expert.mean for expert in value] if isinstance(value, list) else value
            for metric, value in result._intervals[rate][policy].items()
        }
        for policy in result.ranking(rate)
    }
    return {
        "rate": rate,
        "policies": policies,
        "paired_difference": result.paired_with_reference(rate),
    }


def write_results_json(result: EvaluationResult, path: str | Path) -> Path:
    """Write all intervals as strict JSON: the nominal load at the top, every load under "loads".

    Policies are in the order of their average QoS. A scalar metric is {"mean", "ci95"}, a metric per
    expert is a list of means in the order of "experts", and what is undefined is null.
    "paired_difference" is the reference's average QoS minus that of each other policy.
    """
    content = {
        "workload": result.workload,
        "site": result.site,
        "bank": result.bank,
        "seeds": result.seeds,
        "requests": result.requests,
        "warmup": result.warmup,
        "reference": result.reference,
        "upper_references": list(result.upper_references),
        "experts": list(result.expert_names),
        **_load(result, result.nominal_rate),
        "loads": [_load(result, rate) for rate in result.rates],
        "settings": result.settings,
    }
    return _write(path, json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n")


def write_results_csv(result: EvaluationResult, path: str | Path) -> Path:
    """Write one line per number: workload, rate, policy, metric, mean, ci95; undefined is empty.

    Metrics per expert are called `metric[expert]`; `paired_difference` is the reference's average QoS
    minus that of the policy.
    """
    rows = [[result.workload, *row] for row in _csv_rows(result)]
    return _write(path, _csv([["workload", *_CSV_COLUMNS], *rows]))


_CSV_COLUMNS = ["rate", "policy", "metric", "mean", "ci95"]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.9g}"


def _csv_rows(result: EvaluationResult) -> list[list[str]]:
    """Write every number of an evaluation as a line of `_CSV_COLUMNS`."""
    lines = []
    for rate in result.rates:
        differences = result.paired_with_reference(rate)
        for policy in result.ranking(rate):
            rows: dict[str, Interval] = {}
            for metric, value in result._intervals[rate][policy].items():
                if isinstance(value, list):
                    names = (f"{metric}[{expert}]" for expert in result.expert_names)
                    rows |= dict(zip(names, value, strict=True))
                else:
                    rows[metric] = value
            if policy in differences:
                rows["paired_difference"] = differences[policy]
            for metric, interval in rows.items():
                lines.append([_number(rate), policy, metric, _number(interval.mean), _number(interval.ci95)])
    return lines


# --- Tables --------------------------------------------------------------------------------------------


def _text(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"  # noqa: RUF001 (a dash, as in print)


def _plus_minus(interval: Interval, digits: int, sign: str = "") -> str:
    """Write a mean with its half-width, if one is known."""
    if math.isnan(interval.mean):
        return _text(interval.mean, digits)
    mean = f"{interval.mean:{sign}.{digits}f}"
    return mean if math.isnan(interval.ci95) else f"{mean} ± {interval.ci95:.{digits}f}"


class _Column(NamedTuple):
    title: str
    unit: str
    metric: str
    text: Callable[[Interval], str]


def _scaled(digits: int, factor: float = 1.0) -> Callable[[Interval], str]:
    return lambda interval: _text(interval.mean * factor, digits)


_COLUMNS = (
    _Column("avg QoS", "", "avg_qos", lambda interval: _plus_minus(interval, 3)),
    _Column("late", "%", "violation_rate", _scaled(1, 100)),
    _Column("rej.", "%", "rejection_rate", _scaled(1, 100)),
    _Column("quality", "", "mean_quality", _scaled(3)),
    _Column("TTFT p95", "s", "ttft_p95", _scaled(2)),
    _Column("norm. p95", "ms/tok", "normalised_latency_p95", _scaled(1, 1000)),
    _Column("QoS", "per acc.-s", "qos_per_busy_second", _scaled(3)),
)
_DETAIL_COLUMNS = (
    _Column("TPOT p95", "ms", "tpot_p95", _scaled(1, 1000)),
    _Column("E2E p95", "s", "e2e_p95", _scaled(1)),
    _Column("goodput", "req/s", "goodput", _scaled(2)),
    _Column("tokens/s", "", "tokens_per_second", _scaled(0)),
    _Column("preempt.", "per req.", "preemptions_per_request", _scaled(2)),
)


class _Row(NamedTuple):
    policy: str
    cells: list[str]  # as many as columns
    difference: str  # reference minus this policy, "" for the reference itself
    verdict: str  # "better" or "worse": the reference against this policy, if the interval excludes 0


def _verdict(difference: Interval | None) -> str:
    if difference is None or not abs(difference.mean) > difference.ci95:
        return ""
    return "better" if difference.mean > 0 else "worse"


def _rows(result: EvaluationResult, rate: float, columns: Sequence[_Column]) -> list[_Row]:
    """Format one load, the best policy first."""
    differences = result.paired_with_reference(rate)
    rows = []
    for policy in result.ranking(rate):
        cells = [column.text(result.interval(rate, policy, column.metric)) for column in columns]
        difference = differences.get(policy)
        text = "" if difference is None else _plus_minus(difference, 4, "+")
        rows.append(_Row(policy, cells, text, _verdict(difference)))
    return rows


def results_table(result: EvaluationResult, rate: float | None = None) -> Table:
    """Return the comparison at one load (the nominal one unless told) for a terminal of 100 columns.

    "learned - it" is the paired difference in average QoS between the reference policy and the one in
    the row: green where the reference is better, red where it is worse, uncoloured where the 95 %
    interval contains 0.
    """
    rate = result.nominal_rate if rate is None else rate
    table = Table(
        title=f"{result.workload} at {rate:g} requests/s, {_seeds(result)} of {result.requests:,} requests",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_style="bold",
        caption="± half-width of the 95 % confidence interval over seeds",
    )
    table.add_column("policy", no_wrap=True, vertical="bottom")
    for column in _COLUMNS:
        header = f"{column.title} {column.unit}".strip()
        wraps = header if column.metric == "avg_qos" else header.replace(" ", "\n")
        table.add_column(wraps, justify="right", no_wrap=True, vertical="bottom")
    if result.reference is not None:
        table.add_column(f"{result.reference}\n- it", justify="right", no_wrap=True, vertical="bottom")
    colours = {"better": "green", "worse": "red", "": ""}
    for row in _rows(result, rate, _COLUMNS):
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
    header = ["policy", *(f"{column.title} ({column.unit})".removesuffix(" ()") for column in _COLUMNS)]
    if result.reference is not None:
        header.append(f"{result.reference} - it")
    lines = []
    for row in _rows(result, rate, _COLUMNS):
        name = f"`{row.policy}`"
        cells = [f"**{name}**" if row.policy == result.reference else name, *row.cells]
        lines.append([*cells, row.difference][: len(header)])
    return _markdown(header, lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _seeds(result: EvaluationResult) -> str:
    return f"{result.seeds} seed{'' if result.seeds == 1 else 's'}"


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
        f"{_plus_minus(qos, 3)} and answered {_text(in_time.mean * 100, 1)} % of the requests in time."
    ]
    if result.reference and rival:
        difference = result.paired(rate, subject, rival)
        relative = 100 * difference.mean / (qos.mean - difference.mean) if qos.mean > difference.mean else 0.0
        amount = f"{_plus_minus(Interval(abs(difference.mean), difference.ci95), 4)} ({abs(relative):.1f} %)"
        if math.isnan(difference.ci95):
            words = f"{amount} {'above' if difference.mean >= 0 else 'below'}"
            note = f" ({_seeds(result)}: too few to tell whether this is chance)"
        else:
            words = {
                "better": f"{amount} above",
                "worse": f"{amount} below",
                "": "not distinguishable from",
            }[_verdict(difference)]
            note = f" (paired over {_seeds(result)})"
        sentences.append(f"That is {words} the best other policy, {rival}{note}.")
        if len(result.rates) > 1 and result.seeds > 1:
            sentences.append(_over_all_loads(result, subject))
    shown = [policy for policy in result.upper_references if policy in result.summaries[rate]]
    for policy in shown:
        upper = result.interval(rate, policy, "avg_qos")
        sentences.append(f"{policy}, which sees what no router can, reached {_plus_minus(upper, 3)}.")
    return " ".join(sentences)


def _over_all_loads(result: EvaluationResult, subject: str) -> str:
    """Count the loads at which the reference beats the best of the others there."""
    verdicts = []
    for rate in result.rates:
        rival = result.best_rival(rate)
        if rival is not None:
            verdicts.append(_verdict(result.paired(rate, subject, rival)))
    return f"Against the best other policy at each of the {len(verdicts)} loads it is {_counted(verdicts, 'at')}."


def _counted(verdicts: Sequence[str], preposition: str) -> str:
    """Count verdicts in words."""
    return ", ".join(
        f"{words} {preposition} {verdicts.count(verdict)}"
        for verdict, words in (("better", "ahead"), ("", "level"), ("worse", "behind"))
        if verdict in verdicts
    )


# --- Plots ---------------------------------------------------------------------------------------------

# Okabe and Ito (2008): distinguishable with every common colour vision deficiency.
_REFERENCE = "#D55E00"
_HIGHLIGHTS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v")
_UPPER = "#222222"
_WEAK = "#C4C4C4"
_TEXT = "#333333"
_LATE, _REJECTED = "#E69F00", "#7A3B00"

_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "legend.frameon": False,
}


class _Look(NamedTuple):
    colour: str
    marker: str
    line: str
    width: float
    order: int  # drawn above those with a lower one
    labelled: bool


def _looks(result: EvaluationResult) -> dict[str, _Look]:
    """Give the reference, the upper references and the strongest rules a look; the rest is grey."""

    def shortfall(policy: str) -> float:
        """Mean distance from the best policy, over the loads at which it was evaluated."""
        gaps = [
            result.interval(rate, result.ranking(rate)[0], "avg_qos").mean
            - result.interval(rate, policy, "avg_qos").mean
            for rate in result.rates
            if policy in result.summaries[rate]
        ]
        return math.inf if np.isnan(gaps).any() else float(np.mean(gaps))

    policies = {policy: None for rate in result.rates for policy in result.summaries[rate]}  # an ordered set
    looks = {policy: _Look(_WEAK, "", "-", 1.0, 1, False) for policy in policies}
    rules = [policy for policy in policies if policy not in {result.reference, *result.upper_references}]
    strongest = sorted(rules, key=shortfall)
    for policy, colour, marker in zip(strongest, _HIGHLIGHTS, _MARKERS, strict=False):
        looks[policy] = _Look(colour, marker, "-", 1.5, 3, True)
    for policy in result.upper_references:
        if policy in looks:
            looks[policy] = _Look(_UPPER, "", "--", 1.3, 2, True)
    if result.reference is not None:
        looks[result.reference] = _Look(_REFERENCE, "o", "-", 3.0, 4, True)
    return looks


def _subtitle(result: EvaluationResult) -> str:
    return f"{result.workload}, site {result.site}, {_seeds(result)} of {result.requests:,} requests"


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, pad=20)
    axes.annotate(subtitle, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8, color="#777777")


def _spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """Move positions apart until neighbours are `gap` from each other, none further than needed."""
    order = np.argsort(positions)
    spread = np.asarray(positions, np.float64)[order]
    for _ in range(200):
        overlap = gap - np.diff(spread)
        if not (overlap > 1e-6 * gap).any():
            break
        for i in np.flatnonzero(overlap > 0):
            shift = (gap - (spread[i + 1] - spread[i])) / 2
            if shift > 0:
                spread[i] -= shift
                spread[i + 1] += shift
    result = np.empty_like(spread)
    result[order] = spread
    return result


@mpl.rc_context(_STYLE)
def plot_qos_against_load(result: EvaluationResult) -> Figure:
    """Plot average QoS against the request rate, one line per policy, with 95 % confidence bands."""
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.subplots()
    looks = _looks(result)
    rates = sorted(result.rates)
    ends: dict[str, tuple[float, float]] = {}  # of the lines that get a label
    labelled: list[float] = []
    for policy, look in looks.items():
        at = [rate for rate in rates if policy in result.summaries[rate]]
        intervals = [result.interval(rate, policy, "avg_qos") for rate in at]
        mean = np.array([interval.mean for interval in intervals])
        half = np.nan_to_num([interval.ci95 for interval in intervals])
        marker = look.marker or ("_" if len(at) == 1 else "")
        axes.plot(at, mean, color=look.colour, lw=look.width, ls=look.line, marker=marker, ms=5, zorder=look.order)
        if look.labelled and np.isfinite(mean).all():
            axes.fill_between(at, mean - half, mean + half, color=look.colour, alpha=0.13, lw=0)
            ends[policy] = (at[-1], mean[-1])
            labelled += [*(mean - half), *(mean + half)]

    # Rules far below the others would squeeze the lines that matter into a corner: let those leave the frame.
    if labelled:
        low, high = min(labelled), max(labelled)
        span = max(high - low, 0.02)
        lowest = min(axes.dataLim.ymin, low)
        axes.set_ylim(max(lowest - 0.05 * span, low - 0.6 * span), high + 0.08 * span)

    bottom, top = axes.get_ylim()
    labels_at = np.minimum(_spread([y for _, y in ends.values()], 0.045 * (top - bottom)), top)
    for (policy, end), y in zip(ends.items(), labels_at, strict=True):
        look = looks[policy]
        axes.annotate(
            policy,
            end,
            (1.035, y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=look.colour,
            fontweight="bold" if policy == result.reference else "normal",
            arrowprops={"arrowstyle": "-", "color": look.colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 2},
        )
    order = [*result.ranking(result.nominal_rate), *looks]  # the nominal load need not have all of them
    weak = [policy for policy in dict.fromkeys(order) if not looks[policy].labelled]
    if weak:
        figure.supxlabel(_wrapped("Grey, best first: ", weak, 118), fontsize=7.5, color="#888888")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("Load (requests per second)")
    axes.set_ylabel("Average QoS (quality of an answer in time; else 0)")
    axes.grid(axis="y")
    bands = "; bands: 95 % confidence" if result.seeds > 1 else ""
    _title(axes, "How quality of service holds up under load", _subtitle(result) + bands)
    return figure


def _wrapped(start: str, names: Sequence[str], width: int) -> str:
    """Join names by commas into lines of at most `width` characters."""
    lines = [start]
    for i, name in enumerate(names):
        word = name + (", " if i < len(names) - 1 else "")
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _policy_axis(axes: Axes, result: EvaluationResult, policies: Sequence[str]) -> None:
    """List policies from top to bottom, the reference in its colour."""
    axes.set_yticks(range(len(policies)), policies)
    axes.set_ylim(len(policies) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for policy, label in zip(policies, axes.get_yticklabels(), strict=True):
        if policy == result.reference:
            label.set(color=_REFERENCE, fontweight="bold")
        elif policy in result.upper_references:
            label.set(fontstyle="italic")


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    """Write the value of a bar to the right of its end."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5)


def _height(policies: Sequence[str]) -> float:
    """Inches for a chart with one bar per policy."""
    return 1.5 + 0.235 * len(policies)


@mpl.rc_context(_STYLE)
def plot_policy_comparison(result: EvaluationResult) -> Figure:
    """Plot average QoS with confidence intervals, late and rejected requests, at the nominal load."""
    rate = result.nominal_rate
    policies = result.ranking(rate)
    figure = Figure(figsize=(8.2, _height(policies)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])

    intervals = [result.interval(rate, policy, "avg_qos") for policy in policies]
    means = np.nan_to_num([interval.mean for interval in intervals])
    half = np.array([interval.ci95 for interval in intervals])  # nan, and then not drawn, for a single seed
    ends = means + np.nan_to_num(half)
    y = np.arange(len(policies))
    bars = left.barh(y, means, 0.72, xerr=half, error_kw={"lw": 1, "ecolor": _TEXT, "capsize": 2})
    for policy, bar in zip(policies, bars, strict=True):
        if policy in result.upper_references:
            bar.set(facecolor="white", edgecolor="#777777", hatch="////", linewidth=0.8)
        else:
            bar.set_color(_REFERENCE if policy == result.reference else "#8FB4CC")
    for i, interval in enumerate(intervals):
        _beside(left, ends[i], i, _plus_minus(interval, 3))
    left.set_xlim(0, 1.28 * max(ends.max(), 0.01))
    left.set_xlabel("Average QoS (more is better)")
    _policy_axis(left, result, policies)
    _title(left, f"Policies at {rate:g} requests per second", _subtitle(result))

    late, rejected = (
        100 * np.nan_to_num([result.interval(rate, policy, metric).mean for policy in policies])
        for metric in ("violation_rate", "rejection_rate")
    )
    right.barh(y, late, 0.72, color=_LATE, label="late")
    right.barh(y, rejected, 0.72, left=late, color=_REJECTED, label="rejected")
    for i, value in enumerate(late + rejected):
        _beside(right, value, i, f"{value:.1f}")
    right.set_xlim(0, 1.2 * max((late + rejected).max(), 0.1))
    right.set_xlabel("Not answered in time (%, less is better)")
    right.tick_params(axis="y", length=0)
    right.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handlelength=1)
    for axes in (left, right):
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    return figure


def _expert_colours(number: int) -> list[str]:
    if number <= 7:
        return ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"][:number]
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 1, number))]


@mpl.rc_context(_STYLE)
def plot_expert_share(result: EvaluationResult) -> Figure:
    """Plot which share of the requests each policy sends to each expert, at the nominal load."""
    rate = result.nominal_rate
    policies = result.ranking(rate)
    shares = np.nan_to_num([result.expert_means(rate, policy, "expert_share") for policy in policies])
    colours = _expert_colours(len(result.expert_names))
    figure = Figure(figsize=(8.2, _height(policies) + 0.2), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(policies))
    for expert, (name, colour) in enumerate(zip(result.expert_names, colours, strict=True)):
        share = 100 * shares[:, expert]
        axes.barh(range(len(policies)), share, 0.78, left=left, color=colour, label=name, ec="white", lw=0.5)
        red, green, blue = mpl.colors.to_rgb(colour)
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        for i in np.flatnonzero(share >= 6):
            middle = left[i] + share[i] / 2
            axes.text(middle, float(i), f"{share[i]:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
        left += share
    axes.set_xlim(0, 100)
    axes.set_xlabel("Share of requests (%)")
    axes.spines[:].set_visible(False)
    _policy_axis(axes, result, policies)
    longest = max(len(name) for name in result.expert_names)
    rows = math.ceil(len(colours) / max(1, 115 // (longest + 4)))
    columns = math.ceil(len(colours) / rows)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, handlelength=1)
    title = f"Where each policy sends requests, at {rate:g} per second"
    _title(axes, title, f"{_subtitle(result)}; best policy first")
    return figure


def _draw_qos_curves(axes: Axes) -> list[Text]:
    """Draw the curves of equal average QoS over (% in time, quality); return their labels."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x, y = np.meshgrid(np.linspace(left, right, 60), np.linspace(bottom, top, 60))
    curves = axes.contour(x, y, x * y / 100, 7, colors="#DDDDDD", linewidths=0.9, zorder=1)
    labels = []
    for level in curves.levels:
        x_bottom, y_right = 100 * level / bottom, 100 * level / right  # where the curve leaves the frame
        at_bottom = left < x_bottom < right
        if at_bottom or bottom < y_right < top:
            place = (x_bottom, bottom + 0.02 * (top - bottom)) if at_bottom else (right, y_right)
            text = axes.text(*place, f"QoS {level:.2f}", ha="center" if at_bottom else "right", va="center")
            text.set(fontsize=7, color="#A8A8A8", bbox={"fc": "white", "ec": "none", "pad": 1})
            labels.append(text)
    return labels


def _place_labels(
    axes: Axes, labels: Sequence[Text], points: Float[np.ndarray, "label 2"], obstacles: Sequence[Text]
) -> None:
    """Put each label where it hides the least: greedy, over positions around its point."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    pixels = axes.transData.transform(points)
    unit = figure.dpi / 72
    taken: list[tuple[float, ...]] = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in pixels]
    taken += [tuple(obstacle.get_window_extent().extents) for obstacle in obstacles]
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)

    def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        return max(width, 0.0) * max(height, 0.0)

    for label, (x, y) in zip(labels, pixels, strict=True):
        extent = label.get_window_extent()
        best, best_cost = (0.0, 0.0, (0.0, 0.0, 0.0, 0.0)), math.inf
        for distance in (7, 14, 24, 38, 54):
            for angle in angles:
                dx, dy = distance * unit * np.cos(angle), distance * unit * np.sin(angle)
                left = x + dx - extent.width * (1 - np.cos(angle)) / 2
                bottom = y + dy - extent.height * (1 - np.sin(angle)) / 2
                area = (left, bottom, left + extent.width, bottom + extent.height)
                outside = extent.width * extent.height - overlap(area, tuple(frame.extents))
                cost = sum(overlap(area, other) for other in taken) + 3 * outside + distance * unit
                if cost < best_cost:
                    best, best_cost = (left, bottom, area), cost
        taken.append(best[2])
        label.set_position(((best[0] - x) / unit, (best[1] - y) / unit))


@mpl.rc_context(_STYLE)
def plot_quality_latency(result: EvaluationResult) -> Figure:
    """Plot the two factors of average QoS at the nominal load: how good, and how often in time.

    The quality here is that of the answers in time, so that the product of both axes is exactly the
    average QoS.
    """
    rate = result.nominal_rate
    figure = Figure(figsize=(8.2, 5.4), layout="constrained")
    axes = figure.subplots()
    looks = _looks(result)
    policies = sorted(result.ranking(rate), key=lambda policy: -looks[policy].order)
    points: dict[str, tuple[float, float]] = {}
    for policy in policies:
        in_time = result.interval(rate, policy, "in_time_rate").mean
        if in_time > 0:  # neither nan nor a policy that is never in time
            points[policy] = (100 * in_time, result.interval(rate, policy, "avg_qos").mean / in_time)
    xy = np.array(list(points.values())).reshape(-1, 2)
    labels = []
    for policy, point in points.items():
        look = looks[policy]
        special = policy == result.reference
        axes.scatter(
            [point[0]],
            [point[1]],
            s=90 if special else 30,
            marker="*" if special else look.marker or ("x" if look.labelled else "o"),
            color=look.colour if look.labelled else "#A0A0A0",
            zorder=look.order + 2,
        )
        labels.append(
            axes.annotate(
                policy,
                point,
                (0, 0),
                textcoords="offset points",
                fontsize=8.5 if look.labelled else 7,
                fontweight="bold" if special else "normal",
                color=look.colour if look.labelled else "#808080",
                zorder=8,
                arrowprops={"arrowstyle": "-", "color": "#A0A0A0", "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
            )
        )
    obstacles: list[Text] = []
    if len(xy):
        (x0, y0), (x1, y1) = xy.min(axis=0), xy.max(axis=0)
        dx, dy = max(x1 - x0, 2.0), max(y1 - y0, 0.02)
        axes.set_xlim(x0 - 0.1 * dx, min(x1 + 0.12 * dx, 100 + 0.03 * dx))
        axes.set_ylim(y0 - 0.1 * dy, y1 + 0.1 * dy)
        obstacles = _draw_qos_curves(axes)
    axes.set_xlabel("Requests answered in time (%)")
    axes.set_ylabel("Mean quality of the answers in time")
    _title(
        axes,
        f"Good answers or fast ones? Policies at {rate:g} requests per second",
        f"{_subtitle(result)}; average QoS is the product of the axes (grey curves)",
    )
    _place_labels(axes, labels, xy, obstacles)
    return figure


_PLOTS: dict[str, Callable[[EvaluationResult], Figure]] = {
    "qos_against_load": plot_qos_against_load,
    "comparison": plot_policy_comparison,
    "expert_share": plot_expert_share,
    "quality_latency": plot_quality_latency,
}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, pil_kwargs={"optimize": True})
    return buffer.getvalue()


# --- HTML ----------------------------------------------------------------------------------------------


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _definitions() -> list[dict[str, str]]:
    """List the metrics, the mean and the percentiles of one latency on one line."""
    definitions: dict[str, dict[str, str]] = {}
    for metric in METRICS.values():
        label = metric.label.split(",")[0]
        definitions[label] = {"label": label, "unit": metric.unit, "text": metric.definition}
    return list(definitions.values())


def _page(template: str, **content: Any) -> str:
    """Fill in one of this package's templates."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content) + "\n"


def _image(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _html(result: EvaluationResult, pngs: Mapping[str, bytes]) -> str:
    columns = _COLUMNS + _DETAIL_COLUMNS
    order = [result.nominal_rate, *(rate for rate in result.rates if rate != result.nominal_rate)]
    return _page(
        "report.html.jinja",
        result=result,
        summary=summary_text(result).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"),
        metrics=METRICS,
        columns=columns,
        loads=[{"rate": f"{rate:g}", "rows": _rows(result, rate, columns)} for rate in order],
        images={name: _image(png) for name, png in pngs.items()},
        definitions=_definitions(),
        settings=_flat(result.settings),
    )


def write_html_report(result: EvaluationResult, path: str | Path) -> Path:
    """Write one self-contained page: summary, plots, a table per load, definitions and settings."""
    return _write(path, _html(result, {name: _png(plot(result)) for name, plot in _PLOTS.items()}))


def write_all(result: EvaluationResult, directory: str | Path) -> dict[str, Path]:
    """Write results.json, results.csv, four plots and report.html; return file name to path."""
    directory = Path(directory)
    pngs = {name: _png(plot(result)) for name, plot in _PLOTS.items()}
    paths = [
        write_results_json(result, directory / "results.json"),
        write_results_csv(result, directory / "results.csv"),
        *(_write(directory / f"{name}.png", png) for name, png in pngs.items()),
        _write(directory / "report.html", _html(result, pngs)),
    ]
    return {path.name: path for path in paths}

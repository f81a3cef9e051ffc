"""The figures of an evaluation.

They are built without pyplot, so that nothing here changes matplotlib's
global state or needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from jaxroute.evaluation.metrics import LOADS
from jaxroute.evaluation.report.tables import episodes_text, plus_minus
from jaxroute.evaluation.result import EvaluationResult
from jaxroute.plotting import REFERENCE_COLOUR, STYLE, TEXT_COLOUR, expert_colours
from jaxroute.policies import RULES

_HIGHLIGHTS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v")
_UPPER = "#222222"
_WEAK = "#C4C4C4"
_LATE, _REJECTED = "#E69F00", "#7A3B00"


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
        looks[result.reference] = _Look(REFERENCE_COLOUR, "o", "-", 3.0, 4, True)
    return looks


def subtitle_of(result: EvaluationResult) -> str:
    """Say what was evaluated, for the line under a title."""
    return f"{result.workload}, site {result.site}, {episodes_text(result)} of {result.requests:,} requests"


def set_title(axes: Axes, title: str, subtitle: str) -> None:
    """Set a title with a line under it."""
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


@mpl.rc_context(STYLE)
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
    bands = "; bands: 95 % confidence" if result.episodes > 1 else ""
    set_title(axes, "How quality of service holds up under load", subtitle_of(result) + bands)
    return figure


@mpl.rc_context(STYLE)
def plot_overload(result: EvaluationResult) -> Figure:
    """Plot QoS per second against the request rate: what a site earns when more comes than it can serve.

    Of the rules that send nothing away, and of those that may, the best at each load stands for all.
    """
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    rates = sorted(result.rates)

    def draw(name: str, policies: Sequence[str], look: _Look) -> None:
        of_each = [[result.interval(rate, policy, "qos_per_second") for policy in policies] for rate in rates]
        best = [max(intervals, key=lambda interval: interval.mean) for intervals in of_each]
        mean, half = np.array([one.mean for one in best]), np.nan_to_num([one.ci95 for one in best])
        axes.fill_between(rates, mean - half, mean + half, color=look.colour, alpha=0.13, lw=0)
        axes.plot(
            rates, mean, color=look.colour, lw=look.width, marker=look.marker, ms=5, zorder=look.order, label=name
        )

    everybody = [policy for policy in result.summaries[rates[0]] if policy not in result.upper_references]
    declining = [policy for policy in everybody if "+" in policy]
    others = [policy for policy in everybody if "+" not in policy and policy != result.reference]
    if result.reference is not None:
        draw(result.reference, [result.reference], _Look(REFERENCE_COLOUR, "o", "-", 3.0, 4, True))
    if declining:
        draw("best rule that may decline, at each load", declining, _Look(_HIGHLIGHTS[0], "s", "-", 1.5, 3, True))
    if others:
        draw("best rule that takes everything, at each load", others, _Look(_HIGHLIGHTS[4], "^", "-", 1.5, 2, True))
    axes.set_ylim(bottom=0)
    axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
    axes.set_xlabel("Load (requests per second)")
    axes.set_ylabel("QoS per second")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    bands = "; bands: 95 % confidence" if result.episodes > 1 else ""
    set_title(axes, "What overload does, with and without the right to say no", subtitle_of(result) + bands)
    return figure


def has_overload(result: EvaluationResult) -> bool:
    """Whether there is something to show of overload: several loads, and a policy that may decline."""
    return len(result.rates) > 1 and all(
        any(summary.get("declined_rate", np.zeros(1)).any() for summary in of_rate.values())
        for of_rate in result.summaries.values()
    )


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
            label.set(color=REFERENCE_COLOUR, fontweight="bold")
        elif policy in result.upper_references:
            label.set(fontstyle="italic")


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    """Write the value of a bar to the right of its end."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5)


def _height(policies: Sequence[str]) -> float:
    """Inches for a chart with one bar per policy."""
    return 1.5 + 0.235 * len(policies)


@mpl.rc_context(STYLE)
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
    bars = left.barh(y, means, 0.72, xerr=half, error_kw={"lw": 1, "ecolor": TEXT_COLOUR, "capsize": 2})
    for policy, bar in zip(policies, bars, strict=True):
        if policy in result.upper_references:
            bar.set(facecolor="white", edgecolor="#777777", hatch="////", linewidth=0.8)
        else:
            bar.set_color(REFERENCE_COLOUR if policy == result.reference else "#8FB4CC")
    for i, interval in enumerate(intervals):
        _beside(left, ends[i], i, plus_minus(interval, 3))
    left.set_xlim(0, 1.28 * max(ends.max(), 0.01))
    left.set_xlabel("Average QoS (more is better)")
    _policy_axis(left, result, policies)
    set_title(left, f"Policies at {rate:g} requests per second", subtitle_of(result))

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


@mpl.rc_context(STYLE)
def plot_expert_share(result: EvaluationResult) -> Figure:
    """Plot which share of the requests each policy sends to each expert, at the nominal load."""
    rate = result.nominal_rate
    policies = result.ranking(rate)
    shares = np.nan_to_num([result.expert_means(rate, policy, "expert_share") for policy in policies])
    colours = expert_colours(len(result.expert_names))
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
    set_title(axes, title, f"{subtitle_of(result)}; best policy first")
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


@mpl.rc_context(STYLE)
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
    set_title(
        axes,
        f"Good answers or fast ones? Policies at {rate:g} requests per second",
        f"{subtitle_of(result)}; average QoS is the product of the axes (grey curves)",
    )
    _place_labels(axes, labels, xy, obstacles)
    return figure


# A share of fewer decisions than this is left out of the figure: it would say little.
_LEAST_DECISIONS = 50


def has_choices(result: EvaluationResult) -> bool:
    """Whether loads and choices were counted; cells of older studies lack them."""
    return all("expert_choice" in summary for of_rate in result.summaries.values() for summary in of_rate.values())


@mpl.rc_context(STYLE)
def plot_expert_choice(result: EvaluationResult) -> Figure:
    """Plot per expert which share of the requests it is given at which load of its own, at the nominal load.

    Of the rules only the best stands out.
    """
    rate = result.nominal_rate
    looks = _looks(result)
    best_rule = next((policy for policy in result.ranking(rate) if policy in RULES), None)
    shown = [policy for policy, look in looks.items() if look.labelled and (policy not in RULES or policy == best_rule)]
    experts = len(result.expert_names)
    columns = min(experts, 3)
    rows = math.ceil(experts / columns)
    figure = Figure(figsize=(8.2, 1.5 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    middle = np.arange(len(LOADS)) + 0.5
    for policy in reversed(result.ranking(rate)):
        look = looks[policy] if policy in shown else _Look(_WEAK, "", "-", 0.8, 1, False)
        at_load = result.expert_means(rate, policy, "expert_load")
        chosen = result.expert_means(rate, policy, "expert_choice")
        enough = at_load * result.episodes * result.requests >= _LEAST_DECISIONS
        share = 100 * np.divide(chosen, at_load, out=np.full(at_load.shape, np.nan), where=enough)
        label = policy if policy in shown else None
        for axes, of_expert in zip(panels, share, strict=False):
            (line,) = axes.plot(middle, of_expert, color=look.colour, lw=look.width, ls=look.line, label=label)
            line.set(marker=look.marker or ".", ms=4 if label else 2, zorder=look.order)
    for axes, name in zip(panels, result.expert_names, strict=False):
        axes.set_title(name, fontsize=7.5)
        axes.set_xticks(range(len(LOADS)), [f"{load}" for load in LOADS])
        axes.set_xlim(0, len(LOADS))
        axes.grid(axis="both")
    for axes in panels[experts - columns : experts]:  # nothing is below these
        axes.set_xlabel("Load (% of max_num_seqs)", fontsize=8)
        axes.tick_params(labelbottom=True)
    for axes in panels[experts:]:
        axes.set_visible(False)
    panels[0].set_ylim(bottom=0)
    figure.supylabel("Share of the requests sent to it (%)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=8)
    title = f"When each expert is chosen, at {rate:g} requests per second"
    heading = figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=11, fontweight="bold")
    text = f"{subtitle_of(result)}; grey: the other policies"
    note = panels[0].annotate(text, (0, 0), (0, 4), heading, "offset points", annotation_clip=False)
    note.set(fontsize=8, color="#777777", in_layout=False)
    return figure


PLOTS: dict[str, Callable[[EvaluationResult], Figure]] = {
    "qos_against_load": plot_qos_against_load,
    "comparison": plot_policy_comparison,
    "expert_share": plot_expert_share,
    "expert_choice": plot_expert_choice,
    "quality_latency": plot_quality_latency,
}

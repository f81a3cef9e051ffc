"""Traces of a user's own: describe one, or fit an arrival process to it, which a few figures share.

python -m jaxroute trace describe FILE [--plot OUT.png]
python -m jaxroute trace fit FILE --out configs/workload/mine.yaml [--process gamma|mmpp] [--plot OUT.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from jaxroute.commands.arguments import parser_of, run_chosen, run_command
from jaxroute.commands.console import say
from jaxroute.config.choices import check_choice, usage_of_choice, write_choice
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import check_new, write_file
from jaxroute.fitting import ArrivalFit, fit_arrivals, synthetic_times
from jaxroute.fitting.arrivals import MIN_WINDOWS, NUM_SYNTHETIC, PROCESSES, Times, mean_rate
from jaxroute.plotting import REFERENCE_COLOUR, STYLE, png_bytes
from jaxroute.workloads import Prefixes, Trace, build_workload, hit_rate, read_trace
from jaxroute.workloads.traces import fano_factor, gap_variation, window_counts

_WINDOWS = (1.0, 10.0, 60.0)  # s, of the Fano factors that are printed
_POOR = 0.2  # of a single figure
_MIN_CYCLES = 10  # bursts in a trace, so that their length and share mean something
_TIED = 0.05  # share of requests at the time of the one before, from which on the clock is said to be coarse
_MAX_DRAWN = 100_000  # requests of a synthetic trace
_CACHE_SIZES = (10_000, 100_000, 1_000_000, 10_000_000)  # tokens
_CACHE_NOTE = (
    "The cache is that of one server, which gets all requests, one by one in order of arrival: how long each is served "
    "plays no role."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Describe or fit a trace; returns the exit code."""
    return run_command(_parser(), argv, run_chosen)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("trace", "Recorded arrivals: what they are like, a fit.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    describe = commands.add_parser("describe", help="print and plot what a trace is like")
    describe.set_defaults(run=_describe)
    fit = commands.add_parser("fit", help="write a workload whose arrivals are like the trace's")
    fit.add_argument("--out", type=Path, required=True, help="the workload, such as configs/workload/mine.yaml")
    fit.add_argument("--process", choices=PROCESSES, help="arrival process; by default the one that fits better")
    fit.set_defaults(run=_fit)
    for command in (describe, fit):
        command.add_argument("file", type=Path, metavar="FILE", help="a trace; docs/how-to/traces.md lists the formats")
        command.add_argument("--plot", type=Path, metavar="OUT.png", help="a figure")
    return parser


# --- describe -----------------------------------------------------------------------------------------------


def _describe(options: argparse.Namespace, console: Console) -> None:
    _check_new(options.plot, "--plot", ".png")
    trace = _read(options.file)
    times = trace.arrival_time
    grid = Table("", Column(trace.format, justify="right"))
    for name, value in _figures(times).items():
        grid.add_row(name, value)
    console.print(grid)
    lengths = Table("tokens", *(Column(name, justify="right") for name in ("mean", "p50", "p95", "p99")))
    for name, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        figures = (tokens.mean(), *np.percentile(tokens, (50, 95, 99)))
        lengths.add_row(name, *(f"{figure:.0f}" for figure in figures))
    console.print(lengths)
    if trace.prefixes:
        with console.status("caching"):
            console.print(_cache_table(trace, trace.prefixes))
        say(console, _CACHE_NOTE)
    for note in _reading_notes(trace):
        say(console, note)
    if options.plot:
        _save(_plot_trace(trace), options.plot, console)


def _figures(times: Times) -> dict[str, str]:
    minutes, number = window_counts(times, 60.0)
    fewest = 0 if number > len(minutes) else minutes.min(initial=minutes.max(initial=0))
    return {
        "requests": f"{len(times)}",
        "duration": f"{times[-1]:.0f} s",
        "rate": f"{_number(mean_rate(times))} /s",
        "fewest and most in a minute": f"{fewest}, {minutes.max(initial=0)}" if number else "-",
        "CV of the gaps": _number(gap_variation(times)),
        **{f"Fano factor, {window:g} s": _fano_text(times, window) for window in _WINDOWS},
    }


def _cache_table(trace: Trace, prefixes: Prefixes) -> Table:
    grid = Table(
        f"prefix cache, blocks of {prefixes.block_size} tokens", Column("blocks of prompts found", justify="right")
    )
    for size in (*_CACHE_SIZES, None):
        name = "without bound" if size is None else f"{size:,} tokens"
        rate = hit_rate(prefixes, trace.prompt_tokens, size)
        grid.add_row(name, "-" if np.isnan(rate) else f"{rate:.2%}")
    return grid


def _fano_text(times: Times, window: float) -> str:
    factor, number = fano_factor(times, window)
    return _number(factor) if number >= MIN_WINDOWS else "-"


def _reading_notes(trace: Trace) -> list[str]:
    notes = []
    if trace.failed:
        notes.append(f"Left out: {trace.failed} failed requests.")
    if trace.torn:
        notes.append(f"Left out: {trace.torn} torn lines.")
    tied = (np.diff(trace.arrival_time) == 0).mean()
    if tied > _TIED:
        notes.append(
            f"{tied:.0%} of the requests come at the very time of the one before: if the clock is coarse, CV and Fano "
            "factors over short windows describe the clock."
        )
    return notes


def _read(path: Path) -> Trace:
    trace = read_trace(path)
    if trace.arrival_time[-1] <= 0:
        raise UserError(f"{path}: needs at least two requests at different times")
    return trace


def _check_new(path: Path | None, option: str, suffix: str) -> None:
    """Check a file to write: that it is of this kind, does not exist yet and can be made."""
    if path is None:
        return
    if path.suffix != suffix:
        raise UserError(f"{option}={path} must end in {suffix}")
    check_new(path, option, "file")


def _save(figure: Figure, path: Path, console: Console) -> None:
    write_file(path, png_bytes(figure))
    say(console, f"Figure: {path}")


# --- fit ----------------------------------------------------------------------------------------------------


def _fit(options: argparse.Namespace, console: Console) -> None:
    check_choice("workload", options.out)
    _check_new(options.plot, "--plot", ".png")
    trace = _read(options.file)
    times = trace.arrival_time
    use_compilation_cache()
    with console.status("fitting"):
        try:
            fits = fit_arrivals(times, [options.process] if options.process else PROCESSES)
        except UserError as error:
            raise UserError(f"{options.file}: {error}") from None
    fit = fits[0]
    longest = float(times[-1]) / MIN_WINDOWS
    windows = [*(window for window in _WINDOWS if window < longest), longest]
    text = _workload_yaml(options.out.stem, fit, trace, windows)

    config = write_choice("workload", options.out, text).workload
    with console.status("drawing"):
        drawn = synthetic_times(build_workload(config, None), min(len(times), _MAX_DRAWN))
    console.print(_comparison(times, fit, windows, drawn))
    for note in [*_reading_notes(trace), *_fit_notes(times, fits, windows, longest)]:
        say(console, note)
    if options.plot:
        _save(_plot_fit(times, fit, drawn), options.plot, console)
    say(console, f"Workload: {options.out}")
    say(console, f"Use it with: {usage_of_choice('workload', options.out)}")


def _measured(times: Times, windows: Sequence[float]) -> list[float]:
    return [mean_rate(times), gap_variation(times), *(fano_factor(times, window)[0] for window in windows)]


def _of_fit(fit: ArrivalFit, windows: Sequence[float], duration: float) -> list[float]:
    return [fit.options["rate"], fit.variation, *(fit.fano_factor(window, duration) for window in windows)]


def _names(windows: Sequence[float]) -> list[str]:
    return ["rate, 1/s", "CV of the gaps", *(f"Fano factor, {_number(window)} s" for window in windows)]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _comparison(times: Times, fit: ArrivalFit, windows: Sequence[float], drawn: list[Times]) -> Table:
    columns = ("trace", f"fit ({fit.process})", f"{NUM_SYNTHETIC} synthetic traces")
    grid = Table("", *(Column(name, justify="right") for name in columns))
    synthetic = np.array([_measured(draw, windows) for draw in drawn])
    rows = (_names(windows), _measured(times, windows), _of_fit(fit, windows, float(times[-1])), synthetic.T)
    for name, measured, fitted, drawn_figures in zip(*rows, strict=True):
        # A window may be too long for synthetic traces that were cut.
        spread = f"{_number(drawn_figures.mean())} ± {drawn_figures.std(ddof=1):.2g}"
        grid.add_row(name, _number(measured), _number(fitted), "-" if np.isnan(drawn_figures).any() else spread)
    return grid


def _fit_notes(times: Times, fits: list[ArrivalFit], windows: Sequence[float], longest: float) -> list[str]:
    """Say how good the fit is, and where it is poor."""
    fit, duration = fits[0], float(times[-1])
    errors = ", ".join(f"{other.process} {_percent(other.error)}" for other in fits)
    notes = [f"Typical error over the gaps' CV and windows up to {_number(longest)} s: {errors}. Taken: {fit.process}."]
    if len(times) > _MAX_DRAWN:
        notes.append(f"The synthetic traces have {_MAX_DRAWN} requests only: figures vary more than in the trace.")
    measured, fitted = _measured(times, windows), _of_fit(fit, windows, duration)
    poor = [
        f"{name} {_number(fitted_value)} where the trace has {_number(value)}"
        for name, value, fitted_value in zip(_names(windows), measured, fitted, strict=True)
        if not 1 / (1 + _POOR) < fitted_value / value < 1 + _POOR
    ]
    if poor:
        notes.append(f"Poor fit: {'; '.join(poor)}.")
    if fit.process == "mmpp":
        cycle = fit.options["burst_seconds"] / fit.options["burst_share"]
        if duration < _MIN_CYCLES * cycle:
            notes.append(
                f"Slow drift: the trace holds only {duration / cycle:.1f} bursts of such length, so burst_seconds and "
                "burst_share are hardly determined. The fit varies as much, at random times; to follow the recorded "
                "rise and fall, replay the trace (arrivals: trace)."
            )
    return notes


def _percent(error: float) -> str:
    return f"{error:.1%}" if error < 1 else f"factor {1 + error:.2g}"


def _workload_yaml(name: str, fit: ArrivalFit, trace: Trace, windows: Sequence[float]) -> str:
    times = trace.arrival_time
    lines = [
        f"# Fitted by python -m jaxroute trace to {len(times)} recorded requests in {times[-1]:.0f} s; trace, and fit:"
    ]
    figures = zip(_names(windows), _measured(times, windows), _of_fit(fit, windows, float(times[-1])), strict=True)
    lines += [f"#   {name} {_number(measured)}, {_number(fitted)}" for name, measured, fitted in figures]
    for of, tokens in (("Prompts", trace.prompt_tokens), ("Outputs", trace.output_tokens)):
        middle, high = np.percentile(tokens, (50, 95))
        lines.append(f"# {of} had {tokens.mean():.0f} tokens on average, median {middle:.0f}, 95 % below {high:.0f}.")
    lines += ["defaults:", "  - _requirements", "  - _self_", "", f"name: '{name}'", f"arrivals: {fit.process}"]
    lines += [f"{option}: {value:.5g}" for option, value in fit.options.items()]
    return "\n".join(lines) + "\n"


# --- figures ------------------------------------------------------------------------------------------------

_TRACE_COLOUR = "#0072B2"


@mpl.rc_context(STYLE)
def _plot_trace(trace: Trace) -> Figure:
    times = trace.arrival_time
    rows = 3 if trace.prefixes else 2
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    panels = figure.add_gridspec(rows, 2)
    over_time, gaps, fano, lengths = (figure.add_subplot(panels[row, column]) for row in (0, 1) for column in (0, 1))
    _plot_rate(over_time, times, "trace", color=_TRACE_COLOUR)
    _plot_gaps(gaps, times)
    _plot_fano(fano, times, color=_TRACE_COLOUR, label="trace")
    _poisson_line(fano)
    ends = np.concatenate([trace.prompt_tokens, trace.output_tokens, [1]])
    bins = np.geomspace(1, ends.max() + 1, 50).tolist()
    for name, tokens, colour in (
        ("prompt", trace.prompt_tokens, _TRACE_COLOUR),
        ("output", trace.output_tokens, REFERENCE_COLOUR),
    ):
        lengths.hist(np.maximum(tokens, 1), bins, histtype="step", color=colour, label=name)
    lengths.set(xscale="log", xlabel="tokens", ylabel="requests", title="Lengths")
    lengths.legend()
    if trace.prefixes:
        _plot_caches(figure.add_subplot(panels[2, :]), trace, trace.prefixes)
    return figure


def _plot_caches(axes: Axes, trace: Trace, prefixes: Prefixes) -> None:
    sizes = np.geomspace(_CACHE_SIZES[0], _CACHE_SIZES[-1], 13).astype(int).tolist()
    rates = [100 * hit_rate(prefixes, trace.prompt_tokens, size) for size in sizes]
    axes.plot(sizes, rates, "o-", ms=4, color=_TRACE_COLOUR, label="one server, all requests")
    bound = 100 * hit_rate(prefixes, trace.prompt_tokens, None)
    axes.axhline(bound, color="0.5", ls="--", lw=1, label="cache without bound")
    axes.set(xscale="log", xlabel="cache, tokens", ylabel="blocks found, %", title="Prefix cache")
    axes.set_ylim(bottom=0)
    axes.legend()


@mpl.rc_context(STYLE)
def _plot_fit(times: Times, fit: ArrivalFit, drawn: list[Times]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    over_time, fano = figure.subplots(1, 2)
    _plot_rate(over_time, drawn[0], "synthetic", color=REFERENCE_COLOUR, alpha=0.7)
    _plot_rate(over_time, times, "trace", color=_TRACE_COLOUR)
    over_time.legend()
    for draw in drawn:
        _plot_fano(fano, draw, color="0.85", zorder=1)
    _plot_fano(fano, times, color=_TRACE_COLOUR, marker="o", ms=4, label="trace")
    windows = _plotted_windows(times)
    fitted = [fit.fano_factor(window, float(times[-1])) for window in windows]
    fano.plot(windows, fitted, color=REFERENCE_COLOUR, label=f"fit ({fit.process}); grey: synthetic traces")
    _poisson_line(fano)
    return figure


def _plot_rate(axes: Axes, times: Times, label: str, **look: Any) -> None:
    duration = float(times[-1])
    window = max(duration / 300, min(60.0, duration / 30))
    counts = np.bincount((times / window).astype(int))[: int(duration // window)]
    axes.stairs(counts / window, np.arange(len(counts) + 1) * window, label=label, baseline=None, **look)
    axes.set(xlabel="s", ylabel="requests/s", title=f"Rate in windows of {_number(window)} s")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * counts.max() / window))


def _plot_gaps(axes: Axes, times: Times) -> None:
    gaps = np.sort(np.diff(times))
    # A few hundred points draw the same curve, closer together towards the longest gaps.
    shown = len(gaps) - np.unique(np.geomspace(1, len(gaps), 400).astype(int))
    axes.plot(gaps[shown], 1 - shown / len(gaps), color=_TRACE_COLOUR, label="trace")
    end = gaps[-1]
    x = np.linspace(0, end, 200)
    axes.plot(x, np.exp(-x / gaps.mean()), "--", color="0.5", label="exponential")
    axes.set(xlabel="gap, s", ylabel="share of longer gaps", title="Gaps between arrivals", yscale="log")
    axes.set_ylim(0.5 / len(gaps), 1.2)
    axes.legend()


def _plotted_windows(times: Times) -> Float64[np.ndarray, "window"]:
    return np.geomspace(0.1 / mean_rate(times), times[-1] / MIN_WINDOWS, 30)


def _plot_fano(axes: Axes, times: Times, **look: Any) -> None:
    windows = _plotted_windows(times)
    axes.plot(windows, [fano_factor(times, window)[0] for window in windows], **look)
    axes.set(xscale="log", yscale="log", xlabel="window, s", ylabel="variance / mean", title="Fano factor")


def _poisson_line(axes: Axes) -> None:
    axes.axhline(1, color="0.5", ls="--", lw=1, label="Poisson")
    axes.legend()

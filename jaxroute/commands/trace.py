"""Traces of a user's own: describe one, or fit an arrival process to it, which a few figures share.

python -m jaxroute trace describe FILE [--plot OUT.png]
python -m jaxroute trace fit FILE --out configs/workload/mine.yaml [--process gamma|mmpp] [--plot OUT.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from scipy.optimize import least_squares
from scipy.special import gammainc

from jaxroute.commands.arguments import parser_of, run_chosen, run_command
from jaxroute.config.choices import check_choice, usage_of_choice, write_choice
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import write_file
from jaxroute.plotting import REFERENCE_COLOUR, STYLE, png_bytes
from jaxroute.workloads import Trace, Workload, build_workload, read_trace
from jaxroute.workloads.arrivals import ArrivalParams, ArrivalProcess, ArrivalState, first_arrival_state
from jaxroute.workloads.traces import fano_factor, gap_variation, window_counts

_WINDOWS = (1.0, 10.0, 60.0)  # s, of the Fano factors that are printed
_MIN_WINDOWS = 20  # that a Fano factor should come from
_FITTED_WINDOWS = 16  # from one mean gap to the longest of which the trace holds _MIN_WINDOWS
_MIN_REQUESTS = 200  # of a fit: down to windows of ten gaps
_MISFIT = 0.1  # what a process of so few parameters may miss
_POOR = 0.2  # of a single figure
_MIN_CYCLES = 10  # bursts in a trace, so that their length and share mean something
_TIED = 0.05  # share of requests at the time of the one before, from which on the clock is said to be coarse
_DRAWS, _MAX_DRAWN, _STEPS = 16, 100_000, 2048

Times = Float64[np.ndarray, "request"]
Dispersion = Callable[[Float64[np.ndarray, "window"]], Float64[np.ndarray, "window"]]
"""Index of dispersion for counts, in windows of a length in mean gaps."""
_Starts = tuple[list[tuple[float, ...]], tuple[list[float], list[float]]]
"""Parameters to start a search from, and the lowest and highest values of each."""


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
    fit.add_argument("--process", choices=tuple(_FITS), help="arrival process; by default the one that fits better")
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
    for note in _reading_notes(trace):
        _say(console, note)
    if options.plot:
        _save(_plot_trace(trace), options.plot, console)


def _figures(times: Times) -> dict[str, str]:
    minutes, number = window_counts(times, 60.0)
    fewest = 0 if number > len(minutes) else minutes.min(initial=minutes.max(initial=0))
    return {
        "requests": f"{len(times)}",
        "duration": f"{times[-1]:.0f} s",
        "rate": f"{_number(_rate(times))} /s",
        "fewest and most in a minute": f"{fewest}, {minutes.max(initial=0)}" if number else "-",
        "CV of the gaps": _number(gap_variation(times)),
        **{f"Fano factor, {window:g} s": _fano_text(times, window) for window in _WINDOWS},
    }


def _fano_text(times: Times, window: float) -> str:
    factor, number = fano_factor(times, window)
    return _number(factor) if number >= _MIN_WINDOWS else "-"


def _reading_notes(trace: Trace) -> list[str]:
    notes = []
    if trace.failed:
        notes.append(f"Left out: {trace.failed} failed requests.")
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


def _rate(times: Times) -> float:
    return (len(times) - 1) / float(times[-1])


def _check_new(path: Path | None, option: str, suffix: str) -> None:
    """Refuse a file to write that exists, or of another kind."""
    if path is None:
        return
    if path.suffix != suffix:
        raise UserError(f"{option}={path} must end in {suffix}")
    if path.exists():
        raise UserError(f"{path} exists already; name another file")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _save(figure: Figure, path: Path, console: Console) -> None:
    write_file(path, png_bytes(figure))
    _say(console, f"Figure: {path}")


# --- fit ----------------------------------------------------------------------------------------------------


def gamma_dispersion(window: Float64[np.ndarray, "window"], cv: float) -> Float64[np.ndarray, "window"]:
    """Index of dispersion for counts of the stationary renewal process with gamma gaps of mean 1.

    Var N(t) = t - t^2 + 2 integral of the expected number of renewals after an arrival over (0, t) (Cox 1962, Renewal
    Theory, chapter 4), where the k-th renewal has passed with probability P(k shape, shape t), P the regularised
    incomplete gamma function. Var N(t) / t goes on as cv^2 + constant / t.

    Args:
        window: lengths of windows, in mean gaps.
        cv: coefficient of variation of the gaps.

    Returns:
        Variance / mean of the number of arrivals in each window.

    """
    shape = 1 / cv**2
    steady = 50 * (cv**2 + 1 / cv**2) + 50
    result = np.empty(len(window))
    for position, t in enumerate(window):
        within = min(t, steady)
        k = np.arange(1, 20 + within + 12 * cv * within**0.5 + 20 * cv**2)
        passed = within * gammainc(k * shape, shape * within) - k * gammainc(k * shape + 1, shape * within)
        factor = 1 - within + 2 / within * passed.sum()
        result[position] = cv**2 + (factor - cv**2) * within / t
    return result


def mmpp_dispersion(
    window: Float64[np.ndarray, "window"], ratio: float, share: float, length: float
) -> Float64[np.ndarray, "window"]:
    """Index of dispersion for counts of the mmpp of docs/reference/workloads.md.

    Args:
        window: lengths of windows, in mean gaps.
        ratio: rate in a burst / rate outside.
        share: of time in bursts.
        length: of a burst, in mean gaps.

    Returns:
        Variance / mean of the number of arrivals in each window.

    """
    quiet, burst, switching = _mmpp_rates(ratio, share, length)
    excess = 2 * share * (1 - share) * (burst - quiet) ** 2 / switching
    return 1 + excess * (1 + np.expm1(-switching * window) / (switching * window))


def mmpp_variation(ratio: float, share: float, length: float) -> float:
    """Coefficient of variation of the gaps of the mmpp, units as in `mmpp_dispersion`.

    A gap's second moment is 2 pi (R - Q)^-1 1 for rates R (diagonal), switching rates Q and their stationary state pi
    (Fischer and Meier-Hellstern 1993, The Markov-modulated Poisson process cookbook), written out for two states.
    """
    quiet, burst, switching = _mmpp_rates(ratio, share, length)
    return (2 * (switching + (1 - share) * burst + share * quiet) / (switching + quiet * burst) - 1) ** 0.5


def _mmpp_rates(ratio: float, share: float, length: float) -> tuple[float, float, float]:
    """Rate outside and in a burst, and the sum of the two rates of switching; relative to the mean rate."""
    quiet = 1 / (1 + share * (ratio - 1))
    return quiet, ratio * quiet, 1 / ((1 - share) * length)


class Fit(NamedTuple):
    """An arrival process with parameters, and how well it meets a trace."""

    process: str
    """gamma or mmpp."""
    options: dict[str, float]
    """Of the workload, rate included; seconds."""
    dispersion: Dispersion
    variation: float
    """Coefficient of variation of the gaps."""
    error: float = float("nan")
    """Typical relative error of the coefficient of variation and of the Fano factors, weighted as in the fit."""

    def fano_factor(self, window: float, duration: float) -> float:
        """Fano factor, over windows of so many s, to be expected from a trace of so many s."""
        rate = self.options["rate"]
        return float(_expected(self.dispersion, np.array([window]) * rate, duration * rate)[0])


def _expected(
    dispersion: Dispersion, window: Float64[np.ndarray, "window"], duration: float
) -> Float64[np.ndarray, "window"]:
    """Fano factors to be expected from a trace, times in mean gaps.

    The mean of counts that are correlated errs with them: from n windows side by side, with variance V each and W
    together, the unbiased estimate of V expects (V - W / n^2) n / (n - 1).
    """
    number = duration // window
    return (dispersion(window) - dispersion(number * window) / number) * number / (number - 1)


class _Target(NamedTuple):
    """What a fit should meet; times in mean gaps."""

    window: Float64[np.ndarray, "window"]
    fano: Float64[np.ndarray, "window"]
    variation: float
    duration: float

    def residuals(self, fit: Fit) -> Float64[np.ndarray, "residual"]:
        """Logarithms of fitted / measured: all Fano factors together weigh as much as the gaps' variation.

        One over n windows has the variance 2 / n by chance, and may miss by 10 % beside, as no trace is quite a gamma
        or mmpp process: so the few longest windows do not decide.
        """
        weight = 1 / (_MISFIT**2 + 2 / (self.duration // self.window))
        with np.errstate(divide="ignore", invalid="ignore"):
            fano = np.log(_expected(fit.dispersion, self.window, self.duration) / self.fano)
        gaps = np.log(fit.variation / self.variation)
        residuals = np.append((weight / weight.sum() / 2) ** 0.5 * fano, gaps / 2**0.5)
        # A parameter at the end of its range may leave a window without any variance: far off, and finite.
        return np.nan_to_num(residuals, nan=10.0, posinf=10.0, neginf=-10.0)


def _gamma(parameters: Float64[np.ndarray, "parameter"], rate: float) -> Fit:
    """From the logarithm of the gaps' coefficient of variation."""
    cv = float(np.exp(parameters[0]))
    return Fit("gamma", {"rate": rate, "cv": cv}, partial(gamma_dispersion, cv=cv), cv)


def _mmpp(parameters: Float64[np.ndarray, "parameter"], rate: float) -> Fit:
    """From the logarithms of the rates' ratio - 1, of the length of a burst and of that of the quiet between two."""
    above, burst, quiet = map(float, np.exp(parameters))
    ratio, share = 1 + above, min(burst / (burst + quiet), 0.9999)  # below 1, also as written
    return Fit(
        "mmpp",
        {"rate": rate, "burst_ratio": ratio, "burst_share": share, "burst_seconds": burst / rate},
        partial(mmpp_dispersion, ratio=ratio, share=share, length=burst),
        mmpp_variation(ratio, share, burst),
    )


def _gamma_starts(target: _Target) -> _Starts:
    bounds = ([np.log(0.05)], [np.log(30.0)])
    return [(float(np.clip(np.log(target.variation), bounds[0][0] + 0.01, bounds[1][0] - 0.01)),)], bounds


def _mmpp_starts(target: _Target) -> _Starts:
    """Bursts and quiet of at least two gaps, as more switches per gap are not simulated, up to the whole trace."""
    longest = np.log(target.duration)
    bounds = ([-4.0, np.log(2.0), np.log(2.0)], [7.0, longest, longest])
    # On 73 traces of all kinds, four starts found what 32 did.
    lengths = (np.log(4.0), longest - 1)
    return [(1.0, burst, quiet) for burst in lengths for quiet in lengths], bounds


_FITS: dict[str, tuple[Callable[[Float64[np.ndarray, "parameter"], float], Fit], Callable[[_Target], _Starts]]] = {
    "gamma": (_gamma, _gamma_starts),
    "mmpp": (_mmpp, _mmpp_starts),
}


def fit_arrivals(arrival_time: Times, processes: Sequence[str] = ("gamma", "mmpp")) -> list[Fit]:
    """Fit arrival processes to a trace, the one to take first.

    Each is fitted by least squares to the logarithms of the gaps' coefficient of variation and of the Fano factors over
    16 windows, from one mean gap to a twentieth of the trace. mmpp, with two parameters more, comes first only if
    gamma's error is more than 10 % and more than twice its own.

    Args:
        arrival_time: s since the first request, never falling.
        processes: which to fit: gamma, mmpp.

    Raises:
        UserError: fewer than 200 requests, or gaps that are all equal.

    """
    if len(arrival_time) < _MIN_REQUESTS:
        raise UserError(f"the trace has {len(arrival_time)} requests; a fit needs at least {_MIN_REQUESTS}")
    rate = _rate(arrival_time)
    duration = float(arrival_time[-1]) * rate
    windows = np.geomspace(1.0, duration / _MIN_WINDOWS, _FITTED_WINDOWS)
    fano = np.array([fano_factor(arrival_time, window / rate)[0] for window in windows])
    variation = gap_variation(arrival_time)
    varied = fano > 0
    if variation < 1e-6 or not varied.any():
        raise UserError("the trace's gaps are all equal, and no arrival process here is so regular; replay the trace")
    target = _Target(windows[varied], fano[varied], variation, duration)
    fits = [_fitted(name, target, rate) for name in processes]
    fits.sort(key=lambda fit: fit.error)
    if fits[0].process == "mmpp" and len(fits) > 1 and fits[1].error <= max(2 * fits[0].error, _MISFIT):
        fits.reverse()
    return fits


def _fitted(name: str, target: _Target, rate: float) -> Fit:
    build, starts_of = _FITS[name]
    starts, bounds = starts_of(target)
    found = [
        least_squares(lambda parameters: target.residuals(build(parameters, rate)), start, bounds=bounds)
        for start in starts
    ]
    best = min(found, key=lambda result: result.cost)
    return build(best.x, rate)._replace(error=float(np.expm1((2 * best.cost) ** 0.5)))


# --- synthetic traces ---------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="process")
def _gaps(
    process: ArrivalProcess, params: ArrivalParams, states: ArrivalState, keys: PRNGKeyArray
) -> tuple[ArrivalState, Float[Array, "trace gap"]]:
    """Go on with each trace by a fixed number of gaps, so that traces of any length need one compilation."""

    def step(state: ArrivalState, key: PRNGKeyArray) -> tuple[ArrivalState, Float[Array, ""]]:
        gap, state = process(key, state, params)
        return state, gap

    return jax.vmap(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, _STEPS)))(states, keys)


def synthetic_times(workload: Workload, num_requests: int, seed: int = 0) -> list[Times]:
    """Arrival times, s, of 16 independent traces of a workload."""
    key_start, key_gaps = jax.random.split(jax.random.key(seed))
    starts = jax.random.split(key_start, _DRAWS)
    states = jax.vmap(first_arrival_state, in_axes=(0, None))(starts, workload.params)
    parts = []
    for key in jax.random.split(key_gaps, -(-(num_requests - 1) // _STEPS)):
        states, gaps = _gaps(workload.process, workload.params, states, jax.random.split(key, _DRAWS))
        parts.append(np.asarray(gaps, np.float64))
    gaps = np.concatenate(parts, axis=1)[:, : num_requests - 1] / workload.rate
    return [np.concatenate([[0.0], np.cumsum(row)]) for row in gaps]


# --- the command --------------------------------------------------------------------------------------------


def _fit(options: argparse.Namespace, console: Console) -> None:
    check_choice("workload", options.out)
    _check_new(options.plot, "--plot", ".png")
    trace = _read(options.file)
    times = trace.arrival_time
    use_compilation_cache()
    with console.status("fitting"):
        try:
            fits = fit_arrivals(times, [options.process] if options.process else tuple(_FITS))
        except UserError as error:
            raise UserError(f"{options.file}: {error}") from None
    fit = fits[0]
    longest = float(times[-1]) / _MIN_WINDOWS
    windows = [*(window for window in _WINDOWS if window < longest), longest]
    text = _workload_yaml(options.out.stem, fit, trace, windows)

    config = write_choice("workload", options.out, text).workload
    with console.status("drawing"):
        drawn = synthetic_times(build_workload(config, None), min(len(times), _MAX_DRAWN))
    console.print(_comparison(times, fit, windows, drawn))
    for note in [*_reading_notes(trace), *_fit_notes(times, fits, windows, longest)]:
        _say(console, note)
    if options.plot:
        _save(_plot_fit(times, fit, drawn), options.plot, console)
    _say(console, f"Workload: {options.out}")
    _say(console, f"Use it with: {usage_of_choice('workload', options.out)}")


def _measured(times: Times, windows: Sequence[float]) -> list[float]:
    return [_rate(times), gap_variation(times), *(fano_factor(times, window)[0] for window in windows)]


def _of_fit(fit: Fit, windows: Sequence[float], duration: float) -> list[float]:
    return [fit.options["rate"], fit.variation, *(fit.fano_factor(window, duration) for window in windows)]


def _names(windows: Sequence[float]) -> list[str]:
    return ["rate, 1/s", "CV of the gaps", *(f"Fano factor, {_number(window)} s" for window in windows)]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _comparison(times: Times, fit: Fit, windows: Sequence[float], drawn: list[Times]) -> Table:
    columns = ("trace", f"fit ({fit.process})", f"{_DRAWS} synthetic traces")
    grid = Table("", *(Column(name, justify="right") for name in columns))
    synthetic = np.array([_measured(draw, windows) for draw in drawn])
    rows = (_names(windows), _measured(times, windows), _of_fit(fit, windows, float(times[-1])), synthetic.T)
    for name, measured, fitted, drawn_figures in zip(*rows, strict=True):
        # A window may be too long for synthetic traces that were cut.
        spread = f"{_number(drawn_figures.mean())} ± {drawn_figures.std(ddof=1):.2g}"
        grid.add_row(name, _number(measured), _number(fitted), "-" if np.isnan(drawn_figures).any() else spread)
    return grid


def _fit_notes(times: Times, fits: list[Fit], windows: Sequence[float], longest: float) -> list[str]:
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


def _workload_yaml(name: str, fit: Fit, trace: Trace, windows: Sequence[float]) -> str:
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
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (over_time, gaps), (fano, lengths) = figure.subplots(2, 2)
    _plot_rate(over_time, times, "trace", color=_TRACE_COLOUR)
    _plot_gaps(gaps, times)
    _plot_fano(fano, times, color=_TRACE_COLOUR, label="trace")
    _poisson_line(fano)
    ends = np.concatenate([trace.prompt_tokens, trace.output_tokens, [1]])
    bins = np.geomspace(1, ends.max() + 1, 50)
    for name, tokens, colour in (
        ("prompt", trace.prompt_tokens, _TRACE_COLOUR),
        ("output", trace.output_tokens, REFERENCE_COLOUR),
    ):
        lengths.hist(np.maximum(tokens, 1), bins, histtype="step", color=colour, label=name)
    lengths.set(xscale="log", xlabel="tokens", ylabel="requests", title="Lengths")
    lengths.legend()
    return figure


@mpl.rc_context(STYLE)
def _plot_fit(times: Times, fit: Fit, drawn: list[Times]) -> Figure:
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
    return np.geomspace(0.1 / _rate(times), times[-1] / _MIN_WINDOWS, 30)


def _plot_fano(axes: Axes, times: Times, **look: Any) -> None:
    windows = _plotted_windows(times)
    axes.plot(windows, [fano_factor(times, window)[0] for window in windows], **look)
    axes.set(xscale="log", yscale="log", xlabel="window, s", ylabel="variance / mean", title="Fano factor")


def _poisson_line(axes: Axes) -> None:
    axes.axhline(1, color="0.5", ls="--", lw=1, label="Poisson")
    axes.legend()

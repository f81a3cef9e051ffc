"""Fit an arrival process to a recorded trace, and draw synthetic traces from a workload to compare.

A process is fitted to how the trace varies: the gaps' coefficient of variation, and the Fano factor (variance / mean of
the number of arrivals) over windows of many lengths. Formulas give both for each process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray
from scipy.optimize import least_squares
from scipy.special import gammainc

from jaxroute.errors import UserError
from jaxroute.workloads import Workload
from jaxroute.workloads.arrivals import ArrivalParams, ArrivalProcess, ArrivalState, first_arrival_state
from jaxroute.workloads.traces import fano_factor, gap_variation

MIN_WINDOWS = 20
"""The fewest windows from which a Fano factor should come."""
NUM_SYNTHETIC = 16
"""Traces that `synthetic_times` draws."""
_FITTED_WINDOWS = 16  # from one mean gap to the longest of which the trace holds MIN_WINDOWS
_MIN_REQUESTS = 200  # of a fit: down to windows of ten gaps
_MISFIT = 0.1  # what a process of so few parameters may miss
_STEPS = 2048

Times = Float64[np.ndarray, "request"]
Dispersion = Callable[[Float64[np.ndarray, "window"]], Float64[np.ndarray, "window"]]
"""Index of dispersion for counts as a function of the windows' length, in mean gaps."""
_Starts = tuple[list[tuple[float, ...]], tuple[list[float], list[float]]]
"""Parameters to start a search from, and the lowest and highest values of each."""


def mean_rate(times: Times) -> float:
    """Return the requests per second of a trace that begins at 0 s."""
    return (len(times) - 1) / float(times[-1])


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


class ArrivalFit(NamedTuple):
    """An arrival process with parameters, and how well it reproduces a trace."""

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
        """Return the Fano factor that a trace of `duration` s should show over windows of `window` s."""
        rate = self.options["rate"]
        return float(_expected(self.dispersion, np.array([window]) * rate, duration * rate)[0])


def _expected(
    dispersion: Dispersion, window: Float64[np.ndarray, "window"], duration: float
) -> Float64[np.ndarray, "window"]:
    """Fano factors to be expected from a trace, times in mean gaps.

    The mean of counts that are correlated errs with them: from n adjacent windows, with variance V each and W
    together, the unbiased estimate of V expects (V - W / n^2) n / (n - 1).
    """
    number = duration // window
    return (dispersion(window) - dispersion(number * window) / number) * number / (number - 1)


class _Target(NamedTuple):
    """What a fit should reproduce; times in mean gaps."""

    window: Float64[np.ndarray, "window"]
    fano: Float64[np.ndarray, "window"]
    variation: float
    duration: float

    def residuals(self, fit: ArrivalFit) -> Float64[np.ndarray, "residual"]:
        """Logarithms of fitted / measured: all Fano factors together weigh as much as the gaps' variation.

        One over n windows has the variance 2 / n by chance, and may miss by 10 % besides, as no trace is quite a gamma
        or mmpp process: so the few longest windows do not decide.
        """
        weight = 1 / (_MISFIT**2 + 2 / (self.duration // self.window))
        with np.errstate(divide="ignore", invalid="ignore"):
            fano = np.log(_expected(fit.dispersion, self.window, self.duration) / self.fano)
        gaps = np.log(fit.variation / self.variation)
        residuals = np.append((weight / weight.sum() / 2) ** 0.5 * fano, gaps / 2**0.5)
        # A parameter at the end of its range may leave a window without any variance: far off, and finite.
        return np.nan_to_num(residuals, nan=10.0, posinf=10.0, neginf=-10.0)


def _gamma(parameters: Float64[np.ndarray, "parameter"], rate: float) -> ArrivalFit:
    """Build a fit from the logarithm of the gaps' coefficient of variation."""
    cv = float(np.exp(parameters[0]))
    return ArrivalFit("gamma", {"rate": rate, "cv": cv}, partial(gamma_dispersion, cv=cv), cv)


def _mmpp(parameters: Float64[np.ndarray, "parameter"], rate: float) -> ArrivalFit:
    """Build a fit from the logarithms of the rates' ratio - 1, and of the lengths of a burst and of a quiet spell."""
    above, burst, quiet = map(float, np.exp(parameters))
    ratio, share = 1 + above, min(burst / (burst + quiet), 0.9999)  # below 1, also as written
    return ArrivalFit(
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


_FITS: dict[
    str, tuple[Callable[[Float64[np.ndarray, "parameter"], float], ArrivalFit], Callable[[_Target], _Starts]]
] = {
    "gamma": (_gamma, _gamma_starts),
    "mmpp": (_mmpp, _mmpp_starts),
}


PROCESSES = tuple(_FITS)
"""What can be fitted."""


def fit_arrivals(arrival_time: Times, processes: Sequence[str] = PROCESSES) -> list[ArrivalFit]:
    """ArrivalFit arrival processes to a trace, the one to take first.

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
    rate = mean_rate(arrival_time)
    duration = float(arrival_time[-1]) * rate
    windows = np.geomspace(1.0, duration / MIN_WINDOWS, _FITTED_WINDOWS)
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


def _fitted(name: str, target: _Target, rate: float) -> ArrivalFit:
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
    """Continue each trace by a fixed number of gaps, so that traces of any length need one compilation."""

    def step(state: ArrivalState, key: PRNGKeyArray) -> tuple[ArrivalState, Float[Array, ""]]:
        gap, state = process(key, state, params)
        return state, gap

    return jax.vmap(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, _STEPS)))(states, keys)


def synthetic_times(workload: Workload, num_requests: int, seed: int = 0) -> list[Times]:
    """Arrival times, s, of 16 independent traces of a workload."""
    key_start, key_gaps = jax.random.split(jax.random.key(seed))
    starts = jax.random.split(key_start, NUM_SYNTHETIC)
    states = jax.vmap(first_arrival_state, in_axes=(0, None))(starts, workload.params)
    parts = []
    for key in jax.random.split(key_gaps, -(-(num_requests - 1) // _STEPS)):
        states, gaps = _gaps(workload.process, workload.params, states, jax.random.split(key, NUM_SYNTHETIC))
        parts.append(np.asarray(gaps, np.float64))
    gaps = np.concatenate(parts, axis=1)[:, : num_requests - 1] / workload.rate
    return [np.concatenate([[0.0], np.cumsum(row)]) for row in gaps]

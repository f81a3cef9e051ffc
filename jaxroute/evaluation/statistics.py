"""Confidence intervals over independent episodes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom, where the expansion below is too coarse.
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Interval(NamedTuple):
    """A mean over episodes and the half-width of its 95 % confidence interval: mean - ci95 to mean + ci95."""

    mean: float
    ci95: float


def student_t_975(degrees_of_freedom: int) -> float:
    """97.5 % quantile of Student's t distribution, to better than 1e-3.

    A table up to 10 degrees of freedom, then the expansion around the normal
    quantile (Abramowitz and Stegun 1964, 26.7.5, four terms).
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, not {degrees_of_freedom}")
    if degrees_of_freedom <= len(_T_975):
        return _T_975[degrees_of_freedom - 1]
    n, z = degrees_of_freedom, 1.959963985
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def mean_ci95(values: Float[np.ndarray, " episode"]) -> Interval:
    """Mean over episodes with its Student-t confidence interval.

    Episodes without a value (nan: nothing was measured, such as a latency where no request was completed) are left out.
    One episode says nothing about the spread, so its ci95 is nan; without any, the mean is nan as well.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, math.nan)
    return Interval(mean, student_t_975(n - 1) * float(values.std(ddof=1)) / math.sqrt(n))


def paired_difference(a: Float[np.ndarray, " episode"], b: Float[np.ndarray, " episode"]) -> Interval:
    """Mean of `a - b` with its confidence interval, for policies that met the same requests.

    With common random numbers, episode i is the same sequence of requests for both. Most of the variance cancels in the
    difference, and its interval is far narrower than those of `a` and `b` suggest.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values need the same episodes: {a.shape} and {b.shape}")
    return mean_ci95(a - b)


def interquartile_mean(values: Float[np.ndarray, " n"]) -> float:
    """Mean without the lowest and the highest quarter (rounded down), as rliable takes it over training seeds.

    Less swayed by one bad run than the mean, steadier than the median (Agarwal et al. 2021, "Deep Reinforcement
    Learning at the Edge of the Statistical Precipice"). Of fewer than four values it is the mean.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Rank from 1, the highest value; equal values share the mean of their ranks, nan comes last."""
    values = np.nan_to_num(np.asarray(values, np.float64), nan=-np.inf)
    higher = (values[None, :] > values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return higher + (equal + 1) / 2

"""Predictions without a predictor: the true outcomes seen through noise, as good as a measured predictor's.

docs/reference/workloads.md has the formulas.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from jaxroute.banks.measures import auc, own_r2, r2
from jaxroute.banks.outcomes import Outcomes, Predicted, sigmoid
from jaxroute.errors import UserError


@dataclass
class NoiseConfig:
    """How good the router's predictor is, on the train prompts, pooled over the site's distinct LLMs.

    A real predictor mostly learns how hard a prompt is and how long its answers are for all LLMs alike, and
    little about which LLM does better. The two are separate figures: the second decides what routing by quality
    alone can gain.
    """

    quality_auc: float = 0.826
    """Area under the ROC curve of the predicted quality. For graded quality: how often the better of two answers has
    the higher prediction, which is the same thing for quality 0 or 1."""
    quality_own_r2: float = 0.010
    """R2 of the predicted quality's deviation from the prompt's mean over LLMs."""
    length_r2: float = 0.561
    """R2 of the predicted log length."""
    length_own_r2: float = 0.087
    """R2 of the predicted log length's deviation from the prompt's mean over LLMs."""

    def __post_init__(self) -> None:
        if not 0.5 < self.quality_auc < 1:
            raise UserError(
                f"bank.noise.quality_auc={self.quality_auc} is not between 0.5 and 1 (both excluded): "
                "give the AUC of your predictor, e.g. 0.8"
            )
        for name in ("quality_own_r2", "length_r2", "length_own_r2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"bank.noise.{name}={getattr(self, name)} is not in [0, 1): give the R2 of your predictor"
                )


def predict_through_noise(
    outcomes: Outcomes, calibration: Bool[np.ndarray, "prompt"], config: NoiseConfig, seed: int
) -> Predicted:
    """Predict quality and log length of every row, as well as configured on the calibration rows.

    Quality and log length are each split into a part shared by all LLMs of a prompt and an own part of each
    LLM. The predictor sees the four parts through Gaussian noise and nothing else. Both predictions are
    regressions on the shared signals of both and on the LLM's own signal: so the predicted length tells a
    router nothing about quality that the predicted quality does not already hold. The strengths of the
    signals are those at which the regressions reach the configured figures on the calibration rows.

    Raises:
        UserError: no strength reaches one of the figures on these LLMs.
    """
    streams = np.random.SeedSequence([seed, zlib.crc32(b"predictor")]).spawn(2)
    quality = _Signals(outcomes.quality, calibration, streams[0], _logistic_regression)
    length = _Signals(np.log(outcomes.output_tokens), calibration, streams[1], _linear_regression)
    # The strengths depend on each other a little, since the regressions share signals: two rounds settle it.
    for _ in range(2):
        _tune(length, quality, r2, config, "length_r2", "length_own_r2")
        _tune(quality, length, auc, config, "quality_auc", "quality_own_r2")
    log_length = length.predict(quality)
    error = (length.truth - log_length)[calibration].std(axis=0)
    return Predicted(quality.predict(length), log_length, error)


class _Signals:
    """An outcome's shared and own part, each seen through noise, and the regression of the outcome on them.

    A strength r in [0, 1] gives sqrt(r) * part + sqrt(1 - r) * noise, both with variance 1, so that r is the
    share of the signal's variance that the part makes up.
    """

    def __init__(
        self,
        truth: Float[np.ndarray, "prompt llm"],
        calibration: Bool[np.ndarray, "prompt"],
        stream: np.random.SeedSequence,
        regression: Callable[..., Float[np.ndarray, "prompt llm"]],
    ) -> None:
        self.truth, self.calibration, self.regression = truth, calibration, regression
        self.shared_strength, self.own_strength = 0.0, 0.0
        # One stream each, so that the noise of the calibration rows, which come first in a generated bank,
        # does not depend on the number of rows after them.
        shared_rng, own_rng = (np.random.default_rng(child) for child in stream.spawn(2))
        deviation = truth - truth[calibration].mean(axis=0)
        shared = deviation.mean(axis=1, keepdims=True)
        self._shared = _standardise(shared, calibration)
        self._shared_noise = shared_rng.standard_normal(shared.shape)
        self._own = _standardise(deviation - shared, calibration)
        # Own parts of a prompt sum to zero. Noise that did not would be revealed by the sum of the signals.
        noise = own_rng.standard_normal(truth.shape)
        self._own_noise = _standardise(noise - noise.mean(axis=1, keepdims=True), calibration)

    def shared(self) -> Float[np.ndarray, "prompt 1"]:
        """Signal of the shared part."""
        r = self.shared_strength
        return np.sqrt(r) * self._shared + np.sqrt(1 - r) * self._shared_noise

    def own(self) -> Float[np.ndarray, "prompt llm"]:
        """Signal of the own parts."""
        r = self.own_strength
        return np.sqrt(r) * self._own + np.sqrt(1 - r) * self._own_noise

    def predict(self, other: _Signals) -> Float[np.ndarray, "prompt llm"]:
        """Regress on the own signals and the shared signals of both, per LLM, and predict every row."""
        shared, own = self.shared(), self.own()
        # The square bends the curve where the shared part is far from normal (most prompts of a domain easy).
        common = np.concatenate([np.ones_like(shared), shared, shared**2, other.shared()], axis=1)
        features = np.stack([np.column_stack([common, signal]) for signal in own.T])
        return self.regression(features, self.truth, self.calibration)


def _standardise(part: np.ndarray, calibration: Bool[np.ndarray, "prompt"]) -> np.ndarray:
    """Scale to variance 1 on the calibration rows; what does not vary (a lone LLM's own part) becomes 0."""
    scale = part[calibration].std()
    return part / scale if scale > 1e-9 else np.zeros_like(part)


def _tune(
    signals: _Signals,
    other: _Signals,
    score: Callable[[np.ndarray, np.ndarray], float],
    figures: NoiseConfig,
    score_name: str,
    own_name: str,
) -> None:
    """Set an outcome's two strengths so that score and own R2 match the figures on the calibration rows."""
    known = signals.truth[signals.calibration]
    target, own_target = getattr(figures, score_name), getattr(figures, own_name)

    def shared_score(strength: float) -> float:
        signals.shared_strength = strength
        return score(known, signals.predict(other)[signals.calibration])

    def own_score(strength: float) -> float:
        signals.own_strength = strength
        return own_r2(known, signals.predict(other)[signals.calibration])

    # Slopes that differ between LLMs may by themselves predict more of the own parts than asked for: the
    # strength is then 0. So it is for a lone LLM, which has no own part.
    signals.own_strength = _solve(own_score, own_target, own_score(0.0), own_score(1.0))
    low, high = shared_score(0.0), shared_score(1.0)
    if not low <= target <= high:
        raise UserError(
            f"bank.noise.{score_name}={target:g} is out of reach for this site's LLMs and the other "
            f"figures: choose a value between {low:.3f} and {high:.3f}, or change bank.noise.{own_name}"
        )
    signals.shared_strength = _solve(shared_score, target, low, high)


def _solve(increasing: Callable[[float], float], target: float, at_zero: float, at_one: float) -> float:
    """Where an increasing function on [0, 1] meets the target, or the nearer end: damped regula falsi."""
    if target <= at_zero:
        return 0.0
    if target >= at_one:
        return 1.0
    left, below, right, above = 0.0, at_zero - target, 1.0, at_one - target
    for _ in range(20):
        middle = (left * above - right * below) / (above - below)
        error = increasing(middle) - target
        if abs(error) < 1e-4:
            break
        # The end that stays counts half: without it the search creeps along a bent curve.
        if error < 0:
            left, below, above = middle, error, above / 2
        else:
            right, above, below = middle, error, below / 2
    return middle


def _linear_regression(
    features: Float[np.ndarray, "llm prompt feature"],
    truth: Float[np.ndarray, "prompt llm"],
    calibration: Bool[np.ndarray, "prompt"],
) -> Float[np.ndarray, "prompt llm"]:
    """Least squares per LLM on the calibration rows, evaluated on every row."""
    known = features[:, calibration]
    transposed = known.swapaxes(1, 2)
    # The small ridge is for features that do not vary.
    gram = transposed @ known + 1e-6 * np.eye(known.shape[2])
    weights = np.linalg.solve(gram, transposed @ truth[calibration].T[:, :, None])
    return (features @ weights)[..., 0].T


def _logistic_regression(
    features: Float[np.ndarray, "llm prompt feature"],
    truth: Float[np.ndarray, "prompt llm"],
    calibration: Bool[np.ndarray, "prompt"],
) -> Float[np.ndarray, "prompt llm"]:
    """Logistic regression per LLM by Newton's method on the calibration rows, evaluated on every row.

    It fits the expected outcome from 0 to 1, so that graded qualities need nothing else.
    """
    known, target = features[:, calibration], truth[calibration].T[:, :, None]
    transposed = known.swapaxes(1, 2)
    penalty = 1e-3  # keeps the weights finite where an LLM is always right
    weights = np.zeros((len(known), known.shape[2], 1))
    for _ in range(25):
        probability = sigmoid(known @ weights)
        gradient = transposed @ (target - probability) - penalty * weights
        hessian = transposed @ (probability * (1 - probability) * known) + penalty * np.eye(known.shape[2])
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-3:  # convergence is quadratic
            break
    return sigmoid(features @ weights)[..., 0].T

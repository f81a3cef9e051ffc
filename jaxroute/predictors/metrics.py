"""How good predictions are: order, explained variance, calibration, and what routing by quality gains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxroute.banks import measures
from jaxroute.predictors.predictor import Answers

BINS = 10


class Reliability(NamedTuple):
    """Answers in bins of about equal size, sorted by prediction: means of each bin, and its share of all answers."""

    predicted: Float[np.ndarray, "bin"]
    observed: Float[np.ndarray, "bin"]
    share: Float[np.ndarray, "bin"]


def measure(truth: Answers, predicted: Answers) -> dict[str, float]:
    """Measure predictions on the answers that are known and predicted; NaN where there is none.

    Returns:
        quality_auc: pooled over LLMs; of two answers of different quality, how often the better one has the higher
            prediction.
        llm_auc: the same within an LLM, mean over LLMs.
        quality_own_r2, length_r2, length_own_r2: as `bank.noise` defines them.
        brier: mean squared error of quality.
        calibration_error: expected calibration error (Naeini et al. 2015), over bins of equal size.
        routed: mean quality if each prompt goes to the LLM of the best predicted quality.
        best_single: mean quality of the LLM that is best for all of these prompts, known afterwards.
        oracle: mean quality of each prompt's best LLM.

    """
    quality, predicted_quality = _known(truth.quality, predicted.quality)
    bins = reliability(truth.quality, predicted.quality)
    whole, predicted_whole = _complete(truth.quality, predicted.quality)
    choice = predicted_whole.argmax(axis=1)
    return {
        "quality_auc": auc(quality, predicted_quality),
        "llm_auc": _mean(np.array([auc(*pair) for pair in zip(truth.quality.T, predicted.quality.T, strict=True)])),
        "quality_own_r2": own_r2(whole, predicted_whole),
        "length_r2": r2(truth.log_length, predicted.log_length),
        "length_own_r2": own_r2(*_complete(truth.log_length, predicted.log_length)),
        "brier": _mean((quality - predicted_quality) ** 2),
        "calibration_error": float(bins.share @ np.abs(bins.predicted - bins.observed))
        if len(quality)
        else float("nan"),
        "routed": _mean(whole[np.arange(len(whole)), choice]),
        "best_single": _mean(whole[:, whole.sum(axis=0).argmax()]),
        "oracle": _mean(whole.max(axis=1)),
    }


def auc(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Area under the ROC curve over the known cells, as banks compute it; NaN if all are equally good."""
    truth, prediction = _known(truth, prediction)
    if len(np.unique(truth)) < 2:
        return float("nan")
    # The order of the cells decides ties: the mean over both orders counts a tie as half.
    return (measures.auc(truth, prediction) + measures.auc(truth[::-1], prediction[::-1])) / 2


def r2(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Coefficient of determination over the known cells; NaN if they do not vary."""
    truth, prediction = _known(truth, prediction)
    return measures.r2(truth, prediction) if len(np.unique(truth)) > 1 else float("nan")


def own_r2(truth: Float[np.ndarray, "prompt llm"], prediction: Float[np.ndarray, "prompt llm"]) -> float:
    """R2 of the deviation from the prompt's mean over LLMs, as banks compute it; NaN without prompts or for one LLM."""
    return measures.own_r2(truth, prediction) if truth.shape[1] > 1 and len(truth) else float("nan")


def reliability(truth: np.ndarray, prediction: np.ndarray) -> Reliability:
    """Sort the known cells by prediction into `BINS` bins."""
    truth, prediction = _known(truth, prediction)
    order = np.argsort(prediction, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return Reliability(
        np.array([prediction[part].mean() for part in bins]),
        np.array([truth[part].mean() for part in bins]),
        np.array([len(part) / len(order) for part in bins]),
    )


def _known(truth: np.ndarray, prediction: np.ndarray) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    known = ~(np.isnan(truth) | np.isnan(prediction))
    return truth[known], prediction[known]


def _complete(
    truth: Float[np.ndarray, "prompt llm"], prediction: Float[np.ndarray, "prompt llm"]
) -> tuple[Float[np.ndarray, "prompt llm"], Float[np.ndarray, "prompt llm"]]:
    complete = ~(np.isnan(truth) | np.isnan(prediction)).any(axis=1)
    return truth[complete], prediction[complete]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

"""How good predictions of answers are: explained variance and order."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxroute.errors import UserError


def r2(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Coefficient of determination, pooled over all cells."""
    return float(1 - ((truth - prediction) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def own_r2(truth: Float[np.ndarray, "prompt llm"], prediction: Float[np.ndarray, "prompt llm"]) -> float:
    """R2 of the deviation from the prompt's mean over LLMs, each LLM's average taken out."""
    own, predicted_own = (
        deviation - deviation.mean(axis=1, keepdims=True)
        for deviation in (truth - truth.mean(axis=0), prediction - prediction.mean(axis=0))
    )
    return float(1 - ((own - predicted_own) ** 2).sum() / np.maximum((own**2).sum(), 1e-12))


def auc(quality: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, pooled over all cells, for scores without ties.

    For graded qualities it is the share of the pairs of different quality that the score orders correctly, which
    for two grades is that area. Grades that differ do so first in one binary digit of their rank: among the cells
    that agree in the digits above it, the pairs are counted as for two grades.
    """
    grades, grade, count = np.unique(quality, return_inverse=True, return_counts=True)
    pairs = (quality.size**2 - (count**2).sum()) // 2
    if pairs == 0:
        raise UserError(
            "all answers of the site's LLMs are equally good in this bank (always right or always wrong), so that "
            "there is nothing to predict: choose other LLMs under bank.models"
        )
    grade = grade.ravel()[np.argsort(score, axis=None, kind="stable")]
    ordered = 0
    for digit in range((len(grades) - 1).bit_length()):
        above = grade >> digit + 1
        order = np.argsort(above, kind="stable")  # keeps the order of the score
        above, high = above[order], grade[order] >> digit & 1 == 1
        lower = np.concatenate([[0], np.cumsum(~high)])
        ordered += (lower[:-1] - lower[np.searchsorted(above, above)])[high].sum()
    return float(ordered / pairs)

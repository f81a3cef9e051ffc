"""Hybrid LLM (arXiv 2404.14618): the probability, from a prompt's text, that a small LLM's answer is good enough.

H = q(small) - q(large) is the gap between two answers to one prompt. Three labels y, of which a head learns p = E[y]
by binary cross-entropy, and the small LLM gets the prompt if p exceeds a threshold:

    det     1[H >= 0] of one answer each, as if an LLM always answered alike
    prob    Pr[H >= 0] over all pairs of answers
    trans   Pr[H >= -t] over all pairs; t maximises the mean difference of labels between two prompts

A head is a logistic regression on the features of `jaxroute.predictors.features`. Where answers are right or wrong,
every t below 1 gives the labels of prob, and with one answer each all three are one score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, hstack

from jaxroute.predictors.features import Encoded, count, fit_features
from jaxroute.predictors.model import FOLDS

SCORES = ("det", "prob", "trans")
GAP = "gap"
"""The score of a router that predicts both qualities: predicted quality of the small LLM minus that of the large."""

MAX_DROP = 1.0
"""Quality drop, %, that a threshold may cost on validation prompts."""
VALIDATION = 500
"""Validation prompts, as in the paper; at most a quarter of those that are not for testing."""

_GRID = np.linspace(0, 1, 101)
# Of the squared weights, against the sum of cross-entropies. Of 0.3, 1 and 3 it has the least mean quality drop on the
# published tables, by little.
_PENALTY = 3.0
_ITERATIONS = 100


# --- answers and labels ------------------------------------------------------------------------------------------


def by_text(
    prompts: Sequence[str], quality: Float[np.ndarray, "row llm"]
) -> tuple[list[str], Float[np.ndarray, "prompt answer llm"], Int[np.ndarray, "row"]]:
    """Gather the rows of each text: they are several answers to one prompt.

    Returns:
        The texts, each once, in the order of their first row; the qualities of the answers, NaN beyond the last; and
        each row's prompt.

    """
    number: dict[str, int] = {}
    prompt_of_row = np.array([number.setdefault(prompt, len(number)) for prompt in prompts], int)
    order = np.argsort(prompt_of_row, kind="stable")
    answers = np.bincount(prompt_of_row, minlength=len(number))
    place = np.arange(len(order)) - np.repeat(np.cumsum(answers) - answers, answers)
    gathered = np.full((len(number), answers.max(initial=1), quality.shape[1]), np.nan)
    gathered[prompt_of_row[order], place] = quality[order]
    return list(number), gathered, prompt_of_row


def graded(
    quality: Float[np.ndarray, "row llm"], tokens: Float[np.ndarray, "row llm"], brevity: float
) -> Float[np.ndarray, "row llm"]:
    """Return (1 - brevity) quality + brevity max(1 - tokens / 1000, 0), which grades right answers too."""
    return (1 - brevity) * quality + brevity * np.maximum(1 - tokens / 1000, 0.0)


def mean_quality(answers: Float[np.ndarray, "prompt answer"]) -> Float[np.ndarray, "prompt"]:
    """Return each prompt's mean over the answers that are known; NaN where none is."""
    known = ~np.isnan(answers)
    total = np.where(known, answers, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)


def share_no_worse(
    small: Float[np.ndarray, "prompt answer"], large: Float[np.ndarray, "prompt answer"], t: float = 0.0
) -> Float[np.ndarray, "prompt"]:
    """Return Pr[H >= -t] over all pairs of known answers to each prompt; NaN where there is no pair."""
    pairs = ~np.isnan(small)[:, :, None] & ~np.isnan(large)[:, None, :]
    # A gap of exactly t counts, whatever the rounding of the grid.
    no_worse = small[:, :, None] - large[:, None, :] >= -t - 1e-9
    number = pairs.sum(axis=(1, 2))
    return np.where(number > 0, (no_worse & pairs).sum(axis=(1, 2)) / np.maximum(number, 1), np.nan)


def relaxation(small: Float[np.ndarray, "prompt answer"], large: Float[np.ndarray, "prompt answer"]) -> float:
    """Return t of trans: of the grid 0, 0.01 to 1 the least that maximises the mean |y - y'| over pairs of prompts."""
    return float(_GRID[int(np.argmax([_mean_difference(share_no_worse(small, large, t)) for t in _GRID]))])


def _mean_difference(labels: Float[np.ndarray, "prompt"]) -> float:
    """Mean absolute difference between two labels, rounded so that equal labels give equal figures."""
    ordered = np.sort(labels[~np.isnan(labels)])
    rank = np.arange(len(ordered))
    return round(float(((2 * rank - len(ordered) + 1) * ordered).sum()) / max(len(ordered), 1) ** 2, 12)


def labels_of(
    small: Float[np.ndarray, "prompt answer"], large: Float[np.ndarray, "prompt answer"], t: float
) -> dict[str, Float[np.ndarray, "prompt"]]:
    """Return the labels of the three scores, NaN where an answer is missing; `t` is that of trans."""
    return {
        "det": share_no_worse(small[:, :1], large[:, :1]),
        "prob": share_no_worse(small, large),
        "trans": share_no_worse(small, large, t),
    }


# --- heads -------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A logistic regression of a label from 0 to 1."""

    weights: Float[np.ndarray, "feature"]
    intercept: float

    def __call__(self, inputs: csr_matrix) -> Float[np.ndarray, "prompt"]:
        """Predict the expected label."""
        return _sigmoid(inputs @ self.weights + self.intercept)


def fit_head(inputs: csr_matrix, labels: Float[np.ndarray, "prompt"]) -> Head:
    """Fit by binary cross-entropy with a penalty on the squared weights; prompts whose label is NaN are left out."""
    known = ~np.isnan(labels)
    inputs, labels = inputs[known], labels[known]
    transposed = inputs.T.tocsr()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = parameters[:-1], parameters[-1]
        logit = inputs @ weights + intercept
        error = _sigmoid(logit) - labels
        value = (np.logaddexp(0, logit) - labels * logit).sum() + _PENALTY / 2 * weights @ weights
        return value, np.append(transposed @ error + _PENALTY * weights, error.sum())

    start = np.zeros(inputs.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}).x
    return Head(found[:-1], float(found[-1]))


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logit))


class Texts:
    """Prompts in numbers, for heads that are fitted to some of them."""

    def __init__(self, prompts: Sequence[str], seed: int = 0) -> None:
        """Hash and count all prompts once."""
        self._counts, self._seed = count(prompts), seed

    def inputs(self, fitted: np.ndarray) -> csr_matrix:
        """Return the features of all prompts, with what the texts alone teach taken from those to be fitted to."""
        features = fit_features(self._counts.rows(np.flatnonzero(fitted)), self._seed)
        grams, dense = _used(features.encode(self._counts), features.idf > 0)
        return hstack([grams, csr_matrix(dense)], format="csr", dtype=np.float64)


def _used(encoded: Encoded, used: Bool[np.ndarray, "bucket"]) -> Encoded:
    return Encoded(encoded.grams[:, np.flatnonzero(used)], encoded.dense)


# --- curves ------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What sending the prompts of the highest scores to the small LLM saves and costs, one by one."""

    cost_advantage: Float[np.ndarray, "point"]
    """Share of the prompts that go to the small LLM, %, from 0 to 100."""
    quality_drop: Float[np.ndarray, "point"]
    """Loss of mean quality against the large LLM for all, %; below 0 where the mix is better."""

    def drop_at(self, cost_advantage: float) -> float:
        """Quality drop, %, at a cost advantage, %."""
        return float(np.interp(cost_advantage, self.cost_advantage, self.quality_drop))

    @property
    def mean_drop(self) -> float:
        """Mean quality drop over all cost advantages, %: half of all-small's for a random score."""
        return float(np.trapezoid(self.quality_drop, self.cost_advantage) / 100)


def curve(
    score: Float[np.ndarray, "prompt"], small: Float[np.ndarray, "prompt"], large: Float[np.ndarray, "prompt"]
) -> Curve:
    """Trace cost advantage against quality drop; prompts of equal score come in proportion.

    Args:
        score: the higher, the sooner a prompt goes to the small LLM.
        small: mean quality of the small LLM's answers.
        large: of the large LLM's.

    """
    _, block = np.unique(-score, return_inverse=True)
    size = np.bincount(block)
    loss = np.cumsum(np.bincount(block, large - small))
    share = np.concatenate([[0.0], np.cumsum(size)]) / len(score)
    return Curve(100 * share, 100 * np.concatenate([[0.0], loss]) / max(large.sum(), 1e-12))


def choose_threshold(
    no_worse: Float[np.ndarray, "prompt llm"],
    quality: Float[np.ndarray, "prompt llm"],
    cost: Float[np.ndarray, "llm"],
    large: int,
    max_drop: float = MAX_DROP,
) -> float:
    """Return the threshold with the least mean cost whose quality drop is at most `max_drop` % of the large LLM's.

    Each prompt goes to the cheapest LLM whose score exceeds the threshold; the large one is always good enough. With
    two LLMs that is the paper's threshold of the highest cost advantage.
    """
    candidates = np.unique(np.append(np.delete(no_worse, large, axis=1), [0.0, 1.0]))
    # Midpoints, so that a prompt scored as those of the validation set falls on their side.
    candidates = np.concatenate([[-np.inf], (candidates[:-1] + candidates[1:]) / 2, [np.inf]])
    allowed = (1 - max_drop / 100) * quality[:, large].mean()
    best, least = np.inf, np.inf
    for threshold in candidates[::-1]:
        choice = cheapest_good_enough(no_worse, cost, large, threshold)
        mean_cost = cost[choice].mean()
        if mean_cost < least and quality[np.arange(len(choice)), choice].mean() >= allowed - 1e-12:
            best, least = threshold, mean_cost
    return float(best)


def cheapest_good_enough(
    no_worse: Float[np.ndarray, "prompt llm"], cost: Float[np.ndarray, "llm"], large: int, threshold: float
) -> Int[np.ndarray, "prompt"]:
    """Return the cheapest LLM whose score exceeds the threshold, or the large one, which always is good enough."""
    good = no_worse > threshold
    good[:, large] = True
    return np.where(good, cost, np.inf).argmin(axis=1)


# --- two LLMs on random splits of a bank --------------------------------------------------------------------------


class Judged(NamedTuple):
    """One pair of LLMs on the test prompts of one random split."""

    t: float
    """Of trans, by the labels that it was fitted to."""
    curves: dict[str, Curve]
    """Of each score, of the gap of predicted qualities, and of the oracle, which knows H."""
    chosen: dict[str, tuple[float, float, float]]
    """Of each score: the threshold from the validation prompts, and its cost advantage and quality drop on the test
    prompts, %."""
    quality: tuple[float, float]
    """Mean quality of the small and of the large LLM."""


def judge_pairs(
    prompts: Sequence[str],
    answers: Float[np.ndarray, "prompt answer llm"],
    pairs: Sequence[tuple[int, int]],
    *,
    splits: int = 5,
    seed: int = 0,
) -> list[list[Judged]]:
    """Fit heads to one part of the prompts, choose thresholds on a second, and judge on a third.

    Each split halves the prompts at random; the validation prompts are drawn from the half that is not for testing.

    Args:
        prompts: different texts.
        answers: qualities, NaN where missing.
        pairs: columns of the small and the large LLM.
        splits: how many.
        seed: draws the splits and the features.

    Returns:
        For each pair, what was found on each split.

    """
    texts = Texts(prompts, seed)
    quality = np.stack([mean_quality(answers[:, :, llm]) for llm in range(answers.shape[2])], axis=1)
    results: list[list[Judged]] = [[] for _ in pairs]
    for split in range(splits):
        order = np.random.default_rng([seed, split]).permutation(len(prompts))
        half = len(prompts) // 2
        num_validation = min(VALIDATION, half // 4)
        part = np.empty(len(prompts), int)  # 0 to be fitted to, 1 validation, 2 test
        part[order[:num_validation]], part[order[num_validation:half]], part[order[half:]] = 1, 0, 2
        inputs = texts.inputs(part == 0)
        fitted, others = inputs[part == 0], inputs[part > 0]
        llms = sorted({llm for pair in pairs for llm in pair})
        predicted = {llm: fit_head(fitted, quality[part == 0, llm])(others) for llm in llms}
        for number, (small, large) in enumerate(pairs):
            of_small, of_large = answers[part == 0][:, :, small], answers[part == 0][:, :, large]
            t = relaxation(of_small, of_large)
            labels = labels_of(of_small, of_large, t)
            scores = {name: fit_head(fitted, label)(others) for name, label in labels.items()}
            scores[GAP] = predicted[small] - predicted[large]
            results[number].append(_judged(t, scores, quality[part > 0][:, [small, large]], part[part > 0] == 2))
    return results


def _judged(
    t: float,
    scores: dict[str, Float[np.ndarray, "prompt"]],
    quality: Float[np.ndarray, "prompt 2"],
    test: Bool[np.ndarray, "prompt"],
) -> Judged:
    known = ~np.isnan(quality).any(axis=1)
    validation, test = known & ~test, known & test
    small, large = quality[test].T
    chosen = {}
    for name, score in scores.items():
        both = np.stack([score[validation], np.ones(validation.sum())], axis=1)
        threshold = choose_threshold(both, quality[validation], np.array([0.0, 1.0]), 1)
        to_small = score[test] > threshold
        drop = 100 * (1 - np.where(to_small, small, large).mean() / max(large.mean(), 1e-12))
        chosen[name] = (threshold, float(100 * to_small.mean()), float(drop))
    curves = {name: curve(score[test], small, large) for name, score in scores.items()}
    curves["oracle"] = curve(small - large, small, large)
    return Judged(t, curves, chosen, (float(small.mean()), float(large.mean())))


# --- many LLMs, for the rows of a bank ----------------------------------------------------------------------------


def predict_no_worse(
    prompts: Sequence[str],
    answers: Float[np.ndarray, "prompt answer llm"],
    in_train: Bool[np.ndarray, "prompt"],
    large: int,
    *,
    seed: int = 0,
) -> tuple[dict[str, Float[np.ndarray, "prompt llm"]], Float[np.ndarray, "llm"]]:
    """Predict for every prompt and LLM whether its answer is good enough, by heads that have not seen the prompt.

    The train half is predicted in cross-validation within it, the test half by heads fitted to the train half.

    Returns:
        The probabilities of each score, 1 for the large LLM itself; and t of trans for each LLM, 0 for the large.

    """
    texts = Texts(prompts, seed)
    fold = np.where(in_train, np.random.default_rng([seed, 0]).permutation(len(prompts)) % FOLDS, -1)
    num_llms = answers.shape[2]
    scores = {name: np.ones((len(prompts), num_llms)) for name in SCORES}
    others = [llm for llm in range(num_llms) if llm != large]
    relaxations = np.zeros(num_llms)
    for number in range(-1, FOLDS):
        fitted, predicted = in_train & (fold != number), fold == number
        inputs = texts.inputs(fitted)
        for llm in others:
            of_small, of_large = answers[fitted][:, :, llm], answers[fitted][:, :, large]
            t = relaxation(of_small, of_large)
            if number == -1:
                relaxations[llm] = t
            for name, label in labels_of(of_small, of_large, t).items():
                scores[name][predicted, llm] = fit_head(inputs[fitted], label)(inputs[predicted])
    return scores, relaxations

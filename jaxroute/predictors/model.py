"""Fit a predictor in JAX: two ridge regressions on all LLMs' answers, and a small regression per LLM on top.

Ridge regression in its dual form: with K the prompts' inner products and Y the answers, the duals are
(K + penalty I)^-1 Y. The inverse also gives what the regression would predict for any rows S had it not been fitted to
them: -[inverse]_SS^-1 [inverse Y]_S, with the answers in Y at S set to zero. So one inverse per penalty serves
cross-validation over prompts and over categories, missing answers, and leaving out each prompt alone.

Predictions with each prompt left out alone give each fit its second stage, without another pass over the data: per LLM,
a regression (logistic for quality) of the answers on two parts of these predictions, the mean over LLMs and this LLM's
deviation from it. It calibrates, weighs the strong penalty against the weak one, and trusts differences between LLMs
less than what they share. It is linear in the features, so that a fitted predictor is one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxroute.errors import UserError
from jaxroute.predictors.features import Encoded, count, fit_features, inner_products
from jaxroute.predictors.predictor import Answers, Predictor, Weights

FOLDS = 5
MAX_ROWS = 8192  # fitted to: time grows with their cube, memory with their square (2 GB here)
MIN_ANSWERS = 50  # that an LLM needs for its regression
MIN_ERROR = 0.01  # of a log length: a bank does not take 0

_PENALTIES = (2.0, 12.0)
# What a regression predicts without any data.
_MIDDLE_QUALITY, _MIDDLE_LOG_LENGTH = 0.5, float(np.log(256))
# Precisions of the second stage's prior. The intercept needs little, just enough for an LLM that is always right. The
# own parts need much: which LLM does better is hardly predictable, and a few hundred prompts mostly show noise.
_INTERCEPT_PRIOR, _SHARED_PRIOR, _OWN_PRIOR = 0.01, 1.0, 50.0
_BLOCK = 256


class CrossValidated(NamedTuple):
    """A predictor, and what is predicted for each row of a bank by fits that have not seen its text."""

    predictor: Predictor
    """Fitted to the train half."""
    predicted: Answers
    """Rows of the train half by cross-validation within it, others by the predictor."""
    apart: Answers
    """Fitted rows by fits to the other categories only; NaN for all others."""
    fitted: Bool[np.ndarray, "prompt"]
    """The rows that the predictor was fitted to."""


def cross_validate(
    prompts: Sequence[str],
    answers: Answers,
    in_train: Bool[np.ndarray, "prompt"],
    models: Sequence[str],
    *,
    category: Sequence[str] | None = None,
    seed: int = 0,
) -> CrossValidated:
    """Fit a predictor to the train half, and predict every row by a fit that has not seen its text.

    Rows with the same text share a fold, and only the first of them is fitted to. A text that also occurs in the test
    half is not fitted to.

    Args:
        prompts: the texts.
        answers: the LLMs' answers to them.
        in_train: rows that may be fitted to.
        models: names of the LLMs.
        category: category of each prompt; without it, no category is left out.
        seed: seed of the folds, the waves, and the choice of rows if there are more than `MAX_ROWS`.

    Raises:
        UserError: an LLM has fewer than `MIN_ANSWERS` known qualities or lengths among the rows to fit to.

    """
    rng = np.random.default_rng([seed, 0])
    test_texts = {prompt for row, prompt in enumerate(prompts) if not in_train[row]}
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if in_train[row] and prompt not in test_texts:
            first.setdefault(prompt, row)
    rows = np.array(list(first.values()), int)
    if len(rows) > MAX_ROWS:
        rows = np.sort(rng.permutation(rows)[:MAX_ROWS])
    for name, values in (("quality", answers.quality), ("output_tokens", answers.log_length)):
        for model, known in zip(models, (~np.isnan(values[rows])).sum(axis=0), strict=True):
            if known < MIN_ANSWERS:
                raise UserError(
                    f"LLM '{model}' has {known} known values of {name} among the {len(rows)} prompts to fit to, and "
                    f"at least {MIN_ANSWERS} are needed: leave it out with --models, or add prompts"
                )

    counts = count(prompts)
    features = fit_features(counts.rows(rows), seed)
    encoded = features.encode(counts)
    regression = Regression(encoded.rows(rows), answers.rows(rows))

    everyone = regression.fit(np.zeros(len(rows), bool))
    predicted = everyone.predict(encoded)
    fold = rng.permutation(len(rows)) % FOLDS
    fold_of = dict(zip((prompts[row] for row in rows), fold, strict=True))
    fold_of_row = np.array([fold_of.get(prompt, -1) for prompt in prompts])
    for number in range(FOLDS):
        again = np.flatnonzero(fold_of_row == number)
        held_out = regression.fit(fold == number).predict(encoded.rows(again))
        for whole, part in zip(predicted, held_out, strict=True):
            whole[again] = part

    apart = Answers(*(np.full_like(part, np.nan) for part in predicted))
    if category is not None and len(set(category)) > 1:
        of_row = np.asarray(category)[rows]
        for name in np.unique(of_row):
            left_out = of_row == name
            parts = regression.fit(left_out).predict(encoded.rows(rows[left_out]))
            elsewhere = answers.rows(rows[~left_out])
            for whole, part, known in zip(apart, parts, elsewhere, strict=True):
                # An LLM that hardly answered in other categories cannot be predicted from them.
                enough = (~np.isnan(known)).sum(axis=0) >= MIN_ANSWERS
                whole[rows[left_out]] = np.where(enough, part, np.nan)

    error = np.sqrt(np.nanmean((answers.log_length - predicted.log_length)[in_train] ** 2, axis=0))
    predictor = Predictor(tuple(models), np.maximum(error, MIN_ERROR), features, everyone)
    return CrossValidated(predictor, predicted, apart, np.isin(np.arange(len(prompts)), rows))


class Regression:
    """Both stages for one set of prompts, which can then be fitted with any of its rows left out."""

    def __init__(self, encoded: Encoded, answers: Answers) -> None:
        self._encoded, self._answers = encoded, answers
        targets = np.concatenate([answers.quality - _MIDDLE_QUALITY, answers.log_length - _MIDDLE_LOG_LENGTH], axis=1)
        # Answers that the same LLMs miss are left out together.
        self._missing, self._pattern = np.unique(np.isnan(targets), axis=1, return_inverse=True)
        # Rows without features or answers fill up the last block, so that few sizes are compiled. They change nothing.
        self._filling = -len(targets) % _BLOCK
        self._targets = self._filled_up(np.nan_to_num(targets).astype(np.float32))
        kernel = jnp.asarray(np.pad(inner_products(encoded), (0, self._filling)))
        with jax.default_matmul_precision("highest"):
            self._inverses = [_inverse(kernel, penalty) for penalty in _PENALTIES]

    def _filled_up(self, rows: np.ndarray) -> np.ndarray:
        return np.pad(rows, ((0, self._filling), (0, 0)))

    def fit(self, left_out: Bool[np.ndarray, "row"]) -> Weights:
        """Fit to all rows except these."""
        duals = np.empty((len(_PENALTIES), *self._targets.shape), np.float32)
        unseen = np.empty_like(duals)
        parts = []
        with jax.default_matmul_precision("highest"):
            for number, missing in enumerate(self._missing.T):
                columns = self._pattern == number
                without = _whole_blocks(np.flatnonzero(missing | left_out), len(self._targets))
                for stage, inverse in enumerate(self._inverses):
                    results = _leave_out(inverse, self._targets, without)
                    duals[stage][:, columns], unseen[stage][:, columns] = (
                        np.asarray(part)[:, columns] for part in results
                    )
            for dual, predicted, answers, logistic in zip(
                np.split(duals, 2, axis=2), np.split(unseen, 2, axis=2), self._answers, (True, False), strict=True
            ):
                known = self._filled_up(~np.isnan(answers) & ~left_out[:, None])
                intercept, mix = _second_stage(predicted, self._filled_up(np.nan_to_num(answers)), known, logistic)
                parts.append((np.asarray(intercept), np.einsum("prl,plm->rm", dual, mix)[: len(answers)]))
        intercepts, mixed = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
        return Weights(
            grams=np.asarray(self._encoded.grams.T @ mixed),
            dense=self._encoded.dense.T @ mixed,
            intercept=intercepts,
        )


@jax.jit
def _inverse(kernel: Float[Array, "row row"], penalty: float) -> Float[Array, "row row"]:
    return jnp.linalg.inv(kernel + penalty * jnp.eye(len(kernel), dtype=kernel.dtype))


def _whole_blocks(rows: Int[np.ndarray, "left"], beyond: int) -> Int[np.ndarray, "block"]:
    """Pad a set of rows to whole blocks with a number that is not a row."""
    padded = np.full(_BLOCK * max(-(-len(rows) // _BLOCK), 1), beyond)
    padded[: len(rows)] = rows
    return padded


@jax.jit
def _leave_out(
    inverse: Float[Array, "row row"], targets: Float[Array, "row column"], left_out: Int[Array, "left"]
) -> tuple[Float[Array, "row column"], Float[Array, "row column"]]:
    """Return the duals of the fit to the other rows, and predictions for each row by a fit that also leaves it out."""
    # An index out of range reads zero and writes nothing; a one on the diagonal keeps such a row apart.
    across = inverse.at[left_out].get(mode="fill", fill_value=0)
    filling = jnp.diag((left_out == len(targets)).astype(inverse.dtype))
    among = across.at[:, left_out].get(mode="fill", fill_value=0) + filling
    known = targets.at[left_out].set(0, mode="drop")
    # LU although Cholesky would do: OpenBLAS' threads spin in Cholesky, which makes a busy machine ten times slower.
    solved, predicted = jnp.split(jnp.linalg.solve(among, jnp.hstack([across, -across @ known])), [len(inverse)], 1)
    # With their predictions in place of their answers, left-out rows have no influence.
    settled = known.at[left_out].set(predicted, mode="drop")
    duals = (inverse @ settled).at[left_out].set(0, mode="drop")
    # The diagonal of the smaller regression's inverse, by the Schur complement.
    own = jnp.diag(inverse) - (across * solved).sum(axis=0)
    own = own.at[left_out].set(1, mode="drop")
    return duals, settled - duals / own[:, None]


@partial(jax.jit, static_argnames="logistic")
def _second_stage(
    unseen: Float[Array, "penalty row llm"],
    answers: Float[Array, "row llm"],
    known: Bool[Array, "row llm"],
    logistic: bool,
) -> tuple[Float[Array, "llm"], Float[Array, "penalty llm llm"]]:
    """Regress each LLM's answers on the shared and its own part of what was predicted for rows left out.

    Returns:
        The intercepts, and per penalty by how much each LLM's first-stage prediction (rows) enters each LLM's
        output (columns).

    """
    num_penalties, _, num_llms = unseen.shape
    shared = unseen.mean(axis=2, keepdims=True)
    inputs = jnp.concatenate([jnp.broadcast_to(shared, unseen.shape), unseen - shared])  # (input, row, llm)
    coefficients = jax.vmap(partial(_regress, logistic=logistic), in_axes=(2, 1, 1), out_axes=1)(inputs, answers, known)
    intercept, of_shared, of_own = jnp.split(coefficients, [1, 1 + num_penalties])
    mean = jnp.full((num_llms, num_llms), 1 / num_llms)
    mix = of_shared[:, None] * mean + of_own[:, None] * (jnp.eye(num_llms) - mean)
    return intercept[0], mix


def _regress(
    inputs: Float[Array, "input row"], answers: Float[Array, "row"], known: Bool[Array, "row"], *, logistic: bool
) -> Float[Array, "coefficient"]:
    """Intercept and slopes by Newton's method, with a normal prior on the slopes of standardised inputs.

    Inputs are the shared parts, then the own parts. The logistic regression fits the expected answer from 0 to 1, so
    that graded qualities need nothing else.
    """
    weight = known.astype(inputs.dtype)
    total = jnp.maximum(weight.sum(), 1)
    centre = inputs @ weight / total
    scale = jnp.sqrt(jnp.square(inputs - centre[:, None]) @ weight / total)
    scale = jnp.where(scale > 1e-6, scale, 1)
    columns = jnp.concatenate([jnp.ones((1, inputs.shape[1])), (inputs - centre[:, None]) / scale[:, None]])
    prior = jnp.array([_INTERCEPT_PRIOR, *[_SHARED_PRIOR] * len(_PENALTIES), *[_OWN_PRIOR] * len(_PENALTIES)])

    def newton(_: int, coefficients: Array) -> Array:
        mean = coefficients @ columns
        curvature = weight
        if logistic:
            mean = jax.nn.sigmoid(mean)
            curvature = weight * mean * (1 - mean)
        gradient = columns @ (weight * (answers - mean)) - prior * coefficients
        hessian = (columns * curvature) @ columns.T + jnp.diag(prior)
        return coefficients + jnp.linalg.solve(hessian, gradient)

    coefficients = jax.lax.fori_loop(0, 20 if logistic else 1, newton, jnp.zeros(len(columns)))
    slopes = coefficients[1:] / scale
    return jnp.concatenate([coefficients[:1] - slopes @ centre, slopes])

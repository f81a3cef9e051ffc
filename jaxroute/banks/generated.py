"""The embedded bank: prompts and answers drawn from figures fitted to a public evaluation, without a download."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxroute.banks.outcomes import Outcomes, sigmoid
from jaxroute.errors import UserError, did_you_mean

MAX_OUTPUT_TOKENS = 4096  # the generation limit in ZeroEval


@dataclass
class DomainFigures:
    """One domain of prompts in the embedded bank.

    Difficulty, length factor and log prompt length are jointly normal, the first two with mean 0 and sd 1.
    """

    name: str
    """Name of the domain."""
    share: float
    """Share of the prompts, relative to the other domains."""
    log_prompt_mean: float
    """Mean of the natural logarithm of prompt tokens."""
    log_prompt_sd: float
    """Its standard deviation."""
    difficulty_length_correlation: float
    """Correlation of a prompt's difficulty with the length of its answers."""
    difficulty_prompt_correlation: float
    """Correlation of a prompt's difficulty with its own length."""
    length_prompt_correlation: float
    """Correlation of the length of a prompt's answers with its own length."""

    def __post_init__(self) -> None:
        if self.share <= 0 or self.log_prompt_sd <= 0:
            raise UserError(
                f"bank.domains, domain '{self.name}': share={self.share} and "
                f"log_prompt_sd={self.log_prompt_sd} must both be above 0: correct the figures"
            )
        if np.linalg.eigvalsh(self.correlation()).min() <= 0:
            raise UserError(
                f"bank.domains, domain '{self.name}': its three correlations contradict each other "
                "(the matrix is not positive definite): use figures fitted together"
            )

    def correlation(self) -> Float[np.ndarray, "3 3"]:
        """Correlation matrix of (difficulty, length factor, log prompt length)."""
        a, b, c = (
            self.difficulty_length_correlation,
            self.difficulty_prompt_correlation,
            self.length_prompt_correlation,
        )
        return np.array([[1.0, a, b], [a, 1.0, c], [b, c, 1.0]])


@dataclass
class LLMFigures:
    """One LLM in the embedded bank; lists have one entry per domain, in the order of `BankConfig.domains`.

    P(right) = sigmoid(ability - discrimination * difficulty), the two-parameter logistic model of item
    response theory; log length = log_length_mean + log_length_slope * length factor + log_length_sd * own
    noise. A share `runaway` of the wrong answers instead repeats itself up to the generation limit.
    """

    ability: list[float]
    """Log odds of a right answer to a prompt of mean difficulty, per domain."""
    discrimination: list[float]
    """Fall of these log odds per standard deviation of difficulty, per domain."""
    log_length_mean: list[float]
    """Mean of the natural logarithm of output tokens, per domain."""
    log_length_slope: list[float]
    """Rise of log length per standard deviation of the length factor that all LLMs share, per domain."""
    log_length_sd: list[float]
    """Standard deviation of the LLM's own part of log length, per domain."""
    runaway: list[float]
    """Share of the wrong answers that repeat themselves up to the generation limit, per domain."""


def generate(
    domains: Sequence[DomainFigures],
    figures: Mapping[str, LLMFigures],
    llms: Sequence[str],
    num_prompts: int,
    seed: Sequence[int],
) -> Outcomes:
    """Draw prompts, then each LLM's answers; an LLM's column is the same whatever the other LLMs are.

    Raises:
        UserError: there are no figures, or none of one of the LLMs.
    """
    if not domains or not figures:
        raise UserError(
            "bank.kind='embedded' has no figures (bank.domains, bank.llms): start from configs/bank/embedded.yaml"
        )
    for llm in llms:
        if llm not in figures:
            raise UserError(
                f"the embedded bank has no LLM '{llm}'{did_you_mean(llm, figures)}: add its figures under "
                "bank.llms or name a stand-in under bank.models"
            )
    rng = np.random.default_rng(seed)
    share = np.array([domain.share for domain in domains])
    drawn = rng.choice(len(share), size=num_prompts, p=share / share.sum())
    factor = np.stack([np.linalg.cholesky(domain.correlation()) for domain in domains])
    latent = np.einsum("pij,pj->pi", factor[drawn], rng.standard_normal((num_prompts, 3)))
    difficulty, length_factor, prompt = latent.T
    log_prompt_mean = np.array([domain.log_prompt_mean for domain in domains])[drawn]
    log_prompt_sd = np.array([domain.log_prompt_sd for domain in domains])[drawn]

    quality = np.empty((num_prompts, len(llms)))
    output_tokens = np.empty((num_prompts, len(llms)), np.int64)
    for column, llm in enumerate(llms):
        own = {name: np.asarray(values)[drawn] for name, values in vars(figures[llm]).items()}
        rng = np.random.default_rng([*seed, zlib.crc32(llm.encode())])
        right = rng.random(num_prompts) < sigmoid(own["ability"] - own["discrimination"] * difficulty)
        log_length = (
            own["log_length_mean"]
            + own["log_length_slope"] * length_factor
            + own["log_length_sd"] * rng.standard_normal(num_prompts)
        )
        runaway = ~right & (rng.random(num_prompts) < own["runaway"])
        tokens = np.where(runaway, MAX_OUTPUT_TOKENS, np.rint(np.exp(log_length)))
        quality[:, column] = right
        output_tokens[:, column] = np.clip(tokens, 1, MAX_OUTPUT_TOKENS)
    prompt_tokens = np.maximum(np.rint(np.exp(log_prompt_mean + log_prompt_sd * prompt)), 1).astype(np.int64)
    return Outcomes(prompt_tokens, quality, output_tokens)

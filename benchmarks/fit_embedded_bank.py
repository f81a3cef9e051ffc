"""Fit the embedded bank's figures to the ZeroEval tables and compare what they generate with the data.

    JAXROUTE_DATA=... python -m benchmarks.fit_embedded_bank

prints the `domains` and `llms` blocks of configs/bank/embedded.yaml, then, for the committed file, tables of
generated against real outcomes. Needs the `data` extra. Takes less than a minute.

Per domain (gsm, crux, math-l5), over twelve LLMs with open weights that answered every prompt. (Fitted to all
29 complete LLMs, APIs included, the LLMs of an edge site agree less with each other than in the data.)

- Correctness: two-parameter logistic item response model with LLMs as items and prompts as persons,
  difficulty ~ N(0, 1), by marginal maximum likelihood (EM on a fixed grid; Bock and Aitkin 1981).
- Log length: one-factor analysis by EM (Rubin and Thayer 1982), runaways left out. A runaway is an answer of
  at least RUNAWAY_TOKENS tokens: in the data such answers repeat themselves up to the generation limit (4096)
  and are nearly all wrong, and without them lengths are lognormal.
- Correlations of difficulty, length factor and log prompt length: those of the posterior means, divided by
  the square root of the posterior means' reliability.

Left out on purpose: LLMs of one family agree a little more than difficulty explains (gemma-2-9b and -27b).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from omegaconf import OmegaConf

from jaxroute.banks.bank import BankConfig, build_bank

CONFIG = Path(__file__).parents[1] / "configs" / "bank" / "embedded.yaml"
RUNAWAY_TOKENS = 2000
OPEN_LLMS = (
    "gemma-2-2b-it",
    "Phi-3.5-mini-instruct",
    "Qwen2-7B-Instruct",
    "Meta-Llama-3-8B-Instruct",
    "Meta-Llama-3.1-8B-Instruct",
    "Yi-1.5-9B-Chat",
    "gemma-2-9b-it",
    "gemma-2-27b-it",
    "Yi-1.5-34B-Chat",
    "Meta-Llama-3-70B-Instruct",
    "Meta-Llama-3.1-70B-Instruct",
    "Qwen2-72B-Instruct",
)
POOL = (
    "gemma-2-2b-it",
    "Qwen2-7B-Instruct",
    "Yi-1.5-9B-Chat",
    "Meta-Llama-3.1-8B-Instruct",
    "gemma-2-9b-it",
    "gemma-2-27b-it",
)


class Data(NamedTuple):
    """ZeroEval: prompts in rows, OPEN_LLMS in columns."""

    domain: np.ndarray
    log_prompt: Float[np.ndarray, "prompt"]
    right: Float[np.ndarray, "prompt llm"]
    tokens: Float[np.ndarray, "prompt llm"]


class Factor(NamedTuple):
    """Posterior of a prompt's latent factor (prior N(0, 1)): its mean, and the reliability of that mean."""

    mean: Float[np.ndarray, "prompt"]
    reliability: float


def load(data_dir: Path) -> Data:
    """Read the tables."""
    queries, correct, tokens = (
        pd.read_parquet(data_dir / "zeroeval" / f"{name}.parquet") for name in ("queries", "correct", "out_tokens")
    )
    llms = list(OPEN_LLMS)
    return Data(
        domain=queries["dataset"].to_numpy(),
        log_prompt=np.log(queries["prompt_tokens"].to_numpy(float)),
        right=(correct[llms].to_numpy() == 1).astype(float),
        tokens=np.maximum(tokens[llms].to_numpy(float), 1),
    )


def fit_correctness(
    right: Float[np.ndarray, "prompt llm"], iterations: int = 200
) -> tuple[Float[np.ndarray, "llm 2"], Factor]:
    """Ability and discrimination per LLM: P(right) = sigmoid(ability - discrimination * difficulty)."""
    grid = np.linspace(-4.5, 4.5, 61)
    prior = np.exp(-(grid**2) / 2)
    prior /= prior.sum()
    design = np.stack([np.ones_like(grid), -grid], axis=1)
    weights = np.stack([np.zeros(right.shape[1]), np.ones(right.shape[1])], axis=1)
    for _ in range(iterations):
        probability = 1 / (1 + np.exp(-design @ weights.T))
        log_likelihood = right @ np.log(probability).T + (1 - right) @ np.log1p(-probability).T
        posterior = prior * np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        count, hits = posterior.sum(axis=0), posterior.T @ right
        for _ in range(3):  # Newton steps of the weighted logistic regressions
            probability = 1 / (1 + np.exp(-design @ weights.T))
            # A weak pull of the discrimination to 1.5, for LLMs that are nearly always right.
            gradient = (hits - count[:, None] * probability).T @ design - [0, 1] * (weights - 1.5)
            information = (count[:, None] * probability * (1 - probability)).T
            hessian = np.einsum("lg,gi,gj->lij", information, design, design) + np.diag([1e-6, 1])
            weights = weights + np.linalg.solve(hessian, gradient[:, :, None])[..., 0]
    mean = posterior @ grid
    return weights, Factor(mean, mean.var())


def fit_length(
    log_length: Float[np.ndarray, "prompt llm"], known: Bool[np.ndarray, "prompt llm"], iterations: int = 300
) -> tuple[Float[np.ndarray, "llm 3"], Factor]:
    """Per LLM (mean, slope, sd) of log length = mean + slope * factor + sd * noise, on the known cells."""
    values = np.where(known, log_length, 0)
    count = known.sum(axis=0)
    level = values.sum(axis=0) / count
    slope = np.full(len(level), 0.3)
    variance = np.full(len(level), 0.1)
    for _ in range(iterations):
        precision = 1 + known @ (slope**2 / variance)
        mean = (np.where(known, values - level, 0) @ (slope / variance)) / precision
        square = mean**2 + 1 / precision
        # Regression of each LLM's log length on (1, factor) with the factor's posterior moments.
        first, second = known.T @ mean, known.T @ square
        total, product = values.sum(axis=0), values.T @ mean
        slope = (product - first * total / count) / (second - first**2 / count)
        level = (total - slope * first) / count
        residual = (values**2).sum(axis=0) - level * total - slope * product
        variance = np.maximum(residual / count, 1e-4)
    return np.stack([level, slope, np.sqrt(variance)], axis=1), Factor(mean, mean.var())


def fit(data: Data) -> dict:
    """All figures, in the layout of the configuration."""
    domains, llms = [], {name: {} for name in OPEN_LLMS}
    for name in ("gsm", "crux", "math-l5"):
        rows = data.domain == name
        right, tokens, log_prompt = data.right[rows], data.tokens[rows], data.log_prompt[rows]
        runaway = tokens >= RUNAWAY_TOKENS
        correctness, difficulty = fit_correctness(right)
        length, length_factor = fit_length(np.log(tokens), ~runaway)

        def correlation(a: np.ndarray, b: np.ndarray, reliability: float) -> float:
            return round(float(np.corrcoef(a, b)[0, 1] / np.sqrt(reliability)), 3)

        domains.append(
            {
                "name": name,
                "share": round(float(rows.mean()), 4),
                "log_prompt_mean": round(float(log_prompt.mean()), 3),
                "log_prompt_sd": round(float(log_prompt.std()), 3),
                "difficulty_length_correlation": correlation(
                    difficulty.mean, length_factor.mean, difficulty.reliability * length_factor.reliability
                ),
                "difficulty_prompt_correlation": correlation(difficulty.mean, log_prompt, difficulty.reliability),
                "length_prompt_correlation": correlation(length_factor.mean, log_prompt, length_factor.reliability),
            }
        )
        wrong = np.maximum((1 - right).sum(axis=0), 1)
        figures = {
            "ability": correctness[:, 0],
            "discrimination": correctness[:, 1],
            "log_length_mean": length[:, 0],
            "log_length_slope": length[:, 1],
            "log_length_sd": length[:, 2],
            "runaway": (runaway & (right == 0)).sum(axis=0) / wrong,
        }
        for column, llm in enumerate(OPEN_LLMS):
            for figure, values in figures.items():
                llms[llm].setdefault(figure, []).append(round(float(values[column]), 3))
    return {"domains": domains, "llms": llms}


def to_yaml(figures: dict) -> str:
    """Write the figures with one line per list, as the committed file has them."""
    lines = ["domains:"]
    for domain in figures["domains"]:
        lines += [f"  {'- ' if key == 'name' else '  '}{key}: {value}" for key, value in domain.items()]
    lines.append("llms:")
    for llm, values in figures["llms"].items():
        lines.append(f"  {llm}:")
        lines += [f"    {figure}: {row}" for figure, row in values.items()]
    return "\n".join(lines)


def summarise(right: np.ndarray, tokens: np.ndarray, prompt_tokens: np.ndarray) -> dict[str, float]:
    """Figures of a pool that routing depends on."""
    pairs = np.triu_indices(right.shape[1], 1)
    log_length = np.log(tokens)
    return {
        "best single accuracy": right.mean(axis=0).max(),
        "oracle accuracy (some LLM is right)": right.max(axis=1).mean(),
        "every LLM is right": (right.min(axis=1) == 1).mean(),
        "mean pairwise correlation, correctness": np.corrcoef(right.T)[pairs].mean(),
        "mean pairwise correlation, log length": np.corrcoef(log_length.T)[pairs].mean(),
        "correlation of prompt means, correctness and log length": np.corrcoef(
            right.mean(axis=1), log_length.mean(axis=1)
        )[0, 1],
        "sd of log length, pooled": log_length.std(),
        "share of answers of 2,000 tokens and more": (tokens >= RUNAWAY_TOKENS).mean(),
        "mean prompt tokens": prompt_tokens.mean(),
        "correlation, log prompt and mean log length": np.corrcoef(np.log(prompt_tokens), log_length.mean(axis=1))[
            0, 1
        ],
    }


def compare(data: Data) -> None:
    """Print data against the bank generated from the committed figures."""
    settings = OmegaConf.merge(
        OmegaConf.structured(BankConfig), OmegaConf.load(CONFIG), {"num_prompts": 20000, "seed": 1}
    )
    bank = build_bank(OmegaConf.to_object(settings), OPEN_LLMS)
    right, tokens = np.asarray(bank.quality), np.asarray(bank.output_tokens)
    print(f"\n{'LLM (data / generated)':30} {'accuracy':>15} {'mean tokens':>15} {'95th percentile':>17}")
    for column, llm in enumerate(OPEN_LLMS):
        print(
            f"{llm:30} {data.right[:, column].mean():7.3f} {right[:, column].mean():7.3f} "
            f"{data.tokens[:, column].mean():7.0f} {tokens[:, column].mean():7.0f} "
            f"{np.percentile(data.tokens[:, column], 95):8.0f} {np.percentile(tokens[:, column], 95):8.0f}"
        )
    pool = [OPEN_LLMS.index(llm) for llm in POOL]
    known = summarise(data.right[:, pool], data.tokens[:, pool], np.exp(data.log_prompt))
    made = summarise(right[:, pool], tokens[:, pool], np.asarray(bank.prompt_tokens))
    print(f"\n{'pool of ' + str(len(POOL)) + ' LLMs':56} {'data':>8} {'generated':>10}")
    for name, value in known.items():
        print(f"{name:56} {value:8.3f} {made[name]:10.3f}")


if __name__ == "__main__":
    if "JAXROUTE_DATA" not in os.environ:
        raise SystemExit("set JAXROUTE_DATA to the folder that holds zeroeval/")
    tables = load(Path(os.environ["JAXROUTE_DATA"]))
    print(to_yaml(fit(tables)))
    if CONFIG.exists():
        compare(tables)

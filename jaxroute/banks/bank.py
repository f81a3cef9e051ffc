"""Request banks: tables of prompts with what every LLM would answer and what a router can predict of it.

Four kinds. `embedded` is generated from figures fitted to a public evaluation and needs no download;
`zeroeval` and `mmlu_pro` are the published evaluations themselves; `table` is an evaluation of the user's own.
A bank holds outcomes (quality, length), which the router must not see, and predictions, which it may. The
predictions are a real predictor's (`bank.predictions`), or outcomes seen through noise of such strength that
they are as good as those of the predictor that `python -m jaxroute predict` fits to the real prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxroute.banks.generated import DomainFigures, LLMFigures, generate
from jaxroute.banks.noise import NoiseConfig, predict_through_noise
from jaxroute.banks.outcomes import Outcomes, Predicted
from jaxroute.banks.tables import Predictions, read_no_worse, read_predictions, read_table, split_of_rows
from jaxroute.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

KINDS = ("embedded", "zeroeval", "mmlu_pro", "table")
SPLITS = ("train", "test", "all")

MIN_ROWS = 100  # fewer prompts cannot carry the calibration of the predictions


class NoWorse(NamedTuple):
    """Probabilities that an LLM's answer is no worse than the large LLM's (`jaxroute.predictors.hybrid`)."""

    det: Float[Array, "*prompt expert"]
    prob: Float[Array, "*prompt expert"]
    trans: Float[Array, "*prompt expert"]


class RequestBank(NamedTuple):
    """A device-resident table: rows are prompts, columns are a site's experts in the site's order."""

    prompt_tokens: Int[Array, "prompt"]
    """Length of the prompt, tokens."""
    quality: Float[Array, "prompt expert"]
    """1 if the expert answers correctly, else 0; a user's own table may grade in between."""
    output_tokens: Int[Array, "prompt expert"]
    """True length of the expert's answer, tokens, at least 1. Unknown to the router."""
    predicted_quality: Float[Array, "prompt expert"]
    """Expected quality; where answers are right or wrong, the probability that the expert answers correctly. The router
    sees it."""
    predicted_output_tokens: Float[Array, "prompt expert"]
    """Predicted median of the length, exp(predicted log length), tokens. The router sees it."""
    log_length_error: Float[Array, "expert"]
    """Standard deviation of log(output_tokens) around log(predicted_output_tokens): what the predictor knows of its own
    error. The router sees it."""
    no_worse: NoWorse | None = None
    """Scores of Hybrid LLM, which the router sees; None if there are none."""


@dataclass
class BankConfig:
    """Which bank, how much of it, and how well its outcomes can be predicted."""

    kind: str = "embedded"
    """embedded (generated, no download), zeroeval or mmlu_pro (published tables), or table (your own, see folder)."""
    folder: str | None = None
    """table: the folder that `jaxroute bank build` wrote."""
    predictions: str | None = None
    """Folder that `jaxroute predict` wrote for this table; null draws predictions as good as bank.noise says."""
    hybrid: str | None = None
    """Folder that `jaxroute predict hybrid` wrote for this table: scores that the hybrid rules go by; null lets them go
    by the predicted qualities."""
    num_prompts: int | None = 4096
    """Number of prompts; null takes every row of a table. The embedded bank needs a number."""
    seed: int = 0
    """Seed of the generated prompts, the prediction noise and the choice of rows."""
    split: str = "train"
    """train or test: disjoint prompts, drawn apart for the embedded bank, fixed halves of a table. all: every row of a
    table."""
    models: dict[str, str] = field(default_factory=dict)
    """The bank's column for a model of the site, where their names differ."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """How good the predictions are."""
    domains: list[DomainFigures] = field(default_factory=list)
    """embedded: figures of each domain of prompts."""
    llms: dict[str, LLMFigures] = field(default_factory=dict)
    """embedded: figures of each LLM, by name."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"bank.kind='{self.kind}' is unknown: use one of {', '.join(KINDS)}")
        if self.split not in SPLITS:
            raise UserError(f"bank.split='{self.split}' is unknown: use one of {', '.join(SPLITS)}")
        if self.kind != "table" and self.folder is not None:
            raise UserError(f"bank.folder does not fit bank.kind='{self.kind}': use bank.kind=table, or folder null")
        if self.kind == "embedded" and self.predictions is not None:
            raise UserError("bank.predictions does not fit bank.kind='embedded', whose prompts have no text: use null")
        if self.kind == "embedded" and self.hybrid is not None:
            raise UserError("bank.hybrid does not fit bank.kind='embedded', whose prompts have no text: use null")
        if self.kind == "embedded" and self.split == "all":
            raise UserError(
                "bank.split='all' does not fit bank.kind='embedded', which has no fixed rows: use train or test"
            )
        if self.kind == "embedded" and self.num_prompts is None:
            raise UserError("bank.num_prompts=null does not fit bank.kind='embedded': give a number, e.g. 4096")
        if self.num_prompts is not None and self.num_prompts < MIN_ROWS:
            raise UserError(
                f"bank.num_prompts={self.num_prompts} is too few to calibrate predictions: use at least {MIN_ROWS}"
            )
        if self.seed < 0:
            raise UserError(f"bank.seed={self.seed} is negative: use a seed of at least 0")
        for name, llm in self.llms.items():
            for figure, values in vars(llm).items():
                if len(values) != len(self.domains):
                    raise UserError(
                        f"bank.llms.{name}.{figure} has {len(values)} values for {len(self.domains)} "
                        "domains: give one value per domain"
                    )


def build_bank(config: BankConfig, models: Sequence[str], data_dir: Path | None = None) -> RequestBank:
    """Build the bank for a site.

    Noise levels and calibration of the predictions are set on the train population (on all rows with split
    "all") and applied unchanged to the test population. Two experts that run the same LLM get the same
    columns.

    Args:
        config: which bank.
        models: model name of each expert, in the site's order.
        data_dir: folder that holds the published tables (`JAXROUTE_DATA`); not needed for other kinds.

    Returns:
        The bank, deterministic in (config, models): prompts in rows, experts in columns.

    Raises:
        UserError: an unknown LLM, a missing table, too few complete rows, or predictor figures that no noise
            level reaches on this pool of LLMs.

    """
    if not models:
        raise UserError("a bank was asked for a site without experts: list at least one expert")
    columns = [config.models.get(model, model) for model in models]
    llms = list(dict.fromkeys(columns))
    if config.kind == "embedded":
        outcomes, calibration, kept = _generated(config, llms)
        predicted = no_worse = None
    else:
        outcomes, calibration, kept, predicted, no_worse = _measured(config, llms, data_dir)
    quality, log_length, error = predicted or predict_through_noise(outcomes, calibration, config.noise, config.seed)
    expert = [llms.index(column) for column in columns]

    def of_experts(values: np.ndarray) -> Float[Array, "prompt expert"]:
        return jnp.asarray(values[kept][:, expert], jnp.float32)

    return RequestBank(
        prompt_tokens=jnp.asarray(outcomes.prompt_tokens[kept], jnp.int32),
        quality=of_experts(outcomes.quality),
        output_tokens=jnp.asarray(outcomes.output_tokens[kept][:, expert], jnp.int32),
        predicted_quality=of_experts(quality),
        predicted_output_tokens=of_experts(np.exp(log_length)),
        log_length_error=jnp.asarray(error[expert], jnp.float32),
        no_worse=None if no_worse is None else NoWorse(*map(of_experts, no_worse)),
    )


def _generated(
    config: BankConfig, llms: list[str]
) -> tuple[Outcomes, Bool[np.ndarray, "prompt"], Bool[np.ndarray, "prompt"]]:
    """Outcomes of the generated bank, which rows calibrate the predictions, and which rows were asked for."""
    splits = SPLITS[:1] if config.split == "train" else SPLITS[:2]
    parts = [
        generate(config.domains, config.llms, llms, config.num_prompts or 0, (config.seed, SPLITS.index(split)))
        for split in splits
    ]
    outcomes = Outcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    in_train = np.arange(len(outcomes.prompt_tokens)) < len(parts[0].prompt_tokens)
    return outcomes, in_train, in_train if config.split == "train" else ~in_train


def _folder_of_table(config: BankConfig, data_dir: Path | None) -> Path:
    if config.kind == "table":
        if config.folder is None:
            raise UserError(
                "bank.kind='table' reads a folder and bank.folder is not set: set it to one that "
                "python -m jaxroute bank build wrote"
            )
        return Path(config.folder)
    if data_dir is None:
        raise UserError(
            f"bank.kind='{config.kind}' reads published tables and no data folder is set: "
            "set JAXROUTE_DATA or data_dir, or use bank.kind=embedded"
        )
    return Path(data_dir) / config.kind


def _measured(
    config: BankConfig, llms: list[str], data_dir: Path | None
) -> tuple[Outcomes, Bool[np.ndarray, "prompt"], Bool[np.ndarray, "prompt"], Predicted | None, list[np.ndarray] | None]:
    """Outcomes of a table, which rows calibrate the predictor, which were asked for, and what is given for them.

    That is the predictions and the scores of Hybrid LLM, each None if there are none.
    """
    where = _folder_of_table(config, data_dir)
    table = read_table(where)
    for llm in llms:
        if llm not in table.llms:
            raise UserError(
                f"{where} has no column '{llm}'{did_you_mean(llm, table.llms)}: name a column "
                "for the site's model under bank.models"
            )
    chosen = [table.llms.index(llm) for llm in llms]
    quality, tokens = table.quality[:, chosen], table.output_tokens[:, chosen]
    complete = ~(np.isnan(quality) | np.isnan(tokens)).any(axis=1)
    if not complete.all():
        logger.warning(
            "%s: dropped %d of %d rows with a missing cell among the chosen LLMs",
            where, (~complete).sum(), len(complete),
        )  # fmt: skip
    given: Predictions | None = None
    if config.predictions is not None:
        given = read_predictions(Path(config.predictions), llms, len(complete))
        unknown = complete & (np.isnan(given.quality) | np.isnan(given.output_tokens)).any(axis=1)
        if unknown.any():
            logger.warning(
                "%s: dropped %d of %d rows without a prediction for a chosen LLM",
                config.predictions, unknown.sum(), len(complete),
            )  # fmt: skip
        complete &= ~unknown
    if complete.sum() < MIN_ROWS:
        in_both = f" and predicted in {config.predictions}" if given else ""
        raise UserError(
            f"{where} has {complete.sum()} rows complete for {', '.join(llms)}{in_both}; at least {MIN_ROWS} are "
            "needed: choose LLMs with fewer missing cells under bank.models"
        )
    outcomes = Outcomes(
        prompt_tokens=np.maximum(np.rint(table.queries["prompt_tokens"].to_numpy(float)[complete]), 1).astype(np.int64),
        quality=quality[complete],
        output_tokens=np.maximum(np.rint(tokens[complete]), 1).astype(np.int64),
    )
    in_train = split_of_rows(len(complete))[complete]
    calibration = in_train if config.split != "all" else np.ones(len(in_train), bool)
    wanted = ~in_train if config.split == "test" else calibration
    if config.num_prompts is not None:
        if config.num_prompts > wanted.sum():
            raise UserError(
                f"bank.num_prompts={config.num_prompts} is more than the {wanted.sum()} complete rows of "
                f"{where} in split '{config.split}': lower it, or use null for all of them"
            )
        chosen_rows = np.random.default_rng(config.seed).permutation(np.flatnonzero(wanted))[: config.num_prompts]
        wanted = np.isin(np.arange(len(wanted)), chosen_rows)
    predicted = None
    if given is not None:
        predicted = Predicted(given.quality[complete], np.log(given.output_tokens[complete]), given.log_length_error)
    scores = None
    if config.hybrid is not None:
        scores = [score[complete] for score in read_no_worse(Path(config.hybrid), NoWorse._fields, llms, len(complete))]
    return outcomes, calibration, wanted, predicted, scores

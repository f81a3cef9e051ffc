"""Request banks: tables of prompts with what every LLM would answer and what a router can predict of it.

Four kinds. `embedded` is generated from figures fitted to a public evaluation and needs no download;
`zeroeval` and `mmlu_pro` are the published evaluations themselves; `table` is an evaluation of the user's own.
A bank holds outcomes (quality, length), which the router must not see, and predictions, which it may. The
predictions are a real predictor's (`bank.predictions`), or outcomes seen through noise of such strength that
they are as good as those of the predictor that `python -m jaxroute predict` fits to the real prompts.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxroute.banks.tables import Predictions, Table, read_predictions, read_table, split_of_rows
from jaxroute.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

KINDS = ("embedded", "zeroeval", "mmlu_pro", "table")
SPLITS = ("train", "test", "all")

MIN_ROWS = 100  # fewer prompts cannot carry the calibration of the predictions


class RequestBank(NamedTuple):
    """A device-resident table: rows are prompts, columns are a site's experts in the site's order.

    Attributes:
        prompt_tokens: length of the prompt, tokens.
        quality: 1 if the expert answers correctly, else 0; a user's own table may grade in between.
        output_tokens: true length of the expert's answer, tokens, at least 1. Unknown to the router.
        predicted_quality: expected quality; where answers are right or wrong, the probability that the
            expert answers correctly. The router sees it.
        predicted_output_tokens: predicted median of the length, exp(predicted log length), tokens. The router
            sees it.
        log_length_error: standard deviation of log(output_tokens) around log(predicted_output_tokens): what
            the predictor knows of its own error. The router sees it.

    """

    prompt_tokens: Int[Array, "prompt"]
    quality: Float[Array, "prompt expert"]
    output_tokens: Int[Array, "prompt expert"]
    predicted_quality: Float[Array, "prompt expert"]
    predicted_output_tokens: Float[Array, "prompt expert"]
    log_length_error: Float[Array, "expert"]


@dataclass
class NoiseConfig:
    """How good the router's predictor is, on the train prompts, pooled over the site's distinct LLMs.

    A real predictor learns mostly how hard and how long a prompt is for all LLMs alike, and little of which
    LLM does better. The two are separate figures: the second decides what routing by quality alone can gain.
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


@dataclass
class DomainFigures:
    """One domain of prompts in the embedded bank.

    Difficulty, length factor and log prompt length are jointly normal, the first two with mean 0 and sd 1.
    """

    name: str
    share: float
    log_prompt_mean: float
    log_prompt_sd: float
    difficulty_length_correlation: float
    difficulty_prompt_correlation: float
    length_prompt_correlation: float

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
    discrimination: list[float]
    log_length_mean: list[float]
    log_length_slope: list[float]
    log_length_sd: list[float]
    runaway: list[float]


@dataclass
class BankConfig:
    """Which bank, how much of it, and how well its outcomes can be predicted."""

    kind: str = "embedded"
    """embedded (generated, no download), zeroeval or mmlu_pro (published tables), or table (your own, see folder)."""
    folder: str | None = None
    """table: the folder that `jaxroute bank build` wrote."""
    predictions: str | None = None
    """Folder that `jaxroute predict` wrote for this table; null draws predictions as good as bank.noise says."""
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
    max_output_tokens: int = 4096
    """embedded: generation limit, tokens."""
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
        if self.max_output_tokens < 1:
            raise UserError(f"bank.max_output_tokens={self.max_output_tokens} is below 1: use e.g. 4096")
        for name, llm in self.llms.items():
            for figure, values in vars(llm).items():
                if len(values) != len(self.domains):
                    raise UserError(
                        f"bank.llms.{name}.{figure} has {len(values)} values for {len(self.domains)} "
                        "domains: give one value per domain"
                    )


class _Outcomes(NamedTuple):
    """What the LLMs do, on the host; one column per distinct LLM."""

    prompt_tokens: Int[np.ndarray, "prompt"]
    quality: Float[np.ndarray, "prompt llm"]
    output_tokens: Int[np.ndarray, "prompt llm"]


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
        outcomes, calibration, kept = _generate(config, llms)
        predicted = None
    else:
        outcomes, calibration, kept, predicted = _read_tables(config, llms, data_dir)
    quality, log_length, error = predicted or _predict(outcomes, calibration, config)
    expert = [llms.index(column) for column in columns]
    return RequestBank(
        prompt_tokens=jnp.asarray(outcomes.prompt_tokens[kept], jnp.int32),
        quality=jnp.asarray(outcomes.quality[kept][:, expert], jnp.float32),
        output_tokens=jnp.asarray(outcomes.output_tokens[kept][:, expert], jnp.int32),
        predicted_quality=jnp.asarray(quality[kept][:, expert], jnp.float32),
        predicted_output_tokens=jnp.asarray(np.exp(log_length[kept][:, expert]), jnp.float32),
        log_length_error=jnp.asarray(error[expert], jnp.float32),
    )


# --- outcomes: generated ------------------------------------------------------------------------------------


def _generate(
    config: BankConfig, llms: list[str]
) -> tuple[_Outcomes, Bool[np.ndarray, "prompt"], Bool[np.ndarray, "prompt"]]:
    """Outcomes of the generated bank, which rows calibrate the predictor, and which rows were asked for."""
    if not config.domains or not config.llms:
        raise UserError(
            "bank.kind='embedded' has no figures (bank.domains, bank.llms): start from configs/bank/embedded.yaml"
        )
    for llm in llms:
        if llm not in config.llms:
            raise UserError(
                f"the embedded bank has no LLM '{llm}'{did_you_mean(llm, config.llms)}: add its figures under "
                "bank.llms or name a stand-in under bank.models"
            )
    train = _generate_split(config, llms, "train")
    if config.split == "train":
        everything = np.ones(len(train.prompt_tokens), bool)
        return train, everything, everything
    test = _generate_split(config, llms, "test")
    outcomes = _Outcomes(*(np.concatenate(pair) for pair in zip(train, test, strict=True)))
    calibration = np.arange(len(outcomes.prompt_tokens)) < len(train.prompt_tokens)
    return outcomes, calibration, ~calibration


def _generate_split(config: BankConfig, llms: list[str], split: str) -> _Outcomes:
    """Draw prompts, then each LLM's answers; an LLM's column is the same whatever the other LLMs are."""
    num_prompts = config.num_prompts or 0
    seed = [config.seed, SPLITS.index(split)]
    rng = np.random.default_rng(seed)
    share = np.array([domain.share for domain in config.domains])
    domain = rng.choice(len(share), size=num_prompts, p=share / share.sum())
    factor = np.stack([np.linalg.cholesky(figures.correlation()) for figures in config.domains])
    latent = np.einsum("pij,pj->pi", factor[domain], rng.standard_normal((num_prompts, 3)))
    difficulty, length_factor, prompt = latent.T
    log_prompt_mean = np.array([figures.log_prompt_mean for figures in config.domains])[domain]
    log_prompt_sd = np.array([figures.log_prompt_sd for figures in config.domains])[domain]

    quality = np.empty((num_prompts, len(llms)))
    output_tokens = np.empty((num_prompts, len(llms)), np.int64)
    for column, llm in enumerate(llms):
        figures = {name: np.asarray(values)[domain] for name, values in vars(config.llms[llm]).items()}
        rng = np.random.default_rng([*seed, zlib.crc32(llm.encode())])
        right = rng.random(num_prompts) < _sigmoid(figures["ability"] - figures["discrimination"] * difficulty)
        log_length = (
            figures["log_length_mean"]
            + figures["log_length_slope"] * length_factor
            + figures["log_length_sd"] * rng.standard_normal(num_prompts)
        )
        runaway = ~right & (rng.random(num_prompts) < figures["runaway"])
        tokens = np.where(runaway, config.max_output_tokens, np.rint(np.exp(log_length)))
        quality[:, column] = right
        output_tokens[:, column] = np.clip(tokens, 1, config.max_output_tokens)
    prompt_tokens = np.maximum(np.rint(np.exp(log_prompt_mean + log_prompt_sd * prompt)), 1).astype(np.int64)
    return _Outcomes(prompt_tokens, quality, output_tokens)


# --- outcomes: tables ---------------------------------------------------------------------------------------


def load_table(source: BankConfig | Path | str, data_dir: Path | None = None) -> Table:
    """Read and check the whole table of a bank, or of a folder, a user's own or a published one.

    Raises:
        UserError: no folder is set, files that are missing or do not belong together, values out of range.
    """
    if not isinstance(source, BankConfig):
        return read_table(Path(source))
    if source.kind == "embedded":
        raise UserError("bank.kind='embedded' is generated and has no table: use zeroeval, mmlu_pro or table")
    if source.kind == "table":
        if source.folder is None:
            raise UserError(
                "bank.kind='table' reads a folder and bank.folder is not set: set it to one that "
                "python -m jaxroute bank build wrote"
            )
        return read_table(Path(source.folder))
    if data_dir is None:
        raise UserError(
            f"bank.kind='{source.kind}' reads published tables and no data folder is set: "
            "set JAXROUTE_DATA or data_dir, or use bank.kind=embedded"
        )
    return read_table(Path(data_dir) / source.kind)


class _Predicted(NamedTuple):
    """What the router sees of an outcome."""

    quality: Float[np.ndarray, "prompt llm"]
    log_length: Float[np.ndarray, "prompt llm"]
    log_length_error: Float[np.ndarray, "llm"]


def _read_tables(
    config: BankConfig, llms: list[str], data_dir: Path | None
) -> tuple[_Outcomes, Bool[np.ndarray, "prompt"], Bool[np.ndarray, "prompt"], _Predicted | None]:
    """Outcomes of a table, which rows calibrate the predictor, which were asked for, and the predictions if given."""
    table = load_table(config, data_dir)
    where = config.folder if config.kind == "table" else f"{data_dir}/{config.kind}"
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
    outcomes = _Outcomes(
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
        predicted = _Predicted(given.quality[complete], np.log(given.output_tokens[complete]), given.log_length_error)
    return outcomes, calibration, wanted, predicted


# --- predictions --------------------------------------------------------------------------------------------


def _predict(outcomes: _Outcomes, calibration: Bool[np.ndarray, "prompt"], config: BankConfig) -> _Predicted:
    """Predicted quality, predicted log length, and the sd of the latter's error per LLM.

    Quality and log length are each split into a part shared by all LLMs of a prompt and an own part of each
    LLM. The predictor sees the four parts through Gaussian noise and nothing else. Both predictions are
    regressions on the shared signals of both and on the LLM's own signal: so the predicted length tells a
    router nothing about quality that the predicted quality does not already hold. The strengths of the
    signals are those at which the regressions reach the configured figures on the calibration rows.
    """
    streams = np.random.SeedSequence([config.seed, zlib.crc32(b"predictor")]).spawn(2)
    quality = _Signals(outcomes.quality, calibration, streams[0], _logistic_regression)
    length = _Signals(np.log(outcomes.output_tokens), calibration, streams[1], _linear_regression)
    # The strengths depend on each other a little, since the regressions share signals: two rounds settle it.
    for _ in range(2):
        _tune(length, quality, r2, config.noise, "length_r2", "length_own_r2")
        _tune(quality, length, auc, config.noise, "quality_auc", "quality_own_r2")
    log_length = length.predict(quality)
    error = (length.truth - log_length)[calibration].std(axis=0)
    return _Predicted(quality.predict(length), log_length, error)


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
        probability = _sigmoid(known @ weights)
        gradient = transposed @ (target - probability) - penalty * weights
        hessian = transposed @ (probability * (1 - probability) * known) + penalty * np.eye(known.shape[2])
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-3:  # convergence is quadratic
            break
    return _sigmoid(features @ weights)[..., 0].T


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


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

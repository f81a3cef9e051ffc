"""A fitted predictor, which predicts in plain NumPy and is stored without pickle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxroute.errors import UserError
from jaxroute.files import complete_folder
from jaxroute.predictors.features import BUCKETS, HASHING, Encoded, Features, count

_SETTINGS, _ARRAYS = "predictor.json", "predictor.npz"


class Answers(NamedTuple):
    """Qualities and lengths of LLMs' answers to prompts, true or predicted."""

    quality: Float[np.ndarray, "prompt llm"]
    """From 0 to 1, NaN where missing."""
    log_length: Float[np.ndarray, "prompt llm"]
    """Log of the output tokens, NaN where missing."""

    def rows(self, chosen: np.ndarray) -> Answers:
        """Return some of the prompts, by number or mask."""
        return Answers(self.quality[chosen], self.log_length[chosen])


class Weights(NamedTuple):
    """A linear model; columns are the logit of each LLM's quality, then the log length of its answer."""

    grams: Float[np.ndarray, "bucket output"]
    dense: Float[np.ndarray, "dense output"]
    intercept: Float[np.ndarray, "output"]

    def predict(self, encoded: Encoded) -> Answers:
        """Predict; a length is at least one token."""
        outputs = encoded.grams @ self.grams + encoded.dense @ self.dense + self.intercept
        logit, log_length = np.split(outputs, 2, axis=1)
        return Answers(0.5 * (1 + np.tanh(0.5 * logit)), np.maximum(log_length, 0))


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predicts each LLM's answer to a prompt from its text; `python -m jaxroute predict` makes one."""

    models: tuple[str, ...]
    """Names of the LLMs, in the order of the columns."""
    log_length_error: Float[np.ndarray, "llm"]
    """Standard deviation of log(output tokens) around log(predicted), on prompts that it was not fitted to."""
    features: Features
    """How a prompt becomes numbers."""
    weights: Weights
    """Weights of the linear model."""

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Float[np.ndarray, "prompt llm"], Float[np.ndarray, "prompt llm"]]:
        """Predict the answers to some prompts.

        Returns:
            The expected quality, from 0 to 1, and the median number of output tokens, at least 1.

        Raises:
            UserError: the prompts are not a sequence of texts.

        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("a predictor takes a list of texts: give [prompt] for one prompt")
        quality, log_length = self.weights.predict(self.features.encode(count(prompts)))
        return quality, np.exp(log_length)

    def save(self, folder: Path | str) -> None:
        """Store the predictor; the folder appears complete or not at all.

        Raises:
            UserError: the folder exists, or cannot be written.

        """
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder} exists already: name another folder, or remove it")
        arrays = {
            **self.features._asdict(),
            **{f"{name}_weights": array for name, array in self.weights._asdict().items()},
            "log_length_error": self.log_length_error,
        }
        with complete_folder(folder) as draft:
            np.savez(draft / _ARRAYS, **arrays)
            settings = {"hashing": HASHING, "models": list(self.models)}
            (draft / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Predictor:
        """Load what `save` stored; it predicts exactly the same.

        Raises:
            UserError: there is no predictor, it is damaged, or it is from a version with other features.

        """
        folder = Path(folder)
        if not (folder / _SETTINGS).is_file():
            raise UserError(
                f"{folder} holds no {_SETTINGS}: name the folder predictor/ in what python -m jaxroute predict wrote"
            )
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            hashing, models = settings["hashing"], tuple(settings["models"])
            with np.load(folder / _ARRAYS, allow_pickle=False) as stored:
                arrays = dict(stored)
            features = Features(*(arrays[name] for name in Features._fields))
            weights = Weights(*(arrays[f"{name}_weights"] for name in Weights._fields))
            error = arrays["log_length_error"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as problem:
            raise UserError(f"{folder} is damaged ({problem}): fit the predictor again") from problem
        if hashing != HASHING:
            raise UserError(f"{folder} was written by a version with other features: fit the predictor again")
        outputs = 2 * len(models)
        counts, waves = features.frequencies.shape if features.frequencies.ndim == 2 else (0, 0)
        shapes = {
            "idf": (features.idf, (2 * BUCKETS,)),
            "centre": (features.centre, (counts,)),
            "scale": (features.scale, (counts,)),
            "phases": (features.phases, (waves,)),
            "grams_weights": (weights.grams, (2 * BUCKETS, outputs)),
            "dense_weights": (weights.dense, (waves + counts + 1, outputs)),
            "intercept_weights": (weights.intercept, (outputs,)),
            "log_length_error": (error, (len(models),)),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                raise UserError(f"{folder} is damaged ({name} has shape {array.shape}): fit the predictor again")
        return cls(models, error, features, weights)

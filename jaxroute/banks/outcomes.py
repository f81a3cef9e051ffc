"""Answers of LLMs to prompts and predictions of them, on the host: the form that every kind of bank takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Outcomes(NamedTuple):
    """What the LLMs do, on the host; one column per distinct LLM."""

    prompt_tokens: Int[np.ndarray, "prompt"]
    quality: Float[np.ndarray, "prompt llm"]
    output_tokens: Int[np.ndarray, "prompt llm"]


class Predicted(NamedTuple):
    """What the router sees of an outcome."""

    quality: Float[np.ndarray, "prompt llm"]
    log_length: Float[np.ndarray, "prompt llm"]
    log_length_error: Float[np.ndarray, "llm"]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function."""
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow

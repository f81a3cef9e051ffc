"""What a study has found: policies compared in many settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxroute.evaluation.result import EvaluationResult


@dataclass(frozen=True)
class SettingResult:
    """What came out of one setting."""

    setting: str
    result: EvaluationResult  # rules and routers; a router's numbers are means over its training seeds
    training: Mapping[float, Mapping[str, Float[np.ndarray, "training seed"]]]  # rate -> router -> average QoS
    planned: EvaluationResult | None  # the shorter run: planners, rules and routers on common episodes


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    name: str
    routers: Sequence[str]  # the first is the reference
    rules: Sequence[str]
    planners: Sequence[str]
    settings: Sequence[SettingResult]
    provenance: Mapping[str, Any]  # command, versions, seed


def training_seed_name(label: str, index: int) -> str:
    """Name one training seed of a router in files."""
    return f"{label}[{index}]"

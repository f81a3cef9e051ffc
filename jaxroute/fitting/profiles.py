"""Fit an expert to a profile: how long single iterations took, by what was in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from jaxroute.errors import UserError
from jaxroute.fitting.calibration import COEFFICIENTS, Limits
from jaxroute.tables import number_remedy, open_table


def fit_profile(path: str | Path, limits: Limits) -> tuple[dict[str, float], dict[str, float]]:
    """Fit to a profile, a table with the columns batch, context, prompt, ms: one iteration per row.

    `batch` sequences decode with `context` tokens among them, or `prompt` tokens are computed. Returns coefficients and
    their relative standard errors; memory is not in it, so `limits.kv_capacity` must be given.

    Raises:
        UserError: a column or number is missing, or rows do not determine the coefficients.
    """
    path = Path(path)
    columns = ("batch", "context", "prompt", "ms")
    rows = []
    with open_table(path, f"the columns {', '.join(columns)}") as table:
        found = {name: table.find(name) for name in columns}
        if missing := sorted(name for name, known in found.items() if known is None):
            raise UserError(f"{path}: no column {', '.join(missing)}; a profile has {', '.join(columns)}")
        for place, cells in table.rows([name for name in found.values() if name is not None]):
            try:
                rows.append([float(cell) for cell in cells])
            except (TypeError, ValueError):
                remedy = number_remedy(cells, "correct or delete the row")
                raise UserError(f"{table.where(place)}: not four numbers; {remedy}") from None
            if min(rows[-1]) < 0 or not np.isfinite(rows[-1]).all() or rows[-1][3] == 0:
                raise UserError(f"{table.where(place)}: negative, infinite, or 0 ms; correct or delete the row")
    if limits.kv_capacity is None:
        raise UserError(f"{path}: a profile says nothing about memory; give --kv-capacity")
    batch, context, prompt, seconds = np.array(rows or np.zeros((0, 4))).T * np.array([[1], [1], [1], [1e-3]])
    decode, prefill = prompt == 0, (prompt > 0) & (batch == 0)
    design = np.stack([np.ones(decode.sum()), batch[decode], context[decode]], axis=1)
    if np.linalg.matrix_rank(design) < 3:
        raise UserError(f"{path}: rows with prompt=0 must differ in batch and in context, three at least")
    floor, per_sequence, per_token = _non_negative(design, seconds[decode])
    # What takes no longer than the weights is bound by them and says nothing about computing.
    bound = prefill & (seconds > 1.2 * floor)
    if not bound.any():
        raise UserError(f"{path}: no row with batch=0 and enough prompt tokens to take longer than loading the weights")
    compute = float(
        (prompt[bound] * (seconds[bound] - limits.iteration_overhead)).sum() / np.square(prompt[bound]).sum()
    )
    coefficients = {
        "iteration_overhead": limits.iteration_overhead,
        "weight_load": max(floor - limits.iteration_overhead, 1e-6),
        "compute_per_token": compute,
        "decode_per_seq": per_sequence,
        "attention_per_token": per_token,
        "kv_capacity": float(limits.kv_capacity),
    }
    error = design @ np.array([floor, per_sequence, per_token]) - seconds[decode]
    spread = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * np.square(error).sum() / max(len(error) - 3, 1))
    of_compute = float(np.std(compute * prompt[bound] - seconds[bound]) / np.sqrt(np.square(prompt[bound]).sum()))
    errors = dict.fromkeys(COEFFICIENTS, math.nan) | {"compute_per_token": of_compute / compute}
    for name, value, deviation in zip(
        ("weight_load", "decode_per_seq", "attention_per_token"), (floor, per_sequence, per_token), spread, strict=True
    ):
        errors[name] = float(deviation / value) if value > 0 else math.inf
    return coefficients, errors


def _non_negative(design: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares without negative coefficients: those that would be are left out one by one."""
    kept = list(range(design.shape[1]))
    while True:
        solution = np.linalg.lstsq(design[:, kept], target, rcond=None)[0]
        if (solution >= 0).all() or len(kept) == 1:
            values = np.zeros(design.shape[1])
            values[kept] = np.maximum(solution, 0)
            return values.tolist()
        kept.pop(int(np.argmin(solution)))

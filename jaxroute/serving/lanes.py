"""Batching along the last axis or the first one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, Shaped

# Up to so many slots, running sums are one product.
_FEW_SLOTS = 64

_Function = TypeVar("_Function", bound=Callable[..., Any])


def lanes_last(function: _Function) -> _Function:
    """Let `vmap` add one more last axis to the arrays of `function`, instead of batching each operation in it.

    `function` takes and returns pytrees of arrays, and must broadcast over axes behind those that it names.
    Long vectors then run through its arithmetic, several times as fast on a CPU as short ones behind the batch, and
    its loops run once for all, without selecting old or new for each batch entry in each round.
    """
    return _batched_along(-1, function)


def batch_first(function: _Function) -> _Function:
    """Let `vmap` add one more first axis to the arrays of `function`, instead of batching each operation in it.

    As `lanes_last`, for functions that broadcast over axes before those that they name.
    """
    return _batched_along(0, function)


def _batched_along(axis: int, function: _Function) -> _Function:
    @custom_vmap
    def batchable(*arguments: Any) -> Any:
        return function(*arguments)

    @batchable.def_vmap
    def batched(axis_size: int, in_batched: list, *arguments: Any) -> tuple[Any, Any]:
        def given(leaf: Array, batched: bool) -> Array:
            # Where there is no batch, an axis of one broadcasts.
            return jnp.moveaxis(leaf, 0, axis) if batched else jnp.expand_dims(leaf, axis)

        results = batchable(*jax.tree.map(given, arguments, tuple(in_batched)))

        def whole(leaf: Array) -> Array:
            first = jnp.moveaxis(leaf, axis, 0)
            return jnp.broadcast_to(first, (axis_size, *first.shape[1:]))

        return jax.tree.map(whole, results), jax.tree.map(lambda _: True, results)

    return wraps(function)(batchable)  # type: ignore[return-value]


def running_sums(*columns: Shaped[Array, "slot *lanes"]) -> list[Int[Array, "slot *lanes"]]:
    """Sums over each slot and those before it, of counts and tokens (exact up to 2^24)."""
    # As one matrix product: XLA's own running sums take several times as long on a CPU.
    num_slots, *lanes = columns[0].shape
    side_by_side = jnp.concatenate([column.astype(jnp.float32).reshape(num_slots, -1) for column in columns], axis=1)
    sums = _sums_up_to(side_by_side).astype(jnp.int32)
    return [part.reshape(num_slots, *lanes) for part in jnp.split(sums, len(columns), axis=1)]


def _sums_up_to(values: Float[Array, "slot lane"]) -> Float[Array, "slot lane"]:
    num_slots, num_lanes = values.shape
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if num_slots <= _FEW_SLOTS:
        return product(jnp.tril(jnp.ones((num_slots, num_slots), jnp.float32)), values)
    # The cost of one product grows with the square of the slots: within chunks first, and then over chunks.
    chunk = math.isqrt(num_slots - 1) + 1
    chunks = jnp.pad(values, ((0, -num_slots % chunk), (0, 0))).reshape(-1, chunk, num_lanes)
    within = product(jnp.tril(jnp.ones((chunk, chunk), jnp.float32)), chunks)
    before = product(jnp.tril(jnp.ones((len(chunks), len(chunks)), jnp.float32), -1), within[:, -1])
    return (within + before[:, None]).reshape(-1, num_lanes)[:num_slots]


def fold(operation: Callable[[Array, Array], Array], column: Shaped[Array, "slot *lanes"]) -> Shaped[Array, "*lanes"]:
    """Reduce over slots by halves: long vectors, where XLA reduces a leading axis one number at a time on a CPU."""
    while (half := column.shape[0] // 2) > 0:
        rest = column[2 * half :]
        column = jnp.concatenate([operation(column[:half], column[half : 2 * half]), rest])
    return column[0]

"""Batching along the last axis or the first one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, Shaped

_Function = TypeVar("_Function", bound=Callable[..., Any])


def lanes_last(function: _Function) -> _Function:
    """Let `vmap` add one more last axis to the arrays of `function`, instead of batching each operation in it.

    `function` takes and returns pytrees of arrays, and must broadcast over axes behind those that it names.
    Long vectors then run through its arithmetic, several times as fast on a CPU as short ones behind the batch, and
    its loops run once for all, without selecting old or new for each batch entry in each round.
    """

    @custom_vmap
    def batchable(*arguments: Any) -> Any:
        return function(*arguments)

    @batchable.def_vmap
    def batched(axis_size: int, in_batched: list, *arguments: Any) -> tuple[Any, Any]:
        def last(leaf: Array, batched: bool) -> Array:
            # Where there is no batch, a last axis of one broadcasts.
            return jnp.moveaxis(leaf, 0, -1) if batched else jnp.expand_dims(leaf, -1)

        results = batchable(*jax.tree.map(last, arguments, tuple(in_batched)))

        def first(leaf: Array) -> Array:
            return jnp.moveaxis(jnp.broadcast_to(leaf, (*leaf.shape[:-1], axis_size)), -1, 0)

        return jax.tree.map(first, results), jax.tree.map(lambda _: True, results)

    return wraps(function)(batchable)  # type: ignore[return-value]


def batch_first(function: _Function) -> _Function:
    """Let `vmap` add one more first axis to the arrays of `function`, instead of batching each operation in it.

    As `lanes_last`, for functions that broadcast over axes before those that they name.
    """

    @custom_vmap
    def batchable(*arguments: Any) -> Any:
        return function(*arguments)

    @batchable.def_vmap
    def batched(axis_size: int, in_batched: list, *arguments: Any) -> tuple[Any, Any]:
        def first(leaf: Array, batched: bool) -> Array:
            # Where there is no batch, a first axis of one broadcasts.
            return leaf if batched else jnp.expand_dims(leaf, 0)

        results = batchable(*jax.tree.map(first, arguments, tuple(in_batched)))

        def whole(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf, (axis_size, *leaf.shape[1:]))

        return jax.tree.map(whole, results), jax.tree.map(lambda _: True, results)

    return wraps(function)(batchable)  # type: ignore[return-value]


def running_sums(*columns: Shaped[Array, "slot *lanes"]) -> list[Int[Array, "slot *lanes"]]:
    """Sums over each slot and those before it, of counts and tokens (exact up to 2^24)."""
    # As one matrix product: XLA's own running sums take several times as long on a CPU.
    num_slots, *lanes = columns[0].shape
    side_by_side = jnp.concatenate([column.astype(jnp.float32).reshape(num_slots, -1) for column in columns], axis=1)
    up_to = jnp.tril(jnp.ones((num_slots, num_slots), jnp.float32))
    sums = jnp.matmul(up_to, side_by_side, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    return [part.reshape(num_slots, *lanes) for part in jnp.split(sums, len(columns), axis=1)]


def fold(operation: Callable[[Array, Array], Array], column: Shaped[Array, "slot *lanes"]) -> Shaped[Array, "*lanes"]:
    """Reduce over slots by halves: long vectors, where XLA reduces a leading axis one number at a time on a CPU."""
    while (half := column.shape[0] // 2) > 0:
        rest = column[2 * half :]
        column = jnp.concatenate([operation(column[:half], column[half : 2 * half]), rest])
    return column[0]

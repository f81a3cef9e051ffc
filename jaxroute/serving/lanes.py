"""Batching along the last axis."""

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

    `function` takes and returns arrays only, in any pytrees, and must broadcast over axes behind those that it names.
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


def positions(like: Shaped[Array, "first *lanes"]) -> Int[Array, "first *ones"]:
    """Number along the first axis, to be broadcast over the others."""
    return jnp.arange(like.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (like.ndim - 1))

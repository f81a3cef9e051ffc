"""Generalised advantage estimation (Schulman et al., 2016)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def generalised_advantages(
    rewards: Float[Array, "time *env"],
    values: Float[Array, "time *env"],
    next_values: Float[Array, "time *env"],
    terminated: Bool[Array, "time *env"],
    truncated: Bool[Array, "time *env"],
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Array, "time *env"], Float[Array, "time *env"]]:
    """Return advantages and value targets.

    `next_values` are the values of the observations that each step led to, before any reset. A termination ends the
    return; a truncation only ends the sum of temporal differences, and bootstraps from `next_values`.
    """
    deltas = rewards + discount * next_values * ~terminated - values

    def backwards(carry: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, ended = step
        advantage = delta + discount * gae_lambda * carry * ~ended
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[0]), (deltas, terminated | truncated), reverse=True)
    return advantages, advantages + values

"""One protocol for every router, rules and networks alike, so that evaluation can vmap over any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxroute.env.types import Observation

Params = Any
Memory = Any


class Policy(NamedTuple):
    """A router: a pure function of what it knows and what it sees."""

    name: str
    act: Callable[[Params, Any, PRNGKeyArray, Memory], tuple[Int[Array, ""], Memory]]
    """`(params, observation, key, memory) -> (action, memory)`; a planner is given a `planning.Situation` instead."""
    params: Params = ()
    memory: Memory = ()
    """Memory at the start of an episode."""
    plans: int = 0
    """How many steps a planner looks ahead."""


def best_available(obs: Observation, score: Float[Array, "expert"]) -> Int[Array, ""]:
    """Return the expert with the highest score among those that would take the request; ties go to the lowest index.

    No rule chooses an expert that is down or whose queue is full; a gateway would retry elsewhere at once.
    """
    return jnp.argmax(jnp.where(obs.experts.eligible, score, -jnp.inf))

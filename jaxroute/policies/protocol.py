"""One protocol for every router, rule or network, so that evaluation can vmap over any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env.types import Observation

Params = Any
Memory = Any


class Policy(NamedTuple):
    """A router: a pure function of its parameters, its memory and what it sees."""

    name: str
    act: Callable[[Params, Any, PRNGKeyArray, Memory], tuple[Int[Array, ""], Memory]]
    """`(params, observation, key, memory) -> (action, memory)`; a planner is given a `planning.Situation` instead. An
    action is an expert's number, or one more than the last, for away."""
    params: Params = ()
    memory: Memory = ()
    """Memory at the start of an episode."""
    plans: int = 0
    """Number of steps that a planner looks ahead; 0 for all other policies."""
    declines: bool = False
    """Whether it can only act where a request may be sent away."""


def best_available(obs: Observation, score: Float[Array, "expert"]) -> Int[Array, ""]:
    """Return the eligible expert with the highest score; ties go to the lowest index.

    No rule may choose an expert that is down or would visibly reject the request, as long as there is another: a
    gateway would retry elsewhere.
    """
    return jnp.argmax(jnp.where(obs.experts.eligible, score, -jnp.inf)).astype(jnp.int32)


def best_action(obs: Observation, score: Float[Array, "action"]) -> Int[Array, ""]:
    """Return the best eligible expert, or away if it scores higher; a score for away comes last, if there is one."""
    return jnp.argmax(jnp.where(eligible_actions(obs), score, -jnp.inf)).astype(jnp.int32)


def eligible_actions(obs: Observation) -> Bool[Array, "action"]:
    """Return the eligible experts, and whether the request may be sent away, if there is such an action."""
    eligible = obs.experts.eligible
    return eligible if obs.away is None else jnp.append(eligible, obs.away.allowed)

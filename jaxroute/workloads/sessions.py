"""Sessions: requests that come in turns, each of which begins with all that was said before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxroute.errors import UserError

MOST_SESSIONS = 4096
"""Of one workload at once; an environment remembers how far each of them has come."""


@dataclass
class ApplicationConfig:
    """What sessions of one kind have in common."""

    name: str
    """Name of the application."""
    system_tokens: int = 0
    """Length of the system prompt with which all its requests begin."""
    share: float = 1.0
    """Share of the sessions that are its own, in proportion to the others'."""

    def __post_init__(self) -> None:
        if self.system_tokens < 0:
            raise UserError(f"application {self.name}: system_tokens={self.system_tokens} must not be negative")
        if not 0 < self.share < float("inf"):
            raise UserError(f"application {self.name}: share={self.share} must be above 0, and finite")


@dataclass
class SessionsConfig:
    """Requests that come in turns of sessions, as written in configs/workload."""

    turns: float = 2.5
    """Mean number of turns of a session; it is geometric."""
    seconds_between_turns: float = 60.0
    """Mean time from one turn of a session to the next, s, at the nominal rate."""
    max_context: int = 4096
    """Tokens that a session's text may reach: where the next prompt would make it longer, a new session begins."""
    applications: list[ApplicationConfig] = field(default_factory=list)
    """Kinds of sessions; none: all without a system prompt."""

    def __post_init__(self) -> None:
        if not 1 <= self.turns < float("inf"):
            raise UserError(f"workload.sessions: turns={self.turns} must be at least 1, and finite")
        if not 0 < self.seconds_between_turns < float("inf"):
            raise UserError(
                f"workload.sessions: seconds_between_turns={self.seconds_between_turns} must be above 0, and finite"
            )
        longest = max((application.system_tokens for application in self.applications), default=0)
        if self.max_context <= longest:
            raise UserError(
                f"workload.sessions: max_context={self.max_context} must exceed the longest system prompt, {longest}"
            )


class SessionParams(NamedTuple):
    """Parameters of sessions."""

    begins: Float[Array, ""]
    """Probability that a request begins a new session."""
    max_context: Int[Array, ""]
    """Tokens."""
    share_up_to: Float[Array, "application"]
    """Share of the sessions that belong to this application or one before it."""
    system_tokens: Int[Array, "application"]


def num_sessions(config: SessionsConfig, rate: float) -> int:
    """Return how many sessions are alive at once at so many requests per second: rate of further turns x time.

    Raises:
        UserError: they are too many.
    """
    number = math.ceil(rate * (1 - 1 / config.turns) * config.seconds_between_turns)
    if number > MOST_SESSIONS:
        raise UserError(
            f"workload.sessions: at {rate:g} requests per second, {number} sessions would be alive at once, and "
            f"{MOST_SESSIONS} can be; lower seconds_between_turns or turns"
        )
    return max(number, 1)


def session_params(config: SessionsConfig) -> SessionParams:
    """Turn the configuration into arrays."""
    applications = config.applications or [ApplicationConfig("all")]
    shares = np.cumsum([application.share for application in applications])
    return SessionParams(
        begins=jnp.float32(1 / config.turns),
        max_context=jnp.int32(config.max_context),
        share_up_to=jnp.asarray(shares / shares[-1], jnp.float32),
        system_tokens=jnp.asarray([application.system_tokens for application in applications], jnp.int32),
    )

"""What a request demands: limits on its latencies, and classes of service that state them.

A request is in time if every limit that it has holds. MLPerf's servers limit TTFT and TPOT, an SLO may limit E2E, and
the normalised latency (E2E / output tokens) limits the whole in proportion to the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxroute.errors import UserError


class Limits(NamedTuple):
    """Limits, or what is limited; a field is None where no request has such a limit, and inf where this one has none.

    Fields are alike in shape, of JAX or of NumPy.
    """

    ttft: Any = None
    """Time to first token, s."""
    tpot: Any = None
    """Time per further token, (E2E - TTFT) / (tokens - 1), s."""
    e2e: Any = None
    """Time to the last token, s."""
    normalised: Any = None
    """E2E / tokens, s."""

    def met(self, measured: Limits) -> Bool[Array, "*shape"]:
        """Return whether all limits hold."""
        within = [value <= limit for value, limit in zip(measured, self, strict=True) if limit is not None]
        return _combined(within, lambda one, other: one & other)

    def relative(self, measured: Limits) -> Float[Array, "*shape"]:
        """Return the greatest ratio of what is measured to its limit; up to 1, all limits hold."""
        ratios = [value / limit for value, limit in zip(measured, self, strict=True) if limit is not None]
        return _combined(ratios, lambda one, other: jnp.maximum(one, other))

    def rates(self) -> Limits:
        """Return what each limit allows per second, 1/s: 0 for none. Means of these are those of `of_rates`."""
        return Limits(*(None if limit is None else 1 / limit for limit in self))

    @classmethod
    def of_rates(cls, rates: Limits) -> Limits:
        """Return the limits that allow so much per second."""

        def limit(rate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            return jnp.where(rate > 0, 1 / jnp.maximum(rate, 1e-30), jnp.inf)

        return cls(*(None if rate is None else limit(rate) for rate in rates))

    def per_token(self, tokens: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the time per token of an answer of `tokens` tokens that is just within all limits, s; inf for none.

        With a limit on TPOT and none on TTFT, the first token may take as long as another.
        """
        allowed = [] if self.normalised is None else [self.normalised]
        if self.e2e is not None:
            allowed.append(self.e2e / tokens)
        if self.tpot is not None:
            first = self.tpot if self.ttft is None else jnp.where(jnp.isinf(self.ttft), self.tpot, self.ttft)
            # Without a limit on TPOT, a single token would be inf times 0.
            allowed.append(jnp.where(jnp.isinf(self.tpot), jnp.inf, (first + self.tpot * (tokens - 1)) / tokens))
        elif self.ttft is not None and not allowed:
            allowed.append(jnp.full_like(self.ttft, jnp.inf))
        return _combined(allowed, lambda one, other: jnp.minimum(one, other))


def latencies(ttft: Any, latency: Any, tokens: Any) -> Limits:
    """Return all that can be limited, of answers of `tokens` tokens whose first and last one took so long, s."""
    xp = latency.__array_namespace__() if hasattr(latency, "__array_namespace__") else np
    return Limits(
        ttft=ttft,
        tpot=(latency - ttft) / xp.maximum(tokens - 1, 1),
        e2e=latency,
        normalised=latency / xp.maximum(tokens, 1),
    )


def _combined(parts: Sequence[Any], operation: Any) -> Any:
    first, *others = parts
    for other in others:
        first = operation(first, other)
    return first


@dataclass
class RequirementConfig:
    """One class of service: what its requests demand, and how common they are. A limit that is null does not hold."""

    name: str
    """Name of the class."""
    share: float
    """Share of the requests, relative to the other classes."""
    ttft: float | None = None
    """Maximum time to first token, s."""
    tpot: float | None = None
    """Maximum time per further token, s."""
    e2e: float | None = None
    """Maximum time to the last token, s."""
    normalised: float | None = None
    """Maximum normalised latency (E2E / output tokens), s."""


def check_requirements(requirements: Sequence[RequirementConfig], where: str) -> None:
    """Check classes of service.

    Raises:
        UserError: there is none; a limit is not above 0; a class has no limit; no class has a share.
    """
    if not requirements:
        raise UserError(f"{where}: requirements is empty; give at least one class of service")
    for requirement in requirements:
        limits = {name: getattr(requirement, name) for name in Limits._fields}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise UserError(f"{where}: requirement {requirement.name} limits nothing; give one of {', '.join(limits)}")
        for name, limit in given.items():
            if not 0 < limit < float("inf"):
                raise UserError(
                    f"{where}: requirement {requirement.name}: {name}={limit} must be above 0 s, and finite"
                )
        if not 0 <= requirement.share < float("inf"):
            raise UserError(f"{where}: requirement {requirement.name}: share={requirement.share} must be at least 0")
    if sum(requirement.share for requirement in requirements) <= 0:
        raise UserError(f"{where}: the shares of all requirements are 0")


def limits_of(requirements: Sequence[RequirementConfig]) -> Limits:
    """Return the limits of all classes, `(class,)`."""

    def column(name: str) -> Float[Array, "class"] | None:
        values = [getattr(requirement, name) for requirement in requirements]
        if all(value is None for value in values):
            return None
        return jnp.asarray([np.inf if value is None else value for value in values], jnp.float32)

    return Limits(*map(column, Limits._fields))

"""What decides in a gateway: a router, the guard around it, and what looks at its decisions again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxroute.errors import UserError
from jaxroute.gateway.fleet import Fleet
from jaxroute.gateway.guard import Guard, Trained
from jaxroute.gateway.router import Router
from jaxroute.gateway.rules import DRAWS, Assessor, RuleDecision, Surroundings, is_rule, rule_named


@dataclass
class Policies:
    """A router with its guard, ready to decide."""

    name: str
    """Of the policy."""
    fallback: str
    router: Router
    guard: Guard
    assessor: Assessor
    around: Surroundings
    """The site."""

    def propensity(self, logits: np.ndarray, fell_back: bool) -> float | None:
        """Return with which probability the latest choice was made; None if a rule drew it in a way not told."""
        rule = (self.fallback if fell_back else self.name).partition("+")[0]
        if rule == "random":
            return 1 / max(int((logits[: len(self.router.experts)] > -1e8).sum()), 1)
        return None if rule in DRAWS else 1.0


def guarded(
    name: str,
    router: Router,
    around: Surroundings,
    fleet: Fleet,
    *,
    trained: dict[str, Any] | None = None,
) -> Policies:
    """Put the guard around a router, and compile the fallback and the shadows.

    Args:
        name: of the policy, for log and metrics.
        router: fresh.
        around: its site.
        fleet: guard, fallback and shadows.
        trained: what the manifest says of its training; None for a rule, which works anywhere.

    Raises:
        UserError: a fallback or shadow that does not exist, or cannot act here.
    """
    try:
        fallback = RuleDecision(rule_named(fleet.fallback, around.away), around)
    except UserError as error:
        raise UserError(f"fallback: {error}") from None
    try:
        assessor = Assessor(around, fleet.shadow)
    except UserError as error:
        raise UserError(f"shadow: {error}") from None
    guard = Guard(
        router.decide,
        fallback,
        seconds=None if is_rule(name) else fleet.guard.decision_ms / 1000,
        site=around.array(),
        trained=Trained(**trained) if trained and fleet.guard.trained_range else None,
    )
    guard.warm_up(around.slots)
    router.decide = guard
    return Policies(name, fleet.fallback, router, guard, assessor, around)

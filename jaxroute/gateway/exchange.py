"""One request from its arrival to its end: what became of it, and its record."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxroute.decisions import CANCELLED, COMPLETED, FORMAT
from jaxroute.gateway.demand import Demand
from jaxroute.gateway.policy import Policies
from jaxroute.gateway.router import Router
from jaxroute.gateway.rules import Assessment
from jaxroute.workloads.limits import latencies


class WallClock:
    """Seconds that never go back, `speed` times as quick as real ones; and what time of day they stand for."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._start, self._epoch = time.monotonic(), time.time()

    def now(self) -> float:
        """Return seconds since the start."""
        return (time.monotonic() - self._start) * self.speed

    def wall(self, at: float) -> float:
        """Return seconds since 1970 of a time of this clock."""
        return round(self._epoch + at, 6)


@dataclass
class Decision:
    """The latest decision on a request."""

    choice: int
    """An expert's number, or `DECLINED` or `CLOUD`."""
    logits: list[float]
    seconds: float
    fallback: str | None
    """The rule that decided in the policy's place."""
    guard: str | None
    """Why it did; likewise the next."""
    guard_detail: str | None
    propensity: float | None
    assessment: Future[Assessment | None]


@dataclass
class Exchange:
    """A request under way."""

    id: str
    demand: Demand
    policies: Policies
    arrived: float
    quality: list[float]
    """Predictions, per expert and of the cloud; likewise the next."""
    output_tokens: list[float]
    decision: Decision | None = None
    tries: list[dict[str, Any]] = field(default_factory=list)
    """What servers failed with before the one that answered."""
    task: asyncio.Task[None] | None = None
    """The try under way."""
    evicted: bool = False
    """Whether its expert has gone down before the answer began."""
    at_router: bool = False
    """Whether the router counts it."""
    started: bool = False
    """Whether the client has been sent something of the answer."""
    first_token: float | None = None
    ended: float | None = None
    outcome: str | None = None
    status: int = 0
    error: str | None = None
    tokens: int | None = None
    tokens_from: str | None = None
    told_prompt_tokens: int | None = None
    """As the server has counted them."""
    told_tokens: int | None = None
    """Tokens of the answer that the router has been told of."""

    @property
    def router(self) -> Router:
        """Where it is counted."""
        return self.policies.router

    @property
    def place(self) -> int | None:
        """Where it is or was; None if it was never routed."""
        return None if self.decision is None else self.decision.choice

    def end(self, outcome: str, now: float, *, status: int, error: str | None = None) -> None:
        """Note how it has ended; only the first call counts."""
        if self.outcome is None:
            self.outcome, self.ended, self.status, self.error = outcome, now, status, error

    @property
    def measured(self) -> dict[str, float | None]:
        """Its latencies, s; None where they are not known."""
        ttft = None if self.first_token is None else self.first_token - self.arrived
        if self.outcome != COMPLETED or self.ended is None or not self.tokens:
            return {"ttft": ttft, "tpot": None, "e2e": None, "normalised": None}
        e2e = self.ended - self.arrived
        all_ = latencies(ttft or 0.0, np.float64(e2e), self.tokens)
        tpot = None if ttft is None else float(all_.tpot)
        return {"ttft": ttft, "tpot": tpot, "e2e": e2e, "normalised": e2e / self.tokens}

    @property
    def in_time(self) -> bool | None:
        """Whether it kept its limits; None if none of them can be measured, or the client left, or it goes on."""
        if self.outcome in (None, CANCELLED):
            return None
        if self.outcome != COMPLETED:
            return False
        measured = self.measured
        known = [
            measured[name] <= limit
            for name, limit in self.demand.limits._asdict().items()
            if limit is not None and measured[name] is not None
        ]
        return all(known) if known else None

    @property
    def qos(self) -> float | None:
        """Predicted quality if it was in time, else 0; None if that is not known."""
        if self.in_time is None:
            return None
        return self.quality[self.place] if self.in_time and self.place is not None else 0.0

    def record(self, clock: WallClock, names: list[str], *, spent: float, prompts: bool) -> dict[str, Any]:
        """Return its line in the log."""
        demand, decision = self.demand, self.decision
        measured = self.measured
        place = self.place
        assessment = decision.assessment.result() if decision is not None and decision.assessment.done() else None
        ended = clock.wall(self.ended) if self.ended is not None else None
        record: dict[str, Any] = {
            "format": FORMAT,
            "id": self.id,
            "outcome": self.outcome,
            "status": self.status,
            "error": self.error,
            "class": demand.service_class,
            "limits": {name: limit for name, limit in demand.limits._asdict().items() if limit is not None},
            "may_decline": demand.may_decline,
            "local_only": demand.local_only,
            "named": None if demand.is_routed else demand.model,
            "stream": demand.stream,
            "arrival_time": clock.wall(self.arrived),
            "first_token_time": None if self.first_token is None else clock.wall(self.first_token),
            "last_token_time": ended if self.outcome == COMPLETED else None,
            "end_time": ended,
            "prompt_tokens": self.told_prompt_tokens or demand.prompt_tokens,
            "estimated_prompt_tokens": demand.prompt_tokens,
            "output_tokens": self.tokens,
            "tokens_from": self.tokens_from,
            "expert": None if place is None or place == -1 else "cloud" if place < 0 else names[place],
            "choice": place,
            "policy": self.policies.name,
            "fallback": decision and decision.fallback,
            "guard": decision and decision.guard,
            "guard_detail": decision and decision.guard_detail,
            "logits": decision and decision.logits,
            "propensity": decision and decision.propensity,
            "decision_ms": decision and round(1000 * decision.seconds, 3),
            "tries": self.tries,
            "predicted": {"quality": self.quality, "output_tokens": self.output_tokens},
            "expected": assessment and assessment.expected,
            "cloud": assessment and assessment.cloud,
            "shadow": assessment.shadows if assessment else None,
            **{name: None if value is None else round(value, 6) for name, value in measured.items()},
            "in_time": self.in_time,
            "qos": self.qos,
            "spent": round(spent, 6),
        }
        if prompts:
            record["prompt"] = demand.text
        return record

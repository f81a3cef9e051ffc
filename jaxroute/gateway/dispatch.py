"""Requests under way, however they travel: taken in, routed by the policy, told to the router, logged once.

The proxy carries answers itself. The adapters for LiteLLM and Envoy leave that to these, and tell what they see of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxroute.decisions import COMPLETED, DECLINED, FAILED, REJECTED
from jaxroute.gateway import router as places
from jaxroute.gateway.demand import Demand, RefusalError, demand_of
from jaxroute.gateway.exchange import Decision, Exchange, WallClock
from jaxroute.gateway.fleet import CloudEntry, ExpertEntry, Fleet
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.openai import CHARACTERS_PER_TOKEN
from jaxroute.gateway.policy import Policies

RETRY_AFTER = 1  # s; load changes from second to second
_MOST_CHARACTERS = 10.0  # per token; of a prompt with images, for instance, text says little
_LEARNING = 0.02  # how much one answer changes the estimate of characters per token


class Dispatcher:
    """Keeps the books of a fleet's requests. It belongs to one event loop."""

    def __init__(
        self, fleet: Fleet, policies: Policies, recorder: Recorder, metrics: Metrics, clock: WallClock
    ) -> None:
        """Start with no requests."""
        self.recorder, self.metrics, self.clock = recorder, metrics, clock
        self.exchanges: dict[str, Exchange] = {}
        self.characters_per_token = CHARACTERS_PER_TOKEN
        self.on_end: Callable[[dict[str, Any]], None] = lambda record: None
        self.use(fleet, policies)

    def use(self, fleet: Fleet, policies: Policies) -> None:
        """Take another fleet file and policy; requests in flight go on where they are."""
        self.fleet, self.policies = fleet, policies
        self.names = names_of(fleet)
        for number, name in enumerate(self.names):
            self.metrics.up.labels(name).set(policies.router.up[number])

    @property
    def num_places(self) -> int:
        """How many predictions a request has: one per expert, and one for the cloud."""
        return len(self.fleet.experts) + (self.fleet.cloud is not None)

    def name(self, place: int) -> str:
        """Return how log, metrics and page call a place."""
        return self.names[place] if place >= 0 else "cloud"

    # --- One request, from its arrival to its end ------------------------------------------------------------

    def demand(self, body: dict[str, Any], headers: Mapping[str, str], *, chat: bool) -> Demand:
        """Check a request of this fleet.

        Args:
            body: its JSON.
            headers: by lower-case name.
            chat: whether it has messages instead of a prompt.

        Raises:
            RefusalError: it cannot be understood, or names a model or a class that does not exist.
        """
        per_token = self.characters_per_token
        return demand_of(
            body, headers, self.fleet, chat=chat, characters_per_token=per_token, num_places=self.num_places
        )

    def admit(self, demand: Demand, request_id: str) -> Exchange:
        """Take in a request, with its predictions.

        Raises:
            RefusalError: there are too many.
        """
        if len(self.exchanges) >= self.fleet.limits.in_flight:
            raise RefusalError(429, "too many requests are in flight", "too_many_requests", retry_after=RETRY_AFTER)
        quality, tokens = demand.quality, demand.output_tokens
        predict = self.policies.router.predict
        if (quality is None or tokens is None) and predict is not None and demand.characters:
            of_text = predict(demand.text)
            quality = quality or [float(value) for value in of_text[0]]
            tokens = tokens or [float(value) for value in of_text[1]]
        entries: list[ExpertEntry | CloudEntry] = [*self.fleet.experts]
        entries += [self.fleet.cloud] if self.fleet.cloud else []
        exchange = Exchange(
            id=request_id,
            demand=demand,
            policies=self.policies,
            arrived=self.clock.now(),
            quality=quality or [entry.quality for entry in entries],
            output_tokens=tokens or [entry.output_tokens for entry in entries],
        )
        self.exchanges[request_id] = exchange
        self.metrics.in_flight.set(len(self.exchanges))
        return exchange

    def route(self, exchange: Exchange, candidates: Sequence[int]) -> int:
        """Let the policy decide; returns an expert of the candidates, or `CLOUD`.

        Raises:
            RefusalError: the policy declines the request.
        """
        demand, policies = exchange.demand, self.policies
        exchange.policies = policies
        router, guard = policies.router, policies.guard
        limits = {name: limit for name, limit in demand.limits._asdict().items() if limit is not None}
        now = self.clock.now()
        started = time.perf_counter()
        place = router.route(
            exchange.id,
            now=now,
            prompt_tokens=demand.prompt_tokens,
            **limits,
            predicted_quality=exchange.quality,
            predicted_output_tokens=exchange.output_tokens,
            arrived=exchange.arrived if exchange.tries else None,
            may_go_away=demand.may_decline and demand.is_routed,
            local_only=demand.local_only or any(one["expert"] == "cloud" for one in exchange.tries),
            among=candidates,
        )
        seconds = time.perf_counter() - started
        exchange.at_router = place != places.DECLINED
        self.metrics.decision.observe(seconds)
        fell_back = guard.reason is not None
        if guard.reason is not None:
            self.metrics.fallbacks.labels(guard.reason).inc()
        exchange.decision = Decision(
            choice=place,
            logits=[round(float(score), 4) for score in router.logits],
            seconds=seconds,
            fallback=policies.fallback if fell_back else None,
            guard=guard.reason,
            guard_detail=guard.detail,
            propensity=policies.propensity(router.logits, fell_back),
            assessment=self.recorder.decided(router.seen),  # type: ignore[arg-type]
        )
        if place == places.DECLINED:
            what = "declined: the request is worth less than what it would take from others"
            raise RefusalError(429, what, "declined", retry_after=RETRY_AFTER)
        return place

    def first_token(self, exchange: Exchange) -> None:
        """Tell the router that the first token of its answer has come."""
        now = self.clock.now()
        if exchange.first_token is None:
            exchange.first_token = now
        if exchange.at_router:
            exchange.router.first_token(exchange.id, now=now)

    def progress(self, exchange: Exchange, tokens: int | None) -> None:
        """Tell the router how far the answer is, if the server says so on the way."""
        told, exchange.told_tokens = exchange.told_tokens, tokens
        if tokens and tokens != told and exchange.at_router and exchange.place is not None and exchange.place >= 0:
            exchange.router.progress(exchange.id, now=self.clock.now(), generated=tokens)

    def try_failed(self, exchange: Exchange, error: str) -> None:
        """A server has failed it before its answer began; it may be routed again."""
        self._forget(exchange)
        name = self.name(exchange.place or 0)
        self.metrics.retries.labels(name).inc()
        exchange.tries.append({"expert": name, "error": error, "time": self.clock.wall(self.clock.now())})
        exchange.first_token = None

    def completed(
        self, exchange: Exchange, *, tokens: int | None, tokens_from: str, prompt_tokens: int | None, status: int = 200
    ) -> None:
        """The last token of its answer has come.

        Args:
            exchange: of the request.
            tokens: of the answer, if they are known.
            tokens_from: how they were counted.
            prompt_tokens: as the server has counted them, if it says.
            status: of the answer.
        """
        now = self.clock.now()
        exchange.tokens, exchange.tokens_from = tokens, tokens_from
        exchange.told_prompt_tokens = prompt_tokens
        exchange.end(COMPLETED, now, status=status)
        if prompt_tokens and exchange.demand.characters:
            measured = min(max(exchange.demand.characters / prompt_tokens, 1.0), _MOST_CHARACTERS)
            self.characters_per_token += _LEARNING * (measured - self.characters_per_token)
        if exchange.at_router:
            tokens = tokens or max(round(exchange.output_tokens[exchange.place or 0]), 1)
            exchange.router.finished(exchange.id, now=now, output_tokens=tokens)
            exchange.at_router = False

    def leave(self, exchange: Exchange) -> None:
        """A request has ended: log it, and count it once its decision has been assessed."""
        self._forget(exchange)
        exchange.end(FAILED, self.clock.now(), status=500, error="it ended in no known way")
        del self.exchanges[exchange.id]
        self.metrics.in_flight.set(len(self.exchanges))
        names, loop = self.names, asyncio.get_running_loop()

        def record() -> dict[str, Any]:
            line = self.record(exchange, names)
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended, line)
            return line

        self.recorder.end(record)

    def _forget(self, exchange: Exchange) -> None:
        """The router counts the request no longer."""
        if exchange.at_router:
            exchange.router.failed(exchange.id)
            exchange.at_router = False

    def _ended(self, record: dict[str, Any]) -> None:
        self.metrics.ended(record)
        self.metrics.log_lost.set(self.recorder.lost)
        self.on_end(record)

    def record(self, exchange: Exchange, names: list[str] | None = None) -> dict[str, Any]:
        """Return a request's line in the log, as far as it is known."""
        spent = 0.0
        cloud = self.fleet.cloud
        if exchange.place == places.CLOUD and exchange.outcome == COMPLETED and cloud is not None:
            tokens = (exchange.told_prompt_tokens or exchange.demand.prompt_tokens) + (exchange.tokens or 0)
            spent = cloud.price_per_request + cloud.price_per_1k_tokens * tokens / 1000
        return exchange.record(self.clock, names or self.names, spent=spent, prompts=self.fleet.log.prompts)

    # --- Servers ---------------------------------------------------------------------------------------------

    def gauges_read(self, number: int, found: dict[str, float], seconds: float) -> None:
        """Let the router know of requests that came past this gateway; the gauges were asked for `seconds` ago."""
        router = self.policies.router
        if "running" not in found or not router.up[number]:
            return
        share, now = found.get("kv_share"), self.clock.now()
        router.gauges(
            number,
            now=now,
            asked=now - seconds * self.clock.speed,
            running=int(found["running"]),
            waiting=int(found.get("waiting", 0)),
            kv_tokens=None if share is None else share * self.policies.around.site.experts[number].kv_capacity,
        )

    def server_changed(self, number: int, up: bool) -> list[Exchange]:
        """A server has gone down, or come up; returns the requests that the router has forgotten with it."""
        router = self.policies.router
        self.metrics.up.labels(self.names[number]).set(up)
        if up:
            router.expert_up(number)
            return []
        found = [self.exchanges.get(str(request_id)) for request_id in router.expert_down(number)]
        lost = [exchange for exchange in found if exchange is not None]
        for exchange in lost:
            exchange.at_router = False
        return lost

    def update_gauges(self, polled: Sequence[dict[str, float]]) -> None:
        """Set what Prometheus sees of the experts; `polled` is what each one's own metrics say, as far as they do."""
        loads = self.policies.router.loads
        for number, (name, told) in enumerate(zip(self.names, polled, strict=True)):
            self.metrics.running.labels(name).set(int(loads.running[number]))
            self.metrics.waiting.labels(name).set(int(loads.waiting[number]))
            if "running" in told:
                there = told["running"] + told.get("waiting", 0)
                ours = int(loads.running[number] + loads.waiting[number])
                self.metrics.foreign.labels(name).set(max(there - ours, 0))


def nobody(demand: Demand | None = None) -> RefusalError:
    """Return why a request cannot be sent: no server is up that may have it."""
    wanted = "" if demand is None or demand.is_routed else f" that serves {demand.model}"
    return RefusalError(503, f"no server{wanted} is up", "no_server", retry_after=RETRY_AFTER)


def outcome_of(refusal: RefusalError) -> str:
    """Return how a request that was refused has ended."""
    return {"declined": DECLINED, "queue_full": REJECTED, "no_server": REJECTED}.get(refusal.code, FAILED)


def names_of(fleet: Fleet) -> list[str]:
    """Return how log, metrics and page call each expert: by its LLM, and a number where several serve the same."""
    models = [expert.model for expert in fleet.experts]
    return [
        model if models.count(model) == 1 else f"{model}#{models[:number].count(model) + 1}"
        for number, model in enumerate(models)
    ]

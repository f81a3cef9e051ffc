"""The way of a request through the gateway: routed, sent, answered piece by piece, ended exactly once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote

import aiohttp

from jaxroute.decisions import CANCELLED, COMPLETED, DECLINED, FAILED, REJECTED
from jaxroute.errors import UserError
from jaxroute.gateway import router as places
from jaxroute.gateway.demand import Demand, RefusalError
from jaxroute.gateway.exchange import Decision, Exchange, WallClock
from jaxroute.gateway.fleet import CloudEntry, ExpertEntry, Fleet
from jaxroute.gateway.health import Health
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.openai import CHARACTERS_PER_TOKEN, error_body
from jaxroute.gateway.policy import Policies
from jaxroute.gateway.stream import Tally
from jaxroute.gateway.upstream import (
    Server,
    UpstreamError,
    answer_headers,
    asked,
    parts,
    request_headers,
    whole,
)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("jaxroute.gateway")

_RETRY_AFTER = 1  # s; load changes from second to second
_MOST_CHARACTERS = 10.0  # per token; of a prompt with images, for instance, text says little
_LEARNING = 0.02  # how much one answer changes the estimate of characters per token


class Proxy:
    """Answers requests with the servers of a fleet. It belongs to one event loop."""

    def __init__(
        self,
        fleet: Fleet,
        policies: Policies,
        session: aiohttp.ClientSession,
        recorder: Recorder,
        metrics: Metrics,
        clock: WallClock,
    ) -> None:
        """Start with a fleet whose servers all count as up."""
        self.session, self.recorder, self.metrics, self.clock = session, recorder, metrics, clock
        self.exchanges: dict[str, Exchange] = {}
        self.characters_per_token = CHARACTERS_PER_TOKEN
        self.draining = False
        self.on_end: Callable[[dict[str, Any]], None] = lambda record: None
        self.use(fleet, policies)

    def use(self, fleet: Fleet, policies: Policies) -> None:
        """Take another fleet file and policy; requests in flight go on where they are."""
        self.fleet, self.policies = fleet, policies
        self.servers = [Server(entry) for entry in fleet.experts]
        self.cloud = None if fleet.cloud is None else Server(fleet.cloud)
        self.names = names_of(fleet)
        self.health = Health(self.servers, fleet.health, self.session, self._server_changed, self._gauges_read)
        for number, name in enumerate(self.names):
            self.metrics.up.labels(name).set(policies.router.up[number])

    @property
    def num_places(self) -> int:
        """How many predictions a request has: one per expert, and one for the cloud."""
        return len(self.servers) + (self.cloud is not None)

    def _server_changed(self, number: int, up: bool) -> None:
        router = self.policies.router
        self.metrics.up.labels(self.names[number]).set(up)
        logger.warning("%s is %s", self.names[number], "up" if up else "down")
        if up:
            router.expert_up(number)
            return
        for request_id in router.expert_down(number):
            exchange = self.exchanges.get(str(request_id))
            if exchange is None:
                continue
            exchange.at_router = False
            # An answer that has begun may still come to its end.
            if not exchange.started and exchange.task is not None:
                exchange.evicted = True
                exchange.task.cancel()

    def _gauges_read(self, number: int, found: dict[str, float]) -> None:
        """Let the router know of requests that came past this gateway."""
        router = self.policies.router
        if "running" not in found or not router.up[number]:
            return
        share = found.get("kv_share")
        router.gauges(
            number,
            now=self.clock.now(),
            running=int(found["running"]),
            waiting=int(found.get("waiting", 0)),
            kv_tokens=None if share is None else share * self.policies.around.site.experts[number].kv_capacity,
        )

    # --- One request ---------------------------------------------------------------------------------------

    async def answer(self, demand: Demand, headers: Mapping[str, str], send: Send, request_id: str) -> None:
        """Answer a request, whatever happens; a cancellation means that the client has left."""
        exchange = self._admit(demand, request_id)
        try:
            await self._tries(exchange, headers, send)
        except RefusalError as refusal:
            outcome = {"declined": DECLINED, "queue_full": REJECTED, "no_server": REJECTED}.get(refusal.code, FAILED)
            exchange.end(outcome, self.clock.now(), status=refusal.status, error=str(refusal))
            await send_refusal(send, refusal, self._own_headers(exchange))
        except asyncio.CancelledError:
            exchange.end(CANCELLED, self.clock.now(), status=499, error="the client has left")
            raise
        except Exception as error:
            exchange.end(FAILED, self.clock.now(), status=500, error=type(error).__name__)
            logger.exception("request %s", request_id)
            if not exchange.started:
                failed = RefusalError(500, "the gateway has failed at this request", "internal_error")
                await send_refusal(send, failed, self._own_headers(exchange))
        finally:
            self._leave(exchange)

    def _admit(self, demand: Demand, request_id: str) -> Exchange:
        """Take in a request, with its predictions.

        Raises:
            RefusalError: there are too many, or the gateway is about to stop.
        """
        if self.draining:
            raise RefusalError(503, "the gateway is about to stop", "stopping", retry_after=_RETRY_AFTER)
        if len(self.exchanges) >= self.fleet.limits.in_flight:
            raise RefusalError(429, "too many requests are in flight", "too_many_requests", retry_after=_RETRY_AFTER)
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

    async def _tries(self, exchange: Exchange, headers: Mapping[str, str], send: Send) -> None:
        """Send a request to one server after the other until one has begun to answer."""
        failed: set[int] = set()
        last: UpstreamError | None = None
        for _ in range(self.fleet.limits.tries):
            candidates = self._candidates(exchange, failed)
            if not candidates:
                break
            place = self._route(exchange, candidates)
            if place == places.DECLINED:
                raise RefusalError(429, "declined: the request is worth less than what it would take from others",
                              "declined", retry_after=_RETRY_AFTER)  # fmt: skip
            server = self.cloud if place == places.CLOUD else self.servers[place]
            assert server is not None
            exchange.evicted = False
            exchange.task = asyncio.create_task(self._try(exchange, server, headers, send))
            try:
                await exchange.task
                if place >= 0 and exchange.outcome == COMPLETED:
                    self.health.succeeded(place)
                return
            except asyncio.CancelledError:
                if not exchange.evicted:
                    raise
                last = UpstreamError("the server went down", is_fault=False)
            except UpstreamError as error:
                last = error
                if error.is_fault and place >= 0:
                    self.health.failed(place)
            if exchange.started:
                await self._break_off(exchange, last, send)
                return
            self._forget(exchange)
            self.metrics.retries.labels(self._name(place)).inc()
            exchange.tries.append(
                {"expert": self._name(place), "error": str(last), "time": self.clock.wall(self.clock.now())}
            )
            failed.add(place)
            exchange.first_token = None
        raise self._given_up(exchange, last)

    def _candidates(self, exchange: Exchange, failed: set[int]) -> list[int]:
        """Return the experts that may have a request: those that serve its LLM, are up, and have not failed it."""
        demand = exchange.demand
        return [
            number
            for number, server in enumerate(self.servers)
            if self.health.up[number] and number not in failed and (demand.is_routed or server.model == demand.model)
        ]

    def _route(self, exchange: Exchange, candidates: list[int]) -> int:
        """Let the policy decide."""
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
        return place

    async def _try(self, exchange: Exchange, server: Server, headers: Mapping[str, str], send: Send) -> None:
        """Ask one server, and pass its answer on."""
        demand, bounds = exchange.demand, self.fleet.limits
        body, added = server.ask_for(demand)
        url = f"{server.url}/{'chat/' if demand.chat else ''}completions"
        own = request_headers(headers, server, exchange.id, pass_key=not self.fleet.keys)
        async with asked(self.session, url, body, own, bounds) as response:
            if response.status < 400:
                if response.content_type == "text/event-stream":
                    await self._relay(exchange, server, response, added, send)
                else:
                    await self._pass_whole(exchange, response, send)
                return
            refusal = await whole(response, bounds.idle_s)
        if added and response.status in (400, 422) and b"stream_options" in refusal:
            # An older server. It is asked again without, and its tokens are counted otherwise.
            server.takes_options = server.tells_usage = False
            await self._try(exchange, server, headers, send)
            return
        if response.status in (401, 403):
            raise UpstreamError(f"it refuses the gateway's key (status {response.status})", is_fault=False, status=502)
        await self._start(exchange, response.status, answer_headers(response), send)
        await send({"type": "http.response.body", "body": refusal})
        exchange.end(FAILED, self.clock.now(), status=response.status, error="refused by the server")

    async def _pass_whole(self, exchange: Exchange, response: aiohttp.ClientResponse, send: Send) -> None:
        """Pass on an answer that comes in one piece."""
        body = await whole(response, self.fleet.limits.first_byte_s)
        tally = Tally(expects_usage=False, hide_usage=False, characters_per_token=self.characters_per_token)
        tally.whole(body)
        explained = await self._explanation(exchange)
        more = [(b"x-jaxroute-decision", explained)] if explained else []
        await self._start(exchange, response.status, [*answer_headers(response), *more], send, len(body))
        await self._send(send, {"type": "http.response.body", "body": body})
        self._complete(exchange, tally, response.status)

    async def _relay(
        self, exchange: Exchange, server: Server, response: aiohttp.ClientResponse, added: bool, send: Send
    ) -> None:
        """Pass on a stream; nothing of it before its first token, so that until then another server may answer."""
        bounds = self.fleet.limits
        tally = Tally(
            expects_usage=server.tells_usage and (added or exchange.demand.wants_usage),
            hide_usage=added,
            characters_per_token=self.characters_per_token,
        )
        held, told = b"", None
        while data := await parts(response, bounds.idle_s if tally.has_content else bounds.first_byte_s):
            held += tally.feed(data)
            if not tally.has_content:
                if tally.error is not None:
                    raise UpstreamError(tally.error[:200], is_fault=True)
                continue
            if exchange.first_token is None:
                await self._first_token(exchange, response, send)
            told = self._progress(exchange, tally, told)
            if held:
                await self._send(send, {"type": "http.response.body", "body": held, "more_body": True})
                held = b""
        held += tally.rest()
        if not tally.is_whole:
            raise UpstreamError("the answer ended early", is_fault=True)
        if exchange.first_token is None:
            await self._first_token(exchange, response, send)
        await self._send(send, {"type": "http.response.body", "body": held})
        if tally.error is not None:
            exchange.end(FAILED, self.clock.now(), status=response.status, error=tally.error[:200])
            return
        if tally.counted[0] is None:
            server.tells_usage = False
        self._complete(exchange, tally, response.status)

    async def _first_token(self, exchange: Exchange, response: aiohttp.ClientResponse, send: Send) -> None:
        """The first token has come: tell the router, and begin the answer."""
        now = exchange.first_token = self.clock.now()
        if exchange.at_router:
            exchange.router.first_token(exchange.id, now=now)
        explained = await self._explanation(exchange)
        await self._start(exchange, response.status, answer_headers(response), send)
        if explained:
            comment = b": jaxroute " + explained + b"\n\n"
            await self._send(send, {"type": "http.response.body", "body": comment, "more_body": True})

    def _progress(self, exchange: Exchange, tally: Tally, told: int | None) -> int | None:
        """Tell the router how far the answer is, if the server says so on the way."""
        tokens = tally.output_tokens
        if tokens and tokens != told and exchange.at_router and exchange.place is not None and exchange.place >= 0:
            exchange.router.progress(exchange.id, now=self.clock.now(), generated=tokens)
        return tokens

    def _complete(self, exchange: Exchange, tally: Tally, status: int) -> None:
        now = self.clock.now()
        exchange.tokens, exchange.tokens_from = tally.counted
        exchange.told_prompt_tokens = tally.prompt_tokens
        exchange.end(COMPLETED, now, status=status)
        if tally.prompt_tokens and exchange.demand.characters:
            measured = min(max(exchange.demand.characters / tally.prompt_tokens, 1.0), _MOST_CHARACTERS)
            self.characters_per_token += _LEARNING * (measured - self.characters_per_token)
        if exchange.at_router:
            place = exchange.place or 0
            tokens = exchange.tokens or max(round(exchange.output_tokens[place]), 1)
            exchange.router.finished(exchange.id, now=now, output_tokens=tokens)
            exchange.at_router = False

    # --- What the client gets ------------------------------------------------------------------------------

    async def _start(
        self,
        exchange: Exchange,
        status: int,
        headers: list[tuple[bytes, bytes]],
        send: Send,
        length: int | None = None,
    ) -> None:
        exchange.started = True
        more = [] if length is None else [(b"content-length", str(length).encode())]
        headers = [*headers, *more, *self._own_headers(exchange)]
        await self._send(send, {"type": "http.response.start", "status": status, "headers": headers})

    async def _send(self, send: Send, message: MutableMapping[str, Any]) -> None:
        """Send to the client, which may be slow, but not for ever."""
        try:
            async with asyncio.timeout(self.fleet.limits.idle_s):
                await send(message)
        except TimeoutError:
            raise asyncio.CancelledError("the client does not read") from None

    def _own_headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        """Return the headers that name request, expert, policy and decision time."""
        headers = {"x-jaxroute-request-id": exchange.id}
        decision = exchange.decision
        if decision is not None:
            headers["x-jaxroute-policy"] = decision.fallback or exchange.policies.name
            headers["x-jaxroute-decision-ms"] = f"{1000 * decision.seconds:.3f}"
            if decision.choice != places.DECLINED:
                headers["x-jaxroute-expert"] = quote(self._name(decision.choice), safe="/.:@ -_+")
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]

    async def _explanation(self, exchange: Exchange) -> bytes:
        """Return the record so far as JSON, if the client wants it."""
        decision = exchange.decision
        if not exchange.demand.explain or decision is None:
            return b""
        await asyncio.wrap_future(decision.assessment)
        return json.dumps(self.record(exchange)).encode()

    async def _break_off(self, exchange: Exchange, error: UpstreamError, send: Send) -> None:
        """End an answer that has begun with an error event."""
        if exchange.demand.stream:
            event = b"data: " + json.dumps(error_body(502, f"the server failed: {error}", "server_failed")).encode()
            await self._send(send, {"type": "http.response.body", "body": event + b"\n\n"})
        exchange.end(FAILED, self.clock.now(), status=502, error=str(error))

    def _given_up(self, exchange: Exchange, last: UpstreamError | None) -> RefusalError:
        """Return what a client gets that no server has answered."""
        if last is None:
            wanted = "" if exchange.demand.is_routed else f" that serves {exchange.demand.model}"
            return RefusalError(503, f"no server{wanted} is up", "no_server", retry_after=_RETRY_AFTER)
        if last.status == 429:
            return RefusalError(429, "the servers are full", "queue_full", retry_after=_RETRY_AFTER)
        if "in time" in str(last):
            return RefusalError(504, "the servers did not answer in time", "timeout", retry_after=_RETRY_AFTER)
        return RefusalError(502, f"the servers failed: {last}", "server_failed", retry_after=_RETRY_AFTER)

    # --- Its end -------------------------------------------------------------------------------------------

    def _forget(self, exchange: Exchange) -> None:
        """The router counts the request no longer."""
        if exchange.at_router:
            exchange.router.failed(exchange.id)
            exchange.at_router = False

    def _leave(self, exchange: Exchange) -> None:
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

    def _name(self, place: int) -> str:
        return self.names[place] if place >= 0 else "cloud"


def names_of(fleet: Fleet) -> list[str]:
    """Return how log, metrics and page call each expert: by its LLM, and a number where several serve the same."""
    models = [expert.model for expert in fleet.experts]
    return [
        model if models.count(model) == 1 else f"{model}#{models[:number].count(model) + 1}"
        for number, model in enumerate(models)
    ]


async def send_refusal(send: Send, refusal: RefusalError, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send an error object."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(refusal.body)).encode())]
    if refusal.retry_after is not None:
        own.append((b"retry-after", str(refusal.retry_after).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": [*own, *(headers or [])]})
    await send({"type": "http.response.body", "body": refusal.body})


def check_take_over(proxy: Proxy, policies: Policies, fleet: Fleet) -> str | None:
    """Let a new policy go on where the old one stands, if both are of the same servers; returns why it cannot."""
    if [expert.url for expert in fleet.experts] != [expert.url for expert in proxy.fleet.experts]:
        return "the servers are others"
    try:
        policies.router.take_over(proxy.policies.router)
    except UserError as error:
        return str(error)
    return None

"""The way of a request through the gateway: routed, sent, answered piece by piece, ended exactly once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote

import aiohttp

from jaxroute.decisions import CANCELLED, COMPLETED, FAILED
from jaxroute.errors import UserError
from jaxroute.gateway import router as places
from jaxroute.gateway.demand import Demand, RefusalError
from jaxroute.gateway.dispatch import RETRY_AFTER, Dispatcher, nobody, outcome_of
from jaxroute.gateway.exchange import Exchange, WallClock
from jaxroute.gateway.fleet import Fleet
from jaxroute.gateway.health import Health
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.openai import error_body
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


class Proxy(Dispatcher):
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
        self.session = session
        self.draining = False
        super().__init__(fleet, policies, recorder, metrics, clock)

    def use(self, fleet: Fleet, policies: Policies) -> None:
        """Take another fleet file and policy; requests in flight go on where they are."""
        super().use(fleet, policies)
        self.servers = [Server(entry) for entry in fleet.experts]
        self.cloud = None if fleet.cloud is None else Server(fleet.cloud)
        self.health = Health(self.servers, fleet.health, self.session, self._server_changed, self.gauges_read)

    def _server_changed(self, number: int, up: bool) -> None:
        logger.warning("%s is %s", self.names[number], "up" if up else "down")
        for exchange in self.server_changed(number, up):
            # An answer that has begun may still come to its end.
            if not exchange.started and exchange.task is not None:
                exchange.evicted = True
                exchange.task.cancel()

    # --- One request ---------------------------------------------------------------------------------------

    async def answer(self, demand: Demand, headers: Mapping[str, str], send: Send, request_id: str) -> None:
        """Answer a request, whatever happens; a cancellation means that the client has left."""
        if self.draining:
            raise RefusalError(503, "the gateway is about to stop", "stopping", retry_after=RETRY_AFTER)
        exchange = self.admit(demand, request_id)
        try:
            await self._tries(exchange, headers, send)
        except RefusalError as refusal:
            exchange.end(outcome_of(refusal), self.clock.now(), status=refusal.status, error=str(refusal))
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
            self.leave(exchange)

    async def _tries(self, exchange: Exchange, headers: Mapping[str, str], send: Send) -> None:
        """Send a request to one server after the other until one has begun to answer."""
        failed: set[int] = set()
        last: UpstreamError | None = None
        for _ in range(self.fleet.limits.tries):
            candidates = self._candidates(exchange, failed)
            if not candidates:
                break
            place = self.route(exchange, candidates)
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
            self.try_failed(exchange, str(last))
            failed.add(place)
        raise self._given_up(exchange, last)

    def _candidates(self, exchange: Exchange, failed: set[int]) -> list[int]:
        """Return the experts that may have a request: those that serve its LLM, are up, and have not failed it."""
        demand = exchange.demand
        return [
            number
            for number, server in enumerate(self.servers)
            if self.health.up[number] and number not in failed and (demand.is_routed or server.model == demand.model)
        ]

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
        held, told = b"", False
        while data := await parts(response, bounds.idle_s if tally.has_content else bounds.first_byte_s):
            held += tally.feed(data)
            if not tally.has_content:
                if tally.error is not None:
                    raise UpstreamError(tally.error[:200], is_fault=True)
                continue
            if not exchange.started:
                await self._begin(exchange, response, send)
            if held:
                await self._send(send, {"type": "http.response.body", "body": held, "more_body": True})
                held = b""
            # The router learns after the client, who waits.
            if not told:
                told = True
                self.first_token(exchange)
            if not tally.is_whole:
                self.progress(exchange, tally.output_tokens)
        held += tally.rest()
        if not tally.is_whole:
            raise UpstreamError("the answer ended early", is_fault=True)
        if not exchange.started:
            await self._begin(exchange, response, send)
        await self._send(send, {"type": "http.response.body", "body": held})
        if tally.error is not None:
            exchange.end(FAILED, self.clock.now(), status=response.status, error=tally.error[:200])
            return
        if tally.counted[0] is None:
            server.tells_usage = False
        self._complete(exchange, tally, response.status)

    async def _begin(self, exchange: Exchange, response: aiohttp.ClientResponse, send: Send) -> None:
        """The first token has come: begin the answer."""
        exchange.first_token = self.clock.now()
        explained = await self._explanation(exchange)
        await self._start(exchange, response.status, answer_headers(response), send)
        if explained:
            comment = b": jaxroute " + explained + b"\n\n"
            await self._send(send, {"type": "http.response.body", "body": comment, "more_body": True})

    def _complete(self, exchange: Exchange, tally: Tally, status: int) -> None:
        tokens, source = tally.counted
        self.completed(exchange, tokens=tokens, tokens_from=source, prompt_tokens=tally.prompt_tokens, status=status)

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
                headers["x-jaxroute-expert"] = quote(self.name(decision.choice), safe="/.:@ -_+")
        return [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]

    async def _explanation(self, exchange: Exchange) -> bytes:
        """Return the record so far as JSON, if the client wants it."""
        decision = exchange.decision
        if not exchange.demand.explain or decision is None:
            return b""
        self.recorder.hurry()
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
            return nobody(exchange.demand)
        if last.status == 429:
            return RefusalError(429, "the servers are full", "queue_full", retry_after=RETRY_AFTER)
        if "in time" in str(last):
            return RefusalError(504, "the servers did not answer in time", "timeout", retry_after=RETRY_AFTER)
        return RefusalError(502, f"the servers failed: {last}", "server_failed", retry_after=RETRY_AFTER)


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

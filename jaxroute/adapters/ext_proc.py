"""An endpoint picker for Envoy: it carries the requests, and asks here, by gRPC, where each of them goes.

This is Envoy's external processing (`envoy.service.ext_proc.v3`) as the Gateway API Inference Extension defines it for
endpoint pickers (its proposal 004, version 1.0.0): a header and dynamic metadata name the chosen server, and a
request that is declined gets 429 at once. Answers pass by too, so that the router learns when they begin and end.
docs/gateway.md has Envoy's configuration.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import betterproto2
import grpclib
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption, HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    ExternalProcessorBase,
    HeaderMutation,
    HeadersResponse,
    HttpBody,
    HttpHeaders,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Struct, Value
from grpclib.server import Server as GrpcServer
from pydantic.dataclasses import dataclass

from jaxroute.decisions import CANCELLED, FAILED, REJECTED
from jaxroute.errors import UserError
from jaxroute.gateway.demand import RefusalError, body_of
from jaxroute.gateway.dispatch import Dispatcher, nobody, outcome_of
from jaxroute.gateway.exchange import Exchange, WallClock
from jaxroute.gateway.fleet import Fleet
from jaxroute.gateway.health import Health
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.policy import Policies
from jaxroute.gateway.service import listen
from jaxroute.gateway.stream import Tally
from jaxroute.gateway.upstream import Server, client_session

logger = logging.getLogger("jaxroute.gateway")

DESTINATION = "x-gateway-destination-endpoint"
"""Header, and key in the metadata, that names the chosen server as address:port."""
_LB, _HINT, _SUBSET = "envoy.lb", "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
_COMPLETIONS = {"/v1/chat/completions": True, "/v1/completions": False}
_DUPLEX = ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED
_PIECE = 60_000  # bytes; Envoy wants no more than 64 K at once


class EndpointPicker(Dispatcher):
    """Picks endpoints for Envoy. Start it, and stop it."""

    def __init__(self, fleet: Fleet, policies: Policies, folder: Path) -> None:
        """Open the log.

        Args:
            fleet: servers, classes of service, health, log.
            policies: what decides.
            folder: where the log's path starts.

        Raises:
            UserError: the log cannot be written, or the fleet file has what Envoy would have to do.
        """
        for name, there in (("cloud", fleet.cloud), ("keys", fleet.keys)):
            if there:
                raise UserError(f"{name} is given, and Envoy carries the requests; leave it out, and let Envoy do it")
        for number, expert in enumerate(fleet.experts):
            if urlsplit(expert.url).path.rstrip("/") != "/v1":
                raise UserError(f"experts.{number}.url={expert.url}: Envoy sends requests to /v1; it must end so")
        recorder = Recorder(fleet.log, folder, policies.assessor)
        super().__init__(fleet, policies, recorder, Metrics(), WallClock(fleet.speed))
        self.servers = [Server(entry) for entry in fleet.experts]
        self.addresses: list[str | None] = [None] * len(self.servers)
        """Where each server is, as address:port; None if its name is not known now."""
        self.health: Health

    async def start(self, host: str, port: int, certificate: ssl.SSLContext | None = None) -> int:
        """Probe the servers, and listen.

        Args:
            host: to listen on.
            port: likewise; 0 for any.
            certificate: for TLS; None listens without.

        Returns:
            The port.

        Raises:
            UserError: the address is in use.
        """
        listener = listen(host, port)
        self._session = client_session(self.fleet.limits)
        self.health = Health(self.servers, self.fleet.health, self._session, self._server_changed, self.gauges_read)
        await self._look_up()
        await self.health.start()
        self._watch = asyncio.create_task(self._look_up_again())
        self._grpc = GrpcServer([_Processor(self), _GrpcHealth(self)])
        await self._grpc.start(sock=listener, ssl=certificate)
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Take no more requests, and close the log."""
        self._watch.cancel()
        self.health.stop()
        self._grpc.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.fleet.limits.drain_s):
                await self._grpc.wait_closed()
        await self._session.close()
        await asyncio.to_thread(self.recorder.close)
        self.policies.guard.close()

    @property
    def ready(self) -> bool:
        """Whether any server serves."""
        return any(self.health.up)

    def candidates(self, model: str | None, subset: list[str] | None) -> list[int]:
        """Return the servers that may have a request.

        Args:
            model: the LLM that it names; None leaves the choice to the policy.
            subset: addresses to choose from, if Envoy has named any.
        """
        return [
            number
            for number, server in enumerate(self.servers)
            if self.health.up[number]
            and self.addresses[number] is not None
            and (model is None or server.model == model)
            and (subset is None or self.addresses[number] in subset)
        ]

    def _server_changed(self, number: int, up: bool) -> None:
        logger.warning("%s is %s", self.names[number], "up" if up else "down")
        self.server_changed(number, up)

    async def _look_up_again(self) -> None:
        while True:
            await asyncio.sleep(self.fleet.health.interval_s)
            await self._look_up()

    async def _look_up(self) -> None:
        """Find the servers' addresses: Envoy wants numbers, and a pod that starts again has another one."""
        for number, server in enumerate(self.servers):
            parts = urlsplit(server.url)
            host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
            try:
                ipaddress.ip_address(host)
            except ValueError:
                try:
                    found = await asyncio.get_running_loop().getaddrinfo(host, port)
                    host = str(found[0][4][0])
                except OSError:
                    self.addresses[number] = None
                    continue
            self.addresses[number] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Processor(ExternalProcessorBase):
    """The gRPC service that Envoy calls, once for each request."""

    def __init__(self, picker: EndpointPicker) -> None:
        self._picker = picker

    async def process(self, messages: AsyncIterator[ProcessingRequest]) -> AsyncIterator[ProcessingResponse]:
        call = _Call(self._picker)
        try:
            async for message in messages:
                for response in call.answer(message):
                    yield response
                if call.is_over:
                    return
        finally:
            call.leave()


class _Call:
    """One request and its answer, as they pass through Envoy."""

    def __init__(self, picker: EndpointPicker) -> None:
        self._picker = picker
        self._headers: dict[str, str] = {}
        self._subset: list[str] | None = None
        self._duplex_request = self._duplex_answer = False
        self._body = bytearray()
        self._is_sent = False
        self._exchange: Exchange | None = None
        self._server: Server | None = None
        self._tally: Tally | None = None
        self._is_stream = False
        self._status = 200
        self._hides_usage = False
        self._answer = bytearray()
        self.is_over = False
        """Whether Envoy has been told all."""

    def answer(self, message: ProcessingRequest) -> Iterator[ProcessingResponse]:
        """Yield what Envoy is told in return."""
        config = message.protocol_config
        if config is not None:
            self._duplex_request = config.request_body_mode == _DUPLEX
            self._duplex_answer = config.response_body_mode == _DUPLEX
        if message.metadata_context is not None and _HINT in message.metadata_context.filter_metadata:
            hint = message.metadata_context.filter_metadata[_HINT].fields.get(_SUBSET)
            if hint is not None:
                listed = hint.list_value.values if hint.list_value is not None else []
                self._subset = [str(value.string_value) for value in listed]
        part: Any
        kind, part = betterproto2.which_one_of(message, "request")
        try:
            if kind == "request_headers":
                yield from self._request_headers(part)
            elif kind == "request_body":
                yield from self._request_body(part)
            elif kind == "request_trailers":
                if self._duplex_request and not self._is_sent:
                    yield from self._send(ends=False)
                yield ProcessingResponse(request_trailers=TrailersResponse())
            elif kind == "response_headers":
                yield self._response_headers(part)
            elif kind == "response_body":
                yield from self._response_body(part)
            elif kind == "response_trailers":
                self._answer_ended()
                yield ProcessingResponse(response_trailers=TrailersResponse())
        except RefusalError as refusal:
            self.is_over = True
            if self._exchange is None:
                self._picker.metrics.refused.labels(refusal.code).inc()
            else:
                self._end(outcome_of(refusal), refusal.status, str(refusal))
            yield _immediate(refusal)

    def leave(self) -> None:
        """Envoy is through with the request."""
        self._end(CANCELLED, 499, "the client has left")

    def _end(self, outcome: str, status: int, error: str) -> None:
        exchange, picker = self._exchange, self._picker
        if exchange is not None and exchange.id in picker.exchanges:
            exchange.end(outcome, picker.clock.now(), status=status, error=error)
            picker.leave(exchange)

    # --- On its way to a server ------------------------------------------------------------------------------

    def _request_headers(self, part: HttpHeaders) -> Iterator[ProcessingResponse]:
        self._headers = _plain(part)
        if part.end_of_stream:
            yield self._to(self._anywhere(), request_headers=HeadersResponse(response=CommonResponse()))
        elif not self._duplex_request:
            # Envoy holds them back until the body has been looked at.
            yield ProcessingResponse(request_headers=HeadersResponse())

    def _request_body(self, part: HttpBody) -> Iterator[ProcessingResponse]:
        self._body += part.body
        most = self._picker.fleet.limits.body_bytes
        if len(self._body) > most:
            raise RefusalError(413, f"the body has more than {most} bytes", "body_too_large")
        if part.end_of_stream:
            yield from self._send(ends=True)
        elif not self._duplex_request:
            what = "request_body_mode must be FULL_DUPLEX_STREAMED or BUFFERED"
            raise RefusalError(500, what, "misconfigured")

    def _anywhere(self) -> int:
        """Return a server for a request without a body, or of a kind that is not routed: the first that is up.

        Raises:
            RefusalError: there is none.
        """
        for place in self._picker.candidates(None, self._subset):
            return place
        raise nobody()

    def _send(self, *, ends: bool) -> Iterator[ProcessingResponse]:
        """Choose a server for a request whose body has come; `ends` says that no trailers follow.

        Raises:
            RefusalError: it cannot be understood, or is declined.
        """
        self._is_sent = True
        path = self._headers.get(":path", "").partition("?")[0]
        if path in _COMPLETIONS:
            place, body = self._routed(chat=_COMPLETIONS[path])
        else:
            place, body = self._anywhere(), bytes(self._body)
        length = {"content-length": str(len(body))}
        if not self._duplex_request:
            common = CommonResponse(body_mutation=BodyMutation(body=body))
            yield self._to(place, more=length, request_body=BodyResponse(response=common))
            return
        yield self._to(place, more=length, request_headers=HeadersResponse(response=CommonResponse()))
        for piece, last in _pieces(body):
            yield ProcessingResponse(request_body=_streamed(piece, ends and last))

    def _routed(self, *, chat: bool) -> tuple[int, bytes]:
        """Return the place that the policy has chosen, and the request's body for it.

        Raises:
            RefusalError: it cannot be understood, or is declined.
        """
        picker = self._picker
        demand = picker.demand(body_of(bytes(self._body)), self._headers, chat=chat)
        exchange = self._exchange = picker.admit(demand, f"req-{uuid.uuid4().hex}")
        candidates = picker.candidates(None if demand.is_routed else demand.model, self._subset)
        if not candidates:
            raise nobody(demand)
        place = picker.route(exchange, candidates)
        self._server = picker.servers[place]
        body, self._hides_usage = self._server.ask_for(demand)
        return place, body

    def _to(self, place: int, *, more: dict[str, str] | None = None, **kinds: Any) -> ProcessingResponse:
        """Return what names the chosen server to Envoy: the response of either kind, with headers and metadata."""
        picker = self._picker
        address = str(picker.addresses[place])
        headers = {DESTINATION: address, **(more or {})}
        if (key := picker.servers[place].key()) is not None:
            headers["authorization"] = f"Bearer {key}"
        (part,) = kinds.values()
        part.response.header_mutation = HeaderMutation(set_headers=[_set(*one) for one in headers.items()])
        part.response.clear_route_cache = True
        chosen = Struct(fields={DESTINATION: Value(string_value=address)})
        metadata = Struct(fields={_LB: Value(struct_value=chosen)})
        return ProcessingResponse(**kinds, dynamic_metadata=metadata)

    # --- On its way back -------------------------------------------------------------------------------------

    def _response_headers(self, part: HttpHeaders) -> ProcessingResponse:
        headers, exchange, picker = _plain(part), self._exchange, self._picker
        response = CommonResponse()
        status = headers.get(":status", "200")
        self._status = int(status) if status.isdigit() else 200
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        if exchange is not None and exchange.decision is not None and exchange.place is not None:
            own = {
                "x-jaxroute-request-id": exchange.id,
                "x-jaxroute-expert": picker.name(exchange.place),
                "x-jaxroute-policy": exchange.decision.fallback or exchange.policies.name,
                "x-jaxroute-decision-ms": f"{1000 * exchange.decision.seconds:.3f}",
            }
            response.header_mutation = HeaderMutation(set_headers=[_set(*one) for one in own.items()])
            self._judge(exchange)
            if self._is_stream and self._server is not None:
                self._tally = Tally(
                    expects_usage=self._server.tells_usage and (self._hides_usage or exchange.demand.wants_usage),
                    hide_usage=self._hides_usage,
                    characters_per_token=picker.characters_per_token,
                )
        if part.end_of_stream:
            self._answer_ended()
        return ProcessingResponse(response_headers=HeadersResponse(response=response))

    def _judge(self, exchange: Exchange) -> None:
        """Note what an answer's status says of its server, and end a request that was refused there."""
        place, picker = exchange.place or 0, self._picker
        if self._status >= 500:
            picker.health.failed(place)
        if self._status >= 400:
            outcome = REJECTED if self._status == 429 else FAILED
            self._end(outcome, self._status, "refused by the server" if self._status < 500 else "the server failed")

    def _response_body(self, part: HttpBody) -> Iterator[ProcessingResponse]:
        passed = part.body
        if self._tally is not None:
            passed = self._read(self._tally, part)
        elif self._exchange is not None:
            self._answer += part.body
        if part.end_of_stream:
            self._answer_ended()
        if self._duplex_answer:
            for piece, last in _pieces(passed):
                if piece or part.end_of_stream:
                    yield ProcessingResponse(response_body=_streamed(piece, part.end_of_stream and last))
            return
        common = CommonResponse()
        if passed != part.body:
            common.body_mutation = BodyMutation(body=passed) if passed else BodyMutation(clear_body=True)
        yield ProcessingResponse(response_body=BodyResponse(response=common))

    def _read(self, tally: Tally, part: HttpBody) -> bytes:
        """Take a piece of a stream, tell the router, and return what of it the client gets."""
        exchange, picker = self._exchange, self._picker
        passed = tally.feed(part.body)
        if part.end_of_stream:
            passed += tally.rest()
        if exchange is not None and exchange.outcome is None and tally.has_content:
            if exchange.first_token is None:
                picker.first_token(exchange)
            picker.progress(exchange, tally.output_tokens)
        return passed

    def _answer_ended(self) -> None:
        exchange, picker, tally = self._exchange, self._picker, self._tally
        if exchange is None or exchange.outcome is not None:
            return
        if tally is None:
            tally = Tally(expects_usage=False, hide_usage=False, characters_per_token=picker.characters_per_token)
            tally.whole(bytes(self._answer))
        if tally.error is not None or not tally.is_whole:
            picker.health.failed(exchange.place or 0)
            self._end(FAILED, 502, tally.error or "the answer ended early")
            return
        tokens, source = tally.counted
        if tokens is None and self._server is not None:
            self._server.tells_usage = False
        picker.health.succeeded(exchange.place or 0)
        picker.completed(exchange, tokens=tokens, tokens_from=source, prompt_tokens=tally.prompt_tokens)
        picker.leave(exchange)


# --- What Envoy is told -------------------------------------------------------------------------------------


def _plain(part: HttpHeaders) -> dict[str, str]:
    """Return headers by name; of several with one name, the last."""
    if part.headers is None:
        return {}
    # Either field may hold it.
    return {one.key: one.value or one.raw_value.decode("latin-1") for one in part.headers.headers}


def _set(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(
        header=HeaderValue(key=name, raw_value=value.encode("latin-1", "replace")),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _pieces(body: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield pieces of a body, at least one, and whether each is the last."""
    starts = range(0, max(len(body), 1), _PIECE)
    for start in starts:
        yield body[start : start + _PIECE], start == starts[-1]


def _streamed(piece: bytes, ends: bool) -> BodyResponse:
    streamed = StreamedBodyResponse(body=piece, end_of_stream=ends)
    return BodyResponse(response=CommonResponse(body_mutation=BodyMutation(streamed_response=streamed)))


def _immediate(refusal: RefusalError) -> ProcessingResponse:
    headers = {"content-type": "application/json"}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    return ProcessingResponse(
        immediate_response=ImmediateResponse(
            status=HttpStatus(code=StatusCode(refusal.status)),
            headers=HeaderMutation(set_headers=[_set(*one) for one in headers.items()]),
            body=refusal.body,
            details=refusal.code,
        )
    )


# --- gRPC's health protocol ---------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class HealthCheckRequest(betterproto2.Message):
    """Asks for the state of a service; as grpc.health.v1 has it."""

    service: str = betterproto2.field(1, betterproto2.TYPE_STRING)


@dataclass(eq=False, repr=False)
class HealthCheckResponse(betterproto2.Message):
    """1 if it serves, 2 if not."""

    status: int = betterproto2.field(1, betterproto2.TYPE_UINT32)


class _GrpcHealth:
    """What Kubernetes and Envoy ask to see whether the picker serves."""

    def __init__(self, picker: EndpointPicker) -> None:
        self._picker = picker

    async def check(self, stream: Any) -> None:
        asked = await stream.recv_message()
        if asked.service in ("", "liveness"):
            serves = True
        elif asked.service in ("readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
            serves = self._picker.ready
        else:
            raise grpclib.GRPCError(grpclib.const.Status.NOT_FOUND, f"there is no service {asked.service!r}")
        await stream.send_message(HealthCheckResponse(status=1 if serves else 2))

    def __mapping__(self) -> dict[str, Any]:
        of_check = (self.check, grpclib.const.Cardinality.UNARY_UNARY, HealthCheckRequest, HealthCheckResponse)
        return {"/grpc.health.v1.Health/Check": grpclib.const.Handler(*of_check)}

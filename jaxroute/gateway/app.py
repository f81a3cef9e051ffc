"""The gateway as an ASGI application: who may come in, which page is where, and what a body may weigh.

It is plain ASGI below Starlette's routing: middleware that buffers would hide it when a client leaves.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxroute.gateway.demand import RefusalError, body_of
from jaxroute.gateway.fleet import AUTO
from jaxroute.gateway.live import PAGE, Live
from jaxroute.gateway.openapi import page
from jaxroute.gateway.proxy import Proxy, Send, send_refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_UPDATES = 1.0  # s between two updates of the live page


def build_app(proxy: Proxy, live: Live) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """Return the application."""

    async def not_found(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"{request.method} {request.url.path} is not served here"
        body = RefusalError(status, message, "not_found").body
        # Of a method that is not allowed, those that are.
        return Response(body, status, getattr(error, "headers", None), media_type="application/json")

    routes = routes_of(proxy, live)
    app = Starlette(routes=routes, exception_handlers={404: not_found, 405: not_found})
    completions = {route.path: route.endpoint for route in routes if isinstance(route.endpoint, _Completions)}
    return _Guarded(app, completions, proxy)


def routes_of(proxy: Proxy, live: Live) -> list[Route]:
    """Return the pages; `jaxroute.gateway.openapi` describes each."""
    return [
        Route("/v1/chat/completions", _Completions(proxy, chat=True), methods=["POST"]),
        Route("/v1/completions", _Completions(proxy, chat=False), methods=["POST"]),
        Route("/v1/models", _models(proxy)),
        Route("/health", _health(proxy)),
        Route("/metrics", _metrics(proxy)),
        Route("/decisions/{request_id}", _decision(live)),
        Route("/events", _Events(live, proxy), methods=["GET"]),
        Route("/openapi.json", _openapi(proxy)),
        Route("/", _page),
    ]


class _Guarded:
    """Lets in whoever has a key, if the fleet file lists any; everybody may ask for `/health`."""

    def __init__(self, app: Starlette, quick: dict[str, _Completions], proxy: Proxy) -> None:
        """`quick` has the pages, by path, whose requests need not pass through the layers of `app`."""
        self._app, self._quick, self._proxy = app, quick, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = self._proxy.fleet.keys
        if scope["type"] == "http" and keys and scope["path"] != "/health" and not _has_key(scope, keys):
            self._proxy.metrics.refused.labels("invalid_api_key").inc()
            await send_refusal(send, RefusalError(401, "the API key is missing or wrong", "invalid_api_key"))
            return
        direct = self._quick.get(scope["path"]) if scope.get("method") == "POST" else None
        await (direct or self._app)(scope, receive, send)


def _has_key(scope: Scope, digests: list[str]) -> bool:
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not key:
        # A browser cannot send headers with the live page.
        if scope["path"] not in ("/", "/events") and not scope["path"].startswith("/decisions/"):
            return False
        key = Request(scope).query_params.get("key", "")
    digest = hashlib.sha256(key.encode()).hexdigest()
    # All are compared, in a time that does not tell which fits.
    return sum(hmac.compare_digest(digest, known) for known in digests) > 0


class _Completions:
    """Takes requests in. An ASGI application of its own, so that it sees when its client leaves."""

    def __init__(self, proxy: Proxy, *, chat: bool) -> None:
        self._proxy, self._chat = proxy, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        proxy = self._proxy
        request_id = f"req-{uuid.uuid4().hex}"
        own = [(b"x-jaxroute-request-id", request_id.encode())]
        try:
            headers = Headers(scope=scope)
            body = await self._body(headers, receive)
            if body is None:
                return
            demand = proxy.demand(body_of(body), headers, chat=self._chat)
            work = asyncio.ensure_future(proxy.answer(demand, headers, send, request_id))
        except RefusalError as refusal:
            proxy.metrics.refused.labels(refusal.code).inc()
            await send_refusal(send, refusal, own)
            return
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Also where the server itself gives up on this request.
            for task in (gone, work):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], RefusalError):  # it was never admitted
            proxy.metrics.refused.labels(results[0].code).inc()
            await send_refusal(send, results[0], own)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the request's body, None if the client has left.

        Raises:
            RefusalError: it is too large, or too slow.
        """
        bounds = self._proxy.fleet.limits
        too_large = RefusalError(413, f"the body has more than {bounds.body_bytes} bytes", "body_too_large")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > bounds.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(bounds.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > bounds.body_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RefusalError(408, f"the body has not come within {bounds.body_s:g} s", "body_too_slow") from None


async def _left(receive: Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Events:
    """Sends what the live page shows, now and then, for as long as somebody looks."""

    def __init__(self, live: Live, proxy: Proxy) -> None:
        self._live, self._proxy = live, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(_left(receive))
        try:
            while not gone.done() and not self._proxy.draining:
                event = b"data: " + json.dumps(self._live.snapshot()).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.wait((gone,), timeout=_UPDATES)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()


def _openapi(proxy: Proxy) -> Callable[[Request], Awaitable[Response]]:
    async def openapi(request: Request) -> Response:
        return JSONResponse(page(proxy.fleet))

    return openapi


async def _page(request: Request) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    headers = {"content-security-policy": policy, "cache-control": "no-store"}
    return Response(PAGE.read_text(), media_type="text/html", headers=headers)


def _models(proxy: Proxy) -> Callable[[Request], Awaitable[Response]]:
    async def models(request: Request) -> Response:
        names = [AUTO, *dict.fromkeys(server.model for server in proxy.servers)]
        up = {server.model for server, up in zip(proxy.servers, proxy.health.up, strict=True) if up}
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "jaxroute", "up": name == AUTO or name in up}
            for name in names
        ]
        return JSONResponse({"object": "list", "data": data})

    return models


def _health(proxy: Proxy) -> Callable[[Request], Awaitable[Response]]:
    async def health(request: Request) -> Response:
        fine = any(proxy.health.up) and not proxy.draining
        state = "stopping" if proxy.draining else "ok" if fine else "no server is up"
        return JSONResponse({"status": state}, 200 if fine else 503)

    return health


def _metrics(proxy: Proxy) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        proxy.update_gauges(proxy.health.polled)
        return Response(proxy.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _decision(live: Live) -> Callable[[Request], Awaitable[Response]]:
    async def decision(request: Request) -> Response:
        found = live.decision(request.path_params["request_id"])
        if found is None:
            refusal = RefusalError(404, "this request is unknown, or ended long ago", "not_found")
            return Response(refusal.body, 404, media_type="application/json")
        return JSONResponse(found)

    return decision

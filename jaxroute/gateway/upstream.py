"""One server as the gateway knows it: how it is asked, and what went wrong."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from jaxroute.gateway.demand import Demand
from jaxroute.gateway.fleet import BoundOptions, CloudEntry, ExpertEntry

_PASSED_ON = ("traceparent", "tracestate", "openai-organization", "openai-project", "user-agent")
"""Headers of a request that go to the server as they are."""
_HOP_BY_HOP = {
    *("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authenticate"),
    *("content-length", "content-encoding", "date", "server"),
}
_KEEP_ALIVE = 3.0
"""How long an idle connection is kept, s: less than vLLM's server keeps it, which would close it on a new request."""


class UpstreamError(Exception):
    """A server did not answer, or not as it should."""

    def __init__(self, what: str, *, is_fault: bool, status: int | None = None, retry_after: str | None = None) -> None:
        """`is_fault` says whether it speaks against the server's health, `status` what it answered."""
        super().__init__(what)
        self.is_fault, self.status, self.retry_after = is_fault, status, retry_after


class Server:
    """An expert's server, or the cloud's."""

    def __init__(self, entry: ExpertEntry | CloudEntry) -> None:
        """Nothing is asked yet."""
        self.entry, self.model = entry, entry.model
        self.url = entry.url.rstrip("/")
        self.tells_usage = True
        """Whether streams end with usage if asked to; False once the server has refused or forgotten."""
        self.takes_options = True
        """Whether it understands `stream_options`."""

    @property
    def health_urls(self) -> list[str]:
        """What to ask whether it serves; the next one if there is no such page."""
        if isinstance(self.entry, ExpertEntry) and self.entry.health:
            return [self.entry.health]
        parts = urlsplit(self.url)
        root = parts.path.removesuffix("/v1")
        return [urlunsplit(parts._replace(path=f"{root}/health")), f"{self.url}/models"]

    def key(self) -> str | None:
        """Return its API key, if it has one."""
        return os.environ.get(self.entry.key_env) if self.entry.key_env else None

    def ask_for(self, demand: Demand) -> tuple[bytes, bool]:
        """Return the body of the request for this server, and whether usage is asked for in the client's place."""
        body: dict[str, Any] = {**demand.body, "model": self.model}
        added = demand.stream and not demand.wants_usage and self.takes_options
        if added:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return json.dumps(body).encode(), added


def client_session(bounds: BoundOptions) -> aiohttp.ClientSession:
    """Return what all requests to servers are made with."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=bounds.connect_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=True,
        trust_env=False,
    )


def request_headers(client: Mapping[str, str], server: Server, request_id: str, *, pass_key: bool) -> dict[str, str]:
    """Return the headers of a request to a server; the client's key goes on only if `pass_key`."""
    headers = {name: client[name] for name in _PASSED_ON if name in client}
    headers |= {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
    if (key := server.key()) is not None:
        headers["authorization"] = f"Bearer {key}"
    elif pass_key and "authorization" in client:
        headers["authorization"] = client["authorization"]
    return headers


def answer_headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """Return the headers of a server's answer that the client gets too."""
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in response.headers.items()
        if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-jaxroute")
    ]


@asynccontextmanager
async def asked(
    session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str], bounds: BoundOptions
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request, and give the answer once its status is known; leaving ends the request wherever it is.

    Raises:
        UpstreamError: no answer within the time, or one that speaks of the server's trouble.
    """
    try:
        async with asyncio.timeout(bounds.first_byte_s):
            response = await session.post(url, data=body, headers=headers, allow_redirects=False)
    except TimeoutError:
        raise UpstreamError("no answer in time", is_fault=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError(f"no answer ({_said(error)})", is_fault=True) from None
    try:
        if response.status == 429 or response.status >= 500:
            raise UpstreamError(
                f"status {response.status}",
                is_fault=response.status >= 500,
                status=response.status,
                retry_after=response.headers.get("retry-after"),
            )
        yield response
    finally:
        # A connection whose answer has been read to its end is kept, any other one is closed.
        if response.content.at_eof():
            response.release()
        else:
            response.close()


async def parts(response: aiohttp.ClientResponse, seconds: float) -> bytes:
    """Return what has come of an answer since, b"" at its end.

    Raises:
        UpstreamError: nothing within the time, or the connection broke.
    """
    try:
        async with asyncio.timeout(seconds):
            return await response.content.readany()
    except TimeoutError:
        raise UpstreamError("the answer has stopped", is_fault=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError(f"the answer broke off ({_said(error)})", is_fault=True) from None


async def whole(response: aiohttp.ClientResponse, seconds: float) -> bytes:
    """Return an answer in one piece; errors as of `parts`."""
    body = bytearray()
    while part := await parts(response, seconds):
        body += part
    return bytes(body)


def _said(error: BaseException) -> str:
    """Say what went wrong in few words, without addresses."""
    return type(error).__name__ if not isinstance(error, OSError) else error.strerror or type(error).__name__

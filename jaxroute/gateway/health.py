"""Which servers serve: probes, consecutive failures, and a cautious way back."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

import aiohttp
import numpy as np

from jaxroute.gateway.fleet import ExpertEntry, HealthOptions
from jaxroute.gateway.upstream import Server

_GAUGES = {
    "running": re.compile(r"^vllm:num_requests_running(?:\{[^}]*\})? (\S+)", re.M),
    "waiting": re.compile(r"^vllm:num_requests_waiting(?:\{[^}]*\})? (\S+)", re.M),
    "kv_share": re.compile(r"^vllm:(?:kv|gpu)_cache_usage_perc(?:\{[^}]*\})? (\S+)", re.M),
}


class Health:
    """Watches the servers of a fleet.

    A server is down after some failures in a row, of probes or requests. It is up again once a probe succeeds, but a
    single failure then puts it down (half-open) until a request or the next probe has succeeded.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        options: HealthOptions,
        session: aiohttp.ClientSession,
        changed: Callable[[int, bool], None],
        read: Callable[[int, dict[str, float], float], None],
    ) -> None:
        """`changed` is told of each server that goes down or comes up; all count as up at first.

        `read` is told of each server's gauges, whenever they have been read, and how long ago they were asked for, s.
        """
        self._servers, self._options, self._session = servers, options, session
        self._changed, self._read = changed, read
        self.up = [True] * len(servers)
        self._failures = [0] * len(servers)
        self._tasks: list[asyncio.Task[None]] = []
        self.polled: list[dict[str, float]] = [{} for _ in servers]
        """What each server's own metrics say, where they are read."""

    async def start(self) -> None:
        """Probe every server once, and then now and then. One that does not answer now is down at once."""
        answers = await asyncio.gather(*(self._probe(server) for server in self._servers))
        for number, answers_well in enumerate(answers):
            if not answers_well:
                self._failures[number] = self._options.failures
                self._set(number, False)
        for number, server in enumerate(self._servers):
            self._tasks.append(asyncio.create_task(self._watch(number, server)))
            if isinstance(server.entry, ExpertEntry) and server.entry.metrics:
                self._tasks.append(asyncio.create_task(self._poll(number, server.entry.metrics)))

    def stop(self) -> None:
        """Probe no more."""
        for task in self._tasks:
            task.cancel()

    def failed(self, number: int) -> None:
        """A probe or a request has failed."""
        self._failures[number] += 1
        if self.up[number] and self._failures[number] >= self._options.failures:
            self._set(number, False)

    def succeeded(self, number: int) -> None:
        """A request has been answered."""
        if self.up[number]:
            self._failures[number] = 0

    def _set(self, number: int, up: bool) -> None:
        self.up[number] = up
        self._changed(number, up)

    async def _watch(self, number: int, server: Server) -> None:
        while True:
            await asyncio.sleep(self._options.interval_s)
            if not await self._probe(server):
                self.failed(number)
            elif self.up[number]:
                self._failures[number] = 0
            else:
                self._failures[number] = self._options.failures - 1
                self._set(number, True)

    async def _probe(self, server: Server) -> bool:
        """Return whether the server says that it serves."""
        try:
            for url in server.health_urls:
                async with asyncio.timeout(self._options.timeout_s):
                    key = server.key()
                    headers = {"authorization": f"Bearer {key}"} if key else {}
                    async with self._session.get(url, headers=headers) as response:
                        if response.status not in (404, 405):
                            return response.status < 500
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        return False

    async def _poll(self, number: int, url: str) -> None:
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self._options.timeout_s), self._session.get(url) as response:
                    self.polled[number] = gauges(await response.text())
                self._read(number, self.polled[number], time.monotonic() - asked)
            except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
                self.polled[number] = {}
            await asyncio.sleep(self._options.metrics_s)


def gauges(page: str) -> dict[str, float]:
    """Return what a page of vLLM's metrics says of batch, queue and KV cache, as far as it says it."""
    found = {}
    for name, pattern in _GAUGES.items():
        values = []
        for text in pattern.findall(page):
            try:
                values.append(float(text))
            except ValueError:
                continue
        if values and np.isfinite(values).all():
            found[name] = max(values) if name == "kv_share" else sum(values)
    return found

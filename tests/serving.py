"""Servers for the gateway's tests: an event loop in a thread, emulated fleets, gateways, and servers of odd manners."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np
from aiohttp import web
from omegaconf import OmegaConf

from jaxroute.commands.fleets import load_fleet
from jaxroute.gateway.emulator import EmulatedFleet
from jaxroute.gateway.service import Gateway

MODELS = ["gemma-2-2b-it", "Meta-Llama-3.1-8B-Instruct", "gemma-2-27b-it"]
"""Of edge3."""

WAIT = 60.0
"""Nothing that a test waits for takes as long, s."""


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine):
        """Run a coroutine there, and return what it returns."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, WAIT), self.loop).result()

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)


def fleet_options(urls, models, **options):
    """A fleet file as a dictionary, for edge3 unless told otherwise; quick probes, patient guard."""
    experts = [
        {"url": url, "model": model, "quality": 0.5 + 0.1 * e, "output_tokens": 50}
        for e, (url, model) in enumerate(zip(urls, models, strict=True))
    ]
    usual = {
        "listen": "127.0.0.1:0",
        "policy": "impact_greedy",
        "site": "edge3",
        "experts": experts,
        "classes": {"standard": {"normalised": 0.5}},
        "guard": {"decision_ms": 20_000},
        "health": {"interval_s": 0.1, "timeout_s": 2, "failures": 2, "metrics_s": 0.1},
        "log": {"path": "decisions.jsonl"},
    }
    return usual | options


def write_fleet(path: Path, options) -> Path:
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(options)))
    return path


@asynccontextmanager
async def gateway_of(folder: Path, options, **more):
    """A gateway that runs for as long as the block."""
    path = write_fleet(folder / "fleet.yaml", options)
    gateway = await asyncio.to_thread(lambda: Gateway(lambda: load_fleet(path), folder, **more))
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


def emulated(site, lengths=50, speed=20.0):
    """Emulated servers of a site whose answers have so many tokens."""
    return EmulatedFleet(site, np.full((1, len(site.experts)), lengths), speed=speed)


class OddServer:
    """A server whose manners a test decides: `answer` is called with each completion's request.

    Requests' bodies are in `seen`, and how many of them were given up by their client in `aborted`.
    """

    def __init__(self, answer, *, healthy=True):
        self.answer, self.healthy = answer, healthy
        self.seen, self.aborted = [], 0
        self.arrived, self.left = asyncio.Event(), asyncio.Event()

    async def __aenter__(self):
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *error):
        await self._runner.cleanup()

    async def _health(self, request):
        return web.Response(status=200 if self.healthy else 503)

    async def _complete(self, request):
        self.seen.append(await request.json())
        self.headers = request.headers
        self.arrived.set()
        try:
            return await self.answer(request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            self.left.set()
            raise


async def begin_stream(request):
    """Send the headers of a stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


FIELDS = ["model", "messages", "prompt", "stream", "stream_options", "max_tokens", "ignore_eos", "n", "user", "seed"]
"""What a body may hold that a server could stumble over."""

ODD_BODIES = [
    {"model": "auto", "messages": [{"role": "user", "content": "x"}], "prompt": "x", field: value}
    for field in FIELDS
    for value in (None, True, 0, -3, 1.5, float("inf"), 10**40, "x", "", [], [[]], ["x"], {}, {"include_usage": [1]})
]
"""Bodies that are sound but for one field, with a value of each kind."""


def client():
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=WAIT))


def chat(**more):
    return {"model": "auto", "messages": [{"role": "user", "content": "What is an edge?"}], **more}

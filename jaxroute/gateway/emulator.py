"""OpenAI-compatible servers that answer as fast as the experts of a site would, in wall-clock time.

Each server is one expert: it batches, queues and preempts as `jaxroute.serving.reference` says, whose code decides what
an iteration does and how long it takes. This module adds the clock, the HTTP interface, vLLM's names in `/metrics`, and
faults on request (`POST /emulator`). So a gateway can be tried, and tested, without accelerators.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from aiohttp import web
from jaxtyping import Int
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from jaxroute.errors import UserError
from jaxroute.gateway.openai import error_body, prompt_tokens_of
from jaxroute.serving import ExpertConfig, SiteConfig
from jaxroute.serving.reference import Expert, Iteration, Request
from jaxroute.serving.site import UNBOUNDED

FAULTS = ("recover", "fail", "hang", "slow", "cut")
_WORDS = ("one", "expert", "answers", "while", "others", "wait", "for", "a", "seat", "and", "time", "goes", "by", "so")


class Clock:
    """Seconds of the site since the start, which pass `speed` times as quickly as real ones."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self._start = time.monotonic()

    def now(self) -> float:
        """Return the site's time, s."""
        return (time.monotonic() - self._start) * self.speed

    def real(self, until: float) -> float:
        """Return the real time until a time of the site, s; 0 if it has passed."""
        return max(until - self.now(), 0.0) / self.speed


@dataclass
class LiveExpert(Expert):
    """The reference's expert, one iteration after the other, with tokens to be fetched and requests that go away."""

    slowdown: float = 1.0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.answers: dict[int, Answer] = {}

    def schedule(self, start: float) -> None:
        """Steps 1 to 4, with an iteration that takes `slowdown` times as long."""
        super().schedule(start)
        self.log.clear()  # a server runs for ever
        iteration = self.current
        assert iteration is not None
        self.preemptions += len(iteration.preempted)
        if self.slowdown != 1:
            self.current = replace(iteration, end=start + (iteration.end - start) * self.slowdown)

    def apply(self, iteration: Iteration) -> None:
        """Step 5; who emits a token is told."""
        before = [(request, request.generated) for request in self.running]
        super().apply(iteration)
        for request, generated in before:
            if request.generated > generated:
                self.answers[request.index].emit(self.clock)

    def abort(self, request: Request) -> None:
        """Forget a request; the iteration in progress ends when it would have."""
        self.answers.pop(request.index, None)
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            slot = self.running.index(request)
            del self.running[slot]
            if self.current is not None:
                del self.tokens[slot]

    def next_time(self) -> float | None:
        """When the iteration in progress ends or the next one starts, s; None if there is nothing to do."""
        if self.current is not None:
            return self.current.end
        if not self.running and not self.waiting:
            return None
        return self.clock if self.running else max(self.clock, self.waiting[0].ready)


class Answer:
    """The tokens of one request as they come; each is due at the client at a time of the site."""

    def __init__(self, request: Request, delay: float) -> None:
        self.request, self._delay = request, delay
        self._due: deque[float] = deque()
        self._wake = asyncio.Event()
        self.cut = False

    def emit(self, at: float) -> None:
        """One more token was generated at this time."""
        self._due.append(at + self._delay)
        self._wake.set()

    def end(self) -> None:
        """No more tokens will come: the server has failed."""
        self.cut = True
        self._wake.set()

    async def tokens(self, clock: Clock) -> AsyncIterator[int]:
        """Yield how many more tokens are due, until all have come; fewer if the answer is cut."""
        left = self.request.output
        while left and not self.cut:
            if not self._due:
                self._wake.clear()
                await self._wake.wait()
                continue
            wait = clock.real(self._due[0])
            if wait:
                await asyncio.sleep(wait)
            now, ready = clock.now(), 0
            while self._due and self._due[0] <= now:
                self._due.popleft()
                ready += 1
            left -= ready
            if ready:
                yield ready


class Server:
    """One expert behind one port."""

    def __init__(self, number: int, config: ExpertConfig, lengths: Int[np.ndarray, "prompt"], clock: Clock) -> None:
        """`lengths` are those of its answers to the prompts of a bank."""
        self.model, self._lengths, self._clock = config.model, lengths, clock
        coefficients = {name: getattr(config, name) for name in Expert.__dataclass_fields__ if hasattr(config, name)}
        if config.max_waiting is None:
            coefficients["max_waiting"] = UNBOUNDED
        self.expert = LiveExpert(index=number, **coefficients)
        self.fault = "recover"
        self._changed = asyncio.Event()  # new work, or another fault
        self._number = 0
        self._metrics = _Metrics(config)
        self._loop: asyncio.Task[None] | None = None

    def app(self) -> web.Application:
        """Return the server as an application, which runs its expert while it is up."""
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._show_metrics),
                web.post("/emulator", self._set_fault),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
            ]
        )

        async def run(app: web.Application) -> AsyncIterator[None]:
            self._loop = asyncio.ensure_future(self._run())
            yield
            self._loop.cancel()
            await asyncio.wait((self._loop,))
            self._end_all()

        app.cleanup_ctx.append(run)
        return app

    async def _run(self) -> None:
        expert = self.expert
        while True:
            self._changed.clear()
            if self.fault != "hang":
                expert.advance(self._clock.now())
            at = None if self.fault == "hang" else expert.next_time()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if at is None else self._clock.real(at)):
                    await self._changed.wait()

    def _end_all(self) -> None:
        for answer in list(self.expert.answers.values()):
            self.expert.abort(answer.request)
            answer.end()

    # --- What clients see ----------------------------------------------------------------------------------

    async def _available(self) -> web.Response | None:
        """Wait for ever if the server hangs; return what it answers if it fails."""
        while self.fault == "hang":
            await self._changed.wait()
            await asyncio.sleep(0)
        return _error(503, "the emulated server has failed", "failed") if self.fault == "fail" else None

    async def _health(self, request: web.Request) -> web.Response:
        return await self._available() or web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": self.model, "object": "model", "created": 0, "owned_by": "jaxroute"}]
        return await self._available() or web.json_response({"object": "list", "data": models})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return await self._available() or web.Response(text=self._metrics.text(self.expert))

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            order = await request.json()
            fault, factor = order["fault"], float(order.get("factor", 5.0))
            if fault not in FAULTS or not factor > 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            return _error(400, f"give fault, one of {', '.join(FAULTS)}, and with slow a factor above 0", "fault")
        self.fault = fault
        self.expert.slowdown = factor if fault == "slow" else 1.0
        if fault == "fail":
            self._end_all()
        self._changed.set()
        return web.json_response({"fault": fault})

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        if refused := await self._available():
            return refused
        chat = http.path.endswith("chat/completions")
        try:
            body = await http.json()
            prompt, output, stopped = self._lengths_of(body, chat)
            reply = _Reply(self.model, chat, body, prompt, stopped)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            return _error(400, f"the request cannot be read: {error}", "bad_request")
        now, expert = self._clock.now(), self.expert
        if prompt + output > expert.kv_capacity:
            return _error(
                400,
                f"the maximum context length is {expert.kv_capacity} tokens; this is {prompt + output}",
                "context_length_exceeded",
            )
        self._number += 1
        request = Request(self._number, now, ready=now + expert.network_delay, prompt=prompt, output=output)
        if not expert.arrive(request):
            return _error(429, "the waiting queue is full", "queue_full")
        answer = expert.answers[request.index] = Answer(request, expert.network_delay)
        self._changed.set()
        self._metrics.count(prompt, 0)
        reply.name(request.index)
        try:
            if body.get("stream"):
                with suppress(ConnectionResetError):  # the client has left
                    return await self._stream(http, answer, reply)
                return web.Response()
            async for number in answer.tokens(self._clock):
                reply.words(number)
                self._metrics.count(0, number)
            if answer.cut:
                return _cut(http)
            return web.json_response(reply.whole())
        finally:
            expert.abort(request)
            self._changed.set()

    async def _stream(self, http: web.Request, answer: Answer, reply: _Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        async for number in answer.tokens(self._clock):
            await response.write(reply.chunk(number))
            self._metrics.count(0, number)
            if self.fault == "cut":
                answer.cut = True
        if answer.cut:
            return _cut(http)
        await response.write(reply.end())
        await response.write_eof()
        return response

    def _lengths_of(self, body: Any, chat: bool) -> tuple[int, int, bool]:
        """Return the tokens of prompt and answer, and whether the answer ends by itself.

        `seed` names the prompt of the bank whose answer is given, otherwise the prompt's text picks one.
        """
        text = body["messages"] if chat else body["prompt"]
        prompt = max(prompt_tokens_of(body, chat), 1)
        seed = body.get("seed")
        row = zlib.crc32(json.dumps(text).encode()) if seed is None else int(seed)
        own = int(self._lengths[row % len(self._lengths)])
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit is None:
            return prompt, own, True
        limit = int(limit)
        if limit < 1:
            raise ValueError("max_tokens must be at least 1")
        if body.get("ignore_eos"):
            return prompt, limit, False
        return prompt, min(own, limit), own <= limit


class _Reply:
    """An answer in OpenAI's words."""

    def __init__(self, model: str, chat: bool, body: dict[str, Any], prompt: int, stopped: bool) -> None:
        self._chat, self._prompt, self._reason = chat, prompt, "stop" if stopped else "length"
        options = body.get("stream_options") or {}
        self._usage = bool(options.get("include_usage"))
        self._made = 0
        self._text: list[str] = []
        kind = ("chat.completion" if chat else "text_completion") + (".chunk" if chat and body.get("stream") else "")
        self._head = {"id": "", "object": kind, "created": int(time.time()), "model": model}

    def name(self, number: int) -> None:
        """Number the answer."""
        self._head["id"] = f"{'chatcmpl' if self._chat else 'cmpl'}-{number}"

    def words(self, number: int) -> str:
        """Return the next tokens as text."""
        first = self._made
        self._made += number
        text = "".join(f" {_WORDS[word % len(_WORDS)]}" for word in range(first, self._made))
        text = text[1:] if first == 0 else text
        self._text.append(text)
        return text

    def _event(self, choices: list[Any], **more: Any) -> bytes:
        usage = {"usage": None} if self._usage else {}
        return b"data: " + json.dumps({**self._head, "choices": choices, **usage, **more}).encode() + b"\n\n"

    def _choice(self, text: str | None, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        if not self._chat:
            return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def chunk(self, number: int) -> bytes:
        """Return the events of the next tokens."""
        first = self._made == 0
        return self._event([self._choice(self.words(number), None, first=first)])

    def end(self) -> bytes:
        """Return the last events."""
        last = self._event([self._choice(None, self._reason)])
        usage = self._event([], usage=self._tokens()) if self._usage else b""
        return last + usage + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        choice = self._choice("".join(self._text), self._reason, first=True)
        if self._chat:
            choice["message"] = choice.pop("delta")
        return {**self._head, "choices": [choice], "usage": self._tokens()}

    def _tokens(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._made,
            "total_tokens": self._prompt + self._made,
        }


class _Metrics:
    """The figures of one server, by vLLM's names."""

    def __init__(self, config: ExpertConfig) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, meaning: str) -> Any:
            return Gauge(name, meaning, ["model_name"], registry=registry).labels(config.model)

        def counter(name: str, meaning: str) -> Any:
            return Counter(name, meaning, ["model_name"], registry=registry).labels(config.model)

        self._running = gauge("vllm:num_requests_running", "Requests in the batch.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self._kv = gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.")
        self._preemptions = counter("vllm:num_preemptions", "Preemptions.")
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens.")
        self._generated = counter("vllm:generation_tokens", "Generated tokens.")
        cache = Gauge("vllm:cache_config_info", "The KV cache.", ["block_size", "num_gpu_blocks"], registry=registry)
        cache.labels("1", str(config.kv_capacity)).set(1)
        self._counted = 0

    def count(self, prompt: int, generated: int) -> None:
        self._prompt.inc(prompt)
        self._generated.inc(generated)

    def text(self, expert: LiveExpert) -> str:
        """Return the page."""
        self._running.set(len(expert.running))
        self._waiting.set(len(expert.waiting))
        self._kv.set(sum(request.computed for request in expert.running) / expert.kv_capacity)
        self._preemptions.inc(expert.preemptions - self._counted)
        self._counted = expert.preemptions
        return generate_latest(self._registry).decode()


class EmulatedFleet:
    """A server for each expert of a site, on consecutive ports or on any that are free."""

    def __init__(
        self,
        site: SiteConfig,
        lengths: Int[np.ndarray, "prompt expert"],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        speed: float = 1.0,
    ) -> None:
        """`port` is the first one, or 0 for any; the site's time passes `speed` times as quickly as real time."""
        if not 0 < speed < float("inf"):
            raise UserError(f"--speed={speed} must be above 0")
        if not 0 <= port <= 65535 - len(site.experts):
            raise UserError(f"--port={port} must be from 0 to {65535 - len(site.experts)}")
        self._host = host
        clock = Clock(speed)
        self.servers = [Server(e, expert, lengths[:, e], clock) for e, expert in enumerate(site.experts)]
        self.ports = [port + e if port else 0 for e in range(len(site.experts))]
        self._runners: list[web.AppRunner | None] = [None] * len(site.experts)

    async def start(self, experts: Sequence[int] | None = None) -> None:
        """Listen; of a server that was stopped, on the port that it had.

        Raises:
            UserError: a port is in use.
        """
        for e in range(len(self.servers)) if experts is None else experts:
            runner = web.AppRunner(
                self.servers[e].app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1
            )
            await runner.setup()
            self._runners[e] = runner
            site = web.TCPSite(runner, self._host, self.ports[e], backlog=1024, reuse_address=True)
            try:
                await site.start()
            except OSError as error:
                await self.stop()
                raise UserError(
                    f"{self._host}:{self.ports[e]} cannot be listened on ({error.strerror}); choose another --port"
                ) from None
            self.ports[e] = runner.addresses[0][1]

    async def stop(self, experts: Sequence[int] | None = None) -> None:
        """Stop listening, and cut what is being answered."""
        for e in range(len(self.servers)) if experts is None else experts:
            runner, self._runners[e] = self._runners[e], None
            if runner is not None:
                self.servers[e]._end_all()
                await runner.cleanup()

    @property
    def urls(self) -> list[str]:
        """Where each server's API is."""
        return [f"http://{self._host}:{port}/v1" for port in self.ports]


def _error(status: int, message: str, code: str) -> web.Response:
    return web.json_response(error_body(status, message, code), status=status)


def _cut(http: web.Request) -> web.StreamResponse:
    """Close the connection in the middle of the answer."""
    if http.transport is not None:
        http.transport.abort()
    return web.Response()

"""The gateway as a process: it starts, listens, reloads its fleet file, drains and stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvicorn

from jaxroute.errors import UserError
from jaxroute.gateway.app import build_app
from jaxroute.gateway.exchange import WallClock
from jaxroute.gateway.fleet import Fleet
from jaxroute.gateway.live import Live
from jaxroute.gateway.log import Recorder
from jaxroute.gateway.metrics import Metrics
from jaxroute.gateway.policy import Policies
from jaxroute.gateway.proxy import Proxy, check_take_over
from jaxroute.gateway.upstream import client_session

logger = logging.getLogger("jaxroute.gateway")

_SWITCH_INTERVAL = 0.0001  # s

Load = Callable[[], tuple[Fleet, Policies]]
"""Reads the fleet file and builds its policy; raises `UserError` if either is wrong."""


class Gateway:
    """A running gateway. Start it, wait, and stop it."""

    def __init__(self, load: Load, folder: Path, *, insecure: bool = False) -> None:
        """Read fleet file and policy.

        Args:
            load: reads them, now and at each reload.
            folder: of the fleet file, where the log's path starts.
            insecure: allows a public address without keys.

        Raises:
            UserError: something is wrong with them.
        """
        self._load, self._folder, self._insecure = load, folder, insecure
        self.fleet, self._policies = load()
        self._check_public(self.fleet)
        self.proxy: Proxy
        self._server: uvicorn.Server

    def _check_public(self, fleet: Fleet) -> None:
        if fleet.is_public and not fleet.keys and not self._insecure:
            raise UserError(
                f"listen={fleet.listen} can be reached from other machines, and keys is empty: list SHA-256 of API "
                "keys, listen on 127.0.0.1, or start it with --insecure"
            )

    async def start(self) -> None:
        """Probe the servers, and listen.

        Raises:
            UserError: the address is in use, or the log cannot be written.
        """
        # Log and policy have threads of their own: the loop must not wait 5 ms for its turn.
        sys.setswitchinterval(_SWITCH_INTERVAL)
        host, port = self.fleet.address
        self._socket = listen(host, port)
        recorder = Recorder(self.fleet.log, self._folder, self._policies.assessor)
        self._session = client_session(self.fleet.limits)
        metrics = Metrics()
        self.proxy = Proxy(self.fleet, self._policies, self._session, recorder, metrics, WallClock(self.fleet.speed))
        await self.proxy.health.start()
        self.live = Live(self.proxy)
        config = uvicorn.Config(
            build_app(self.proxy, self.live),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(self.fleet.limits.drain_s) + 1,
            backlog=2048,
        )
        self._server = uvicorn.Server(config)
        # Signals are the caller's: uvicorn would take them away from whoever runs an event loop.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def reload(self) -> None:
        """Read fleet file and policy again; requests in flight are not disturbed, and mistakes change nothing."""
        proxy = self.proxy
        try:
            # Compilation takes seconds, in which requests go on.
            fleet, policies = await asyncio.to_thread(self._load)
            self._check_public(fleet)
        except UserError as error:
            proxy.metrics.reloads.labels("refused").inc()
            logger.error("reload: %s; the old fleet file holds", error)
            return
        if (reason := check_take_over(proxy, policies, fleet)) is not None:
            logger.warning("reload: the policy starts with an idle site, since %s", reason)
        old, guard = proxy.health, proxy.policies.guard
        if fleet.listen != proxy.fleet.listen:
            logger.warning("reload: listen holds until the gateway is started again")
        proxy.use(fleet, policies)
        proxy.recorder.assessor = policies.assessor
        if reason is None:
            proxy.health.up = list(map(bool, policies.router.up))
        old.stop()
        guard.close()
        self.fleet, self._policies = fleet, policies
        await proxy.health.start()
        proxy.metrics.reloads.labels("done").inc()
        logger.warning("reload: done, the policy is %s", policies.name)

    async def stop(self) -> None:
        """Take no more requests, end those in flight, and close the log."""
        self.proxy.draining = True
        self._server.should_exit = True
        await self._task
        self.proxy.health.stop()
        await self._session.close()
        await asyncio.to_thread(self.proxy.recorder.close)
        self.proxy.policies.guard.close()

    async def run(self, ready: Callable[[], object], stopping: Callable[[], object] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reloads.

        Args:
            ready: is called once it listens.
            stopping: is called before it ends what is in flight.
        """
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        await self.start()
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = asyncio.ensure_future(self.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        loop.add_signal_handler(signal.SIGHUP, reload)
        ready()
        waiting = asyncio.create_task(stopped.wait())
        await asyncio.wait((waiting, self._task), return_when=asyncio.FIRST_COMPLETED)
        stopping()
        await self.stop()


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop of its own: uvloop's, which costs less, where it is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ModuleNotFoundError):  # there is none for Windows
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: the address is in use, or none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named: asyncio sets TCP_NODELAY on no other, and every first token would come 40 ms late.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise UserError(
            f"listen={host}:{port} cannot be listened on ({error.strerror or error}); choose another address or port"
        ) from None
    return listener

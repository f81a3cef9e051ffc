"""An endpoint picker for Envoy: `python -m jaxroute picker FLEET.yaml`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from rich.console import Console

from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.commands.fleets import load_fleet
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.gateway.fleet import address_of
from jaxroute.gateway.service import run_loop

if TYPE_CHECKING:
    from jaxroute.adapters.ext_proc import EndpointPicker


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    return run_command(_parser(), argv, _picker)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("picker", "Pick servers for Envoy, which carries the requests (extra ext-proc).")
    parser.add_argument("fleet", type=Path, metavar="FLEET.yaml", help="the servers; docs/gateway.md lists its options")
    parser.add_argument("--listen", default="127.0.0.1:9002", metavar="ADDRESS:PORT", help="default 127.0.0.1:9002")
    parser.add_argument("--http", metavar="ADDRESS:PORT", help="serve /metrics and /health there, by HTTP")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="for TLS; with --key")
    parser.add_argument("--key", type=Path, metavar="PEM", help="of the certificate")
    parser.add_argument("--insecure", action="store_true", help="allow a public address: whoever reaches it may ask")
    return parser


def _picker(options: argparse.Namespace, console: Console) -> None:
    try:
        from jaxroute.adapters.ext_proc import EndpointPicker
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing; install jaxroute with its extra: jaxroute[ext-proc]") from None
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    use_compilation_cache()
    with console.status("compiling the policy"):
        fleet, policies = load_fleet(options.fleet, options.listen)
    if fleet.is_public and not options.insecure:
        raise UserError(
            f"--listen={fleet.listen} can be reached from other machines, and asks for no key: listen on 127.0.0.1, "
            "or see to it that only Envoy can reach it, and start it with --insecure"
        )
    certificate = _certificate(options.certificate, options.key)
    pages = None if options.http is None else address_of("--http", options.http)
    picker = EndpointPicker(fleet, policies, options.fleet.parent)
    run_loop(_run(picker, fleet.address, certificate, pages, console))


def _certificate(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None or key is None:
        if certificate is not key:
            raise UserError("--certificate and --key belong together; give both, or none")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # an SSLError is one too
        raise UserError(f"--certificate={certificate}, --key={key}: {error.strerror or error}") from None
    context.set_alpn_protocols(["h2"])
    return context


async def _run(
    picker: EndpointPicker,
    address: tuple[str, int],
    certificate: ssl.SSLContext | None,
    pages: tuple[str, int] | None,
    console: Console,
) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    port = await picker.start(*address, certificate)
    runner = web.AppRunner(_pages(picker), access_log=None)
    await runner.setup()
    try:
        if pages is not None:
            try:
                await web.TCPSite(runner, *pages).start()
            except OSError as error:
                where = f"--http={pages[0]}:{pages[1]}"
                raise UserError(f"{where} cannot be listened on ({error.strerror or error}); choose another") from None
        say(console, f"{address[0]}:{port}  {picker.fleet.policy}, {len(picker.fleet.experts)} experts")
        await stopped.wait()
    finally:
        await runner.cleanup()
        await picker.stop()


def _pages(picker: EndpointPicker) -> web.Application:
    async def metrics(request: web.Request) -> web.Response:
        picker.update_gauges(picker.health.polled)
        return web.Response(body=picker.metrics.text(), content_type="text/plain", charset="utf-8")

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=200 if picker.ready else 503)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/health", health)])
    return app

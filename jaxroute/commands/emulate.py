"""Emulated servers: `python -m jaxroute.emulate site=edge6 --port 9000 [--speed 5]`."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxroute.commands.arguments import Intermixed, parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.commands.fleets import write_emulated_fleet
from jaxroute.config import load_config
from jaxroute.files import check_new
from jaxroute.gateway.emulator import EmulatedFleet
from jaxroute.scenarios import build_env


def main(argv: Sequence[str] | None = None) -> int:
    """Start the servers; returns the exit code once they are told to stop."""
    return run_command(_parser(), argv, _emulate)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("emulate", "Start an emulated OpenAI-compatible server for each expert of a site.", Intermixed)
    parser.add_argument("options", nargs="*", metavar="option=value", help="e.g. site=edge6, bank=zeroeval")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=9000, help="the first server's; 0 for any (default 9000)")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times as quickly time passes (default 1)")
    parser.add_argument("--fleet", type=Path, metavar="FILE.yaml", help="write a fleet file for the gateway")
    return parser


def _emulate(options: argparse.Namespace, console: Console) -> None:
    config = load_config(options.options)
    if options.fleet is not None:
        check_new(options.fleet, "--fleet", "file")
    _, params = build_env(config)
    fleet = EmulatedFleet(
        config.site, np.asarray(params.bank.output_tokens), host=options.host, port=options.port, speed=options.speed
    )
    asyncio.run(_serve(fleet, config, params, options, console))


async def _serve(fleet, config, params, options, console) -> None:  # type: ignore[no-untyped-def]
    await fleet.start()
    for expert, url in zip(config.site.experts, fleet.urls, strict=True):
        say(console, f"{url}  {expert.label}")
    console.file.flush()
    if options.fleet is not None:
        write_emulated_fleet(options.fleet, config, params, fleet.urls, options.speed)
        say(console, f"Use it with: python -m jaxroute.gateway {options.fleet}")
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await fleet.stop()

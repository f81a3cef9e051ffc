"""The gateway: `python -m jaxroute.gateway FLEET.yaml`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.commands.fleets import load_fleet
from jaxroute.devices import use_compilation_cache
from jaxroute.gateway.service import Gateway, run_loop


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    return run_command(_parser(), argv, _gateway)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("gateway", "Put a policy in front of OpenAI-compatible servers.")
    parser.add_argument("fleet", type=Path, metavar="FLEET.yaml", help="the servers; docs/gateway.md lists its options")
    parser.add_argument("--listen", metavar="ADDRESS:PORT", help="instead of the file's")
    parser.add_argument("--insecure", action="store_true", help="allow a public address without API keys")
    return parser


def _gateway(options: argparse.Namespace, console: Console) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    use_compilation_cache()
    with console.status("compiling the policy"):
        gateway = Gateway(
            lambda: load_fleet(options.fleet, options.listen), options.fleet.parent, insecure=options.insecure
        )
    run_loop(_run(gateway, console))


async def _run(gateway: Gateway, console: Console) -> None:
    await gateway.run(
        lambda: say(console, f"{gateway.url}  {gateway.fleet.policy}, {len(gateway.fleet.experts)} experts")
    )

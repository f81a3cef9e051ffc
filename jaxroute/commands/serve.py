"""Everything at once, to look at: an emulated fleet, a gateway in front of it, and a load.

python -m jaxroute serve [site=edge6] [--policy edge6] [--load 1.0]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxroute.commands.arguments import Intermixed, parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.commands.fleets import load_fleet, write_emulated_fleet
from jaxroute.config import load_config
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.gateway.load import Prompts, poisson, send_all
from jaxroute.gateway.service import Gateway, run_loop
from jaxroute.scenarios import build_env


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    return run_command(_parser(), argv, _serve)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("serve", "Try the gateway: emulated servers, a policy in front of them, a load.", Intermixed)
    parser.add_argument("options", nargs="*", metavar="option=value", help="site, workload, bank; e.g. site=edge3")
    parser.add_argument("--policy", default="edge6", help="router or rule (default edge6, the pretrained router)")
    parser.add_argument(
        "--load", type=float, default=1.0, help="multiple of the workload's rate; 0 for none (default 1)"
    )
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="ADDRESS:PORT", help="default 127.0.0.1:8080")
    parser.add_argument("--port", type=int, default=9000, help="first emulated server's (default 9000)")
    return parser


def _serve(options: argparse.Namespace, console: Console) -> None:
    if not 0 <= options.load < float("inf"):
        raise UserError(f"--load={options.load} must not be negative, and finite")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    use_compilation_cache()
    config = load_config(options.options)
    _, params = build_env(config)
    num_experts = len(config.site.experts)
    urls = [f"http://127.0.0.1:{options.port + e}/v1" for e in range(num_experts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.yaml"
        write_emulated_fleet(path, config, params, urls, 1.0, options.policy)
        # A process each: none waits for another's turn, as on machines of their own.
        emulator = subprocess.Popen(
            [sys.executable, "-m", "jaxroute.emulate", *options.options, f"--port={options.port}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        sender = None
        try:
            assert emulator.stdout is not None
            for _ in range(num_experts):
                if not (line := emulator.stdout.readline()):
                    raise UserError("the emulated servers have not started")
                say(console, line.rstrip())
            with console.status("compiling the policy"):
                gateway = Gateway(lambda: load_fleet(path, options.listen), Path(folder))
            bank = params.bank
            prompts = Prompts(*(np.asarray(getattr(bank, name)) for name in Prompts._fields))
            shares = {requirement.name: requirement.share for requirement in config.workload.requirements}
            rate = options.load * float(np.mean(np.asarray(params.rate)))

            def ready() -> None:
                nonlocal sender
                say(console, f"Live page: {gateway.url}/")
                say(console, f"API:       {gateway.url}/v1, model auto")
                say(console, f"Load:      {rate:g} requests per second. Ctrl-C ends everything.")
                if rate:
                    context = multiprocessing.get_context("spawn")
                    arguments = (f"{gateway.url}/v1", rate, prompts, shares, config.seed)
                    sender = context.Process(target=_send, args=arguments, daemon=True)
                    sender.start()

            def stopping() -> None:
                if sender is not None:
                    sender.terminate()

            run_loop(gateway.run(ready, stopping))
        finally:
            if sender is not None:
                sender.terminate()
            emulator.terminate()
            emulator.wait()


def _send(url: str, rate: float, prompts: Prompts, shares: dict[str, float], seed: int) -> None:
    """Send requests without end; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway ends it
    asyncio.run(send_all(url, poisson(rate, len(prompts.prompt_tokens), shares, seed), prompts))

"""One file per command of `jaxroute`; each has a `main` that takes the words after the command.

console.py is what they all share, configured.py what train and eval share, arguments.py what the others share.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxroute.errors import did_you_mean

COMMANDS = {
    "train": "train a router, then judge it against the rules",
    "eval": "judge a router and the rules, run a study, or record an episode to watch",
    "trace": "describe recorded arrivals, or fit a workload to them",
    "calibrate": "fit a site's experts to serving logs or profiles",
    "twin": "judge policies on a log of real traffic, with the judgement's own error",
    "bank": "turn an evaluation of your LLMs into a bank of prompts",
    "predict": "predict quality and length of answers from prompts' text",
    "export": "write a trained router as a folder that a gateway loads",
    "gateway": "put a policy in front of OpenAI-compatible servers",
    "picker": "let Envoy carry the requests, and pick the server for each",
    "emulate": "start emulated servers for a site, to try a gateway with",
    "serve": "try it all at once: emulated servers, a gateway, a load, and a page to watch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from jaxroute import __version__

        print(f"jaxroute {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: there is no command {name}{hint}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Imported here: each loads what it needs, and no more.
    code: int = importlib.import_module(f"jaxroute.commands.{name}").main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    started = "jaxroute" if Path(sys.argv[0]).name == "jaxroute" else "python -m jaxroute"
    return "\n".join(
        [f"usage: {started} COMMAND ... | --version", "", *lines, "", f"{started} COMMAND --help says more."]
    )

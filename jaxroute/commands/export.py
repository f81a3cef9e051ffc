"""Export a trained router for a gateway: `python -m jaxroute export RUN --out FOLDER [option=value ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxroute.commands.arguments import Intermixed, parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.training.export import export_router


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run's router; returns the exit code."""
    return run_command(_parser(), argv, _export)


def _export(options: argparse.Namespace, console: Console) -> None:
    manifest = export_router(options.run, options.out, predictor=options.predictor, overrides=options.options)
    site = manifest["site"]
    of = f"the {len(site['experts'])} experts of site {site['name']}, {manifest['slots']} requests each"
    say(console, f"{options.out}: {manifest['checkpoint']} for {of}")
    say(console, f"Use it with: jaxroute.gateway.Router.load({str(options.out)!r})")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("export", "Export a trained router for use in a gateway.", Intermixed)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory or one of its checkpoints")
    parser.add_argument("options", nargs="*", metavar="option=value", help="other than the run's, e.g. site=edge16")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    parser.add_argument("--predictor", type=Path, metavar="FOLDER", help="predicts from a prompt's text; is copied")
    return parser

"""What the commands `python -m jaxroute.<name>` share: options, errors in one line, choices written once checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console

from jaxroute.errors import UserError


class Parser(argparse.ArgumentParser):
    """Options whose mistakes are a user's."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: always, with a hint at the help.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace, Console], None],
) -> int:
    """Parse the options and run the command; returns the exit code, 2 for a user's mistake."""
    # A plain, wide console where nobody watches, so that logs hold whole lines.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        run(parser.parse_args(argv), console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_chosen(options: argparse.Namespace, console: Console) -> None:
    """Run the function that a subcommand has set as `run`."""
    options.run(options, console)

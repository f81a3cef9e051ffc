"""What the commands share that read their arguments by argparse: all but train and eval."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console

from jaxroute.commands.console import run_with_console
from jaxroute.config.words import program
from jaxroute.errors import UserError


class Parser(argparse.ArgumentParser):
    """Arguments of a command, whose mistakes are a user's."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: always, with a hint at the help.
        """
        raise UserError(f"{message}; see {self.prog} --help")


class Intermixed(Parser):
    """A parser that takes option=value after flags as well as before them."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Take site=lab after --out router as well as before it."""
        return self.parse_intermixed_args(args, namespace)


def parser_of(command: str, description: str, kind: type[Parser] = Parser) -> Parser:
    """Return a parser for a command of jaxroute, whose usage names the command as it was started."""
    return kind(prog=program(command), description=description)


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace, Console], None],
) -> int:
    """Read the arguments and run the command; returns the exit code, 2 for a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    return run_with_console(lambda console: run(parser.parse_args(words), console))


def run_chosen(options: argparse.Namespace, console: Console) -> None:
    """Run the function that a subcommand has set as `run`."""
    options.run(options, console)

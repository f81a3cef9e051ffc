"""What the commands `python -m jaxroute.<name>` share: options, errors in one line, choices written once checked."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from jaxroute.config import Config, config_folder, load_config
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


def check_choice(group: str, path: Path) -> None:
    """Check where a choice of a configuration group is to be written.

    Raises:
        UserError: it exists, or its name is no name of a choice, or is taken.
    """
    if path.suffix != ".yaml":
        raise UserError(f"--out={path} must end in .yaml")
    if path.exists():
        raise UserError(f"{path} exists already; name another file")
    if not re.fullmatch(r"[\w-]+", path.stem):
        raise UserError(f"--out={path}: the file names the {group}; use letters, digits, - and _")
    if (config_folder() / group / path.name).exists():
        raise UserError(f"--out={path}: there is a {group} {path.stem} already, which would be loaded; name another")


def write_choice(group: str, path: Path, text: str, check: Callable[[Config], object] = lambda config: None) -> Config:
    """Write a choice of a configuration group that loads and passes `check`, or nothing; return the configuration.

    Raises:
        UserError: it cannot be written, or cannot be loaded.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            checked = Path(folder) / group / path.name
            checked.parent.mkdir()
            checked.write_text(text)
            config = load_config([_searchpath(Path(folder)), f"{group}={path.stem}"])
            check(config)
            checked.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from error
    return config


def usage_of_choice(group: str, path: Path) -> str:
    """Return the command that trains with a written choice."""
    folder = path.resolve().parent
    if folder == (config_folder() / group).resolve():
        return f"python train.py {group}={path.stem}"
    if folder.name != group:
        return f"python train.py {group}={path.stem}, once the file is in configs/{group}"
    return f'python train.py "{_searchpath(folder.parent)}" {group}={path.stem}'


def _searchpath(folder: Path) -> str:
    escaped = str(folder.resolve()).replace("'", r"\'")
    return f"hydra.searchpath=['{escaped}']"

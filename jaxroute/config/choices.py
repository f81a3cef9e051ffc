"""Choices of a configuration group that a command writes: checked before they appear."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxroute.config.load import config_folder, load_config
from jaxroute.config.schema import Config
from jaxroute.config.words import command_line, paths_word
from jaxroute.errors import UserError
from jaxroute.files import check_new, write_file


def check_choice(group: str, path: Path) -> None:
    """Check where a choice of a configuration group is to be written.

    Raises:
        UserError: it exists or cannot be written, or its name is no name of a choice, or is taken.
    """
    if path.suffix != ".yaml":
        raise UserError(f"--out={path} must end in .yaml")
    check_new(path, "--out", "file")
    if not re.fullmatch(r"[\w-]+", path.stem):
        raise UserError(f"--out={path}: the file names the {group}; use letters, digits, - and _")
    if (config_folder() / group / path.name).exists():
        raise UserError(f"--out={path}: there is a {group} {path.stem} already, which would be loaded; name another")


def write_choice(group: str, path: Path, text: str, check: Callable[[Config], object] = lambda config: None) -> Config:
    """Write a choice of a configuration group that loads and passes `check`, or nothing; return the configuration.

    Raises:
        UserError: it cannot be written, or cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder) / group / path.name, text)
        config = load_config([_searchpath(Path(folder)), f"{group}={path.stem}"])
        check(config)
    write_file(path, text)
    return config


def usage_of_choice(group: str, path: Path) -> str:
    """Return the command that trains with a written choice."""
    folder = path.resolve().parent
    choice = f"{group}={path.stem}"
    if folder == (config_folder() / group).resolve():
        return command_line("train", choice)
    if folder.name != group:
        return f"{command_line('train', choice)}, once the file is in a folder named {group}, such as configs/{group}"
    return command_line("train", _searchpath(folder.parent), choice)


def _searchpath(folder: Path) -> str:
    return paths_word("hydra.searchpath", [folder.resolve()])

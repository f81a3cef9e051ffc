"""Words of a command line: what a user may write, as Hydra reads it, and commands to print that can be pasted back."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from jaxroute.config.schema import Config
from jaxroute.errors import UserError

PATHS = (
    "data_dir",
    "output_dir",
    "checkpoint",
    "resume",
    "fork",
    "bank.folder",
    "bank.predictions",
    "workload.trace",
)
"""Options that name a file or a folder."""
_SEARCHPATH = "hydra.searchpath"

# --- what a user writes -----------------------------------------------------------------------------------


def as_override(word: str) -> str:
    """Return a word in Hydra's grammar, after the type of its option.

    Text is taken as it stands, whatever characters it has, so that every path can be named; `~` at the start of a
    path is the home folder. Where a list may stand, one value will do, and so will several with commas in between.
    Everything else is left to Hydra.

    Raises:
        UserError: an empty path, or `~` where no home folder is known.
    """
    key, equals, value = word.partition("=")
    kind = option_type(key)
    if not equals or kind is None or (value == "null" and NoneType in get_args(kind)):
        return word
    if _is(kind, str):
        return f"{key}={quoted(escaped(literal(word)))}"
    item = _item_of_list(kind)
    if item is None:
        return word
    if item is str:
        texts = _texts(word)
        # Where to look for files is read by Hydra alone, which puts nothing in the place of ${...}.
        return f"{key}=[{','.join(quoted(text if key == _SEARCHPATH else escaped(text)) for text in texts)}]"
    return f"{key}=[{value}]" if value and not value.startswith("[") else word


def literal(word: str) -> str:
    """Return the value of an option for text, as it stands.

    Raises:
        UserError: an empty path, or `~` where no home folder is known.
    """
    key, _, value = word.partition("=")
    if key.lstrip("+") not in PATHS:
        return value
    if not value:
        raise UserError(f"{word} is empty; name a file or folder, or leave {key} out")
    if value != "~" and not value.startswith("~/"):
        return value
    try:
        return str(Path.home()) + value[1:]
    except RuntimeError:
        raise UserError(f"{word}: ~ has no meaning, as no home folder is known; write the whole path") from None


def is_text(word: str) -> bool:
    """Whether a word sets an option for text, which is taken as it stands."""
    return _is(option_type(word.partition("=")[0]), str)


def parsed(word: str) -> Override:
    """Return a word as Hydra understands it.

    Raises:
        HydraException: it is not in Hydra's grammar.
    """
    return OverridesParser.create().parse_override(word)


def option_type(key: str) -> Any:
    """Return the type of an option by its name on the command line, such as site.experts.0.model, or None."""
    key = key.lstrip("+")
    if key == _SEARCHPATH:
        return list[str]
    kind: Any = Config
    for name in key.split("."):
        inner = next((part for part in _alternatives(kind) if part is not NoneType), None)
        if is_dataclass(inner):
            kind = get_type_hints(inner).get(name)
        elif get_origin(inner) is dict or (get_origin(inner) is list and name.isdigit()):
            kind = get_args(inner)[-1]
        else:
            return None
    return kind


def escaped(value: Any) -> Any:
    """Return what OmegaConf turns back into `value`: without this, it would put something in the place of `${...}`."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", value)
    return value


def quoted(text: str) -> str:
    """Return text in quotes, as Hydra reads it."""
    # A backslash stands for itself, unless a quote follows.
    inside = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{inside}'"


def _texts(word: str) -> list[str]:
    """Return the items of a list of texts: in brackets, where an item may have quotes, or with commas alone."""
    key, _, value = word.partition("=")
    if value.startswith("["):
        try:
            items = parsed(f"{key}={value}").value()
        except HydraException:
            if not value.endswith("]"):
                raise
            value = value[1:-1]
        else:
            return [str(item) for item in items] if isinstance(items, list) else [value]
    return [text.strip() for text in value.split(",")] if value else []


def _is(kind: Any, of: type) -> bool:
    return of in _alternatives(kind)


def _item_of_list(kind: Any) -> Any:
    return next((get_args(part)[0] for part in _alternatives(kind) if get_origin(part) is list), None)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


# --- what is printed --------------------------------------------------------------------------------------


def command_line(command: str, *words: str) -> str:
    """Return a command of jaxroute to paste into a shell, started the way this process was."""
    return " ".join([program(command), shlex.join(words)] if words else [program(command)])


def program(command: str) -> str:
    """Return how to start a command of jaxroute the way this process was started.

    That is as `python train.py` in a checkout, by the installed `jaxroute`, or as `python -m jaxroute` anywhere.
    """
    started = Path(sys.argv[0])
    if started.name in ("train.py", "eval.py") and command in ("train", "eval"):
        return shlex.join([_interpreter(), str(started.with_name(f"{command}.py"))])
    if started.name == "jaxroute":
        return shlex.join([_as_typed("jaxroute", started), command])
    return shlex.join([_interpreter(), "-m", "jaxroute", command])


def path_word(option: str, path: str | Path) -> str:
    """Return the word that sets an option to a path."""
    return f"{option}={'./' if str(path).startswith('~') else ''}{path}"


def paths_word(option: str, paths: Iterable[str | Path]) -> str:
    """Return the word that sets an option to a list of paths."""
    plain = re.compile(r"[A-Za-z0-9_./-]*[A-Za-z_/][A-Za-z0-9_./-]*")
    return f"{option}=[{','.join(str(path) if plain.fullmatch(str(path)) else quoted(str(path)) for path in paths)}]"


def _interpreter() -> str:
    """Return `python`, unless this is the name of another one, or of none."""
    return _as_typed("python", Path(sys.executable))


def _as_typed(name: str, path: Path) -> str:
    """Return `name` if the shell would find `path` by it, else the path, from here if it lies below."""
    # Not resolved: an environment's python is a link to the one that it was made with.
    where = os.path.abspath(path)
    found = shutil.which(name)
    if found is not None and os.path.abspath(found) == where:
        return name
    here = os.getcwd()
    return os.path.relpath(where, here) if where.startswith(here + os.sep) else where

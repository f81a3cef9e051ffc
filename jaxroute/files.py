"""Files and folders that appear complete or not at all, and rows quoted in messages."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxroute.errors import UserError

_SHOWN = 100  # characters of a bad row


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Give a draft to write into, which becomes `folder` once all is written, and vanishes if anything fails.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    with _writing(folder):
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another place, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            yield draft
            draft.rename(folder)


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file at once, text as UTF-8: a reader sees the old or the new one, never a half.

    Missing folders above it are made.

    Returns:
        The path.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@contextmanager
def without_pattern(folder: Path) -> Iterator[Path]:
    """Give a name of an existing folder for libraries that take [, * and ? in a name for a pattern.

    It is absolute, and a link for the time being if the folder's own name has any of them.
    """
    folder = folder.resolve()
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def check_writable(folder: Path, option: str) -> None:
    """Check that files can be written into a folder, which need not exist yet and is not made.

    Args:
        folder: where something will be written.
        option: what the user sets to choose another one.

    Raises:
        UserError: they cannot.
    """
    with _writing(folder, f"name another folder by {option}=..."):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder by {option}=...")
        try_to_write(folder)


def check_new(path: Path, option: str, what: str = "folder") -> None:
    """Check that a new file or folder can be made, before the work whose results it is for.

    Args:
        path: where it will be.
        option: what the user sets to choose another place.
        what: "file" or "folder".

    Raises:
        UserError: it exists, or it cannot be made.
    """
    with _writing(path, f"name another {what} by {option}=..."):
        if path.exists():
            raise UserError(f"{path} exists already: name another {what} by {option}=..., or remove it")
        try_to_write(path)


def try_to_write(path: Path) -> None:
    """Write a file that leaves no trace, in a folder or in what exists of those above it.

    Raises:
        OSError: it cannot be written.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):  # permissions say little: root has all, a file system may have none
        pass


@contextmanager
def _writing(path: Path, advice: str = "choose another place") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {advice}") from error


def shown(row: str | Iterable[Any]) -> str:
    """Quote a row for a message: on one line, without control characters, the beginning of it if it is long."""
    text = " ".join((row if isinstance(row, str) else ",".join(map(str, row))).split())
    quoted = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text[:_SHOWN])
    return f"'{quoted}...'" if len(text) > _SHOWN else f"'{quoted}'"

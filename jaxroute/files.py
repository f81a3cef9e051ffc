"""Folders that appear complete or not at all, and lines of JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxroute.errors import UserError

_SHOWN = 100  # characters of a bad line


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Give a draft to write into, which becomes `folder` once all is written, and vanishes if anything fails.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            yield draft
            draft.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another place") from error


def json_object(text: str, place: str) -> dict[str, Any]:
    """Read the object in a line of a JSON Lines file; `place` names the line in messages.

    Raises:
        UserError: it is something else.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: {shown(text)} is not JSON: write one object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: {shown(text)} is not a JSON object: write one per line")
    return row


def shown(row: str | Iterable[Any]) -> str:
    """Quote a row for a message, on one line, the beginning of it if it is long."""
    text = " ".join((row if isinstance(row, str) else ",".join(map(str, row))).split())
    return f"'{text[:_SHOWN]}...'" if len(text) > _SHOWN else f"'{text}'"


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file at once: a reader sees the old or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path

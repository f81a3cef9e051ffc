"""Folders that appear complete or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxroute.errors import UserError


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

"""One training at a time in a run directory."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxroute.errors import UserError

if sys.platform != "win32":
    import fcntl

LOCK_FILE = "training.lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run directory.

    The operating system holds the lock, and releases it with the process, however that ends. What the file says is
    for people. Windows has no such locks: nothing is kept out there.

    Raises:
        UserError: another training holds it, or the directory cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK_FILE).open("a+")
    except OSError as error:
        raise UserError(f"{run} cannot be written ({error.strerror}); name another output_dir") from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{run} is in use by another training ({file.read().strip()}); wait until it ends, or name another "
                    "output_dir"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield

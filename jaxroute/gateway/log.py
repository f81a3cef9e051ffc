"""Writes the decision log, and looks at each decision again, in a thread of its own: no request waits for either."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxroute.errors import UserError
from jaxroute.gateway.fleet import LogOptions
from jaxroute.gateway.rules import Arrays, Assessment, Assessor

_MOST_WAITING = 10_000
"""Decisions in line, beyond which new ones are logged without an assessment."""

_PAUSE = 0.02  # s

Record = dict[str, Any]


class Recorder:
    """Assesses decisions in their order, and writes a line when a request ends."""

    lost: int
    """Lines that could not be written."""

    def __init__(self, options: LogOptions, folder: Path, assessor: Assessor) -> None:
        """Open the log and start the thread.

        Args:
            options: of the fleet file.
            folder: where a relative path starts.
            assessor: looks at decisions.

        Raises:
            UserError: the log cannot be written.
        """
        self.assessor = assessor
        self.lost = 0
        self._file = None if options.path is None else _File(folder / options.path, options)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._work, name="decision log", daemon=True)
        self._thread.start()

    def decided(self, seen: Arrays) -> Future[Assessment | None]:
        """Assess a decision, later."""
        promised: Future[Assessment | None] = Future()
        if self._queue.qsize() > _MOST_WAITING:
            promised.set_result(None)
            return promised
        assessor = self.assessor

        def assess() -> None:
            try:
                promised.set_result(assessor(seen))
            except Exception:  # a record without it is better than none
                promised.set_result(None)

        self._queue.put(assess)
        return promised

    def end(self, record: Callable[[], Record]) -> None:
        """Write a request's record, which is asked for, in the thread, once its decision has been assessed."""

        def write() -> None:
            line = record()
            if self._file is not None:
                try:
                    self._file.write(line)
                except OSError:
                    self.lost += 1

        self._queue.put(write)

    def flush(self) -> None:
        """Wait until all that was said so far is done."""
        done = threading.Event()
        self._queue.put(done.set)
        self.hurry()
        done.wait()

    def close(self) -> None:
        """Write what is in line, and close the log."""
        self._queue.put(None)
        self.hurry()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def hurry(self) -> None:
        """Do at once what is in line: somebody waits for it."""
        self._hurry.set()

    def _work(self) -> None:
        while True:
            task = self._queue.get()
            # A request has just been routed: the event loop should send it on its way without waiting for its turn.
            self._hurry.wait(_PAUSE)
            self._hurry.clear()
            while task is not None:
                task()
                try:
                    task = self._queue.get_nowait()
                except queue.Empty:
                    break
            else:
                return


class _File:
    """A file of lines that starts anew when it is large."""

    def __init__(self, path: Path, options: LogOptions) -> None:
        self._path, self._most, self._keep = path, options.rotate_bytes, options.keep
        self._open()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"log.path: {self._path} cannot be written ({error.strerror}); choose another") from None
        self._size = os.fstat(self._handle).st_size
        if self._size and os.pread(self._handle, 1, self._size - 1) != b"\n":
            # A process was killed in the middle of a line; what follows must not be lost with it.
            self._size += os.write(self._handle, b"\n")

    def write(self, record: Record) -> None:
        """Append a line, at once."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if self._size and self._size + len(line) > self._most:
            self._rotate()
        self._size += os.write(self._handle, line)

    def _rotate(self) -> None:
        """Move the full file to .1, those before to .2 and so on, and forget the oldest."""
        os.close(self._handle)
        for number in range(self._keep, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            if newer.exists():
                os.replace(newer, older)
        self._open()

    def close(self) -> None:
        os.close(self._handle)

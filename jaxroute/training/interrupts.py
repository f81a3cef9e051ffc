"""SIGINT and SIGTERM as a request to stop at the next good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818, as KeyboardInterrupt: nothing has gone wrong
    """A signal came, and what has been done is saved; the message says where, e.g. "at step 1,024"."""


class Interrupts:
    """As a context manager, take note of the first such signal; a second one ends the process at once."""

    def __init__(self, listen: bool = True) -> None:
        self.received: signal.Signals | None = None
        # Python delivers signals to the main thread only.
        self._listens = listen and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Interrupts:
        if self._listens:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

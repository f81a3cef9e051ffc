"""SIGINT and SIGTERM as a wish to stop at the next good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within it, the first such signal is only noted; a second one ends the process at once."""

    def __init__(self, listen: bool = True) -> None:
        self.received: signal.Signals | None = None
        # Python hands signals to the main thread alone.
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

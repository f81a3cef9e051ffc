"""What a long command is doing: a bar where somebody watches, a line every 30 s where a log is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

_LINE_EVERY = 30.0  # s
_FILTER_AFTER = 60.0  # s; XLA sounds its alarm 120 s into a compilation


class Progress:
    """Show the phases of a command, one after the other.

    In a terminal or a notebook this is a bar. Elsewhere (Slurm, nohup, CI, container logs) it is a line at the start
    and the end of a phase and every 30 s in between, so that no log stays silent:

        with Progress(console) as progress:
            progress.begin("compiling the policies")
            ...
            progress.begin("judging", total=len(policies))
            for policy in policies:
                ...
                progress.advance(note=f"last: {policy.name}")

    Meanwhile, XLA's alarm about slow compilation ("Very slow compile?") is kept out of sight.
    """

    def __init__(
        self, console: Console, *, interval: float = _LINE_EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        self._clock, self._interval, self._began = clock, interval, clock()
        self._phase: _Phase | None = None
        self._bar: Bar | None = None
        if console.is_terminal or console.is_jupyter:
            columns = (TextColumn("{task.description}"), BarColumn(), _Times(self), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=console, refresh_per_second=2)
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._alarm_filter: _AlarmFilter | None = None

    def begin(self, name: str, total: int | None = None, done: int = 0) -> None:
        """Begin a phase, which ends the one before.

        Args:
            name: what is being done, e.g. "training".
            total: how much there is to do, in any unit; None where that is unknown, as for a compilation.
            done: how much of it is done already.
        """
        self._end()
        self._phase = _Phase(name, total, done, done, self._clock())
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(name, total=total, completed=done, note="")
        else:
            self._print_line()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Note that more of the phase is done; `note` says how it goes, e.g. "12,300 steps/s"."""
        phase = self._phase
        assert phase is not None, "begin a phase first"
        phase.done += amount
        phase.note = note or phase.note
        if self._bar:
            self._bar.update(self._bar.task_ids[-1], completed=phase.done, note=phase.note)

    def line(self) -> str:
        """Return the line for a log, e.g. "training: 40 %, 0:02:10, 0:03:15 left, 12,300 steps/s"."""
        phase = self._phase
        if phase is None:
            return ""
        share = [] if phase.total is None else [f"{100 * phase.done // max(phase.total, 1)} %"]
        return f"{phase.name}: " + ", ".join([*share, *self.times(), *([phase.note] if phase.note else [])])

    def times(self) -> list[str]:
        """Return how long the phase has lasted, and how long it will still take at this pace."""
        phase = self._phase
        if phase is None:
            return []
        elapsed, finished = self._clock() - phase.began, phase.done - phase.done_before
        times = [_readable(elapsed)]
        if phase.total is not None and finished > 0:
            times.append(f"{_readable(elapsed / finished * (phase.total - phase.done))} left")
        return times

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        if self._bar:
            self._bar.stop()
        self._end()
        if self._alarm_filter:
            self._alarm_filter.close()

    def _end(self) -> None:
        """Leave the phase's last line in a log, unless it says nothing new."""
        if not self._bar and self._phase is not None and self._phase.done > self._phase.done_before:
            self._print_line()

    def _print_line(self) -> None:
        self.console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def _tick(self) -> None:
        while not self._over.wait(self._interval):
            if not self._bar and self._phase is not None:
                self._print_line()
            if self._alarm_filter is None and self._clock() - self._began >= _FILTER_AFTER:
                self._alarm_filter = _AlarmFilter()


@dataclass
class _Phase:
    name: str
    total: int | None
    done_before: int
    done: int
    began: float
    note: str = ""


class _Times(ProgressColumn):
    """Times in the bar as in the lines: rich's own estimate starts anew with every pause."""

    max_refresh = 0.5

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        return Text(" ".join(self._progress.times()))


def _readable(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# Drops the alarm's lines, and passes on all others, those of other threads in its middle included.
_DROP_ALARM = b"""
import sys
rules_to_come = 0
for line in sys.stdin.buffer:
    if b"slow_operation_alarm.cc" in line:
        rules_to_come = 2
    elif rules_to_come and line.strip(b"*\\n") == b"":
        rules_to_come -= b"*" in line
    elif not (rules_to_come and b"Very slow compile?" in line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


class _AlarmFilter:
    """Keep XLA's alarm about slow compilation off stderr: no option of XLA turns it off alone.

    The filter is a process of its own, so that the last words of a process that crashes still arrive.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _DROP_ALARM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        sys.stderr.flush()
        self._stderr = os.dup(2)
        os.dup2(self._process.stdin.fileno(), 2)
        self._process.stdin.close()

    def close(self) -> None:
        """Write to stderr directly again."""
        sys.stderr.flush()
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        # A process started meanwhile may keep the filter busy for longer.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

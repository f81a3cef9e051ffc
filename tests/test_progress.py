"""Progress: a log is never silent, a terminal gets a bar, and XLA's alarm stays out of sight."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from jaxroute.progress import Progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Log(io.StringIO):
    """A file that tells when so many lines are in it."""

    def __init__(self, lines):
        super().__init__()
        self.lines, self.full = lines, threading.Event()

    def write(self, text):
        written = super().write(text)
        if self.getvalue().count("\n") >= self.lines:
            self.full.set()
        return written


def test_a_log_gets_lines_while_nothing_moves():
    log = Log(lines=4)
    with Progress(Console(file=log, width=80), interval=0.001, clock=Clock()) as progress:
        progress.begin("compiling labels (2 of 4 programs)")
        assert log.full.wait(timeout=60)
    assert set(log.getvalue().splitlines()) == {"compiling labels (2 of 4 programs): 0:00:00"}


def test_lines_say_what_how_much_how_long_and_how_it_goes():
    log, clock = io.StringIO(), Clock()
    with Progress(Console(file=log, width=40), clock=clock) as progress:
        progress.begin("training", total=10, done=2)
        clock.now = 60.0
        assert progress.line() == "training: 20 %, 0:01:00"
        progress.advance(2, note="12,300 steps/s, average QoS 0.612")
        assert progress.line() == "training: 40 %, 0:01:00, 0:03:00 left, 12,300 steps/s, average QoS 0.612"
        progress.begin("judging")
    assert log.getvalue().splitlines() == [
        "training: 20 %, 0:00:00",
        "training: 40 %, 0:01:00, 0:03:00 left, 12,300 steps/s, average QoS 0.612",
        "judging: 0:00:00",
    ]


@pytest.mark.parametrize("total", [0, 3])
def test_a_phase_that_is_over(total):
    progress = Progress(Console(file=io.StringIO()), clock=Clock())
    progress.begin("labels", total=total, done=total)
    assert progress.line() == f"labels: {100 if total else 0} %, 0:00:00"


def test_a_terminal_gets_a_bar_of_the_phase():
    screen, clock = io.StringIO(), Clock()
    with Progress(Console(file=screen, width=120, force_terminal=True), clock=clock) as progress:
        progress.begin("compiling labels")
        progress.begin("labels", total=4)
        clock.now = 10.0
        progress.advance(note="90 states/s")
    last = next(line for line in reversed(screen.getvalue().splitlines()) if "states/s" in line)
    assert "labels" in last
    assert "0:00:10 0:00:30 left" in last
    assert "90 states/s" in last
    assert "compiling" not in last


ALARM = """E1128 08:03:29.186992   15241 slow_operation_alarm.cc:73]
********************************
[Compiling module jit_f for CPU] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=...
{within}********************************
"""
ENDED = "E1128 08:03:39.974604   15238 slow_operation_alarm.cc:140] The operation took 2m10.79s\n\n" + "".join(
    ALARM.splitlines(keepends=True)[1:]
)


@pytest.mark.parametrize("end", ["", "import os; os.abort()"], ids=["in the end", "before a crash"])
def test_xla_s_alarm_is_dropped_and_nothing_else(end):
    said = f"before\n{ALARM.format(within='of another thread' + chr(10))}between\n\n{ENDED.format(within='')}*** last\n"
    program = (
        "import os, sys\nfrom jaxroute.progress import _AlarmFilter\nfilter = _AlarmFilter()\n"
        f"os.write(2, {said.encode()!r})\n{end}\nfilter.close()\nprint('after', file=sys.stderr)\n"
    )
    # Read to its end, which comes when the filter has written everything.
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "before\nof another thread\nbetween\n\n*** last\n" + ("" if end else "after\n")
    assert (done.returncode == 0) == (not end)

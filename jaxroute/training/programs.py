"""Programs that are traced and compiled in the background, in the order in which training needs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from jax.stages import Compiled, Lowered

from jaxroute.progress import Progress


class Program(NamedTuple):
    """A program that is being compiled."""

    name: str
    number: int
    compiled: Future[Compiled]


class Programs:
    """Compile programs one after the other, while the next one is traced and the host runs those that are ready.

    One at a time, because XLA spreads each compilation over all cores: this way the first is ready soonest.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._number = progress, total, 0
        self._tracer, self._compiler = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def announce(self, name: str) -> None:
        """Show that the next program is being compiled; the caller does it."""
        self._number += 1
        self._show(name, self._number)

    def start(self, name: str, lower: Callable[[], Lowered]) -> Program:
        """Queue a program; `lower` traces it."""
        self._number += 1
        traced = self._tracer.submit(lower)
        return Program(name, self._number, self._compiler.submit(lambda: traced.result().compile()))

    def wait(self, program: Program) -> Compiled:
        """Return the program once it is compiled."""
        if not program.compiled.done():
            self._show(program.name, program.number)
        return program.compiled.result()

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracer.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _show(self, name: str, number: int) -> None:
        self._progress.begin(f"compiling {name} ({number} of {self._total} programs)")

"""Programs that are compiled in the background, in the order in which training needs them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from jax.stages import Compiled, Wrapped

from jaxroute.progress import Progress


class Program(NamedTuple):
    """A program that is being compiled."""

    name: str
    number: int
    compiled: Future[Compiled]


class Programs:
    """Compile programs one after the other, while the host traces the next one or runs those that are ready.

    One at a time, because XLA spreads each compilation over all cores: so the first one is ready soonest.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._number = progress, total, 0
        self._pool = ThreadPoolExecutor(1)

    def announce(self, name: str) -> None:
        """Show that the next program is being compiled, by somebody else."""
        self._number += 1
        self._show(name, self._number)

    def start(self, name: str, function: Wrapped, *arguments: Any) -> Program:
        """Trace a function for these arguments, and queue it for compilation."""
        if self._number == 0:
            self._progress.begin("tracing programs", self._total)
        self._number += 1
        lowered = function.lower(*arguments)
        self._progress.advance()
        return Program(name, self._number, self._pool.submit(lowered.compile))

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
        self._pool.shutdown(cancel_futures=True)

    def _show(self, name: str, number: int) -> None:
        self._progress.begin(f"compiling {name} ({number} of {self._total} programs)")

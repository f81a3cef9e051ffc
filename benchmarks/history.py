"""How the benchmarks' main figures changed from run to run, so that a slowdown shows.

`python -m benchmarks.history` compares each figure's latest run with the median of the earlier ones on the same kind of
machine, and draws outputs/benchmarks/history.png. Runs are read from benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.publish import HISTORY, OUTPUTS

# A change that is noise on a shared machine.
_NOISE = 0.1
# What has to agree for two runs to be compared.
_SAME_MACHINE = ("cpu", "cores", "backend", "device", "devices")


class Series(NamedTuple):
    """One figure of one benchmark, over the runs on one machine."""

    benchmark: str
    figure: str
    machine: str
    values: list[float]

    @property
    def gain(self) -> float:
        """How many times better the latest run is than the median of the earlier ones; 1 if it is the first."""
        if len(self.values) < 2:
            return 1.0
        ratio = self.values[-1] / statistics.median(self.values[:-1])
        return ratio if self.figure.endswith("/s") else 1 / ratio


def read_history(folder: Path) -> list[Series]:
    """Return every figure that the runs in `folder` have noted."""
    series: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry: dict[str, Any] = json.loads(line)
            machine = ", ".join(str(entry["machine"][name]) for name in _SAME_MACHINE)
            for figure, value in entry["main"].items():
                series.setdefault((path.stem, figure, machine), []).append(value)
    return [Series(*name, values) for name, values in series.items()]


def draw(history: list[Series], path: Path) -> None:
    """Draw each benchmark's figures relative to their first run, better upwards."""
    benchmarks = sorted({series.benchmark for series in history})
    columns = min(len(benchmarks), 3)
    rows = math.ceil(len(benchmarks) / columns)
    figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, benchmark in zip(axes.flat, benchmarks, strict=False):
        for series in (series for series in history if series.benchmark == benchmark):
            speed = [value if series.figure.endswith("/s") else 1 / value for value in series.values]
            label = f"{series.figure} ({series.machine})"
            axis.plot(range(1, len(speed) + 1), [value / speed[0] for value in speed], marker="o", label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=benchmark, xlabel="run", ylabel="times as good as the first")
        axis.legend(fontsize=5)
    for axis in axes.flat[len(benchmarks) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read, print and draw."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console()
    history = read_history(HISTORY)
    if not history:
        raise SystemExit(f"{HISTORY} holds no runs yet; run a benchmark without --quick first")
    table = Table("benchmark", "figure", "machine", "runs", "latest", "times as good as before")
    for series in history:
        colour = "red" if series.gain < 1 - _NOISE else "green" if series.gain > 1 + _NOISE else "default"
        gain = f"[{colour}]{series.gain:.2f}[/]"
        table.add_row(series.benchmark, series.figure, series.machine, str(len(series.values)),
                      f"{series.values[-1]:,.4g}", gain)  # fmt: skip
    console.print(table)
    draw(history, OUTPUTS / "history.png")
    console.print(f"Written: {OUTPUTS / 'history.png'}")


if __name__ == "__main__":
    main()

"""How every benchmark shows its figures: a table, a JSON file, and a line of its history."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxroute
from jaxroute.devices import usable_cores

OUTPUTS = Path("outputs/benchmarks")
HISTORY = Path(__file__).parent / "results"
"""One file per benchmark, one line per full run; `python -m benchmarks.history` draws them."""


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def publish(name: str, table: Table, figures: dict[str, Any], main: dict[str, float], *, remember: bool) -> None:
    """Print the table and the machine, write all figures, and append the main ones to the history if asked to.

    Args:
        name: of the benchmark.
        table: what people read.
        figures: everything measured, for outputs/benchmarks/<name>.json.
        main: the figures to follow from version to version, by a name that ends with the unit: of "<what>, <unit>/s"
            more is better, of any other unit less is.
        remember: whether to append them; not where sizes are others than by default.
    """
    entry = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": jaxroute.__version__,
        "commit": _commit(),
        "machine": machine(),
        "main": main,
    }
    # A wide console where nobody watches, so that tables are whole.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(entry["machine"])
    path = OUTPUTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry | figures, indent=2))
    console.print(f"Written: {path}")
    if remember:
        HISTORY.mkdir(exist_ok=True)
        with (HISTORY / f"{name}.jsonl").open("a") as lines:
            lines.write(json.dumps(entry) + "\n")


def _commit() -> str | None:
    """Return the checkout's commit, marked if there are changes; None where there is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

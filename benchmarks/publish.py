"""How every benchmark shows its figures: a table, the machine, a JSON file."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


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
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def publish(name: str, table: Table, figures: dict[str, Any]) -> None:
    """Print the table and the machine, and write both with the figures to outputs/benchmarks/<name>.json."""
    console = Console()
    console.print(table)
    console.print(machine())
    path = Path("outputs/benchmarks") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | figures, indent=2))
    console.print(f"Written: {path}")

"""How long train.py takes until there is something to see: with an empty compilation cache, and with a warm one.

`python -m benchmarks.startup [--runs N] [--tree FOLDER] [--quick]` runs `train.py` with few steps and states in a
process of its own, prints medians and writes outputs/benchmarks/startup.json. Times are from the start of the process:
the first line, the first labels, the first regression, the first update. Tracing and compilation are sums over all
programs as JAX logs them; they overlap with each other and with the labels. `--tree` measures another checkout, such as
an older version, with this one's Python.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track
from rich.table import Table

from benchmarks.publish import publish

ROOT = Path(__file__).resolve().parents[1]
_SMALL = ("ppo.total_steps=8192", "warm_start.num_states=256", "train.evaluate=false")
_QUICK = (
    "site=edge3", "network=mlp", "ppo.num_envs=8", "ppo.num_steps=4", "ppo.num_minibatches=4", "ppo.total_steps=32",
    "warm_start.num_states=8", "warm_start.horizon=2", "warm_start.num_epochs=1", "train.evaluate=false",
)  # fmt: skip
# What a line of the output shows to be there. Older versions say nothing of labels before the first regression.
_MILESTONES = {
    "first line": r"Training on",
    "first labels": r"labels, round 1 of \d+: 100 %",
    "first regression": r"Warm start: ",
    "first update": r"training: |^training .*100%|━ .*steps/s",
}
_LOGGED = {
    "tracing": r"Finished (?:tracing|jaxpr to MLIR module conversion).* in ([\d.]+) sec",
    "compilation": r"Finished XLA compilation of .* in ([\d.]+) sec",
}
COLUMNS = ("imports", *_MILESTONES, "end", *_LOGGED, "CPU time")


def start_training(tree: Path, options: Sequence[str], cache: Path) -> dict[str, float]:
    """Run train.py with this compilation cache; returns the seconds of each milestone, and how they were spent."""
    env = os.environ | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache), "JAX_LOG_COMPILES": "1"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], cwd=tree, env=env, check=True)
    seconds = {"imports": time.perf_counter() - started}
    imported = resource.getrusage(resource.RUSAGE_CHILDREN)

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "train.py", *options, f"output_dir={folder}/run"],
            cwd=tree,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        log: list[str] = []
        reader = threading.Thread(target=lambda stream: log.extend(stream), args=(process.stderr,))
        reader.start()
        for line in process.stdout:
            for name, pattern in _MILESTONES.items():
                if name not in seconds and re.search(pattern, line):
                    seconds[name] = time.perf_counter() - started
        if process.wait():
            raise RuntimeError("".join(log)[-2000:])
        seconds["end"] = time.perf_counter() - started
        reader.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name, pattern in _LOGGED.items():
        seconds[name] = sum(float(found) for found in re.findall(pattern, "".join(log)))
    seconds["CPU time"] = (used.ru_utime + used.ru_stime) - (imported.ru_utime + imported.ru_stime)
    seconds["imports, CPU time"] = (imported.ru_utime + imported.ru_stime) - (before.ru_utime + before.ru_stime)
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small site and network")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure; this one by default")
    options = parser.parse_args()
    overrides = _QUICK if options.quick else _SMALL
    measured: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in track(range(options.runs), "measuring"):
        with tempfile.TemporaryDirectory() as cache:
            for rows in measured.values():
                rows.append(start_training(options.tree.resolve(), overrides, Path(cache)))
    medians = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in measured.items()
    }
    table = Table("cache", *COLUMNS, title=f"Seconds from the start of train.py {' '.join(overrides)}")
    for kind, row in medians.items():
        table.add_row(kind, *(f"{row[name]:.1f}" if name in row else "-" for name in COLUMNS))
    table.caption = "tracing and compilation are sums over programs, which overlap"
    main_figures = {
        f"{name}, {kind} cache, s": row[name]
        for kind, row in medians.items()
        for name in ("first labels", "first update", "end")
        if name in row
    }
    remember = not options.quick and options.tree == ROOT
    publish("startup", table, {"runs": options.runs, "tree": str(options.tree), "seconds": measured}, main_figures,
            remember=remember)  # fmt: skip


if __name__ == "__main__":
    main()

"""Everything worth knowing of a new machine, in one call: the other benchmarks, and a whole training.

`python -m benchmarks.accelerator [--quick]` runs `engine`, `training`, `network`, `decision` and `scaling`, each in a
process of its own, then trains as `python train.py` does. It prints their main figures together, and writes all
figures, shares of time included, to outputs/benchmarks/accelerator.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from benchmarks.publish import OUTPUTS, publish

_BENCHMARKS = ("engine", "training", "network", "decision", "scaling")
_TRAIN = Path(__file__).parents[1] / "train.py"
_SMALL = ("site=edge3", "network=mlp", "ppo.num_envs=8", "ppo.num_steps=8", "ppo.total_steps=128")


def main() -> None:
    """Run all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    # This process leaves the accelerator alone until the others are done.
    for name in _BENCHMARKS:
        quick = ["--quick"] if options.quick else []
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *quick], check=True)
    started = time.perf_counter()
    small = _SMALL if options.quick else ()
    subprocess.run([sys.executable, str(_TRAIN), "train.evaluate=false", *small], check=True)
    minutes = (time.perf_counter() - started) / 60

    results = {name: json.loads((OUTPUTS / f"{name}.json").read_text()) for name in _BENCHMARKS}
    whole = {"whole training, minutes": minutes}
    table = Table("benchmark", "figure", "value", title="main figures")
    for name, main_figures in [(name, result["main"]) for name, result in results.items()] + [("train.py", whole)]:
        for figure, value in main_figures.items():
            table.add_row(name, figure, f"{value:,.4g}")
    publish("accelerator", table, {"benchmarks": results}, whole, remember=not options.quick)


if __name__ == "__main__":
    main()

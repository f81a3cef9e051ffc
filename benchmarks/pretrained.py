"""Make a router of the package: train it, judge it, and write it to jaxroute/pretrained/.

`python -m benchmarks.pretrained edge6` runs the whole recipe, which takes some 20 minutes on two cores. A training that
is finished under outputs/pretrained/edge6 is not repeated. Further options go to training and judging alike, for
instance `ppo.total_steps=8192 eval.episodes=2`.

`python -m benchmarks.pretrained` without a name prints the table of the routers that the package holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import jaxroute
from benchmarks.publish import machine
from jaxroute.commands.train import main as train_main
from jaxroute.config import Config, load_config, read_config
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.evaluation import EvaluationResult, evaluate
from jaxroute.evaluation.report.tables import fixed, markdown
from jaxroute.evaluation.report.write import jsonable
from jaxroute.policies import LEARNED
from jaxroute.runs import (
    CONFIG_FILE,
    PRETRAINED,
    RESULTS_FILE,
    latest_checkpoint,
    pretrained_routers,
    read_policy,
    write_pretrained,
)
from jaxroute.training.loop import with_default_sizes

FOLDER = Path(jaxroute.__file__).parent / PRETRAINED

RECIPES = {
    "edge6": ("site edge6 and random sites in equal shares", ()),
    "random": ("random sites", ("train.random_sites=1.0",)),
}
"""What each router is trained on, and the options of train.py that say so."""

_RIVALS = ["weighted_sum", "slo_headroom", "qos_greedy", "impact_greedy"]
_FORMS = ["decline", "price", "rate_price"]
_COMMON = (
    "workload=poisson",
    "eval.episodes=64",
    "eval.loads=[1]",
    f"policies=[{','.join([*_RIVALS, *(f'impact_greedy+{form}' for form in _FORMS)])}]",
)
JUDGED = {
    "edge6": _COMMON,
    "edge6 at 21.5 requests/s": (*_COMMON, "workload.rate=21.5"),
    "random sites": (*_COMMON, "dynamics.random_sites=1"),
}
"""Where each router is judged, and the options of eval.py that say so: against the strongest rules, with the right to
decline and without."""

# Options that leave the trained parameters as they are.
_HARMLESS = ("train.evaluate", "output_dir", "data_dir", "eval", "wandb", "checkpoint", "policies")


def make(name: str, run: Path, options: Sequence[str], folder: Path, console: Console) -> Path:
    """Train by the recipe `name` into `run`, unless that is done; judge; write the router to `folder`.

    Raises:
        UserError: `run` was trained with other options, or as for training and evaluation.
    """
    trained_on, recipe = RECIPES[name]
    chosen = [*recipe, *options]
    command = [*chosen, "train.evaluate=false", f"output_dir={run}"]
    if not run.exists() and train_main(command):
        raise UserError(f"the training in {run} has failed")
    config = read_config(run / CONFIG_FILE)
    wanted = with_default_sizes(load_config(command))
    if differing := [key for key, value in _flat(wanted).items() if _flat(config)[key] != value]:
        raise UserError(f"{run} was trained with another {differing[0]} than `python train.py {shlex.join(command)}`")
    results = {
        "router": name,
        "trained_on": trained_on,
        "command": f"python train.py {shlex.join(command)}",
        "seed": config.seed,
        "steps": int(latest_checkpoint(run).name),
        "seconds_to_train": _seconds(run),
        "jaxroute": jaxroute.__version__,
        "machine": machine(),
        "judged": {setting: _judge(setting, run, options, console) for setting in JUDGED},
    }
    shutil.rmtree(folder, ignore_errors=True)
    write_pretrained(folder, read_policy(run), config, json.dumps(jsonable(results), indent=2) + "\n")
    return folder


def _flat(config: Config) -> dict[str, Any]:
    """Return every option by its name, except those that leave the trained parameters as they are."""

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    return {
        name: value for name, value in flat(dataclasses.asdict(config), "").items() if not name.startswith(_HARMLESS)
    }


def _seconds(run: Path) -> int:
    """Seconds from the run's configuration, which is written first, to its last checkpoint; compilation included."""
    return round(latest_checkpoint(run).stat().st_mtime - (run / CONFIG_FILE).stat().st_mtime)


def _judge(setting: str, run: Path, options: Sequence[str], console: Console) -> dict[str, Any]:
    chosen = [*JUDGED[setting], *(option for option in options if option.startswith(("eval.", "site=", "workload.")))]
    result = evaluate(dataclasses.replace(load_config(chosen), checkpoint=str(run)), console, command="")
    return figures(result) | {"options": chosen}


def figures(result: EvaluationResult) -> dict[str, Any]:
    """Return what the table says of a router in one setting."""
    rate = result.nominal_rate
    rule = result.best_rival(rate)
    assert rule is not None
    of_both = {
        metric: {"router": result.interval(rate, LEARNED, metric), "rule": result.interval(rate, rule, metric)}
        for metric in ("avg_qos", "qos_per_busy_second")
    }
    return {"rate": rate, "best_rule": rule, "difference": result.paired(rate, LEARNED, rule), **of_both}


def table() -> str:
    """Return the table of the package's routers in Markdown, from their results.json."""
    header = ["router", "trained on"]
    for setting in JUDGED:
        header += [f"average QoS, {setting}", "best rule", "QoS per accelerator-second", "its"]
    rows = []
    for name in pretrained_routers():
        content = json.loads((FOLDER / name / RESULTS_FILE).read_text())
        row = [f"`{PRETRAINED}/{name}`", content["trained_on"]]
        for setting in JUDGED:
            judged = content["judged"][setting]
            qos, efficiency = judged["avg_qos"], judged["qos_per_busy_second"]
            row += [
                fixed(qos["router"]["mean"], 3),
                f"`{judged['best_rule']}` {fixed(qos['rule']['mean'], 3)}",
                fixed(efficiency["router"]["mean"], 3),
                fixed(efficiency["rule"]["mean"], 3),
            ]
        rows.append([*row, f"{content['seconds_to_train']:,}"])
    return markdown([*header, "seconds to train"], rows)


def main() -> None:
    """Make a router, or print the table of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=RECIPES)
    parser.add_argument("options", nargs="*", metavar="option=value", help="of train.py and eval.py")
    parser.add_argument("--run", type=Path, help="a finished run of the recipe; outputs/pretrained/NAME by default")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="instead of jaxroute/pretrained")
    arguments = parser.parse_intermixed_args()
    if arguments.name is None:
        print(table(), end="")
        return
    use_compilation_cache()
    console = Console(width=None if sys.stdout.isatty() else 120)
    name = arguments.name
    run = arguments.run or Path("outputs") / PRETRAINED / name
    try:
        folder = make(name, run, arguments.options, arguments.out / name, console)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    console.print(
        f"Written: {folder}", *(f"{path.stat().st_size:9,} {path.name}" for path in folder.iterdir()), sep="\n"
    )


if __name__ == "__main__":
    main()

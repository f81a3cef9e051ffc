"""What train and eval share: a configuration from the command line, several runs, where a run goes, help."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Glob, QuotedString
from hydra.errors import HydraException
from rich.console import Console
from rich.text import Text

from jaxroute.commands.console import run_with_console, say
from jaxroute.config import Config, config_yaml, load_config, read_config
from jaxroute.config.options import groups, options
from jaxroute.config.words import PATHS, is_text, literal, parsed, path_word, program
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.files import check_writable
from jaxroute.runs import CONFIG_FILE, run_of

if TYPE_CHECKING:
    from jaxroute.evaluation import EvaluationResult


def run_configured(
    command: str, purpose: str, main: Callable[[Config, Console, Sequence[str]], None], argv: Sequence[str] | None
) -> int:
    """Run `main` with the configuration of the command line, or of each combination; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asked := [flag for flag in words if flag in ("-h", "--help", "--help=all")]:
        print(_help(command, purpose, everything="--help=all" in asked))
        return 0

    def run(console: Console) -> None:
        if "--cfg" in words:
            print(config_yaml(_config([flag for flag in words if flag != "--cfg"])), end="")
            return
        # All of them are checked before the first begins.
        runs = [(_config(chosen), chosen) for chosen in _runs(words)]
        use_compilation_cache()
        for config, chosen in runs:
            if len(runs) > 1:
                console.rule(Text(shlex.join(chosen)))
            main(config, console, chosen)

    return run_with_console(run)


def _runs(words: Sequence[str]) -> list[list[str]]:
    """Return the options of each run: one, or with Hydra's --multirun one for each combination of listed values.

    Of several, each gets a folder of its own, named after what it differs in.

    Raises:
        UserError: a value that is empty, or lists that cannot be read.
    """
    given = [word for word in words if word not in ("-m", "--multirun")]
    if len(given) == len(words):
        return [given]
    fixed, choices = [], []
    folder = Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-multirun"
    for word in given:
        if word.startswith("output_dir="):
            folder = Path(literal(word))
        elif listed := _listed(word):
            choices.append(listed)
        else:
            fixed.append(word)
    runs = []
    for chosen in itertools.product(*choices):
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(chosen))
        runs.append([*fixed, *chosen, path_word("output_dir", folder / name)])
    return runs


def _listed(word: str) -> list[str]:
    """Return a word for each value that a word of --multirun lists; none if it has one value.

    A path may have commas in it, so that several are listed by choice(...).
    """
    key, _, value = word.partition("=")
    if key in PATHS and not value.startswith("choice("):
        return []
    try:
        option = parsed(word)
    except HydraException:
        return []  # text that is no list, or a mistake that is reported where it is read
    if not option.is_sweep_override():
        return []
    if isinstance(option.value(), Glob):
        raise UserError(f"{word}: list the values, with commas")
    if not is_text(word):
        return [f"{key}={value}" for value in option.sweep_string_iterator()]
    values = option.sweep_iterator(transformer=lambda value: value)
    return [f"{key}={value.text if isinstance(value, QuotedString) else value}" for value in values]


# What does not change a training, and may differ when it is resumed.
_HARMLESS = (
    "resume=",
    "train.evaluate=",
    "train.save_interval=",
    "train.keep=",
    "wandb.",
    "eval.",
    "policies=",
    "data_dir=",
)


def _config(argv: Sequence[str]) -> Config:
    """Return the configuration of a command line, which starts from that of the run that it resumes or forks."""
    given = {key: literal(word) for word in argv for key in ("resume", "fork") if word.startswith(f"{key}=")}
    given = {key: value for key, value in given.items() if value != "null"}
    if not given:
        return load_config(argv)
    if len(given) > 1:
        raise UserError("resume goes on with a run as it is, fork starts another one from it; choose one of them")
    if "fork" in given:
        of_run = read_config(run_of(Path(given["fork"]), "fork") / CONFIG_FILE)
        return load_config(argv, replace(of_run, output_dir=None))
    resumed = Path(given["resume"])
    if changed := [option for option in argv if not option.startswith(_HARMLESS)]:
        raise UserError(
            f"{changed[0]}: a resumed run keeps its options, but for {', '.join(_HARMLESS[1:])}; "
            f"to change others, start a new run with {shlex.quote(path_word('fork', resumed))}"
        )
    run = run_of(resumed, "resume")
    if run != resumed:
        raise UserError(f"resume={resumed} is a part of a run; {shlex.quote(path_word('resume', run))} goes on with it")
    return load_config(argv, read_config(run / CONFIG_FILE))


def new_run(config: Config, name: str) -> Path:
    """Return where a new run goes: output_dir, or a folder named after the time and `name`."""
    return run_folder(config, Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def run_folder(config: Config, default: Path) -> Path:
    """Return where a run goes.

    Raises:
        UserError: nothing can be written there. A run takes long, so this is found out before it begins.
    """
    run = default if config.output_dir is None else Path(config.output_dir)
    check_writable(run, "output_dir")
    return run


def show_result(result: EvaluationResult, run: Path, console: Console) -> None:
    """Write everything of an evaluation into the run directory, and print what people read first."""
    # Imported here: figures and pages are needed last, and take a second to load.
    from jaxroute.evaluation import results_table, summary_text, write_all

    written = write_all(result, run)
    console.print(results_table(result))
    console.print(summary_text(result))
    say(console, f"Report: {written['report.html']}")
    say(console, f"Figures and tables: {run}")


# What people set most.
_COMMON = {
    "train": (
        "workload.rate",
        "ppo.num_envs",
        "ppo.total_steps",
        "warm_start.num_states",
        "train.loads",
        "train.arrivals",
        "train.random_sites",
        "train.num_seeds",
        "seed",
        "output_dir",
        "resume",
        "fork",
        "wandb.mode",
    ),
    "eval": (
        "checkpoint",
        "policies",
        "workload.rate",
        "eval.episodes",
        "eval.loads",
        "eval.requests",
        "view",
        "output_dir",
    ),
}


# What people ask about a command before they look at its options.
_ABOUT = {
    "train": "Training varies what a router will meet later, so that one router copes with all of it: train.loads is "
    "the range of loads, as multiples of the workload's own rate (workload.rate), train.arrivals the arrival process, "
    "and train.random_sites the share of environments with other sites. Judging takes workload and site as they are.",
    "eval": "Every policy meets the same requests, at eval.loads times the workload's rate.",
}


def _help(command: str, purpose: str, everything: bool) -> str:
    lines = [
        purpose,
        "",
        f"usage: {program(command)} [option=value ...] [--cfg] [--multirun] [--help | --help=all]",
        "",
        *textwrap.wrap(_ABOUT[command], 110),
        "",
        "Choices:",
    ]
    lines += [f"  {group}={', '.join(choices)}" for group, choices in groups().items()]
    shown = [option for option in options() if everything or option.name in _COMMON[command]]
    if not everything:
        shown.sort(key=lambda option: _COMMON[command].index(option.name))
    lines += ["", "Options:" if everything else "Options used most:"]
    for option in shown:
        default = f" (default {option.default.strip('`')})" if option.default else ""
        lines.append(f"  {option.name}{default}")
        lines += textwrap.wrap(option.meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += [
        "",
        "Text and paths are taken as they stand; ~ at the start of a path is the home folder. A list is written a,b or",
        "[a,b]; items with commas or brackets in them need quotes: [a,'b,c'].",
        "--multirun (-m) runs every combination of listed values: -m seed=0,1,2 ppo.discount=0.98,0.99",
    ]
    if not everything:
        lines += [
            "--help=all and docs/reference/options.md list every option; --cfg prints the configuration that results."
        ]
    return "\n".join(lines)

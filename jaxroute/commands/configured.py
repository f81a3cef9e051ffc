"""What train and eval share: options of the configuration, several runs, help, mistakes in one line."""

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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console

from jaxroute.config import Config, config_yaml, load_config, read_config
from jaxroute.config.options import groups, options
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError
from jaxroute.evaluation import EvaluationResult, results_table, summary_text, write_all
from jaxroute.runs import CONFIG_FILE, run_of


def run_configured(
    program: str, purpose: str, main: Callable[[Config, Console, Sequence[str]], None], argv: Sequence[str] | None
) -> int:
    """Run `main` with the configuration of the command line, or of each combination; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if asked := [flag for flag in argv if flag in ("-h", "--help", "--help=all")]:
        print(_help(program, purpose, everything="--help=all" in asked))
        return 0
    # A plain, wide console where nobody watches, so that logs hold whole lines.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if "--cfg" in argv:
            print(config_yaml(_config([flag for flag in argv if flag != "--cfg"])), end="")
            return 0
        # All of them are checked before the first begins.
        runs = [(_config(options), options) for options in _runs(argv)]
        use_compilation_cache()
        for config, options in runs:
            if len(runs) > 1:
                console.rule(shlex.join(options))
            main(config, console, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _runs(argv: Sequence[str]) -> list[list[str]]:
    """Return the options of each run: one, or with Hydra's --multirun one for each combination of listed values.

    Of several, each gets a folder of its own, named after what it differs in.

    Raises:
        UserError: an option that Hydra cannot parse.
    """
    given = [option for option in argv if option not in ("-m", "--multirun")]
    if len(given) == len(argv):
        return [given]
    try:
        parsed = OverridesParser.create().parse_overrides(given)
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    listed = [option for option in parsed if option.is_sweep_override()]
    fixed = [str(option.input_line) for option in parsed if option not in listed]
    base = next((option.value() for option in parsed if option.key_or_group == "output_dir"), None)
    folder = Path(str(base)) if base else Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-multirun"
    choices = [[f"{option.get_key_element()}={value}" for value in option.sweep_string_iterator()] for option in listed]
    fixed = [option for option in fixed if not option.startswith("output_dir=")]
    runs = []
    for chosen in itertools.product(*choices):
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(chosen))
        runs.append([*fixed, *chosen, f"output_dir='{folder / name}'"])
    return runs


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
    config = load_config(argv)
    if config.resume is None and config.fork is None:
        return config
    if config.resume is not None and config.fork is not None:
        raise UserError("resume goes on with a run as it is, fork starts another one from it; choose one of them")
    if config.fork is not None:
        of_run = read_config(run_of(Path(config.fork), "fork") / CONFIG_FILE)
        return load_config(argv, replace(of_run, output_dir=None))
    assert config.resume is not None
    if changed := [option for option in argv if not option.startswith(_HARMLESS)]:
        raise UserError(
            f"{changed[0]}: a resumed run keeps its options, but for {', '.join(_HARMLESS[1:])}; "
            f"to change others, start a new run with fork={config.resume}"
        )
    run = run_of(Path(config.resume), "resume")
    if run != Path(config.resume):
        raise UserError(f"resume={config.resume} is a part of a run; resume={run} goes on with it")
    return load_config(argv, read_config(run / CONFIG_FILE))


def new_run(config: Config, name: str) -> Path:
    """Return where a new run goes: output_dir, or a folder named after the time and `name`."""
    return run_folder(config, Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def run_folder(config: Config, default: Path) -> Path:
    """Return where a run goes.

    Raises:
        UserError: output_dir is a file.
    """
    if config.output_dir is None:
        return default
    run = Path(config.output_dir)
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir={run} is a file; name a folder")
    return run


def command_of(program: str, argv: Sequence[str]) -> str:
    """Return the command as it was typed."""
    return shlex.join(["python", program, *argv])


def show_result(result: EvaluationResult, run: Path, console: Console) -> None:
    """Write everything of an evaluation into the run directory, and print what people read first."""
    written = write_all(result, run)
    console.print(results_table(result))
    console.print(summary_text(result))
    console.print(f"Report: {written['report.html']}")
    console.print(f"Figures and tables: {run}")


# What people set most.
_COMMON = {
    "train.py": (
        "workload.rate",
        "ppo.num_envs",
        "ppo.total_steps",
        "warm_start.num_states",
        "train.loads",
        "train.num_seeds",
        "seed",
        "output_dir",
        "resume",
        "fork",
        "wandb.mode",
    ),
    "eval.py": (
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


def _help(program: str, purpose: str, everything: bool) -> str:
    lines = [
        purpose,
        "",
        f"usage: python {program} [option=value ...] [--cfg] [--multirun] [--help | --help=all]",
        "",
        "Choices:",
    ]
    lines += [f"  {group}={', '.join(choices)}" for group, choices in groups().items()]
    shown = [option for option in options() if everything or option.name in _COMMON[program]]
    if not everything:
        shown.sort(key=lambda option: _COMMON[program].index(option.name))
    lines += ["", "Options:" if everything else "Options used most:"]
    for option in shown:
        default = f" (default {option.default.strip('`')})" if option.default else ""
        lines.append(f"  {option.name}{default}")
        lines += textwrap.wrap(option.meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not everything:
        lines += [
            "",
            "--help=all and docs/reference/options.md list every option; --cfg prints the configuration that results.",
            "--multirun (-m) runs every combination of listed values: -m seed=0,1,2 ppo.discount=0.98,0.99",
        ]
    return "\n".join(lines)

"""What train.py and eval.py do: read the command line, run, and report mistakes in one line."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console

from jaxroute.config import Config, config_yaml, load_config, read_config
from jaxroute.errors import UserError
from jaxroute.evaluation import EvaluationResult, evaluate, results_table, summary_text, write_all
from jaxroute.evaluation.study.run import run_study, study_text, terminal_table, verdict_table, write_study
from jaxroute.evaluation.viewer.record import view_episode
from jaxroute.options import groups, options
from jaxroute.policies import LEARNED, rules_named
from jaxroute.runs import CONFIG_FILE, run_of, seed_runs
from jaxroute.scenarios import build_env, on_test_prompts
from jaxroute.training import is_first_process, join_processes, split_cpu, train


def train_main(argv: Sequence[str] | None = None) -> int:
    """Train a router, then judge it against the rules; returns the exit code."""
    return _run("train.py", "Train a router, then judge it against the rules in production use.", _train, argv)


def eval_main(argv: Sequence[str] | None = None) -> int:
    """Judge a trained router, or the rules alone; returns the exit code."""
    return _run("eval.py", "Judge a trained router (checkpoint=outputs/<run>), or the rules alone.", _eval, argv)


def _train(config: Config, console: Console, argv: Sequence[str]) -> None:
    if config.train.distributed:
        join_processes()
        console.quiet = not is_first_process()
    else:
        split_cpu(config)
    command = _command("train.py", argv)
    if config.study is not None:
        raise UserError(f"study={config.study.name} is for eval.py; train.py trains one router")
    # Mistakes here should not wait for the training to end, which may meet other arrivals.
    rules_named(config.policies)
    if config.train.evaluate:
        build_env(on_test_prompts(config))
    resumed = Path(config.resume) if config.resume else None
    run = resumed or _new_run(config, f"train-{config.workload.name}-seed{config.seed}")

    def judge() -> dict[str, float]:
        console.print(f"Run directory: {run}")
        runs = [str(folder) for folder in seed_runs(run, config)]
        if len(runs) > 1:
            every = f"study.routers.jaxroute=[{','.join(runs)}]"
            console.print(f"Judge all seeds with: python eval.py study=main '{every}'", markup=False, soft_wrap=True)
        if not config.train.evaluate:
            console.print(f"Judge it with: python eval.py checkpoint={runs[0]}")
            return {}
        result = evaluate(replace(config, checkpoint=runs[0]), console, command=command)
        _show(result, run, console)
        return _main_figures(result)

    train(config, run, console, judge)


def _eval(config: Config, console: Console, argv: Sequence[str]) -> None:
    command = _command("eval.py", argv)
    if config.resume or config.fork:
        raise UserError("resume and fork are for train.py; eval.py takes checkpoint=<run>")
    if config.study is not None:
        if config.view is not None:
            raise UserError(
                f"view={config.view} shows one episode and study={config.study.name} judges many; choose one"
            )
        _study(config, config.study.name, console, argv, command)
        return
    if config.view is not None:
        _view(config, console, command)
        return
    run = _new_run(config, f"eval-{config.workload.name}-{config.bank.kind}")
    result = evaluate(config, console, command=command)
    run.mkdir(parents=True, exist_ok=True)
    # Not config.yaml: in a training run's directory, that is what its checkpoints belong to.
    (run / "eval_config.yaml").write_text(config_yaml(config))
    _show(result, run, console)


def _study(config: Config, name: str, console: Console, argv: Sequence[str], command: str) -> None:
    # No time in the name: the same command goes on where it was stopped.
    run = _folder(config, Path("outputs") / f"study-{name}")
    study = run_study(config, argv, run, console, command=command)
    (run / "study_config.yaml").write_text(config_yaml(config))
    written = write_study(study, run)
    if study.routers:
        console.print(terminal_table(verdict_table(study)))
    console.print(study_text(study))
    console.print(f"Report: {written['study.html']}")
    console.print(f"Tables: {written['study.md']}")


def _view(config: Config, console: Console, command: str) -> None:
    run = _new_run(config, f"view-{config.view}-{config.workload.name}")
    page = view_episode(config, console, run, command=command)
    console.print(f"Open in a browser: {page}")


def _main_figures(result: EvaluationResult) -> dict[str, float]:
    """Average QoS of the trained router, and by how much it is ahead of each rule, at the workload's rate."""
    rate = result.nominal_rate
    figures = {"eval/avg_qos": result.interval(rate, LEARNED, "avg_qos").mean}
    for rule, difference in result.paired_with_reference(rate).items():
        figures[f"eval/avg_qos_ahead_of_{rule}"] = difference.mean
    return figures


def _show(result: EvaluationResult, run: Path, console: Console) -> None:
    written = write_all(result, run)
    console.print(results_table(result))
    console.print(summary_text(result))
    console.print(f"Report: {written['report.html']}")
    console.print(f"Figures and tables: {run}")


def _new_run(config: Config, name: str) -> Path:
    return _folder(config, Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def _folder(config: Config, default: Path) -> Path:
    if config.output_dir is None:
        return default
    run = Path(config.output_dir)
    if run.exists() and not run.is_dir():
        raise UserError(f"output_dir={run} is a file; name a folder")
    return run


def _command(program: str, argv: Sequence[str]) -> str:
    return shlex.join(["python", program, *argv])


def _run(
    program: str, purpose: str, main: Callable[[Config, Console, Sequence[str]], None], argv: Sequence[str] | None
) -> int:
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


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start takes seconds."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    wanted = {
        "jax_compilation_cache_dir": str(home / "jaxroute" / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    for option, value in wanted.items():
        if option.upper() not in os.environ:  # JAX reads it from there; the user knows better
            jax.config.update(option, value)


# What people set most.
_COMMON = {
    "train.py": (
        "workload.rate",
        "ppo.num_envs",
        "ppo.total_steps",
        "warm_start.num_states",
        "train.rates",
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
        "eval.seeds",
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
            "--help=all and docs/options.md list every option; --cfg prints the configuration that results.",
            "--multirun (-m) runs every combination of listed values: -m seed=0,1,2 ppo.discount=0.98,0.99",
        ]
    return "\n".join(lines)

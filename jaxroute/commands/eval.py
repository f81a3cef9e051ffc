"""Judge routers and rules, run a study, or record an episode: `python eval.py` and `python -m jaxroute eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxroute.commands.configured import new_run, run_configured, run_folder, show_result
from jaxroute.commands.console import say
from jaxroute.config import Config, config_yaml
from jaxroute.config.words import command_line
from jaxroute.errors import UserError
from jaxroute.files import write_file


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a trained router, or the rules alone; returns the exit code."""
    return run_configured("eval", "Judge a trained router (checkpoint=outputs/<run>), or the rules alone.", _eval, argv)


def _eval(config: Config, console: Console, argv: Sequence[str]) -> None:
    # Imported here and below: help needs none of it, and each way of judging only its own.
    from jaxroute.evaluation import evaluate

    command = command_line("eval", *argv)
    if config.resume or config.fork:
        raise UserError("resume and fork are for train; eval takes checkpoint=<run>")
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
    run = new_run(config, f"eval-{config.workload.name}-{config.bank.kind}")
    result = evaluate(config, console, command=command)
    # Not config.yaml: in a training run's directory, that is what its checkpoints belong to.
    write_file(run / "eval_config.yaml", config_yaml(config))
    show_result(result, run, console)


def _study(config: Config, name: str, console: Console, argv: Sequence[str], command: str) -> None:
    from jaxroute.evaluation.study.run import run_study
    from jaxroute.evaluation.study.tables import study_text, terminal_table, verdict_table
    from jaxroute.evaluation.study.write import write_study

    # No time in the name: the same command goes on where it was stopped.
    run = run_folder(config, Path("outputs") / f"study-{name}")
    study = run_study(config, argv, run, console, command=command)
    write_file(run / "study_config.yaml", config_yaml(config))
    written = write_study(study, run)
    if study.routers:
        console.print(terminal_table(verdict_table(study)))
    console.print(study_text(study))
    say(console, f"Report: {written['study.html']}")
    say(console, f"Tables: {written['study.md']}")


def _view(config: Config, console: Console, command: str) -> None:
    from jaxroute.evaluation.viewer.record import view_episode

    run = new_run(config, f"view-{config.view}-{config.workload.name}")
    page = view_episode(config, console, run, command=command)
    say(console, f"Open in a browser: {page}")

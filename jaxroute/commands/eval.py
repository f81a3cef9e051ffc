"""Judge routers and rules, run a study, or record an episode: `python eval.py` and `python -m jaxroute eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxroute.commands.configured import command_of, new_run, run_configured, run_folder, show_result
from jaxroute.config import Config, config_yaml
from jaxroute.errors import UserError
from jaxroute.evaluation import evaluate
from jaxroute.evaluation.study.run import run_study
from jaxroute.evaluation.study.tables import study_text, terminal_table, verdict_table
from jaxroute.evaluation.study.write import write_study
from jaxroute.evaluation.viewer.record import view_episode


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a trained router, or the rules alone; returns the exit code."""
    return run_configured(
        "eval.py", "Judge a trained router (checkpoint=outputs/<run>), or the rules alone.", _eval, argv
    )


def _eval(config: Config, console: Console, argv: Sequence[str]) -> None:
    command = command_of("eval.py", argv)
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
    run = new_run(config, f"eval-{config.workload.name}-{config.bank.kind}")
    result = evaluate(config, console, command=command)
    run.mkdir(parents=True, exist_ok=True)
    # Not config.yaml: in a training run's directory, that is what its checkpoints belong to.
    (run / "eval_config.yaml").write_text(config_yaml(config))
    show_result(result, run, console)


def _study(config: Config, name: str, console: Console, argv: Sequence[str], command: str) -> None:
    # No time in the name: the same command goes on where it was stopped.
    run = run_folder(config, Path("outputs") / f"study-{name}")
    study = run_study(config, argv, run, console, command=command)
    (run / "study_config.yaml").write_text(config_yaml(config))
    written = write_study(study, run)
    if study.routers:
        console.print(terminal_table(verdict_table(study)))
    console.print(study_text(study))
    console.print(f"Report: {written['study.html']}")
    console.print(f"Tables: {written['study.md']}")


def _view(config: Config, console: Console, command: str) -> None:
    run = new_run(config, f"view-{config.view}-{config.workload.name}")
    page = view_episode(config, console, run, command=command)
    console.print(f"Open in a browser: {page}")

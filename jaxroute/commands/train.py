"""Train a router, then judge it: `python train.py` and `python -m jaxroute train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jaxroute.commands.configured import new_run, run_configured, show_result
from jaxroute.commands.console import say
from jaxroute.config import Config
from jaxroute.config.words import command_line, path_word, paths_word
from jaxroute.errors import UserError
from jaxroute.files import check_writable

if TYPE_CHECKING:
    from jaxroute.evaluation import EvaluationResult


def main(argv: Sequence[str] | None = None) -> int:
    """Train a router, then judge it against the rules; returns the exit code."""
    return run_configured("train", "Train a router, then judge it against the rules in production use.", _train, argv)


def _train(config: Config, console: Console, argv: Sequence[str]) -> None:
    # Imported here: help needs none of it.
    from jaxroute.evaluation import evaluate
    from jaxroute.policies import rules_named
    from jaxroute.runs import seed_runs
    from jaxroute.scenarios import build_env, on_test_prompts
    from jaxroute.training import is_first_process, join_processes, split_cpu, train

    if config.train.distributed:
        join_processes()
        console.quiet = not is_first_process()
    else:
        split_cpu(config)
    if config.study is not None:
        raise UserError(f"study={config.study.name} is for eval; train trains one router")
    # Mistakes here should not wait for the training to end, which may meet other arrivals.
    rules_named(config.policies, config.env.away)
    if config.train.evaluate:
        build_env(on_test_prompts(config))
    if config.resume:
        run = Path(config.resume)
        check_writable(run, "resume")
    else:
        run = new_run(config, f"train-{config.workload.name}-seed{config.seed}")

    def judge() -> dict[str, float]:
        say(console, f"Run directory: {run}")
        runs = [str(folder) for folder in seed_runs(run, config)]
        if len(runs) > 1:
            every = command_line("eval", "study=main", paths_word("study.routers.jaxroute", runs))
            say(console, f"Judge all seeds with: {every}")
        if not config.train.evaluate:
            say(console, f"Judge it with: {command_line('eval', path_word('checkpoint', runs[0]))}")
            return {}
        result = evaluate(replace(config, checkpoint=runs[0]), console, command=command_line("train", *argv))
        show_result(result, run, console)
        return _main_figures(result)

    train(config, run, console, judge)


def _main_figures(result: EvaluationResult) -> dict[str, float]:
    """Average QoS of the trained router, and by how much it is ahead of each rule, at the workload's rate."""
    from jaxroute.policies import LEARNED

    rate = result.nominal_rate
    figures = {"eval/avg_qos": result.interval(rate, LEARNED, "avg_qos").mean}
    for rule, difference in result.paired_with_reference(rate).items():
        figures[f"eval/avg_qos_ahead_of_{rule}"] = difference.mean
    return figures

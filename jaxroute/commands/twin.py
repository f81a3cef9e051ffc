"""From a log to a verdict: `python -m jaxroute twin LOG... --fleet FLEET.yaml --policies router,impact_greedy`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxroute.commands.arguments import parser_of, run_command
from jaxroute.commands.console import say
from jaxroute.commands.fleets import site_named
from jaxroute.config import read_config
from jaxroute.config.words import command_line
from jaxroute.devices import use_compilation_cache
from jaxroute.errors import UserError, did_you_mean
from jaxroute.evaluation.judge import versions
from jaxroute.evaluation.twin import Twin, judge, read_recorded, verdict_lines, write_twin
from jaxroute.evaluation.twin.judge import NUM_DRAWS, changes
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.evaluation.twin.servers import fit_servers
from jaxroute.evaluation.twin.simulate import Contender
from jaxroute.evaluation.twin.write import (
    CHECK_HEADER,
    FIT_HEADER,
    POLICY_HEADER,
    check_rows,
    drift_line,
    fit_rows,
    policy_rows,
    undetermined_lines,
)
from jaxroute.files import check_writable
from jaxroute.gateway.artefact import MANIFEST, read_manifest, site_config
from jaxroute.gateway.fleet import Fleet, check_experts, read_fleet
from jaxroute.gateway.rules import DRAWS, is_rule
from jaxroute.policies import RULES, rules_named
from jaxroute.runs import CONFIG_FILE, PRETRAINED, pretrained_routers, read_policy, run_of
from jaxroute.serving import Site, SiteConfig, build_site


def main(argv: Sequence[str] | None = None) -> int:
    """Judge policies on a log, or watch a log for changes; returns the exit code."""
    return run_command(_parser(), argv, _twin)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "twin", "From a log of real traffic to a verdict on other policies, with the verdict's own error."
    )
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="a gateway's decision log, or a table with the chosen server"
    )
    parser.add_argument("--fleet", type=Path, required=True, metavar="FLEET.yaml", help="the fleet file of the servers")
    parser.add_argument(
        "--policies",
        help="with commas: router (the fleet's policy), rules, pretrained routers, runs "
        "(default: the fleet's policy, its fallback and its shadows)",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/twin"), help="folder of twin.json and twin.html")
    parser.add_argument(
        "--share", type=float, default=0.5, help="part of the log to fit to, the earliest (default 0.5)"
    )
    parser.add_argument("--since", type=float, help="leave out what arrived before, s since 1970 or of the log's clock")
    parser.add_argument("--draws", type=int, default=NUM_DRAWS, help=f"of what is not known (default {NUM_DRAWS})")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="read the growing log again so often, and only tell what changes"
    )
    return parser


def _twin(options: argparse.Namespace, console: Console) -> None:
    if not 0.1 <= options.share <= 0.9:
        raise UserError(f"--share={options.share:g} must be from 0.1 to 0.9: the rest of the log checks the fit")
    if options.draws < 4:
        raise UserError(f"--draws={options.draws} must be at least 4, or their spread means nothing")
    if options.watch is not None and not 0 < options.watch < float("inf"):
        raise UserError(f"--watch={options.watch:g} must be above 0 s")
    check_writable(options.out, "--out")
    fleet = read_fleet(options.fleet)
    names = _names(options, fleet)
    around = _surrounded(options.fleet, fleet, [] if options.watch else names)
    recorded = read_recorded(options.logs, fleet, options.since)
    use_compilation_cache()
    if options.watch:
        _watch(options, fleet, around, recorded, console)
        return
    with console.status("reading the log") as status:
        twin = judge(
            recorded, around.contenders, around.site, around.log_length_error, share=options.share,
            draws=options.draws, seed=options.seed, say=status.update,
        )  # fmt: skip
    _show(console, twin)
    commands = _commands(options, twin)
    files = write_twin(
        twin,
        options.out,
        {"fleet": str(options.fleet), "logs": ", ".join(map(str, options.logs)), **versions()},
        commands,
    )
    for line in verdict_lines(twin):
        say(console, line)
    for command in commands:
        say(console, f"  {command}")
    say(console, f"Report: {files['twin.html']}")


def _names(options: argparse.Namespace, fleet: Fleet) -> list[str]:
    given = options.policies.split(",") if options.policies else ["router", *fleet.shadow, fleet.fallback]
    names = [fleet.policy if name.strip() == "router" else name.strip() for name in given if name.strip()]
    if not names:
        raise UserError("--policies is empty; name some, such as --policies router,impact_greedy")
    return list(dict.fromkeys(names))


class _Surrounded(NamedTuple):
    """A fleet's servers, and policies for them, as the twin takes them."""

    site: Site
    """(N,) each, as NumPy arrays."""
    log_length_error: np.ndarray
    contenders: list[Contender]


def _surrounded(path: Path, fleet: Fleet, names: Sequence[str]) -> _Surrounded:
    """Return a fleet's servers as its gateway believes them, and the policies of these names."""
    site = _believed(path, fleet)
    check_experts(path, fleet, site.models, f"site {site.name}")
    return _Surrounded(
        jax.tree.map(np.asarray, build_site(site)),
        np.array([expert.log_length_error for expert in fleet.experts]),
        [_contender(path, name) for name in names],
    )


def _believed(path: Path, fleet: Fleet) -> SiteConfig:
    if fleet.site is not None:
        return site_named(path, fleet.site)
    folder = path.parent / fleet.policy
    if (folder / MANIFEST).is_file():
        return site_config(read_manifest(folder))
    if is_rule(fleet.policy):
        raise UserError(f"{path}: site is missing: name a site of configs/site that has the servers' limits and speed")
    return read_config(_run(path, fleet.policy) / CONFIG_FILE).site


def _run(path: Path, name: str) -> Path:
    """Return the folder of a pretrained router or a run."""
    short = name.removeprefix(f"{PRETRAINED}/")
    if short in pretrained_routers():
        return run_of(Path(PRETRAINED) / short, "policy")
    if (path.parent / name / MANIFEST).is_file():
        raise UserError(
            f"policy {name} is an export, which the twin cannot play; name the run that it was exported from"
        )
    if not (path.parent / name).exists():
        known = [*pretrained_routers(), *RULES]
        raise UserError(
            f"policy {name} is no run, pretrained router or rule{did_you_mean(name, known)}; choose a folder, or "
            f"one of {', '.join(known)}"
        )
    return run_of(path.parent / name, "policy")


def _contender(path: Path, name: str) -> Contender:
    if is_rule(name):
        (rule,) = rules_named([name])
        return Contender(name, rule, away=rule.declines, draws=name.partition("+")[0] in DRAWS)
    run = _run(path, name)
    short = name.removeprefix(f"{PRETRAINED}/")
    policy = read_policy(Path(PRETRAINED) / short if short in pretrained_routers() else run).policy
    return Contender(name, policy._replace(name=name), away=read_config(run / CONFIG_FILE).env.away)


def _show(console: Console, twin: Twin) -> None:
    _print(console, "Servers: coefficients in s, and the spread of their draws", FIT_HEADER, fit_rows(twin))
    for line in undetermined_lines(twin):
        say(console, f"  {line}")
    title = "Measured \N{RIGHTWARDS ARROW} predicted, on what was not fitted to"
    _print(console, title, CHECK_HEADER, check_rows([twin.plain.whole, *twin.plain.servers]))
    if twin.remedied is not None:
        whole = twin.remedied.whole
        _print(
            console, "The same, following what has changed", CHECK_HEADER, check_rows([whole, *twin.remedied.servers])
        )
    if twin.policies:
        _print(console, "Other policies on the same arrivals, per request", POLICY_HEADER, policy_rows(twin))


def _print(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _commands(options: argparse.Namespace, twin: Twin) -> list[str]:
    """Return the commands that calibrate the servers after the latest change, and train again; none without one."""
    if not twin.drifts:
        return []
    recorded = twin.recorded
    since = max(recorded.begin + recorded.wall[drift.since] for drift in twin.drifts)
    logs = [f"{options.logs[-1]}#{name}" for name in recorded.servers]
    out = "configs/site/recalibrated.yaml"
    return [
        command_line("calibrate", *logs, "--since", f"{since:.0f}", "--out", out),
        command_line("train", "site=recalibrated"),
    ]


def _watch(
    options: argparse.Namespace, fleet: Fleet, around: _Surrounded, recorded: Recorded, console: Console
) -> None:
    """Fit once, and tell of every change while the log grows."""
    number = len(recorded.arrival)
    cut = recorded.begin + recorded.wall[min(round(options.share * number), number - 1)]

    def fitted(log: Recorded) -> Any:
        return log.begin + log.wall < cut

    with console.status("fitting the servers"):
        servers = fit_servers(
            recorded, fitted(recorded), around.site, around.log_length_error, draws=4, seed=options.seed
        )
    for name, why in servers.why_not.items():
        say(console, f"{name} is not watched: {why}.")
    say(console, f"Watching {', '.join(map(str, options.logs))}. Ctrl-C ends it.")
    told: set[int] = set()
    while True:
        for drift in changes(recorded, servers, fitted(recorded), around.site, around.log_length_error):
            if drift.server not in told:
                say(console, drift_line(recorded, drift))
                told.add(drift.server)
        console.file.flush()
        time.sleep(options.watch)
        recorded = read_recorded(options.logs, fleet, options.since)

"""A study: routers, rules and planners in many settings, resumable, with one verdict for each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxroute.config import Config, load_config
from jaxroute.config.schema import StudyCell, StudyConfig
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.judge import versions
from jaxroute.evaluation.metrics import summarise
from jaxroute.evaluation.report.figures import (
    has_choices,
    plot_expert_choice,
    plot_expert_share,
    plot_policy_comparison,
    plot_qos_against_load,
    plot_quality_latency,
    set_title,
    subtitle_of,
)
from jaxroute.evaluation.report.tables import counted, fixed, markdown, markdown_table, plus_minus, verdict_of
from jaxroute.evaluation.report.write import (
    CSV_COLUMNS,
    base64_image,
    csv_number,
    csv_rows,
    csv_text,
    fill_template,
    flat_settings,
    jsonable,
    load_content,
)
from jaxroute.evaluation.result import EvaluationResult, Summary
from jaxroute.evaluation.statistics import Interval, interquartile_mean, ranks
from jaxroute.files import write_file
from jaxroute.plotting import REFERENCE_COLOUR, STYLE, expert_colours, png_bytes
from jaxroute.policies import RULES, Policy, learned_policy, rules_named
from jaxroute.policies.planning import clairvoyant, lookahead
from jaxroute.runs import check_fits, read_policy
from jaxroute.scenarios import build_env, on_test_prompts

LOOKAHEAD, CLAIRVOYANT = "lookahead", "clairvoyant"
PLANNERS = (LOOKAHEAD, CLAIRVOYANT)

# Options that do not change what the policies meet; the number and the length of the episodes are noted apart.
_NO_INPUTS = {
    "network", "ppo", "train", "eval", "wandb", "study", "seed", "data_dir", "output_dir", "checkpoint", "policies",
    "view", "warm_start", "resume", "fork",
}  # fmt: skip


def planners_named(study: StudyConfig, env: EdgeRouting) -> list[Policy]:
    """Return the study's planners, which simulate the future in `env`."""
    horizon = study.planner_horizon
    known = {
        LOOKAHEAD: lookahead(env, futures=study.planner_futures, horizon=horizon),
        CLAIRVOYANT: clairvoyant(env, horizon=horizon),
    }
    return [known[name] for name in study.planners]


# --- Running -------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One call of `evaluate_policies`: all that a cell needs, or its shorter run with the planners."""

    name: str  # names its file
    config: Config
    env: EdgeRouting
    params: EnvParams
    policies: list[Policy]
    networks: dict[str, str]  # of the routers among them
    rates: list[float]
    episodes: int
    requests: int
    warmup: int

    def inputs(self) -> dict[str, Any]:
        """Everything that determines the numbers."""
        settings = dataclasses.asdict(self.config)
        return {
            "jaxroute": version("jaxroute"),
            "config": {key: value for key, value in settings.items() if key not in _NO_INPUTS},
            "policies": {policy.name: _content(policy) for policy in self.policies},
            "networks": self.networks,
            "rates": self.rates,
            "seed": self.config.eval.seed,
            "episodes": self.episodes,
            "requests": self.requests,
            "warmup": self.warmup,
        }


@dataclass(frozen=True)
class CellResult:
    """What came out of one cell."""

    cell: str
    result: EvaluationResult  # rules and routers; a router's numbers are means over its training seeds
    training: Mapping[float, Mapping[str, Float[np.ndarray, "training seed"]]]  # rate -> router -> average QoS
    planned: EvaluationResult | None  # the shorter run: planners, rules and routers on common episodes


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    name: str
    routers: Sequence[str]  # the first is the reference
    rules: Sequence[str]
    planners: Sequence[str]
    cells: Sequence[CellResult]
    settings: Mapping[str, Any]


def run_study(config: Config, overrides: Sequence[str], run: Path, console: Console, *, command: str) -> StudyResult:
    """Judge what the study names; cells that are done under `run` are not run again.

    Args:
        config: with a study.
        overrides: the command line that gave `config`; each cell changes it by its own.
        run: the folder; a finished cell goes to `cells/`.
        console: for the progress bar.
        command: for the report.

    Raises:
        UserError: before anything runs: unknown names, a checkpoint that does not exist or fit, missing data.
    """
    study = config.study
    assert study is not None
    _check(config, study)
    console.print(f"Study {study.name}: {len(study.cells)} cells, in {run}")
    parts = _parts(study, overrides)
    summaries: dict[str, list[dict[str, Summary]]] = {}
    for part in parts:
        done = _read(run, part)
        if done is not None:
            summaries[part.name] = done
    missing = [part for part in parts if part.name not in summaries]
    if summaries:
        console.print(f"{len(summaries)} of {len(parts)} runs were done before")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        runs = progress.add_task("runs", total=len(parts), completed=len(summaries))
        policies = progress.add_task("policies", total=None, visible=bool(missing))
        for part in missing:
            progress.reset(policies, total=len(part.policies), description=part.name)
            records = evaluate_policies(
                part.env,
                part.params,
                part.policies,
                part.rates,
                seed=part.config.eval.seed,
                episodes=part.episodes,
                requests=part.requests,
                warmup=part.warmup,
                on_done=lambda name: progress.advance(policies),
            )
            found: list[dict[str, Summary]] = [
                {name: summarise(episodes, part.warmup) for name, episodes in records[rate].items()}
                for rate in part.rates
            ]
            summaries[part.name] = found
            _save(run, part, found)
            progress.advance(runs)
    by_name = {part.name: part for part in parts}
    return StudyResult(
        name=study.name,
        routers=list(study.routers),
        rules=[rule.name for rule in rules_named(study.rules)],
        planners=study.planners,
        cells=[_cell_result(study, cell.name, by_name, summaries) for cell in study.cells],
        settings={"command": command, **versions(), "seed": str(config.eval.seed), "routers": study.routers},
    )


def _check(config: Config, study: StudyConfig) -> None:
    """Refuse what would fail late or be ignored."""
    where = f"study {study.name}"
    if config.checkpoint is not None:
        raise UserError(f"{where}: checkpoint is for a single evaluation; give study.routers.jaxroute=[outputs/<run>]")
    if config.policies is not None:
        raise UserError(f"{where}: policies is for a single evaluation; give study.rules=[...]")
    rules_named(study.rules)
    for name in study.planners:
        if name not in PLANNERS:
            raise UserError(f"{where}: planner {name} is unknown; choose from {', '.join(PLANNERS)}")
    for label in study.routers:
        if label in RULES or label in PLANNERS:
            raise UserError(f"{where}: routers.{label} has the name of another policy; choose another label")


def cell_config(cell: StudyCell, overrides: Sequence[str]) -> Config:
    """Return the configuration of a cell: the command line, changed by the cell's own overrides.

    Raises:
        UserError: an override of the cell is wrong.
    """
    chosen = {override.lstrip("+").split("=")[0]: override for override in [*overrides, *cell.overrides]}
    of_scenario = [override for key, override in chosen.items() if key.split(".")[0] != "study"]
    try:
        return on_test_prompts(load_config(of_scenario))
    except UserError as error:
        raise UserError(f"study cell {cell.name}: {error}") from None


def _parts(study: StudyConfig, overrides: Sequence[str]) -> list[_Part]:
    configs = {cell.name: cell_config(cell, overrides) for cell in study.cells}
    without_data = [name for name, config in configs.items() if config.data_path is None and _needs_data(config)]
    if without_data:
        raise UserError(
            f"study {study.name}: cells {', '.join(without_data)} read published data and no data folder is set: "
            "set JAXROUTE_DATA or data_dir, or choose a study without them"
        )
    try:
        trained = {
            _of_training_seed(label, index): read_policy(path)
            for label, paths in study.routers.items()
            for index, path in enumerate(paths)
        }
    except UserError as error:
        raise UserError(f"study {study.name}: {error}") from None
    routers = [learned_policy(found.network, found.params)._replace(name=name) for name, found in trained.items()]
    parts = []
    rules = rules_named(study.rules)
    for cell in study.cells:
        config = configs[cell.name]
        try:
            env, params = build_env(config)
            for found in trained.values():
                check_fits(found, env, params)
        except UserError as error:
            raise UserError(f"study cell {cell.name}: {error}") from None
        part = _Part(
            name=cell.name,
            config=config,
            env=env,
            params=params,
            policies=routers + rules,
            networks={name: repr(found.network) for name, found in trained.items()},
            rates=[float(params.rate[0]) * load for load in cell.loads],
            episodes=config.eval.episodes,
            requests=config.eval.requests,
            warmup=config.eval.warmup,
        )
        parts.append(part)
        if study.planners:
            parts.append(
                part._replace(
                    name=_planned(cell.name),
                    policies=routers + rules + planners_named(study, env),
                    episodes=study.planner_episodes,
                    requests=study.planner_requests,
                    warmup=study.planner_warmup,
                )
            )
    return parts


def _needs_data(config: Config) -> bool:
    trace = config.workload.trace if config.workload.arrivals == "trace" else None
    return config.bank.kind in ("zeroeval", "mmlu_pro") or (trace is not None and not Path(trace).is_absolute())


def _of_training_seed(label: str, index: int) -> str:
    return f"{label}[{index}]"


def _planned(cell: str) -> str:
    return f"{cell}.planners"


# --- Finished cells on disk ----------------------------------------------------------------------------


def _content(policy: Policy) -> str:
    """Fingerprint of a policy: its code by name, its parameters by value."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy.params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return f"{policy.act.__qualname__} {digest.hexdigest()[:16]}"


def _file(run: Path, part: _Part) -> Path:
    return run / "cells" / f"{part.name}.json"


def _save(run: Path, part: _Part, summaries: Sequence[Mapping[str, Summary]]) -> None:
    content = {"inputs": part.inputs(), "summaries": summaries}
    write_file(_file(run, part), json.dumps(jsonable(content), allow_nan=False) + "\n")


def _read(run: Path, part: _Part) -> list[dict[str, Summary]] | None:
    """Return what a part has found, unless it was never run or with other inputs."""
    path = _file(run, part)
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["inputs"] != json.loads(json.dumps(jsonable(part.inputs()))):
        return None
    return [
        {
            policy: {metric: np.array(values, np.float64) for metric, values in summary.items()}
            for policy, summary in of_rate.items()
        }
        for of_rate in content["summaries"]
    ]


# --- Judging -------------------------------------------------------------------------------------------


def _cell_result(
    study: StudyConfig, cell: str, parts: Mapping[str, _Part], summaries: Mapping[str, Sequence[Mapping[str, Summary]]]
) -> CellResult:
    def judged(name: str) -> EvaluationResult:
        part = parts[name]
        config = part.config
        return EvaluationResult(
            workload=config.workload.name,
            site=config.site.name,
            bank=config.bank.kind,
            rates=part.rates,
            nominal_rate=part.rates[loads.index(1.0) if 1.0 in loads else 0],
            episodes=part.episodes,
            requests=part.requests,
            warmup=part.warmup,
            reference=next(iter(study.routers), None),
            expert_names=[expert.label for expert in config.site.experts],
            summaries={
                rate: _over_training_seeds(of_rate, study.routers)
                for rate, of_rate in zip(part.rates, summaries[name], strict=True)
            },
            upper_references=[planner for planner in study.planners if planner == CLAIRVOYANT],
        )

    loads = next(entry.loads for entry in study.cells if entry.name == cell)
    return CellResult(
        cell=cell,
        result=judged(cell),
        training={
            rate: {
                label: np.stack([of_rate[name]["avg_qos"] for name in _training_seeds(label, runs)])
                for label, runs in study.routers.items()
            }
            for rate, of_rate in zip(parts[cell].rates, summaries[cell], strict=True)
        },
        planned=judged(_planned(cell)) if study.planners else None,
    )


def _training_seeds(label: str, runs: Sequence[str]) -> list[str]:
    return [_of_training_seed(label, index) for index in range(len(runs))]


def _over_training_seeds(summaries: Mapping[str, Summary], routers: Mapping[str, Sequence[str]]) -> dict[str, Summary]:
    """Put in the place of a router's training seeds their mean, episode by episode."""
    means: dict[str, Summary] = {}
    seen = set()
    for label, runs in routers.items():
        names = _training_seeds(label, runs)
        seen |= set(names)
        metrics = summaries[names[0]]
        means[label] = {metric: np.mean([summaries[name][metric] for name in names], axis=0) for metric in metrics}
    return means | {name: summary for name, summary in summaries.items() if name not in seen}


class Verdict(NamedTuple):
    """One router against the best rule, in one cell at one load."""

    cell: str
    rate: float  # requests/s
    router: str
    avg_qos: Interval  # mean over training seeds
    best_rule: str  # the one with the highest average QoS here
    rule_avg_qos: Interval
    difference: Interval  # router - best rule, paired by episode
    training_seeds: list[float]  # average QoS of each
    iqm: float  # interquartile mean of these
    efficiency: Interval  # QoS per accelerator-second
    rule_efficiency: Interval
    efficiency_difference: Interval  # paired by episode
    share_of_lookahead: float  # of lookahead's gain over that rule; nan if lookahead has none
    share_of_clairvoyant: float


def verdicts(study: StudyResult) -> list[Verdict]:
    """Judge every router in every cell at every load."""
    found = []
    for cell in study.cells:
        result = cell.result
        for rate in result.rates:
            rule = _best_rule(study, result, rate)
            for router in study.routers:
                per_seed = cell.training[rate][router].mean(axis=1)
                found.append(
                    Verdict(
                        cell=cell.cell,
                        rate=rate,
                        router=router,
                        avg_qos=result.interval(rate, router, "avg_qos"),
                        best_rule=rule,
                        rule_avg_qos=result.interval(rate, rule, "avg_qos"),
                        difference=result.paired(rate, router, rule),
                        training_seeds=per_seed.tolist(),
                        iqm=interquartile_mean(per_seed),
                        efficiency=result.interval(rate, router, _EFFICIENCY),
                        rule_efficiency=result.interval(rate, rule, _EFFICIENCY),
                        efficiency_difference=result.paired(rate, router, rule, _EFFICIENCY),
                        share_of_lookahead=_share(cell.planned, rate, router, rule, LOOKAHEAD),
                        share_of_clairvoyant=_share(cell.planned, rate, router, rule, CLAIRVOYANT),
                    )
                )
    return found


_EFFICIENCY = "qos_per_busy_second"


def _best_rule(study: StudyResult, result: EvaluationResult, rate: float) -> str:
    return next(policy for policy in result.ranking(rate) if policy in study.rules)


def _share(planned: EvaluationResult | None, rate: float, router: str, rule: str, planner: str) -> float:
    """Part of the planner's gain over the rule that the router reaches, on their common episodes."""
    if planned is None or planner not in planned.summaries[rate]:
        return math.nan
    gain = planned.paired(rate, planner, rule)
    if not gain.mean > gain.ci95:  # a share of what may be nothing means nothing
        return math.nan
    return planned.paired(rate, router, rule).mean / gain.mean


class Standing(NamedTuple):
    """One policy over all cells and loads."""

    policy: str
    mean_rank: float  # 1 is best
    best_rank: float
    worst_rank: float
    avg_qos: float  # mean over cells and loads


def standings(study: StudyResult) -> list[Standing]:
    """Rank rules and routers by average QoS in every cell at every load; the best mean rank first."""
    policies = [*study.routers, *study.rules]
    qos = np.array(
        [
            [cell.result.interval(rate, policy, "avg_qos").mean for policy in policies]
            for cell in study.cells
            for rate in cell.result.rates
        ]
    )
    places = np.array([ranks(row) for row in qos])
    columns = (places.mean(axis=0), places.min(axis=0), places.max(axis=0), qos.mean(axis=0))
    found = [Standing(policy, *map(float, row)) for policy, *row in zip(policies, *columns, strict=True)]
    return sorted(found, key=lambda standing: standing.mean_rank)


# --- Tables --------------------------------------------------------------------------------------------


class StudyTable(NamedTuple):
    """A table of the report, ready for the terminal, Markdown and HTML."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    coloured: int = -1  # column that is green where the router is better, red where it is worse
    verdicts: Sequence[str] = ()  # one per row


def _percent(share: float) -> str:
    return fixed(100 * share, 0) + ("" if math.isnan(share) else " %")


def verdict_table(study: StudyResult) -> StudyTable:
    """Each router against the best rule of each cell."""
    found = verdicts(study)
    rows = []
    for v in found:
        low, high = min(v.training_seeds), max(v.training_seeds)
        rows.append(
            [
                v.cell,
                f"{v.rate:.3g}",
                v.router,
                plus_minus(v.avg_qos, 3),
                v.best_rule,
                fixed(v.rule_avg_qos.mean, 3),
                plus_minus(v.difference, 4, "+"),
                f"{fixed(v.iqm, 3)} [{fixed(low, 3)}, {fixed(high, 3)}]",
                _percent(v.share_of_lookahead),
            ]
        )
    return StudyTable(
        "Routers against the best rule",
        "± is the half-width of the 95 % interval over episodes; a router's episodes are means over its training "
        "seeds. Difference: router - best rule, paired by episode. IQM: interquartile mean over training seeds "
        "[least, greatest]. Of lookahead: share of its gain over the rule, where it has one.",
        ["cell", "req/s", "router", "avg QoS", "best rule", "its QoS", "difference", "IQM", "of lookahead"],
        rows,
        coloured=6,
        verdicts=[verdict_of(v.difference) for v in found],
    )


def _rank_table(study: StudyResult) -> StudyTable:
    return StudyTable(
        "Ranks",
        "By average QoS in every cell at every load; 1 is best.",
        ["policy", "mean rank", "best", "worst", "mean avg QoS"],
        [
            [s.policy, f"{s.mean_rank:.2f}", f"{s.best_rank:g}", f"{s.worst_rank:g}", fixed(s.avg_qos, 3)]
            for s in standings(study)
        ],
    )


def _routers_table(study: StudyResult) -> StudyTable:
    reference, *others = study.routers
    rows, found = [], []
    for cell in study.cells:
        for rate in cell.result.rates:
            for router in others:
                difference = cell.result.paired(rate, reference, router)
                qos = cell.result.interval(rate, router, "avg_qos")
                texts = [plus_minus(qos, 3), plus_minus(difference, 4, "+")]
                rows.append([cell.cell, f"{rate:.3g}", router, *texts])
                found.append(verdict_of(difference))
    return StudyTable(
        f"{reference} against the other routers",
        f"Difference: {reference} - the other, both means over training seeds, paired by episode.",
        ["cell", "req/s", "router", "avg QoS", "difference"],
        rows,
        coloured=4,
        verdicts=found,
    )


def _planner_table(study: StudyResult) -> StudyTable:
    reference = study.routers[:1]
    rows = []
    for cell in study.cells:
        assert cell.planned is not None
        for rate in cell.planned.rates:
            rule = _best_rule(study, cell.result, rate)
            columns = [rule, *study.routers, *study.planners]
            texts = [plus_minus(cell.planned.interval(rate, policy, "avg_qos"), 3) for policy in columns]
            shares = [
                _percent(_share(cell.planned, rate, router, rule, planner))
                for router in reference
                for planner in study.planners
            ]
            rows.append([cell.cell, f"{rate:.3g}", rule, *texts, *shares])
    run = next(cell.planned for cell in study.cells if cell.planned)
    return StudyTable(
        "Planners",
        f"Average QoS on {run.episodes} episodes of {run.requests:,} requests of their own, which planners, routers "
        "and the best rule have in common. Last columns: share of the planner's gain over the best rule that the "
        "router reaches, where the gain's 95 % interval excludes 0. clairvoyant sees the future: nobody can deploy it.",
        ["cell", "req/s", "best rule", "its QoS", *study.routers, *study.planners]
        + [f"{router} of {planner}" for router in reference for planner in study.planners],
        rows,
    )


def _efficiency_table(study: StudyResult) -> StudyTable:
    found = verdicts(study)
    rows = []
    for v in found:
        efficiencies = [plus_minus(v.efficiency, 3), v.best_rule, plus_minus(v.rule_efficiency, 3)]
        relative = 100 * v.efficiency_difference.mean / v.rule_efficiency.mean
        difference = plus_minus(v.efficiency_difference, 4, "+")
        rows.append([v.cell, f"{v.rate:.3g}", v.router, *efficiencies, difference, f"{relative:+.1f} %"])
    return StudyTable(
        "Resource efficiency",
        "QoS per accelerator-second, beside the rule with the best average QoS; the difference is paired by episode.",
        ["cell", "req/s", "router", "QoS/acc.-s", "best rule", "its QoS/acc.-s", "difference", "relative"],
        rows,
        coloured=6,
        verdicts=[verdict_of(v.efficiency_difference) for v in found],
    )


def tables(study: StudyResult) -> list[StudyTable]:
    """Return the tables over all cells, the verdicts first."""
    found = [verdict_table(study)] if study.routers else []
    if len(study.routers) > 1:
        found.append(_routers_table(study))
    found.append(_rank_table(study))
    if study.planners:
        found.append(_planner_table(study))
    if study.routers:
        found.append(_efficiency_table(study))
    return found


def terminal_table(table: StudyTable) -> Table:
    """Return a table for the terminal."""
    shown = Table(title=table.title, box=box.SIMPLE_HEAD, show_edge=False, padding=0, title_style="bold")
    for position, name in enumerate(table.header):
        shown.add_column(name, justify="left" if position == 0 else "right", no_wrap=name != "best rule")
    colours = {"better": "green", "worse": "red", "": ""}
    for row, verdict in zip(table.rows, table.verdicts or [""] * len(table.rows), strict=True):
        cells = list(row)
        if colours[verdict]:
            cells[table.coloured] = f"[{colours[verdict]}]{cells[table.coloured]}[/]"
        shown.add_row(*cells)
    return shown


def study_text(study: StudyResult) -> str:
    """Say in words what came out."""
    first = standings(study)[0]
    settings = sum(len(cell.result.rates) for cell in study.cells)
    sentences = []
    for router in study.routers:
        found = [verdict_of(v.difference) for v in verdicts(study) if v.router == router]
        sentences.append(f"Against the best rule of each of {settings} settings, {router} is {counted(found, 'in')}.")
    sentences.append(f"The best mean rank is that of {first.policy}, {first.mean_rank:.2f}.")
    return " ".join(sentences)


# --- Figure and files ----------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def plot_differences(study: StudyResult) -> Figure:
    """Plot every router's average QoS minus that of the best rule, with its interval and its training seeds."""
    found = verdicts(study)
    settings = list(dict.fromkeys((v.cell, v.rate) for v in found))
    figure = Figure(figsize=(8.2, 1.3 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#888888", lw=1)
    colours = dict(zip(study.routers, _router_colours(len(study.routers)), strict=True))
    for number, router in enumerate(study.routers):
        of_router = [v for v in found if v.router == router]
        y = np.array([settings.index((v.cell, v.rate)) for v in of_router], np.float64)
        y += 0.7 * ((number + 0.5) / len(study.routers) - 0.5)
        mean = np.array([v.difference.mean for v in of_router])
        half = np.array([v.difference.ci95 for v in of_router])
        look: Any = {"color": colours[router], "label": router, "ms": 6, "capsize": 3}
        axes.errorbar(mean, y, xerr=half, fmt="o", **look)
        for v, height in zip(of_router, y, strict=True):
            seeds = np.array(v.training_seeds) - v.rule_avg_qos.mean
            axes.plot(seeds, np.full(len(seeds), height), "|", color=colours[router], alpha=0.6, ms=8)
    axes.set_yticks(range(len(settings)), [f"{cell}, {rate:.3g} req/s" for cell, rate in settings])
    axes.set_ylim(len(settings) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_xlabel("Average QoS above the best rule of each setting")
    if len(study.routers) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(study.routers), 6))
    set_title(axes, "Routers against the best rule", "bars: 95 % interval over episodes; ticks: training seeds")
    return figure


def _router_colours(number: int) -> list[str]:
    """Return the reference's colour and others."""
    others = [colour for colour in expert_colours(7) if colour != REFERENCE_COLOUR]
    return [REFERENCE_COLOUR, *(others * number)][:number]


def _cell_figures(cell: CellResult) -> dict[str, Figure]:
    """Draw the figures of a single evaluation, by what they show; some need two loads, or what old cells lack."""
    plots = {
        "Average QoS against the load": plot_qos_against_load,
        "Average QoS, late and rejected requests": plot_policy_comparison,
        "Quality and requests in time": plot_quality_latency,
        "Share of each expert": plot_expert_share,
        "Choice of an expert against its load": plot_expert_choice,
    }
    if len(cell.result.rates) == 1:
        del plots["Average QoS against the load"]
    if not has_choices(cell.result):
        del plots["Choice of an expert against its load"]
    return {name: plot(cell.result) for name, plot in plots.items()}


def _json(study: StudyResult) -> dict[str, Any]:
    return {
        "study": study.name,
        "routers": study.routers,
        "rules": study.rules,
        "planners": study.planners,
        "verdicts": [verdict._asdict() for verdict in verdicts(study)],
        "standings": [standing._asdict() for standing in standings(study)],
        "cells": [
            {
                "cell": cell.cell,
                "workload": cell.result.workload,
                "site": cell.result.site,
                "bank": cell.result.bank,
                "episodes": cell.result.episodes,
                "requests": cell.result.requests,
                "warmup": cell.result.warmup,
                "experts": cell.result.expert_names,
                "loads": [load_content(cell.result, rate) for rate in cell.result.rates],
                "planners": cell.planned and [load_content(cell.planned, rate) for rate in cell.planned.rates],
            }
            for cell in study.cells
        ],
        "settings": study.settings,
    }


def _csv_text(study: StudyResult) -> str:
    lines = [["cell", "episodes", *CSV_COLUMNS]]
    for cell in study.cells:
        lines += [[cell.cell, "all", *row] for row in csv_rows(cell.result)]
        if cell.planned is not None:
            lines += [[cell.cell, "planners", *row] for row in csv_rows(cell.planned)]
    for v in verdicts(study):
        for index, qos in enumerate(v.training_seeds):
            name = _of_training_seed(v.router, index)
            lines.append([v.cell, "all", csv_number(v.rate), name, "avg_qos", csv_number(qos), ""])
    return csv_text(lines)


def _markdown_text(study: StudyResult) -> str:
    sections = [f"# Study {study.name}", study_text(study)]
    for table in tables(study):
        sections += [f"## {table.title}", table.note, markdown(table.header, table.rows).rstrip()]
    for cell in study.cells:
        sections.append(f"## {cell.cell}: {subtitle_of(cell.result)}")
        for rate in cell.result.rates:
            sections += [f"### {rate:.3g} requests per second", markdown_table(cell.result, rate).rstrip()]
    return "\n\n".join(sections) + "\n"


def _html(study: StudyResult) -> str:
    def image(figure: Figure) -> str:
        return base64_image(png_bytes(figure))

    return fill_template(
        "study/study.html.jinja",
        study=study,
        summary=study_text(study),
        differences=image(plot_differences(study)) if study.routers else None,
        tables=tables(study),
        cells=[
            {
                "name": cell.cell,
                "subtitle": subtitle_of(cell.result),
                "images": {name: image(figure) for name, figure in _cell_figures(cell).items()},
            }
            for cell in study.cells
        ],
        settings=flat_settings(study.settings),
    )


def write_study(study: StudyResult, directory: str | Path) -> dict[str, Path]:
    """Write study.json, study.csv, study.md, study.html and, with routers, study.png; return file name to path."""
    directory = Path(directory)
    content: dict[str, str | bytes] = {
        "study.json": json.dumps(jsonable(_json(study)), indent=2, allow_nan=False) + "\n",
        "study.csv": _csv_text(study),
        "study.md": _markdown_text(study),
        "study.html": _html(study),
    }
    if study.routers:
        content["study.png"] = png_bytes(plot_differences(study))
    return {name: write_file(directory / name, text) for name, text in content.items()}

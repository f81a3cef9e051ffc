"""Run a study: routers, rules and planners in many settings; what is done is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxroute.config import Config, load_config
from jaxroute.config.schema import StudyConfig, StudySetting
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.judge import versions
from jaxroute.evaluation.metrics import summarise
from jaxroute.evaluation.report.write import jsonable
from jaxroute.evaluation.result import EvaluationResult, Summary
from jaxroute.evaluation.study.planners import CLAIRVOYANT, PLANNERS, planners_named
from jaxroute.evaluation.study.result import SettingResult, StudyResult, training_seed_name
from jaxroute.files import write_file
from jaxroute.policies import RULES, Policy, rules_named
from jaxroute.progress import Progress
from jaxroute.runs import check_fits, read_policy
from jaxroute.scenarios import build_env, on_test_prompts

# Options that do not change what the policies meet; the number and the length of the episodes are noted apart.
_NO_INPUTS = {
    "network", "ppo", "train", "eval", "wandb", "study", "seed", "data_dir", "output_dir", "checkpoint", "policies",
    "view", "warm_start", "resume", "fork",
}  # fmt: skip


def run_study(config: Config, overrides: Sequence[str], run: Path, console: Console, *, command: str) -> StudyResult:
    """Judge what the study names; settings that are done under `run` are not run again.

    Args:
        config: with a study.
        overrides: the command line that gave `config`; each setting changes it by its own.
        run: the folder; a finished setting goes to `settings/`.
        console: for the progress bar.
        command: for the report.

    Raises:
        UserError: before anything runs: unknown names, a checkpoint that does not exist or fit, missing data.
    """
    study = config.study
    assert study is not None
    _check(config, study)
    console.print(f"Study {study.name}: {len(study.settings)} settings, in {run}")
    parts = _parts(study, overrides)
    summaries: dict[str, list[dict[str, Summary]]] = {}
    for part in parts:
        done = _read(run, part)
        if done is not None:
            summaries[part.name] = done
    missing = [part for part in parts if part.name not in summaries]
    if summaries:
        console.print(f"{len(summaries)} of {len(parts)} were done before")
    with Progress(console) as progress:
        for part in missing:
            name = f"{part.name} ({len(summaries) + 1} of {len(parts)})"
            progress.begin(f"compiling and judging {name}", total=len(part.policies))
            records = evaluate_policies(
                part.env,
                part.params,
                part.policies,
                part.rates,
                seed=part.config.eval.seed,
                episodes=part.episodes,
                requests=part.requests,
                warmup=part.warmup,
                on_done=lambda name: progress.advance(note=f"last: {name}"),
            )
            found: list[dict[str, Summary]] = [
                {name: summarise(episodes, part.warmup) for name, episodes in records[rate].items()}
                for rate in part.rates
            ]
            summaries[part.name] = found
            _save(run, part, found)
    by_name = {part.name: part for part in parts}
    return StudyResult(
        name=study.name,
        routers=list(study.routers),
        rules=[rule.name for rule in rules_named(study.rules)],
        planners=study.planners,
        settings=[_setting_result(study, setting.name, by_name, summaries) for setting in study.settings],
        provenance={"command": command, **versions(), "seed": str(config.eval.seed), "routers": study.routers},
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


def setting_config(setting: StudySetting, overrides: Sequence[str]) -> Config:
    """Return the configuration of a setting: the command line, changed by the setting's own overrides.

    Raises:
        UserError: an override of the setting is wrong.
    """
    chosen = {override.lstrip("+").split("=")[0]: override for override in [*overrides, *setting.overrides]}
    of_scenario = [override for key, override in chosen.items() if key.split(".")[0] != "study"]
    try:
        return on_test_prompts(load_config(of_scenario))
    except UserError as error:
        raise UserError(f"study setting {setting.name}: {error}") from None


class _Part(NamedTuple):
    """One call of `evaluate_policies`: all that a setting needs, or its shorter run with the planners."""

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


def _parts(study: StudyConfig, overrides: Sequence[str]) -> list[_Part]:
    configs = {setting.name: setting_config(setting, overrides) for setting in study.settings}
    without_data = [name for name, config in configs.items() if config.data_path is None and _needs_data(config)]
    if without_data:
        raise UserError(
            f"study {study.name}: settings {', '.join(without_data)} read published data and no data folder is set: "
            "set JAXROUTE_DATA or data_dir, or choose a study without them"
        )
    try:
        trained = {
            training_seed_name(label, index): read_policy(path)
            for label, paths in study.routers.items()
            for index, path in enumerate(paths)
        }
    except UserError as error:
        raise UserError(f"study {study.name}: {error}") from None
    routers = [found.policy._replace(name=name) for name, found in trained.items()]
    parts = []
    rules = rules_named(study.rules)
    for setting in study.settings:
        config = configs[setting.name]
        try:
            env, params = build_env(config)
            for found in trained.values():
                check_fits(found, env, params)
        except UserError as error:
            raise UserError(f"study setting {setting.name}: {error}") from None
        part = _Part(
            name=setting.name,
            config=config,
            env=env,
            params=params,
            policies=routers + rules,
            networks={name: repr(found.network) for name, found in trained.items()},
            rates=[float(params.rate[0]) * load for load in setting.loads],
            episodes=config.eval.episodes,
            requests=config.eval.requests,
            warmup=config.eval.warmup,
        )
        parts.append(part)
        if study.planners:
            parts.append(
                part._replace(
                    name=_planned(setting.name),
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


def _planned(setting: str) -> str:
    return f"{setting}.planners"


# --- Finished settings on disk -------------------------------------------------------------------------


def _content(policy: Policy) -> str:
    """Fingerprint of a policy: its code by name, its parameters by value."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy.params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return f"{policy.act.__qualname__} {digest.hexdigest()[:16]}"


def _file(run: Path, part: _Part) -> Path:
    return run / "settings" / f"{part.name}.json"


def _save(run: Path, part: _Part, summaries: Sequence[Mapping[str, Summary]]) -> None:
    content = {"inputs": part.inputs(), "summaries": summaries}
    write_file(_file(run, part), json.dumps(jsonable(content), allow_nan=False) + "\n")


def _read(run: Path, part: _Part) -> list[dict[str, Summary]] | None:
    """Return what a part has found, unless it was never run or with other inputs."""
    path = _file(run, part)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        inputs, summaries = content["inputs"], content["summaries"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete it to run this setting again") from error
    if inputs != json.loads(json.dumps(jsonable(part.inputs()))):
        return None
    return [
        {
            policy: {metric: np.array(values, np.float64) for metric, values in summary.items()}
            for policy, summary in of_rate.items()
        }
        for of_rate in summaries
    ]


# --- Judging -------------------------------------------------------------------------------------------


def _setting_result(
    study: StudyConfig,
    setting: str,
    parts: Mapping[str, _Part],
    summaries: Mapping[str, Sequence[Mapping[str, Summary]]],
) -> SettingResult:
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

    loads = next(entry.loads for entry in study.settings if entry.name == setting)
    return SettingResult(
        setting=setting,
        result=judged(setting),
        training={
            rate: {
                label: np.stack([of_rate[name]["avg_qos"] for name in _training_seeds(label, runs)])
                for label, runs in study.routers.items()
            }
            for rate, of_rate in zip(parts[setting].rates, summaries[setting], strict=True)
        },
        planned=judged(_planned(setting)) if study.planners else None,
    )


def _training_seeds(label: str, runs: Sequence[str]) -> list[str]:
    return [training_seed_name(label, index) for index in range(len(runs))]


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

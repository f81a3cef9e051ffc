"""A study: what it judges, that it goes on where it was stopped, and what it writes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxroute.commands.eval import main as eval_main
from jaxroute.commands.train import main as train_main
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.evaluation.statistics import interquartile_mean, ranks
from jaxroute.evaluation.study import run as module
from jaxroute.evaluation.study.run import run_study, setting_config
from jaxroute.evaluation.study.verdicts import standings, verdicts
from jaxroute.evaluation.study.write import write_study
from jaxroute.networks import build_network
from jaxroute.runs import save_params, write_config
from jaxroute.scenarios import build_env

pytestmark = pytest.mark.slow

OPTIONS = (
    "study=quick", "site=edge3", "eval.episodes=2", "eval.requests=20", "eval.warmup=5",
    "study.rules=[random,qos_greedy]",
    "study.settings=[{name: poisson, overrides: ['workload.rate=9'], loads: [0.5, 1]}]",
)  # fmt: skip
NETWORK = ("network.hidden=8", "network.heads=2")


def quiet():
    return Console(file=io.StringIO(), width=120)


def run(folder, options):
    return run_study(load_config(options), options, folder, quiet(), command="python eval.py")


@pytest.fixture(scope="module")
def routers(tmp_path_factory):
    """Two untrained networks, saved as the runs of two training seeds."""
    config = load_config(["site=edge3", *NETWORK])
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)
    runs = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("routers") / f"seed{seed}"
        folder.mkdir()
        obs, _ = env.reset(jax.random.key(0), params)
        weights = jax.jit(lambda key, obs=obs: network.init(key, network.prepare(obs)))(jax.random.key(seed))
        save_params(folder, 0, weights)
        write_config(folder, config)
        runs.append(folder)
    return runs


@pytest.fixture(scope="module")
def options(routers):
    return [*OPTIONS, f"study.routers.mine=[{','.join(map(str, routers))}]"]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a finished study, and what came out."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run(folder, options)


# --- what it judges ---------------------------------------------------------------------------------------


def test_every_policy_at_every_load(finished):
    _, study = finished
    (setting,) = study.settings
    assert setting.result.rates == [4.5, 9.0]
    assert setting.result.nominal_rate == 9.0
    for rate in setting.result.rates:
        assert list(setting.result.summaries[rate]) == ["mine", "random", "qos_greedy"]
        assert setting.training[rate]["mine"].shape == (2, 2)
        qos = setting.result.summaries[rate]["mine"]["avg_qos"]
        np.testing.assert_allclose(qos, setting.training[rate]["mine"].mean(axis=0))
    assert [v.rate for v in verdicts(study)] == [4.5, 9.0]


def test_a_verdict_by_hand(finished):
    """Two training seeds and two episodes against a rule with known numbers."""
    _, study = finished
    (setting,) = study.settings
    training = {9.0: {"mine": np.array([[0.5, 0.6], [0.7, 1.0]])}}
    summaries = {
        "mine": {"avg_qos": np.array([0.6, 0.8]), "qos_per_busy_second": np.array([3.0, 4.0])},
        "random": {"avg_qos": np.array([0.1, 0.2]), "qos_per_busy_second": np.array([1.0, 1.0])},
        "qos_greedy": {"avg_qos": np.array([0.5, 0.6]), "qos_per_busy_second": np.array([2.0, 2.0])},
    }
    planners = {"lookahead": {"avg_qos": np.array([0.9, 1.0])}, "clairvoyant": {"avg_qos": np.array([0.4, 0.9])}}
    result = replace(setting.result, rates=[9.0], nominal_rate=9.0, summaries={9.0: summaries})
    planned = replace(result, summaries={9.0: summaries | planners})
    study = replace(study, settings=[replace(setting, result=result, training=training, planned=planned)])
    (verdict,) = verdicts(study)
    assert verdict.best_rule == "qos_greedy"
    assert verdict.difference.mean == pytest.approx(0.15)
    assert verdict.difference.ci95 == pytest.approx(12.7062 * math.sqrt(0.005) / math.sqrt(2), rel=1e-4)
    assert verdict.training_seeds == pytest.approx([0.55, 0.85])
    assert verdict.efficiency_difference.mean == pytest.approx(1.5)
    assert verdict.share_of_lookahead == pytest.approx(0.15 / 0.4)
    assert math.isnan(verdict.share_of_clairvoyant)  # its gain cannot be told from none
    assert [(s.policy, s.mean_rank) for s in standings(study)] == [("mine", 1), ("qos_greedy", 2), ("random", 3)]


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 4.0])) == 3.0  # without 1 and 9
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 6.0, 7.0, 8.0, 9.0, 100.0])) == 5.75  # two of each end
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0


def test_ranks_by_hand():
    assert ranks(np.array([0.5, 0.9, 0.5, math.nan, 0.1])).tolist() == [2.5, 1.0, 2.5, 5.0, 4.0]


# --- going on ---------------------------------------------------------------------------------------------


def test_what_is_done_is_not_run_again(finished, options, monkeypatch):
    folder, study = finished

    def refuse(*args, **kwargs):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(module, "evaluate_policies", refuse)
    again = run(folder, options)
    assert verdicts(again) == verdicts(study)
    for change in ("eval.episodes=3", "workload.cv=2"):
        with pytest.raises(AssertionError, match="evaluated again"):
            run(folder, [*options, change])


def test_another_checkpoint_is_another_input(finished, options, routers, monkeypatch, tmp_path):
    folder, _ = finished
    asked = []

    def note(env, params, policies, *args, **kwargs):
        asked.extend(policy.name for policy in policies)
        raise InterruptedError

    monkeypatch.setattr(module, "evaluate_policies", note)
    moved = tmp_path / "moved"
    shutil.copytree(routers[1], moved)
    run(folder, [*OPTIONS, f"study.routers.mine=[{routers[0]},{moved}]"])  # the same content elsewhere
    assert not asked
    with pytest.raises(InterruptedError):
        run(folder, [*OPTIONS, f"study.routers.mine=[{routers[0]},{routers[0]}]"])
    assert asked == ["mine[0]", "mine[1]", "random", "qos_greedy"]


def test_each_checkpoint_is_read_once(options, routers, monkeypatch, tmp_path):
    read, read_policy = [], module.read_policy

    def note(path):
        read.append(path)
        return read_policy(path)

    def stop(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(module, "read_policy", note)
    monkeypatch.setattr(module, "evaluate_policies", stop)
    with pytest.raises(InterruptedError):
        run(tmp_path, [*options, "study.settings=[{name: a}, {name: b}]"])
    assert read == [str(path) for path in routers]


def test_a_router_must_fit_every_setting(routers, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(routers[0], wide)
    config = wide / "config.yaml"
    config.write_text(config.read_text().replace("hidden: 8", "hidden: 16"))
    with pytest.raises(
        UserError, match=r"study setting poisson: checkpoint .*wide.* belongs to another network or site"
    ):
        run(tmp_path, [*OPTIONS, f"study.routers.mine=[{wide}]"])


# --- files ------------------------------------------------------------------------------------------------


def test_cells_of_older_studies_lack_one_figure(finished, options, tmp_path):
    """They were saved before choices were counted; all the rest is there."""
    folder, study = finished
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (setting,) = (old / "settings").iterdir()
    content = json.loads(setting.read_text())
    for of_rate in content["summaries"]:
        for summary in of_rate.values():
            del summary["expert_load"], summary["expert_choice"]
    setting.write_text(json.dumps(content))
    again = run(old, options)
    assert verdicts(again) == verdicts(study)
    page = write_study(again, old)["study.html"].read_text()
    assert page.count("data:image/png;base64,") == 5


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"inputs": 1}'])
def test_a_damaged_setting_is_reported_in_one_line(content, finished, options, tmp_path):
    folder, _ = finished
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "settings" / "poisson.json").write_text(content)
    with pytest.raises(UserError, match=r"poisson\.json is damaged .* delete it to run this setting again") as raised:
        run(damaged, options)
    assert "\n" not in str(raised.value)


def test_a_router_that_has_vanished_is_reported_in_one_line(finished, routers, tmp_path):
    """Finished settings are kept; the router is what they are of."""
    folder, _ = finished
    gone = tmp_path / "gone"
    shutil.copytree(routers[1], gone)
    shutil.rmtree(gone / "checkpoints")
    with pytest.raises(UserError, match=r"study quick: run .*gone holds no checkpoint"):
        run(folder, [*OPTIONS, f"study.routers.mine=[{routers[0]},{gone}]"])
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=r"study quick: checkpoint .*gone does not exist"):
        run(folder, [*OPTIONS, f"study.routers.mine=[{routers[0]},{gone}]"])


def test_files(finished):
    folder, study = finished
    written = write_study(study, folder)
    assert sorted(written) == ["study.csv", "study.html", "study.json", "study.md", "study.png"]
    content = json.loads(written["study.json"].read_text())
    assert [verdict["router"] for verdict in content["verdicts"]] == ["mine", "mine"]
    with written["study.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == {"mine", "mine[0]", "mine[1]", "random", "qos_greedy"}
    text = written["study.md"].read_text()
    assert "## Routers against the best rule" in text
    assert "## Resource efficiency" in text
    page = written["study.html"].read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)


def test_from_the_command_line(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxroute.commands.configured.use_compilation_cache", lambda: None)
    assert eval_main(options) == 0
    assert "Routers against the best rule" in capsys.readouterr().out
    assert (tmp_path / "outputs" / "study-quick" / "study.html").is_file()


# --- configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "ablations", "quick"])
def test_every_setting_composes(name):
    study = load_config([f"study={name}"]).study
    for setting in study.settings:
        config = setting_config(setting, [f"study={name}", "eval.episodes=3", "site=edge3"])
        assert config.study is None
        assert config.bank.split == "test"
        assert config.eval.episodes == 3
        assert config.site.name == ("edge16" if setting.name == "edge16" else "edge3")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("study.setings=[]", "unknown option study.setings (did you mean study.settings?)"),
        ("study.settings=[]", "study quick: settings is empty"),
        ("study.settings=[{name: a/b}]", "setting name 'a/b' names a file"),
        ("study.settings=[{name: a}, {name: a}]", "each name once"),
        ("study.settings=[{name: a, loads: [0]}]", "setting a: loads=[0.0] must"),
        ("study.settings=[{name: a, overrides: ['workload=poison']}]", "study setting a: unknown workload poison"),
        ("study.settings=[{name: a, overrides: ['sede=1']}]", "study setting a: unknown option sede"),
        ("study.routers.mine=[]", "routers.mine is empty; name its runs"),
        ("study.routers.mine=[nowhere]", "study quick: checkpoint nowhere does not exist"),
        ("study.routers.random=[nowhere]", "routers.random has the name of another policy"),
        ("study.rules=[randon]", "did you mean random?"),
        ("study.planners=[oracle]", "planner oracle is unknown; choose from lookahead, clairvoyant"),
        ("study.planner_episodes=0", "planner_episodes=0"),
        ("checkpoint=nowhere", "checkpoint is for a single evaluation"),
        ("policies=[random]", "policies is for a single evaluation"),
    ],
)
def test_mistakes(option, message, tmp_path):
    with pytest.raises(UserError) as raised:
        run(tmp_path, ["study=quick", option])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_no_study_is_chosen(capsys, monkeypatch):
    monkeypatch.setattr("jaxroute.commands.configured.use_compilation_cache", lambda: None)
    assert eval_main(["study.rules=[random]"]) == 2
    assert "no study is chosen; add, for instance, study=main" in capsys.readouterr().err
    assert train_main(["study=quick"]) == 2
    assert "study=quick is for eval;" in capsys.readouterr().err


def test_cells_without_their_data_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXROUTE_DATA", raising=False)
    with pytest.raises(UserError, match="settings azure_zeroeval, azure_mmlu_pro read published data"):
        run(tmp_path, ["study=main"])

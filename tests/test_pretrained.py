"""Routers that come with the package: taken by name wherever a run is, read without pickle, refused in one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

import jaxroute
from benchmarks import pretrained as recipe
from jaxroute import runs
from jaxroute.commands.eval import main as eval_main
from jaxroute.commands.export import main as export_main
from jaxroute.commands.train import main as train_main
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.networks import build_network
from jaxroute.runs import load_policy, load_router, read_policy, run_of, save_params, write_config, write_pretrained
from jaxroute.scenarios import build_env

pytestmark = pytest.mark.slow

SIZES = ("eval.episodes=2", "eval.requests=20", "eval.warmup=5", "eval.loads=[1]")
SMALL = ("site=edge3", "workload.rate=4", "network.hidden=8", "network.heads=2")


def untrained(network, env, params):
    obs, _ = env.reset(jax.random.key(0), params)
    return jax.jit(lambda key: network.init(key, network.prepare(obs)))(jax.random.key(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained network saved as a run."""
    config = load_config([*SMALL, "data_dir=/somewhere", "output_dir=/elsewhere"])
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)
    folder = tmp_path_factory.mktemp("trained") / "run"
    folder.mkdir()
    save_params(folder, 64, untrained(network, env, params))
    write_config(folder, config)
    return folder


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    """A folder of pretrained routers that holds that run as `small`."""
    folder = tmp_path_factory.mktemp("package") / "pretrained"
    write_pretrained(folder / "small", read_policy(run), runs.read_config(run / "config.yaml"), "{}\n")
    return folder


@pytest.fixture
def named(package, monkeypatch, tmp_path):
    """That folder in the place of the package's, in an empty working directory."""
    monkeypatch.setattr(runs, "_PRETRAINED_FOLDER", package)
    monkeypatch.setattr("jaxroute.commands.configured.use_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return package


# --- What is written ---------------------------------------------------------------------------------------


def test_the_files_are_plain_and_say_nothing_of_this_machine(package):
    assert sorted(path.name for path in (package / "small").iterdir()) == ["config.yaml", "params.npz", "results.json"]
    with np.load(package / "small" / "params.npz", allow_pickle=False) as archive:
        assert {archive[name].dtype for name in archive.files} == {np.dtype(np.float32)}
        assert all(name.startswith("params/") for name in archive.files)
    assert "/somewhere" not in (package / "small" / "config.yaml").read_text()
    assert "/elsewhere" not in (package / "small" / "config.yaml").read_text()


def test_parameters_are_those_of_the_run(named, run):
    chex.assert_trees_all_equal(read_policy("pretrained/small").params, jax.device_get(read_policy(run).params))


def test_only_float32_is_written(run, tmp_path):
    policy = read_policy(run)
    wide = replace(policy, params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), policy.params))
    with pytest.raises(UserError, match=r"is float64, and must be float32"):
        write_pretrained(tmp_path / "wide", wide, load_config(), "{}")
    assert not (tmp_path / "wide").exists()


# --- Every router of the package ---------------------------------------------------------------------------


def test_the_routers_of_the_package_load_and_route():
    for name in runs.pretrained_routers():
        folder = Path(runs.__file__).parent / "pretrained" / name
        assert all(path.stat().st_size < 1_000_000 for path in folder.iterdir())
        results = json.loads((folder / "results.json").read_text())
        assert results["router"] == name
        assert results["seconds_to_train"] > 0
        router = load_router(name)
        for site in ("edge3", "edge16"):  # a router moves between sites
            env, params = jaxroute.make("edge-poisson", site=site)
            load_policy(f"pretrained/{name}", env, params)
            obs, _ = env.reset(jax.random.key(0), params)
            assert 0 <= int(router(obs)) < env.num_experts


# --- By name wherever a run is taken -----------------------------------------------------------------------


def test_eval_takes_it(named):
    assert eval_main(["checkpoint=pretrained/small", "site=edge3", "policies=[random]", *SIZES, "output_dir=out"]) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["provenance"]["checkpoint"] == "pretrained/small"
    assert results["reference"] == "jaxroute"


def test_a_study_takes_it(named, run):
    routers = f"study.routers.mine=[pretrained/small,{run}]"
    setting = "study.settings=[{name: poisson}]"
    words = ["study=quick", "site=edge3", setting, "study.rules=[random]", routers, *SIZES, "output_dir=out"]
    assert eval_main(words) == 0
    with Path("out/study.csv").open() as file:
        values = {row["policy"]: row["mean"] for row in csv.DictReader(file) if row["metric"] == "avg_qos"}
    assert values["mine[0]"] == values["mine[1]"] == values["mine"]


def test_the_viewer_takes_it(named):
    words = ["view=jaxroute", "checkpoint=pretrained/small", "site=edge3", *SIZES, "output_dir=out"]
    assert eval_main(words) == 0
    assert "pretrained/small" in Path("out/view.html").read_text()


def test_the_export_takes_it(named):
    pytest.importorskip("flatbuffers")
    assert export_main(["pretrained/small", "--out", "router"]) == 0
    assert json.loads(Path("router/manifest.json").read_text())["checkpoint"] == "pretrained/small"


def test_a_run_is_exported_under_its_own_name(run):
    assert read_policy(run).label == "run, 64 steps"


def test_a_fork_starts_from_its_configuration(named, capsys):
    assert train_main(["fork=pretrained/small", "--cfg"]) == 0
    printed = capsys.readouterr().out
    assert "hidden: 8" in printed
    assert "fork: pretrained/small" in printed


def test_in_python(named):
    """As in the docstring: one observation, and many side by side."""
    router = load_router("small")
    env, params = jaxroute.make("edge-poisson", site="edge3", rate=4.0)
    obs, _ = env.reset(jax.random.key(0), params)
    expert = jax.jit(router)(obs)
    logits, _ = router.network.apply(router.params, router.network.prepare(obs))
    assert int(expert) == int(np.argmax(logits))
    several, _ = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(0), 3), params)
    assert jax.vmap(router)(several).shape == (3,)
    records = evaluate_policies(env, params, [router.policy], [4.0], seed=0, episodes=1, requests=10, warmup=2)
    assert list(records[4.0]) == ["jaxroute"]


def test_load_router_takes_runs_and_checkpoints(named, run):
    assert load_router(run).source == load_router(run / "checkpoints" / "64").source == run / "checkpoints" / "64"
    assert load_router("small").source == load_router("pretrained/small").source == Path("pretrained/small")
    assert jaxroute.load_router is load_router


# --- Which one is meant, and refusals ------------------------------------------------------------------------


def test_a_name_of_the_package_wins_over_a_folder(named, run):
    """The same command means the same router wherever it is typed."""
    here = Path("pretrained/small")
    shutil.copytree(run, here)
    assert run_of(here) == named / "small"
    assert read_policy(here.resolve()).source == here.resolve() / "checkpoints" / "64"
    Path("small").mkdir()
    assert load_router("small").source == here


def test_a_folder_of_another_name_is_a_run(named, run):
    shutil.copytree(run, "pretrained/mine")
    assert read_policy("pretrained/mine").source == Path("pretrained/mine/checkpoints/64")


@pytest.mark.parametrize(
    "words",
    [["eval", "checkpoint=NAME"], ["train", "fork=NAME"], ["eval", "study=quick", "study.routers.x=[NAME]"],
     ["export", "NAME", "--out", "out"]],
)  # fmt: skip
def test_an_unknown_name_is_refused_in_one_line(words, named, capsys):
    commands = {"eval": eval_main, "train": train_main, "export": export_main}
    command, *rest = [word.replace("NAME", "pretrained/smal") for word in words]
    assert commands[command](rest) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pretrained/smal: no router of that name comes with jaxroute (did you mean small?)" in error
    assert "choose one of pretrained/small" in error


def test_a_finished_router_cannot_be_resumed(named, capsys):
    assert train_main(["resume=pretrained/small"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "start a new run from it with fork=pretrained/small" in error


def test_a_network_for_one_number_of_experts_is_refused_elsewhere(tmp_path, monkeypatch):
    config = load_config(["site=edge3", "network=mlp", "network.hidden=8"])
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)
    weights = untrained(network, env, params)
    policy = runs.TrainedPolicy(network, jax.device_get(weights), tmp_path)
    write_pretrained(tmp_path / "flat", policy, config, "{}")
    monkeypatch.setattr(runs, "_PRETRAINED_FOLDER", tmp_path)
    other, other_params = jaxroute.make("edge-poisson")
    with pytest.raises(UserError, match=r"checkpoint pretrained/flat belongs to another network or site: .* 6 experts"):
        load_policy("pretrained/flat", other, other_params)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "pickle"])
def test_damaged_parameters_are_refused_in_one_line(damage, package, tmp_path, monkeypatch):
    shutil.copytree(package / "small", tmp_path / "small")
    path = tmp_path / "small" / "params.npz"
    if damage == "pickle":
        objects = np.empty(1, object)
        objects[0] = {"an": "object"}
        np.savez(path, **{"params/query": objects})
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:500]}[damage])
    monkeypatch.setattr(runs, "_PRETRAINED_FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"params\.npz cannot be read") as raised:
        read_policy("pretrained/small")
    assert "\n" not in str(raised.value)


# --- How they are made ---------------------------------------------------------------------------------------


def test_a_run_of_other_options_is_not_published(run, tmp_path):
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"was trained with another .* than `python train\.py"):
        recipe.make("edge6", run, [], tmp_path / "edge6", console)
    assert not (tmp_path / "edge6").exists()


def test_the_table_has_a_row_for_each_router(package, tmp_path, monkeypatch):
    shutil.copytree(package / "small", tmp_path / "small")
    both = {"router": {"mean": 0.5, "ci95": 0.1}, "rule": {"mean": 0.4, "ci95": 0.1}}
    judged = {"best_rule": "qos_greedy", "avg_qos": both, "qos_per_busy_second": both}
    results = {"trained_on": "a site", "seconds_to_train": 1234, "judged": dict.fromkeys(recipe.JUDGED, judged)}
    (tmp_path / "small" / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(runs, "_PRETRAINED_FOLDER", tmp_path)
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)
    header, _, row = recipe.table().splitlines()
    assert header.count("|") == row.count("|")
    assert row.startswith("| `pretrained/small` | a site | 0.500 | `qos_greedy` 0.400 | 0.500 | 0.400 |")
    assert row.endswith("| 1,234 |")

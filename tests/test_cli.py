"""train.py and eval.py as a user types them: what they write, what they print, and how they refuse."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxroute.commands.eval import main as eval_main
from jaxroute.commands.train import main as train_main
from jaxroute.config import config_folder, config_yaml, load_config, read_config
from jaxroute.devices import use_compilation_cache
from jaxroute.evaluation.metrics import METRICS
from jaxroute.networks import build_network
from jaxroute.runs import save_params, write_config
from jaxroute.scenarios import build_env

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
RULES = ("random", "shortest_queue")
RATE = 10.0
EVAL = (
    "eval.episodes=2", "eval.requests=40", "eval.warmup=10", "eval.loads=[1.0]", f"workload.rate={RATE}",
    f"policies=[{','.join(RULES)}]",
)  # fmt: skip
PPO = (
    "ppo.num_envs=8", "ppo.group_size=2", "ppo.num_steps=8", "ppo.num_minibatches=4", "ppo.total_steps=128",
    "train.log_interval=1",
)  # fmt: skip
WARM_START = ("warm_start.num_states=16", "warm_start.horizon=3", "warm_start.num_epochs=2")
# At loads, and in enough groups of environments, that some requests end within these few steps.
TINY = ("site=edge3", "train.loads=[0.25,1.75]", *PPO, *WARM_START, *EVAL)


def shell(program, *args, cwd):
    """Run a program as a new process without data, W&B account or network; compiled programs are kept as usual."""
    unset = ("JAXROUTE_DATA", "WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    nowhere = "http://127.0.0.1:9"
    env |= {"https_proxy": nowhere, "http_proxy": nowhere, "NETRC": str(cwd / "no-netrc"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / program), *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def training(folder):
    """A finished `python train.py`, tracked offline."""
    return shell("train.py", *TINY, "wandb.mode=offline", cwd=folder)


@pytest.fixture(scope="module")
def run(training, folder):
    """The run directory that it wrote."""
    assert training.returncode == 0, training.stderr
    (run,) = (folder / "outputs").iterdir()
    return run


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Each test starts in an empty folder, and leaves JAX as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXROUTE_DATA", raising=False)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def results_of(run):
    return strict_json((run / "results.json").read_text())


# --- a training run ----------------------------------------------------------------------------------------


def test_what_training_prints(training, run):
    assert training.stderr == ""
    assert "Training on cpu: 8 environments, 128 steps" in training.stdout
    assert "average QoS" in training.stdout
    for policy in ("jaxroute", *RULES):
        assert re.search(rf"^{policy} .*±", training.stdout, re.MULTILINE), policy
    written = run.relative_to(run.parents[1])
    assert f"Run directory: {written}" in training.stdout
    assert f"{written}/report.html" in training.stdout.replace("\n", "")
    assert re.fullmatch(r"\d{8}-\d{6}-train-poisson-seed0", run.name)


def test_configuration_of_a_run(run):
    assert read_config(run / "config.yaml") == load_config([*TINY, "wandb.mode=offline"])


def test_metrics_of_a_run(run):
    lines = [strict_json(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [64, 128]
    for line in lines:
        assert all(type(value) in (int, float) for value in line.values())
        assert line["train/steps_per_second"] > 0
        for share in ("train/avg_qos", "train/violation_rate", "train/rejection_rate", "ppo/clip_fraction"):
            assert 0 <= line[share] <= 1, share
        assert {"train/reward", "loss/policy", "loss/value", "ppo/entropy", "ppo/approx_kl"} <= set(line)


def test_checkpoints_of_a_run(run):
    """The first is what the warm start has led to."""
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [0, 64, 128]


def assert_results(run, reference, site="edge3", policies=RULES):
    """The files of an evaluation hold what the documentation promises."""
    results = results_of(run)
    assert (results["workload"], results["site"], results["bank"]) == ("poisson", site, "embedded")
    assert (results["episodes"], results["requests"], results["warmup"]) == (2, 40, 10)
    assert results["reference"] == reference
    expected = {*policies, *([reference] if reference else [])}
    assert set(results["policies"]) == expected
    for name, metrics in results["policies"].items():
        # All but those of limits that no request has.
        unlimited = {f"{name}_violation_rate" for name in ("ttft", "tpot", "e2e")}
        assert list(metrics) == [name for name in METRICS if name not in unlimited]
        assert set(metrics["avg_qos"]) == {"mean", "ci95"}
        assert 0 <= metrics["avg_qos"]["mean"] <= 1
        assert 0 <= metrics["violation_rate"]["mean"] <= 1
        assert len(metrics["expert_share"]) == len(results["experts"])
        assert sum(metrics["expert_share"]) == pytest.approx(1 - metrics["declined_rate"]["mean"]), name
    assert [load["rate"] for load in results["loads"]] == [results["rate"]] == [RATE]
    assert set(results["paired_difference"]) == (set(policies) if reference else set())
    assert {"jaxroute", "jax", "backend", "command"} <= set(results["provenance"])

    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["workload", "rate", "policy", "metric", "mean", "ci95"]
    from_csv = {row["policy"]: float(row["mean"]) for row in rows if row["metric"] == "avg_qos"}
    assert from_csv == pytest.approx(
        {name: metrics["avg_qos"]["mean"] for name, metrics in results["policies"].items()}
    )

    figures = list(run.glob("*.png"))
    assert len(figures) == 5
    assert all(figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for figure in figures)
    report = (run / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 5
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", report)  # one file, nothing fetched


def test_results_of_a_run(run):
    assert_results(run, "jaxroute")


def test_wandb_offline_needs_neither_network_nor_account(run):
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))


# --- judging -----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_judging_a_run_again_gives_the_same_numbers(run):
    judged = shell("eval.py", "site=edge3", *EVAL, f"checkpoint={run}", "output_dir=again", cwd=Path.cwd())
    assert (judged.returncode, judged.stderr) == (0, "")
    again, first = results_of(Path("again")), results_of(run)
    for results in (again, first):
        del results["provenance"]["command"], results["provenance"]["checkpoint"]  # absolute here, relative there
    assert again == first
    assert_results(Path("again"), "jaxroute")
    assert read_config(Path("again/eval_config.yaml")).checkpoint == str(run)


def test_judging_the_rules_alone():
    assert eval_main(["site=edge3", *EVAL, "output_dir=rules"]) == 0
    assert_results(Path("rules"), None)


@pytest.mark.exhaustive
def test_a_checkpoint_of_the_han_runs_on_a_site_with_more_experts(run, capsys):
    early = run / "checkpoints" / "64"
    assert eval_main(["site=edge6", *EVAL, "policies=[random]", f"checkpoint={early}"]) == 0
    (written,) = Path("outputs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-eval-poisson-embedded", written.name)
    assert f"{written}/report.html" in capsys.readouterr().out.replace("\n", "")
    assert_results(written, "jaxroute", site="edge6", policies=["random"])
    assert results_of(written)["provenance"]["checkpoint"] == str(early)
    assert len(results_of(written)["experts"]) == 6


def test_the_compilation_cache_is_the_users(monkeypatch):
    options = {"jax_compilation_cache_dir": "mine", "jax_persistent_cache_min_compile_time_secs": 0.5}
    for option, value in options.items():
        monkeypatch.setenv(option.upper(), str(value))
        jax.config.update(option, value)  # as JAX does at its start
    use_compilation_cache()
    assert {option: getattr(jax.config, option) for option in options} == options
    for option in options:
        monkeypatch.delenv(option.upper())
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(Path("cache/jaxroute/xla"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("main", "program"), [(train_main, "train"), (eval_main, "eval")])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(main, program, flag, capsys):
    assert main([flag]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^usage: (\S*/)?python\S* -m jaxroute {program} \[", said, re.MULTILINE)
    for group in config_folder().iterdir():
        for choice in group.glob("[!_]*.yaml"):
            assert re.search(rf"{group.name}=.*\b{choice.stem}\b", said), choice
    assert main(["--help=all"]) == 0
    said = capsys.readouterr().out
    for option in ("seed", "checkpoint", "policies", "num_envs", "learning_rate", "log_interval", "loads", "mode"):
        assert re.search(rf"\b{option}\b", said), option
    assert not list(Path.cwd().iterdir())


def test_cfg_prints_what_would_run(capsys):
    assert train_main(["--cfg", *TINY]) == 0
    printed = capsys.readouterr().out
    assert printed == config_yaml(load_config(TINY))
    Path("config.yaml").write_text(printed)
    assert read_config(Path("config.yaml")) == load_config(TINY)


# --- mistakes ----------------------------------------------------------------------------------------------


def refuses(main, *args, capsys):
    """Check that a command ends with code 2 and one line, having written nothing; return the line."""
    before = snapshot()
    assert main(list(args)) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", said), said
    assert snapshot() == before
    return said


def snapshot():
    return {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}


@pytest.mark.parametrize("main", [train_main, eval_main])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["polices=[random]"], "unknown option polices (did you mean policies?)"),
        (["site=edge4"], "unknown site edge4"),
        (["site=edge3", "workload=azure_conv"], "set JAXROUTE_DATA or data_dir"),
        (["site=edge3", "bank=zeroeval", "data_dir=nowhere"], "nowhere/zeroeval/queries.parquet does not exist"),
    ],
)
def test_bad_command(main, args, message, capsys):
    assert message in refuses(main, *args, capsys=capsys)


@pytest.mark.parametrize("main", [eval_main, train_main])
def test_unknown_policy(main, capsys, monkeypatch):
    monkeypatch.setattr("jaxroute.training.train", lambda *args: pytest.fail("it trained"))
    said = refuses(main, *TINY, "policies=[shortest_que]", "output_dir=new", capsys=capsys)
    assert "policies: shortest_que is unknown (did you mean shortest_queue?)" in said


def test_no_policy_at_all(capsys):
    assert "policies" in refuses(eval_main, *TINY, "policies=[]", capsys=capsys)


@pytest.mark.parametrize("main", [train_main, eval_main])
def test_output_folder_that_is_a_file(main, capsys):
    Path("taken").touch()
    assert "taken" in refuses(main, *TINY, "output_dir=taken", capsys=capsys)


def test_training_into_a_run(run, capsys):
    shutil.copytree(run, "run")
    said = refuses(train_main, *TINY, "output_dir=run", capsys=capsys)
    assert "run holds the checkpoints of another training; name another output_dir" in said


def test_checkpoint_that_does_not_exist(capsys):
    said = refuses(eval_main, "site=edge3", "checkpoint=outputs/none", capsys=capsys)
    assert "checkpoint outputs/none does not exist; give a run directory" in said


def test_folder_that_is_no_run(capsys):
    Path("pictures/holiday").mkdir(parents=True)
    assert "checkpoint pictures/holiday: there is no config.yaml" in refuses(
        eval_main, "site=edge3", "checkpoint=pictures/holiday", capsys=capsys
    )


def test_run_without_checkpoint(capsys):
    config = load_config(["site=edge3"])
    Path("run").mkdir()
    write_config(Path("run"), config)
    assert "run run holds no checkpoint" in refuses(eval_main, "site=edge3", "checkpoint=run", capsys=capsys)


def test_checkpoint_of_another_network(capsys):
    """The flat network is for one number of experts; parameters that were never trained show it as well."""
    config = load_config(["site=edge3", "network=mlp"])
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)

    def fresh(key):
        return network.init(key, network.prepare(env.reset(key, params)[0]))

    shapes = jax.eval_shape(fresh, jax.random.key(0))
    Path("flat").mkdir()
    write_config(Path("flat"), config)
    save_params(Path("flat"), 64, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    said = refuses(eval_main, "site=edge6", *EVAL, "checkpoint=flat", capsys=capsys)
    assert "checkpoint flat/checkpoints/64 belongs to another network or site" in said
    assert "6 experts" in said


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:20])])
def test_damaged_checkpoint(damage, run, capsys):
    shutil.copytree(run, "run")
    damage(Path("run/checkpoints/128/_METADATA"))
    said = refuses(eval_main, "site=edge3", *EVAL, "checkpoint=run", capsys=capsys)
    assert re.search(r"checkpoint run/checkpoints/128 cannot be read \(\w+\); is it complete\?", said)


def test_damaged_checkpoint_in_a_shell(run):
    """No warning and no stack trace of a library reaches the terminal, either."""
    shutil.copytree(run, "run")
    Path("run/checkpoints/128/manifest.ocdbt").unlink()
    refused = shell("eval.py", "site=edge3", *EVAL, "checkpoint=run", cwd=Path.cwd())
    assert (refused.returncode, refused.stdout) == (2, "")
    assert [path.name for path in Path.cwd().iterdir()] == ["run"]
    assert refused.stderr.startswith("error: checkpoint run/checkpoints/128 cannot be read")
    assert refused.stderr.count("\n") == 1


def test_judging_into_a_run_leaves_it_as_it_was(run):
    shutil.copytree(run, "run")
    before = Path("run/config.yaml").read_text()
    eval_main(["site=edge3", "network=mlp", *EVAL, "output_dir=run"])
    assert Path("run/config.yaml").read_text() == before

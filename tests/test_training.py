"""The host's side of training, checkpoints, and the paired evaluation of policies."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxroute
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.evaluation import episodes, evaluate_policies
from jaxroute.evaluation.metrics import Outcome
from jaxroute.learning import Learner, PPOState
from jaxroute.policies import rules_named
from jaxroute.runs import latest_checkpoint, load_policy
from jaxroute.scenarios import build_env, on_test_prompts
from jaxroute.training import train
from jaxroute.training.loop import with_default_sizes
from jaxroute.training.tracking import Tracker

pytestmark = pytest.mark.slow

# The sizes of test_cli.py, so that programs that it has compiled are found in the cache.
TINY = (
    "site=edge3", "warm_start.num_states=0",
    "ppo.num_envs=8", "ppo.num_steps=8", "ppo.num_minibatches=4", "ppo.total_steps=128",
    "train.log_interval=1",
)  # fmt: skip
TRAIN = importlib.import_module("jaxroute.training.loop")  # the module; the package exports the function
SLOTS = 6  # of each expert of edge3
SETTINGS = {"episodes": 2, "requests": 40, "warmup": 10}
RATE = 10.0


def quiet():
    return Console(file=io.StringIO(), width=120)


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{key: value for key, value in line.items() if key != "train/steps_per_second"} for line in lines]


# --- training ----------------------------------------------------------------------------------------------


class Once:
    """Builds a learner the first time and returns the same one after that: what it compiled is shared."""

    def __init__(self, make):
        self.make, self.learner = make, None

    def __call__(self, *args, **kwargs):
        self.learner = self.learner or self.make(*args, **kwargs)
        return self.learner


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three short runs of one compiled learner: the parameters that training returned, and the folder."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAIN, "make_ppo", Once(TRAIN.make_ppo))
        for name, seed in (("first", 0), ("again", 0), ("other", 1)):
            folder = tmp_path_factory.mktemp("training") / name
            runs[name] = (train(load_config([*TINY, f"seed={seed}"]), folder, quiet()), folder)
    return runs


def test_the_same_seed_gives_the_same_run(trained):
    (params, folder), (again, folder_again) = trained["first"], trained["again"]
    chex.assert_trees_all_equal(params, again)
    assert without_speed(metrics_of(folder)) == without_speed(metrics_of(folder_again))


def test_another_seed_gives_another_run(trained):
    (params, folder), (other, other_folder) = trained["first"], trained["other"]
    assert jax.tree.structure(params) == jax.tree.structure(other)
    different = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True)]
    assert np.mean(different) > 0.9
    for line, other_line in zip(metrics_of(folder), metrics_of(other_folder), strict=True):
        assert line["steps"] == other_line["steps"]
        assert line["train/reward"] != other_line["train/reward"]


def test_parameters_are_finite_and_move(trained, scenario):
    params, folder = trained["first"]
    chex.assert_tree_all_finite(params)
    earlier = load_policy(folder / "checkpoints" / "64", *scenario).params
    moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(earlier), strict=True)]
    assert np.mean(moved) > 0.9


class Counting:
    """Makes a learner that does nothing but count, with metrics to choose."""

    def __init__(self, **metrics):
        self.metrics = {
            "num_completed": 3.0,
            "rejected": 1.0,
            "declined": 1.0,
            "qos_sum": 2.0,
            "num_late": 1.0,
            "num_lost": 0.0,
            "overflowed": 0.0,
            **metrics,
        }

    def __call__(self, config, env, env_params, network, updates_per_call=1, many_seeds=False):
        def update(state):
            self.updates += updates_per_call
            return state, self.metrics

        self.updates, self.asked = 0, config
        steps = config.num_envs * config.num_steps
        state = PPOState({"w": jnp.zeros(2)}, (), (), (), jax.random.key(0), jnp.int32(0))
        return Learner(lambda key: state, update, steps, config.total_steps // steps)


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Run the host loop around a learner that only counts; return the lines of metrics and the learner."""

    def run(*overrides, judge=None, **metrics):
        learner = Counting(**metrics)
        monkeypatch.setattr(TRAIN, "make_ppo", learner)
        train(load_config([*TINY, *overrides]), tmp_path / "run", quiet(), judge)
        return metrics_of(tmp_path / "run"), learner

    return run


def test_what_the_host_looks_at(watch, tmp_path):
    lines, learner = watch("ppo.total_steps=1024", "train.log_interval=2")
    assert learner.updates == 16
    assert [line["steps"] for line in lines] == list(range(128, 1025, 128))
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [256, 512, 768, 1024]  # four times, and at the end
    assert lines[0]["train/avg_qos"] == 2 / 5
    assert [lines[0][f"train/{name}_rate"] for name in ("violation", "rejection", "declined", "lost")] == [
        1 / 5
    ] * 3 + [0]


def test_a_run_shorter_than_the_interval(watch):
    lines, learner = watch("ppo.total_steps=130", "train.log_interval=5")
    assert learner.updates == 2
    assert [line["steps"] for line in lines] == [128]


def test_updates_that_do_not_fill_a_call(watch):
    """Nine updates are three calls of three, not one of five."""
    lines, learner = watch("ppo.total_steps=576", "train.log_interval=5")
    assert learner.updates == 9
    assert [line["steps"] for line in lines] == [192, 384, 576]


def test_no_rates_where_no_request_has_ended(watch):
    lines, _ = watch(num_completed=0.0, rejected=0.0, declined=0.0, qos_sum=0.0, num_late=0.0)
    assert [line["steps"] for line in lines] == [64, 128]
    rates = {f"train/{name}_rate" for name in ("violation", "rejection", "declined", "lost")}
    assert not {"train/avg_qos", *rates} & set(lines[0])


def test_a_folder_that_holds_a_training_is_left_alone(watch, tmp_path):
    watch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for left in ("checkpoints", "metrics.jsonl"):
        with pytest.raises(UserError, match=rf"run holds the {left} of another training; name another output_dir$"):
            watch("seed=1", "ppo.total_steps=64")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        before = {path: content for path, content in before.items() if path.exists()}


def test_wandb_is_given_what_the_run_has_led_to(watch, tmp_path, monkeypatch):
    logged, summary, codes, artifacts = [], {}, [], []
    started = SimpleNamespace(
        id="abc",
        log=logged.append,
        summary=summary,
        log_artifact=artifacts.append,
        finish=lambda exit_code: codes.append(exit_code),
    )
    monkeypatch.setattr("jaxroute.training.tracking._start_wandb", lambda *args: started)

    def judge():
        (tmp_path / "run" / "results.csv").write_text("policy,mean\njaxroute,0.5\n")
        return {"eval/avg_qos": 0.5}

    lines, _ = watch("wandb.mode=offline", judge=judge)
    assert logged[:-1] == lines
    assert logged[-1]["eval/results"].data == [["jaxroute", "0.5"]]
    assert (summary, codes) == ({"eval/avg_qos": 0.5}, [0])
    (router,) = artifacts
    assert router.type == "model"
    assert "config.yaml" in router.manifest.entries
    assert any(name.startswith("checkpoints/") for name in router.manifest.entries)


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.init", lambda **options: begun.append(options) or MagicMock())
    config = load_config(["site=edge3", "wandb.mode=online", "wandb.tags=[a,b]", "wandb.group=g"])
    for _ in range(2):
        with Tracker(tmp_path, config, pytest.fail):
            pass
    first, second = begun
    assert first == second
    assert (first["resume"], first["tags"], first["group"]) == ("allow", ["a", "b"], "g")
    assert first["config"]["jaxroute_version"] == jaxroute.__version__
    (tmp_path / "other").mkdir()
    with Tracker(tmp_path / "other", config, pytest.fail):
        pass
    assert begun[2]["id"] != first["id"]


def test_divergence_is_reported(watch, tmp_path):
    with pytest.raises(UserError, match=r"^training diverged at step 64: loss/value is nan; lower ppo\.learning_rate$"):
        watch("ppo.total_steps=128", "train.log_interval=1", **{"loss/value": float("nan")})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_metrics_of_a_diverged_run_are_still_json(watch, tmp_path):
    with pytest.raises(UserError, match="diverged"):
        watch("ppo.total_steps=128", "train.log_interval=1", **{"loss/value": float("nan")})
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_default_sizes_suit_the_minibatches():
    filled = with_default_sizes(load_config(["site=edge3", "ppo.num_minibatches=3", "bank=zeroeval"])).ppo
    assert filled.num_envs > 0
    assert filled.num_envs % 3 == 0
    assert filled.num_envs % filled.group_size == 0
    given = load_config([*TINY, "bank=zeroeval"])
    assert with_default_sizes(given).ppo == given.ppo


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenario():
    """The site with prompts that training has not seen, as `eval.py` builds it."""
    return build_env(on_test_prompts(load_config(TINY)))


def test_a_checkpoint_holds_the_parameters(trained, scenario):
    params, folder = trained["first"]
    assert latest_checkpoint(folder) == folder / "checkpoints" / "128"
    for path in (folder, str(folder), folder / "checkpoints" / "128"):
        policy = load_policy(path, *scenario)
        assert policy.source == folder / "checkpoints" / "128"
        chex.assert_trees_all_equal(policy.params, params)
        chex.assert_trees_all_equal_dtypes(policy.params, params)


def test_the_latest_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    for name in ("9", "10", "2", "11.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == "10"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"hidden: 32", "hidden: 64", r"another network or site: \['params'\].* is \(.*\), but \(.*\) is needed"),
        (r"kind: han", "kind: mlp", r"another network or site: .*absent"),
        (r"kind: han", "kind: gnn", r"config\.yaml: network: kind=gnn is unknown"),
        (r"use_impact", "use_impacts", r"config\.yaml: unknown option network\.use_impacts \(did you mean"),
    ],
)
def test_a_configuration_that_does_not_fit(old, new, message, trained, scenario, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained["first"][1], run)
    config = run / "config.yaml"
    config.write_text(re.sub(old, new, config.read_text(), count=1))
    with pytest.raises(UserError, match=message) as raised:
        load_policy(run, *scenario)
    assert "\n" not in str(raised.value)


# --- evaluation --------------------------------------------------------------------------------------------


def judge(scenario, rates=(RATE,), seed=1_000_000, **changes):
    policies = rules_named(["random", "shortest_queue"])
    return evaluate_policies(*scenario, policies, rates, seed=seed, **SETTINGS | changes)


@pytest.fixture(scope="module")
def judged(scenario):
    """Records of two rules, and how many programs it took."""
    before = episodes._episodes._cache_size()
    records = judge(scenario)[RATE]
    return records, episodes._episodes._cache_size() - before


def test_one_program_serves_all_policies(judged, scenario):
    assert judged[1] <= 1
    before = episodes._episodes._cache_size()
    judge(scenario, seed=3)
    assert episodes._episodes._cache_size() == before


def test_same_seed_same_records(judged, scenario):
    again = judge(scenario)[RATE]
    for name, records in judged[0].items():
        jax.tree.map(np.testing.assert_array_equal, records, again[name])
    other = judge(scenario, seed=2)[RATE]["random"]
    assert (other.duration != judged[0]["random"].duration).all()


def test_records_are_on_the_host(judged):
    episodes, requests = SETTINGS["episodes"], SETTINGS["requests"] + SETTINGS["warmup"]
    for records in judged[0].values():
        limits = {f"limits.{name}": column for name, column in records.limits._asdict().items() if column is not None}
        for field, column in (records._replace(limits=())._asdict() | limits).items():
            if field == "limits":
                continue
            assert type(column) is np.ndarray, field
            whole = ("busy_seconds", "kv_token_seconds", "duration", "load_counts", "choice_counts")
            per_request = field not in whole
            assert column.shape[:2] == (episodes, requests) if per_request else column.shape[0] == episodes, field
        assert records.status.dtype == np.int8
        assert records.busy_seconds.shape == records.kv_token_seconds.shape == (episodes, 3)


def test_common_random_numbers(judged):
    """Every policy meets the same requests at the same times; what differs is where they go."""
    a, b = judged[0]["random"], judged[0]["shortest_queue"]
    np.testing.assert_array_equal(a.limits.normalised, b.limits.normalised)
    np.testing.assert_array_equal(a.duration, b.duration)
    same = a.expert == b.expert
    assert same.any()
    assert not same.all()
    np.testing.assert_array_equal(a.quality[same], b.quality[same])
    np.testing.assert_array_equal(a.output_tokens[same], b.output_tokens[same])
    assert (a.output_tokens[~same] != b.output_tokens[~same]).mean() > 0.9
    assert (a.limits.normalised[0] != a.limits.normalised[1]).any(), "seeds differ"


def test_another_rate_brings_the_same_requests_faster(scenario):
    # One seed at two rates is as many episodes as two seeds at one rate: the same program.
    records = judge(scenario, rates=(5.0, 20.0), episodes=1)
    slow, fast = records[5.0]["random"], records[20.0]["random"]
    np.testing.assert_array_equal(slow.limits.normalised, fast.limits.normalised)
    np.testing.assert_allclose(slow.duration, 4 * fast.duration, rtol=1e-5)


def test_what_happens_to_requests(judged):
    for records in judged[0].values():
        completed, rejected = records.status == Outcome.COMPLETED, records.status == Outcome.REJECTED
        in_flight = records.status == Outcome.IN_FLIGHT
        assert (completed | rejected | in_flight).all()
        assert completed.any()
        assert rejected.any()
        assert in_flight.sum(axis=1).max() <= 3 * SLOTS
        for expert in range(3):
            assert (in_flight & (records.expert == expert)).sum(axis=1).max() <= SLOTS
        for column in (records.ttft, records.latency):
            np.testing.assert_array_equal(np.isnan(column), ~completed)
        assert (records.ttft[completed] > 0).all()
        assert (records.latency[completed] >= records.ttft[completed]).all()
        assert (records.preemptions[~completed] == 0).all()
        assert (records.preemptions >= 0).all()
        assert (records.output_tokens >= 1).all()
        assert ((records.expert >= 0) & (records.expert < 3)).all()
        assert set(np.unique(records.quality)) <= {0.0, 1.0}
        assert (records.busy_seconds > 0).all()
        assert (records.busy_seconds <= records.duration[:, None] + 1).all()  # an iteration may reach over the end


def test_nothing_is_rejected_before_a_queue_is_full(judged):
    """The first requests find an idle site: nobody is turned away while fewer have come than one expert holds."""
    for records in judged[0].values():
        assert (records.status[:, :SLOTS] != Outcome.REJECTED).all()

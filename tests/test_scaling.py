"""Scale out: many seeds in one program, many devices, many processes give what one of each gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.config import load_config
from jaxroute.devices import usable_cores
from jaxroute.errors import UserError
from jaxroute.learning import make_ppo
from jaxroute.networks import build_network
from jaxroute.runs import latest_checkpoint, load_policy
from jaxroute.scenarios import build_env, training_env

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "site=edge3", "warm_start.num_states=0",
    "ppo.num_envs=16", "ppo.group_size=2", "ppo.num_steps=32", "ppo.num_minibatches=2", "ppo.total_steps=1024",
    "train.log_interval=1", "train.evaluate=false", "network=mlp",
)  # fmt: skip


def start(*overrides, folder, devices=1, **variables):
    """Start `python train.py` on so many devices of a CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()} | variables
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"output_dir={folder}", *overrides]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


def train(*overrides, folder, **settings):
    code, output, errors = finish(start(*overrides, folder=folder, **settings))
    assert code == 0, errors
    return output


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/steps_per_second"} for line in lines]


def params_of(run):
    scenario = build_env(load_config(TINY))
    return jax.tree.map(np.asarray, load_policy(run, *scenario).params)


def assert_same_training(run, other):
    """Sums are taken in another order, and Adam's first steps enlarge that."""
    for line, other_line in zip(metrics_of(run), metrics_of(other), strict=True):
        assert line == pytest.approx(other_line, rel=1e-3, abs=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params_of(run), params_of(other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scaling")


@pytest.fixture(scope="module")
def alone(folder):
    """A training of one seed on one device by one process."""
    train(folder=folder / "alone")
    return folder / "alone"


# --- devices -----------------------------------------------------------------------------------------------


def test_eight_devices_train_as_one(alone, folder):
    output = train(folder=folder / "devices", devices=8)
    assert "Training on cpu (8 devices): 16 environments, 1,024 steps" in output
    assert_same_training(folder / "devices", alone)


def test_environments_that_do_not_divide(folder):
    code, _, errors = finish(start("ppo.num_envs=18", folder=folder / "uneven", devices=8))
    assert code == 2
    assert errors == (
        "error: ppo: num_envs=18 on 8 devices must be a multiple of 16: on each device, num_minibatches=2 and "
        "group_size=2 must divide them\n"
    )
    assert not (folder / "uneven").exists()


# --- processes ---------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_two_processes_train_as_one(alone, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    started = [
        start("train.distributed=true", folder=folder / "processes", devices=2, **shared, JAX_PROCESS_ID=str(number))
        for number in range(2)
    ]
    (code, output, errors), (other_code, other_output, other_errors) = [finish(process) for process in started]
    assert code == 0, errors
    assert other_code == 0, other_errors
    assert "Training on cpu (4 devices)" in output
    assert not [line for line in other_output.splitlines() if not line.startswith("[Gloo]")]
    assert_same_training(folder / "processes", alone)


def test_processes_that_are_not_known(folder):
    code, _, errors = finish(start("train.distributed=true", folder=folder / "unknown"))
    assert code == 2
    assert errors.startswith("error: train.distributed: ")
    assert errors.count("\n") == 1


# --- seeds -------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_many_seeds_are_as_many_trainings(alone, folder):
    run = folder / "seeds"
    output = train("train.num_seeds=2", folder=run)
    assert "2 seeds of 16 environments" in output
    assert f"study.routers.jaxroute=[{run}/seed0,{run}/seed1]" in output.replace("\n", "")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params_of(run / "seed0"), params_of(alone))
    assert latest_checkpoint(run / "seed1").name == "1024"
    for line, of_first in zip(metrics_of(run), metrics_of(alone), strict=True):
        assert line["steps"] == of_first["steps"]
        of_seeds = [line[f"train/avg_qos_seed{seed}"] for seed in range(2)]
        assert of_seeds[0] == pytest.approx(of_first["train/avg_qos"], rel=1e-3)
        assert of_seeds[0] != of_seeds[1]
        assert line["train/avg_qos"] == pytest.approx(np.mean(of_seeds))
    with pytest.raises(UserError, match=r"trained 2 seeds; name one of them, e\.g\. .*seed0$"):
        latest_checkpoint(run)


def test_many_seeds_are_traced_once():
    config = load_config(TINY)
    env, params = training_env(config)
    learner = make_ppo(config.ppo, env, params, build_network(config.network, config.env.away), many_seeds=True)
    state = learner.init(jnp.stack([jax.random.key(seed) for seed in range(3)]))
    for _ in range(2):
        state, metrics = learner.update(state)
    assert learner.update._cache_size() == 1
    assert metrics["train/reward"].shape == (3,)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be set here")
def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)

"""Long runs survive: what is interrupted goes on exactly, and what is damaged is noticed."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxroute.commands.train import main as train_main
from jaxroute.config import load_config, read_config
from jaxroute.errors import UserError
from jaxroute.learning import PPOConfig, PPOState, make_ppo
from jaxroute.runs import read_policy
from jaxroute.training import memory, states, train
from jaxroute.training.lock import locked
from jaxroute.training.programs import Programs
from jaxroute.training.tracking import Tracker
from jaxroute.training.warm_start import SeedStart

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TRAIN = importlib.import_module("jaxroute.training.loop")  # the module; the package exports the function
# Eight calls of one update; parameters are saved at every second, states at every one.
TINY = (
    "site=edge3", "warm_start.num_states=0", "network=mlp", "ppo.total_steps=512",
    "ppo.num_envs=8", "ppo.group_size=2", "ppo.num_steps=8", "ppo.num_minibatches=4",
    "train.log_interval=1", "train.save_interval=1", "train.evaluate=false",
)  # fmt: skip


def go(config, run):
    """Train, and return the parameters and what was printed."""
    said = io.StringIO()
    return train(config, run, Console(file=said, width=200)), said.getvalue()


def resumed_config(run):
    return replace(read_config(run / "config.yaml"), resume=str(run))


def resume(run):
    return go(resumed_config(run), run)


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/steps_per_second"} for line in lines]


def saved_in(run):
    return sorted(int(path.name) for path in (run / "states").iterdir() if path.name.isdigit())


class Once:
    """Builds a learner of each length the first time, and returns the same one after that."""

    def __init__(self, make):
        self.make, self.made = make, {}

    def __call__(self, config, *args, many_seeds, **kwargs):
        key = config.total_steps, many_seeds
        self.made[key] = self.made.get(key) or self.make(config, *args, many_seeds=many_seeds, **kwargs)
        return self.made[key]


@pytest.fixture(scope="module", autouse=True)
def one_learner():
    """What is compiled is shared by all trainings of one shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TRAIN, "make_ppo", Once(make_ppo))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted: its parameters and its folder."""
    run = tmp_path_factory.mktemp("resume") / "whole"
    return go(load_config(TINY), run)[0], run


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Return a function that trains until so many steps are logged, where `happens` is called."""

    def start(steps, happens, *overrides):
        log = Tracker.log

        def log_and_stop(self, metrics):
            log(self, metrics)
            if metrics["steps"] == steps:
                happens()

        run = tmp_path / "stopped[1]*?"  # Orbax takes such a name for a pattern
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, "log", log_and_stop)
            with pytest.raises((SystemExit, OSError)) as raised:
                go(load_config([*TINY, *overrides]), run)
        return run, raised.value

    return start


def crash():
    raise OSError("power failure")


# --- resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "number"), [(64, signal.SIGTERM), (320, signal.SIGINT)])
def test_a_signal_saves_what_a_resumed_run_goes_on_from(steps, number, whole, stopped):
    run, error = stopped(steps, lambda: signal.raise_signal(number))
    assert isinstance(error, SystemExit)
    assert error.code == 128 + number
    assert max(saved_in(run)) == steps
    params, _ = resume(run)
    chex.assert_trees_all_equal(params, whole[0])
    assert metrics_of(run) == metrics_of(whole[1])
    chex.assert_trees_all_equal(read_policy(run).params, whole[0])


def test_what_a_crash_left_after_the_last_state_is_done_again(whole, stopped):
    run, _ = stopped(448, crash, "train.save_interval=3")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"steps": 5')  # the power failed here
    (run / "states" / "448.orbax-checkpoint-tmp").mkdir()  # in the middle of writing
    (run / "states" / "64" / "state").mkdir(parents=True)  # in the middle of deleting
    assert max(saved_in(run)) == 384
    params, _ = resume(run)
    chex.assert_trees_all_equal(params, whole[0])
    assert metrics_of(run) == metrics_of(whole[1])
    assert not {"448.orbax-checkpoint-tmp", "64"} & {path.name for path in (run / "states").iterdir()}


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    chex.assert_trees_all_equal(resume(run)[0], whole[0])
    assert metrics_of(run) == metrics_of(whole[1])


def test_the_last_states_and_the_best_are_kept(whole):
    best = max(metrics_of(whole[1]), key=lambda line: line["train/avg_qos"])["steps"]
    assert saved_in(whole[1]) == sorted({448, 512, best})


@pytest.mark.exhaustive
def test_many_seeds_are_resumed_as_one(stopped, tmp_path):
    many = ("train.num_seeds=2",)
    params, _ = go(load_config([*TINY, *many]), tmp_path / "whole")
    run, _ = stopped(192, lambda: signal.raise_signal(signal.SIGTERM), *many)
    chex.assert_trees_all_equal(resume(run)[0], params)
    assert metrics_of(run) == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume={run}", "ppo.learning_rate=0.1"), r"ppo\.learning_rate=0\.1: a resumed run keeps its options.*fork="),
        (("resume={run}/states/512",), r"is a part of a run; resume=\S+/whole goes on with it"),
        (("resume=nowhere",), r"resume nowhere does not exist; give a run directory"),
        (("fork=nowhere",), r"fork nowhere does not exist; give a run directory"),
        (("fork={run}", "resume={run}"), r"choose one of them"),
        (("fork={run}", "train.distributed=true"), r"resume and fork are for one process"),
    ],
)
def test_what_is_refused(arguments, message, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxroute.training.join_processes", lambda: None)
    assert train_main([argument.format(run=whole[1]) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: .*{message}", said)
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- warm start --------------------------------------------------------------------------------------------

# Steps: 2 calls and 3 epochs in the first round, the same in the second.
WARM = (*(option for option in TINY if not option.startswith(("warm_start", "ppo.total_steps"))),
    "ppo.total_steps=128", "warm_start.num_states=16", "warm_start.horizon=2", "warm_start.num_epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def one_program_each():
    """What is compiled is shared by all warm starts."""
    start, started = Programs.start, {}

    def start_once(self, name, lower):
        started[name] = started.get(name) or start(self, name, lower)
        return started[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "start", start_once)
        yield


@pytest.fixture(scope="module")
def whole_warm(one_program_each, one_learner, tmp_path_factory):
    run = tmp_path_factory.mktemp("warm") / "whole"
    return go(load_config(WARM), run)[0], run


@pytest.fixture
def stopped_warm(tmp_path, monkeypatch):
    """Return a function that trains until so many steps of the warm start are done, where `happens` is called."""

    def start(step, happens, *overrides, run=None):
        run, steps = run or tmp_path / "stopped", iter(range(1, 1000))
        after = SeedStart._after_step

        def count(self, *args):
            if next(steps) == step:
                happens()
            after(self, *args)

        config = resumed_config(run) if run.exists() else load_config([*WARM, *overrides])
        with monkeypatch.context() as patch:
            patch.setattr(SeedStart, "_after_step", count)
            with pytest.raises((SystemExit, OSError)) as raised:
                go(config, run)
        return run, raised.value

    return start


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 9, 10], ids=lambda step: f"step {step} of 10")
def test_a_signal_in_the_warm_start_loses_nothing(step, whole_warm, stopped_warm):
    run, error = stopped_warm(step, lambda: signal.raise_signal(signal.SIGTERM))
    assert isinstance(error, SystemExit)
    assert error.code == 128 + signal.SIGTERM
    params, _ = resume(run)
    chex.assert_trees_all_equal(params, whole_warm[0])
    assert metrics_of(run) == metrics_of(whole_warm[1])
    assert not (run / "warm_start").exists()


def test_a_crash_in_the_warm_start_loses_what_came_after_the_last_save(whole_warm, stopped_warm):
    """Twice: between two saves, and after labels were written that the saved stage does not know of."""
    run, _ = stopped_warm(6, crash, "train.save_interval=2")
    (stage,) = (run / "warm_start").glob("*/stage.npz")
    before = stage.read_bytes()
    stopped_warm(2, crash, run=run)
    stage.write_bytes(before)
    params, _ = resume(run)
    chex.assert_trees_all_equal(params, whole_warm[0])
    assert metrics_of(run) == metrics_of(whole_warm[1])


def test_a_crash_before_anything_is_saved(whole_warm, stopped_warm):
    run, _ = stopped_warm(1, crash)
    assert not (run / "warm_start").exists()
    chex.assert_trees_all_equal(resume(run)[0], whole_warm[0])


@pytest.mark.parametrize("file", ["stage.npz", "labels-000002.npz"])
def test_a_damaged_warm_start_is_named(file, whole_warm, stopped_warm):
    run, _ = stopped_warm(2, lambda: signal.raise_signal(signal.SIGINT))
    (path,) = (run / "warm_start").glob(f"*/{file}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"^{path} cannot be read \(\w+\); delete {path.parent} to start again there$"):
        resume(run)
    shutil.rmtree(path.parent)
    chex.assert_trees_all_equal(resume(run)[0], whole_warm[0])


# --- fork --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "states/512", "checkpoints/512"])
def test_a_fork_starts_from_the_parameters(part, whole, tmp_path, monkeypatch):
    """With its own options, but for those that are changed; the optimiser's moments come along, its schedule not."""
    seen = []

    def watched(*args):
        state = states.forked(*args)
        seen.append(jax.device_get((state.params, state.optimiser)))
        return state

    monkeypatch.setattr(TRAIN, "forked", watched)
    run = tmp_path / "fork"
    assert train_main([f"fork={whole[1] / part}", "train.keep=1", "seed=7", f"output_dir={run}"]) == 0
    config, of_whole = read_config(run / "config.yaml"), read_config(whole[1] / "config.yaml")
    assert config.train == replace(of_whole.train, keep=1)
    assert (config.ppo, config.network, config.site, config.seed) == (of_whole.ppo, of_whole.network, of_whole.site, 7)
    params, optimiser = seen[0]
    chex.assert_trees_all_equal(params, jax.device_get(whole[0]))
    counts = [int(leaf) for leaf in jax.tree.leaves(optimiser) if leaf.dtype == jnp.int32]
    adam = 0 if part == "checkpoints/512" else 8 * config.ppo.num_epochs * config.ppo.num_minibatches
    assert counts == [adam, 0]
    assert [line["steps"] for line in metrics_of(run)] == [64 * call for call in range(1, 9)]
    assert metrics_of(run)[0] != metrics_of(whole[1])[0]


def test_a_fork_of_another_network(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(TRAIN, "make_ppo", make_ppo)
    config = load_config([*TINY, "network.hidden=16", f"fork={whole[1]}"])
    with pytest.raises(UserError, match=r"belongs to another network.*is needed$"):
        go(config, tmp_path / "fork")


# --- damage ------------------------------------------------------------------------------------------------


def flip_a_byte(folder):
    largest = max(
        (path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def cut_files(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(part):
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_files, lose("state"), lose("metrics")])
def test_a_damaged_state_is_named_and_skipped(damage, whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    damage(run / "states" / "512")
    params, said = resume(run)
    assert re.search(
        r"^state \S+/run/states/512 (cannot be read \(\w+\)|is damaged.*); trying the one before$", said, re.M
    )
    chex.assert_trees_all_equal(params, whole[0])
    assert metrics_of(run) == metrics_of(whole[1])


def test_no_sound_state_is_left(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    for folder in (run / "states").iterdir():
        cut_files(folder)
    with pytest.raises(UserError, match=r"run \S+ holds no sound state under states/ to go on from$"):
        resume(run)
    shutil.rmtree(run / "states")
    with pytest.raises(UserError, match=r"run \S+ holds no state under states/ to go on from$"):
        resume(run)


@pytest.mark.parametrize("fails_at", ["save", "wait_until_finished", "close"])
def test_a_full_disk_is_one_line_and_keeps_what_is_there(fails_at, tmp_path, monkeypatch):
    """TensorStore's error, as it comes from a full disk, whenever Orbax reports it."""

    def fail(*args, **kwargs):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 1 byte: No space left on device [os_error_code='28']\nmore"
        )

    state = PPOState({"w": jnp.zeros(2)}, (), (), (), jax.random.key(0), jnp.int32(1))
    with states.StateWriter(tmp_path, keep=2) as writer:
        writer.save(1, state, {})

    def save_another():
        with states.StateWriter(tmp_path, keep=2) as writer:
            monkeypatch.setattr(writer._manager, fails_at, fail)
            writer.save(2, state, {})
            writer.wait()

    with pytest.raises(UserError, match=r"^\S+/states cannot be written \(no space left on device\); .*the run$"):
        save_another()
    assert 1 in saved_in(tmp_path)
    assert states.read_state(tmp_path, pytest.fail).steps in (1, 2)


def test_metrics_that_cannot_be_written(tmp_path):
    with Tracker(tmp_path, load_config(TINY), pytest.fail) as tracker:
        tracker._file.close()
        tracker._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        with pytest.raises(UserError, match=r"^\S+/metrics\.jsonl cannot be written \(no space left on device\)"):
            tracker.log({"steps": 1})
        tracker._file = io.StringIO()


# --- two at once -------------------------------------------------------------------------------------------

HOLDER = "import sys\nfrom pathlib import Path\nfrom jaxroute.training.lock import locked\n" \
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"  # fmt: skip


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused, whatever it wants there; a process that is killed holds nothing."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    said = (
        rf"^{run} is in use by another training \(process {process.pid} on \S+\); wait until it ends, or name another"
    )
    for overrides in ((), (f"resume={run}",), ("warm_start.num_states=8",)):
        config = load_config([*TINY, *overrides])
        with pytest.raises(UserError, match=said):
            go(config, run)
    assert [path.name for path in run.iterdir()] == ["training.lock"]
    process.kill()
    process.communicate()
    with locked(run), pytest.raises(UserError, match=rf"process {os.getpid()} on"), locked(run):
        pass
    with locked(run):
        pass


# --- processes ---------------------------------------------------------------------------------------------


def start(*arguments, cwd):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true, process):
    while not true():
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended: {process.communicate(timeout=0.01)}")


@pytest.mark.exhaustive
def test_signals_end_a_process_with_a_line_that_says_how_to_go_on(tmp_path):
    """What the line says is done: each command is the one that the last process printed."""
    command = ["train.py", *TINY, "ppo.total_steps=640000", "output_dir=a run"]
    metrics = tmp_path / "a run" / "metrics.jsonl"
    seen = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(ROOT / command[0], *command[1:], cwd=tmp_path)
        wait_until(lambda seen=seen: metrics.exists() and metrics.read_text().count("\n") > seen, process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 128 + number, errors
        said = re.fullmatch(r"(SIG\w+) at step ([\d,]+); go on with: (?:\S*/)?python\S* (.*)", output.splitlines()[-1])
        assert said.group(1) == number.name
        lines, steps = metrics_of(tmp_path / "a run"), int(said.group(2).replace(",", ""))
        assert [line["steps"] for line in lines] == list(range(64, steps + 1, 64))
        assert max(saved_in(tmp_path / "a run")) == steps
        seen, command = len(lines), shlex.split(said.group(3))


WRITER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxroute.learning import PPOState
from jaxroute.training.states import StateWriter

with StateWriter(Path(sys.argv[1]), keep=2) as writer:
    for step in range(1, 1000000):
        many = {f"leaf{n}": jnp.full(1000, step * 10 + n, jnp.float32) for n in range(5)}
        writer.save(step, PPOState(many, (), (), (), jax.random.key(step), jnp.int32(step)), {"train/avg_qos": -step})
"""


def test_kill_in_the_middle_of_writing(tmp_path):
    """Whatever the moment, the latest complete state is sound; here the first is the best, and stays."""
    delays = np.random.default_rng(int.from_bytes(os.urandom(4))).uniform(0, 0.5, 3)
    started = [(start("-c", WRITER, tmp_path / str(n), cwd=tmp_path), tmp_path / str(n)) for n in range(len(delays))]
    for (process, run), delay in zip(started, delays, strict=True):
        wait_until(lambda run=run: (run / "states").exists() and len(saved_in(run)) >= 3, process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.communicate()
        skipped = []
        steps, leaves = states.read_state(run, skipped.append)
        assert not skipped
        assert steps == max(saved_in(run))
        assert 1 in saved_in(run)
        for n in range(5):
            assert (leaves[f"params/leaf{n}"] == steps * 10 + n).all()
        np.testing.assert_array_equal(leaves["key"], jax.random.key_data(jax.random.key(steps)))


# --- divergence, memory, W&B -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "found"),
    [({"loss/value": np.float32("nan")}, "loss/value is nan"), ({"loss/policy": -2e6}, "loss/policy is -2e+06")],
)
def test_divergence_names_the_last_good_state(bad, found, tmp_path, monkeypatch):
    make = TRAIN.make_ppo

    def make_diverging(*args, **kwargs):
        learner = make(*args, **kwargs)

        def update(state):
            state, metrics = learner.update(state)
            return state, metrics | (bad if state.updates == 3 else {})

        return learner._replace(update=update)

    monkeypatch.setattr(TRAIN, "make_ppo", make_diverging)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=rf"^training diverged at step 192: {re.escape(found)}; .*fork={run}/states/128$"
    ):
        go(load_config(TINY), run)
    assert [line["steps"] for line in metrics_of(run)] == [64, 128]
    assert max(saved_in(run)) == 128


def test_too_many_environments_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_available", lambda: 100_000)
    said = r"^ppo\.num_envs=8 needs about [\d.]+ GiB of memory, but \S+ GiB are available; "
    with pytest.raises(UserError, match=said):
        go(load_config(TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_as_many_environments_fit_as_advised(monkeypatch):
    def check(num_envs):
        obs = jax.ShapeDtypeStruct((num_envs, 100), jnp.float32)
        ppo = PPOConfig(num_envs=num_envs, group_size=2, num_steps=32, num_minibatches=4)
        memory.check_memory(ppo, PPOState({}, {}, (), obs, None, None), 1)

    monkeypatch.setattr(memory, "_available", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"^ppo\.num_envs=4096 needs .* would fit$") as raised:
        check(4096)
    fits = int(re.search(r"ppo\.num_envs=(\d+) would fit$", str(raised.value)).group(1))
    assert fits > 0
    check(fits)
    with pytest.raises(UserError, match=rf"ppo\.num_envs={fits} would fit$"):
        check(fits + 4)


def test_memory_that_xla_finds_exhausted():
    said = r"^ppo\.num_envs=20 needs more memory than is available; try ppo\.num_envs=8$"
    config = PPOConfig(num_envs=20, group_size=2, num_minibatches=4)
    with pytest.raises(UserError, match=said), memory.memory_advice(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")


def test_wandb_that_fails_later(whole, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    started = SimpleNamespace(log=fail, finish=fail)
    monkeypatch.setattr("jaxroute.training.tracking._start_wandb", lambda *args: started)
    params, said = go(load_config([*TINY, "wandb.mode=offline"]), tmp_path / "run")
    assert said.count("W&B: no network; going on without W&B") == 1
    chex.assert_trees_all_equal(params, whole[0])


def test_wandb_that_does_not_start(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr("wandb.init", fail)
    said = []
    with Tracker(tmp_path, load_config([*TINY, "wandb.mode=offline"]), said.append) as tracker:
        tracker.log({"steps": 1})
    assert said == ["W&B: TimeoutError; going on without W&B"]

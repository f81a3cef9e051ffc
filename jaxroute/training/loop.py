"""The host's side of training: it starts compiled updates, watches them, and keeps what they produce."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from jaxtyping import PRNGKeyArray
from rich.console import Console

from jaxroute.config import Config
from jaxroute.config.words import command_line, path_word
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.learning import Learner, PPOState, Regression, make_ppo, make_warm_start
from jaxroute.progress import Progress
from jaxroute.runs import CHECKPOINTS, save_params, seed_runs, write_config
from jaxroute.scenarios import network_of, training_env
from jaxroute.training.interrupts import Interrupted, Interrupts
from jaxroute.training.lock import locked
from jaxroute.training.memory import check_memory, memory_advice
from jaxroute.training.processes import ENVS_ON_CPU, is_first_process
from jaxroute.training.programs import Program, Programs
from jaxroute.training.states import (
    STATES,
    Saved,
    StateWriter,
    disk_advice,
    forget_others,
    forked,
    has_states,
    read_state,
    resumed,
)
from jaxroute.training.tracking import METRICS_FILE, Tracker
from jaxroute.training.warm_start import WARM_START, SeedStart, calls_per_round

# Environments, total steps, and states to label in the warm start.
_SIZES_ON_CPU = (ENVS_ON_CPU, 192 * ENVS_ON_CPU * 32, 110 * ENVS_ON_CPU)
_SIZES_ON_ACCELERATORS = (8192, 384 * 8192 * 32, 32 * 8192)
# Losses are of the order of one.
_GREATEST_LOSS = 1e6


class _Plan(NamedTuple):
    """What is to be trained."""

    config: Config
    run: Path
    env: EdgeRouting
    env_params: EnvParams
    network: Any
    learner: Learner
    seeds: list[int]
    key: PRNGKeyArray
    """One for each seed, if there are several."""
    calls: int
    """Calls of the compiled update in all."""
    steps_per_call: int


class _Host(NamedTuple):
    """What training talks to."""

    progress: Progress
    programs: Programs
    interrupts: Interrupts
    states: StateWriter | None
    tracker: Tracker | None


def train(config: Config, run: Path, console: Console, judge: Callable[[], dict[str, float]] | None = None) -> Any:
    """Train a router and return its parameters; `run` receives configuration, metrics and checkpoints.

    With several seeds the parameters have a leading axis for them, metrics are means over them, and each has a run
    directory of its own in `run`. `judge` is called at the end, and the figures that it returns are recorded with the
    run. Of several processes, only the first writes and judges. With `config.resume`, the training in `run` goes on;
    with `config.fork`, the new one starts from another's parameters. SIGINT and SIGTERM end it after the current call.

    Raises:
        UserError: `run` holds a training already or is in use, the configuration's data are missing or malformed,
            memory or disk space does not suffice, there is no sound state to go on from, or training diverges.
        SystemExit: a signal came, and the state is saved.
    """
    _check_folder(config, run)
    plan = _make_plan(config, run)
    first = is_first_process()
    with locked(run) if first else nullcontext():
        saved = _open_run(plan, console)
        _announce(plan, console)
        with (
            Tracker(run, plan.config, console.print, saved.steps if saved else 0) if first else nullcontext() as tracker
        ):
            interrupts = Interrupts(not config.train.distributed)
            try:
                with (
                    memory_advice(plan.config.ppo),
                    interrupts,
                    nullcontext() if config.train.distributed else StateWriter(run, config.train.keep) as states,
                    Progress(console) as progress,
                    Programs(progress, total=2 if saved or not _warms_up(plan.config) else 4) as programs,
                ):
                    host = _Host(progress, programs, interrupts, states, tracker)
                    state, update = _first_state(plan, host, saved)
                    state = _run_updates(plan, host, state, update, saved)
            except Interrupted as where:
                assert interrupts.received is not None
                go_on = command_line("train", path_word("resume", run))
                console.print(f"{interrupts.received.name} {where}; go on with: {go_on}", markup=False, soft_wrap=True)
                raise SystemExit(128 + interrupts.received) from None
            if tracker and judge is not None:
                tracker.finish(judge())
    return state.params


def with_default_sizes(config: Config) -> Config:
    """Fill in the sizes that depend on the backend."""
    ppo = config.ppo
    on_cpu = jax.default_backend() == "cpu"
    num_envs, total_steps, num_states = _SIZES_ON_CPU if on_cpu else _SIZES_ON_ACCELERATORS
    if ppo.num_envs is None:
        ppo = dataclasses.replace(ppo, num_envs=num_envs - num_envs % (ppo.envs_divisor * jax.device_count()))
    if ppo.total_steps is None:
        ppo = dataclasses.replace(ppo, total_steps=total_steps)
    warm_start = config.warm_start
    if warm_start.num_states is None:
        warm_start = dataclasses.replace(warm_start, num_states=num_states)
    return dataclasses.replace(config, ppo=ppo, warm_start=warm_start)


def _check_folder(config: Config, run: Path) -> None:
    """Refuse what can be refused before anything is built."""
    if config.train.distributed and (config.resume or config.fork):
        raise UserError("resume and fork are for one process; leave out train.distributed=true")
    for written in (CHECKPOINTS, METRICS_FILE, WARM_START):
        if is_first_process() and not config.resume and (run / written).exists():
            raise UserError(f"{run} holds the {written} of another training; name another output_dir")


def _make_plan(config: Config, run: Path) -> _Plan:
    """Build everything that a training consists of, and check that it fits into memory."""
    config = with_default_sizes(config)
    env, env_params = training_env(config)
    network = network_of(config)
    ppo = config.ppo
    assert ppo.num_envs is not None
    assert ppo.total_steps is not None
    interval = _updates_per_call(ppo.total_steps // (ppo.num_envs * ppo.num_steps), config.train.log_interval)
    seeds = [of_seed.seed for of_seed in seed_runs(run, config).values()]
    learner = make_ppo(ppo, env, env_params, network, updates_per_call=interval, many_seeds=len(seeds) > 1)
    keys = [jax.random.key(seed) for seed in seeds]
    key = jnp.stack(keys) if len(seeds) > 1 else keys[0]
    check_memory(ppo, jax.eval_shape(learner.init, key), len(seeds))
    calls, steps_per_call = learner.num_updates // interval, interval * learner.steps_per_update
    return _Plan(config, run, env, env_params, network, learner, seeds, key, calls, steps_per_call)


def _updates_per_call(num_updates: int, at_most: int) -> int:
    """Return the greatest divisor of the number of updates: calls are compiled for one length, and none is left out."""
    return max(size for size in range(1, max(1, min(num_updates, at_most)) + 1) if num_updates % size == 0)


def _open_run(plan: _Plan, console: Console) -> Saved | None:
    """Return the state that a resumed training goes on from, or write the configuration of a new one."""
    config, run = plan.config, plan.run
    if config.resume:
        if not has_states(run) and _warms_up(config) and not (run / CHECKPOINTS).exists():
            return None  # it was interrupted in the warm start
        saved = read_state(run, console.print)
        forget_others(run, saved.steps)
        return saved
    if is_first_process():
        for folder, settings in ({run: config} | seed_runs(run, config)).items():
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, settings)
    return None


def _warms_up(config: Config) -> bool:
    return bool(config.warm_start.num_states) and not config.fork


def _announce(plan: _Plan, console: Console) -> None:
    num_seeds, num_devices, rate = len(plan.seeds), jax.device_count(), plan.env_params.rate
    devices = f" ({num_devices} devices)" if num_devices > 1 else ""
    several = f"{num_seeds} seeds of " if num_seeds > 1 else ""
    console.print(
        f"Training on {jax.default_backend()}{devices}: {several}{plan.config.ppo.num_envs} environments, "
        f"{plan.calls * plan.steps_per_call:,} steps, {rate[0]:g} to {rate[1]:g} requests/s on {plan.config.site.name}"
    )


def _first_state(plan: _Plan, host: _Host, saved: Saved | None) -> tuple[PPOState, Callable[[PPOState], Any]]:
    """Return the state that PPO starts from (saved, forked, after the warm start, or fresh), and its update."""
    if saved is None and _warms_up(plan.config):
        return _warm_start(plan, host)
    host.programs.announce("environments")
    state = plan.learner.init(plan.key)
    if saved is not None:
        state = resumed(state, saved.leaves, plan.run)
    elif plan.config.fork:
        state = forked(state, Path(plan.config.fork), host.progress.console.print)
    host.programs.announce("updates")  # which the first call compiles
    return state, plan.learner.update


def _warm_start(plan: _Plan, host: _Host) -> tuple[PPOState, Callable[[PPOState], Any]]:
    """Return PPO's first state, with the parameters after the warm start of each seed, and its update.

    Raises:
        Interrupted: a signal came, and the warm start is saved.
    """
    config, programs, seeds = plan.config, host.programs, plan.seeds
    queued = _queue_programs(plan, programs)
    state = programs.wait(queued.init)(plan.key)
    folder = plan.run / WARM_START
    fitted = []
    for number, seed in enumerate(seeds):
        params, environments = _of_seed(number, seeds, (state.params, (state.obs, state.env_state)))
        start = SeedStart(
            config=config,
            seed=seed,
            folder=None if host.states is None else folder / str(seed),
            begin_fit=queued.begin_fit,
            label=queued.label,
            fit=queued.fit,
            programs=programs,
            progress=host.progress,
            interrupts=host.interrupts,
        )
        fitted.append(start.run(jax.device_get(params), environments))
    whole = jax.tree.map(lambda *parts: np.stack(parts), *fitted) if len(seeds) > 1 else fitted[0]
    # The warm start has used up the environments; PPO starts in the same ones.
    fresh = programs.wait(queued.init)(plan.key)
    state = fresh._replace(params=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), whole, fresh.params))
    _save_checkpoint(plan, 0, state)
    if host.states is not None:
        host.states.save(0, state, {})
        host.states.wait()
        shutil.rmtree(folder)
    return state, programs.wait(queued.update)


class _Queued(NamedTuple):
    """The programs of a training with a warm start; some are still being compiled."""

    init: Program
    label: Program
    begin_fit: Callable[[Any], Regression]
    fit: Program
    update: Program


def _queue_programs(plan: _Plan, programs: Programs) -> _Queued:
    """Start to compile in the order in which programs are needed, so that the first labels come soon.

    While they are made, the rest is compiled.
    """
    config, learner = plan.config, plan.learner
    num_envs = config.ppo.num_envs
    assert num_envs is not None
    functions = make_warm_start(config.warm_start, plan.env, plan.env_params, plan.network, num_envs)
    of_all = jax.eval_shape(learner.init, plan.key)
    state = jax.eval_shape(lambda of_all: _of_seed(0, plan.seeds, of_all), of_all)
    to_label = (state.params, jax.ShapeDtypeStruct((), bool), (state.obs, state.env_state), jax.random.key(0))

    def lower_fit() -> Lowered:
        size = calls_per_round(config) * num_envs
        labelled = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype),
            jax.eval_shape(functions.label, *to_label)[1],
        )
        regression = jax.eval_shape(functions.begin_fit, state.params)
        return functions.fit.lower(regression, labelled, jax.ShapeDtypeStruct((), jnp.int32))

    init = programs.start("environments", lambda: learner.init.lower(plan.key))
    label = programs.start("labels", lambda: functions.label.lower(*to_label))
    fit = programs.start("regression", lower_fit)
    update = programs.start("updates", lambda: learner.update.lower(of_all))
    return _Queued(init, label, functions.begin_fit, fit, update)


def _of_seed(number: int, seeds: list[int], of_all: Any) -> Any:
    """Return one seed's part of what has an axis for seeds if there are several."""
    return jax.tree.map(itemgetter(number), of_all) if len(seeds) > 1 else of_all


def _run_updates(
    plan: _Plan, host: _Host, state: PPOState, update: Callable[[PPOState], Any], saved: Saved | None
) -> PPOState:
    """Train to the end, and return the last state.

    Raises:
        Interrupted: a signal came, and the state is saved.
        UserError: training diverges.
    """
    config, calls, last_saved = plan.config, plan.calls, saved.steps if saved else None
    done = last_saved // plan.steps_per_call if last_saved else 0
    for call in range(done + 1, calls + 1):
        started = time.perf_counter()
        state, on_device = update(state)
        metrics = _over_seeds(jax.device_get(on_device), plan.seeds)
        speed = len(plan.seeds) * plan.steps_per_call / (time.perf_counter() - started)
        steps = call * plan.steps_per_call
        _check_convergence(plan, metrics, steps, last_saved)
        if host.tracker:
            host.tracker.log({"steps": steps, "train/steps_per_second": speed} | metrics)
        qos = f", average QoS {metrics['train/avg_qos']:.3f}" if "train/avg_qos" in metrics else ""
        if overflow := metrics.get("train/overflow_rate"):
            qos += f", {overflow:.1%} overflowed (env.num_slots)"
        if call == done + 1:
            host.progress.begin("training", calls, done=call)
        host.progress.advance(int(call > done + 1), f"{speed:,.0f} steps/s{qos}")
        is_quarter = call == calls or call % max(1, calls // 4) == 0
        if is_quarter:
            _save_checkpoint(plan, steps, state)
        stop = host.interrupts.received is not None
        if host.states and (is_quarter or call % config.train.save_interval == 0 or stop):
            host.states.save(steps, state, metrics)
            last_saved = steps
        if stop:
            raise Interrupted(f"at step {steps:,}")
    return state


def _save_checkpoint(plan: _Plan, steps: int, state: PPOState) -> None:
    """Save the parameters of each seed in its run directory."""
    if not is_first_process():
        return
    params = jax.device_get(state.params)
    for number, folder in enumerate(seed_runs(plan.run, plan.config)):
        with disk_advice(folder / CHECKPOINTS):
            save_params(folder, steps, _of_seed(number, plan.seeds, params))


def _check_convergence(plan: _Plan, metrics: dict[str, float], steps: int, last_saved: int | None) -> None:
    """Raise a UserError if a metric is not finite, or a loss has exploded."""
    for name, value in metrics.items():
        if not math.isfinite(value) or (name.startswith("loss/") and abs(value) > _GREATEST_LOSS):
            good = command_line("train", path_word("fork", plan.run / STATES / str(last_saved)))
            raise UserError(
                f"training diverged at step {steps:,}: {name} is {value:g}; lower ppo.learning_rate"
                + ("" if last_saved is None else f", from the last good state: {good}")
            )


def _over_seeds(metrics: dict[str, Any], seeds: list[int]) -> dict[str, float]:
    """Return the metrics of a single seed, or means over several and the average QoS of each."""
    if len(seeds) == 1:
        return _readable(metrics)
    of_each = [_readable({name: values[number] for name, values in metrics.items()}) for number in range(len(seeds))]
    names = set.intersection(*(set(values) for values in of_each))
    means = {name: math.fsum(values[name] for values in of_each) / len(seeds) for name in sorted(names)}
    return means | {
        f"train/avg_qos_seed{seed}": values["train/avg_qos"]
        for seed, values in zip(seeds, of_each, strict=True)
        if "train/avg_qos" in values
    }


def _readable(metrics: dict[str, Any]) -> dict[str, float]:
    """Turn a rollout's totals into rates for people to read; there are none if no request has ended."""
    values = {name: float(value) for name, value in metrics.items()}
    completed, rejected, lost = values.pop("num_completed"), values.pop("rejected"), values.pop("num_lost")
    declined, overflowed = values.pop("declined"), values.pop("overflowed")
    qos, late = values.pop("qos_sum"), values.pop("num_late")
    if ended := completed + rejected + overflowed + declined + lost:
        values["train/avg_qos"] = qos / ended
        values["train/violation_rate"] = late / ended
        values["train/rejection_rate"] = rejected / ended
        values["train/overflow_rate"] = overflowed / ended
        values["train/declined_rate"] = declined / ended
        values["train/lost_rate"] = lost / ended
    return values

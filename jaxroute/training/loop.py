"""The host's side of training: it starts compiled updates, watches them, and keeps what they produce."""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxroute.config import Config
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.learning import make_ppo, make_warm_start
from jaxroute.networks import build_network
from jaxroute.runs import CHECKPOINTS, save_params, seed_runs, write_config
from jaxroute.scenarios import training_env
from jaxroute.training.interrupts import Interrupts
from jaxroute.training.memory import check_memory, memory_advice
from jaxroute.training.processes import ENVS_ON_CPU, is_first_process
from jaxroute.training.states import STATES, StateWriter, forget_others, forked, read_state, resumed
from jaxroute.training.tracking import METRICS_FILE, Tracker

# Environments, total steps, and states to label in the warm start.
_SIZES_ON_CPU = (ENVS_ON_CPU, 96 * ENVS_ON_CPU * 32, 110 * ENVS_ON_CPU)
_SIZES_ON_ACCELERATORS = (8192, 384 * 8192 * 32, 32 * 8192)
# Losses are of the order of one.
_GREATEST_LOSS = 1e6

# Sets the warm start's random numbers apart from PPO's.
_WARM_START = 1


def with_default_sizes(config: Config) -> Config:
    """Fill in the sizes that depend on the backend."""
    ppo = config.ppo
    on_cpu = jax.default_backend() == "cpu"
    num_envs, total_steps, num_states = _SIZES_ON_CPU if on_cpu else _SIZES_ON_ACCELERATORS
    if ppo.num_envs is None:
        ppo = dataclasses.replace(ppo, num_envs=num_envs - num_envs % (ppo.num_minibatches * jax.device_count()))
    if ppo.total_steps is None:
        ppo = dataclasses.replace(ppo, total_steps=total_steps)
    warm_start = config.warm_start
    if warm_start.num_states is None:
        warm_start = dataclasses.replace(warm_start, num_states=num_states)
    return dataclasses.replace(config, ppo=ppo, warm_start=warm_start)


def train(config: Config, run: Path, console: Console, judge: Callable[[], dict[str, float]] | None = None) -> Any:
    """Train a router and return its parameters; `run` receives configuration, metrics and checkpoints.

    With several seeds the parameters have a leading axis for them, metrics are means over them, and each has a run
    directory of its own in `run`. `judge` is called at the end, and what it finds is noted with the run. Of several
    processes, only the first writes and judges. With `config.resume`, the training in `run` goes on; with
    `config.fork`, the new one starts from another's parameters. SIGINT and SIGTERM end it after the call under way.

    Raises:
        UserError: `run` holds a training already, the configuration's data is missing or malformed, memory does not
            suffice, there is nothing sound to go on from, or training diverges.
        SystemExit: a signal came, and the state is saved.
    """
    first = is_first_process()
    if config.train.distributed and (config.resume or config.fork):
        raise UserError("resume and fork are for one process; leave out train.distributed=true")
    for written in (CHECKPOINTS, METRICS_FILE):
        if first and not config.resume and (run / written).exists():
            raise UserError(f"{run} holds the {written} of another training; name another output_dir")
    config = with_default_sizes(config)
    env, env_params = training_env(config)
    network = build_network(config.network)
    ppo = config.ppo
    assert ppo.num_envs is not None
    assert ppo.total_steps is not None
    interval = _updates_per_call(ppo.total_steps // (ppo.num_envs * ppo.num_steps), config.train.log_interval)
    seeds = [of_seed.seed for of_seed in seed_runs(run, config).values()]
    learner = make_ppo(ppo, env, env_params, network, updates_per_call=interval, many_seeds=len(seeds) > 1)
    calls = learner.num_updates // interval
    steps_per_call = interval * learner.steps_per_update
    total = calls * steps_per_call
    keys = [jax.random.key(seed) for seed in seeds]
    key = jnp.stack(keys) if len(seeds) > 1 else keys[0]
    check_memory(ppo, jax.eval_shape(learner.init, key), len(seeds))

    saved = 0
    if config.resume:
        saved, leaves = read_state(run, console.print)
        forget_others(run, saved)
    elif first:
        for folder, settings in ({run: config} | seed_runs(run, config)).items():
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, settings)
    devices = f" ({jax.device_count()} devices)" if jax.device_count() > 1 else ""
    several = f"{len(seeds)} seeds of " if len(seeds) > 1 else ""
    console.print(
        f"Training on {jax.default_backend()}{devices}: {several}{ppo.num_envs} environments, {total:,} steps, "
        f"{env_params.rate[0]:g} to {env_params.rate[1]:g} requests/s on {config.site.name}"
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[speed]} steps/s"),
        TextColumn("average QoS {task.fields[qos]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Tracker(run, config, console.print, saved) if first else nullcontext() as tracker:
        with (
            memory_advice(ppo),
            Interrupts(not config.train.distributed) as interrupts,
            nullcontext() if config.train.distributed else StateWriter(run, config.train.keep) as states,
            Progress(*columns, console=console, refresh_per_second=2) as progress,
        ):
            done = saved // steps_per_call
            task = progress.add_task("compiling", total=calls, completed=done, speed="-", qos="-")
            state = learner.init(key)
            update: Callable[..., Any] = learner.update
            if config.resume:
                state = resumed(state, leaves, run)
            elif config.fork:
                state = forked(state, Path(config.fork), console.print)
            elif config.warm_start.num_states:
                # PPO is compiled beside it, so that nobody waits for one after the other.
                with ThreadPoolExecutor(1) as meanwhile:
                    compiled = meanwhile.submit(learner.update.lower(state).compile)
                    params = _warm_start(config, env, env_params, network, state.params, seeds, progress, interrupts)
                update = compiled.result()
                state = state._replace(params=params)
                _save(run, config, 0, jax.device_get(params))
            for call in range(done + 1, calls + 1):
                started = time.perf_counter()
                state, on_device = update(state)
                metrics = _over_seeds(jax.device_get(on_device), seeds)
                speed = len(seeds) * steps_per_call / (time.perf_counter() - started)
                steps = call * steps_per_call
                if bad := _diverging(metrics):
                    raise UserError(
                        f"training diverged at step {steps:,}: {bad} is {metrics[bad]:g}; lower ppo.learning_rate"
                        + (f", from the last good state: fork={run / STATES / str(saved)}" if saved else "")
                    )
                if tracker:
                    tracker.log({"steps": steps, "train/steps_per_second": speed} | metrics)
                qos = f"{metrics['train/avg_qos']:.3f}" if "train/avg_qos" in metrics else "-"
                progress.update(task, advance=1, description="training", speed=f"{speed:,.0f}", qos=qos)
                is_quarter = call == calls or call % max(1, calls // 4) == 0
                if is_quarter:
                    _save(run, config, steps, jax.device_get(state.params))
                stop = interrupts.received is not None
                if states and (is_quarter or call % config.train.save_interval == 0 or stop):
                    states.save(steps, state, metrics)
                    saved = steps
                if stop:
                    break
        if interrupts.received:
            go_on = f"python train.py resume={shlex.quote(str(run))}"
            console.print(
                f"{interrupts.received.name} at step {saved:,}; go on with: {go_on}", markup=False, soft_wrap=True
            )
            raise SystemExit(128 + interrupts.received)
        if tracker and judge is not None:
            tracker.finish(judge())
    return state.params


def _warm_start(
    config: Config,
    env: EdgeRouting,
    env_params: EnvParams,
    network: Any,
    params: Any,
    seeds: list[int],
    progress: Progress,
    interrupts: Interrupts,
) -> Any:
    """Return the parameters after the warm start, of each seed by itself."""
    num_envs, num_states = config.ppo.num_envs, config.warm_start.num_states
    assert num_envs is not None
    assert num_states is not None
    warm_start = make_warm_start(config.warm_start, env, env_params, network, num_envs)
    calls, epochs = math.ceil(num_states / num_envs), config.warm_start.num_epochs
    task = progress.add_task("warm start", total=calls * config.warm_start.num_rounds * len(seeds), speed="-", qos="-")
    several = len(seeds) > 1
    fitted = []
    for number, seed in enumerate(seeds):
        first = own = jax.device_get(jax.tree.map(itemgetter(number), params) if several else params)
        key_begin, key_fit, key_label = jax.random.split(jax.random.fold_in(jax.random.key(seed), _WARM_START), 3)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key_fit)))
        environments = warm_start.begin(key_begin)
        labelled = []
        for call in range(calls * config.warm_start.num_rounds):
            started = time.perf_counter()
            environments, labels = warm_start.label(
                own, jnp.bool_(call >= calls), environments, jax.random.fold_in(key_label, call)
            )
            labelled.append(multihost_utils.process_allgather(labels, tiled=True))
            speed = num_envs / (time.perf_counter() - started)
            progress.update(task, advance=1, speed=f"{speed:,.0f} labelled")
            if interrupts.received:
                progress.console.print("Stopped in the warm start; there is nothing to save yet")
                raise SystemExit(128 + interrupts.received)
            rounds, within = divmod(call + 1, calls)
            if within == 0:
                data = jax.tree.map(lambda *parts: np.concatenate(parts), *labelled)
                fit, errors = warm_start.begin_fit(first), []
                for _ in range(epochs):
                    # As many states a pass in every round, so that one program serves all.
                    for chosen in generator.permutation(len(data.values)).reshape(rounds, -1):
                        states = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], data)
                        fit, error = warm_start.fit(fit, states, jnp.int32(epochs * rounds))
                        errors.append(error)
                own = jax.device_get(fit.params)
                progress.console.print(
                    f"Warm start: {len(data.values):,} states labelled; mean squared error of the experts' values "
                    f"{np.mean(errors[:rounds]):.5f} in the first epoch, {np.mean(errors[-rounds:]):.5f} in the last"
                )
        fitted.append(own)
    progress.remove_task(task)
    whole = jax.tree.map(lambda *parts: np.stack(parts), *fitted) if several else fitted[0]
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), whole, params)


def _updates_per_call(num_updates: int, at_most: int) -> int:
    """Return the greatest divisor of the number of updates: calls are compiled for one length, and none is left out."""
    return max(size for size in range(1, max(1, min(num_updates, at_most)) + 1) if num_updates % size == 0)


def _save(run: Path, config: Config, steps: int, params: Any) -> None:
    """Save the parameters of each seed in its run directory."""
    if not is_first_process():
        return
    runs = list(seed_runs(run, config))
    of_seeds = [params] if len(runs) == 1 else [jax.tree.map(itemgetter(n), params) for n in range(len(runs))]
    for folder, of_seed in zip(runs, of_seeds, strict=True):
        save_params(folder, steps, of_seed)


def _diverging(metrics: dict[str, float]) -> str | None:
    """Return the first metric that is not finite, or loss that has exploded."""
    for name, value in metrics.items():
        if not math.isfinite(value) or (name.startswith("loss/") and abs(value) > _GREATEST_LOSS):
            return name
    return None


def _over_seeds(metrics: dict[str, Any], seeds: list[int]) -> dict[str, float]:
    """Return means over seeds, where there are several, and the average QoS of each."""
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
    """Turn a rollout's totals into the rates that people read; there are none where no request has ended."""
    values = {name: float(value) for name, value in metrics.items()}
    completed, rejected, lost = values.pop("num_completed"), values.pop("rejected"), values.pop("num_lost")
    qos, late = values.pop("qos_sum"), values.pop("num_late")
    if ended := completed + rejected + lost:
        values["train/avg_qos"] = qos / ended
        values["train/violation_rate"] = late / ended
        values["train/rejection_rate"] = rejected / ended
        values["train/lost_rate"] = lost / ended
    return values

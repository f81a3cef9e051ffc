"""Checkpoints of a policy: parameters in Orbax's format inside a run directory, which also holds the configuration."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import orbax.checkpoint as ocp

from jaxroute.config import Config, config_yaml, read_config
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.networks import build_network

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"


class TrainedPolicy(NamedTuple):
    """A network with its parameters."""

    network: nn.Module
    params: Any
    source: Path


def write_config(run: Path, config: Config) -> None:
    """Write the resolved configuration into the run directory."""
    (run / CONFIG_FILE).write_text(config_yaml(config))


def seed_runs(run: Path, config: Config) -> dict[Path, Config]:
    """Return the run directory of each training seed with its configuration: `run` itself if there is only one."""
    if config.train.num_seeds == 1:
        return {run: config}
    one = dataclasses.replace(config.train, num_seeds=1)
    seeds = range(config.seed, config.seed + config.train.num_seeds)
    return {run / f"seed{seed}": dataclasses.replace(config, seed=seed, train=one) for seed in seeds}


def save_params(run: Path, step: int, params: Any) -> Path:
    """Save parameters under `checkpoints/<step>`; Orbax makes the folder appear only once it is complete."""
    path = (run / CHECKPOINTS / str(step)).resolve()
    with _checkpointer() as checkpointer:
        checkpointer.save(path, params, force=True)
    return path


def load_policy(path: str | Path, env: EdgeRouting, env_params: EnvParams) -> TrainedPolicy:
    """Load the policy of a run directory (its latest checkpoint) or of one checkpoint, to act in `env`.

    Raises:
        UserError: there is none, it is damaged, or its network does not fit this site.
    """
    policy = read_policy(path)
    check_fits(policy, env, env_params)
    return policy


def read_policy(path: str | Path) -> TrainedPolicy:
    """Read the policy of a run directory (its latest checkpoint) or of one checkpoint, whatever site it is for.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    run = run_of(path)
    checkpoint = latest_checkpoint(path) if path == run else path
    config = read_config(run / CONFIG_FILE)
    try:
        params = restore(checkpoint)
    except Exception as error:  # Orbax raises many kinds; to the user they all mean an unreadable checkpoint.
        raise UserError(f"checkpoint {checkpoint} cannot be read ({type(error).__name__}); is it complete?") from error
    return TrainedPolicy(build_network(config.network), params, checkpoint)


def run_of(path: Path, option: str = "checkpoint") -> Path:
    """Return the run directory that `path` is, or is a checkpoint or state of.

    Raises:
        UserError: it is neither; `option` is what the user gave it as.
    """
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; give a run directory, e.g. {option}=outputs/<run>")
    for run in (path, path.parent.parent):
        if (run / CONFIG_FILE).is_file():
            return run
    raise UserError(f"{option} {path}: no {CONFIG_FILE} beside it; give the run directory that train.py wrote")


def latest_checkpoint(run: Path) -> Path:
    """Return the run's checkpoint with the most steps.

    Raises:
        UserError: the run has none.
    """
    folder = run / CHECKPOINTS
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not found:
        if seeds := sorted(run.glob(f"seed*/{CONFIG_FILE}")):
            raise UserError(f"run {run} trained {len(seeds)} seeds; name one of them, e.g. {seeds[0].parent}")
        raise UserError(f"run {run} holds no checkpoint under {CHECKPOINTS}/; it may have ended before the first")
    return max(found, key=lambda path: int(path.name))


def _checkpointer() -> ocp.StandardCheckpointer:
    """A checkpointer that does not wait for other processes: only the first one writes and reads."""
    alone = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
    return ocp.StandardCheckpointer(**{"multiprocessing_options": alone} if jax.process_count() > 1 else {})


def restore(checkpoint: Path) -> Any:
    """Read what Orbax has written, without stack traces on the terminal if that fails.

    Orbax gives up at the first read that fails. Those still under way report to its event loop, which is closed by
    then: from other threads, and perhaps after this has returned, so that the hook stays where it failed.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
    with _checkpointer() as checkpointer:
        restored = checkpointer.restore(checkpoint.resolve())
    sys.unraisablehook = report
    return restored


def check_fits(policy: TrainedPolicy, env: EdgeRouting, env_params: EnvParams) -> None:
    """Check that a policy can act in `env`.

    Raises:
        UserError: its network does not fit this site.
    """

    def fresh(key: Any) -> Any:
        return policy.network.init(key, policy.network.prepare(env.reset(key, env_params)[0]))

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, wanted = shapes(policy.params), shapes(jax.eval_shape(fresh, jax.random.key(0)))
    differing = sorted(set(found.items()) ^ set(wanted.items()))
    if differing:
        name = differing[0][0]
        raise UserError(
            f"checkpoint {policy.source} belongs to another network or site: {name} is {found.get(name, 'absent')}, "
            f"but {wanted.get(name, 'absent')} is needed for {env.num_experts} experts"
        )

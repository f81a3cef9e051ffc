"""Trained routers on disk: what a run leaves behind, and the routers that come with the package."""

from __future__ import annotations

import dataclasses
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float32, Int

from jaxroute.config import Config, config_yaml, read_config
from jaxroute.env import EdgeRouting, EnvParams, Observation
from jaxroute.errors import UserError, did_you_mean
from jaxroute.files import complete_folder, without_pattern, write_file
from jaxroute.policies import Policy, learned_policy
from jaxroute.scenarios import network_of

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"

PRETRAINED = "pretrained"
"""`pretrained/<name>` names a router of the package wherever a run is taken."""
PARAMS_FILE, RESULTS_FILE = "params.npz", "results.json"
_PRETRAINED_FOLDER = Path(__file__).parent / PRETRAINED


@dataclass(frozen=True, eq=False)  # jax.jit takes it, as every one is its own key
class TrainedPolicy:
    """A network with its parameters: call it with an observation to get the expert that it prefers."""

    network: nn.Module
    params: Any
    source: Path
    """The checkpoint, or `pretrained/<name>`."""

    def __call__(self, obs: Observation) -> Int[Array, ""]:
        """Return the expert for the arriving request; `jax.jit` and `jax.vmap` apply as to any function."""
        action, _ = self.policy.act(self.params, obs, None, ())  # type: ignore[arg-type]
        return action

    @property
    def policy(self) -> Policy:
        """As evaluation takes it, like every rule."""
        return learned_policy(self.network, self.params)

    @property
    def label(self) -> str:
        """Say which router it is without saying where it lies: `seed0, 786432 steps` or `pretrained/edge6`."""
        if self.source.parent.name != CHECKPOINTS:
            return str(self.source)
        return f"{self.source.resolve().parents[1].name}, {self.source.name} steps"


def load_router(name_or_path: str | Path) -> TrainedPolicy:
    """Load a router of the package by its name, or that of a run directory or of one of its checkpoints.

    A name of the package wins over a folder of the same name; give the folder's absolute path.

    >>> import jax, jaxroute
    >>> router = jaxroute.load_router("edge6")
    >>> env, params = jaxroute.make("edge-poisson", rate=12.0)
    >>> obs, state = env.reset(jax.random.key(0), params)
    >>> expert = jax.jit(router)(obs)

    Raises:
        UserError: there is none, or it is damaged.
    """
    is_name = str(name_or_path) in pretrained_routers()
    return read_policy(Path(PRETRAINED) / name_or_path if is_name else name_or_path)


def write_config(run: Path, config: Config) -> None:
    """Write the resolved configuration into the run directory."""
    write_file(run / CONFIG_FILE, config_yaml(config))


def seed_runs(run: Path, config: Config) -> dict[Path, Config]:
    """Return the run directory of each training seed with its configuration: `run` itself if there is only one."""
    if config.train.num_seeds == 1:
        return {run: config}
    one = dataclasses.replace(config.train, num_seeds=1)
    seeds = range(config.seed, config.seed + config.train.num_seeds)
    return {run / f"seed{seed}": dataclasses.replace(config, seed=seed, train=one) for seed in seeds}


def save_params(run: Path, step: int, params: Any) -> Path:
    """Save parameters under `checkpoints/<step>`; Orbax makes the folder appear only once it is complete."""
    folder = (run / CHECKPOINTS).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with without_pattern(folder) as name, _checkpointer() as checkpointer:
        checkpointer.save(name / str(step), params, force=True)
    return folder / str(step)


def load_policy(path: str | Path, env: EdgeRouting, env_params: EnvParams) -> TrainedPolicy:
    """Load the policy of a run directory (its latest checkpoint) or of one checkpoint, to act in `env`.

    Raises:
        UserError: there is none, it is damaged, or its network does not fit this site.
    """
    policy = read_policy(path)
    check_fits(policy, env, env_params)
    return policy


def read_policy(path: str | Path) -> TrainedPolicy:
    """Read a router, whatever site it is for.

    Args:
        path: a run directory, of which the latest checkpoint counts; one of its checkpoints; or `pretrained/<name>`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    run = run_of(path)
    config = read_config(run / CONFIG_FILE)
    network = network_of(config)
    if run.parent == _PRETRAINED_FOLDER:
        return TrainedPolicy(network, _read_arrays(run / PARAMS_FILE), path)
    checkpoint = latest_checkpoint(path) if path == run else path
    try:
        params = restore(checkpoint)
    except Exception as error:  # Orbax raises many kinds; to the user they all mean an unreadable checkpoint.
        raise UserError(f"checkpoint {checkpoint} cannot be read ({type(error).__name__}); is it complete?") from error
    return TrainedPolicy(network, params, checkpoint)


def run_of(path: Path, option: str = "checkpoint") -> Path:
    """Return the run directory that `path` is, or is a checkpoint or state of, or the folder of a pretrained router.

    Raises:
        UserError: it is neither; `option` is what the user gave it as.
    """
    if path.parts[:-1] == (PRETRAINED,):
        known = pretrained_routers()
        if path.name in known and option == "resume":
            raise UserError(f"resume={path} is a finished router; start a new run from it with fork={path}")
        if path.name in known:
            return _PRETRAINED_FOLDER / path.name
        if not path.exists():
            raise UserError(
                f"{option} {path}: no router of that name comes with jaxroute{did_you_mean(path.name, known)}; "
                f"choose one of {', '.join(f'{PRETRAINED}/{name}' for name in known)}, or give a run directory"
            )
    if not path.exists():
        raise UserError(f"{option} {path} does not exist; give a run directory, e.g. {option}=outputs/<run>")
    for run in (path, path.parent.parent):
        if (run / CONFIG_FILE).is_file():
            return run
    raise UserError(f"{option} {path}: there is no {CONFIG_FILE} in it; give the run directory that train.py wrote")


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
    # Imported here: it takes seconds, and pretrained routers and rules do without.
    import orbax.checkpoint as ocp

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
    with without_pattern(checkpoint) as name, _checkpointer() as checkpointer:
        restored = checkpointer.restore(name)
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


# --- Routers of the package ----------------------------------------------------------------------------


def pretrained_routers() -> list[str]:
    """Return the names of the routers that come with the package."""
    return sorted(path.parent.name for path in _PRETRAINED_FOLDER.glob(f"*/{PARAMS_FILE}"))


def write_pretrained(folder: Path, policy: TrainedPolicy, config: Config, results: str) -> None:
    """Write a router as the package keeps it: parameters as plain arrays, configuration, and results as JSON.

    What the configuration says of places on this machine is left out.

    Raises:
        UserError: the folder holds something or cannot be written; a parameter is no float32 array.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(policy.params, sep="/").items()}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(f"{policy.source}: parameter {name} is {array.dtype}, and must be float32")
    config = dataclasses.replace(config, data_dir=None, output_dir=None, resume=None, fork=None)
    with complete_folder(folder) as draft:
        np.savez_compressed(draft / PARAMS_FILE, **arrays)  # type: ignore[arg-type]
        write_config(draft, config)
        (draft / RESULTS_FILE).write_text(results)


def _read_arrays(path: Path) -> dict[str, Any]:
    """Read parameters that `write_pretrained` has written, without unpickling anything."""
    arrays: dict[str, Float32[np.ndarray, "..."]]
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); install jaxroute again") from error
    return unflatten_dict(arrays, sep="/")

"""The whole state of a training on disk: a run goes on from it exactly, and another can start from it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxroute.errors import UserError
from jaxroute.files import without_pattern
from jaxroute.learning import PPOState
from jaxroute.runs import read_policy, restore

STATES = "states"
_SCORE, _CHECKSUM = "train/avg_qos", "checksum"

_ORBAX_LOG = logging.getLogger("absl")

# Leaves by name, such as "params/params/query/kernel": containers of any kind look the same.
Leaves: TypeAlias = dict[str, np.ndarray]


class Saved(NamedTuple):
    """A state as it was on disk."""

    steps: int
    leaves: Leaves


class StateWriter:
    """Write `states/<steps>` in the background. The last few of them stay, and the one with the best average QoS."""

    def __init__(self, run: Path, keep: int) -> None:
        score = itemgetter(_SCORE)
        kept = AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=score, n=1)])
        # Without best_fn, Orbax would not write the metrics.
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=score)
        self._folder = run / STATES
        self._named = ExitStack()
        with disk_advice(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            name = self._named.enter_context(without_pattern(self._folder))
            self._manager = ocp.CheckpointManager(name, options=options)

    def save(self, steps: int, state: PPOState, metrics: Mapping[str, float]) -> None:
        """Start to write a copy of the state, so that training can go on at once.

        Raises:
            UserError: this state or one before it cannot be written.
        """
        plain = jax.device_get(jax.tree.map(_plain, state))
        # Orbax does not notice every damage by itself.
        notes = {_SCORE: metrics.get(_SCORE, 0.0), _CHECKSUM: _checksum(by_name(plain))}
        with disk_advice(self._folder):
            self._manager.save(steps, args=ocp.args.Composite(state=ocp.args.StandardSave(plain)), metrics=notes)

    def wait(self) -> None:
        """Wait until what has been saved is on disk.

        Raises:
            UserError: it cannot be written.
        """
        with disk_advice(self._folder):
            self._manager.wait_until_finished()

    def __enter__(self) -> StateWriter:
        # Orbax logs stack traces of errors that it also raises.
        self._level = _ORBAX_LOG.level
        _ORBAX_LOG.setLevel(logging.CRITICAL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._named, disk_advice(self._folder):
                self._manager.close()  # waits for what is being written
        finally:
            _ORBAX_LOG.setLevel(self._level)


@contextmanager
def disk_advice(written: Path) -> Iterator[None]:
    """Turn a failure to write into one line.

    Raises:
        UserError: what is written here does not get to disk.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        _ignore_closed_loops()
        full = "No space left on device" in str(error)
        reason = "no space left on device" if full else (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{written} cannot be written ({reason}); what was saved before is kept: make room, then resume the run"
        ) from error


def _ignore_closed_loops() -> None:
    """Other threads of Orbax still report to an event loop that is closed once one of them has failed."""
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def has_states(run: Path) -> bool:
    """Whether the run has saved a state, sound or not."""
    return bool(_folders(run))


def read_state(run: Path, warn: Callable[[str], None]) -> Saved:
    """Return the run's latest sound state, and name those that are skipped.

    Raises:
        UserError: there is none.
    """
    folders = sorted(_folders(run), key=lambda path: int(path.name), reverse=True)
    for folder in folders:
        try:
            return Saved(int(folder.name), _read(folder))
        except UserError as error:
            warn(f"{error}; trying the one before")
    raise UserError(f"run {run} holds no {'sound ' if folders else ''}state under {STATES}/ to go on from")


def forget_others(run: Path, steps: int) -> None:
    """Delete what a run that goes on from these steps does not need.

    That is later states, which it writes anew, and the remains of those that were being written or deleted.
    """
    for path in (run / STATES).iterdir():
        if not path.name.isdigit() or int(path.name) > steps or not _is_sound(path):
            shutil.rmtree(path)


def resumed(fresh: PPOState, leaves: Leaves, source: Path) -> PPOState:
    """Return a saved state in place of a fresh one, on the same devices.

    Raises:
        UserError: it is that of another training.
    """
    return placed(fresh, leaves, source)


def forked(fresh: PPOState, source: Path, warn: Callable[[str], None]) -> PPOState:
    """Return a fresh state with the parameters of a run, a state or a checkpoint, and its optimiser if it is there.

    The schedule of the learning rate starts over.

    Raises:
        UserError: there is none, it is damaged, or its network is another.
    """
    if source.parent.name == STATES:
        leaves = _read(source)
    elif _folders(source):
        leaves = read_state(source, warn).leaves
    else:
        leaves = by_name({"params": read_policy(source).params})
    state = fresh._replace(params=placed({"params": fresh.params}, leaves, source)["params"])
    if any(name.startswith("optimiser/") for name in leaves):
        optimiser = placed({"optimiser": fresh.optimiser}, leaves, source)["optimiser"]
        state = state._replace(optimiser=jax.tree.map(_keep_schedule, fresh.optimiser, optimiser, is_leaf=_is_schedule))
    return state


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _keep_schedule(fresh: Any, saved: Any) -> Any:
    return fresh if _is_schedule(fresh) else saved


def _folders(run: Path) -> list[Path]:
    """Return the run's complete states: Orbax gives a folder its name last."""
    folder = run / STATES
    return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _read(folder: Path) -> Leaves:
    try:
        notes = json.loads((folder / "metrics" / "metrics").read_text())
        leaves = by_name(restore(folder / "state"))
        sound = notes[_CHECKSUM] == _checksum(leaves)
    except Exception as error:  # As for checkpoints: many kinds, one meaning.
        raise UserError(f"state {folder} cannot be read ({type(error).__name__})") from error
    if not sound:
        raise UserError(f"state {folder} is damaged: its checksum is another")
    return leaves


def _is_sound(folder: Path) -> bool:
    try:
        _read(folder)
    except UserError:
        return False
    return True


def placed(fresh: Any, leaves: Leaves, source: Path) -> Any:
    """Return `fresh` with what is saved under the same names, each leaf on the devices, or the host, where it is.

    Raises:
        UserError: something is missing, or has another shape.
    """

    def place(path: Any, leaf: Any) -> Any:
        name = _name(path)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        wanted = jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape
        saved = leaves.get(name)
        if saved is None or saved.shape != wanted:
            found = "absent" if saved is None else saved.shape
            raise UserError(f"{source} belongs to another network or site: {name} is {found}, but {wanted} is needed")
        if isinstance(leaf, np.ndarray):
            return saved
        value = jax.random.wrap_key_data(jnp.asarray(saved), impl=jax.random.key_impl(leaf)) if is_key else saved
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(place, fresh)


def by_name(tree: Any) -> Leaves:
    """Return the leaves by name, on the host; of random keys their data, which can be written."""
    return {_name(path): np.asarray(_plain(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def from_names(like: Any, leaves: Leaves) -> Any:
    """Return a tree of the form of `like` with these leaves, those under its names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)


def _plain(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(leaves: Leaves) -> int:
    checksum = 0
    for name in sorted(leaves):
        checksum = zlib.crc32(leaves[name].tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum

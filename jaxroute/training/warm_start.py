"""The host's side of the warm start: labels, regressions, and what is kept of them so that it can be resumed.

Two kinds of steps take turns: a call labels one state of each environment, and an epoch is a pass of a regression over
all labels so far. `warm_start/` in the run directory holds, for each seed, the labels in the parts in which they came
and everything else in one file. It is deleted when PPO begins.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.stages import Compiled
from jaxtyping import PRNGKeyArray

from jaxroute.config import Config
from jaxroute.errors import UserError
from jaxroute.files import write_file
from jaxroute.learning import Labelled, Regression
from jaxroute.progress import Progress
from jaxroute.training.interrupts import Interrupted, Interrupts
from jaxroute.training.programs import Program, Programs
from jaxroute.training.states import Leaves, by_name, from_names, placed

WARM_START = "warm_start"
_STAGE, _LABELS = "stage.npz", "labels-"
# Sets the warm start's random numbers apart from PPO's.
_RANDOM_NUMBERS = 1


class Stage(NamedTuple):
    """How far the warm start of a seed is. With the labels, this is all that it takes to go on exactly."""

    params: Any
    """The network's, as the last finished round has left them; on the host."""
    environments: Any
    regression: Regression
    calls: int = 0
    """Calls made, over all rounds."""
    errors: tuple[float, ...] = ()
    """Mean squared error of each epoch made, over all rounds."""


@dataclass
class SeedStart:
    """The warm start of one seed."""

    config: Config
    seed: int
    folder: Path | None
    """Where it is saved; None saves nothing."""
    begin_fit: Callable[[Any], Regression]
    label: Program
    fit: Program
    programs: Programs
    progress: Progress
    interrupts: Interrupts
    _unsaved: list[Labelled] = field(default_factory=list)

    def run(self, first: Any, environments: Any) -> Any:
        """Return the parameters after all rounds, which start from `first`; goes on with what is saved.

        Raises:
            Interrupted: a signal came.
            UserError: what is saved cannot be read, or there is no space to save.
        """
        _, key_order, key_label = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), _RANDOM_NUMBERS), 3)
        order = np.random.default_rng(np.asarray(jax.random.key_data(key_order)))
        stage, labels = self._read(Stage(first, environments, self.begin_fit(first)))
        for number in range(1, self.config.warm_start.num_rounds + 1):
            stage = self._label_round(number, stage, labels, key_label)
            stage = self._fit_round(number, stage, labels, order, first)
        self._save(stage)
        return stage.params

    def _label_round(self, number: int, stage: Stage, labels: list[Labelled], key: PRNGKeyArray) -> Stage:
        """Make the calls of a round that have not been made; their labels are added to `labels`."""
        calls = calls_per_round(self.config)
        if stage.calls >= number * calls:
            return stage
        label = self.programs.wait(self.label)
        self._show("labels", number, calls, stage.calls - (number - 1) * calls)
        while stage.calls < number * calls:
            started = time.perf_counter()
            environments, labelled = label(
                stage.params, jnp.bool_(number > 1), stage.environments, jax.random.fold_in(key, stage.calls)
            )
            labels.append(multihost_utils.process_allgather(labelled, tiled=True))
            self._unsaved.append(labels[-1])
            stage = stage._replace(environments=environments, calls=stage.calls + 1)
            speed = len(labels[-1].values) / (time.perf_counter() - started)
            self.progress.advance(note=f"{speed:,.0f} states/s")
            self._after_step(stage, stage.calls)
        return stage

    def _fit_round(
        self, number: int, stage: Stage, labels: list[Labelled], order: np.random.Generator, first: Any
    ) -> Stage:
        """Make the epochs of a round that have not been made, from the parameters `first`."""
        assert self.config.ppo.num_envs is not None
        epochs = self.config.warm_start.num_epochs
        size = number * calls_per_round(self.config) * self.config.ppo.num_envs
        done = min(epochs, len(stage.errors) - (number - 1) * epochs)
        for _ in range(done):
            order.permutation(size)  # so that the epochs to come get the order that they would have had
        if done == epochs:
            return stage
        data = jax.tree.map(lambda *parts: np.concatenate(parts), *labels)
        labels[:] = [data]
        fit = self.programs.wait(self.fit)
        self._show("regression", number, epochs, done)
        for epoch in range(done, epochs):
            if epoch == 0:
                stage = stage._replace(regression=self.begin_fit(first))
            stage = self._epoch(fit, number, stage, data, order.permutation(size))
            if epoch == epochs - 1:
                stage = stage._replace(params=jax.device_get(stage.regression.params))
            self.progress.advance()
            self._after_step(stage, len(stage.errors))
        self.progress.console.print(
            f"Warm start: {size:,} states labelled; mean squared error of the experts' values "
            f"{stage.errors[-epochs]:.5f} in the first epoch, {stage.errors[-1]:.5f} in the last",
            soft_wrap=True,
        )
        return stage

    def _epoch(self, fit: Compiled, number: int, stage: Stage, data: Labelled, order: np.ndarray) -> Stage:
        regression, errors = stage.regression, []
        # As many states a pass in every round, so that one program serves all.
        for chosen in order.reshape(number, -1):
            states = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], data)
            regression, error = fit(regression, states, jnp.int32(self.config.warm_start.num_epochs * number))
            errors.append(error)
        return stage._replace(regression=regression, errors=(*stage.errors, float(np.mean(errors))))

    def _show(self, what: str, number: int, total: int, done: int) -> None:
        self.progress.begin(f"warm start: {what}, round {number} of {self.config.warm_start.num_rounds}", total, done)

    def _after_step(self, stage: Stage, steps: int) -> None:
        stop = self.interrupts.received is not None
        if stop or steps % self.config.train.save_interval == 0:
            self._save(stage)
        if stop:
            raise Interrupted("in the warm start")

    def _save(self, stage: Stage) -> None:
        if self.folder is None:
            return
        # Labels first: those that the stage does not know of are made again.
        if self._unsaved:
            new = jax.tree.map(lambda *parts: np.concatenate(parts), *self._unsaved)
            _write(self.folder / f"{_LABELS}{stage.calls:06}.npz", by_name(new))
            self._unsaved.clear()
        counts = {"calls": np.asarray(stage.calls), "errors": np.asarray(stage.errors)}
        _write(self.folder / _STAGE, counts | by_name(_trees(stage)))

    def _read(self, fresh: Stage) -> tuple[Stage, list[Labelled]]:
        """Return the stage that is saved with its labels, or the fresh one and none."""
        if self.folder is None or not (self.folder / _STAGE).exists():
            return fresh, []
        leaves = _read(self.folder / _STAGE)
        trees = placed(_trees(fresh), leaves, self.folder / _STAGE)
        stage = Stage(**trees, calls=int(leaves["calls"]), errors=tuple(leaves["errors"].tolist()))
        like = Labelled(stage.environments[0], values=0.0)  # type: ignore[arg-type]
        parts = sorted(self.folder.glob(f"{_LABELS}*.npz"))
        known = [part for part in parts if int(part.stem.removeprefix(_LABELS)) <= stage.calls]
        return stage, [from_names(like, _read(part)) for part in known]


def calls_per_round(config: Config) -> int:
    """Return how many calls of `label` a round takes: each labels one state of every environment."""
    assert config.warm_start.num_states is not None
    assert config.ppo.num_envs is not None
    return math.ceil(config.warm_start.num_states / config.ppo.num_envs)


def _trees(stage: Stage) -> dict[str, Any]:
    return {"params": stage.params, "environments": stage.environments, "regression": stage.regression}


def _write(path: Path, leaves: Leaves) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **leaves)
    write_file(path, content.getvalue())


def _read(path: Path) -> Leaves:
    """Read what `_write` wrote; the archive's checksums tell whether it is sound."""
    try:
        with np.load(path) as leaves:
            return dict(leaves)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); delete {path.parent} to start again there"
        ) from error

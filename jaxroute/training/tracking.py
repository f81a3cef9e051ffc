"""Where metrics go: a JSON-lines file always, Weights & Biases if asked for."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxroute.config import Config


class Tracker:
    """Write each set of metrics to metrics.jsonl and, by configuration, to W&B."""

    def __init__(self, run: Path, config: Config) -> None:
        self._file = (run / "metrics.jsonl").open("a", buffering=1)
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            # Imported here: it takes a second, and most runs do without.
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            self._wandb = wandb.init(
                mode=config.wandb.mode,  # type: ignore[arg-type]
                project=config.wandb.project,
                group=config.wandb.group,
                name=run.name,
                dir=str(run),
                config=dataclasses.asdict(config),
            )
            self._wandb.define_metric("*", step_metric="steps")

    def log(self, metrics: dict[str, float]) -> None:
        """Add one line."""
        self._file.write(json.dumps(metrics) + "\n")
        if self._wandb is not None:
            self._wandb.log(metrics)

    def summary(self, values: dict[str, float]) -> None:
        """Note final results with the run."""
        if self._wandb is not None:
            self._wandb.summary.update(values)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

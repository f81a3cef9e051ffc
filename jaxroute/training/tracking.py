"""Where metrics go: a JSON-lines file always, Weights & Biases if asked for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxroute.config import Config

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Write each set of metrics to metrics.jsonl and, by configuration, to W&B."""

    def __init__(self, run: Path, config: Config, warn: Callable[[str], None]) -> None:
        self._file = (run / METRICS_FILE).open("w", buffering=1)
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            self._wandb = _start_wandb(run, config, warn)

    def log(self, metrics: dict[str, float]) -> None:
        """Add one line."""
        self._file.write(json.dumps(metrics) + "\n")
        if self._wandb is not None:
            self._wandb.log(metrics)

    def summary(self, values: dict[str, float]) -> None:
        """Note final results with the run in W&B."""
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


def _start_wandb(run: Path, config: Config, warn: Callable[[str], None]) -> Any:
    """Start a W&B run; if that fails (no key, no network), say so once and go on without."""
    # Imported here: it takes a second, and most runs do without.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if config.wandb.mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        warn("W&B: no API key (run `wandb login` or set WANDB_API_KEY); going on without W&B")
        return None
    try:
        started = wandb.init(
            mode=config.wandb.mode,  # type: ignore[arg-type]
            project=config.wandb.project,
            group=config.wandb.group,
            name=run.name,
            dir=str(run),
            config=dataclasses.asdict(config),
        )
        started.define_metric("*", step_metric="steps")
    except wandb.Error as error:
        warn(f"W&B: {str(error).splitlines()[0]}; going on without W&B")
        return None
    return started

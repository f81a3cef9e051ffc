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
    """Write each set of metrics to metrics.jsonl, after those of the first `steps`, and, by configuration, to W&B."""

    def __init__(self, run: Path, config: Config, warn: Callable[[str], None], steps: int = 0) -> None:
        _keep_lines(run / METRICS_FILE, steps)
        self._file = (run / METRICS_FILE).open("a", buffering=1)
        self._warn = warn
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            self._wandb = _start_wandb(run, config, warn)

    def log(self, metrics: dict[str, float]) -> None:
        """Add one line."""
        self._file.write(json.dumps(metrics) + "\n")
        self._tell_wandb(lambda wandb: wandb.log(metrics))

    def summary(self, values: dict[str, float]) -> None:
        """Note final results with the run in W&B."""
        self._tell_wandb(lambda wandb: wandb.summary.update(values))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tell_wandb(lambda wandb: wandb.finish(exit_code=0 if kind is None else 1))

    def _tell_wandb(self, tell: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # Whatever it is, training goes on.
            self._wandb = None
            self._warn(f"W&B: {_reason(error)}; going on without W&B")


def _keep_lines(path: Path, steps: int) -> None:
    """Leave the metrics of the first `steps`, which a resumed run goes on from."""
    lines = path.read_text().splitlines(keepends=True) if steps and path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["steps"] <= steps]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept))
    beside.replace(path)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    except Exception as error:  # W&B and what is below it raise many kinds.
        warn(f"W&B: {_reason(error)}; going on without W&B")
        return None
    return started

"""Where metrics go: a JSON-lines file always, Weights & Biases if asked for."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxroute import __version__
from jaxroute.config import Config
from jaxroute.files import write_file
from jaxroute.runs import CONFIG_FILE, latest_checkpoint, seed_runs
from jaxroute.training.states import disk_advice

METRICS_FILE = "metrics.jsonl"
# Holds the name of the run at W&B, which a resumed training goes on with.
_ID_FILE = "wandb_id"


class Tracker:
    """Append metrics to metrics.jsonl, after those of the first `steps`, and send them to W&B if configured."""

    def __init__(self, run: Path, config: Config, warn: Callable[[str], None], steps: int = 0) -> None:
        _keep_lines(run / METRICS_FILE, steps)
        self._file = (run / METRICS_FILE).open("a", buffering=1)
        self._run, self._config, self._warn = run, config, warn
        self._wandb: Any = None
        if config.wandb.mode != "disabled":
            self._wandb = _start_wandb(run, config, warn)

    def log(self, metrics: dict[str, float]) -> None:
        """Add one line."""
        with disk_advice(self._run / METRICS_FILE):
            self._file.write(json.dumps(metrics) + "\n")
        self._tell_wandb(lambda wandb: wandb.log(metrics))

    def finish(self, figures: dict[str, float]) -> None:
        """Send the results to W&B: final figures, the evaluation's table and plots, and the router."""
        self._tell_wandb(lambda wandb: _log_results(wandb, self._run, self._config, figures))

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
    """Keep only the metrics of the first `steps`, which a resumed run goes on from."""
    lines = path.read_text().splitlines(keepends=True) if steps and path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["steps"] <= steps]
    write_file(path, "".join(kept))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _log_results(started: Any, run: Path, config: Config, figures: dict[str, float]) -> None:
    import wandb

    started.summary.update(figures)
    results: dict[str, Any] = {f"eval/{plot.stem}": wandb.Image(str(plot)) for plot in sorted(run.glob("*.png"))}
    if (table := run / "results.csv").exists():
        with table.open(newline="") as file:
            header, *rows = map(list[Any], csv.reader(file))
        results["eval/results"] = wandb.Table(columns=header, data=rows)
    if results:
        started.log(results)
    router = wandb.Artifact(f"router-{started.id}", type="model", metadata=figures)
    router.add_file(str(run / CONFIG_FILE))
    # Of several seeds the first, which is the one that is judged.
    checkpoint = latest_checkpoint(next(iter(seed_runs(run, config))))
    router.add_dir(str(checkpoint), name=f"checkpoints/{checkpoint.name}")
    started.log_artifact(router)


def _start_wandb(run: Path, config: Config, warn: Callable[[str], None]) -> Any:
    """Start the run's W&B run, or go on with it; if that fails (no key, no network), say so once and go on without."""
    # Imported here, because it takes a second and most runs do not need it.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if config.wandb.mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        warn("W&B: no API key (run `wandb login` or set WANDB_API_KEY); going on without W&B")
        return None
    id_file = run / _ID_FILE
    if not id_file.exists():
        write_file(id_file, uuid.uuid4().hex[:8])
    try:
        started = wandb.init(
            mode=config.wandb.mode,  # type: ignore[arg-type]
            project=config.wandb.project,
            group=config.wandb.group,
            tags=config.wandb.tags,
            name=run.name,
            id=id_file.read_text(),
            resume="allow" if config.wandb.mode == "online" else None,  # offline, `wandb sync --append` joins the parts
            dir=str(run),
            config=dataclasses.asdict(config) | {"jaxroute_version": __version__},
        )
        started.define_metric("*", step_metric="steps")
        started.define_metric("train/avg_qos", step_metric="steps", summary="max")
    except Exception as error:  # W&B and what is below it raise many kinds.
        warn(f"W&B: {_reason(error)}; going on without W&B")
        return None
    return started

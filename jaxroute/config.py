"""Configuration: every option, typed, and how the command line becomes it.

The YAML files under configs/ are Hydra groups; these dataclasses are their schema. Values are checked here, before
anything is compiled or written.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from jaxroute.errors import UserError
from jaxroute.networks import NetworkConfig
from jaxroute.ppo import PPOConfig
from jaxroute.serving import SiteConfig
from jaxroute.workloads import BankConfig, WorkloadConfig


@dataclass
class RewardConfig:
    """The tailored reward; each part can be switched off by a weight of 0."""

    violation_penalty: float = 0.1
    """Per request that completes late."""
    rejection_penalty: float = 0.1
    """Per rejected request."""
    shaping: bool = True
    """Potential-based shaping with the estimator's expected QoS of all requests in flight."""
    expected_quality: bool = True
    """Reward the predicted quality, not the drawn outcome: the same on average if quality and timing are independent
    given the predictions, with much less noise."""

    def __post_init__(self) -> None:
        for name in ("violation_penalty", "rejection_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"reward: {name}={getattr(self, name)} must not be negative, and finite")


@dataclass
class TrainConfig:
    """How to train."""

    rates: list[float] = field(default_factory=lambda: [2.0, 14.0])
    """Least and greatest request rate, 1/s; each environment redraws its own in between."""
    redraw_every: int = 512
    """Steps after which an environment draws a new rate."""
    log_interval: int = 10
    """Updates between two looks from the host."""
    evaluate: bool = True
    """Judge the trained router against the rules at the end."""

    def __post_init__(self) -> None:
        if len(self.rates) != 2 or not 0 < self.rates[0] <= self.rates[1] < float("inf"):
            raise UserError(f"train: rates={list(self.rates)} must be two numbers, 0 < least <= greatest")
        for name in ("redraw_every", "log_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"train: {name}={getattr(self, name)} must be at least 1")


@dataclass
class EvalConfig:
    """How to judge."""

    seeds: int = 16
    """Independent episodes; every policy meets the same ones."""
    requests: int = 800
    """Requests per episode that count."""
    warmup: int = 300
    """Requests at the start of an episode that do not count: the site fills up."""
    loads: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.25, 1.5])
    """Multiples of the workload's rate to judge at; 1 is always among them."""
    seed: int = 1_000_000

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.requests < 1 or self.warmup < 0:
            raise UserError(
                f"eval: seeds={self.seeds} and requests={self.requests} must be at least 1, "
                f"warmup={self.warmup} at least 0"
            )
        if any(not 0 < load < float("inf") for load in self.loads):
            raise UserError(f"eval: loads={list(self.loads)} must all be above 0")


@dataclass
class WandbConfig:
    """Weights & Biases tracking."""

    mode: str = "disabled"
    """disabled, offline (needs no account) or online."""
    project: str = "jaxroute"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("disabled", "offline", "online"):
            raise UserError(f"wandb: mode={self.mode} is unknown; choose disabled, offline or online")


@dataclass
class Config:
    """All options of train.py and eval.py."""

    site: SiteConfig = MISSING
    workload: WorkloadConfig = MISSING
    bank: BankConfig = MISSING
    network: NetworkConfig = MISSING
    ppo: PPOConfig = MISSING
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    seed: int = 0
    data_dir: str | None = None
    """Folder of real traces and banks; the environment variable JAXROUTE_DATA by default."""
    output_dir: str | None = None
    """Where the run goes; outputs/<time>-<what> by default."""
    checkpoint: str | None = None
    """eval.py: a run directory or one of its checkpoints; without it the rules are compared alone."""
    policies: list[str] | None = None
    """Rules to judge; all by default."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie between 0 and 4294967295")

    @property
    def data_path(self) -> Path | None:
        """The data folder, if one is set."""
        folder = self.data_dir or os.environ.get("JAXROUTE_DATA")
        return Path(folder) if folder else None


def config_folder() -> Path:
    """Return where the YAML files are: beside the package in an installation, at the top of a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def register_schema() -> None:
    """Tell Hydra the types behind configs/config.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Compose and check the configuration that these Hydra overrides describe.

    Raises:
        UserError: an unknown key or group, a wrong type, a value out of range.
    """
    register_schema()
    try:
        for override in overrides:
            # The one open dictionary: stand-ins for a bank's models.
            if override.startswith("+") and not override.lstrip("+").startswith("bank.models."):
                raise UserError(
                    f"unknown option {override.lstrip('+')}; every option exists already, so leave out the +"
                )
        with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        return typed(composed)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_explain(error)) from None


def read_config(path: Path) -> Config:
    """Read a configuration that a run has written.

    Raises:
        UserError: it is not one, or was written by a version with other options.
    """
    try:
        return typed(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, UserError) as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def typed(composed: Any) -> Config:
    """Turn Hydra's composed configuration into the checked dataclasses."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def config_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _explain(error: Exception) -> str:
    """Shorten Hydra's and OmegaConf's messages to one line that says what, where and what to do."""
    cause: BaseException = error
    while not isinstance(cause, UserError) and cause.__cause__ is not None and str(cause.__cause__):
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark is not None:
        return f"{cause.problem_mark.name}, line {cause.problem_mark.line + 1}: {cause.problem}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    message = lines[0]
    if key := re.search(r"full_key: (\S+)", str(cause)):
        unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in)", message)
        if unknown:
            return f"unknown option {key.group(1)}{_suggestion(key.group(1))}"
        return f"{key.group(1)}: {message}"
    if options := re.search(r"Could not find '(\S+)/(\S+)'", str(cause)):
        available = sorted(path.stem for path in (config_folder() / options.group(1)).glob("[!_]*.yaml"))
        return f"unknown {options.group(1)} {options.group(2)}; choose one of {', '.join(available)}"
    return message


def _suggestion(key: str) -> str:
    known = list(_option_names(Config))
    near = (
        difflib.get_close_matches(key, known, n=1)
        or [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    )
    return f"; did you mean {near[0]}?" if near else "; see python train.py --help"


def _option_names(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for entry in fields(schema):
        inner = next((kind for kind in (hints[entry.name], *get_args(hints[entry.name])) if is_dataclass(kind)), None)
        yield prefix + entry.name
        if isinstance(inner, type) and hints[entry.name] is inner:
            yield from _option_names(inner, f"{prefix}{entry.name}.")

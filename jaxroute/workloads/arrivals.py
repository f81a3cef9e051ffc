"""Arrival processes: when the next request comes.

Every process is a pure function `(key, state, params) -> (gap, state)` whose gaps have mean 1. The environment
divides them by its request rate, so that one rate drives them all and can be redrawn at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxroute.errors import UserError
from jaxroute.workloads.trace import read_azure_trace


class ArrivalParams(NamedTuple):
    """Parameters of the processes; each reads its own."""

    shape: Float[Array, ""]
    """gamma: shape of the gap's distribution, 1 / cv^2."""
    gaps: Float[Array, "gap"]
    """trace: recorded gaps, in units of their mean."""


class ArrivalState(NamedTuple):
    """What a process remembers."""

    position: Int[Array, ""]
    """trace: the next recorded gap."""


ArrivalProcess = Callable[[PRNGKeyArray, ArrivalState, ArrivalParams], tuple[Float[Array, ""], ArrivalState]]


def poisson(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Memoryless arrivals: exponential gaps."""
    del params
    return jax.random.exponential(key), state


def gamma(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Renewal arrivals with gamma gaps; a coefficient of variation above 1 clusters them."""
    return jax.random.gamma(key, params.shape) / params.shape, state


def trace(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Recorded gaps in their order, starting over at the end."""
    del key
    gap = params.gaps[state.position]
    return gap, ArrivalState(position=(state.position + 1) % params.gaps.shape[0])


PROCESSES: dict[str, ArrivalProcess] = {"poisson": poisson, "gamma": gamma, "trace": trace}


def first_arrival_state(key: PRNGKeyArray, params: ArrivalParams) -> ArrivalState:
    """Start of an episode; a trace starts at a random place."""
    return ArrivalState(position=jax.random.randint(key, (), 0, params.gaps.shape[0]))


@dataclass
class RequirementConfig:
    """One class of service: what per-token latency its requests demand, and how common they are."""

    name: str
    latency: float
    """Limit on the normalised latency, s per output token."""
    share: float


@dataclass
class WorkloadConfig:
    """A workload as written in configs/workload: when requests come and how soon they must be served."""

    name: str
    arrivals: str
    """poisson, gamma or trace."""
    requirements: list[RequirementConfig]
    rate: float | None = None
    """Requests per second; a trace may leave it out and keep its recorded rate."""
    rate_scale: float = 1.0
    """Multiplies `rate`, or a trace's recorded rate."""
    cv: float = 1.0
    """gamma: coefficient of variation of the gaps."""
    trace: str | None = None
    """trace: file in the Azure format, relative to the data folder."""

    def __post_init__(self) -> None:
        where = f"workload {self.name}"
        if self.arrivals not in PROCESSES:
            raise UserError(f"{where}: arrivals={self.arrivals} is unknown; choose one of {', '.join(PROCESSES)}")
        if self.rate is None and self.arrivals != "trace":
            raise UserError(f"{where}: rate is missing; give requests per second, e.g. workload.rate=8")
        for key in ("rate", "rate_scale", "cv"):
            value = getattr(self, key)
            if value is not None and not (0 < value < float("inf")):
                raise UserError(f"{where}: {key}={value} must be above 0")
        if self.arrivals == "trace" and not self.trace:
            raise UserError(f"{where}: trace is missing; name a file in the Azure format")
        if not self.requirements:
            raise UserError(f"{where}: requirements is empty; give at least one class of service")
        for requirement in self.requirements:
            if not 0 < requirement.latency < float("inf") or not 0 <= requirement.share < float("inf"):
                raise UserError(
                    f"{where}: requirement {requirement.name} needs latency > 0 and share >= 0, "
                    f"not {requirement.latency} and {requirement.share}"
                )
        if sum(requirement.share for requirement in self.requirements) <= 0:
            raise UserError(f"{where}: the shares of all requirements are 0")


class Workload(NamedTuple):
    """A workload ready to run."""

    process: ArrivalProcess
    params: ArrivalParams
    rate: float
    """Nominal requests per second."""
    requirement: Float[Array, "class"]
    """Latency requirement of each class of service, s per output token."""
    share: Float[Array, "class"]
    """Probability of each class."""


def build_workload(config: WorkloadConfig, data_dir: Path | None) -> Workload:
    """Read what the configuration names and turn it into arrays.

    Raises:
        UserError: a trace that does not exist or is malformed.
    """
    gaps, rate = np.ones(1), config.rate
    if config.arrivals == "trace":
        assert config.trace is not None
        path = Path(config.trace)
        if not path.is_absolute():
            if data_dir is None:
                raise UserError(
                    f"workload {config.name}: trace {path} is looked up in the data folder; "
                    "set JAXROUTE_DATA or data_dir to it, or give an absolute path"
                )
            path = data_dir / path
        times = read_azure_trace(path).arrival_time
        gaps = np.diff(times)
        if gaps.size == 0 or gaps.sum() <= 0:
            raise UserError(f"{path}: needs at least two requests at different times")
        rate = rate if rate is not None else 1 / gaps.mean()
        gaps = gaps / gaps.mean()
    assert rate is not None
    shares = np.asarray([requirement.share for requirement in config.requirements])
    return Workload(
        process=PROCESSES[config.arrivals],
        params=ArrivalParams(shape=jnp.float32(1 / config.cv**2), gaps=jnp.asarray(gaps, jnp.float32)),
        rate=rate * config.rate_scale,
        requirement=jnp.asarray([requirement.latency for requirement in config.requirements], jnp.float32),
        share=jnp.asarray(shares / shares.sum(), jnp.float32),
    )

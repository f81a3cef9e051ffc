"""Arrival processes: when the next request comes.

Every process is a pure function `(key, state, params) -> (gap, state)` whose gaps have mean 1. The environment
divides them by its request rate, so that one rate drives them all and can be redrawn at any time. Lengths of time
are in mean gaps here, in seconds at the nominal rate in the configuration: at another rate they scale along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.errors import UserError
from jaxroute.workloads.limits import Limits, RequirementConfig, check_requirements, limits_of
from jaxroute.workloads.sessions import SessionsConfig
from jaxroute.workloads.traces import read_trace

# Bursts that begin or end within one gap, at most. More take gaps as long as bursts: at the defaults, not one in 10^7.
_MAX_SWITCHES = 2
# Newton steps towards the next gap of a swing; down to float32's precision where amplitude <= 0.8 and a period takes at
# least 200 gaps.
_NEWTON_STEPS = 3
# What `mixed` chooses from, each as often; 0 is Poisson, and 4 the workload's own process, where that is another.
_CLUSTERED, _MMPP, _DIURNAL, _OWN = 1, 2, 3, 4
# Between which values it draws, log-uniformly.
_MIXED_RANGES = {
    "cv": (1.0, 4.0),
    "burst_ratio": (2.0, 6.0),
    "burst_seconds": (5.0, 60.0),
    "amplitude": (0.2, 0.8),
    "period": (60.0, 1200.0),
}


class Pattern(NamedTuple):
    """How one environment's arrivals vary; each process reads its own."""

    cv: Float[Array, "*range"]
    """mixed: coefficient of variation of clustered gaps."""
    burst_ratio: Float[Array, "*range"]
    """Rate in a burst / rate outside."""
    burst_length: Float[Array, "*range"]
    """Mean length of a burst, in mean gaps."""
    amplitude: Float[Array, "*range"]
    """The rate swings between 1 - amplitude and 1 + amplitude times its mean."""
    period: Float[Array, "*range"]
    """Length of a swing, in mean gaps."""


class ArrivalParams(NamedTuple):
    """Parameters of the processes; each reads its own."""

    shape: Float[Array, ""]
    """gamma: shape of the gap's distribution, 1 / cv^2."""
    gaps: Float[Array, "gap"]
    """trace: recorded gaps, in units of their mean."""
    burst_share: Float[Array, ""]
    """mmpp: share of time in bursts."""
    pattern: Pattern
    """Least and greatest of each, (2,): an environment draws its own at its start; equal unless mixed."""
    own: Pattern | None = None
    """mixed: pattern of the workload's own process, if some environments follow that."""


class ArrivalState(NamedTuple):
    """What a process remembers."""

    position: Int[Array, ""]
    """trace: the next recorded gap."""
    kind: Int[Array, ""]
    """mixed: which process this environment follows."""
    pattern: Pattern
    in_burst: Bool[Array, ""]
    """mmpp: whether a burst is on."""
    until_switch: Float[Array, ""]
    """mmpp: time until a burst begins or ends, in mean gaps."""
    phase: Float[Array, ""]
    """diurnal: place in the swing, rad."""


ArrivalProcess = Callable[[PRNGKeyArray, ArrivalState, ArrivalParams], tuple[Float[Array, ""], ArrivalState]]


def poisson(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Memoryless arrivals: exponential gaps."""
    del params
    return jax.random.exponential(key, (), jnp.float32), state


def gamma(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Renewal arrivals with gamma gaps; a coefficient of variation above 1 clusters them."""
    return jax.random.gamma(key, params.shape, dtype=jnp.float32) / params.shape, state


def trace(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Recorded gaps in their order, starting over at the end."""
    del key
    gap = params.gaps[state.position]
    return gap, state._replace(position=(state.position + 1) % params.gaps.shape[0])


def mmpp(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Markov-modulated Poisson arrivals: a higher rate in bursts, which begin and end at random."""
    gap, *stays = jax.random.exponential(key, (1 + _MAX_SWITCHES,), jnp.float32)
    return _through_bursts(gap, stays, state.pattern.burst_ratio, state, params)


def diurnal(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Poisson arrivals whose rate swings like a sine."""
    del params
    return _through_swing(jax.random.exponential(key, (), jnp.float32), state.pattern.amplitude, state)


def mixed(key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams) -> tuple[Float[Array, ""], ArrivalState]:
    """Each environment its own: poisson, clustered gaps, mmpp or diurnal; one formula with the others switched off."""
    key_branch, key_sizes = jax.random.split(key)
    gap, *stays = jax.random.exponential(key_sizes, (1 + _MAX_SWITCHES,), jnp.float32)
    kind, pattern = state.kind, state.pattern
    gap = gap * _cluster_scale(key_branch, jnp.where(kind == _CLUSTERED, pattern.cv, 1.0))
    gap, state = _through_bursts(gap, stays, jnp.where(kind == _MMPP, pattern.burst_ratio, 1.0), state, params)
    return _through_swing(gap, jnp.where(kind == _DIURNAL, pattern.amplitude, 0.0), state)


def _mixed_with(
    own: ArrivalProcess, key: PRNGKeyArray, state: ArrivalState, params: ArrivalParams
) -> tuple[Float[Array, ""], ArrivalState]:
    """`mixed`, with environments that follow the workload's own process."""
    follows_own = state.kind == _OWN
    return jax.tree.map(
        lambda one, other: jnp.where(follows_own, one, other), own(key, state, params), mixed(key, state, params)
    )


PROCESSES: dict[str, ArrivalProcess] = {
    "poisson": poisson,
    "gamma": gamma,
    "mmpp": mmpp,
    "diurnal": diurnal,
    "mixed": mixed,
    "trace": trace,
}

# Made once: a process is static, and a new function would be compiled anew.
_MIXED_WITH: dict[str, ArrivalProcess] = {
    name: partial(_mixed_with, process) for name, process in PROCESSES.items() if name not in ("poisson", "mixed")
}


def first_arrival_state(key: PRNGKeyArray, params: ArrivalParams) -> ArrivalState:
    """Start of an episode: a random place in a trace or a pattern, and a pattern of its own.

    An episode starts with a request, and requests come more often where the rate is high: so do starts, or the first
    gaps would be longer than 1 on average.
    """
    # Apart from the draw of `position`, which takes `key` itself.
    key_kind, key_pattern, key_burst, key_switch, key_phase = jax.random.split(jax.random.fold_in(key, 2), 5)
    drawn = jax.random.uniform(key_pattern, (len(Pattern._fields),), jnp.float32)
    pattern = Pattern(*(low * (high / low) ** u for (low, high), u in zip(params.pattern, drawn, strict=True)))
    kind = jax.random.randint(key_kind, (), 0, _OWN if params.own is None else _OWN + 1, jnp.int32)
    if params.own is not None:
        pattern = jax.tree.map(lambda own, other: jnp.where(kind == _OWN, own, other), params.own, pattern)
    share, ratio = params.burst_share, pattern.burst_ratio
    in_burst = jax.random.bernoulli(key_burst, share * ratio / (1 + share * (ratio - 1)))
    # A place and its mirror image have rates that add up to 2: the choice between them weighs both by their rate.
    place, choice = jax.random.uniform(key_phase, (2,), jnp.float32) * jnp.asarray([2 * jnp.pi, 2.0], jnp.float32)
    phase = jnp.where(choice < 1 + pattern.amplitude * jnp.sin(place), place, -place)
    return ArrivalState(
        position=jax.random.randint(key, (), 0, params.gaps.shape[0], jnp.int32),
        kind=kind,
        pattern=pattern,
        in_burst=in_burst,
        until_switch=jax.random.exponential(key_switch, (), jnp.float32) * _mean_length(in_burst, pattern, params),
        phase=phase,
    )


def _mean_length(in_burst: Bool[Array, ""], pattern: Pattern, params: ArrivalParams) -> Float[Array, ""]:
    """Mean length of a burst or of the quiet between two, in mean gaps."""
    share = params.burst_share
    return pattern.burst_length * jnp.where(in_burst, 1.0, (1 - share) / share)


def _cluster_scale(key: PRNGKeyArray, cv: Float[Array, ""]) -> Float[Array, ""]:
    """Mean of one exponential gap; drawn anew for each, it makes them hyperexponential with mean 1 and this cv >= 1.

    Many short gaps and few long ones, with balanced means: as bursty as gamma gaps of the same cv, without a rejection
    sampler, whose loop waits for its slowest lane.
    """
    short = (1 + jnp.sqrt((cv**2 - 1) / (cv**2 + 1))) / 2
    return 0.5 / jnp.where(jax.random.uniform(key, (), jnp.float32) < short, short, 1 - short)


def _through_bursts(
    work: Float[Array, ""],
    stays: Sequence[Float[Array, ""]],
    ratio: Float[Array, ""],
    state: ArrivalState,
    params: ArrivalParams,
) -> tuple[Float[Array, ""], ArrivalState]:
    """Time in which the rate, higher in bursts, adds up to `work`; `stays` are exponential draws of mean 1."""
    share = params.burst_share
    quiet_rate = 1 / (1 + share * (ratio - 1))
    in_burst, left, time = state.in_burst, state.until_switch, jnp.float32(0.0)
    for stay in stays:
        rate = quiet_rate * jnp.where(in_burst, ratio, 1.0)
        switches = work > rate * left
        time = jnp.where(switches, time + left, time)
        work = jnp.where(switches, work - rate * left, work)
        in_burst = in_burst ^ switches
        left = jnp.where(switches, stay * _mean_length(in_burst, state.pattern, params), left)
    rate = quiet_rate * jnp.where(in_burst, ratio, 1.0)
    # Beyond the last switch that a gap may hold, the rest passes at the mean rate while the bursts stand still, so that
    # the mean gap is 1 whatever the bound.
    beyond = work > rate * left
    rest = jnp.where(beyond, work, work / rate)
    left = jnp.where(beyond, left, jnp.maximum(left - rest, 0.0))
    return time + rest, state._replace(in_burst=in_burst, until_switch=left)


def _through_swing(
    work: Float[Array, ""], amplitude: Float[Array, ""], state: ArrivalState
) -> tuple[Float[Array, ""], ArrivalState]:
    """Time in which the rate 1 + amplitude * sin(phase) adds up to `work`.

    As an angle x from the phase p, it solves x + amplitude * (cos(p) - cos(p + x)) = y, Kepler's equation.
    """
    phase = state.phase
    speed = 2 * jnp.pi / state.pattern.period
    y = work * speed
    low = jnp.maximum(y / (1 + amplitude), y - 2 * amplitude)
    high = jnp.minimum(y / (1 - amplitude), y + 2 * amplitude)
    x = jnp.clip(y / (1 + amplitude * jnp.sin(phase)), low, high)
    for _ in range(_NEWTON_STEPS):
        # The difference of cosines as a product: the two are nearly equal, as a gap is a small part of a period.
        excess = x + 2 * amplitude * jnp.sin(x / 2) * jnp.sin(phase + x / 2) - y
        x = jnp.clip(x - excess / (1 + amplitude * jnp.sin(phase + x)), low, high)
    return x / speed, state._replace(phase=(phase + x) % (2 * jnp.pi))


@dataclass
class WorkloadConfig:
    """A workload as written in configs/workload: when requests come and how soon they must be served."""

    name: str
    """Name of the workload in tables and file names."""
    arrivals: str
    """Arrival process: poisson, gamma, mmpp, diurnal, mixed or trace."""
    requirements: list[RequirementConfig]
    """The classes of service."""
    rate: float | None = None
    """Requests per second; a trace may leave it out and keep its recorded rate."""
    cv: float = 1.0
    """gamma: coefficient of variation of the gaps."""
    burst_ratio: float = 4.0
    """mmpp: rate inside a burst divided by the rate outside."""
    burst_share: float = 0.2
    """mmpp, mixed: share of the time that is spent in bursts."""
    burst_seconds: float = 20.0
    """mmpp: mean length of a burst, s, at the nominal rate."""
    amplitude: float = 0.6
    """diurnal: the rate swings between 1 - amplitude and 1 + amplitude times its mean."""
    period: float = 600.0
    """diurnal: length of one swing, s, at the nominal rate."""
    trace: str | None = None
    """trace: the recorded trace, in a format of docs/how-to/traces.md; a relative path starts at the data folder."""
    local_only: float = 0.0
    """Share of the prompts that must not leave the site for a cloud."""
    sessions: SessionsConfig | None = None
    """Requests that come in turns of sessions; null: each stands for itself."""

    def __post_init__(self) -> None:
        where = f"workload {self.name}"
        if self.arrivals not in PROCESSES:
            raise UserError(f"{where}: arrivals={self.arrivals} is unknown; choose one of {', '.join(PROCESSES)}")
        if self.rate is None and self.arrivals != "trace":
            raise UserError(f"{where}: rate is missing; give requests per second, e.g. workload.rate=8")
        numbers = ("rate", "cv", "burst_ratio", "burst_share", "burst_seconds", "amplitude", "period")
        for key in numbers:
            value = getattr(self, key)
            if value is not None and not (0 < value < float("inf")):
                raise UserError(f"{where}: {key}={value} must be above 0")
        if self.burst_ratio < 1:
            raise UserError(f"{where}: burst_ratio={self.burst_ratio} must be at least 1")
        for key in ("burst_share", "amplitude"):
            if getattr(self, key) >= 1:
                raise UserError(f"{where}: {key}={getattr(self, key)} must be below 1")
        if not 0 <= self.local_only <= 1:
            raise UserError(f"{where}: local_only={self.local_only} is a share; it must lie between 0 and 1")
        if self.arrivals == "trace" and not self.trace:
            raise UserError(f"{where}: trace is missing; name a file in one of the formats of docs/how-to/traces.md")
        check_requirements(self.requirements, where)


class Workload(NamedTuple):
    """A workload ready to run."""

    process: ArrivalProcess
    params: ArrivalParams
    rate: float
    """Nominal requests per second."""
    limits: Limits
    """Limits of each class of service, `(class,)`."""
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
        times = read_trace(path).arrival_time
        gaps = np.diff(times)
        if gaps.size == 0 or gaps.sum() <= 0:
            raise UserError(f"{path}: needs at least two requests at different times")
        rate = rate if rate is not None else 1 / gaps.mean()
        gaps = gaps / gaps.mean()
    assert rate is not None
    shares = np.asarray([requirement.share for requirement in config.requirements])
    return Workload(
        process=PROCESSES[config.arrivals],
        params=ArrivalParams(
            shape=jnp.float32(1 / config.cv**2),
            gaps=jnp.asarray(gaps, jnp.float32),
            burst_share=jnp.float32(config.burst_share),
            pattern=_pattern_ranges(config, rate),
        ),
        rate=rate,
        limits=limits_of(config.requirements),
        share=jnp.asarray(shares / shares.sum(), jnp.float32),
    )


def training_mix(config: WorkloadConfig, workload: Workload) -> Workload:
    """Return `workload`, built from `config`, with the arrivals to train on: `mixed`, its own process included.

    Each environment draws one of Poisson, clustered, bursty and drifting arrivals, and how strongly they vary. A
    workload's own process that is not Poisson (a trace, or a process with its own figures) is a fifth to draw.
    """
    if config.arrivals == "mixed":
        return workload
    pattern = _pattern_ranges(replace(config, arrivals="mixed", rate=workload.rate), workload.rate)
    if config.arrivals == "poisson":
        return workload._replace(process=mixed, params=workload.params._replace(pattern=pattern))
    own = jax.tree.map(lambda low_high: low_high[0], workload.params.pattern)
    params = workload.params._replace(pattern=pattern, own=own)
    return workload._replace(process=_MIXED_WITH[config.arrivals], params=params)


def _pattern_ranges(config: WorkloadConfig, rate: float) -> Pattern:
    """Least and greatest of what an environment draws at its start; seconds become mean gaps."""

    def between(name: str, scale: float = 1.0) -> Float[Array, "2"]:
        value = getattr(config, name)
        low, high = _MIXED_RANGES[name] if config.arrivals == "mixed" else (value, value)
        return jnp.asarray([low * scale, high * scale], jnp.float32)

    return Pattern(
        cv=between("cv"),
        burst_ratio=between("burst_ratio"),
        burst_length=between("burst_seconds", rate),
        amplitude=between("amplitude"),
        period=between("period", rate),
    )

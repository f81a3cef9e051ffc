"""Will a training fit into memory? Asked before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxroute.errors import UserError
from jaxroute.learning import PPOConfig, PPOState

# Of a step beside its observation: action, log-probability, values, reward, flags, advantage, target.
_BYTES_PER_STEP = 36
# What a minibatch takes with the network's activations, in terms of its observations (XLA's own figures for HAN).
_MINIBATCH = 6


def check_memory(config: PPOConfig, state: PPOState, num_seeds: int) -> None:
    """Estimate what the environments, a rollout and the optimiser need at once; `state` holds shapes.

    Raises:
        UserError: they need more than is available.
    """
    available = _available()
    assert config.num_envs is not None
    steps = config.num_steps * (1 + _MINIBATCH / config.num_minibatches)
    rollout = steps * (_bytes(state.obs) + num_seeds * config.num_envs * _BYTES_PER_STEP)
    of_envs = rollout + _bytes(state.env_state) + _bytes(state.obs)
    of_network = 2 * _bytes(state.params) + _bytes(state.optimiser)
    if available is None or of_envs + of_network <= available:
        return
    fits = _even(config, int(config.num_envs * (available - of_network) / of_envs))
    raise UserError(
        f"ppo.num_envs={config.num_envs} needs about {_gib(of_envs + of_network)} of memory, but {_gib(available)} "
        "are available; " + (f"ppo.num_envs={fits} would fit" if fits else "none fits, lower ppo.num_steps")
    )


@contextmanager
def memory_advice(config: PPOConfig) -> Iterator[None]:
    """Turn XLA's failure to allocate into the same advice.

    Raises:
        UserError: memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        assert config.num_envs is not None
        fewer = _even(config, config.num_envs // 2)
        advice = f"try ppo.num_envs={fewer}" if fewer else "lower ppo.num_steps"
        raise UserError(f"ppo.num_envs={config.num_envs} needs more memory than is available; {advice}") from error


def _available() -> int | None:
    """Bytes that can be allocated on all devices of this training; None if nobody says."""
    if jax.default_backend() != "cpu":
        stats: list[Any] = [device.memory_stats() for device in jax.local_devices()]
        if not all(stats):
            return None
        # All devices hold the same share.
        return jax.device_count() * min(stat["bytes_limit"] - stat["bytes_in_use"] for stat in stats)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found.group(1)) * 1024 if found else None


def _even(config: PPOConfig, num_envs: int) -> int:
    """Return the greatest number of environments up to this one that divides among devices, groups and minibatches."""
    return max(0, num_envs - num_envs % (config.envs_divisor * jax.device_count()))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"

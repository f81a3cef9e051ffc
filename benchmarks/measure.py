"""What the benchmarks share: busy sites, compiled programs, medians of runs taken in turn, processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from jaxroute.devices import usable_cores, use_cpu_devices
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation

EVERYWHERE, SPREAD = PartitionSpec(), PartitionSpec("device")

_Name = TypeVar("_Name", bound=Hashable)
_Result = TypeVar("_Result")

# A site has filled after so many requests, or after as many as it has slots; so many sites are filled apart, and copied
# if more are asked for.
_FILLING_STEPS = 200
_FILLED_SITES, _FILLED_LARGE_SITES = 64, 16
_LARGE = 64


class Compiled(NamedTuple):
    """A program ready to run, and what it took to make it."""

    call: Callable[..., Any]
    seconds: float
    """Tracing and compilation."""
    memory: int
    """Bytes it needs at once, arguments included."""


def busy_sites(env: EdgeRouting, params: EnvParams, num_envs: int) -> tuple[Observation, EnvState]:
    """Return observations and states, `(env, ...)`, of sites that random routing has filled."""
    num_filled = _FILLED_SITES if env.num_slots <= _LARGE else _FILLED_LARGE_SITES
    filled = _fill(env, params, jax.random.split(jax.random.key(0), num_filled))
    return jax.tree.map(lambda leaf: leaf[jnp.arange(num_envs) % num_filled], filled)


@partial(jax.jit, static_argnames="env")
def _fill(env: EdgeRouting, params: EnvParams, keys: PRNGKeyArray) -> tuple[Observation, EnvState]:
    def one(key: PRNGKeyArray) -> tuple[Observation, EnvState]:
        key_reset, key_steps = jax.random.split(key)

        def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, None]:
            key_action, key_env = jax.random.split(key)
            action = jax.random.randint(key_action, (), 0, env.num_actions)
            return env.step(key_env, carry[1], action, params)[:2], None

        steps = max(_FILLING_STEPS, env.num_slots * env.num_experts)
        return jax.lax.scan(step, env.reset(key_reset, params), jax.random.split(key_steps, steps))[0]

    return jax.vmap(one)(keys)


def one_device_per_core() -> None:
    """Make every core of a CPU a device of JAX, unless the user has said how many; before anything else of JAX.

    Most of a step's programs are too short for XLA to share one among cores.
    """
    use_cpu_devices(usable_cores())


def on_all_devices(program: Callable[..., Any], num_envs: int, in_specs: tuple, out_specs: Any) -> Callable[..., Any]:
    """Return the program for equal shares of the environments on each device, or on one where they do not divide."""
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices if num_envs % len(devices) == 0 else devices[:1]), ("device",))
    return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def compile_program(program: Callable[..., Any], *arguments: Any) -> Compiled:
    """Compile `program` for these arguments."""
    started = time.perf_counter()
    executable = jax.jit(program).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    sizes = executable.memory_analysis()
    memory = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return Compiled(executable, seconds, memory)


def memory_limit() -> int:
    """Bytes that a program may take: the accelerator's, or half of the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory() -> int:
    """Most bytes held so far, of the accelerator or of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call, results awaited."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def median_seconds(calls: Mapping[_Name, Callable[[], Any]], runs: int) -> dict[_Name, float]:
    """Return each call's median time; taken in turn, so that a disturbance of the machine meets all alike."""
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if run:  # the first call may compile
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def in_own_process(function: Callable[..., _Result], *arguments: Any, cpu_devices: int | None = None) -> _Result:
    """Call `function` in a new process, so that its compilation, its peak memory and its CPU devices are its own."""
    before = os.environ.get("XLA_FLAGS")
    if cpu_devices is not None:
        os.environ["XLA_FLAGS"] = f"{before or ''} --xla_force_host_platform_device_count={cpu_devices}"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        if cpu_devices is not None:
            os.environ.pop("XLA_FLAGS") if before is None else os.environ.update(XLA_FLAGS=before)

"""What a process does with the machine's devices: cores, how hard the compiler tries, and what it keeps."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start takes seconds."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    wanted = {
        "jax_compilation_cache_dir": str(home / "jaxroute" / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }
    for option, value in wanted.items():
        if option.upper() not in os.environ:  # JAX reads it from there; the user knows better
            jax.config.update(option, value)


def usable_cores() -> int:
    """Cores that this process may use; a job scheduler or a container may leave it few of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_cpu_devices(count: int) -> None:
    """Make `count` devices of a CPU, unless the user has said how many there are, or JAX runs already."""
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def compiler_options(mesh: Mesh, *, runs_once: bool = False) -> dict[str, int]:
    """Return how hard a CPU's compiler shall try.

    What runs once is there in half the time without optimisation. The first level gives the environment and the
    networks code as fast as the third and last, if not faster, and takes four fifths of its time.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    return {"xla_backend_optimization_level": 0 if runs_once else 1}

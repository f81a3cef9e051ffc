"""What a process does with the machine's devices: cores, how hard the compiler tries, and what it keeps."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxroute.files import try_to_write


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start takes seconds.

    Where that is impossible, such as in a container without a home folder, this says so and keeps none.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # JAX reads it from there; the user knows better
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "jaxroute" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder is known
        print(
            f"warning: compiled programs are not kept, so that every start compiles again ({error}); "
            "JAX_COMPILATION_CACHE_DIR can name another folder for them",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def unusable_platform(error: Exception) -> str | None:
    """Return in one line what is wrong with JAX_PLATFORMS if that is why `error` was raised, else None."""
    wanted = os.environ.get("JAX_PLATFORMS")
    if not wanted:
        return None
    if "Unable to initialize backend" not in str(error):
        # Where a platform's plugin is missing, JAX says nothing: does it fail again?
        try:
            jax.devices()
            return None
        except (RuntimeError, AssertionError):
            pass
    jax.config.update("jax_platforms", None)
    there = sorted({"cpu", jax.default_backend()})
    return f"JAX_PLATFORMS={wanted} cannot be used on this machine; choose {' or '.join(there)}, or unset it"


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


def compiler_options(mesh: Mesh, *, runs_once: bool = False) -> dict[str, int | bool]:
    """Return how hard a CPU's compiler shall try.

    What runs once is there in a third of the time without optimisation, and without the newer of XLA's two ways to emit
    fused loops, which takes longer to compile and runs faster. The first level gives the environment and the networks
    code as fast as the third and last, if not faster, and takes four fifths of its time.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    if runs_once:
        return {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return {"xla_backend_optimization_level": 1}

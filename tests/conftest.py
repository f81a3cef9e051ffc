"""What all tests share: quick compilation, reproducible property tests, the folder with measured data."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before JAX is imported, and through the environment so that tests that start a process pass it on.
# The suite is about results, not speed: it runs on the CPU unless told otherwise, and keeps what it compiled.
# Without XLA's optimisation, the same programs compile in a third of the time, and most tests run them for moments.
# `make exhaustive` compiles them as users do.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxroute" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# The same examples on every run, so that a failure is always a change of the code. To look further:
# pytest --hypothesis-profile=explore
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, print_blob=False)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Free what a file has compiled: a program is many mappings of memory, and Linux allows a process 65,530."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()
    if chex := sys.modules.get("chex"):
        chex.clear_trace_counter()  # what two files share is traced once in each


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with public traces and measurements, which are not part of the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("JAXROUTE_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} does not exist (set JAXROUTE_DATA to the folder with vllm_runs/)")
    return folder


@pytest.fixture(scope="module")
def loop() -> Iterator[object]:
    """An event loop in a thread of its own, for what runs servers."""
    from serving import Loop

    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def site() -> object:
    """The site of the emulated servers, edge3."""
    from jaxroute.config import load_config

    return load_config(["site=edge3"]).site

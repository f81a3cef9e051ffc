"""Several processes that train one router together."""

from __future__ import annotations

import os

import jax

from jaxroute.config import Config
from jaxroute.devices import usable_cores, use_cpu_devices
from jaxroute.errors import UserError

# Environments of a training on a CPU, unless the user says otherwise.
ENVS_ON_CPU = 256

# The others wait at their end for the first process, which still judges the router.
_SHUTDOWN_TIMEOUT = 24 * 3600  # s


def join_processes() -> None:
    """Meet the other processes of this training; to be called before anything else of JAX.

    Slurm, Open MPI, Kubernetes (with the package kubernetes) and TPUs say who they are; elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
        UserError: who they are is not known, or they do not meet.
    """
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"train.distributed: {reason}; set JAX_COORDINATOR_ADDRESS=<host>:<port>, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID for each process, or start them with srun"
        ) from None


def split_cpu(config: Config) -> None:
    """Make two devices of a CPU, on which training is half as fast again; to be called before anything else of JAX.

    Most of a step's programs are too short for JAX to share one among cores. Does nothing for few environments, where
    the user has said how many devices there are, or where JAX runs already.
    """
    num_envs = config.ppo.num_envs or ENVS_ON_CPU
    if num_envs >= ENVS_ON_CPU and num_envs % (2 * config.ppo.envs_divisor) == 0 and usable_cores() > 1:
        use_cpu_devices(2)


def is_first_process() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return jax.process_index() == 0


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    if not value.isdecimal():
        raise UserError(f"{variable}={value} must be a number")
    return int(value)

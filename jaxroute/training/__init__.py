"""The host loop around the compiled learner: progress, metrics, checkpoints."""

from jaxroute.training.checkpoint import (
    TrainedPolicy,
    check_fits,
    latest_checkpoint,
    load_policy,
    read_policy,
    run_of,
    seed_runs,
)
from jaxroute.training.processes import is_first_process, join_processes, split_cpu
from jaxroute.training.train import train

__all__ = [
    "TrainedPolicy",
    "check_fits",
    "is_first_process",
    "join_processes",
    "latest_checkpoint",
    "load_policy",
    "read_policy",
    "run_of",
    "seed_runs",
    "split_cpu",
    "train",
]

"""The host loop around the compiled learner: progress, metrics, checkpoints."""

from jaxroute.training.loop import train
from jaxroute.training.processes import is_first_process, join_processes, split_cpu

__all__ = ["is_first_process", "join_processes", "split_cpu", "train"]

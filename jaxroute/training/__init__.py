"""The host loop around the compiled learner: progress, metrics, checkpoints."""

from jaxroute.training.checkpoint import TrainedPolicy, latest_checkpoint, load_policy
from jaxroute.training.train import train

__all__ = ["TrainedPolicy", "latest_checkpoint", "load_policy", "train"]

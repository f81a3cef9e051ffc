"""How a router learns: the warm start, and the compiled PPO loop."""

from jaxroute.learning.gae import generalised_advantages
from jaxroute.learning.ppo import Learner, PPOConfig, PPOState, make_ppo
from jaxroute.learning.warm_start import Labelled, Regression, WarmStart, WarmStartConfig, make_warm_start

__all__ = [
    "Labelled",
    "Learner",
    "PPOConfig",
    "PPOState",
    "Regression",
    "WarmStart",
    "WarmStartConfig",
    "generalised_advantages",
    "make_ppo",
    "make_warm_start",
]

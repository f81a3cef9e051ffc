"""The compiled PPO loop."""

from jaxroute.ppo.gae import generalised_advantages
from jaxroute.ppo.ppo import Learner, PPOConfig, PPOState, make_ppo

__all__ = ["Learner", "PPOConfig", "PPOState", "generalised_advantages", "make_ppo"]

"""The edge site as a reinforcement-learning environment."""

from jaxroute.env.environment import EdgeRouting
from jaxroute.env.types import EnvParams, EnvState, Observation, OutageParams, RewardParams

__all__ = ["EdgeRouting", "EnvParams", "EnvState", "Observation", "OutageParams", "RewardParams"]

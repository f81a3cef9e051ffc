"""The environment as one of gymnax's, with flat observations: its spaces need the `gymnax` extra."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.adapters.flat import LIMIT, flat_observation, num_features
from jaxroute.env import EdgeRouting, EnvParams, EnvState
from jaxroute.errors import UserError

if TYPE_CHECKING:
    from gymnax.environments import spaces


class GymnaxAdapter:
    """`jaxroute.make`'s pair as one environment with default parameters and spaces.

    Keys, states and rewards are the same; observations are vectors, and every `info` has the entries of gymnax.
    """

    def __init__(self, env: EdgeRouting, params: EnvParams) -> None:
        self.env = env
        self.default_params = params

    @property
    def name(self) -> str:
        """Name of the environment."""
        return type(self.env).__name__

    @property
    def num_actions(self) -> int:
        """One action per expert, and one for away if the environment has it."""
        return self.env.num_actions

    @partial(jax.jit, static_argnames="self")
    def reset(self, key: PRNGKeyArray, params: EnvParams | None = None) -> tuple[Float[Array, "feature"], EnvState]:
        """Start with an idle site and its first request."""
        obs, state = self.env.reset(key, self.default_params if params is None else params)
        return flat_observation(obs), state

    @partial(jax.jit, static_argnames="self")
    def step(
        self, key: PRNGKeyArray, state: EnvState, action: Int[Array, ""], params: EnvParams | None = None
    ) -> tuple[Float[Array, "feature"], EnvState, Float[Array, ""], Bool[Array, ""], Bool[Array, ""], dict[str, Any]]:
        """Route the request to expert `action`, or away; at a horizon, start over."""
        obs, state, reward, terminated, truncated, info = self.env.step(
            key, state, action, self.default_params if params is None else params
        )
        info |= {
            "terminated": terminated,
            "truncated": truncated,
            "final_observation": flat_observation(info.get("final_observation", obs)),
        }
        return flat_observation(obs), state, reward, terminated, truncated, info

    def action_space(self, params: EnvParams | None = None) -> spaces.Discrete:
        """Return the actions to choose from."""
        del params
        return _spaces().Discrete(self.num_actions)

    def observation_space(self, params: EnvParams | None = None) -> spaces.Box:
        """Return the space of the flat observations."""
        size = num_features(self.env, self.default_params if params is None else params)
        return _spaces().Box(-LIMIT, LIMIT, (size,))


def _spaces() -> Any:
    try:
        from gymnax.environments import spaces
    except ModuleNotFoundError as error:
        raise UserError(
            f"module {error.name}, which gymnax's spaces need, is missing; run pip install 'jaxroute[gymnax]' first"
        ) from None
    return spaces

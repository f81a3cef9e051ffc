"""The environment as Stable-Baselines3's `VecEnv`: many sites in one call; needs the `gymnasium` extra and the library.

Stable-Baselines3 accepts Gymnasium's `Env`, whose copies it steps one by one, or its own `VecEnv`, but no `VectorEnv`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.adapters.gymnasium import TOTALS, GymnasiumVectorEnv
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    raise UserError(f"module {error.name} is missing; run pip install stable-baselines3 first") from None


class StableBaselinesVecEnv(VecEnv):
    """`num_envs` sites side by side."""

    def __init__(self, env: EdgeRouting, params: EnvParams, num_envs: int) -> None:
        self.envs = GymnasiumVectorEnv(env, params, num_envs)
        super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self) -> Float[np.ndarray, "env feature"]:
        """Start all environments, from the seed of `seed` if it was called."""
        obs, _ = self.envs.reset(seed=self._seeds[0])
        self._reset_seeds()
        return obs

    def step_async(self, actions: Int[np.ndarray, "env"]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[Float[np.ndarray, "env feature"], Float[np.ndarray, "env"], Bool[np.ndarray, "env"], list[dict]]:
        """Route each environment's request; `infos` holds the last observation of those that start over."""
        obs, reward, _, truncated, told = self.envs.step(self._actions)
        infos: list[dict[str, Any]] = [{name: told[name][e] for name in TOTALS} for e in range(self.num_envs)]
        for e in np.flatnonzero(truncated):
            infos[e] |= {"terminal_observation": told["final_obs"][e], "TimeLimit.truncated": True}
        return obs, reward, truncated, infos

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute, which all environments share."""
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: one environment cannot be changed alone."""
        raise UserError(f"{attr_name} cannot be set in a compiled environment; make another one")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Refuse: the environments are one object."""
        raise UserError(f"{method_name} cannot be called on single environments of a compiled batch")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return that none is."""
        return [False for _ in self._get_indices(indices)]

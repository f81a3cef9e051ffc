"""The environment as Gymnasium's `VectorEnv` and `Env`, with flat observations: needs the `gymnasium` extra."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.adapters.flat import LIMIT, flat_observation, num_features
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.errors import UserError
from jaxroute.policies.protocol import eligible_actions
from jaxroute.serving.checks import whole, whole_array

try:
    from gymnasium import Env
    from gymnasium.spaces import Box, Discrete
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ModuleNotFoundError as error:
    raise UserError(f"module {error.name} is missing; run pip install 'jaxroute[gymnasium]' first") from None

# The scalars in the `info` of a step; what is there per slot stays on the device.
TOTALS = ("rejected", "overflowed", "declined", "gap", "qos_sum", "num_completed", "num_late", "num_lost")


class GymnasiumVectorEnv(VectorEnv):
    """`num_envs` sites side by side, all steps compiled into one call.

    At the horizon an environment starts over in the same step, and `infos["final_obs"]` holds its last observation.
    `infos["action_mask"]` is 1 for the experts that would accept the arriving request, else 0; and 1 for away, the last
    action, if the environment has it.
    """

    def __init__(self, env: EdgeRouting, params: EnvParams, num_envs: int) -> None:
        num_envs = whole("num_envs", num_envs, 1)
        self.env, self.params, self.num_envs = env, params, num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.single_observation_space = Box(-LIMIT, LIMIT, (num_features(env, params),), np.float32)
        self.single_action_space = Discrete(env.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._key: PRNGKeyArray | None = None
        self._state: EnvState | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "env feature"], dict[str, Any]]:
        """Start all environments; the same seed starts the same episodes."""
        super().reset(seed=seed)
        key = jax.random.key(self.np_random.integers(2**32))
        obs, mask, self._state, self._key = _reset(self.env, self.params, key, self.num_envs)
        return np.array(obs), self._told({"action_mask": mask})

    def step(
        self, actions: Int[np.ndarray, "env"]
    ) -> tuple[
        Float[np.ndarray, "env feature"],
        Float[np.ndarray, "env"],
        Bool[np.ndarray, "env"],
        Bool[np.ndarray, "env"],
        dict[str, Any],
    ]:
        """Route each environment's request to the expert that `actions` names, or away.

        Raises:
            UserError: before `reset`, or actions that are not the number of one action for each environment.
        """
        if self._state is None:
            raise UserError("GymnasiumVectorEnv.step was called before reset; call reset first")
        actions = whole_array("actions", actions, 0, self.env.num_actions - 1)
        if actions.shape != (self.num_envs,):
            raise UserError(f"actions has shape {actions.shape}; give one for each environment, ({self.num_envs},)")
        obs, final_obs, mask, reward, terminated, truncated, totals, self._state, self._key = _step(
            self.env, self.params, self._key, self._state, jnp.asarray(actions, jnp.int32)
        )
        infos = self._told(totals | {"action_mask": mask})
        for index in np.flatnonzero(truncated):
            infos = self._add_info(infos, {"final_obs": np.array(final_obs)[index]}, int(index))
        return np.array(obs), np.array(reward), np.array(terminated), np.array(truncated), infos

    def _told(self, infos: dict[str, Array]) -> dict[str, Any]:
        """Convert to NumPy, and add for every key the mask that Gymnasium expects: all entries are valid."""
        everybody = np.ones(self.num_envs, bool)
        values = {name: np.array(value) for name, value in infos.items()}
        return values | {f"_{name}": everybody.copy() for name in infos}


class GymnasiumEnv(Env):
    """One site. At the horizon it waits for `reset`.

    For many, `GymnasiumVectorEnv` is much faster than Gymnasium's vector environments, which call this one by one.
    Give `AsyncVectorEnv` context="spawn": JAX warns that a process which forks after it has started may hang.
    """

    def __init__(self, env: EdgeRouting, params: EnvParams) -> None:
        self._envs = GymnasiumVectorEnv(env, params, num_envs=1)
        self.metadata: dict[str, Any] = {"render_modes": []}
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "feature"], dict[str, Any]]:
        """Start with an idle site and its first request."""
        super().reset(seed=seed)
        obs, infos = self._envs.reset(seed=int(self.np_random.integers(2**32)))
        return obs[0], {"action_mask": infos["action_mask"][0]}

    def step(self, action: int) -> tuple[Float[np.ndarray, "feature"], float, bool, bool, dict[str, Any]]:
        """Route the request to expert `action`, or away, and let time pass until the next one arrives.

        Raises:
            UserError: before `reset`, or a number that is no action's.
        """
        action = whole("action", action, 0, self._envs.env.num_actions - 1)
        obs, reward, terminated, truncated, infos = self._envs.step(np.array([action]))
        last = infos["final_obs"][0] if truncated[0] else obs[0]
        info = {name: infos[name][0] for name in (*TOTALS, "action_mask")}
        return last, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


def _mask(obs: Observation) -> Int[Array, "action"]:
    return eligible_actions(obs).astype(jnp.int8)


@partial(jax.jit, static_argnames=("env", "num_envs"))
def _reset(
    env: EdgeRouting, params: EnvParams, key: PRNGKeyArray, num_envs: int
) -> tuple[Float[Array, "env feature"], Int[Array, "env action"], EnvState, PRNGKeyArray]:
    key, key_reset = jax.random.split(key)
    obs, state = jax.vmap(env.reset, (0, None))(jax.random.split(key_reset, num_envs), params)
    return jax.vmap(flat_observation)(obs), jax.vmap(_mask)(obs), state, key


@partial(jax.jit, static_argnames="env")
def _step(
    env: EdgeRouting, params: EnvParams, key: PRNGKeyArray, state: EnvState, actions: Int[Array, "env"]
) -> tuple[Any, ...]:
    """Return both observations, mask, reward, terminated, truncated, totals, and the next state and key."""
    key, key_step = jax.random.split(key)
    keys = jax.random.split(key_step, actions.shape[0])
    obs, state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(keys, state, actions, params)
    flat = jax.vmap(flat_observation)
    totals = {name: info[name] for name in TOTALS}
    final_obs = flat(info["final_observation"]) if env.horizon else None
    return flat(obs), final_obs, jax.vmap(_mask)(obs), reward, terminated, truncated, totals, state, key

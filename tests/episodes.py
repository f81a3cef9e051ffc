"""Recorded episodes for the tests: one compiled rollout per site, in which any rule or a script acts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.policies import RULES

NUM_ENVS, NUM_STEPS = 8, 64
LONG = 384
"""Steps of the episodes on edge6: long enough for most answers to end."""
SCRIPT = "script"
ROUTERS = (SCRIPT, *RULES)


class Episodes(NamedTuple):
    """What happened, as NumPy arrays with the leading axes env and step."""

    state: EnvState
    """The state at the decision."""
    obs: Observation
    """What the router saw of it."""
    action: np.ndarray
    reward: np.ndarray
    info: dict[str, np.ndarray]
    next_state: EnvState


@cache
def scenario(name: str) -> tuple[EdgeRouting, EnvParams]:
    """A scenario; edge3 rewards the drawn outcome, edge6 the predicted quality (which is compiled into the step)."""
    drawn = ("reward.expected_quality=false",) if name.startswith("edge3") else ()
    return jaxroute.make(name, overrides=drawn)


def step_keys(key: jax.Array, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """The key of the reset, and those of each step (one for the environment, one for the router)."""
    key_reset, key_steps = jax.random.split(key)
    return key_reset, jax.vmap(jax.random.split)(jax.random.split(key_steps, num_steps))


@partial(jax.jit, static_argnames="env")
@chex.assert_max_traces(n=2)  # once per site
def _play(env: EdgeRouting, params: EnvParams, keys: jax.Array, router: jax.Array, script: jax.Array) -> Any:
    def play_one(key: jax.Array, router: jax.Array, script: jax.Array) -> Any:
        def step(carry: tuple, xs: tuple) -> tuple:
            obs, state, memories = carry
            keys, scripted = xs
            decisions = {name: rule.act(rule.params, obs, keys[1], memories[name]) for name, rule in RULES.items()}
            action = jnp.stack([scripted, *(decision[0] for decision in decisions.values())])[router]
            next_obs, next_state, reward, _, _, info = env.step(keys[0], state, action, params)
            memories = {name: decision[1] for name, decision in decisions.items()}
            return (next_obs, next_state, memories), (obs, action, reward, info, next_state)

        key_reset, keys = step_keys(key, script.shape[0])
        obs, state = env.reset(key_reset, params)
        memories = {name: rule.memory for name, rule in RULES.items()}
        return state, jax.lax.scan(step, (obs, state, memories), (keys, script))[1]

    return jax.vmap(play_one)(keys, router, script)


def play(
    env: EdgeRouting,
    params: EnvParams,
    seed: int = 0,
    routers: Sequence[str] = (SCRIPT,),
    script: np.ndarray | None = None,
    num_steps: int = NUM_STEPS,
) -> Episodes:
    """Run `NUM_ENVS` environments side by side, `routers` taking turns over them; the script is random by default."""
    keys = jax.random.split(jax.random.key(seed), NUM_ENVS)
    router = jnp.array([ROUTERS.index(routers[e % len(routers)]) for e in range(NUM_ENVS)])
    if script is None:
        script = np.random.default_rng(seed).integers(0, env.num_experts, (NUM_ENVS, num_steps))
    played = _play(env, params, keys, router, jnp.asarray(script, jnp.int32))
    first, (obs, action, reward, info, next_state) = jax.tree.map(np.asarray, played)
    state = jax.tree.map(
        lambda first, later: np.concatenate([first[:, None], later[:, :-1]], axis=1), first, next_state
    )
    return Episodes(state, obs, action, reward, info, next_state)


def with_rates(params: EnvParams, least: float, greatest: float) -> EnvParams:
    """The same scenario with each environment's rate drawn from a range."""
    return params._replace(rate=jnp.array([least, greatest], jnp.float32))

"""Recorded episodes on edge6 for the tests: one compiled rollout, in which any rule or a script acts."""

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
SCRIPT = "script"
ROUTERS = (SCRIPT, *RULES)
# The drawn outcome is a choice that is compiled into the step; the price is high enough to be seen.
OVERRIDES = ("reward.expected_quality=false", "reward.accelerator_price=0.1")


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
def edge6() -> tuple[EdgeRouting, EnvParams]:
    """The scenario of all episodes."""
    return jaxroute.make("edge-poisson", overrides=OVERRIDES)


def changed(
    params: EnvParams, rates: tuple[float, float] | None = None, **fields: float | np.ndarray | jax.Array
) -> EnvParams:
    """The same scenario with other rates and other fields of the site (one value for all experts, or one for each)."""
    site = params.site
    columns = {name: jnp.broadcast_to(jnp.asarray(fields[name], getattr(site, name).dtype), 6) for name in fields}
    rate = params.rate if rates is None else jnp.array(rates, jnp.float32)
    return params._replace(site=site._replace(**columns), rate=rate)


def tailored_reward(params: EnvParams, played: Any, earned: np.ndarray) -> np.ndarray:
    """The reward of each recorded step, from what it earned: accelerator time off, shaping on."""
    weights, info = jax.tree.map(np.asarray, params.reward), played.info
    return (
        earned
        - weights.accelerator_price[0] * info["busy_seconds"].sum(-1)
        + weights.shaping * (played.next_state.potential - played.state.potential)
    )


def episode_keys(seed: int) -> jax.Array:
    """A key for each environment."""
    return jax.random.split(jax.random.key(seed), NUM_ENVS)


def step_keys(key: jax.Array, chunk: int = 0) -> jax.Array:
    """One environment's keys for `NUM_STEPS` steps: (step, 2), for the environment and for the router."""
    return jax.random.split(jax.random.fold_in(key, chunk), (NUM_STEPS, 2))


@partial(jax.jit, static_argnames="env")
def _begin(env: EdgeRouting, params: EnvParams, keys: jax.Array) -> tuple[Observation, EnvState]:
    return jax.vmap(env.reset, (0, None))(keys, params)


@partial(jax.jit, static_argnames="env")
@chex.assert_max_traces(n=1)
def _play(
    env: EdgeRouting, params: EnvParams, carry: Any, keys: jax.Array, router: jax.Array, script: jax.Array
) -> Any:
    def play_one(carry: Any, keys: jax.Array, router: jax.Array, script: jax.Array) -> Any:
        def step(carry: tuple, xs: tuple) -> tuple:
            (obs, state), memories = carry
            keys, scripted = xs
            decisions = {name: rule.act(rule.params, obs, keys[1], memories[name]) for name, rule in RULES.items()}
            action = jnp.stack([scripted, *(decision[0] for decision in decisions.values())])[router]
            next_obs, next_state, reward, _, _, info = env.step(keys[0], state, action, params)
            memories = {name: decision[1] for name, decision in decisions.items()}
            return ((next_obs, next_state), memories), (obs, action, reward, info, next_state)

        return jax.lax.scan(step, carry, (keys, script))

    return jax.vmap(play_one)(carry, keys, router, script)


def play(
    params: EnvParams,
    seed: int = 0,
    routers: Sequence[str] = (SCRIPT,),
    num_experts: int = 6,
    script: np.ndarray | None = None,
    num_chunks: int = 1,
) -> Episodes:
    """Run `NUM_ENVS` environments side by side for `num_chunks * NUM_STEPS` steps.

    `routers` take turns over the environments. The script, if none is given, draws among the first `num_experts`.
    """
    env, _ = edge6()
    keys = episode_keys(seed)
    router = jnp.array([ROUTERS.index(routers[e % len(routers)]) for e in range(NUM_ENVS)])
    if script is None:
        script = np.random.default_rng(seed).integers(0, num_experts, (NUM_ENVS, num_chunks * NUM_STEPS))
    obs, first = _begin(env, params, keys)
    memories = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (NUM_ENVS, *jnp.shape(leaf))),
        {name: rule.memory for name, rule in RULES.items()},
    )
    carry, chunks = ((obs, first), memories), []
    for chunk, scripted in enumerate(np.split(np.asarray(script, np.int32), num_chunks, axis=1)):
        chunk_keys = jax.vmap(step_keys, (0, None))(keys, chunk)
        carry, steps = _play(env, params, carry, chunk_keys, router, scripted)
        chunks.append(jax.tree.map(np.asarray, steps))
    obs, action, reward, info, next_state = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)
    state = jax.tree.map(
        lambda first, later: np.concatenate([np.asarray(first)[:, None], later[:, :-1]], axis=1), first, next_state
    )
    return Episodes(state, obs, action, reward, info, next_state)

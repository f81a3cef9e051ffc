"""Paired evaluation: every policy meets the same requests at the same times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.evaluation.metrics import COMPLETED, IN_FLIGHT, REJECTED, EpisodeRecords
from jaxroute.policies import Policy


def evaluate_policies(
    env: EdgeRouting,
    params: EnvParams,
    policies: Sequence[Policy],
    rates: Sequence[float],
    *,
    seed: int,
    seeds: int,
    requests: int,
    warmup: int,
    on_done: Callable[[str], None] = lambda name: None,
) -> dict[float, dict[str, EpisodeRecords]]:
    """Run every policy at every rate on the same `seeds` episodes of `warmup + requests` requests.

    Another `warmup` requests follow, which do not count but let those that do come to an end; otherwise long answers
    would drop out of the average. What is still in flight then is not counted either.

    All rates and seeds of a policy run side by side, and one compiled program serves all policies: which one acts is
    an argument. `on_done` is called with each policy's name.

    Returns:
        For each rate, each policy's records. Accelerator and wall time count from the arrival of request `warmup`.
    """
    episode_keys = jax.random.split(jax.random.key(seed), seeds)
    # The same keys at every rate: the same prompts come, only faster.
    keys = jnp.tile(episode_keys, len(rates))
    low_high = jnp.repeat(jnp.asarray(rates, jnp.float32), seeds)
    low_high = jnp.stack([low_high, low_high], axis=1)
    acts = tuple(policy.act for policy in policies)
    policy_params = tuple(policy.params for policy in policies)
    memories = tuple(policy.memory for policy in policies)

    results: dict[float, dict[str, EpisodeRecords]] = {rate: {} for rate in rates}
    for index, policy in enumerate(policies):
        records = jax.device_get(
            _episodes(env, acts, warmup + requests, warmup, params, low_high, keys, index, policy_params, memories)
        )
        for position, rate in enumerate(rates):
            of_rate = slice(position * seeds, (position + 1) * seeds)
            results[rate][policy.name] = EpisodeRecords(*(np.asarray(column[of_rate]) for column in records))
        on_done(policy.name)
    return results


@partial(jax.jit, static_argnames=("env", "acts", "num_requests", "warmup"))
def _episodes(
    env: EdgeRouting,
    acts: tuple[Callable, ...],
    num_requests: int,
    warmup: int,
    params: EnvParams,
    low_high: Float[Array, "episode 2"],
    keys: PRNGKeyArray,
    index: Int[Array, ""],
    policy_params: tuple[Any, ...],
    memories: tuple[Any, ...],
) -> EpisodeRecords:
    def act(obs: Any, key: PRNGKeyArray, memories: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        def branch(which: int) -> Callable:
            def run(memories: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
                action, memory = acts[which](policy_params[which], obs, key, memories[which])
                memory = jax.tree.map(lambda new, old: new.astype(jnp.result_type(old)), memory, memories[which])
                return action.astype(jnp.int32), (*memories[:which], memory, *memories[which + 1 :])

            return run

        return jax.lax.switch(index, [branch(which) for which in range(len(acts))], memories)

    def episode(key: PRNGKeyArray, rate: Float[Array, "2"]) -> EpisodeRecords:
        episode_params = params._replace(rate=rate)
        key_reset, key_steps = jax.random.split(key)
        obs, state = env.reset(key_reset, episode_params)
        # A row per request, and one more for what belongs to none: ended, ttft, latency, preemptions.
        table = jnp.zeros((num_requests + 1, 4), jnp.float32)

        def step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, dict[str, Array]]:
            obs, state, memories, table = carry
            key_action, key_env = jax.random.split(key)
            action, memories = act(obs, key_action, memories)
            request = state.request
            obs, state, _, _, _, info = env.step(key_env, state, action, episode_params)
            row = jnp.where(info["ended"], jnp.minimum(info["request"], num_requests), num_requests)
            outcome = (jnp.ones_like(info["ttft"]), info["ttft"], info["latency"], info["preemptions"])
            table = table.at[row.reshape(-1)].set(jnp.stack(outcome, axis=-1).reshape(-1, 4))
            noted = {
                "expert": action,
                "rejected": info["rejected"],
                "quality": request.quality[action],
                "output_tokens": request.output_tokens[action],
                "latency_requirement": request.latency_requirement,
                "busy_seconds": info["busy_seconds"],
                "kv_token_seconds": info["kv_token_seconds"],
                "gap": info["gap"],
            }
            return (obs, state, memories, table), noted

        fresh = jax.tree.map(jnp.asarray, memories)
        (_, _, _, table), noted = jax.lax.scan(
            step, (obs, state, fresh, table), jax.random.split(key_steps, num_requests + warmup)
        )
        noted = jax.tree.map(lambda column: column[:num_requests], noted)
        ended, ttft, latency, preemptions = table[:num_requests].T
        completed = ended > 0
        status = jnp.where(completed, COMPLETED, jnp.where(noted["rejected"], REJECTED, IN_FLIGHT))
        records: dict[str, Any] = {
            "status": status.astype(jnp.int8),
            "expert": noted["expert"],
            "quality": noted["quality"],
            "latency_requirement": noted["latency_requirement"],
            "output_tokens": noted["output_tokens"],
            "ttft": jnp.where(completed, ttft, jnp.nan),
            "latency": jnp.where(completed, latency, jnp.nan),
            "preemptions": preemptions.astype(jnp.int32),
            "busy_seconds": noted["busy_seconds"][warmup:].sum(0),
            "kv_token_seconds": noted["kv_token_seconds"][warmup:].sum(0),
            "duration": noted["gap"][warmup:].sum(),
        }
        return EpisodeRecords(**records)

    return jax.vmap(episode)(keys, low_high)

"""Planning routers: they try every action on clones of the environment, and take the one that does best.

`lookahead` sees only what a router can know: the rest (lengths and qualities of what is in flight, future requests) is
drawn from the predictions. `clairvoyant` sees the truth, and is an upper reference for what routing can achieve. Both
cost hundreds to thousands of environment steps per decision; the learned router approaches them with one network pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.env.environment import by_expert, site_of
from jaxroute.policies.away import FORMS, bid_price, with_form
from jaxroute.policies.protocol import Memory, Params, Policy, best_action
from jaxroute.policies.rules import RULES
from jaxroute.serving import generated, with_output_tokens
from jaxroute.workloads.arrivals import poisson


def base_policy(env: EdgeRouting) -> Policy:
    """Return the rule that the clones follow after the first decision; it has no memory."""
    return with_form("impact_greedy", "rate_price") if env.away else RULES["impact_greedy"]


class Situation(NamedTuple):
    """What a planner is given instead of an observation."""

    obs: Observation
    state: EnvState
    params: EnvParams
    upcoming: PRNGKeyArray
    """Keys of the coming steps, `(steps,)`: the true future, which only `clairvoyant` looks at."""


def lookahead(env: EdgeRouting, *, futures: int = 12, horizon: int = 40, base: Policy | None = None) -> Policy:
    """Return the planner that takes the best mean over `futures` drawn futures of `horizon` decisions each."""
    base = base or base_policy(env)

    def act(params: Params, situation: Situation, key: PRNGKeyArray, memory: Memory) -> tuple[Int[Array, ""], Memory]:
        del params
        state = _without_price(situation.state)
        values = jax.vmap(lambda key: drawn_values(env, situation.params, state, base, key, horizon))(
            jax.random.split(key, futures)
        )
        return best_action(situation.obs, values.mean(0)), memory

    return Policy("lookahead", act, plans=horizon)


def clairvoyant(env: EdgeRouting, *, horizon: int = 40, base: Policy | None = None) -> Policy:
    """Return the upper reference: `lookahead` with the true lengths, qualities and arrivals; not deployable."""
    truthful = replace(env, expected_quality=False)

    base = base or base_policy(env)

    def act(params: Params, situation: Situation, key: PRNGKeyArray, memory: Memory) -> tuple[Int[Array, ""], Memory]:
        del params
        state = _without_price(situation.state)
        values = action_values(truthful, situation.params, state, base, situation.upcoming, key)
        return best_action(situation.obs, values), memory

    return Policy("clairvoyant", act, plans=horizon)


def _without_price(state: EnvState) -> EnvState:
    """Planners seek average QoS alone."""
    return state._replace(prices=state.prices._replace(accelerator=jnp.float32(0.0)))


def drawn_values(
    env: EdgeRouting,
    params: EnvParams,
    state: EnvState,
    base: Policy,
    key: PRNGKeyArray,
    horizon: int,
) -> Float[Array, "action"]:
    """Value of each action in one future drawn from what a router can know; the same one for every action."""
    key_unknown, key_future, key_base = jax.random.split(key, 3)
    return action_values(
        # A router knows the recent request rate, but not the arrival process.
        replace(env, expected_quality=True, arrival_process=poisson, redraw_every=0),
        params,
        redraw_unknown(state, params, key_unknown)._replace(rate=1 / state.recent.gap),
        base,
        jax.random.split(key_future, horizon),
        key_base,
    )


def action_values(
    env: EdgeRouting,
    params: EnvParams,
    state: EnvState,
    base: Policy,
    step_keys: PRNGKeyArray,
    key: PRNGKeyArray,
) -> Float[Array, "action"]:
    """QoS that ends within the steps, plus the estimator's expected QoS of what is in flight then, for each action.

    What both cost at the state's prices is subtracted. The action is taken for the request at hand, and `base` decides
    on the next ones. All actions meet the same future (common random numbers), so differences are more precise than
    values.
    """
    price = state.prices.accelerator
    params = params._replace(reward=params.reward._replace(shaping=jnp.float32(0.0)))
    # The first decision of the base is discarded: the first step is inside the loop because compiling it twice is slow.
    seen = jax.eval_shape(env.step, step_keys[0], state, jnp.int32(0), params)[0]
    nothing_seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seen)

    def step(carry: tuple, given: tuple) -> tuple[tuple, Float[Array, "action"]]:
        # Actions are mapped over here, and not around the loop, which would be traced once more for it.
        def of_action(first: Int[Array, ""], obs: Any, state: EnvState, memory: Memory) -> tuple[tuple, Array]:
            chosen, next_memory = base.act(base.params, obs, key_base, memory)
            action, memory = jax.tree.map(
                partial(jnp.where, number == 0), (first, memory), (chosen.astype(first.dtype), next_memory)
            )
            obs, state, reward, *_ = env.step(key_env, state, action, params)
            return (obs, state, memory), reward

        number, key_env, key_base = given
        return jax.vmap(of_action)(actions, *carry)

    actions = jnp.arange(env.num_actions)
    alike = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (env.num_actions, *jnp.shape(leaf))), (nothing_seen, state, base.memory)
    )
    given = (jnp.arange(len(step_keys)), step_keys, jax.random.split(key, len(step_keys)))
    (obs, last, _), rewards = jax.lax.scan(step, alike, given)
    left = last.potential - price * jax.vmap(_time_to_drain)(obs).sum(-1)
    if env.away:
        left -= jax.vmap(_price_of_seats)(obs)
    return rewards.sum(0) + left


def _price_of_seats(obs: Observation) -> Float[Array, ""]:
    """What the seats that are still held could bring in for others, at the bid price of the rule `rate_price`."""
    experts = obs.experts
    held = experts.pending_output * experts.iteration_time / experts.max_num_seqs
    return bid_price(FORMS["rate_price"].params, obs) * held.sum()


def _time_to_drain(obs: Observation) -> Float[Array, "expert"]:
    """Time for which each expert would be busy with the requests there alone, at the current iteration time, s."""
    experts = obs.experts
    num_seqs = jnp.minimum(experts.num_running + experts.num_waiting, experts.max_num_seqs)
    iterations = jnp.maximum(
        experts.pending_output / jnp.maximum(num_seqs, 1.0), obs.in_flight.remaining_tokens.max(-1)
    )
    return iterations * experts.iteration_time


def redraw_unknown(state: EnvState, params: EnvParams, key: PRNGKeyArray) -> EnvState:
    """Redraw the true lengths of the requests in flight and of the arriving one, given what has been observed.

    Lengths are log-normal around their predictions, and longer than what has been generated, as the impact estimator
    assumes. Qualities become their predictions, which are right on average.
    """
    key_slots, key_request = jax.random.split(key)
    slots, table, request = state.site.slots, state.table, state.request
    site = site_of(state, params)
    log_error = by_expert(params.bank.log_length_error, state.fleet)

    def draw(
        key: PRNGKeyArray, predicted: Array, so_far: Array, prompt_tokens: Array, log_error: Array, capacity: Array
    ) -> Array:
        z = (jnp.log(jnp.maximum(so_far, 1.0)) - jnp.log(jnp.maximum(predicted, 1.0))) / log_error
        # The upper tail, so that float32 keeps its digits where much more was generated than predicted.
        tail = jax.random.uniform(key, predicted.shape, jnp.float32, minval=1e-6) * ndtr(-z)
        drawn = jnp.exp(jnp.log(jnp.maximum(predicted, 1.0)) - log_error * ndtri(jnp.maximum(tail, 1e-30)))
        least = so_far.astype(jnp.int32) + 1
        most = jnp.maximum(jnp.minimum(capacity - prompt_tokens, 2 * params.bank.output_tokens.max()), least)
        return jnp.clip(drawn.astype(jnp.int32), least, most)

    output_tokens = draw(
        key_slots,
        table.predicted_output_tokens,
        generated(state.site).astype(jnp.float32),
        slots.prompt_tokens,
        log_error[:, None],
        site.kv_capacity[:, None],
    )
    zero = jnp.zeros_like(request.predicted_output_tokens)
    return state._replace(
        site=with_output_tokens(site, state.site, output_tokens),
        table=table._replace(quality=table.predicted_quality),
        request=request._replace(
            output_tokens=draw(
                key_request,
                request.predicted_output_tokens,
                zero,
                request.prompt_tokens,
                log_error,
                site.kv_capacity,
            ),
            quality=request.predicted_quality,
        ),
    )

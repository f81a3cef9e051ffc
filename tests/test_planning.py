"""Planners: what they may see, and that their values are what happens."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.evaluation import evaluate_policies, summarise
from jaxroute.policies import FORMS, RULES
from jaxroute.policies.planning import (
    action_values,
    base_policy,
    clairvoyant,
    drawn_values,
    lookahead,
    redraw_unknown,
)
from jaxroute.serving import SlotStatus, computed, generated, slot_status, with_output_tokens

pytestmark = pytest.mark.slow

HORIZON = 6
NUM_STEPS = 24


@cache
def scenario():
    return jaxroute.make("edge3-poisson", rate=6.0, overrides=("bank.num_prompts=200", "reward.expected_quality=false"))


def base():
    """The rule that planners follow after their first decision."""
    return base_policy(scenario()[0])


@jax.jit
def _played(key):
    """A busy state: the base rule has routed a while."""
    (env, params), rule = scenario(), base()

    def step(carry, key):
        obs, state = carry
        action, _ = rule.act(rule.params, obs, key, rule.memory)
        obs, state, *_ = env.step(key, state, action, params)
        return (obs, state), None

    key_reset, key_steps = jax.random.split(key)
    return jax.lax.scan(step, env.reset(key_reset, params), jax.random.split(key_steps, NUM_STEPS))[0]


@cache
def busy_states():
    return jax.vmap(_played)(jax.random.split(jax.random.key(0), 8))


@jax.jit
def _drawn(state, key):
    env, params = scenario()
    return drawn_values(env, params, state, base(), key, HORIZON)


def test_the_same_lengths_change_nothing():
    _, params = scenario()
    _, states = busy_states()
    again = jax.vmap(lambda state: with_output_tokens(params.site, state.site, state.site.slots.output_tokens))(states)
    jax.tree.map(np.testing.assert_array_equal, again, states.site)


def test_what_is_drawn_anew_agrees_with_what_was_seen():
    _, params = scenario()
    _, states = busy_states()
    drawn = jax.vmap(lambda state, key: redraw_unknown(state, params, key))(
        states, jax.random.split(jax.random.key(1), 8)
    )
    slots, before = drawn.site.slots, states.site.slots
    active = np.asarray(slot_status(states.site)) == SlotStatus.ACTIVE
    assert active.sum() > 20
    assert (slots.output_tokens > generated(drawn.site))[active].all()
    assert (slots.output_tokens + slots.prompt_tokens <= params.site.kv_capacity[:, None])[active].all()
    assert (slots.output_tokens != before.output_tokens)[active].mean() > 0.5
    np.testing.assert_array_equal(drawn.table.quality, states.table.predicted_quality)
    np.testing.assert_array_equal(drawn.request.quality, states.request.predicted_quality)
    for name in ("arrival", "prompt_tokens", "kept", "prefilled"):
        np.testing.assert_array_equal(getattr(slots, name), getattr(before, name))
    for what in (generated, computed):
        np.testing.assert_array_equal(what(drawn.site)[active], what(states.site)[active])
    np.testing.assert_array_equal(slot_status(drawn.site) == SlotStatus.ACTIVE, active)


def test_lengths_follow_the_predictions_given_what_was_generated():
    """Fresh requests are log-normal around their predictions; those that went on for long go on for longer."""
    _, params = scenario()
    _, states = busy_states()
    state = jax.tree.map(lambda leaf: leaf[0], states)
    keys = jax.random.split(jax.random.key(2), 2000)
    drawn = jax.vmap(lambda key: redraw_unknown(state, params, key).request.output_tokens)(keys)
    predicted, error = state.request.predicted_output_tokens, params.bank.log_length_error
    logs = np.log(np.asarray(drawn))
    np.testing.assert_allclose(np.median(logs, axis=0), np.log(predicted), atol=0.1)
    np.testing.assert_allclose(logs.std(axis=0), error, rtol=0.1)


def test_lookahead_can_not_see_the_truth():
    """States that look alike are worth alike, whatever their true lengths and qualities."""
    _, params = scenario()
    _, states = busy_states()
    slots, request = states.site.slots, states.request
    longer = jnp.minimum(slots.output_tokens + 40, params.site.kv_capacity[:, None] - slots.prompt_tokens)
    other = states._replace(
        site=jax.vmap(lambda state, tokens: with_output_tokens(params.site, state, tokens))(states.site, longer),
        table=states.table._replace(quality=1 - states.table.quality),
        request=request._replace(output_tokens=request.output_tokens + 10, quality=1 - request.quality),
    )
    keys = jax.random.split(jax.random.key(3), 8)
    np.testing.assert_allclose(jax.vmap(_drawn)(states, keys), jax.vmap(_drawn)(other, keys), atol=1e-4)


def test_a_clairvoyant_value_is_what_happens_less_the_price_of_accelerator_time_and_seats():
    """For each expert, and for away, which leaves more to the others."""
    env, params = scenario()
    rule = base()
    _, states = busy_states()
    keys = jax.random.split(jax.random.key(4), (8, HORIZON))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def value(state, keys, price):
        state = state._replace(prices=state.prices._replace(accelerator=price))
        return action_values(env, params, state, rule, keys, jax.random.key(0))

    values, priced = value(states, keys, 0.0), value(states, keys, 0.5)
    assert values.shape == (8, 4)
    step = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    for first in range(4):
        state, action, earned, busy = states, jnp.full(8, first), 0.0, 0.0
        for t in range(HORIZON):
            seen, state, _, _, _, info = step(keys[:, t], state, action, params)
            earned = earned + info["qos_sum"]
            busy = busy + info["busy_seconds"].sum(-1)
            action = jax.vmap(lambda obs: rule.act(rule.params, obs, jax.random.key(0), rule.memory)[0])(seen)
        there, left = jax.tree.map(np.asarray, seen.experts), np.asarray(seen.in_flight.remaining_tokens)
        # Each seat that is still held is charged what the rule would have to be offered for it.
        held = left.sum(-1) * there.iteration_time / there.max_num_seqs
        capacity = (there.max_num_seqs / there.weight_load).sum(-1)
        charge = FORMS["rate_price"].params * 100 / np.asarray(state.recent.gap) / capacity * held.sum(-1)
        assert (charge > 0.01).any()
        np.testing.assert_allclose(values[:, first], earned + state.potential - charge, rtol=1e-4)
        # What is in flight takes as long as the longest answer, or as all of them through the seats.
        seated = np.clip(there.num_running + there.num_waiting, 1, there.max_num_seqs)
        busy = busy + (np.maximum(left.max(-1), left.sum(-1) / seated) * there.iteration_time).sum(-1)
        np.testing.assert_allclose(values[:, first] - priced[:, first], 0.5 * busy, rtol=1e-3)


@pytest.mark.exhaustive
def test_planners_route_in_an_evaluation():
    """Beside a rule on the same requests; who knows the future is not behind who guesses at random."""
    env, params = scenario()
    planners = [lookahead(env, futures=2, horizon=HORIZON), clairvoyant(env, horizon=HORIZON)]
    records = evaluate_policies(
        env, params, [RULES["random"], *planners], [6.0], seed=5, episodes=4, requests=40, warmup=10
    )[6.0]
    qos = {name: summarise(episodes, 10)["avg_qos"].mean() for name, episodes in records.items()}
    assert list(qos) == ["random", "lookahead", "clairvoyant"]
    assert qos["clairvoyant"] > qos["random"]
    assert qos["lookahead"] > qos["random"]
    # Rejected everywhere or not, the same requests came.
    np.testing.assert_array_equal(records["random"].limits.normalised, records["lookahead"].limits.normalised)

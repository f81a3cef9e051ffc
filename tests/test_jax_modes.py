"""JAX's switches, as other parts of a program may set them: 64-bit types, and a halt at every NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HAND_CASES

import jaxroute
from jaxroute.config import load_config
from jaxroute.policies import RULES
from jaxroute.scenarios import build_env

SMALL = ("site=edge3", "bank.num_prompts=200")
MODES = {
    "plain": (["workload=poisson"], {}),
    "stale": (["workload=gamma", "dynamics.refresh_interval=0.5"], {}),
    "retried": (["workload=mixed", "dynamics.outages=retried"], {"random_sites": 0.5}),
    "lost": (["workload=mmpp", "dynamics.outages=lost"], {"horizon": 40, "redraw_every": 10}),
}


def scenario(mode):
    options, arguments = MODES[mode]
    return build_env(load_config([*SMALL, *options]), rate=(4.0, 20.0), **arguments)


def shapes(env, params):
    """Types and shapes of what reset and step return, and of the rules' decisions and memories."""
    key = jax.random.key(0)
    obs, state = jax.eval_shape(env.reset, key, params)
    decisions = [jax.eval_shape(rule.act, rule.params, obs, key, rule.memory) for rule in RULES.values()]
    return obs, state, jax.eval_shape(env.step, key, state, jnp.int32(0), params), decisions


@pytest.mark.parametrize("mode", MODES)
def test_the_types_are_the_same_with_64_bits(mode):
    """So that states go round a loop, and results are those of 32 bits."""
    env, params = scenario(mode)
    usual = shapes(env, params)
    with jax.enable_x64(True):
        wide = shapes(env, params)
    for (path, here), there in zip(jax.tree_util.tree_leaves_with_path(usual), jax.tree.leaves(wide), strict=True):
        assert here == there, jax.tree_util.keystr(path)


def replay(name):
    case = HAND_CASES[name]
    requests = jaxroute.Requests(case.arrival_time, case.prompt_tokens, case.output_tokens)
    return jaxroute.replay(jaxroute.Site(**case.site), requests, case.assignment)


def test_replay_is_the_same_with_64_bits_and_halts_at_no_nan():
    usual = replay("rejected for KV")
    assert np.isnan(usual.ttft).any()
    with jax.enable_x64(True):
        wide = replay("rejected for KV")
    with jax.debug_nans(True):
        checked = replay("rejected for KV")
    for column, wider, again in zip(usual, wide, checked, strict=True):
        np.testing.assert_array_equal(column, wider)
        np.testing.assert_array_equal(column, again)


def test_an_episode_halts_at_no_nan():
    env, params = scenario("retried")
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    with jax.debug_nans(True):
        _, state = reset(jax.random.key(0), params)
        for number in range(8):
            _, state, reward, *_ = step(jax.random.key(number), state, jnp.int32(number % 3), params)
        assert np.isfinite(reward)

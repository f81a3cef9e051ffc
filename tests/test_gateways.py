"""Gateways that share a site: each knows its own requests, and of the others' what gauges say."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.config import load_config
from jaxroute.env.gateways import TYPICAL_WINDOW, UNREAD, with_others
from jaxroute.env.types import Batch, GatewayParams, Others, Typical
from jaxroute.errors import UserError
from jaxroute.networks import HAN
from jaxroute.networks.features import features_of
from jaxroute.scenarios import build_env, training_env
from jaxroute.serving import computed, running_and_waiting
from jaxroute.workloads.limits import Limits

pytestmark = pytest.mark.slow

NUM_ENVS, NUM_STEPS, MOST, RATE = 6, 120, 3, 9.0
INTERVAL = 1.5  # s: some ten requests


@cache
def scenario():
    return build_env(
        load_config(["site=edge3", f"workload.rate={RATE}", "bank.num_prompts=200", "dynamics.mean_uptime=5"])
    )


@partial(jax.jit, static_argnames="env")
def _play(env, params, script):
    def episode(key, script):
        def step(carry, action):
            obs, state = carry
            new, after, reward, *_, info = env.step(jax.random.fold_in(key, state.step), state, action, params)
            return (new, after), (obs, state, reward, info)

        return jax.lax.scan(step, env.reset(key, params), script)[1]

    return jax.vmap(episode)(jax.random.split(jax.random.key(0), NUM_ENVS), script)


@cache
def play(most=MOST, interval=INTERVAL, first_poll=0.0, outages="none", least=None):
    """Observations, states, rewards and infos, (env, step, ...), of random actions under the same keys."""
    env, params = scenario()
    numbers = GatewayParams(jnp.array([least or most, most], jnp.int32), jnp.float32(first_poll))
    env = dataclasses.replace(env, most_gateways=most, outages=outages)
    params = params._replace(gateways=numbers if most else None, refresh_interval=jnp.full(2, interval))
    script = np.random.default_rng(0).integers(0, 3, (NUM_ENVS, NUM_STEPS)).astype(np.int32)
    return jax.tree.map(np.asarray, _play(env, params, script))


def there(state):
    """Who runs and who waits, and the memory they hold, (env, step, expert, slot)."""
    sites = jax.tree.map(jnp.asarray, state.site)
    each = jax.vmap(jax.vmap(lambda site: (*running_and_waiting(site), computed(site))))
    running, waiting, tokens = jax.tree.map(np.asarray, each(sites))
    return running, waiting, np.where(running, tokens, 0)


def own(state):
    """Which slots hold requests of the gateway that decides."""
    return state.table.gateway == state.request.gateway[..., None, None]


def test_a_gateway_that_is_alone_sees_what_there_is():
    alone, everything = play(most=1), play(most=0)
    for name in ("experts", "candidates", "arrival"):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(getattr(alone[0], name)),
            jax.tree.leaves(getattr(everything[0], name)),
            strict=True,
        )
        for (path, mine), theirs in pairs:
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_allclose(alone[2], everything[2], rtol=1e-4, atol=1e-5)
    # Two nodes more for each expert, and nobody in them.
    assert alone[0].in_flight.weight.shape[-1] == everything[0].in_flight.weight.shape[-1] + 2
    assert (alone[0].in_flight.weight[..., -2:] == 0).all()


def test_fresh_gauges_and_own_requests_are_all_there_are():
    obs, state, *_ = play(interval=0.0)
    running, waiting, tokens = there(state)
    np.testing.assert_array_equal(obs.experts.num_running, running.sum(-1))
    np.testing.assert_array_equal(obs.experts.num_waiting, waiting.sum(-1))
    np.testing.assert_allclose(obs.experts.kv_used, tokens.sum(-1), rtol=1e-5)
    # Its own one by one, and the others in two nodes.
    mine = own(state)
    np.testing.assert_array_equal(obs.running[..., :-2], running & mine)
    np.testing.assert_array_equal(obs.waiting[..., :-2], waiting & mine)
    np.testing.assert_array_equal(obs.in_flight.weight[..., -2], (running & ~mine).sum(-1))
    np.testing.assert_array_equal(obs.in_flight.weight[..., -1], (waiting & ~mine).sum(-1))
    assert (obs.in_flight.weight[..., -2:] > 1).any()
    assert (obs.gauge_age == 0).all()


def test_between_two_polls_only_own_requests_are_followed():
    obs, state, _, info = play()
    running, waiting, _ = there(state)
    mine = own(state)
    np.testing.assert_array_equal(obs.running[..., :-2], running & mine)
    time = np.cumsum(info["gap"], axis=1) - info["gap"]  # of each decision
    owners = state.table.gateway
    for e in range(NUM_ENVS):
        latest, polls = 0, 0
        for t in range(NUM_STEPS):
            if time[e, t] - time[e, latest] >= INTERVAL - 1e-5:
                latest, polls = t, polls + 1
            assert obs.gauge_age[e, t] == pytest.approx(time[e, t] - time[e, latest], abs=1e-4)
            foreign = owners[e, latest] != state.request.gateway[e, t]
            np.testing.assert_array_equal(obs.in_flight.weight[e, t, :, -2], (running[e, latest] & foreign).sum(-1))
            np.testing.assert_array_equal(obs.in_flight.weight[e, t, :, -1], (waiting[e, latest] & foreign).sum(-1))
        assert polls > 5


def test_until_the_first_poll_a_gateway_knows_only_its_own():
    first = 4.0
    obs, _, _, info = play(first_poll=first)
    time = np.cumsum(info["gap"], axis=1) - info["gap"]
    before = time < first - 1e-4
    assert before.any()
    assert (~before).any()
    others = obs.in_flight.weight[..., -2:].sum((-1, -2))
    assert (others[before] == 0).all()
    assert (obs.gauge_age[before] >= UNREAD).all()
    assert others[~before].any()
    assert (obs.gauge_age[~before] < INTERVAL + 2).all()
    features = jax.vmap(jax.vmap(partial(features_of, gauges=True)))(jax.tree.map(jnp.asarray, obs))
    assert np.isfinite(features.arrival).all()


def test_each_reckons_all_that_arrives_from_its_own_part():
    obs, state, _, info = play()
    time = np.cumsum(info["gap"], axis=1) - info["gap"]
    for e in range(NUM_ENVS):
        latest, gap = np.zeros(MOST), np.full(MOST, 1 / RATE)
        typical = np.full(MOST, state.request.prompt_tokens[e, 0], float)
        for t in range(NUM_STEPS):
            g = state.request.gateway[e, t]
            if t > 0:
                gap[g] += ((time[e, t] - latest[g]) / MOST - gap[g]) / 32
                typical[g] += (state.request.prompt_tokens[e, t] - typical[g]) / TYPICAL_WINDOW
                latest[g] = time[e, t]
            assert obs.arrival.recent.gap[e, t] == pytest.approx(gap[g], rel=1e-3)
            assert state.gateways.known.typical.prompt_tokens[e, t, g] == pytest.approx(typical[g], rel=1e-3)
    # Answers count at the gateway that has sent them.
    count = state.gateways.known.latency_count
    assert (count.sum(2) <= state.latency_count + 1e-3).all()
    np.testing.assert_allclose(count.sum(2), state.latency_count, atol=1e-3)
    assert (count.max(2) < state.latency_count.clip(0.5) + 1e-3).all()


def test_how_many_there_are_is_drawn_and_all_get_their_part():
    _, state, *_ = play(least=1)
    number = state.gateways.number
    assert (number == number[:, :1]).all()
    assert set(np.unique(number)) <= {1, 2, 3}
    assert len(np.unique(number)) > 1
    assert (state.request.gateway < number).all()
    shares = np.stack([(state.request.gateway == g)[number == MOST].mean() for g in range(MOST)])
    assert (np.abs(shares - 1 / MOST) < 0.1).all()


def test_what_an_expert_gives_back_returns_to_its_gateway():
    _, state, *_ = play(outages="retried")
    again = state.request.age > 0
    assert again.sum() > 5
    for e, t in np.argwhere(again):
        number = state.request.number[e, t]
        held = state.retries.number[e, t - 1] == number
        assert held.any()
        if number == 0:
            continue  # as slots that were never used
        assert (state.table.gateway[e, t - 1][held] == state.request.gateway[e, t]).all()


# --- How others are laid out --------------------------------------------------------------------------------


def batch_of(running, waiting):
    """Own requests at one expert of edge3's site of three."""
    slots = running + waiting
    index = np.arange(slots)[:, None] * np.ones(3)
    ones = jnp.ones((slots, 3))
    return Batch(
        running=jnp.asarray(index < running),
        waiting=jnp.asarray(index >= running),
        prompt_tokens=100 * ones, computed=149 * ones * (index < running), generated=50 * ones * (index < running),
        age=ones, first_token=None, limits=Limits(normalised=0.05 * ones),
        predicted_quality=0.5 * ones, predicted_output_tokens=100 * ones,
    )  # fmt: skip


TYPICAL = Typical(
    jnp.float32(120.0),
    jnp.full(3, 0.7),
    jnp.full(3, 90.0),
    Limits(normalised=jnp.float32(1 / 0.04), e2e=jnp.float32(0)),
)


def test_others_stand_evenly_among_the_own():
    _, params = scenario()
    others = Others(jnp.full(3, 4.0), jnp.full(3, 6.0), jnp.full(3, 800.0))
    batch = with_others(
        params.site, batch_of(2, 3), others, TYPICAL._replace(allowed=Limits(normalised=jnp.float32(25)))
    )
    np.testing.assert_allclose(batch.weight[:, 0], [1, 1, 1, 1, 1, 4, 6])
    # Twice as many others as own in the batch: every own one is the third of three; and so in the queue.
    np.testing.assert_allclose(batch.place[:5, 0], [3, 6, 9, 12, 15])
    np.testing.assert_allclose(batch.place[5:, 0], [3, 10.5])
    assert (batch.computed * batch.weight)[-2:, 0].tolist() == [800, 0]
    np.testing.assert_allclose(batch.limits.normalised[-2:, 0], 0.04)
    assert (batch.predicted_quality[-2:] == np.float32(0.7)).all()


def test_none_change_nothing():
    _, params = scenario()
    nobody = Others(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
    batch = with_others(
        params.site, batch_of(2, 3), nobody, TYPICAL._replace(allowed=Limits(normalised=jnp.float32(25)))
    )
    np.testing.assert_array_equal(batch.place[:5, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(batch.tokens_so_far[:5, 0], [150, 300, 400, 500, 600])
    assert not (batch.running | batch.waiting)[5:].any()


# --- Options, and networks ----------------------------------------------------------------------------------


def test_options_reach_the_environment():
    config = load_config(["dynamics.gateways=2", "dynamics.refresh_interval=3", "dynamics.first_poll=18",
                          "train.gateways=[1,4]", "train.refresh_intervals=[0,6]"])  # fmt: skip
    env, params = build_env(config)
    assert (env.most_gateways, env.stale) == (2, False)
    assert params.gateways.number.tolist() == [2, 2]
    assert params.gateways.first_poll == 18
    assert params.refresh_interval.tolist() == [3, 3]
    env, params = training_env(config)
    assert env.most_gateways == 4
    assert params.gateways.number.tolist() == [1, 4]
    assert params.refresh_interval.tolist() == [0, 6]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dynamics.gateways=0"], "gateways=0 must be from 1 to 16, or null"),
        (["dynamics.first_poll=5"], "first_poll=5.0 needs gateways"),
        (["dynamics.gateways=1", "dynamics.first_poll=-1"], "first_poll=-1.0 must not be negative"),
        (["train.gateways=[2,1]"], r"train: gateways=\[2, 1\] must be one or two numbers"),
        (["train.refresh_intervals=[-1]"], r"train: refresh_intervals=\[-1.0, -1.0\] must be"),
        (["train.gateways=[1,4]"], "needs dynamics.gateways"),
    ],
)
def test_mistakes_are_one_line(overrides, named):
    with pytest.raises(UserError, match=named) as raised:
        training_env(load_config(overrides))
    assert "\n" not in str(raised.value)


def test_a_network_that_knows_gauges_runs_where_there_are_none_and_the_other_way_round():
    (with_age, *_), (without, *_) = play(), play(most=0)
    first = [jax.tree.map(lambda leaf: jnp.asarray(leaf[0, -1]), obs) for obs in (with_age, without)]
    for network in (HAN(hidden=8, gauges=True), HAN(hidden=8)):
        weights = network.init(jax.random.key(0), network.prepare(first[0]))
        for obs in first:
            logits, _ = network.apply(weights, network.prepare(obs))
            assert np.isfinite(logits).all()
    late = HAN(gauges=True).prepare(first[0]).arrival[-1]
    age = float(first[0].gauge_age)
    assert late == pytest.approx(age / (age + 3))
    assert HAN(gauges=True).prepare(first[1]).arrival[-1] == 0

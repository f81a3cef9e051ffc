"""Away: what declining and the cloud do to requests, rewards and metrics, and which rules send what away."""

from __future__ import annotations

import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from observations import NUM_EXPERTS, observation

from jaxroute.config import load_config
from jaxroute.env.cloud import CloudAnswer, ask, expect_away, let_time_pass
from jaxroute.env.types import Away, Described, Prices
from jaxroute.errors import UserError
from jaxroute.evaluation import evaluate_policies, summarise
from jaxroute.evaluation.metrics import Outcome
from jaxroute.networks import HAN, FlatMLP
from jaxroute.policies import FORMS, RULES, rules_named, with_form
from jaxroute.policies.protocol import eligible_actions
from jaxroute.scenarios import build_env, training_env
from jaxroute.serving import SlotStatus, slot_status
from jaxroute.workloads.limits import Limits

NUM_ENVS, NUM_STEPS = 4, 96
AWAY = 3
"""The action: the site has three experts."""
SMALL = ("site=edge3", "bank.num_prompts=200", "reward.expected_quality=false")
PLACES = 3
CLOUD = {
    "model": "gemma-2-27b-it",
    "ttft": 0.4,
    "tpot": 0.02,
    "price_per_request": 0.05,
    "price_per_1000_tokens": 0.1,
    "ttft_spread": 0.5,
    "tpot_spread": 0.2,
    "slow_share": 0.25,
    "slow_factor": 6.0,
    "max_in_flight": PLACES,
}
WITH_CLOUD = (*(f"site.cloud.{name}={value}" for name, value in CLOUD.items()), "workload.local_only=0.3")


# ---- Declining ---------------------------------------------------------------------------------------------


@cache
def scenario(*overrides):
    """Busy enough that queues fill up."""
    return build_env(load_config([*SMALL, "workload.rate=25", *overrides]))


@partial(jax.jit, static_argnums=0)
def _play(env, params, keys, script):
    def episode(key, script):
        def step(carry, given):
            obs, state = carry
            key, action = given
            next_obs, next_state, reward, _, _, info = env.step(key, state, action, params)
            return (next_obs, next_state), (obs, state, next_state, reward, info)

        key_reset, key_steps = jax.random.split(key)
        given = (jax.random.split(key_steps, NUM_STEPS), script)
        return jax.lax.scan(step, env.reset(key_reset, params), given)[1]

    return jax.vmap(episode)(keys, script)


def play(script, *overrides):
    """What the scripted actions do: observations, states before and after, rewards, and info; leading env and step."""
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    return jax.device_get(_play(*scenario(*overrides), keys, jnp.asarray(script, jnp.int32)))


def random_script(actions, seed=0):
    return np.random.default_rng(seed).integers(0, actions, (NUM_ENVS, NUM_STEPS))


def test_what_experts_do_does_not_depend_on_away():
    """Without it, the environment is the same: draws, rewards, states and all that is seen of the experts."""
    script = random_script(3)
    with_away, without = play(script), play(script, "env.away=false")
    assert [played[0].away is None for played in (with_away, without)] == [False, True]
    seen = [played[0]._replace(away=None) for played in (with_away, without)]
    # Two programs may round apart.
    chex.assert_trees_all_close(*seen, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(with_away[1:], without[1:], rtol=1e-4, atol=1e-5)
    assert not with_away[4]["declined"].any()


def test_a_declined_request_earns_nothing_and_takes_nothing():
    """The site is as idle as if nobody had come, and the reward is that of nothing."""
    obs, state, _, reward, info = play(np.full((NUM_ENVS, NUM_STEPS), AWAY))
    assert info["declined"].all()
    assert not info["rejected"].any()
    for name in ("qos_sum", "busy_seconds", "kv_token_seconds", "num_completed", "num_late", "num_lost"):
        assert (info[name] == 0).all(), name
    assert (reward == 0).all()
    assert (slot_status(state.site) == SlotStatus.EMPTY).all()
    assert (obs.experts.num_running + obs.experts.num_waiting == 0).all()
    # What declining is worth can be known before.
    assert not obs.away.to_cloud.any()
    for name in ("predicted_quality", "in_time", "qos", "cost"):
        assert (getattr(obs.away, name) == 0).all(), name


def test_every_request_is_declined_rejected_completed_or_in_flight():
    script = random_script(4)
    _, _, after, reward, info = play(script)
    arrived = np.broadcast_to(np.arange(1, NUM_STEPS + 1), reward.shape)
    completed, rejected, declined = (
        np.cumsum(info[name], axis=1) for name in ("num_completed", "rejected", "declined")
    )
    in_flight = (slot_status(after.site) == SlotStatus.ACTIVE).sum((-2, -1))
    np.testing.assert_array_equal(arrived, completed + rejected + declined + in_flight)
    np.testing.assert_array_equal(info["declined"], script == AWAY)
    assert not (info["rejected"] & info["declined"]).any()
    assert info["rejected"].sum() > 10
    # Declining draws nothing: the same requests come at the same times.
    np.testing.assert_array_equal(info["gap"], play(random_script(3))[4]["gap"])


# ---- The cloud ---------------------------------------------------------------------------------------------


@cache
def with_cloud():
    """So slowly that answers end within the episode, and others find their places free."""
    return play(random_script(4), *WITH_CLOUD, "workload.rate=4")


def test_the_cloud_answers_from_its_column_at_its_price():
    _, state, _, reward, info = with_cloud()
    cloud = jax.device_get(scenario(*WITH_CLOUD)[1].cloud)
    answer, row = info["cloud"], state.request.row
    sent = answer.sent
    assert sent.sum() > 20
    np.testing.assert_array_equal(answer.quality, np.where(sent, cloud.quality[row], 0))
    np.testing.assert_array_equal(answer.output_tokens, np.where(sent, cloud.output_tokens[row], 0))
    tokens = state.request.prompt_tokens + cloud.output_tokens[row]
    np.testing.assert_allclose(answer.spent, np.where(sent, 0.05 + 0.1 * tokens / 1000, 0), rtol=1e-5)
    late = answer.latency / np.maximum(answer.output_tokens, 1) > state.request.limits.normalised
    np.testing.assert_array_equal(answer.in_time, sent & ~late)
    assert 0 < answer.in_time[sent].mean() < 1
    assert (answer.latency >= answer.ttft).all()
    # It counts at once, and is paid for.
    earned = np.where(answer.in_time, answer.quality, 0)
    np.testing.assert_allclose(info["qos_sum"], info["qos"].sum((-2, -1)) + earned, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(info["num_completed"], info["ended"].sum((-2, -1)) + sent)
    by_experts = info["num_late"] - (sent & ~answer.in_time)
    np.testing.assert_array_equal(by_experts, (info["ended"] & ~info["in_time"]).sum((-2, -1)))
    shaping = with_cloud()[2].potential - state.potential
    busy = 0.02 * info["busy_seconds"].sum(-1)
    np.testing.assert_allclose(reward, info["qos_sum"] - answer.spent - busy + shaping, atol=1e-5)


def test_who_may_go_to_the_cloud():
    """Only so many at once, and nobody who must not leave the site; the others are declined."""
    obs, state, _, _, info = with_cloud()
    sent, away = info["cloud"].sent, random_script(4) == AWAY
    np.testing.assert_array_equal(info["declined"], away & ~sent)
    np.testing.assert_array_equal(sent, away & obs.away.to_cloud)
    assert not (sent & state.request.local_only).any()
    assert 0.2 < state.request.local_only.mean() < 0.4
    # A reference on the host, with absolute times.
    for e in range(NUM_ENVS):
        now, ends, full = 0.0, [], 0
        for t in range(NUM_STEPS):
            ends = [end for end in ends if end > now + 1e-4]
            free = len(ends) < PLACES
            full += not free
            assert obs.away.to_cloud[e, t] == (free and not state.request.local_only[e, t])
            if sent[e, t]:
                ends.append(now + info["cloud"].latency[e, t])
            now += info["gap"][e, t]
        assert full > 5


def test_what_the_cloud_offers_is_seen_at_the_given_prices():
    obs, state, *_ = with_cloud()
    cloud = jax.device_get(scenario(*WITH_CLOUD)[1].cloud)
    away, row = obs.away, state.request.row
    mean_tokens = cloud.predicted_output_tokens[row] * np.exp(cloud.log_length_error**2 / 2)
    cost = 0.05 + 0.1 * (state.request.prompt_tokens + mean_tokens) / 1000
    open_ = away.to_cloud
    np.testing.assert_allclose(away.cost, np.where(open_, cost, 0), rtol=1e-5)
    np.testing.assert_array_equal(away.predicted_quality, np.where(open_, cloud.predicted_quality[row], 0))
    np.testing.assert_allclose(away.qos, away.predicted_quality * away.in_time, rtol=1e-6)
    assert ((away.in_time >= 0) & (away.in_time <= 1)).all()


MANY = 20_000


def describe(prompt=300.0, age=0.0, **limits):
    zeros, limits = jnp.zeros(3), Limits(**jax.tree.map(jnp.float32, limits))
    return Described(jnp.float32(prompt), limits, jnp.float32(age), zeros, zeros)


@pytest.fixture(scope="module")
def many_answers():
    """The same request, sent to the cloud again and again."""
    env, params = scenario(*WITH_CLOUD)
    _, state = env.reset(jax.random.key(0), params)
    request = state.request._replace(local_only=jnp.bool_(False), age=jnp.float32(0.0))
    prices = Prices(jnp.float32(0.0), jnp.float32(2.0))
    draw = jax.jit(jax.vmap(lambda key: ask(key, params.cloud, jnp.zeros(PLACES), request, prices, jnp.bool_(True))))
    return jax.device_get((params.cloud, request, draw(jax.random.split(jax.random.key(1), MANY))))


def test_times_are_log_normal_and_some_are_slow(many_answers):
    _, request, answers = many_answers
    tpot = (answers.latency - answers.ttft) / (answers.output_tokens - 1)
    assert answers.sent.all()
    # A slow answer takes six times as long in both. Which one is slow, the time per token tells: far beyond its spread.
    slow = tpot > CLOUD["tpot"] * 6**0.5
    assert slow.mean() == pytest.approx(0.25, abs=0.01)
    for times, median, spread in ((answers.ttft, 0.4, 0.5), (tpot, 0.02, 0.2)):
        logs = np.log(times / median) - np.where(slow, np.log(6), 0)
        assert np.median(logs) == pytest.approx(0, abs=0.02)
        assert logs.std() == pytest.approx(spread, rel=0.03)
        quantiles = np.quantile(logs, [0.025, 0.975]) / spread
        np.testing.assert_allclose(quantiles, [-1.96, 1.96], atol=0.08)
    # Both are drawn on their own.
    assert abs(np.corrcoef(np.log(answers.ttft[~slow]), np.log(tpot[~slow]))[0, 1]) < 0.03
    tokens = int(request.prompt_tokens) + answers.output_tokens
    np.testing.assert_allclose(answers.spent, 2 * (0.05 + 0.1 * tokens / 1000), rtol=1e-5)


@pytest.mark.parametrize(
    "limits",
    [
        *({"normalised": limit} for limit in (0.015, 0.022, 0.03, 0.06, 0.15)),
        *({"ttft": limit} for limit in (0.3, 0.6, 3.0)),
        *({"tpot": limit} for limit in (0.017, 0.025, 0.15)),
        *({"e2e": limit} for limit in (1.0, 5.0, 20.0)),
        {"ttft": 0.5, "tpot": math.inf, "e2e": math.inf},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [30.0, 300.0])
def test_the_predicted_chance_is_the_share_in_time(many_answers, limits, tokens):
    """Over lengths that are log-normal around their prediction."""
    cloud, _, _ = many_answers
    rng = np.random.default_rng(0)
    error = float(cloud.log_length_error)
    lengths = np.maximum(np.round(tokens * np.exp(error * rng.standard_normal(MANY))), 1)
    slow = np.where(rng.random(MANY) < 0.25, 6.0, 1.0)
    ttft = 0.4 * np.exp(0.5 * rng.standard_normal(MANY)) * slow
    latency = ttft + 0.02 * np.exp(0.2 * rng.standard_normal(MANY)) * slow * (lengths - 1)
    measured = {"ttft": ttft, "e2e": latency, "normalised": latency / lengths}
    measured["tpot"] = (latency - ttft) / np.maximum(lengths - 1, 1)
    share = np.all([measured[name] <= limit for name, limit in limits.items()], axis=0).mean()
    prices = Prices(jnp.float32(0.0), jnp.float32(1.0))
    away = expect_away(cloud, jnp.bool_(True), describe(**limits), jnp.float32(0.8), jnp.float32(tokens), prices)
    assert float(away.in_time) == pytest.approx(share, abs=0.1)
    nowhere = expect_away(cloud, jnp.bool_(False), describe(**limits), jnp.float32(0.8), jnp.float32(tokens), prices)
    assert nowhere.allowed
    assert all(float(value) == 0 for value in nowhere[1:])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 32), st.integers(0, 16)), min_size=1, max_size=12))
def test_places_are_taken_until_the_answer_ends(history):
    """Against a list of ends in absolute time, on the host."""
    places, ends, now = jnp.zeros(PLACES), [], 0.0
    for wants, quarters, more in history:
        latency, gap = quarters / 4, more / 4
        ends = [end for end in ends if end > now]
        assert int((places > 0).sum()) == len(ends)
        sent = wants and len(ends) < PLACES
        if sent:
            ends.append(now + latency)
        nothing = jnp.float32(0.0)
        answer = CloudAnswer(*[nothing] * 8)._replace(sent=jnp.bool_(sent), latency=jnp.float32(latency))
        places = let_time_pass(places, answer, nothing, jnp.float32(gap))
        now += gap


# ---- Prices ------------------------------------------------------------------------------------------------


def test_prices_are_drawn_for_each_environment_and_seen():
    ranges = ("train.accelerator_prices=[0.02,0.4]", "train.cloud_prices=[0.5,2]")
    env, params = training_env(load_config([*SMALL, *WITH_CLOUD, *ranges]))
    keys = jax.random.split(jax.random.key(0), 256)
    obs, state = jax.jit(jax.vmap(env.reset, (0, None)))(keys, params)
    chex.assert_trees_all_equal(obs.arrival.prices, state.prices)
    for prices, (least, greatest) in ((state.prices.accelerator, (0.02, 0.4)), (state.prices.cloud, (0.5, 2))):
        assert least <= prices.min() < least + 0.05 * (greatest - least)
        assert greatest - 0.05 * (greatest - least) < prices.max() <= greatest
        assert prices.mean() == pytest.approx((least + greatest) / 2, rel=0.1)
    assert abs(np.corrcoef(state.prices.accelerator, state.prices.cloud)[0, 1]) < 0.2
    tokens = state.request.prompt_tokens + params.cloud.predicted_output_tokens[state.request.row] * jnp.exp(
        params.cloud.log_length_error**2 / 2
    )
    listed = 0.05 + 0.1 * tokens / 1000
    np.testing.assert_allclose(obs.away.cost[obs.away.to_cloud], (listed * state.prices.cloud)[obs.away.to_cloud], 1e-5)


def test_an_evaluation_has_one_price():
    env, params = scenario("reward.accelerator_price=0.3", *WITH_CLOUD)
    of_each = jax.vmap(lambda key: env.reset(key, params)[1].prices)
    prices = jax.jit(of_each)(jax.random.split(jax.random.key(0), 4))
    np.testing.assert_allclose(prices.accelerator, 0.3)
    np.testing.assert_allclose(prices.cloud, 1.0)


# ---- Floors ------------------------------------------------------------------------------------------------


def test_what_is_below_the_quality_floor_is_worth_nothing():
    """At the experts and in the cloud, for the router and in truth; each environment has its own floor."""
    words = [*SMALL, *WITH_CLOUD, "train.quality_floors=[0.2,0.9]"]
    env, params = training_env(load_config(words))
    params = params._replace(bank=params.bank._replace(quality=jnp.ones_like(params.bank.quality)))
    keys = jax.random.split(jax.random.key(0), 128)
    obs, state = jax.jit(jax.vmap(env.reset, (0, None)))(keys, params)
    floor, row = state.request.quality_floor, state.request.row
    assert 0.2 <= floor.min() < 0.3
    assert 0.8 < floor.max() <= 0.9
    listed = jax.vmap(lambda row, column: params.bank.predicted_quality[row, column])(row, state.fleet.column)
    wanted = listed >= floor[:, None]
    assert 0.1 < wanted.mean() < 0.9
    chex.assert_trees_all_equal(obs.candidates.predicted_quality, jnp.where(wanted, listed, 0.0))
    chex.assert_trees_all_equal(state.request.quality, wanted.astype(jnp.float32))
    of_cloud = params.cloud.predicted_quality[row]
    open_ = obs.away.to_cloud
    expected = jnp.where(of_cloud >= floor, of_cloud, 0.0)
    chex.assert_trees_all_equal(obs.away.predicted_quality[open_], expected[open_])
    asked = jax.vmap(lambda key, request: ask(key, params.cloud, jnp.zeros(1), request, Prices(0.0, 1.0), True))
    answers = jax.jit(asked)(keys, state.request)
    assert (answers.quality[of_cloud < floor] == 0).all()
    assert (answers.expected_qos[of_cloud < floor] == 0).all()


def test_the_quality_floor_lasts():
    history, _, next_, _, _ = play(random_script(4), "reward.quality_floor=0.5")
    np.testing.assert_array_equal(next_.request.quality_floor, np.float32(0.5))
    predicted = history.candidates.predicted_quality
    assert ((predicted == 0) | (predicted >= 0.5)).all()


@pytest.mark.parametrize("cloud", [(), WITH_CLOUD], ids=["", "cloud"])
def test_a_class_keeps_its_floor(cloud):
    """All policies send away whatever they may; what is refused to them goes to an expert."""
    env, params = scenario("reward.class_floor={standard: 0.75, relaxed: 0.5}", *cloud)
    policy = with_form("random", "decline")._replace(params=((), 2.0))

    def step(carry, key):
        obs, state = carry
        action, _ = policy.act(policy.params, obs, key, policy.memory)
        limits = state.request.limits.normalised
        obs, state, _, _, _, info = env.step(key, state, action, params)
        return (obs, state), (limits, info["declined"], action == AWAY, state.served)

    def episode(key):
        return jax.lax.scan(step, env.reset(key, params), jax.random.split(jax.random.key(2), 1500))[1]

    limits, declined, away, served = jax.jit(episode)(jax.random.key(1))
    assert (served >= params.class_floor).all()
    for of_class, floor in zip(params.limits.normalised, params.class_floor, strict=True):
        share = 1 - declined[(limits == of_class)].mean()
        # The cloud serves some more.
        assert share == pytest.approx(float(floor), abs=0.06) if not cloud else share > floor - 0.06
    if not cloud:
        assert (away == declined).all()


def test_a_network_may_not_decline_below_the_floor():
    env, params = scenario("reward.class_floor={standard: 1}")
    obs, _ = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), 32), params)
    standard = obs.arrival.limits.normalised == params.limits.normalised[1]
    assert 0 < standard.sum() < 32
    for network in (HAN(hidden=8, away=True), FlatMLP(hidden=8, away=True)):

        def untrained(obs, network=network):
            features = jax.vmap(network.prepare)(obs)
            weights = network.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], features))
            return jax.vmap(network.apply, (None, 0))(weights, features)[0]

        logits = jax.jit(untrained)(obs)
        np.testing.assert_array_equal(logits[:, AWAY] < -1e8, standard)
    np.testing.assert_array_equal(jax.vmap(eligible_actions)(obs)[:, AWAY], ~standard)


# ---- Forms: against a reference ----------------------------------------------------------------------------

PARAMS = {
    "decline": 0.1,
    "price": 0.6,
    "rate_price": 0.3,
    "saturation": 0.9,
    "predicted_latency": 0.4,
    "early_rejection": 0.8,
    "token_bucket": 0.3,
}


def reference(form, value, o, choice, full):
    """Whether the form sends this request away, and how full its bucket is then; `o` holds NumPy arrays."""
    net, offer = o["qos"] - o["qos_loss"], o["offer"]
    capacity = sum(o["max_num_seqs"][i] / o["weight_load"][i] for i in range(NUM_EXPERTS) if o["up"][i])
    able = [i for i in range(NUM_EXPERTS) if o["available"][i]] or [i for i in range(NUM_EXPERTS) if o["up"][i]]
    if form == "decline":
        return net[choice] - value < offer, full
    if form in ("price", "rate_price"):
        if form == "rate_price":
            # At a request for a hundred tokens of capacity, it is `value`.
            value = value * o["arrival_rate"] / (capacity / 100)
        worth = [net[i] - value * max(o["seat_seconds"][i], o["kv_seconds"][i]) for i in able]
        return all(one < offer for one in worth), full
    if form == "saturation":
        used = [max(o["num_waiting"][i] / 5, o["kv_used"][i] / o["kv_capacity"][i] / 0.8) for i in range(NUM_EXPERTS)]
        there = [used[i] for i in range(NUM_EXPERTS) if o["up"][i]]
        return sum(there) / len(there) >= value, full
    if form == "predicted_latency":
        late = o["normalised_latency"][choice] > o["limit"]
        return late or o["added_violations"][choice] > value, full
    if form == "early_rejection":
        return min(o["normalised_latency"][i] for i in able) / o["limit"] > value, full
    assert form == "token_bucket"
    rate = value * capacity
    tokens = min(full * 10 * rate + o["latest_gap"] * rate, 10 * rate)
    needed = o["predicted_output_tokens"][choice]
    away = tokens < needed
    return away, (tokens if away else tokens - needed) / (10 * rate)


def random_observation(rng):
    """One in which each form may decide either way; also as a dictionary of what it is made of."""

    def each(low, high):
        return rng.uniform(low, high, NUM_EXPERTS).astype(np.float32)

    up = rng.random(NUM_EXPERTS) < 0.8
    up[rng.integers(NUM_EXPERTS)] = True
    values = {
        "qos": each(0, 1),
        "qos_loss": each(0, 0.8),
        "seat_seconds": each(0, 1.5),
        "kv_seconds": each(0, 1.5),
        "num_waiting": each(0, 8).round(),
        "kv_used": each(0, 10_000),
        "normalised_latency": each(0.01, 0.08),
        "added_violations": each(0, 1),
        "predicted_output_tokens": each(10, 3000),
        "weight_load": each(0.01, 0.04),
        "latest_gap": rng.uniform(0, 2),
        "arrival_rate": rng.uniform(1, 30),
        "limit": rng.uniform(0.02, 0.08),
        "up": up,
        "available": up & (rng.random(NUM_EXPERTS) < 0.8),
    }
    to_cloud = rng.random() < 0.5
    qos, cost = (np.float32(to_cloud * rng.uniform(0, high)) for high in (0.8, 0.4))
    away = Away(
        jnp.bool_(True),
        jnp.bool_(to_cloud),
        *(jnp.float32(value) for value in (0.9 * to_cloud, 0.8 * to_cloud, qos, cost)),
    )
    constants = {"kv_capacity": np.full(NUM_EXPERTS, 10_000.0), "max_num_seqs": np.full(NUM_EXPERTS, 8.0)}
    return observation(away=away, **values), values | constants | {"offer": qos - cost}


@cache
def decisions():
    """Each form's decision on random observations, with how full its bucket is before and after."""
    rng = np.random.default_rng(3)
    observations, described = zip(*(random_observation(rng) for _ in range(400)), strict=True)
    full = rng.random(len(described)).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *observations)
    found = {}
    for form, value in PARAMS.items():
        policy = with_form("impact_greedy", form)

        def act(obs, full, policy=policy, form=form, value=value):
            memory = (policy.memory[0], full if form == "token_bucket" else ())
            params = (policy.params[0], value)
            action, after = policy.act(params, obs, jax.random.key(0), memory)
            return action, after[1] if form == "token_bucket" else full

        found[form] = jax.device_get(jax.jit(jax.vmap(act))(stacked, full))
    choices = jax.jit(jax.vmap(lambda obs: RULES["impact_greedy"].act((), obs, jax.random.key(0), ())[0]))(stacked)
    return described, full, np.asarray(choices), found


@pytest.mark.parametrize("form", PARAMS)
def test_a_form_sends_away_what_its_source_says(form):
    described, full, choices, found = decisions()
    actions, after = found[form]
    expected = [
        reference(form, PARAMS[form], o, choice, before)
        for o, choice, before in zip(described, choices, full, strict=True)
    ]
    away = np.array([bool(one) for one, _ in expected])
    assert 0.1 < away.mean() < 0.9
    # Otherwise the rule chooses, as always.
    np.testing.assert_array_equal(actions, np.where(away, NUM_EXPERTS, choices))
    np.testing.assert_allclose(after, [one for _, one in expected], atol=1e-5)


def test_every_form_has_a_reference_and_a_name():
    assert set(PARAMS) == set(FORMS)
    for form in FORMS:
        policy = with_form("round_robin", form)
        assert (policy.name, policy.declines) == (f"round_robin+{form}", True)
        # One function for equal names, so that it is compiled once.
        assert policy.act is with_form("round_robin", form).act
    assert [policy.name for policy in rules_named(["random", "random+price"])] == ["random", "random+price"]
    assert not rules_named(["random"])[0].declines


def test_the_rule_below_a_form_keeps_its_memory():
    """Its turn passes with what is sent away: the rule has chosen, and the form has overruled it."""
    policy = with_form("round_robin", "decline")
    worthless = jnp.float32(0.0)
    away = Away(jnp.bool_(True), jnp.bool_(False), *[worthless] * 4)
    memory, actions = policy.memory, []
    for qos in (0.5, 0.5, 0.0, 0.5):
        obs = observation(away=away, qos=qos)
        action, memory = policy.act((policy.params[0], 0.1), obs, jax.random.key(0), memory)
        actions.append(int(action))
    assert actions == [0, 1, NUM_EXPERTS, 0]


# ---- Networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HAN, FlatMLP], ids=["HAN", "mlp"])
def test_only_a_network_with_a_score_for_away_declines(make):
    env, params = scenario()
    obs, _ = jax.eval_shape(lambda key: env.reset(key, params), jax.random.key(0))

    def logits(network, obs):
        return jax.eval_shape(
            lambda key, obs: network.init_with_output(key, network.prepare(obs))[0][0], jax.random.key(0), obs
        ).shape

    assert logits(make(hidden=8), obs) == (3,)
    assert logits(make(hidden=8, away=True), obs) == (4,)
    # And only where the environment has it.
    assert logits(make(hidden=8, away=True), obs._replace(away=None)) == (3,)


# ---- Evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """In overload, by one program: rules that send away and one that does not."""
    env, params = scenario(*WITH_CLOUD)
    policies = rules_named(["impact_greedy", "impact_greedy+decline", "random+saturation=0.3"])
    settings = {"seed": 1, "episodes": 3, "requests": 150, "warmup": 30}
    return evaluate_policies(env, params, policies, [25.0], **settings)[25.0]


def test_records_tell_declined_from_rejected_and_from_the_cloud(judged):
    for name, records in judged.items():
        declined, in_cloud = records.status == Outcome.DECLINED, records.expert == AWAY
        np.testing.assert_array_equal(in_cloud & ~declined, in_cloud & (records.status == Outcome.COMPLETED))
        assert declined.any() == in_cloud.any() == ("+" in name)
        assert (in_cloud[declined]).all()
        for column in (records.quality, records.output_tokens, records.spent):
            assert (column[declined] == 0).all()
        assert np.isnan(records.latency[declined]).all()
        paid = records.spent > 0
        np.testing.assert_array_equal(paid, in_cloud & ~declined)
        summary = summarise(records, 30)
        rates = ("in_time_rate", "violation_rate", "rejection_rate", "declined_rate", "lost_rate")
        np.testing.assert_allclose(sum(summary[rate] for rate in rates), 1)
        ended = (records.status[:, 30:] != Outcome.IN_FLIGHT).sum(1)
        np.testing.assert_allclose(summary["declined_rate"], declined[:, 30:].sum(1) / ended)
        np.testing.assert_allclose(summary["spent_per_request"], records.spent[:, 30:].sum(1) / ended, rtol=1e-6)


def test_declining_pays_off_in_overload(judged):
    """Who takes everybody serves few in time."""
    qos = {name: summarise(records, 30)["avg_qos"].mean() for name, records in judged.items()}
    assert qos["impact_greedy+decline"] > qos["impact_greedy"] + 0.02


# ---- Mistakes ----------------------------------------------------------------------------------------------


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_form_where_nothing_may_be_sent_away():
    env, params = scenario("env.away=false")
    settings = {"seed": 1, "episodes": 1, "requests": 10, "warmup": 0}
    message = one_line(lambda: evaluate_policies(env, params, rules_named(["random+price"]), [5.0], **settings))
    assert message == "policy random+price sends requests away, and env.away=false rules that out; set it to true"


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("random+prize", "the form prize is unknown (did you mean price?)"),
        ("randon+price", "randon+price is unknown (did you mean random?)"),
        ("random+", "the form  is unknown"),
        ("random+price+decline", "the form price+decline is unknown"),
        ("random+price=dear", "dear is no number; write for instance random+price=0.3"),
        ("random+price=nan", "nan is no number"),
    ],
)
def test_unknown_forms(name, named):
    assert named in one_line(lambda: rules_named([name]))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([word for word in WITH_CLOUD if "per_request" not in word], "site.cloud.price_per_request is missing"),
        ([*WITH_CLOUD, "site.cloud.price_per_request=-0.1"], "site.cloud: price_per_request=-0.1 must not be negative"),
        ([*WITH_CLOUD, "site.cloud.price_per_1000_tokens=nan"], "price_per_1000_tokens=nan must not be negative"),
        ([*WITH_CLOUD, "site.cloud.slow_share=1.2"], "slow_share=1.2 is a share; it must lie between 0 and 1"),
        ([*WITH_CLOUD, "site.cloud.slow_factor=0.5"], "slow_factor=0.5 must be at least 1"),
        ([*WITH_CLOUD, "site.cloud.ttft=0"], "ttft=0.0 must be above 0 s"),
        ([*WITH_CLOUD, "site.cloud.max_in_flight=0"], "max_in_flight=0 must be from 1"),
        ([*WITH_CLOUD, "site.cloud.prize=1"], "unknown option site.cloud.prize"),
        (["site.cloud={model: m}"], "site.cloud.ttft is missing; give it a value"),
        (["workload.local_only=-0.1"], "local_only=-0.1 is a share; it must lie between 0 and 1"),
        (["workload.local_only=nan"], "local_only=nan is a share"),
        (["train.accelerator_prices=[0.1,-1]"], "accelerator_prices=[0.1, -1.0] must be one or two numbers"),
        (["train.cloud_prices=[1,nan]"], "cloud_prices=[1.0, nan] must be one or two numbers"),
        (["train.cloud_prices=[1,2,3]"], "cloud_prices=[1.0, 2.0, 3.0] must be one or two numbers"),
        (["env.away=sometimes"], "env.away"),
        (["reward.quality_floor=1.5"], "reward: quality_floor=1.5 must lie between 0 and 1"),
        (["reward.class_floor={relaxed: 1.5}"], "reward: class_floor.relaxed=1.5 must lie between 0 and 1"),
        (["reward.class_floor={relaxed: nan}"], "reward: class_floor.relaxed=nan must lie between 0 and 1"),
        (["train.quality_floors=[0.5,2]"], "train: quality_floors=[0.5, 2.0] must be one or two numbers"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_wrong_prices_and_shares(words, named):
    assert named in one_line(lambda: load_config([*SMALL, *words]))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["reward.class_floor={relaxd: 0.5}"], "which the workload does not have (did you mean relaxed?)"),
        (["reward.class_floor={relaxed: 0.5}", "env.away=false"], "class_floor limits who may be declined"),
    ],
)
def test_a_class_floor_that_cannot_be(words, named):
    assert named in one_line(lambda: build_env(load_config([*SMALL, *words])))


def test_a_cloud_of_which_the_bank_knows_nothing():
    words = [*SMALL, *WITH_CLOUD, "site.cloud.model=who"]
    assert "has no LLM 'who'" in one_line(lambda: build_env(load_config(words)))


def test_a_run_can_be_given_a_cloud():
    """Whether its configuration has one or not."""
    base = load_config(SMALL)
    assert load_config(WITH_CLOUD, base).site.cloud.max_in_flight == PLACES
    dearer = load_config(["site.cloud.ttft=0.9"], load_config([*SMALL, *WITH_CLOUD]))
    assert (dearer.site.cloud.ttft, dearer.site.cloud.tpot) == (0.9, 0.02)
    assert load_config(["site.cloud=null"], dearer).site.cloud is None

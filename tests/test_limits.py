"""Limits on latencies, and the part of the potential that charges for seats: from their formulas to whole episodes."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxroute
from jaxroute.env import EdgeRouting, EnvParams, OutageParams
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.metrics import Outcome, summarise
from jaxroute.networks.features import features_of
from jaxroute.policies import RULES
from jaxroute.workloads.limits import Limits, RequirementConfig, check_requirements, latencies, limits_of

# ---- By their definition -----------------------------------------------------------------------------------

limit = st.one_of(st.none(), st.just(math.inf), st.floats(1 / 128, 10.0, width=32))
some_limits = st.builds(Limits, limit, limit, limit, limit).filter(lambda limits: limits != Limits())


def measure(ttft, latency, tokens):
    """What can be limited, of one answer."""
    tpot = (latency - ttft) / (tokens - 1) if tokens > 1 else 0.0
    return {"ttft": ttft, "tpot": tpot, "e2e": latency, "normalised": latency / tokens}


def as_arrays(limits):
    return jax.tree.map(lambda value: jnp.full(3, value, jnp.float32), limits)


@given(some_limits, st.floats(1 / 128, 10.0, width=32), st.floats(0.0, 10.0, width=32), st.integers(1, 1000))
def test_limits_are_met_if_each_is(limits, ttft, further, tokens):
    latency = ttft + (further if tokens > 1 else 0.0)
    ratios = [measure(ttft, latency, tokens)[name] / limit for name, limit in limits._asdict().items() if limit]
    measured = latencies(np.full(3, ttft), np.full(3, latency), np.full(3, tokens))
    for given_limits, arrays in ((as_arrays(limits), jax.tree.map(jnp.float32, measured)), (limits, measured)):
        np.testing.assert_allclose(given_limits.relative(arrays), max(ratios), rtol=1e-5)
        if abs(max(ratios) - 1) > 1e-5:
            np.testing.assert_array_equal(given_limits.met(arrays), max(ratios) < 1)


@given(some_limits, st.integers(1, 1000))
def test_the_time_per_token_just_keeps_all_limits(limits, tokens):
    """An answer of which each token takes as long, but the first one, which may take all that its limit allows."""
    given_limits = {name: limit for name, limit in limits._asdict().items() if limit not in (None, math.inf)}
    allowed = [given_limits["normalised"]] if "normalised" in given_limits else []
    allowed += [given_limits["e2e"] / tokens] if "e2e" in given_limits else []
    if "tpot" in given_limits:
        first = given_limits.get("ttft", given_limits["tpot"])
        allowed.append((first + (tokens - 1) * given_limits["tpot"]) / tokens)
    per_token = as_arrays(limits).per_token(jnp.full(3, tokens, jnp.float32))
    np.testing.assert_allclose(per_token, min(allowed, default=math.inf), rtol=1e-5)


def test_what_no_class_limits_is_none():
    classes = [RequirementConfig("a", 1.0, ttft=0.5, tpot=0.03), RequirementConfig("b", 2.0, ttft=2.0, e2e=60.0)]
    limits = limits_of(classes)
    np.testing.assert_allclose(limits.ttft, [0.5, 2.0])
    np.testing.assert_allclose(limits.tpot, [0.03, math.inf])
    np.testing.assert_allclose(limits.e2e, [math.inf, 60.0])
    assert limits.normalised is None


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ([], "requirements is empty"),
        ([{"share": 1.0}], "requirement a limits nothing; give one of ttft, tpot, e2e, normalised"),
        ([{"share": 1.0, "ttft": -0.5}], "requirement a: ttft=-0.5 must be above 0 s, and finite"),
        ([{"share": 1.0, "ttft": 0.5, "tpot": math.nan}], "requirement a: tpot=nan must be above 0 s, and finite"),
        ([{"share": 1.0, "e2e": 0.0}], "requirement a: e2e=0.0 must be above 0 s, and finite"),
        ([{"share": 1.0, "normalised": math.inf}], "requirement a: normalised=inf must be above 0 s, and finite"),
        ([{"share": -1.0, "ttft": 0.5}], "requirement a: share=-1.0 must be at least 0"),
        ([{"share": math.nan, "ttft": 0.5}], "requirement a: share=nan must be at least 0"),
        ([{"share": 0.0, "ttft": 0.5}, {"share": 0.0, "e2e": 5.0}], "the shares of all requirements are 0"),
    ],
    ids=str,
)
def test_what_is_no_requirement(requirements, message):
    with pytest.raises(UserError) as caught:
        check_requirements([RequirementConfig(name="a", **fields) for fields in requirements], "workload mine")
    assert str(caught.value).startswith("workload mine: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- In episodes -------------------------------------------------------------------------------------------

NUM_ENVS, NUM_STEPS, RATE = 8, 400, 9.0
# Each limit alone, so tight that even a router that looks for it fails some, and all of them.
CLASSES = Limits(
    ttft=[0.042, math.inf, math.inf, math.inf, 0.07],
    tpot=[math.inf, 0.0135, math.inf, math.inf, 0.02],
    e2e=[math.inf, math.inf, 2.2, math.inf, 4.0],
    normalised=[math.inf, math.inf, math.inf, 0.0135, 0.022],
)
ALL = 4
FAILING = OutageParams(mean_uptime=jnp.float32(20.0), mean_downtime=jnp.float32(2.0))


class Episodes(NamedTuple):
    """What happened, with the leading axes env and step; the state is that before and after the step."""

    obs: Any
    state: Any
    action: np.ndarray
    reward: np.ndarray
    info: dict[str, Any]
    next_state: Any


@cache
def scenario(away: bool) -> tuple[EdgeRouting, EnvParams]:
    """Requests are retried where outages come, and each look at the experts is kept, though none is late."""
    env, params = jaxroute.make("edge-poisson", rate=RATE, overrides=("bank.num_prompts=500",))
    never = OutageParams(mean_uptime=jnp.float32(math.inf), mean_downtime=jnp.float32(1.0))
    env = dataclasses.replace(env, outages="retried", stale=True, away=away)
    return env, params._replace(outages=never, refresh_interval=jnp.zeros(2))


def limited(params):
    limits = Limits(*(jnp.asarray(values, jnp.float32) for values in CLASSES))
    return params._replace(limits=limits, share=jnp.full(5, 0.2))


def _play(env, params, keys):
    rule = RULES["qos_greedy"]

    def episode(key):
        key_reset, key_steps = jax.random.split(key)
        keys = jax.random.split(key_steps, NUM_STEPS)

        def step(carry, _):
            obs, state = carry
            action = rule.act(rule.params, obs, keys[0], rule.memory)[0]
            new_obs, new_state, reward, _, _, info = env.step(keys[state.step], state, action, params)
            return (new_obs, new_state), Episodes(obs, state, action, reward, info, new_state)

        return jax.lax.scan(step, env.reset(key_reset, params), length=NUM_STEPS)[1]

    return jax.vmap(episode)(keys)


# Compiled twice: with all limits and away, and with one limit and without.
play = jax.jit(_play, static_argnums=0)


def played(env, params, seed=0):
    return jax.tree.map(np.asarray, play(env, params, jax.random.split(jax.random.key(seed), NUM_ENVS)))


@pytest.fixture(scope="module")
def calm():
    env, params = scenario(away=True)
    return played(env, limited(params))


@pytest.fixture(scope="module")
def failing():
    env, params = scenario(away=True)
    return played(env, limited(params)._replace(outages=FAILING))


OUTCOME = ("ttft", "latency", "output_tokens", "in_time", "limits")
all_features = jax.jit(jax.vmap(jax.vmap(features_of)))


def classes_of(limits):
    """Number of each request's class."""
    there = [limit < math.inf for limit in limits]
    return np.select([np.all(there, axis=0), *there], [ALL, 0, 1, 2, 3], -1)


@pytest.mark.parametrize("kind", ["calm", "failing"])
def test_in_time_are_those_that_keep_every_limit(kind, request):
    info = request.getfixturevalue(kind).info
    ended = info["ended"]
    outcome = jax.tree.map(lambda leaf: leaf[ended], {name: info[name] for name in OUTCOME})
    kind = classes_of(outcome["limits"])
    ratios = [
        max(value / getattr(CLASSES, name)[c] for name, value in measure(*measured).items())
        for c, *measured in zip(kind, outcome["ttft"], outcome["latency"], outcome["output_tokens"], strict=True)
    ]
    # A division in float32 may go the other way right at a limit.
    sure = np.abs(np.array(ratios) - 1) > 1e-5
    np.testing.assert_array_equal(outcome["in_time"][sure], np.array(ratios)[sure] < 1)
    assert sure.mean() > 0.99
    for c in range(5):
        share = outcome["in_time"][kind == c].mean()
        assert 0.1 < share < 1, f"class {c}: a limit that all or none keep says nothing"
    np.testing.assert_array_equal(info["num_late"], (ended & ~info["in_time"]).sum((-2, -1)))


def predicted(episodes):
    """Of what ended, the impact that was predicted at the chosen expert, and the outcome; nobody is routed twice."""
    info = episodes.info
    env, step, slot, expert = np.nonzero(info["ended"] & (info["request"] >= 50))
    routed = info["request"][env, step, slot, expert]
    impact = jax.tree.map(lambda leaf: leaf[env, routed, expert], episodes.obs.candidates.impact)
    return impact, jax.tree.map(lambda leaf: leaf[env, step, slot, expert], {name: info[name] for name in OUTCOME})


def test_the_share_that_keeps_each_limit_is_predicted(calm):
    assert not calm.info["lost"].any()
    impact, outcome = predicted(calm)
    kind = classes_of(outcome["limits"])
    measured = latencies(outcome["ttft"], outcome["latency"], outcome["output_tokens"])
    for c, name in enumerate(Limits._fields):
        for mine in (kind == c, kind == ALL):
            kept = (getattr(measured, name) <= getattr(outcome["limits"], name))[mine]
            probability = getattr(impact.in_time_each, name)[mine]
            assert mine.sum() > 200
            assert probability.mean() == pytest.approx(kept.mean(), abs=0.1), (name, c)
            if kept.mean() < 0.95:
                # It knows which ones, and not only how many.
                assert probability[kept].mean() > probability[~kept].mean() + 0.1, (name, c)
    assert impact.in_time[kind == ALL].mean() == pytest.approx(outcome["in_time"][kind == ALL].mean(), abs=0.15)


@pytest.mark.parametrize("kind", ["calm", "failing"])
def test_all_limits_are_kept_at_most_as_often_as_each(kind, request):
    obs = request.getfixturevalue(kind).obs
    impact, limits = obs.candidates.impact, obs.arrival.limits
    for name, probability in impact.in_time_each._asdict().items():
        assert ((probability >= 0) & (probability <= 1)).all()
        assert (impact.in_time <= probability + 1e-6).all(), name
        assert (probability[getattr(limits, name) == math.inf] == 1).all(), name
        assert (probability[getattr(limits, name) < math.inf] < 0.9).any(), name
    alone = classes_of(limits) < ALL
    np.testing.assert_allclose(impact.in_time[alone], np.min(impact.in_time_each, axis=0)[alone], rtol=1e-5)
    for leaf in jax.tree.leaves(all_features(obs)):
        assert np.isfinite(leaf).all()


def test_retried_requests_keep_their_limits_and_their_first_token(failing):
    """A router counts a TTFT from the first arrival, as the outcome does."""
    given_back = first_tokens = 0
    for e in range(NUM_ENVS):
        of_env = jax.tree.map(lambda leaf, e=e: leaf[e], failing)
        number, age = of_env.state.request.number, of_env.state.request.age
        given_back += (age > 0).sum()
        origin = {n: step for step, n in reversed(list(enumerate(number.tolist())))}
        origin = np.array([origin[n] for n in number])
        for limit in of_env.state.request.limits:
            np.testing.assert_array_equal(limit, limit[origin])
        # What the router saw of the first token at the last look before the request ended, if there was one.
        retried = {int(n) for n in number[age > 0]}
        seen = of_env.state.seen.batch
        for step, slot, expert in np.argwhere(of_env.info["ended"]):
            if int(of_env.info["request"][step, slot, expert]) not in retried:
                continue
            before = of_env.state.site.slots.request[step, expert] == of_env.info["request"][step, slot, expert]
            before &= (seen.running | seen.waiting)[step, :, expert] & (seen.generated[step, :, expert] > 0)
            if before.any():
                first_tokens += 1
                np.testing.assert_allclose(
                    seen.first_token[step, before, expert],
                    of_env.info["ttft"][step, slot, expert],
                    rtol=1e-4,
                    atol=1e-4,
                )
    assert given_back > 20
    assert first_tokens > 20


# ---- One limit is all, where the others are infinite --------------------------------------------------------


@pytest.fixture(scope="module")
def one_limit():
    """Limits on the normalised latency alone, as by default; away is ruled out."""
    env, params = scenario(away=False)
    return played(env, params)


@pytest.fixture(scope="module")
def infinite_limits():
    """The same with three limits that never hold, and away among the actions."""
    env, params = scenario(away=True)
    limits = jax.tree.map(lambda values: jnp.full_like(values, math.inf), limited(params).limits)
    normalised = jnp.concatenate([params.limits.normalised, jnp.full(2, math.inf)])
    params = params._replace(
        limits=limits._replace(normalised=normalised), share=jnp.concatenate([params.share, jnp.zeros(2)])
    )
    return played(env, params)


@pytest.mark.exhaustive
def test_infinite_limits_are_no_limits(one_limit, infinite_limits):
    others = infinite_limits
    np.testing.assert_array_equal(one_limit.action, others.action)
    for name in ("in_time", "qos", "ttft", "latency", "gap"):
        np.testing.assert_array_equal(one_limit.info[name], others.info[name])
    np.testing.assert_allclose(one_limit.reward, others.reward, atol=1e-5)
    for obs in (one_limit.obs, others.obs):
        assert (obs.candidates.impact.in_time < 0.9).any()
    for name, values in one_limit.obs.candidates.impact._asdict().items():
        if name != "in_time_each":
            np.testing.assert_allclose(values, getattr(others.obs.candidates.impact, name), rtol=1e-5, atol=1e-6)
    features, same = all_features(one_limit.obs), all_features(others.obs)
    for name in ("arrival", "experts", "candidates", "in_flight"):
        np.testing.assert_allclose(getattr(features, name), getattr(same, name), rtol=1e-4, atol=1e-5, err_msg=name)


# ---- MLPerf's, and metrics ---------------------------------------------------------------------------------


def test_mlperf():
    """Its two classes are judged by TTFT and TPOT, and reported by each."""
    env, params = jaxroute.make("edge-poisson", workload="mlperf", rate=12.0, overrides=("bank.num_prompts=300",))
    np.testing.assert_allclose(params.limits.ttft, [0.5, 2.0])
    np.testing.assert_allclose(params.limits.tpot, [0.03, 0.1])
    assert params.limits.e2e is params.limits.normalised is None
    (records,) = evaluate_policies(env, params, [RULES["random"]], [12.0], seed=0, episodes=4, requests=150, warmup=30)[
        12.0
    ].values()
    summary = summarise(records, 30)
    assert not {"e2e_violation_rate", "normalised_violation_rate"} & set(summary)
    completed = (records.status == Outcome.COMPLETED)[:, 30:]
    ended = (records.status != Outcome.IN_FLIGHT)[:, 30:].sum(1)
    columns = (records.ttft, records.latency, records.output_tokens, *records.limits[:2])
    ttft, latency, tokens, ttft_limit, tpot_limit = (column[:, 30:].astype(np.float64) for column in columns)
    late = {
        "ttft": completed & (ttft > ttft_limit),
        "tpot": completed & ((latency - ttft) > tpot_limit * (tokens - 1) + 1e-6),
    }
    for name, those in late.items():
        np.testing.assert_allclose(summary[f"{name}_violation_rate"], those.sum(1) / ended, atol=1e-2)
        assert those.any(), name
    np.testing.assert_allclose(summary["violation_rate"], (late["ttft"] | late["tpot"]).sum(1) / ended, atol=1e-2)
    assert (summary["in_time_rate"] > 0).all()

"""Groups: few nodes stand for many requests; sums stay exact, and the estimator and the network see the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute.config import load_config
from jaxroute.env.groups import NUM_GROUPS, group
from jaxroute.env.impact import assess, estimate_impact
from jaxroute.env.types import Batch, Described
from jaxroute.networks import HAN
from jaxroute.networks.features import Features
from jaxroute.serving import build_site
from jaxroute.workloads.limits import Limits

NUM_SLOTS = 96
SITE = build_site(load_config(["site=rack4"]).site)
NUM_EXPERTS = SITE.num_experts
LOG_ERROR = jnp.full(NUM_EXPERTS, 0.5)


def random_batch(seed, most, num_slots=NUM_SLOTS, longest_wait=5.0):
    """Up to `most` requests at each expert, with holes: running ones, some of which prefill, then waiting ones."""
    rng = np.random.default_rng(seed)
    shape = (num_slots, NUM_EXPERTS)
    there = np.zeros(shape, bool)
    running = np.zeros(shape, bool)
    for expert in range(NUM_EXPERTS):
        number = int(rng.integers(0, most + 1))
        slots = np.sort(rng.choice(num_slots, number, replace=False))
        there[slots, expert] = True
        running[slots[: rng.integers(0, number + 1)], expert] = True
    predicted = rng.lognormal(5, 0.8, shape)
    prompt = np.round(rng.lognormal(5, 1, shape)) + 1
    generated = np.floor(running * rng.uniform(0, 1.5, shape) * predicted)
    prefills = running & (generated == 0)
    computed = np.where(running, np.where(prefills, np.floor(prompt / 3), prompt + generated - 1), 0)
    columns = {
        "prompt_tokens": prompt, "computed": computed, "generated": generated,
        "age": rng.uniform(0, longest_wait, shape) + 0.02 * generated, "predicted_quality": rng.uniform(0, 1, shape),
        "predicted_output_tokens": predicted,
    }  # fmt: skip
    # What an empty slot holds may be anything.
    columns = {name: np.where(there, values, np.nan).astype(np.float32) for name, values in columns.items()}
    limits = Limits(
        normalised=jnp.asarray(rng.choice([0.02, 0.04, 0.08], shape), jnp.float32),
        ttft=jnp.asarray(rng.choice([1.0, np.inf], shape), jnp.float32),
    )
    first_token = jnp.asarray(0.1 * rng.uniform(0.5, 5, shape), jnp.float32)
    of_slots = {name: jnp.asarray(values) for name, values in columns.items()}
    return Batch(
        running=jnp.asarray(running), waiting=jnp.asarray(there & ~running),
        first_token=first_token, limits=limits, **of_slots,
    )  # fmt: skip


grouped = jax.jit(group)


@jax.jit
def estimate(batch):
    request = Described(
        jnp.float32(200), Limits(normalised=jnp.float32(0.04), ttft=jnp.float32(jnp.inf)), jnp.float32(0.0),
        jnp.linspace(0.3, 0.7, NUM_EXPERTS), jnp.full(NUM_EXPERTS, 150.0),
    )  # fmt: skip
    batch = batch._replace(
        **{
            name: jnp.nan_to_num(getattr(batch, name))
            for name in (
                "prompt_tokens",
                "computed",
                "generated",
                "age",
                "predicted_quality",
                "predicted_output_tokens",
            )
        }
    )
    outlook, load = assess(SITE, LOG_ERROR, batch)
    return outlook, load, estimate_impact(SITE, LOG_ERROR, batch, outlook, load, request)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), most=st.integers(0, NUM_SLOTS))
def test_sums_are_exact(seed, most):
    batch = random_batch(seed, most)
    nodes = grouped(SITE, batch)
    assert nodes.weight.shape == (NUM_GROUPS, NUM_EXPERTS)
    there = np.asarray(batch.running | batch.waiting)
    np.testing.assert_allclose(nodes.weight.sum(0), there.sum(0), rtol=1e-6)
    np.testing.assert_allclose((nodes.weight * nodes.waiting).sum(0), batch.waiting.sum(0), rtol=1e-6)
    for name in ("prompt_tokens", "computed", "generated", "age", "predicted_quality", "predicted_output_tokens"):
        exact = np.where(there, getattr(batch, name), 0).sum(0, dtype=np.float64)
        np.testing.assert_allclose((nodes.weight * getattr(nodes, name)).sum(0), exact, rtol=1e-5, err_msg=name)
    need = np.where(there, batch.prompt_tokens + batch.generated - batch.computed, 0)
    outlook, *_ = estimate(nodes)
    np.testing.assert_allclose(outlook.pending_prefill, np.where(need > 1, need, 0).sum(0), rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(nodes.running | nodes.waiting, nodes.weight > 0)
    assert not (nodes.running & nodes.waiting).any()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_few_requests_stay_single(seed):
    batch = random_batch(seed, NUM_GROUPS)
    nodes = grouped(SITE, batch)
    np.testing.assert_array_equal(nodes.weight, (nodes.running | nodes.waiting).astype(np.float32))
    outlook, load, impact = estimate(batch)
    of_nodes, load_of_nodes, impact_of_nodes = estimate(nodes)
    np.testing.assert_allclose(of_nodes.expected_qos, outlook.expected_qos, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(load_of_nodes.departure_time, load.departure_time, rtol=1e-4)
    for name in ("ttft", "tpot", "in_time", "qos", "qos_loss", "added_violations", "free_seats"):
        expected = getattr(impact, name)
        np.testing.assert_allclose(getattr(impact_of_nodes, name), expected, rtol=2e-3, atol=1e-4, err_msg=name)


def test_the_estimate_over_groups_is_close_to_that_over_requests():
    """Over many random batches of requests that have not waited long; it is the same only where requests are few."""
    outlooks, pending = [], []
    for seed in range(40):
        batch = random_batch(seed, NUM_SLOTS, longest_wait=0.3)
        (one, *_), (other, *_) = estimate(batch), estimate(grouped(SITE, batch))
        outlooks.append((one.expected_qos, other.expected_qos))
        pending.append((one.pending_output, other.pending_output))
    for pairs, most in ((outlooks, 0.1), (pending, 0.1)):
        exact, approximate = np.moveaxis(np.asarray(pairs), 1, 0).reshape(2, -1)
        assert np.abs(approximate - exact).mean() < most * exact.mean()


def test_slots_that_are_no_more_than_groups_stay_as_they_are():
    batch = random_batch(0, 8, num_slots=NUM_GROUPS)
    assert group(SITE, batch) is batch


@pytest.mark.parametrize("dense", [True, False])
def test_a_node_that_stands_for_several_is_as_several_nodes(dense):
    rng = np.random.default_rng(0)
    kinds, copies = 3, 4

    def features(in_flight, weight, running):
        shape = running.shape
        return Features(
            arrival=jnp.ones(7), experts=jnp.ones((2, 13)), candidates=jnp.ones((2, 14)), in_flight=in_flight,
            weight=weight, running=running, waiting=jnp.zeros(shape, bool), up=jnp.ones(2, bool),
            eligible=jnp.ones(2, bool), expected_gain=jnp.zeros(2), away=None, away_gain=None, may_go_away=None,
        )  # fmt: skip

    requests = jnp.asarray(rng.normal(size=(2, kinds, 8)), jnp.float32)
    there = jnp.ones((2, kinds), bool)
    few = features(requests, jnp.full((2, kinds), float(copies)).at[0, 0].set(1.0), there)
    several = jnp.repeat(requests, copies, axis=1)
    many = features(
        several, jnp.ones((2, kinds * copies)), jnp.repeat(there, copies, axis=1).at[0, 1:copies].set(False)
    )
    network = HAN(hidden=8, dense=dense)
    weights = network.init(jax.random.key(0), few)
    for one, other in zip(network.apply(weights, few), network.apply(weights, many), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

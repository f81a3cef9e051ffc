"""Networks: both formulations agree, sizes do not matter, order does not matter, and padding is never seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from episodes import ROUTERS, changed, edge6, play

from jaxroute.errors import UserError
from jaxroute.networks import HAN, FlatMLP, NetworkConfig, build_network
from jaxroute.networks.features import features_of
from jaxroute.networks.graph import EDGE_TYPES, EXPERT_TO_ARRIVAL, RUNNING_TO_EXPERT, WAITING_TO_EXPERT, as_graphs

SAMPLES = 48
TOLERANCE = 1e-5
SLOTS = ("in_flight", "running", "waiting")
ABLATED = HAN(hidden=8, heads=2, semantic_attention=False, use_impact=False)
"""Both ablations, and small."""


def sample(episodes, seed=0):
    """Observations from all over some episodes, the idle site at their start included."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), episodes.obs)
    count = flat.arrival.prompt_tokens.shape[0]
    rows = np.random.default_rng(seed).choice(count, SAMPLES, replace=False)
    rows[0] = 0
    return jax.tree.map(lambda leaf: leaf[rows], flat)


@pytest.fixture(scope="module")
def obs():
    """From episodes on edge6 with few seats, so that some or all experts are full at times."""
    _, params = edge6()
    obs = sample(play(changed(params, (2.0, 60.0), max_num_seqs=4, max_waiting=2), routers=ROUTERS))
    available = obs.experts.available
    assert not obs.running[0].any(), "the first one is idle"
    assert available.all(-1).any()
    assert (available.any(-1) & ~available.all(-1)).any()
    assert (~available.any(-1)).any()
    assert obs.waiting.any()
    return obs


@pytest.fixture(scope="module")
def smaller(obs):
    """The same with half of the experts and half of the slots."""
    cut = {name: jax.tree.map(lambda leaf: leaf[:, :3], getattr(obs, name)) for name in ("experts", "candidates")}
    slots = {name: jax.tree.map(lambda leaf: leaf[:, :3, :8], getattr(obs, name)) for name in SLOTS}
    return obs._replace(**cut, **slots)


def first(network, obs):
    """What the network is initialised with."""
    return network.prepare(jax.tree.map(lambda leaf: leaf[0], obs))


def shapes(network, obs):
    return jax.eval_shape(lambda key: network.init(key, first(network, obs)), jax.random.key(0))


def anywhere(network, obs, seed=0):
    """Parameters at which every part of the network matters; those it starts with leave most to the estimator."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 10
        return np.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, np.float32)

    return jax.tree.map(draw, shapes(network, obs))


@partial(jax.jit, static_argnames="network")
def forward(network, params, obs):
    return jax.vmap(partial(network.apply, params))(jax.vmap(network.prepare)(obs))


@partial(jax.jit, static_argnames="network")
def with_gradient(network, params, obs):
    """Logits, values, and the gradient of a sum in which each of them has a weight of its own."""

    def total(params):
        logits, values = forward(network, params, obs)
        weights = jnp.linspace(-1.0, 1.0, logits.size).reshape(logits.shape)
        return (jnp.where(logits > -1e8, logits, 0.0) * weights).mean() + (values * values).mean(), (logits, values)

    gradient, (logits, values) = jax.grad(total, has_aux=True)(params)
    return logits, values, gradient


def assert_close(actual, expected, tolerance=TOLERANCE):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, np.abs(np.where(np.abs(b) > 1e8, 0, b)).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


# ---- Two formulations --------------------------------------------------------------------------------------


def test_dense_and_segment_agree(obs):
    dense, segment = HAN(away=True), HAN(away=True, dense=False)
    params = anywhere(dense, obs)
    assert shapes(segment, obs) == shapes(dense, obs)
    logits, values, gradient = with_gradient(dense, params, obs)
    assert logits.shape == (SAMPLES, 7)
    assert np.std(values) > 0.05
    assert np.std(logits[logits > -1e8]) > 0.1
    assert_close(with_gradient(segment, params, obs), (logits, values, gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)), "a parameter that does nothing"


def test_ablated_formulations_agree(obs):
    params = anywhere(ABLATED, obs)
    assert_close(forward(ABLATED.clone(dense=False), params, obs), forward(ABLATED, params, obs))


def test_graphs_hold_the_observation(obs):
    obs = jax.tree.map(lambda leaf: leaf[SAMPLES // 2], obs)
    features = jax.jit(features_of)(obs)
    graphs = jax.jit(as_graphs)(features)
    assert set(graphs) == set(EDGE_TYPES)
    num_experts, num_slots = obs.running.shape
    for graph in graphs.values():
        assert graph.n_edge == len(graph.senders) == len(graph.receivers)
        assert graph.n_node == len(graph.nodes["senders"]) + len(graph.nodes["receivers"])
        assert graph.senders.max() < len(graph.nodes["senders"])
        assert graph.receivers.max() < len(graph.nodes["receivers"])
    for edge_type, mask in ((RUNNING_TO_EXPERT, obs.running), (WAITING_TO_EXPERT, obs.waiting)):
        graph = graphs[edge_type]
        per_expert = np.zeros(num_experts)
        np.add.at(per_expert, graph.receivers, graph.edges["mask"])
        np.testing.assert_array_equal(per_expert, mask.sum(-1))
        np.testing.assert_array_equal(graph.nodes["senders"].reshape(num_experts, num_slots, -1), features.in_flight)
    assert (graphs[EXPERT_TO_ARRIVAL].receivers == 0).all()


# ---- Features ----------------------------------------------------------------------------------------------


def test_features_are_a_few_units_at_most(obs):
    features = jax.jit(jax.vmap(features_of))(obs)
    for name in ("arrival", "experts", "candidates", "in_flight", "away"):
        values = getattr(features, name)
        assert np.isfinite(values).all(), name
        assert np.abs(values).max() <= 5, name


# ---- Sizes, order, padding ---------------------------------------------------------------------------------


def test_parameters_move_to_a_larger_site(obs, smaller):
    network = HAN()
    assert shapes(network, smaller) == shapes(network, obs)
    logits, values, _ = with_gradient(network, anywhere(network, smaller), obs)
    assert logits.shape == (SAMPLES, 6)
    assert values.shape == (SAMPLES,)
    assert_finite((logits, values))


def test_experts_in_another_order(obs):
    network = HAN()
    params = anywhere(network, obs)
    order = np.array([2, 0, 1, 5, 4, 3])
    of_experts = jax.tree.map(lambda leaf: leaf[:, order], obs._replace(arrival=(), away=None))
    moved = of_experts._replace(arrival=obs.arrival, away=obs.away)
    logits, values, _ = with_gradient(network, params, obs)
    moved_logits, moved_values, _ = with_gradient(network, params, moved)
    assert_close((moved_logits, moved_values), (logits[:, order], values))
    assert not np.allclose(moved_logits, logits)


def test_requests_in_another_order(obs):
    """Attention does not count slots: neither their order nor where the empty ones are."""
    network = HAN()
    params = anywhere(network, obs)
    moved = obs._replace(
        **jax.tree.map(
            lambda leaf: leaf[:, :, ::-1],
            {name: getattr(obs, name) for name in SLOTS},
        )
    )
    assert_close(with_gradient(network, params, moved), with_gradient(network, params, obs))


@pytest.mark.parametrize("network", [HAN(), HAN(dense=False)], ids=["dense", "segment"])
@pytest.mark.parametrize("garbage", [1e6, -0.5])
def test_empty_slots_are_never_seen(obs, network, garbage):
    params = anywhere(network, obs)
    used = obs.running | obs.waiting
    dirty = obs._replace(in_flight=jax.tree.map(lambda leaf: np.where(used, leaf, np.float32(garbage)), obs.in_flight))
    assert_close(with_gradient(network, params, dirty), with_gradient(network, params, obs))


def test_an_idle_site_has_a_gradient(obs):
    """Nobody to attend to, at any expert."""
    idle = jax.tree.map(lambda leaf: np.repeat(leaf[:1], SAMPLES, axis=0), obs)
    for network in (HAN(), HAN(dense=False)):
        assert_finite(with_gradient(network, anywhere(network, obs), idle))


def test_requests_in_flight_matter(obs):
    network = HAN()
    params = anywhere(network, obs)
    _, values, _ = with_gradient(network, params, obs)
    for field in ("running", "waiting"):
        others = obs._replace(**{field: np.zeros_like(getattr(obs, field))})
        used = getattr(obs, field).any((1, 2))
        _, without, _ = with_gradient(network, params, others)
        assert (np.abs(without - values)[used] > 1e-4).mean() > 0.9
        np.testing.assert_allclose(without[~used], values[~used], atol=1e-5)


# ---- Decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [HAN(), HAN(dense=False), FlatMLP(), HAN(away=True), FlatMLP(away=True)],
    ids=["dense", "segment", "mlp", "away", "mlp, away"],
)
def test_full_experts_are_ruled_out(obs, network):
    logits, _, _ = with_gradient(network, anywhere(network, obs), obs)
    available = obs.experts.available
    allowed = available | ~available.any(-1, keepdims=True)
    if network.away:
        allowed = np.append(allowed, np.ones((SAMPLES, 1), bool), axis=1)
    probabilities = np.asarray(jax.nn.softmax(logits))
    assert (probabilities[~allowed] == 0).all()
    assert (logits[allowed] > -1e6).all()
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("away", [False, True])
def test_it_starts_as_the_estimator(obs, smaller, away):
    """Before any training the policy is `impact_greedy`, less what accelerator time costs, but for near ties.

    With a score for away, what would gain less than nothing is declined.
    """
    network = HAN(away=away)
    # These keys compile in half the time.
    params = jax.jit(network.init)(jax.random.key(3, impl="rbg"), first(network, smaller))
    logits, values, _ = with_gradient(network, params, obs)
    impact, experts = obs.candidates.impact, obs.experts
    batch = np.minimum(experts.num_running + experts.num_waiting + 1, experts.max_num_seqs)
    cost = 0.1 * obs.candidates.predicted_output_tokens * impact.tpot / batch
    gain = np.where(experts.available, impact.qos - impact.qos_loss - cost, -10.0)
    some = experts.available.any(-1)
    if away:
        gain = np.append(gain, np.zeros((SAMPLES, 1)), axis=1)
        assert 3 < (gain.argmax(-1) == 6).sum() < SAMPLES - 3
    agree = logits.argmax(-1) == gain.argmax(-1)
    assert agree[some].mean() > 0.9
    ranked = np.sort(gain, -1)
    clear = some & (ranked[:, -1] - ranked[:, -2] > 0.02)
    assert agree[clear].all()
    assert clear.mean() > 0.4
    # A value near zero, in units of the best possible return.
    assert np.abs(values).max() < 0.2


def test_the_flat_ablation_runs(obs):
    network = FlatMLP()
    logits, values, gradient = with_gradient(network, anywhere(network, obs), obs)
    assert logits.shape == (SAMPLES, 6)
    assert values.shape == (SAMPLES,)
    assert_finite((logits, values, gradient))


@pytest.mark.parametrize("network", [ABLATED, FlatMLP()], ids=["HAN", "mlp"])
def test_ablations_do_not_see_the_estimator(obs, network):
    """Expected QoS, probabilities and impact might as well be anything."""
    params = anywhere(network, obs)
    blind = obs._replace(
        candidates=obs.candidates._replace(
            impact=jax.tree.map(lambda leaf: np.full_like(leaf, 0.7), obs.candidates.impact)
        ),
        experts=obs.experts._replace(expected_qos=np.full_like(obs.experts.expected_qos, 0.7)),
        in_flight=obs.in_flight._replace(in_time=np.full_like(obs.in_flight.in_time, 0.7)),
    )
    assert_close(forward(network, params, blind), forward(network, params, obs))


# ---- Configuration -----------------------------------------------------------------------------------------


def test_configurations_are_built():
    assert build_network(NetworkConfig()) == HAN()
    assert build_network(NetworkConfig(kind="mlp", hidden=32)) == FlatMLP(hidden=32)
    config = NetworkConfig(hidden=8, heads=2, semantic_attention=False, use_impact=False)
    assert build_network(config) == ABLATED
    assert build_network(NetworkConfig(), away=True) == HAN(away=True)
    assert build_network(NetworkConfig(kind="mlp"), away=True).away
    assert not build_network(NetworkConfig(dense=False)).dense


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"kind": "gnn"}, "gnn"), ({"hidden": 31}, "heads=2"), ({"hidden": 0}, "hidden=0"), ({"heads": 0}, "heads=0")],
    ids=str,
)
def test_mistakes_are_one_line(changes, named):
    with pytest.raises(UserError) as caught:
        NetworkConfig(**changes)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message

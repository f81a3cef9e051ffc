"""The warm start: labels are the planner's, and the regression learns them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.errors import UserError
from jaxroute.learning import WarmStartConfig, make_warm_start
from jaxroute.learning.warm_start import Labelled
from jaxroute.networks import NetworkConfig, build_network
from jaxroute.networks.features import features_of
from jaxroute.policies import RULES, Policy
from jaxroute.policies.planning import base_policy, drawn_values

pytestmark = pytest.mark.slow

NUM_ENVS = 8
CONFIG = WarmStartConfig(horizon=4, num_epochs=60, learning_rate=3e-3)


def fresh(env, env_params, network):
    """Environments as PPO draws them: prepared observations and states."""
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    obs, state = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, env_params)
    return jax.vmap(network.prepare)(obs), state


@pytest.fixture(scope="module")
def labelled():
    """The environments and the labels of two calls, with what made them."""
    env, env_params = jaxroute.make("edge3-poisson", rate=6.0)
    network = build_network(NetworkConfig(hidden=16, heads=2), away=True)
    warm_start = make_warm_start(CONFIG, env, env_params, network, NUM_ENVS)
    environments = fresh(env, env_params, network)
    first = jax.tree.map(lambda leaf: leaf[0], environments[0])
    params = network.init(jax.random.key(1), first)
    calls = []
    for number in range(2):
        environments, labels = warm_start.label(params, jnp.bool_(False), environments, jax.random.key(number))
        calls.append(labels)
    return env, env_params, network, params, environments, calls, warm_start


def values_of(env, env_params, base, states, keys):
    assert (states.prices.accelerator > 0).all()
    return jax.jit(jax.vmap(lambda state, key: drawn_values(env, env_params, state, base, key, CONFIG.horizon)))(
        states, keys
    )


def test_labels_are_values_of_drawn_futures(labelled):
    env, env_params, _, _, environments, calls, _ = labelled
    # The last thing that a key is folded with is the number of steps before the label.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 16))(jax.random.split(jax.random.key(1), NUM_ENVS))
    expected = values_of(env, env_params, base_policy(env), environments[1], keys)
    # One for each expert, and one for away.
    assert calls[1].values.shape == (NUM_ENVS, 4)
    np.testing.assert_allclose(calls[1].values, expected, rtol=1e-4, atol=1e-5)
    assert (environments[1].step == 32).all()
    assert np.ptp(calls[1].values, axis=-1).max() > 0


def test_the_same_keys_give_the_same_labels(labelled):
    env, env_params, network, params, _, calls, warm_start = labelled
    again = warm_start.label(params, jnp.bool_(False), fresh(env, env_params, network), jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, again, calls[0])


def greedy(params, obs, key, memory):
    """The best gain, accelerator time paid for; away, whose gain is nothing, if all are below."""
    gain = features_of(obs).expected_gain
    return jnp.append(jnp.where(obs.experts.eligible, gain, -jnp.inf), 0.0).argmax().astype(jnp.int32), memory


def test_later_rounds_follow_the_network_after_the_first_decision(labelled):
    env, env_params, network, params, _, _, warm_start = labelled
    # With a learned score of nothing and all trust in the estimator, the network is greedy in it.
    trusting = jax.tree.map(jnp.zeros_like, params)
    trusting["params"]["log_trust"] = jnp.full_like(params["params"]["log_trust"], 6.0)
    beginning = fresh(env, env_params, network)
    environments, labels = warm_start.label(trusting, jnp.bool_(True), beginning, jax.random.key(0))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 16))(jax.random.split(jax.random.key(0), NUM_ENVS))

    bases = (Policy("greedy", greedy), RULES["round_robin"])
    followed, other = (values_of(env, env_params, base, environments[1], keys) for base in bases)
    np.testing.assert_allclose(labels.values, followed, rtol=1e-4, atol=1e-5)
    assert not np.allclose(labels.values, other)


def test_the_regression_finds_known_values(labelled):
    """Values that have nothing to do with the estimator's: the learned score has to make up for it."""
    _, _, _, params, _, calls, warm_start = labelled
    obs = jax.tree.map(lambda *leaves: jnp.concatenate([*leaves] * 128), *[labels.obs for labels in calls])
    # Away is worth as much everywhere.
    values = jnp.concatenate([obs.candidates[..., 0], jnp.full((len(obs.up), 1), 0.5)], axis=1)
    regression, errors = warm_start.begin_fit(params), []
    for _ in range(60):
        regression, error = warm_start.fit(regression, Labelled(obs, values), jnp.int32(60))
        errors.append(error)
    assert errors[-1] < 0.3 * errors[0]


def test_a_network_without_a_score_for_away_learns_from_the_experts_alone(labelled):
    """Whatever the label of away says."""
    env, env_params, _, _, _, calls, _ = labelled
    network = build_network(NetworkConfig(hidden=16, heads=2))
    warm_start = make_warm_start(CONFIG, env, env_params, network, NUM_ENVS)
    params = network.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], calls[0].obs))
    others = calls[0]._replace(values=calls[0].values.at[:, 3].set(9.0))
    fits = [warm_start.fit(warm_start.begin_fit(params), labels, jnp.int32(1)) for labels in (calls[0], others)]
    jax.tree.map(np.testing.assert_array_equal, *fits)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_states", -1), ("num_rounds", 0), ("horizon", 0), ("num_epochs", 0), ("learning_rate", float("nan"))],
)
def test_mistakes_are_named(name, value):
    with pytest.raises(UserError, match=name):
        WarmStartConfig(**{name: value})

"""The warm start: labels are the planner's, and the regression learns them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxroute
from jaxroute.errors import UserError
from jaxroute.networks import NetworkConfig, build_network
from jaxroute.policies.planning import BASE, drawn_values
from jaxroute.ppo import WarmStartConfig, make_warm_start
from jaxroute.ppo.warm_start import Labelled

NUM_ENVS = 8
CONFIG = WarmStartConfig(horizon=4, num_epochs=60, learning_rate=3e-3)


@pytest.fixture(scope="module")
def labelled():
    """The environments and the labels of two calls, with what made them."""
    env, env_params = jaxroute.make("edge3-poisson", rate=6.0)
    network = build_network(NetworkConfig(hidden=16, heads=2))
    begin, label, fit = make_warm_start(CONFIG, env, env_params, network, NUM_ENVS)
    environments = begin(jax.random.key(0))
    first = jax.tree.map(lambda leaf: leaf[0], jax.vmap(network.prepare)(environments[0]))
    params = network.init(jax.random.key(1), first)
    calls = []
    for number in range(2):
        environments, labels = label(params, environments, jax.random.key(number))
        calls.append(labels)
    return env, env_params, network, params, environments, calls, (begin, label, fit)


def test_labels_are_values_of_drawn_futures(labelled):
    env, env_params, _, _, environments, calls, _ = labelled
    # The last thing that a key is folded with is the number of steps before the label.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 16))(jax.random.split(jax.random.key(1), NUM_ENVS))
    expected = jax.jit(jax.vmap(lambda state, key: drawn_values(env, env_params, state, BASE, key, CONFIG.horizon)))(
        environments[1], keys
    )
    np.testing.assert_allclose(calls[1].values, expected, rtol=1e-4, atol=1e-5)
    assert (environments[1].step == 32).all()
    assert np.ptp(calls[1].values, axis=-1).max() > 0


def test_the_same_keys_give_the_same_labels(labelled):
    _, _, _, params, _, calls, (begin, label, _) = labelled
    again = label(params, begin(jax.random.key(0)), jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, again, calls[0])


def test_the_regression_finds_known_values(labelled):
    """Values that have nothing to do with the estimator's: the learned score has to make up for it."""
    _, _, _, params, _, calls, (_, _, fit) = labelled
    obs = jax.tree.map(lambda *leaves: jnp.concatenate([*leaves] * 128), *[labels.obs for labels in calls])
    predicted_quality = obs.candidates[..., 0]
    _, errors = fit(params, Labelled(obs, predicted_quality), jax.random.key(2))
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize(
    ("name", "value"), [("num_states", -1), ("horizon", 0), ("num_epochs", 0), ("learning_rate", float("nan"))]
)
def test_mistakes_are_named(name, value):
    with pytest.raises(UserError, match=name):
        WarmStartConfig(**{name: value})

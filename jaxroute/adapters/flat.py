"""The observation as one vector, as other libraries expect it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxroute.env import EdgeRouting, EnvParams, Observation
from jaxroute.networks.features import features_of
from jaxroute.networks.mlp import flatten

# Features are within a few units of zero on any sensible site, but a space needs bounds.
LIMIT = 10.0


def flat_observation(obs: Observation) -> Float[Array, "feature"]:
    """Return what network=mlp sees, clipped to `LIMIT`."""
    return jnp.clip(flatten(features_of(obs, use_impact=False)), -LIMIT, LIMIT)


def num_features(env: EdgeRouting, params: EnvParams) -> int:
    """Length of the flat observation."""
    return jax.eval_shape(lambda key: flat_observation(env.reset(key, params)[0]), jax.random.key(0)).shape[0]

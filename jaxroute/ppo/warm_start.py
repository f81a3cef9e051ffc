"""Warm start: what `lookahead` would value, distilled into the network before PPO (one round of expert iteration).

In states that the first policy meets, one drawn future of `horizon` decisions is played for every expert, the same for
all, with `impact_greedy` deciding from the second decision on. The differences between the experts' values are noisy
labels, and unbiased: regression on many of them averages the noise away. PPO learns of one action at a time, with the
noise of all that follows in its advantage. A logit is the value in QoS times a constant, that of the residual head at
its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.networks import INITIAL_LOG_TRUST
from jaxroute.policies.planning import BASE, drawn_values

# Steps between two labelled states of one environment, which would otherwise be nearly the same.
_STEPS_APART = 16
_BATCH = 256
# Logits per unit of QoS.
_SCALE = math.exp(INITIAL_LOG_TRUST)


@dataclass
class WarmStartConfig:
    """The warm start's settings."""

    num_states: int | None = None
    """States to label; 0 leaves the warm start out, null takes 28,160 on a CPU, 262,144 on an accelerator."""
    horizon: int = 30
    """Decisions that the drawn future of a label lasts."""
    num_epochs: int = 30
    learning_rate: float = 1e-3
    """Of the regression; it falls to zero along a cosine."""

    def __post_init__(self) -> None:
        if self.num_states is not None and self.num_states < 0:
            raise UserError(f"warm_start: num_states={self.num_states} must not be negative; 0 leaves it out")
        for name in ("horizon", "num_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"warm_start: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"warm_start: learning_rate={self.learning_rate} must be above 0, and finite")


class Labelled(NamedTuple):
    """States as the network sees them, with values of the experts; `(state, ...)`."""

    obs: Any
    values: Float[Array, "state expert"]


class WarmStart(NamedTuple):
    """The functions of the warm start."""

    begin: Callable[[PRNGKeyArray], Any]
    """Draw environments."""
    label: Callable[[Any, Any, PRNGKeyArray], tuple[Any, Labelled]]
    """`(params, environments, key)`: let time pass, and label the state of each environment."""
    fit: Callable[[Any, Labelled, PRNGKeyArray], tuple[Any, Float[Array, "epoch"]]]
    """`(params, labelled, key)`: regress, and return the parameters and the mean squared error of each epoch."""


def make_warm_start(
    config: WarmStartConfig,
    env: EdgeRouting,
    env_params: EnvParams,
    network: Any,
    num_envs: int,
    devices: Sequence[jax.Device] | None = None,
) -> WarmStart:
    """Build the warm start of a network with a residual head; environments are spread over `devices`."""
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), ("device",))
    # A label's future does not start over, whatever the environment does.
    future_env = replace(env, horizon=0)
    everywhere, spread = PartitionSpec(), PartitionSpec("device")
    on_devices = partial(jax.shard_map, mesh=mesh, check_vma=False)

    def logits_of(params: Any, obs: Any) -> Float[Array, "state expert"]:
        return jax.vmap(lambda obs: network.apply(params, obs)[0])(obs)

    @partial(on_devices, in_specs=spread, out_specs=spread)
    def reset(keys: PRNGKeyArray) -> Any:
        return jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)

    @partial(on_devices, in_specs=(everywhere, spread, spread), out_specs=(spread, spread))
    def label_share(params: Any, environments: Any, keys: PRNGKeyArray) -> tuple[Any, Labelled]:
        def step(environments: Any, number: Array) -> tuple[Any, None]:
            obs, state = environments
            of_step = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
            logits = logits_of(params, jax.vmap(network.prepare)(obs))
            action = jax.vmap(jax.random.categorical)(jax.vmap(partial(jax.random.fold_in, data=0))(of_step), logits)
            return jax.vmap(env.step, in_axes=(0, 0, 0, None))(of_step, state, action, env_params)[:2], None

        environments, _ = jax.lax.scan(step, environments, jnp.arange(_STEPS_APART))
        obs, state = environments
        values = jax.vmap(lambda state, key: drawn_values(future_env, env_params, state, BASE, key, config.horizon))(
            state, jax.vmap(partial(jax.random.fold_in, data=_STEPS_APART))(keys)
        )
        return environments, Labelled(jax.vmap(network.prepare)(obs), values)

    def loss(params: Any, labelled: Labelled) -> Float[Array, ""]:
        eligible = labelled.obs.eligible
        logits = jnp.where(eligible, logits_of(params, labelled.obs), 0.0)
        errors = _centred(logits / _SCALE, eligible) - _centred(labelled.values, eligible)
        return jnp.square(errors).sum() / jnp.maximum(eligible.sum(), 1)

    def fit(params: Any, labelled: Labelled, key: PRNGKeyArray) -> tuple[Any, Float[Array, "epoch"]]:
        num_states = labelled.values.shape[0]
        batch = min(_BATCH, num_states)
        num_batches = num_states // batch
        schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_epochs * num_batches)
        optimiser = optax.adam(schedule)

        def minibatch(carry: tuple, chosen: Array) -> tuple[tuple, Array]:
            params, state = carry
            error, gradients = jax.value_and_grad(loss)(params, jax.tree.map(lambda leaf: leaf[chosen], labelled))
            updates, state = optimiser.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), error

        def epoch(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Array]:
            order = jax.random.permutation(key, num_states)[: num_batches * batch].reshape(num_batches, batch)
            carry, errors = jax.lax.scan(minibatch, carry, order)
            return carry, errors.mean()

        keys = jax.random.split(key, config.num_epochs)
        (params, _), errors = jax.lax.scan(epoch, (params, optimiser.init(params)), keys)
        return params, errors

    return WarmStart(
        begin=jax.jit(lambda key: reset(jax.random.split(key, num_envs))),
        label=jax.jit(
            lambda params, environments, key: label_share(params, environments, jax.random.split(key, num_envs)),
            donate_argnums=1,
        ),
        fit=jax.jit(fit),
    )


def _centred(values: Float[Array, "state expert"], eligible: Array) -> Float[Array, "state expert"]:
    """Differences to the mean over the experts that would take the request; zero for the others."""
    mean = jnp.where(eligible, values, 0.0).sum(-1, keepdims=True) / jnp.maximum(eligible.sum(-1, keepdims=True), 1)
    return jnp.where(eligible, values - mean, 0.0)

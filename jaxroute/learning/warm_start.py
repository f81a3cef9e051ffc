"""Warm start: what `lookahead` would value, distilled into the network before PPO (expert iteration).

In states that the policy meets, one drawn future of `horizon` decisions is played for every expert, the same for all,
with a base policy deciding from the second decision on: `impact_greedy` in the first round, in later ones the router
as the rounds before have left it. The differences between the experts' values are noisy labels, and unbiased:
regression on many of them averages the noise away. PPO learns of one action at a time, with the noise of all that
follows in its advantage. A logit is the value in QoS times a constant, that of the residual head at its start.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.devices import compiler_options
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.networks import INITIAL_LOG_TRUST
from jaxroute.policies import Policy, learned_policy
from jaxroute.policies.planning import BASE, drawn_values
from jaxroute.policies.protocol import Memory, Params

# Steps between two labelled states of one environment, which would otherwise be nearly the same.
_STEPS_APART = 16
_BATCH = 256
# Logits per unit of QoS.
_SCALE = math.exp(INITIAL_LOG_TRUST)


@dataclass
class WarmStartConfig:
    """The warm start's settings."""

    num_states: int | None = None
    """States to label per round; 0 skips the warm start, null takes 28,160 on a CPU, 262,144 on an accelerator."""
    num_rounds: int = 2
    """Rounds of labelling. Each ends with a regression on the labels of all rounds so far."""
    horizon: int = 30
    """Length of the simulated future behind a label, in decisions."""
    num_epochs: int = 30
    """Passes over all labels in a regression."""
    learning_rate: float = 1e-3
    """Learning rate of the regression, lowered to zero along a cosine."""

    def __post_init__(self) -> None:
        if self.num_states is not None and self.num_states < 0:
            raise UserError(f"warm_start: num_states={self.num_states} must not be negative; 0 leaves it out")
        for name in ("num_rounds", "horizon", "num_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"warm_start: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"warm_start: learning_rate={self.learning_rate} must be above 0, and finite")


class Labelled(NamedTuple):
    """States as the network sees them, with values of the experts; `(state, ...)`."""

    obs: Any
    values: Float[Array, "state expert"]


class Fit(NamedTuple):
    """A regression under way."""

    params: Any
    optimiser: optax.OptState


class WarmStart(NamedTuple):
    """The functions of the warm start."""

    begin: Callable[[PRNGKeyArray], Any]
    """Draw environments."""
    label: Callable[[Any, Bool[Array, ""], Any, PRNGKeyArray], tuple[Any, Labelled]]
    """`(params, own_base, environments, key)`: let time pass, and label the state of each environment, with the network
    as the base policy, or `impact_greedy`."""
    begin_fit: Callable[[Any], Fit]
    """Start a regression from these parameters."""
    fit: Callable[[Fit, Labelled, Int[Array, ""]], tuple[Fit, Float[Array, ""]]]
    """`(regression, labelled, num_passes)`: one of so many passes, over these states in their order; returns the mean
    squared error. Devices have equal shares of the states."""


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

    @partial(on_devices, in_specs=(everywhere, everywhere, spread, spread), out_specs=(spread, spread))
    def label_share(
        params: Any, own_base: Bool[Array, ""], environments: Any, keys: PRNGKeyArray
    ) -> tuple[Any, Labelled]:
        # One program for both bases: of the two, only the one that is asked for runs.
        def act(_: Params, obs: Any, key: PRNGKeyArray, memory: Memory) -> tuple[Int[Array, ""], Memory]:
            def of_network() -> Int[Array, ""]:
                return learned_policy(network, params).act(params, obs, key, memory)[0]

            def of_rule() -> Int[Array, ""]:
                return BASE.act(BASE.params, obs, key, memory)[0]

            return jax.lax.cond(own_base, of_network, of_rule), memory

        base = Policy("base", act)

        def step(environments: Any, number: Array) -> tuple[Any, None]:
            obs, state = environments
            of_step = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
            logits = logits_of(params, jax.vmap(network.prepare)(obs))
            action = jax.vmap(jax.random.categorical)(jax.vmap(partial(jax.random.fold_in, data=0))(of_step), logits)
            return jax.vmap(env.step, in_axes=(0, 0, 0, None))(of_step, state, action, env_params)[:2], None

        environments, _ = jax.lax.scan(step, environments, jnp.arange(_STEPS_APART))
        obs, state = environments
        values = jax.vmap(
            lambda state, key: drawn_values(
                future_env, env_params, state, base, key, config.horizon, env_params.reward.accelerator_price
            )
        )(state, jax.vmap(partial(jax.random.fold_in, data=_STEPS_APART))(keys))
        return environments, Labelled(jax.vmap(network.prepare)(obs), values)

    def loss(params: Any, labelled: Labelled) -> Float[Array, ""]:
        eligible = labelled.obs.eligible
        logits = jnp.where(eligible, logits_of(params, labelled.obs), 0.0)
        errors = _centred(logits / _SCALE, eligible) - _centred(labelled.values, eligible)
        return jnp.square(errors).sum() / jnp.maximum(eligible.sum(), 1)

    @partial(on_devices, in_specs=(everywhere, spread, everywhere), out_specs=(everywhere, everywhere))
    def fit_share(fit: Fit, labelled: Labelled, num_passes: Int[Array, ""]) -> tuple[Fit, Float[Array, ""]]:
        num_batches = max(1, len(labelled.values) * mesh.size // _BATCH)

        def minibatch(fit: Fit, batch: Labelled) -> tuple[Fit, Float[Array, ""]]:
            error, gradients = jax.lax.pmean(jax.value_and_grad(loss)(fit.params, batch), "device")
            updates, optimiser = optax.scale_by_adam().update(gradients, fit.optimiser)
            progress = (optimiser.count - 1) / (num_passes * num_batches)
            rate = config.learning_rate * (1 + jnp.cos(jnp.pi * progress)) / 2
            return Fit(optax.apply_updates(fit.params, optax.tree.scale(-rate, updates)), optimiser), error

        batches = jax.tree.map(
            lambda leaf: leaf[: len(leaf) // num_batches * num_batches].reshape(num_batches, -1, *leaf.shape[1:]),
            labelled,
        )
        fit, errors = jax.lax.scan(minibatch, fit, batches)
        return fit, errors.mean()

    def begin_fit(params: Any) -> Fit:
        # Put where `fit` returns it, so that its first call is compiled as the others are.
        return jax.device_put(Fit(params, optax.scale_by_adam().init(params)), NamedSharding(mesh, everywhere))

    return WarmStart(
        begin=jax.jit(
            lambda key: reset(jax.random.split(key, num_envs)),
            compiler_options=compiler_options(mesh, runs_once=True),
        ),
        label=jax.jit(
            lambda params, own_base, environments, key: label_share(
                params, own_base, environments, jax.random.split(key, num_envs)
            ),
            donate_argnums=2,
            compiler_options=compiler_options(mesh),
        ),
        begin_fit=begin_fit,
        fit=jax.jit(fit_share, donate_argnums=0, compiler_options=compiler_options(mesh)),
    )


def _centred(values: Float[Array, "state expert"], eligible: Array) -> Float[Array, "state expert"]:
    """Differences to the mean over the experts that would take the request; zero for the others."""
    mean = jnp.where(eligible, values, 0.0).sum(-1, keepdims=True) / jnp.maximum(eligible.sum(-1, keepdims=True), 1)
    return jnp.where(eligible, values - mean, 0.0)

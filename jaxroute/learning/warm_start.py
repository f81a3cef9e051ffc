"""Warm start: the values that `lookahead` would find, distilled into the network before PPO (expert iteration).

In states that the policy meets, one future of `horizon` decisions is drawn and played once for every expert. A base
policy decides from the second decision on: `impact_greedy` in the first round, and in later ones the router as the
round before has left it. The differences between the experts' values are labels. They are noisy but unbiased, so that a
regression on many of them averages the noise away. PPO, in contrast, learns about one action at a time, and its
advantage carries the noise of everything that follows. A logit is the value in QoS times a constant, which is the scale
of the residual head at its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.devices import compiler_options
from jaxroute.env import EdgeRouting, EnvParams
from jaxroute.errors import UserError
from jaxroute.networks import INITIAL_LOG_TRUST
from jaxroute.policies import Policy, learned_policy
from jaxroute.policies.planning import base_policy, drawn_values
from jaxroute.policies.protocol import Memory, Params

# Steps between two labelled states of one environment; states closer together would be nearly the same.
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
            raise UserError(f"warm_start: num_states={self.num_states} must not be negative; 0 skips the warm start")
        for name in ("num_rounds", "horizon", "num_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"warm_start: {name}={getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"warm_start: learning_rate={self.learning_rate} must be above 0, and finite")


class Labelled(NamedTuple):
    """States as the network sees them, and the values of the actions in them; `(state, ...)`."""

    obs: Any
    values: Float[Array, "state action"]


class Regression(NamedTuple):
    """A regression in progress."""

    params: Any
    optimiser: optax.OptState


class WarmStart(NamedTuple):
    """The functions of the warm start."""

    label: Wrapped
    """`(params, own_base, environments, key) -> (environments, Labelled)`: let each environment run for a while, then
    label the state that it is in. The base policy is the network if `own_base`, else `impact_greedy`. Environments are
    pairs of prepared observations and states, `(env, ...)`, as in `PPOState`."""
    begin_fit: Wrapped
    """`params -> Regression`: start a regression from these parameters."""
    fit: Wrapped
    """`(Regression, Labelled, num_passes) -> (Regression, error)`: make one of `num_passes` passes over these states,
    in their order; returns the mean squared error. All devices have equal shares of the states."""


def make_warm_start(
    config: WarmStartConfig,
    env: EdgeRouting,
    env_params: EnvParams,
    network: Any,
    num_envs: int,
    devices: Sequence[jax.Device] | None = None,
) -> WarmStart:
    """Build the warm start of a network with a residual head; `num_envs` environments are spread over `devices`."""
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), ("device",))
    # The future of a label goes on where the environment would start over.
    future_env = replace(env, horizon=0)
    rule = base_policy(env)
    everywhere, spread = PartitionSpec(), PartitionSpec("device")
    on_devices = partial(jax.shard_map, mesh=mesh, check_vma=False)

    def logits_of(params: Any, obs: Any) -> Float[Array, "state action"]:
        return jax.vmap(lambda obs: network.apply(params, obs)[0])(obs)

    @partial(on_devices, in_specs=(everywhere, everywhere, spread, spread), out_specs=(spread, spread))
    def label_share(
        params: Any, own_base: Bool[Array, ""], environments: Any, keys: PRNGKeyArray
    ) -> tuple[Any, Labelled]:
        # One program for both bases, of which only one runs.
        def act(_: Params, obs: Any, key: PRNGKeyArray, memory: Memory) -> tuple[Int[Array, ""], Memory]:
            def of_network() -> Int[Array, ""]:
                return learned_policy(network, params).act(params, obs, key, memory)[0]

            def of_rule() -> Int[Array, ""]:
                return rule.act(rule.params, obs, key, rule.memory)[0]

            return jax.lax.cond(own_base, of_network, of_rule), memory

        base = Policy("base", act)

        def step(environments: Any, number: Array) -> tuple[Any, None]:
            obs, state = environments
            of_step = jax.vmap(partial(jax.random.fold_in, data=number))(keys)
            logits = logits_of(params, obs)
            action = jax.vmap(jax.random.categorical)(jax.vmap(partial(jax.random.fold_in, data=0))(of_step), logits)
            obs, state, *_ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(of_step, state, action, env_params)
            return (jax.vmap(network.prepare)(obs), state), None

        environments, _ = jax.lax.scan(step, environments, jnp.arange(_STEPS_APART))
        obs, state = environments
        values = jax.vmap(lambda state, key: drawn_values(future_env, env_params, state, base, key, config.horizon))(
            state, jax.vmap(partial(jax.random.fold_in, data=_STEPS_APART))(keys)
        )
        return environments, Labelled(obs, values)

    def loss(params: Any, labelled: Labelled) -> Float[Array, ""]:
        logits = logits_of(params, labelled.obs)
        eligible, num_actions = labelled.obs.eligible, logits.shape[1]
        # A network may have no score for away, the last action.
        if num_actions > eligible.shape[1]:
            eligible = jnp.column_stack([eligible, labelled.obs.may_go_away])
        values = labelled.values[:, :num_actions]
        errors = _centred(jnp.where(eligible, logits, 0.0) / _SCALE, eligible) - _centred(values, eligible)
        return jnp.square(errors).sum() / jnp.maximum(eligible.sum(), 1)

    @partial(on_devices, in_specs=(everywhere, spread, everywhere), out_specs=(everywhere, everywhere))
    def fit_share(
        fit: Regression, labelled: Labelled, num_passes: Int[Array, ""]
    ) -> tuple[Regression, Float[Array, ""]]:
        num_batches = max(1, len(labelled.values) * mesh.size // _BATCH)

        def minibatch(fit: Regression, batch: Labelled) -> tuple[Regression, Float[Array, ""]]:
            error, gradients = jax.lax.pmean(jax.value_and_grad(loss)(fit.params, batch), "device")
            updates, optimiser = optax.scale_by_adam().update(gradients, fit.optimiser)
            progress = (optimiser.count - 1) / (num_passes * num_batches)
            rate = config.learning_rate * (1 + jnp.cos(jnp.pi * progress)) / 2
            return Regression(optax.apply_updates(fit.params, optax.tree.scale(-rate, updates)), optimiser), error

        batches = jax.tree.map(
            lambda leaf: leaf[: len(leaf) // num_batches * num_batches].reshape(num_batches, -1, *leaf.shape[1:]),
            labelled,
        )
        fit, errors = jax.lax.scan(minibatch, fit, batches)
        return fit, errors.mean()

    def begin_fit(params: Any) -> Regression:
        return Regression(params, optax.scale_by_adam().init(params))

    return WarmStart(
        label=jax.jit(
            lambda params, own_base, environments, key: label_share(
                params, own_base, environments, jax.random.split(key, num_envs)
            ),
            donate_argnums=2,
            compiler_options=compiler_options(mesh),
        ),
        # Put where `fit` returns it, so that one program serves the first pass and all others.
        begin_fit=jax.jit(begin_fit, out_shardings=NamedSharding(mesh, everywhere)),
        fit=jax.jit(fit_share, donate_argnums=0, compiler_options=compiler_options(mesh)),
    )


def _centred(values: Float[Array, "state action"], eligible: Array) -> Float[Array, "state action"]:
    """Return differences to the mean over the eligible actions; zero for the others."""
    mean = jnp.where(eligible, values, 0.0).sum(-1, keepdims=True) / jnp.maximum(eligible.sum(-1, keepdims=True), 1)
    return jnp.where(eligible, values - mean, 0.0)

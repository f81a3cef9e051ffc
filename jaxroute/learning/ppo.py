"""Proximal policy optimisation, compiled end to end.

`make_ppo` returns two pure functions: `init(key)` draws parameters and environments, `update(state)` runs a number of
updates and returns metrics averaged over them. Read from top to bottom: rollout, advantages, epochs, minibatches.

Environments come in groups, for an input-driven baseline (Mao et al., 2019, arXiv 1807.02264). A rollout of all members
of a group starts in one state, and their steps share keys. As an environment's draws depend on the key alone, they meet
the same arrivals, and differ in nothing but their actions. So the group's mean advantage at a step is what the arrivals
have brought, and each member's difference to it is what its own actions have.

Each device holds an equal share of the environments, and runs what is written here on its share alone, until `average`
or `total` combines what all have found; parameters are the same everywhere. One device is the case where its share is
everything. What is drawn for an environment depends on its place among all of them, so that the result does not depend
on the number of devices, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.devices import compiler_options
from jaxroute.errors import UserError
from jaxroute.learning.gae import generalised_advantages


@dataclass
class PPOConfig:
    """PPO's settings, as written in configs/ppo."""

    num_envs: int | None = None
    """Parallel environments; null takes 256 on a CPU, 8,192 on an accelerator."""
    group_size: int = 8
    """Environments that meet the same arrivals, whose mean advantage is each one's baseline; 1 is without. It takes
    away 95 to 99 % of the advantage's variance, which is what arrivals bring."""
    num_steps: int = 32
    """Steps of each environment per update."""
    num_epochs: int = 1
    """Passes over the steps of an update."""
    num_minibatches: int = 8
    """Gradient steps per pass. Each uses all steps of its share of the environments."""
    total_steps: int | None = None
    """Total environment steps; null takes 1,572,864 on a CPU, 100,663,296 on an accelerator."""
    learning_rate: float = 1e-3
    """Learning rate of Adam, lowered linearly to zero. Without a warm start, 3e-3 learns more of overload; with
    group_size=1, 1e-4 is better after a warm start."""
    discount: float = 0.985
    """Discount factor gamma, per request."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clipping range: the ratio of new to old probabilities gains nothing beyond 1 - clip and 1 + clip."""
    entropy_bonus: float = 0.0
    """Weight of the policy's entropy in the loss."""
    value_weight: float = 0.5
    """Weight of the critic's loss in the total loss."""
    max_grad_norm: float = 0.5
    """Gradients with a larger norm are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("group_size", "num_steps", "num_epochs", "num_minibatches", "total_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"ppo: {name}={getattr(self, name)} must be at least 1")
        if self.num_envs is not None and (self.num_envs < 1 or self.num_envs % self.envs_divisor):
            raise UserError(
                f"ppo: num_envs={self.num_envs} must be a positive multiple of num_minibatches={self.num_minibatches} "
                f"and of group_size={self.group_size}"
            )
        for name in ("learning_rate", "clip", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"ppo: {name}={getattr(self, name)} must be above 0, and finite")
        for name in ("entropy_bonus", "value_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"ppo: {name}={getattr(self, name)} must not be negative, and finite")
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1 or (name == "discount" and self.discount == 1):
                raise UserError(f"ppo: {name}={getattr(self, name)} must lie in [0, 1], discount below 1")

    @property
    def envs_divisor(self) -> int:
        """The environments on each device are a multiple of this: minibatches are even, and groups are whole."""
        return math.lcm(self.num_minibatches, self.group_size)


# Totals of a rollout that an environment may report in `info`.
_COUNTS = ("qos_sum", "num_completed", "num_late", "num_lost", "rejected", "overflowed", "declined")


class Transition(NamedTuple):
    """One step of one environment; `(time, env, ...)` in a rollout."""

    obs: Any
    action: Int[Array, "..."]
    log_prob: Float[Array, "..."]
    value: Float[Array, "..."]
    next_value: Float[Array, "..."]
    reward: Float[Array, "..."]
    terminated: Bool[Array, "..."]
    truncated: Bool[Array, "..."]


class PPOState(NamedTuple):
    """Everything that training carries on: enough to resume it exactly."""

    params: Any
    optimiser: optax.OptState
    env_state: Any
    obs: Any
    key: PRNGKeyArray
    updates: Int[Array, ""]


# Environments are spread over devices, all else is on each of them.
_SHARDED, _REPLICATED = PartitionSpec("device"), PartitionSpec()
_STATE = PPOState(_REPLICATED, _REPLICATED, _SHARDED, _SHARDED, _REPLICATED, _REPLICATED)  # type: ignore[arg-type]

average = partial(jax.lax.pmean, axis_name="device")
total = partial(jax.lax.psum, axis_name="device")


def variance(values: Float[Array, "..."]) -> Float[Array, ""]:
    """Variance over all devices."""
    return average(jnp.square(values - average(values.mean())).mean())


def relative_to_group(advantages: Float[Array, "time env"], group_size: int) -> Float[Array, "time env"]:
    """Subtract the mean of each group of `group_size` neighbours at the same step; 1 subtracts nothing.

    What the others have earned does not depend on a member's action, so the mean over them is an unbiased baseline. As
    the member itself is in the group's mean, the difference is (group_size - 1) / group_size times that, everywhere.
    """
    if group_size == 1:
        return advantages
    groups = advantages.reshape(len(advantages), -1, group_size)
    return (groups - groups.mean(-1, keepdims=True)).reshape(advantages.shape)


class Learner(NamedTuple):
    """The two functions that train, compiled by `jax.jit`."""

    init: Wrapped
    """`key -> PPOState`."""
    update: Wrapped
    """`PPOState -> (PPOState, metrics)`."""
    steps_per_update: int
    num_updates: int


def make_ppo(
    config: PPOConfig,
    env: Any,
    env_params: Any,
    network: Any,
    updates_per_call: int = 1,
    many_seeds: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Learner:
    """Build the compiled loop for an environment with the gymnax 1.x protocol.

    `network.apply(params, network.prepare(obs))` gives logits and a value, in units of 1 / (1 - discount) rewards, so
    that the critic's output stays near one whatever the discount. What `prepare` returns is kept for the epochs.

    With `many_seeds`, `init` takes an array of keys, and state and metrics have a leading axis for them. `devices` are
    all that there are by default, those of other processes included.

    Raises:
        UserError: environments do not divide evenly among devices, in whole groups and minibatches.
    """
    mesh = Mesh(np.asarray(jax.devices() if devices is None else devices), ("device",))
    num_envs = config.num_envs
    assert num_envs is not None
    if num_envs % (config.envs_divisor * mesh.size):
        raise UserError(
            f"ppo: num_envs={num_envs} on {mesh.size} devices must be a multiple of "
            f"{config.envs_divisor * mesh.size}: on each device, num_minibatches={config.num_minibatches} and "
            f"group_size={config.group_size} must divide them"
        )
    num_here, num_groups = num_envs // mesh.size, num_envs // config.group_size
    assert config.total_steps is not None
    steps_per_update = num_envs * config.num_steps
    num_updates = max(1, config.total_steps // steps_per_update)
    value_scale = 1 / (1 - config.discount)
    gradient_steps = num_updates * config.num_epochs * config.num_minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, gradient_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5))

    def evaluate(params: Any, obs: Any) -> tuple[Array, Array]:
        logits, value = jax.vmap(lambda obs: network.apply(params, obs))(obs)
        return jax.nn.log_softmax(logits), value * value_scale

    def here(of_all: Array) -> Array:
        """Return this device's share of what is drawn for all environments."""
        return jax.lax.dynamic_slice_in_dim(of_all, jax.lax.axis_index("device") * num_here, num_here)

    def init(key: PRNGKeyArray) -> PPOState:
        key, key_params, key_envs = jax.random.split(key, 3)
        obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(here(jax.random.split(key_envs, num_envs)), env_params)
        obs = jax.vmap(network.prepare)(obs)
        params = network.init(key_params, jax.tree.map(lambda leaf: leaf[0], obs))
        return PPOState(params, optimiser.init(params), env_state, obs, key, jnp.int32(0))

    def of_groups(of_each: Array) -> Array:
        """Give what is drawn for a group to each of its members."""
        return jnp.repeat(of_each, config.group_size, axis=0)

    def regroup(key: PRNGKeyArray, of_envs: Any) -> Any:
        """Put all members of a group into the state of one of them, which is drawn."""
        member = here(of_groups(jax.random.randint(key, (num_groups,), 0, config.group_size)))
        first = of_groups(jnp.arange(0, num_here, config.group_size))
        return jax.tree.map(lambda leaf: leaf[first + member], of_envs)

    def rollout(state: PPOState) -> tuple[PPOState, Transition, dict[str, Array]]:
        def env_step(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, tuple]:
            env_state, obs = carry
            key_action, key_env = jax.random.split(key)
            log_probs, value = evaluate(state.params, obs)
            action = jax.vmap(jax.random.categorical)(here(jax.random.split(key_action, num_envs)), log_probs)
            log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=-1)[:, 0]
            next_obs, env_state, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                here(of_groups(jax.random.split(key_env, num_groups))), env_state, action, env_params
            )
            next_obs = jax.vmap(network.prepare)(next_obs)
            step = Transition(obs, action, log_prob, value, value, reward, terminated, truncated)
            if "final_observation" in info:
                final_obs = jax.vmap(network.prepare)(info["final_observation"])
                step = step._replace(next_value=evaluate(state.params, final_obs)[1])
            counts = {name: info[name].sum() for name in _COUNTS if name in info}
            return (env_state, next_obs), (step, counts)

        key, key_rollout = jax.random.split(state.key)
        start = state.env_state, state.obs
        if config.group_size > 1:
            # `split` uses the numbers below num_steps.
            start = regroup(jax.random.fold_in(key_rollout, config.num_steps), start)
        (env_state, obs), (steps, counts) = jax.lax.scan(
            env_step, start, jax.random.split(key_rollout, config.num_steps)
        )
        last_value = evaluate(state.params, obs)[1]
        following = jnp.concatenate([steps.value[1:], last_value[None]])
        # Where an episode was cut off, the step led to the final observation, not to the next one stored.
        steps = steps._replace(next_value=jnp.where(steps.truncated, steps.next_value, following))
        counts = {name: total(count.sum()) for name, count in counts.items()}
        return state._replace(env_state=env_state, obs=obs, key=key), steps, counts

    def loss(params: Any, batch: tuple[Transition, Array, Array]) -> tuple[Array, dict[str, Array]]:
        steps, advantages, targets = batch
        log_probs, values = evaluate(params, steps.obs)
        log_prob = jnp.take_along_axis(log_probs, steps.action[:, None], axis=-1)[:, 0]
        log_ratio = log_prob - steps.log_prob
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()
        value_loss = jnp.square((values - targets) / value_scale).mean()
        entropy = -(jnp.exp(log_probs) * jnp.maximum(log_probs, -100.0)).sum(-1).mean()
        combined = policy_loss + config.value_weight * value_loss - config.entropy_bonus * entropy
        metrics = {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "ppo/entropy": entropy,
            "ppo/approx_kl": (ratio - 1 - log_ratio).mean(),
            "ppo/clip_fraction": (jnp.abs(ratio - 1) > config.clip).mean(),
        }
        return combined, metrics

    def minibatch_step(carry: tuple[Any, optax.OptState], batch: tuple) -> tuple[tuple, dict[str, Array]]:
        params, optimiser_state = carry
        steps, advantages, targets = batch
        advantages = (advantages - average(advantages.mean())) / (jnp.sqrt(variance(advantages)) + 1e-8)
        gradients, metrics = average(jax.grad(loss, has_aux=True)(params, (steps, advantages, targets)))
        metrics["ppo/grad_norm"] = optax.tree.norm(gradients)
        updates, optimiser_state = optimiser.update(gradients, optimiser_state, params)
        return (optax.apply_updates(params, updates), optimiser_state), metrics

    def epoch(carry: tuple, key: PRNGKeyArray, data: tuple) -> tuple[tuple, dict[str, Array]]:
        # Whole environments are dealt to minibatches: they are exchangeable, and long rows gather fast. Of each
        # num_minibatches neighbours every minibatch gets one, so that each has an equal share on every device.
        draws = here(jax.random.uniform(key, (num_envs,))).reshape(-1, config.num_minibatches)
        order = jnp.arange(0, num_here, config.num_minibatches) + jnp.argsort(draws).T

        def deal(carry: tuple, chosen: Int[Array, "env"]) -> tuple[tuple, dict[str, Array]]:
            batch = jax.tree.map(lambda leaf: leaf[:, chosen].reshape(-1, *leaf.shape[2:]), data)
            return minibatch_step(carry, batch)

        return jax.lax.scan(deal, carry, order)

    def one_update(state: PPOState, _: None) -> tuple[PPOState, dict[str, Array]]:
        state, steps, counts = rollout(state)
        advantages, targets = generalised_advantages(
            steps.reward,
            steps.value,
            steps.next_value,
            steps.terminated,
            steps.truncated,
            config.discount,
            config.gae_lambda,
        )
        own_part = relative_to_group(advantages, config.group_size)
        key, key_epochs = jax.random.split(state.key)
        carry, metrics = jax.lax.scan(
            lambda carry, key: epoch(carry, key, (steps, own_part, targets)),
            (state.params, state.optimiser),
            jax.random.split(key_epochs, config.num_epochs),
        )
        metrics = {name: values.mean() for name, values in metrics.items()}
        metrics["train/reward"] = average(steps.reward.mean())
        metrics["ppo/explained_variance"] = 1 - variance(targets - steps.value) / jnp.maximum(variance(targets), 1e-8)
        if config.group_size > 1:
            metrics["ppo/variance_left"] = variance(own_part) / jnp.maximum(variance(advantages), 1e-8)
        metrics |= counts
        return state._replace(params=carry[0], optimiser=carry[1], key=key, updates=state.updates + 1), metrics

    def update(state: PPOState) -> tuple[PPOState, dict[str, Array]]:
        state, metrics = jax.lax.scan(one_update, state, length=updates_per_call)
        return state, {name: values.mean() for name, values in metrics.items()}

    # Whether a value differs between devices is not tracked: constants that loops in the environment start from do not.
    on_devices = partial(jax.shard_map, mesh=mesh, check_vma=False)
    init = on_devices(init, in_specs=_REPLICATED, out_specs=_STATE)
    update = on_devices(update, in_specs=(_STATE,), out_specs=(_STATE, _REPLICATED))
    if many_seeds:
        init, update = jax.vmap(init), jax.vmap(update)
    init = jax.jit(init, compiler_options=compiler_options(mesh, runs_once=True))
    update = jax.jit(update, donate_argnums=0, compiler_options=compiler_options(mesh))
    return Learner(init, update, steps_per_update, num_updates)

"""Paired evaluation: every policy meets the same requests at the same times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation
from jaxroute.env.types import Experts
from jaxroute.errors import UserError
from jaxroute.evaluation.metrics import LOADS, EpisodeRecords, Outcome
from jaxroute.policies import Policy
from jaxroute.policies.planning import Situation
from jaxroute.workloads.limits import Limits


def evaluate_policies(
    env: EdgeRouting,
    params: EnvParams,
    policies: Sequence[Policy],
    rates: Sequence[float],
    *,
    seed: int,
    episodes: int,
    requests: int,
    warmup: int,
    on_done: Callable[[str], None] = lambda name: None,
) -> dict[float, dict[str, EpisodeRecords]]:
    """Run every policy at every rate on the same `episodes` episodes of `warmup + requests` requests.

    Another `warmup` requests follow, which do not count but let those that do come to an end; otherwise long answers
    would drop out of the average. What is still in flight then is not counted either.

    All rates and episodes run side by side, and all rules with them. Planners and networks, whose decisions cost more
    than the environment, run one after the other; networks that share `act`, such as a study's checkpoints, are
    compiled once. `on_done` is called with each policy's name.

    Returns:
        For each rate, each policy's records. Accelerator and wall time, loads and choices count from the arrival of
        request `warmup`.

    Raises:
        UserError: a policy sends requests away, and the environment has no such action.
    """
    check_may_decline(env, policies)
    # The same keys at every rate: the same prompts come, only faster.
    keys = jnp.tile(episode_keys(seed, episodes), len(rates))
    low_high = jnp.repeat(jnp.asarray(rates, jnp.float32), episodes)
    low_high = jnp.stack([low_high, low_high], axis=1)
    rules = [policy for policy in policies if _is_light(policy)]
    groups = [rules] * bool(rules) + [[policy] for policy in policies if not _is_light(policy)]

    by_policy: dict[str, EpisodeRecords] = {}
    for group in groups:
        size = len(group)
        # Rules that differ only in their numbers are one program with several parameters.
        by_act: dict[Callable, list[Policy]] = {}
        for policy in group:
            by_act.setdefault(policy.act, []).append(policy)
        acts = list(by_act)
        which = [(acts.index(policy.act), by_act[policy.act].index(policy)) for policy in group]
        records = jax.device_get(
            _episodes(
                env,
                tuple(acts),
                tuple(alike[0].plans for alike in by_act.values()),
                warmup + requests,
                warmup,
                params,
                jnp.tile(low_high, (size, 1)),
                jnp.tile(keys, size),
                jnp.repeat(jnp.asarray(which), len(rates) * episodes, axis=0),
                tuple(_stacked([policy.params for policy in alike]) for alike in by_act.values()),
                tuple(alike[0].memory for alike in by_act.values()),
            )
        )
        for position, policy in enumerate(group):
            mine = slice(position * len(rates) * episodes, (position + 1) * len(rates) * episodes)
            by_policy[policy.name] = jax.tree.map(lambda column, mine=mine: np.asarray(column[mine]), records)
            on_done(policy.name)
    return {
        rate: {
            policy.name: jax.tree.map(
                lambda column, first=position * episodes: column[first : first + episodes], by_policy[policy.name]
            )
            for policy in policies
        }
        for position, rate in enumerate(rates)
    }


def _stacked(params: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *params)


def check_may_decline(env: EdgeRouting, policies: Sequence[Policy]) -> None:
    """Check that no policy sends requests away where that cannot be done.

    Raises:
        UserError: one does.
    """
    for policy in policies:
        if policy.declines and not env.away:
            raise UserError(
                f"policy {policy.name} sends requests away, and env.away=false rules that out; set it to true"
            )


def episode_keys(seed: int, episodes: int) -> PRNGKeyArray:
    """Return the key of each episode; the first ones are the same however many there are."""
    return jax.random.split(jax.random.key(seed), episodes)


def keys_of_episode(key: PRNGKeyArray, num_steps: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Return the key of an episode's reset and one for each of its arrivals."""
    key_reset, key_steps = jax.random.split(key)
    return key_reset, jax.random.split(key_steps, num_steps)


def keys_of_step(env: EdgeRouting, keys: PRNGKeyArray, state: EnvState) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Return the keys of the policy and of the environment at a decision; `keys` are those of the arrivals.

    A retry is a decision of its own, with the keys of the arrival that it delays: arrivals keep their keys.
    """
    key_action, key_env = jax.random.split(keys[state.step])
    if env.outages == "retried":
        key_action = jax.random.fold_in(key_action, state.request.number)
    return key_action, key_env


def _is_light(policy: Policy) -> bool:
    """Whether a policy's decision costs next to nothing: that of a rule with a few numbers as parameters at most."""
    return not policy.plans and sum(np.size(leaf) for leaf in jax.tree.leaves(policy.params)) < 10


class _Row(NamedTuple):
    """What is noted of a request, in the terms of `EpisodeRecords`; what its end decides comes first."""

    status: Any
    ttft: Any
    latency: Any
    preemptions: Any
    expert: Any
    quality: Any
    output_tokens: Any
    spent: Any
    ttft_limit: Any
    tpot_limit: Any
    e2e_limit: Any
    normalised_limit: Any


class _Episode(NamedTuple):
    """One episode under way."""

    obs: Observation
    state: EnvState
    memories: tuple[Any, ...]
    """Of every policy, of which one plays."""
    table: Float[Array, "row column"]
    """A `_Row` per request, and one more for what belongs to none."""
    busy_seconds: Float[Array, "expert"]
    kv_token_seconds: Float[Array, "expert"]
    duration: Float[Array, ""]
    load_counts: Float[Array, "expert load"]
    choice_counts: Float[Array, "expert load"]


class _Game(NamedTuple):
    """What all episodes have in common."""

    env: EdgeRouting
    params: EnvParams
    policies: tuple[Policy, ...]
    num_requests: int
    """That are noted; as many as `warmup` follow them."""
    warmup: int

    @property
    def num_steps(self) -> int:
        return self.num_requests + self.warmup


@partial(jax.jit, static_argnames=("env", "acts", "plans", "num_requests", "warmup"))
def _episodes(
    env: EdgeRouting,
    acts: tuple[Callable, ...],
    plans: tuple[int, ...],
    num_requests: int,
    warmup: int,
    params: EnvParams,
    low_high: Float[Array, "episode 2"],
    keys: PRNGKeyArray,
    which: Int[Array, "episode 2"],
    policy_params: tuple[Any, ...],
    memories: tuple[Any, ...],
) -> EpisodeRecords:
    """Run every episode to its end; `low_high` are the rates between which it is.

    `which` says which policy plays it: the number of its `act`, and which of the parameters, which have a leading axis.
    """
    names = ("",) * len(acts)
    policies = tuple(map(Policy, names, acts, policy_params, memories, plans))
    game = _Game(env, params, policies, num_requests, warmup)

    def step(keys: PRNGKeyArray, rate: Float[Array, "2"], which: Int[Array, "2"], at: _Episode) -> _Episode:
        of_rate = game._replace(params=params._replace(rate=rate))
        key_action, key_env = keys_of_step(env, keys, at.state)
        action, memories = _decide(of_rate, which, at, keys, key_action)
        obs, state, _, _, _, info = env.step(key_env, at.state, action, of_rate.params)
        after = _measure(game, at, action, info)
        return after._replace(obs=obs, state=state, memories=memories, table=_note(game, at, action, info))

    step_keys, episodes = jax.vmap(partial(_begin, game))(keys, low_high)
    episodes = jax.lax.while_loop(
        lambda episodes: (episodes.state.step < game.num_steps).any(),
        lambda episodes: jax.vmap(step)(step_keys, low_high, which, episodes),
        episodes,
    )
    limited = [name for name, limit in params.limits._asdict().items() if limit is not None]
    return _records(episodes, num_requests, limited)


def _begin(game: _Game, key: PRNGKeyArray, rate: Float[Array, "2"]) -> tuple[PRNGKeyArray, _Episode]:
    """Return the keys of an episode's arrivals, and the episode before the first one."""
    key_reset, step_keys = keys_of_episode(key, game.num_steps)
    obs, state = game.env.reset(key_reset, game.params._replace(rate=rate))
    table = jnp.zeros((game.num_requests + 1, len(_Row._fields)), jnp.float32).at[:, 0].set(Outcome.IN_FLIGHT)
    zeros = jnp.zeros(game.env.num_experts, jnp.float32)
    none = jnp.zeros((game.env.num_experts, len(LOADS)), jnp.float32)
    memories = jax.tree.map(jnp.asarray, tuple(policy.memory for policy in game.policies))
    episode = _Episode(
        obs, state, memories, table, zeros, zeros, duration=jnp.float32(0.0), load_counts=none, choice_counts=none
    )
    return step_keys, episode


def _decide(
    game: _Game, which: Int[Array, "2"], at: _Episode, keys: PRNGKeyArray, key: PRNGKeyArray
) -> tuple[Int[Array, ""], tuple[Any, ...]]:
    """Let the policy `which` choose; returns the action, and the memories of all policies."""
    number_of_act, member = which

    def of(number: int) -> Callable:
        policy = game.policies[number]

        def act(memories: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
            seen: Any = at.obs
            if policy.plans:
                ahead = jnp.minimum(at.state.step + jnp.arange(policy.plans), game.num_steps - 1)
                upcoming = jax.vmap(lambda key: jax.random.split(key)[1])(keys[ahead])
                seen = Situation(at.obs, at.state, game.params, upcoming)
            # One of several is looked up; a network has none beside it, and is not copied for each episode.
            params = jax.tree.map(lambda leaf: leaf[0 if len(leaf) == 1 else member], policy.params)
            action, memory = policy.act(params, seen, key, memories[number])
            memory = jax.tree.map(lambda new, old: new.astype(jnp.result_type(old)), memory, memories[number])
            return action.astype(jnp.int32), (*memories[:number], memory, *memories[number + 1 :])

        return act

    return jax.lax.switch(number_of_act, [of(number) for number in range(len(game.policies))], at.memories)


def _note(game: _Game, at: _Episode, action: Int[Array, ""], info: dict[str, Array]) -> Float[Array, "row column"]:
    """Return the table with the request that was routed, and with those that have ended since."""
    request, going_on, spare = at.state.request, at.state.step < game.num_steps, game.num_requests
    away = action == game.env.num_experts
    status = jnp.float32(Outcome.IN_FLIGHT)
    for name, outcome in (
        ("rejected", Outcome.REJECTED),
        ("overflowed", Outcome.OVERFLOWED),
        ("declined", Outcome.DECLINED),
    ):
        status = jnp.where(info[name], outcome, status)
    routed = _Row(
        status=status,
        ttft=jnp.nan,
        latency=jnp.nan,
        preemptions=0,
        expert=action,
        quality=jnp.where(away, 0.0, request.quality[action]),
        output_tokens=jnp.where(away, 0, request.output_tokens[action]),
        spent=0.0,
        **{f"{name}_limit": jnp.inf if limit is None else limit for name, limit in request.limits._asdict().items()},
    )
    if "cloud" in info:
        answer: Any = info["cloud"]
        by_cloud = routed._replace(
            status=Outcome.COMPLETED,
            ttft=answer.ttft,
            latency=answer.latency,
            quality=answer.quality,
            output_tokens=answer.output_tokens,
            spent=answer.spent,
        )
        routed = jax.tree.map(lambda new, old: jnp.where(answer.sent, new, old), by_cloud, routed)
    row = jnp.where(going_on, jnp.minimum(request.number, spare), spare)
    table = at.table.at[row].set(jnp.stack([jnp.float32(value) for value in routed]))
    ended, lost = info["ended"], info["lost"]
    rows = jnp.where(going_on & (ended | lost), jnp.minimum(info["request"], spare), spare)
    end = (
        jnp.where(ended, Outcome.COMPLETED, Outcome.LOST),
        jnp.where(ended, info["ttft"], jnp.nan),
        jnp.where(ended, info["latency"], jnp.nan),
        info["preemptions"],
    )
    return table.at[rows, : len(end)].set(jnp.stack(end, axis=-1).astype(jnp.float32))


def _measure(game: _Game, at: _Episode, action: Int[Array, ""], info: dict[str, Array]) -> _Episode:
    """Add up time, loads and choices, while requests count."""
    counts = (at.state.step >= game.warmup) & (at.state.step < game.num_requests)
    at_load = counts * _at_load(at.obs.experts)
    chosen = jnp.arange(game.env.num_experts) == action
    return at._replace(
        busy_seconds=at.busy_seconds + (counts * info["busy_seconds"]).astype(jnp.float32),
        kv_token_seconds=at.kv_token_seconds + (counts * info["kv_token_seconds"]).astype(jnp.float32),
        duration=at.duration + (counts * info["gap"]).astype(jnp.float32),
        load_counts=at.load_counts + at_load,
        choice_counts=at.choice_counts + at_load * chosen[:, None],
    )


def _records(episodes: _Episode, num_requests: int, limited: Sequence[str]) -> EpisodeRecords:
    """Return what happened in finished episodes, whose leading axis is episode; `limited` is what requests limit."""
    rows = _Row(*jnp.moveaxis(episodes.table[:, :num_requests], -1, 0))
    columns = rows._asdict()
    limits = {name: columns.pop(f"{name}_limit") for name in Limits._fields}
    records: dict[str, Any] = columns | {
        "limits": Limits(**{name: limits[name] for name in limited}),
        "status": rows.status.astype(jnp.int8),
        "expert": rows.expert.astype(jnp.int32),
        "output_tokens": rows.output_tokens.astype(jnp.int32),
        "preemptions": rows.preemptions.astype(jnp.int32),
        "busy_seconds": episodes.busy_seconds,
        "kv_token_seconds": episodes.kv_token_seconds,
        "duration": episodes.duration,
        "load_counts": episodes.load_counts,
        "choice_counts": episodes.choice_counts,
    }
    return EpisodeRecords(**records)


def _at_load(experts: Experts) -> Bool[Array, "expert load"]:
    """Return in which bin of `LOADS` each expert is; in none if it is down."""
    in_flight = experts.num_running + experts.num_waiting
    reached = 100 * in_flight[:, None] >= jnp.array(LOADS) * experts.max_num_seqs[:, None]
    return (reached.sum(1, keepdims=True) == 1 + jnp.arange(len(LOADS))) & experts.up[:, None]

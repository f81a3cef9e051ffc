"""A recorded log played in the environment: with the choices that were made, or with those of a policy.

Each request is a step, as always. What the environment draws otherwise is given to it: a bank of one row, the next
request, and the recorded gap. Draws of what is not known (the servers' coefficients, the lengths of answers that nobody
has seen) run side by side. Servers behave as fitted, and a policy decides on what its gateway would believe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxroute.banks.bank import RequestBank
from jaxroute.env import EdgeRouting, EnvParams, EnvState, Observation, OutageParams, RewardParams
from jaxroute.evaluation.twin.recorded import Recorded
from jaxroute.policies import Policy
from jaxroute.policies.protocol import best_available
from jaxroute.serving import Site
from jaxroute.workloads.arrivals import ArrivalParams, Pattern
from jaxroute.workloads.limits import Limits

_MULTIPLE = 256  # steps, so that logs of about the same length share a program
_FEWEST_SLOTS = 16
_DRAIN_STEPS, _LEAST_DRAIN = 32, 120.0  # steps and s after the last arrival, in which its answers end
_POLICY = -1  # in the place of a forced choice


class Contender(NamedTuple):
    """A policy to be judged."""

    name: str
    policy: Policy
    away: bool
    """Whether it may send requests away."""
    draws: bool = False
    """Whether what it chooses is drawn, and so says nothing of the shadow's choice."""


class Played(NamedTuple):
    """What came of each request; D draws, R requests, N servers."""

    choice: Int[np.ndarray, "draw request"]
    """N: nobody had it."""
    preferred: Int[np.ndarray, "draw request"]
    """What the policy would have chosen in that place, where another choice was forced."""
    ttft: Float[np.ndarray, "draw request"]
    """As the gateway sees it, s; nan where there was no answer; likewise the next."""
    latency: Float[np.ndarray, "draw request"]
    output_tokens: Int[np.ndarray, "draw request"]
    in_flight: Int[np.ndarray, "draw request"]
    """Requests at the chosen server when it came, itself left out."""
    busy_seconds: Float[np.ndarray, "draw request server"]
    """Accelerator time from its arrival to the next one's."""
    in_time: Bool[np.ndarray, "draw request"]
    qos: Float[np.ndarray, "draw request"]


class _Rows(NamedTuple):
    """Requests, and steps after them in which nothing arrives; T steps."""

    gap: Float[Any, "step"]
    """Until the next one, s."""
    prompt_tokens: Int[Any, "step"]
    quality: Float[Any, "step server"]
    predicted_tokens: Float[Any, "step server"]
    limits: Limits
    must_stay: Bool[Any, "step"]
    pace: Float[Any, "step server"]
    """How many times as long everything takes at each server."""


class _Table(NamedTuple):
    """Outcomes so far, with one spare row."""

    ttft: Float[Array, "row"]
    latency: Float[Array, "row"]


def simulate(
    recorded: Recorded,
    contender: Contender | None,
    site: Site,
    believed: Site,
    *,
    log_length_error: Float[np.ndarray, "server"],
    output_tokens: Int[np.ndarray, "draw request server"],
    pace: Float[np.ndarray, "request server"],
    forced: Int[np.ndarray, "*draw request"] | None = None,
    seed: int = 0,
) -> Played:
    """Play a log.

    Args:
        recorded: R requests.
        contender: who decides; None: whoever has decided, again.
        site: the servers as they are, (D, N) each.
        believed: the servers as the contender believes them, (N,) each.
        log_length_error: of the predicted lengths, as the contender believes it.
        output_tokens: of each server's answers.
        pace: how many times as long everything takes, by request.
        forced: what is chosen, whatever the contender would; N: nobody; -1, or None, leaves it to the contender.
        seed: of policies that draw.
    """
    if forced is None:
        forced = recorded.choice if contender is None else np.full(len(recorded.arrival), _POLICY)
    number, num_servers = len(recorded.arrival), len(recorded.servers)
    steps = -(-(number + _DRAIN_STEPS) // _MULTIPLE) * _MULTIPLE
    fill = steps - number
    drain = max(_LEAST_DRAIN, 4 * float(np.nanmax(recorded.latency, initial=0.0)))
    gaps = np.concatenate([np.diff(recorded.arrival), np.full(fill + 1, drain / _DRAIN_STEPS)])

    def filled(values: np.ndarray, value: float = 1) -> np.ndarray:
        return np.concatenate([values, np.full((fill, *values.shape[1:]), value, values.dtype)])

    rows = _Rows(
        gap=gaps.astype(np.float32),
        prompt_tokens=filled(recorded.prompt_tokens).astype(np.int32),
        quality=filled(recorded.quality).astype(np.float32),
        predicted_tokens=filled(recorded.predicted_tokens).astype(np.float32),
        limits=Limits(*(None if limit is None else filled(limit).astype(np.float32) for limit in recorded.limits)),
        must_stay=filled(~recorded.may_decline),
        pace=filled(pace).astype(np.float32),
    )
    choices = np.broadcast_to(forced, (len(output_tokens), number))
    choices = np.pad(choices, ((0, 0), (0, fill)), constant_values=num_servers).astype(np.int32)
    outputs = np.concatenate([output_tokens, np.ones((len(output_tokens), fill, num_servers), int)], axis=1)
    away = contender is not None and contender.away
    policy = contender.policy if contender is not None else _NOBODY
    rate = number / max(float(recorded.arrival[-1]), 1.0)
    most = most_in_flight(recorded)
    while True:
        slots = _power_of_two(max(most, _FEWEST_SLOTS))
        env = EdgeRouting(num_servers, slots, _recorded_gap, away=away)
        params = _params(site, rows, rate, log_length_error)
        played = _play(
            env, policy.act, policy.params, policy.memory, params, believed, rows, choices, outputs.astype(np.int32),
            jax.random.key(seed),
        )  # fmt: skip
        choice, preferred, ttft, latency, in_flight, busy, overflowed = map(np.asarray, played)
        if not overflowed.any():
            break
        most = 2 * slots
    choice, preferred, in_flight = (column[:, :number] for column in (choice, preferred, in_flight))
    ttft, latency = (column[:, :number].astype(np.float64) for column in (ttft, latency))
    last = busy[:, number:].sum(1, keepdims=True)
    busy = np.concatenate([busy[:, : number - 1], busy[:, number - 1 : number] + last], axis=1)
    place = np.minimum(choice, num_servers - 1)
    tokens = np.take_along_axis(output_tokens, place[..., None], axis=2)[..., 0]
    in_time = recorded.in_time(ttft, latency, tokens) & (choice < num_servers)
    return Played(choice, preferred, ttft, latency, tokens, in_flight, busy, in_time, recorded.qos_of(choice, in_time))


def most_in_flight(recorded: Recorded) -> int:
    """Return twice as many requests as a server has had at once."""
    servers = range(len(recorded.servers))
    return 2 * max(1, *(recorded.most_at_once(recorded.choice == server) for server in servers))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _nobody(params: Any, obs: Observation, key: PRNGKeyArray, memory: Any) -> tuple[Array, Any]:
    return jnp.int32(0), memory


_NOBODY = Policy("nobody", _nobody)


def _recorded_gap(key: PRNGKeyArray, state: Any, params: ArrivalParams) -> tuple[Array, Any]:
    """An arrival process whose next gap is given."""
    return params.shape, state


def _params(site: Site, rows: _Rows, rate: float, log_length_error: np.ndarray) -> EnvParams:
    """Return the environment's parameters; those of each step take the place of bank, limits and gap."""
    zero, nothing = jnp.float32(0.0), jnp.zeros(2)
    pattern = Pattern(*(jnp.ones(2) for _ in Pattern._fields))
    return EnvParams(
        site=site,
        bank=_bank(rows, jnp.asarray(log_length_error, jnp.float32)),
        arrivals=ArrivalParams(shape=zero, gaps=jnp.ones(1), burst_share=zero, pattern=pattern),
        rate=jnp.full(2, rate, jnp.float32),
        limits=rows.limits,
        share=jnp.ones(1),
        reward=RewardParams(nothing, jnp.ones(2), nothing, shaping=zero),
        outages=OutageParams(jnp.float32(1.0), jnp.float32(1.0)),
        refresh_interval=nothing,
        cloud=None,
        class_floor=None,
        gateways=None,
    )


def _bank(rows: _Rows, log_length_error: Array) -> RequestBank:
    # Quality is what is predicted: nobody knows what others would have answered.
    return RequestBank(
        rows.prompt_tokens, rows.quality, jnp.ones_like(rows.quality, jnp.int32), rows.quality, rows.predicted_tokens,
        log_length_error,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _play(
    env: EdgeRouting,
    act: Callable[..., Any],
    policy_params: Any,
    memory: Any,
    params: EnvParams,
    believed: Site,
    rows: _Rows,
    choices: Int[Array, "draw step"],
    outputs: Int[Array, "draw step server"],
    key: PRNGKeyArray,
) -> tuple[Array, ...]:
    num_servers, num_steps = env.num_experts, rows.gap.shape[0]

    def of_step(row: _Rows, output: Array, gap: Array, site: Site) -> EnvParams:
        """Parameters that let the environment draw this request, after this gap."""
        alone = jax.tree.map(lambda column: column[None], row)
        bank = _bank(alone, params.bank.log_length_error)._replace(output_tokens=output[None])
        arrivals = params.arrivals._replace(shape=gap * params.rate[0])
        return params._replace(site=site, bank=bank, limits=alone.limits, arrivals=arrivals)

    def one(site: Site, forced: Array, output: Array) -> tuple[Array, ...]:
        first = jax.tree.map(lambda column: column[0], rows)
        obs, state = env.reset(key, of_step(first, output[0], jnp.float32(0.0), believed))
        following = jax.tree.map(lambda column: jnp.roll(column, -1, axis=0), rows)
        table = _Table(*(jnp.full(num_steps + 1, jnp.nan, jnp.float32) for _ in _Table._fields))

        def step(carry: Any, given: Any) -> Any:
            obs, state, memory, table = carry
            number, row, choice, next_row, next_output = given
            preferred, memory = act(policy_params, obs, jax.random.fold_in(key, number), memory)
            # Where a request goes that must not be declined.
            preferred = jnp.where(
                row.must_stay & (preferred == num_servers), best_available(obs, obs.candidates.impact.net), preferred
            )
            action = jnp.where(choice == _POLICY, preferred, choice)
            now = site._replace(
                **{name: getattr(site, name) * row.pace for name in _TIMES},
            )
            told = of_step(next_row, next_output, row.gap, now)
            before: EnvState = state
            in_flight = (before.site.num_running + before.site.num_waiting)[jnp.minimum(action, num_servers - 1)]
            _, state, _, _, _, info = env.step(jax.random.fold_in(key, number), before, action, told)
            obs, state = env.believing(before, state, told._replace(site=believed))
            where = jnp.where(info["ended"], info["request"], num_steps)
            table = _Table(*(getattr(table, name).at[where].set(info[name]) for name in _Table._fields))
            turned_away = info["rejected"] | info["declined"]
            chosen = jnp.where(turned_away, num_servers, action)
            kept = chosen, preferred, in_flight, info["busy_seconds"], info["overflowed"]
            return (obs, state, memory, table), kept

        numbers = jnp.arange(num_steps)
        carry = obs, state, jax.tree.map(jnp.asarray, memory), table
        given = numbers, rows, forced, following, jnp.roll(output, -1, axis=0)
        (_, _, _, table), (chosen, preferred, in_flight, busy, overflowed) = jax.lax.scan(step, carry, given)
        return (
            chosen, preferred, table.ttft[:num_steps], table.latency[:num_steps], in_flight, busy,
            overflowed.sum(),
        )  # fmt: skip

    return jax.vmap(one)(params.site, choices, outputs)


_TIMES = ("iteration_overhead", "weight_load", "compute_per_token", "decode_per_seq", "attention_per_token")

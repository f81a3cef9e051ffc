"""Observation to network input: scaled by physical units, so that a policy moves between sites.

Token counts enter as logarithms, times relative to typical ones, loads relative to capacity; nothing is normalised
by running statistics. Every feature ends up within a few units of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxroute.env.types import Away, Experts, Observation, Recent
from jaxroute.errors import UserError
from jaxroute.serving.site import UNBOUNDED

_TYPICAL_TIME_PER_TOKEN = 0.03
_TYPICAL_RATE = 8.0
_TYPICAL_GAUGE_AGE = 3.0


class Features(NamedTuple):
    """Scaled features of one graph."""

    arrival: Float[Array, "arrival_feature"]
    experts: Float[Array, "expert expert_feature"]
    candidates: Float[Array, "expert edge_feature"]
    in_flight: Float[Array, "expert slot request_feature"]
    weight: Float[Array, "expert slot"]
    """Requests that a slot stands for."""
    running: Bool[Array, "expert slot"]
    waiting: Bool[Array, "expert slot"]
    up: Bool[Array, "expert"]
    eligible: Bool[Array, "expert"]
    expected_gain: Float[Array, "expert"]
    """Own expected QoS minus the expected QoS that others lose, and what the accelerator time costs: where the residual
    head starts from."""
    away: Float[Array, "away_feature"] | None
    """None if every request must go to an expert."""
    away_gain: Float[Array, ""] | None
    """Where the residual head of away starts from: 0 if the request would be declined."""
    may_go_away: Bool[Array, ""] | None


def _log_tokens(tokens: Array) -> Array:
    return jnp.log1p(tokens) / 8


def _saturating(tokens: Array) -> Array:
    return tokens / (tokens + 256.0)


def _log_ratio(value: Array, typical: Array | float) -> Array:
    return jnp.clip(jnp.log(jnp.maximum(value, 1e-6) / typical), -4.0, 4.0)


def features_of(obs: Observation, use_impact: bool = True, gauges: bool = False, prefixes: bool = False) -> Features:
    """Scale an observation; `use_impact=False` hides the action impact estimator (an ablation).

    `gauges` shows how old the servers' gauges are: 0 where the router sees the requests themselves. `prefixes` shows
    how much of the arriving prompt each expert has cached: 0 where the router knows of none.

    Raises:
        UserError: `obs` is something else, e.g. the flat vector of an adapter.
    """
    if not isinstance(obs, Observation):
        raise UserError(f"obs is a {type(obs).__name__}; give the Observation that reset and step return")
    arrival, experts, requests = obs.arrival, obs.experts, obs.in_flight
    impact = obs.candidates.impact
    tokens = jnp.maximum(obs.candidates.predicted_output_tokens, 1.0)
    # Of the shortest predicted answer: one number for all experts, and the normalised limit where there is no other.
    requirement = arrival.limits.per_token(tokens.min(-1))
    shown = 1.0 if use_impact else 0.0
    of_arrival = [
        _log_tokens(arrival.prompt_tokens),
        _log_ratio(requirement, _TYPICAL_TIME_PER_TOKEN),
        _log_ratio(arrival.arrival_rate, _TYPICAL_RATE),
        _log_ratio(1 / arrival.recent.slow_gap, _TYPICAL_RATE),
        shown * jnp.clip(arrival.recent.net, -4.0, 1.0),
        shown * jnp.minimum(_spread(arrival.recent), 4.0),
        jnp.minimum(10 * arrival.prices.accelerator, 4.0),
    ]
    if gauges:
        age = jnp.zeros_like(arrival.age) if obs.gauge_age is None else obs.gauge_age
        of_arrival.append(age / (age + _TYPICAL_GAUGE_AGE))
    arrival_features = jnp.stack(of_arrival, axis=-1)
    expert_features = jnp.stack(
        [
            experts.num_running / experts.max_num_seqs,
            jnp.minimum(experts.num_waiting / _usual_queue(experts), 4.0),
            experts.kv_used / experts.kv_capacity,
            _log_tokens(experts.pending_prefill),
            _log_tokens(experts.pending_output),
            experts.pending_output / experts.kv_capacity,
            _log_ratio(experts.iteration_time, _TYPICAL_TIME_PER_TOKEN),
            _log_ratio(experts.weight_load, _TYPICAL_TIME_PER_TOKEN),
            _log_ratio(experts.compute_per_token, 1e-4),
            experts.network_delay / _TYPICAL_TIME_PER_TOKEN,
            jnp.minimum(experts.recent_latency / _TYPICAL_TIME_PER_TOKEN, 4.0),
            shown * experts.expected_qos / experts.max_num_seqs,
            experts.available.astype(jnp.float32),
        ],
        axis=-1,
    )
    edges = [
        obs.candidates.predicted_quality,
        _log_tokens(obs.candidates.predicted_output_tokens),
    ]
    # Those in a batch share its time.
    batch = jnp.minimum(experts.num_running + experts.num_waiting + 1, experts.max_num_seqs)
    own_time = obs.candidates.predicted_output_tokens * impact.tpot / batch
    gain = impact.net - arrival.prices.accelerator * own_time
    if use_impact:
        edges += [
            _log_ratio(impact.ttft, 0.3),
            _log_ratio(impact.tpot, _TYPICAL_TIME_PER_TOKEN),
            _log_ratio(impact.relative_latency, 1.0),
            impact.in_time,
            impact.qos,
            jnp.minimum(impact.qos_loss, 4.0),
            jnp.minimum(impact.added_violations, 4.0),
            jnp.clip(impact.net, -4.0, 1.0),
            _log_ratio(impact.seat_seconds, 0.3),
            _log_ratio(impact.kv_seconds, 0.3),
            impact.free_seats / (impact.free_seats + experts.max_num_seqs),
            jnp.minimum(10 * arrival.prices.accelerator * own_time, 4.0),
        ]
    if prefixes:
        cached = obs.candidates.known_cached
        edges += [
            cached / jnp.maximum(arrival.prompt_tokens, 1.0)[..., None],
            _log_tokens(arrival.prompt_tokens[..., None] - cached),
        ]
    # By far the most numbers are here, so they are scaled without logarithms.
    total = jnp.maximum(requests.generated + requests.remaining_tokens, 1.0)
    limit = requests.limits.per_token(total)
    limit = jnp.where((limit > 0) & jnp.isfinite(limit), limit, 1.0)
    request_features = jnp.stack(
        [
            _saturating(requests.prompt_tokens),
            _saturating(requests.kv_tokens),
            _saturating(requests.generated),
            _saturating(requests.remaining_tokens),
            requests.predicted_quality,
            shown * requests.in_time,
            jnp.minimum(_TYPICAL_TIME_PER_TOKEN / limit, 4.0),
            # Fraction of its time that is used up.
            jnp.minimum(requests.age / (limit * total), 4.0),
        ],
        axis=-1,
    )
    return Features(
        arrival=arrival_features,
        experts=expert_features,
        candidates=jnp.stack(edges, axis=-1),
        in_flight=request_features,
        weight=requests.weight,
        running=obs.running,
        waiting=obs.waiting,
        up=experts.up,
        eligible=experts.eligible,
        expected_gain=gain,
        away=None if obs.away is None else _away_features(obs.away),
        away_gain=None if obs.away is None else obs.away.net,
        may_go_away=None if obs.away is None else obs.away.allowed,
    )


def _usual_queue(experts: Experts) -> Float[Array, "expert"]:
    """The longest queue, or, where it has no bound, a third of the seats."""
    return jnp.where(experts.max_waiting < UNBOUNDED, experts.max_waiting, experts.max_num_seqs / 3)


def _spread(recent: Recent) -> Float[Array, ""]:
    return jnp.sqrt(jnp.maximum(recent.net_square - recent.net**2, 1e-6))


def _away_features(away: Away) -> Float[Array, "away_feature"]:
    cost = jnp.minimum(away.cost, 4.0)
    return jnp.stack([away.to_cloud.astype(jnp.float32), away.predicted_quality, away.in_time, away.qos, cost], axis=-1)

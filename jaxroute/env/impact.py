"""The action impact estimator: what an action would do to the arriving request and to those in flight.

One *frozen-batch* model serves three purposes: edge features of the graph, the `impact_greedy` policy, and the
potential of the reward. It assumes that an expert's batch stays as it is (at a steady load, requests leave as
others come), that lengths are log-normal around their predictions, and that iteration times are known to within
`RATE_ERROR`. Formulas and their derivation: docs/explanation/learning.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from jaxroute.env.types import Batch, Described, Impact
from jaxroute.serving import Site, fold, running_sums

# Relative error (standard deviation) of the frozen batch's iteration time over the life of a request.
RATE_ERROR = 0.25


class Outlook(NamedTuple):
    """What the frozen-batch model predicts for each expert as it stands."""

    iteration_time: Float[Array, "expert"]
    """s, with every request there that fits into the batch."""
    pending_prefill: Float[Array, "expert"]
    """tokens."""
    pending_output: Float[Array, "expert"]
    """tokens."""
    kv_used: Float[Array, "expert"]
    expected_qos: Float[Array, "expert"]
    remaining_tokens: Float[Array, "slot expert"]
    in_time: Float[Array, "slot expert"]


class Load(NamedTuple):
    """Sums over an expert's batch that every prediction needs."""

    active: Float[Array, "slot expert"]
    num_active: Float[Array, "expert"]
    context: Float[Array, "expert"]
    num_waiting: Float[Array, "expert"]
    seats: Float[Array, "expert"]
    """Requests that could still join the batch, given its limit and the free KV memory."""
    departure_time: Float[Array, "expert"]
    """Mean time between two departures from the batch, s."""
    elapsed: Float[Array, "slot expert"]
    """Time that each request will have spent on anything but its own decode iterations, s."""


def _prefill_stall(site: Site, tokens: Array, num_seqs: Array) -> Array:
    """How much prefilling `tokens` delays a batch that decodes at the same time, s."""
    decoding = jnp.maximum(site.weight_load, site.compute_per_token * num_seqs)
    return jnp.maximum(site.compute_per_token * (tokens + num_seqs) - decoding, 0.0)


def _expected_remaining(predicted: Array, generated: Array, log_error: Array) -> Array:
    """E[n - generated | n > generated] for log-normal n with median `predicted`, at least 1."""
    so_far = jnp.maximum(generated, 1.0)
    # Four standard deviations into the tail, both probabilities vanish in float32. From there on, the mean stays in
    # proportion to what has been generated, slightly below that of a log-normal.
    predicted = jnp.maximum(predicted, so_far * jnp.exp(-4 * log_error))
    z = jnp.minimum(jnp.log(predicted / so_far) / log_error, 8.0)
    mean = predicted * jnp.exp(log_error**2 / 2) * ndtr(z + log_error) / ndtr(z)
    return jnp.maximum(mean - generated, 1.0)


def _probability_in_time(
    elapsed: Array, generated: Array, remaining: Array, per_token: Array, requirement: Array, log_error: Array
) -> tuple[Array, Array]:
    """Predicted normalised latency, and the probability that it stays within `requirement`.

    The latency per token x = (elapsed + m t) / (g + m), with m tokens to come at t seconds each, is taken as
    log-normal. Its spread follows from those of log n and log t to first order.
    """
    decode = remaining * per_token
    total = elapsed + decode
    latency = total / (generated + remaining)
    by_length = log_error * (per_token * generated - elapsed) / total
    by_rate = RATE_ERROR * decode / total
    spread = jnp.sqrt(by_length**2 + by_rate**2 + 0.02**2)
    return latency, ndtr(jnp.log(requirement / latency) / spread)


def assess(site: Site, log_error: Float[Array, "expert"], batch: Batch) -> tuple[Outlook, Load]:
    """Predict what becomes of every request in flight if no other one were sent there.

    `log_error` is the standard deviation of the log length around its prediction.
    """
    active = (batch.running | batch.waiting).astype(jnp.float32)
    remaining = _expected_remaining(jnp.maximum(batch.predicted_output_tokens, 1.0), batch.generated, log_error)
    footprint = active * (batch.prompt_tokens + batch.generated)
    num_active = active.sum(0)
    num_running = batch.running.sum(0).astype(jnp.float32)
    num_waiting = num_active - num_running
    per_request = jnp.maximum(num_active, 1.0)
    total_footprint = footprint.sum(0)
    num_seqs = jnp.minimum(num_active, site.max_num_seqs)
    context = total_footprint * num_seqs / per_request
    time = site.iteration_time(num_seqs, num_seqs, context)
    need = jnp.where(active > 0, batch.prompt_tokens + batch.generated - batch.computed, 0.0)
    # A decoding request needs one token, which belongs to the decode iteration.
    prefill = jnp.where(need > 1, need, 0.0).sum(0)
    kv_used = (active * batch.computed).sum(0)

    free_kv = site.kv_capacity - jnp.where(batch.running, footprint, 0.0).sum(0)
    seats = jnp.clip(
        jnp.minimum(site.max_num_seqs - num_running, free_kv / (jnp.maximum(total_footprint, 1.0) / per_request)), 0.0
    )
    pending_output = (active * remaining).sum(0)
    departure_time = time * pending_output / per_request / jnp.maximum(num_seqs, 1.0)
    # Queue position, first in line = 1; running requests have been served already.
    (position,) = running_sums(batch.waiting)
    wait = jnp.where(batch.waiting, jnp.maximum(position - seats, 0.0) * departure_time, 0.0)
    elapsed = batch.age + site.network_delay + wait + _prefill_stall(site, prefill, num_seqs)
    _, in_time = _probability_in_time(elapsed, batch.generated, remaining, time, _requirement(batch, active), log_error)
    outlook = Outlook(
        iteration_time=time,
        pending_prefill=prefill,
        pending_output=pending_output,
        kv_used=kv_used,
        expected_qos=fold(jnp.add, active * batch.predicted_quality * in_time),
        remaining_tokens=remaining * active,
        in_time=in_time * active,
    )
    load = Load(active, num_active, context, num_waiting, seats, departure_time, elapsed)
    return outlook, load


def estimate_impact(
    site: Site,
    log_error: Float[Array, "expert"],
    batch: Batch,
    outlook: Outlook,
    load: Load,
    request: Described,
) -> Impact:
    """Predict what routing the arriving request to each expert would do, to it and to those there.

    `outlook` and `load` are what `assess` returns for the same batch.
    """
    num_before = jnp.minimum(load.num_active, site.max_num_seqs)
    num_seqs = jnp.minimum(load.num_active + 1, site.max_num_seqs)
    mean_length = request.predicted_output_tokens * jnp.exp(log_error**2 / 2)
    # Halfway through its answer, the newcomer's context holds its prompt and half of what it will say.
    context = load.context + (num_seqs - num_before) * (request.prompt_tokens + mean_length / 2)
    slower = site.iteration_time(num_seqs, num_seqs, context)

    before = _prefill_stall(site, outlook.pending_prefill, num_before)
    after = _prefill_stall(site, outlook.pending_prefill + request.prompt_tokens, num_seqs)
    wait = jnp.maximum(load.num_waiting + 1 - load.seats, 0.0) * load.departure_time
    # On average, half an iteration is left when it comes; then follows the one that completes its prefill.
    residual = jnp.where(load.num_active > 0, outlook.iteration_time / 2, 0.0)
    ttft = request.age + site.network_delay + residual + wait + after + slower
    fixed = ttft + site.network_delay - slower
    normalised_latency, in_time = _probability_in_time(
        fixed, jnp.zeros_like(fixed), mean_length, slower, request.latency_requirement, log_error
    )

    shared = jnp.minimum(outlook.remaining_tokens, mean_length)
    delayed = load.elapsed + (after - before) + shared * (slower - outlook.iteration_time)
    _, still_in_time = _probability_in_time(
        delayed,
        batch.generated,
        jnp.maximum(outlook.remaining_tokens, 1.0),
        outlook.iteration_time,
        _requirement(batch, load.active),
        log_error,
    )
    lost = jnp.maximum(outlook.in_time - still_in_time, 0.0) * load.active
    holds = mean_length * slower
    spare = jnp.maximum(request.latency_requirement * mean_length - (fixed - wait) - holds, 0.0)
    return Impact(
        ttft=ttft,
        tpot=slower,
        normalised_latency=normalised_latency,
        in_time=in_time,
        qos=request.predicted_quality * in_time,
        qos_loss=fold(jnp.add, batch.predicted_quality * lost),
        added_violations=fold(jnp.add, lost),
        seat_seconds=holds / site.max_num_seqs,
        kv_seconds=holds * (request.prompt_tokens + mean_length / 2) / site.kv_capacity,
        free_seats=jnp.maximum(load.seats - load.num_waiting + spare / jnp.maximum(load.departure_time, 1e-3), 0.0),
    )


def _requirement(batch: Batch, active: Array) -> Array:
    """Latency requirement of each slot; any positive number where there is no request."""
    return jnp.where(active > 0, batch.latency_requirement, 1.0)

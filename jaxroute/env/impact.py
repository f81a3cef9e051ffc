"""The action impact estimator: what an action would do to the arriving request and to those in flight.

One model serves three purposes: edge features of the graph, the `impact_greedy` policy, and the potential of the
reward. It assumes that an expert's batch stays as it is (at a steady load, requests leave as others come, and the
prefill of those that come costs a batch that streams its weights next to nothing), that lengths are log-normal around
their predictions, and that memory may run out as requests grow. Formulas and their derivation:
docs/explanation/learning.md. `python -m benchmarks.reliability` compares what it says with what happens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from jaxroute.env.groups import in_line
from jaxroute.env.types import Batch, Described, Impact
from jaxroute.serving import Site, fold
from jaxroute.workloads.limits import Limits

# All constants but TTFT_ERROR are fitted by maximum likelihood to training prompts and the training mix of arrivals on
# edge6, and rounded (docs/explanation/learning.md).
# Relative error (standard deviation) of a predicted latency per token whose length and wait are known.
RATE_ERROR = 0.02
# Relative error of a predicted TTFT without a queue: where in an iteration a request comes, and what else is prefilled.
TTFT_ERROR = 0.2
# Scale of the logistic distribution of the memory that a request and those before it come to need, per KV capacity.
MEMORY_ERROR = 0.04
# Mean time that a request loses when memory runs out, per mean time that the requests there still take.
MEMORY_DELAY = 2.0


class Outlook(NamedTuple):
    """What the model predicts for each expert as it stands."""

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


class Delays(NamedTuple):
    """What may hold requests up, apart from their own iterations."""

    elapsed: Float[Array, "*request expert"]
    """Time spent so far, and that to come which is expected for certain, s."""
    wait_variance: Float[Array, "*request expert"]
    """Of the wait for a seat, s^2."""
    out_of_memory: Float[Array, "*request expert"]
    """Probability that memory runs out before the request ends."""


class Load(NamedTuple):
    """What `estimate_impact` needs to know of an expert's batch besides its outlook."""

    weight: Float[Array, "slot expert"]
    """Requests that a slot stands for."""
    num_active: Float[Array, "expert"]
    footprint: Float[Array, "expert"]
    """Tokens of all requests there, prompts and what has been generated."""
    context: Float[Array, "expert"]
    num_waiting: Float[Array, "expert"]
    departure_time: Float[Array, "expert"]
    """Mean time between two departures from the batch, s."""
    time_left: Float[Array, "expert"]
    """Mean time that a request there still takes, s."""
    delays: Delays


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


def _out_of_memory(site: Site, tokens: Array, num_before: Array) -> Array:
    """Probability that a request runs out of memory if it and the `num_before` ones before it need `tokens`."""
    # A request that is alone has all the memory.
    return jax.nn.sigmoid((tokens / site.kv_capacity - 1) / MEMORY_ERROR) * (num_before > 0)


class _Course(NamedTuple):
    """How a request is predicted to go on."""

    delays: Delays
    first_token: Array | None
    """TTFT, s; None if nothing limits it or TPOT."""
    has_token: Array | None
    """Whether the first token was there already, so that TTFT is certain."""
    generated: Array
    remaining: Array
    """Tokens to come."""
    per_token: Array
    """Time of each of them, s."""
    time_left: Array
    """Mean time that a request there still takes, s."""


def _probability_in_time(course: _Course, limits: Limits, log_error: Array) -> tuple[Limits, Array]:
    """Return the probability that each limit is kept, and that all are.

    The latency per token x = (elapsed + m t) / (g + m), with m tokens to come at t seconds each, is taken as
    log-normal, and so are TTFT, TPOT and E2E. Their spread follows from those of log n and of the wait to first order.
    If memory runs out, an exponential delay comes on top. As length and speed decide on all but TTFT together, the
    least of these probabilities counts, times that of TTFT.
    """
    delays, per_token = course.delays, course.per_token
    total = delays.elapsed + course.remaining * per_token
    tokens = course.generated + course.remaining

    def kept(limit: Array, latency: Array, spread: Array, span: Array | float) -> Array:
        """Probability for a latency that lasts `span` times as long in seconds."""
        slack = jnp.maximum((limit - latency) * span, 0.0)
        late = delays.out_of_memory * jnp.exp(-slack / (MEMORY_DELAY * course.time_left))
        return ndtr(jnp.log(limit / latency) / spread) * (1 - late)

    each = Limits()
    if limits.normalised is not None:
        by_length = log_error * (per_token * course.generated - delays.elapsed) / total
        spread = jnp.sqrt(by_length**2 + delays.wait_variance / total**2 + RATE_ERROR**2)
        each = each._replace(normalised=kept(limits.normalised, total / tokens, spread, tokens))
    if limits.e2e is not None:
        by_length = log_error * per_token * tokens / total
        spread = jnp.sqrt(by_length**2 + delays.wait_variance / total**2 + RATE_ERROR**2)
        # Of a log-normal length with this mean, half are shorter than the median, which is less.
        each = each._replace(e2e=kept(limits.e2e, total * jnp.exp(-(by_length**2) / 2), spread, 1.0))
    if course.first_token is not None:
        first, has_token = course.first_token, course.has_token
        assert has_token is not None
        if limits.tpot is not None:
            further = jnp.maximum(tokens - 1, 1.0)
            tpot = jnp.maximum(total - first, 1e-6) / further
            each = each._replace(tpot=kept(limits.tpot, tpot, jnp.full_like(tpot, RATE_ERROR), further))
        if limits.ttft is not None:
            spread = jnp.sqrt(delays.wait_variance / first**2 + TTFT_ERROR**2)
            in_time = ndtr(jnp.log(limits.ttft / first) / spread)
            each = each._replace(ttft=jnp.where(has_token, first <= limits.ttft, in_time))
    together = [probability for probability in each[1:] if probability is not None] or [jnp.ones_like(total)]
    in_time = together[0]
    for probability in together[1:]:
        in_time = jnp.minimum(in_time, probability)
    return each, in_time if each.ttft is None else in_time * each.ttft


def assess(site: Site, log_error: Float[Array, "expert"], batch: Batch) -> tuple[Outlook, Load]:
    """Predict what becomes of every request in flight if no other one were sent there.

    `log_error` is the standard deviation of the log length around its prediction.
    """
    active = (batch.running | batch.waiting).astype(jnp.float32)
    weight, size, rank, size_so_far = in_line(batch)
    remaining = _expected_remaining(jnp.maximum(batch.predicted_output_tokens, 1.0), batch.generated, log_error)
    num_active = weight.sum(0)
    num_waiting = num_active - (weight * batch.running).sum(0)
    per_request = jnp.maximum(num_active, 1.0)
    footprint = size.sum(0)
    num_seqs = jnp.minimum(num_active, site.max_num_seqs)
    context = footprint * num_seqs / per_request
    time = site.iteration_time(num_seqs, num_seqs, context)
    need = jnp.where(active > 0, batch.prompt_tokens + batch.generated - batch.computed, 0.0)
    # A decoding request needs one token, which belongs to the decode iteration. Means over several are rounded.
    prefill = (weight * jnp.where(need > 1.5, need, 0.0)).sum(0)
    kv_used = (weight * jnp.where(batch.running, batch.computed, 0.0)).sum(0)

    pending_output = (weight * remaining).sum(0)
    time_left = time * jnp.maximum(pending_output, 1.0) / per_request
    departure_time = time_left / jnp.maximum(num_seqs, 1.0)
    # So many must leave before it has a seat; the times between their departures are taken as exponential.
    behind = jnp.maximum(rank - site.max_num_seqs, 0.0)
    delays = Delays(
        elapsed=batch.age + site.network_delay + behind * departure_time + _prefill_stall(site, prefill, num_seqs),
        wait_variance=behind * departure_time**2,
        out_of_memory=_out_of_memory(site, size_so_far + remaining, rank - 1),
    )
    course = _course(batch, delays, remaining, time, time_left)
    _, in_time = _probability_in_time(course, _limits(batch, active), log_error)
    outlook = Outlook(
        iteration_time=time,
        pending_prefill=prefill,
        pending_output=pending_output,
        kv_used=kv_used,
        expected_qos=fold(jnp.add, weight * batch.predicted_quality * in_time),
        remaining_tokens=remaining * active,
        in_time=in_time * active,
    )
    load = Load(weight, num_active, footprint, context, num_waiting, departure_time, time_left, delays)
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
    # What is cached is not computed.
    cached = 0.0 if request.cached_tokens is None else request.cached_tokens
    after = _prefill_stall(site, outlook.pending_prefill + request.prompt_tokens - cached, num_seqs)
    behind = jnp.maximum(load.num_active + 1 - site.max_num_seqs, 0.0)
    # On average, half an iteration is left when it comes; then follows the one that completes its prefill.
    residual = jnp.where(load.num_active > 0, outlook.iteration_time / 2, 0.0)
    wait = behind * load.departure_time
    ttft = request.age + site.network_delay + residual + wait + after + slower
    at_first = load.footprint + request.prompt_tokens
    delays = Delays(
        elapsed=ttft + site.network_delay - slower,
        wait_variance=behind * load.departure_time**2,
        out_of_memory=_out_of_memory(site, at_first + mean_length, load.num_active),
    )
    first_token = None if batch.first_token is None else ttft + site.network_delay
    has_token = None if batch.first_token is None else jnp.zeros_like(ttft, bool)
    each, in_time = _probability_in_time(
        _Course(delays, first_token, has_token, jnp.zeros_like(ttft), mean_length, slower, load.time_left),
        request.limits,
        log_error,
    )
    # Without memory for its prompt, it waits for its first token until the others have left, on average.
    before_first = _out_of_memory(site, at_first, load.num_active) * load.time_left
    lost_time = delays.out_of_memory * MEMORY_DELAY * load.time_left

    # The others keep their memory: the latest to come is the first to lose its own.
    shared = jnp.minimum(outlook.remaining_tokens, mean_length)
    slowed = (after - before) + shared * (slower - outlook.iteration_time)
    _, still_in_time = _probability_in_time(
        _course(
            batch,
            load.delays._replace(elapsed=load.delays.elapsed + slowed),
            jnp.maximum(outlook.remaining_tokens, 1.0),
            outlook.iteration_time,
            load.time_left,
        ),
        _limits(batch, load.weight),
        log_error,
    )
    lost = jnp.maximum(outlook.in_time - still_in_time, 0.0) * load.weight
    holds = mean_length * slower
    allowed = jnp.minimum(request.limits.per_token(mean_length), 1e3) * mean_length
    spare = jnp.maximum(allowed - (delays.elapsed - wait) - holds, 0.0)
    latency = delays.elapsed + mean_length * slower + lost_time
    predicted = Limits(
        ttft=ttft + before_first,
        tpot=slower + (lost_time - before_first) / mean_length,
        e2e=latency,
        normalised=latency / mean_length,
    )
    one = jnp.ones_like(num_seqs)
    size = jnp.maximum(load.footprint, 1.0) / jnp.maximum(load.num_active, 1.0)
    seats = jnp.minimum(site.max_num_seqs - load.num_active, (site.kv_capacity - load.footprint) / size)
    return Impact(
        ttft=predicted.ttft,
        tpot=predicted.tpot,
        tpot_alone=site.iteration_time(one, one, request.prompt_tokens + mean_length / 2),
        normalised_latency=predicted.normalised,
        # Back at the router, which is where limits hold.
        relative_latency=request.limits.relative(predicted._replace(ttft=predicted.ttft + site.network_delay)),
        in_time=in_time,
        in_time_each=each,
        qos=request.predicted_quality * in_time,
        qos_loss=fold(jnp.add, batch.predicted_quality * lost),
        added_violations=fold(jnp.add, lost),
        seat_seconds=holds / site.max_num_seqs,
        kv_seconds=holds * (request.prompt_tokens + mean_length / 2) / site.kv_capacity,
        free_seats=jnp.maximum(seats + spare / jnp.maximum(load.departure_time, 1e-3), 0.0),
    )


def _course(batch: Batch, delays: Delays, remaining: Array, per_token: Array, time_left: Array) -> _Course:
    first_token, has_token = batch.first_token, None
    if first_token is not None:
        # Until there is a first token, it is predicted.
        has_token = batch.generated > 0
        first_token = jnp.where(has_token, first_token, delays.elapsed + per_token)
    return _Course(delays, first_token, has_token, batch.generated, remaining, per_token, time_left)


def _limits(batch: Batch, weight: Array) -> Limits:
    """Limits of each slot; any positive number where there is no request."""
    return jax.tree.map(lambda limit: jnp.where(weight > 0, limit, 1.0), batch.limits)

"""Continuous batching with event skipping: what happens at the experts between two arrivals.

Semantics: docs/semantics.md (iteration-level scheduling, chunked prefill, KV memory, preemption by
recompute, as vLLM V1 does them). Nothing steps token by token: while every running request decodes and
nobody can be admitted, any number of iterations is applied in closed form.

Two choices keep this small. *One ordered list per expert*: its slots hold the running requests in order of
admission, then the waiting ones in queue order, so that admission and preemption only move the border
between them (`num_admitted`), and one pass over the slots applies an iteration and schedules the next. Requests
that end leave holes; `enqueue` closes one when it needs room. *Times are relative to now*: `advance` ends by shifting
them, so float32 stays exact in an endless run.

Slots are the leading axis; the axes behind it (`*lanes`: experts, and environments when batched) are
independent of each other. So scalars of a lane broadcast, and reductions over slots are sums of long vectors.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxroute.serving.site import Site

# Finite, so that no product with it is NaN, and above every time that can be asked for.
_NEVER = 1e30
_MANY = 2**20


class SlotStatus(IntEnum):
    """What a slot holds."""

    EMPTY = 0
    ACTIVE = 1
    """A request that runs or waits."""
    ENDED = 2
    """A request that completed during the latest `advance`; its outcome is still readable."""


class Slots(NamedTuple):
    """The requests at each expert, in the order described above."""

    request: Int[Array, "slot *lanes"]
    """The caller's number for the request."""
    prompt_tokens: Int[Array, "slot *lanes"]
    output_tokens: Int[Array, "slot *lanes"]
    ready: Float[Array, "slot *lanes"]
    """When it reaches the expert (arrival + network delay), s from now."""
    status: Int8[Array, "slot *lanes"]
    computed: Int[Array, "slot *lanes"]
    """Tokens whose KV is held."""
    generated: Int[Array, "slot *lanes"]
    """Output tokens so far."""
    scheduled: Int[Array, "slot *lanes"]
    """Tokens that the iteration in progress computes."""
    preemptions: Int[Array, "slot *lanes"]
    ttft: Float[Array, "slot *lanes"]
    """First token, s after arrival, as seen at the expert."""
    latency: Float[Array, "slot *lanes"]
    """Last token, s after arrival, as seen at the expert."""


class SiteState(NamedTuple):
    """All that the experts remember between two arrivals."""

    slots: Slots
    num_admitted: Int[Array, "*lanes"]
    """Active slots before this position run, the others wait."""
    clock: Float[Array, "*lanes"]
    """Start of the iteration in progress, or the boundary at which the next is scheduled, s from now."""
    head_ready: Float[Array, "*lanes"]
    """When the head of the waiting queue is (or was) ready, s from now; `_NEVER` if nobody waits."""
    duration: Float[Array, "*lanes"]
    """Time of the iteration in progress, s; `_NEVER` if there is none."""
    growth: Float[Array, "*lanes"]
    """By how much each further decode iteration takes longer, s."""
    max_iterations: Int[Array, "*lanes"]
    """Iterations like this one until a request ends or KV memory runs out."""
    num_running: Int[Array, "*lanes"]
    kv_held: Int[Array, "*lanes"]
    """KV tokens held at the end of the iteration in progress."""
    busy_seconds: Float[Array, "*lanes"]
    """Time spent in iterations during the latest `advance`, s."""
    kv_token_seconds: Float[Array, "*lanes"]
    """KV tokens held, integrated over that time."""


class Placement(NamedTuple):
    """Where `enqueue` put a request."""

    moved: Bool[Array, "slot *lanes"]
    """Slots whose content came from the slot behind, to close a hole."""
    taken: Bool[Array, "slot *lanes"]
    """The slot that holds the new request."""

    def put(self, table: Array, value: Array | float) -> Array:
        """Move `table`'s entries as the slots moved, and enter the new request's value."""
        closed = jnp.where(self.moved, jnp.roll(table, -1, axis=0), table)
        return jnp.where(self.taken, value, closed).astype(table.dtype)


def idle_site(num_experts: int, num_slots: int) -> SiteState:
    """Return a site at which nothing has arrived yet."""
    ints = jnp.zeros((num_slots, num_experts), jnp.int32)
    floats = jnp.zeros((num_slots, num_experts), jnp.float32)
    slots = Slots(
        request=ints - 1,
        prompt_tokens=ints,
        output_tokens=ints,
        ready=floats,
        status=ints.astype(jnp.int8),
        computed=ints,
        generated=ints,
        scheduled=ints,
        preemptions=ints,
        ttft=floats,
        latency=floats,
    )
    count = jnp.zeros(num_experts, jnp.int32)
    time = jnp.zeros(num_experts, jnp.float32)
    return SiteState(
        slots=slots,
        num_admitted=count,
        clock=time,
        head_ready=time + _NEVER,
        duration=time + _NEVER,
        growth=time,
        max_iterations=count,
        num_running=count,
        kv_held=count,
        busy_seconds=time,
        kv_token_seconds=time,
    )


def running_and_waiting(state: SiteState) -> tuple[Bool[Array, "slot *lanes"], Bool[Array, "slot *lanes"]]:
    """Return which slots hold a running and which a waiting request."""
    active = state.slots.status == SlotStatus.ACTIVE
    admitted = _positions(active) < state.num_admitted
    return active & admitted, active & ~admitted


def num_waiting(state: SiteState) -> Int[Array, "*lanes"]:
    """Length of each waiting queue; preempted requests and those still on the network count."""
    return running_and_waiting(state)[1].sum(0)


def can_accept(
    site: Site, state: SiteState, prompt_tokens: Int[Array, "*lanes"], output_tokens: Int[Array, "*lanes"]
) -> Bool[Array, "*lanes"]:
    """Whether each expert would take a request of this size now, rather than reject it."""
    fits = prompt_tokens + output_tokens <= site.kv_capacity
    return fits & (num_waiting(state) < site.max_waiting)


def enqueue(
    site: Site,
    state: SiteState,
    chosen: Bool[Array, "*lanes"],
    request: Int[Array, ""],
    prompt_tokens: Int[Array, "*lanes"],
    output_tokens: Int[Array, "*lanes"],
) -> tuple[SiteState, Placement]:
    """Put one request, arriving now, at the end of the chosen experts' queues (at most one; none if rejected).

    Returns:
        The new state, and the placement, with which a caller keeps a table of its own beside the slots.
    """
    slots = state.slots
    position = _positions(slots.status)
    active = slots.status == SlotStatus.ACTIVE
    num_slots = position.shape[0]
    tail = jnp.where(active, position + 1, 0).max(0)
    hole = jnp.where(active, num_slots, position).min(0)
    close = chosen & (tail == num_slots)
    moved = close & (position >= hole)
    tail = tail - close
    taken = chosen & (position == tail)

    placement = Placement(moved, taken)

    slots = Slots(
        request=placement.put(slots.request, request),
        prompt_tokens=placement.put(slots.prompt_tokens, prompt_tokens),
        output_tokens=placement.put(slots.output_tokens, output_tokens),
        ready=placement.put(slots.ready, jnp.broadcast_to(site.network_delay, chosen.shape)),
        status=placement.put(slots.status, SlotStatus.ACTIVE),
        computed=placement.put(slots.computed, 0),
        generated=placement.put(slots.generated, 0),
        scheduled=placement.put(slots.scheduled, 0),
        preemptions=placement.put(slots.preemptions, 0),
        ttft=placement.put(slots.ttft, 0.0),
        latency=placement.put(slots.latency, 0.0),
    )
    num_admitted = state.num_admitted - (close & (hole < state.num_admitted))
    state = state._replace(
        slots=slots,
        # Holes at the end of the batch are given up, or the new request would seem admitted.
        num_admitted=jnp.where(chosen, jnp.minimum(num_admitted, tail), num_admitted),
        head_ready=jnp.where(chosen, jnp.minimum(state.head_ready, site.network_delay), state.head_ready),
    )
    return state, placement


def with_output_tokens(site: Site, state: SiteState, output_tokens: Int[Array, "slot *lanes"]) -> SiteState:
    """Return the state as if these were the true lengths, each beyond what has been generated; for planners."""
    slots = state.slots
    decoding = (slots.status == SlotStatus.ACTIVE) & (slots.scheduled > 0)
    to_completion = jnp.where(decoding, output_tokens - slots.generated, _MANY).min(0)
    to_full = 1 + (site.kv_capacity - state.kv_held) // jnp.maximum(state.num_running, 1)
    # 1 stays 1: it may mean that the next iteration is not like this one, and costs nothing but another look.
    repeats = jnp.where(state.max_iterations > 1, jnp.clip(to_full, 1, to_completion), state.max_iterations)
    return state._replace(slots=slots._replace(output_tokens=output_tokens), max_iterations=repeats)


def advance(site: Site, state: SiteState, gap: Float[Array, ""]) -> SiteState:
    """Let `gap` seconds pass at every expert.

    Afterwards each expert has applied exactly the iterations that ended at or before the new now, and the
    schedule of the iteration that began before it is fixed. Requests that completed are marked
    `SlotStatus.ENDED` with `ttft` and `latency` set.
    """
    return _advance(site, state, jnp.broadcast_to(gap, state.clock.shape))


# A while_loop under vmap selects old or new for every lane and every array in each round. `_round` leaves a lane
# that has nothing left to do as it is, so batching by hand, with the new axis as the innermost lane, gives the
# same result without those selections.
@custom_vmap
def _advance(site: Site, state: SiteState, until: Float[Array, "*lanes"]) -> SiteState:
    slots = state.slots
    ended = slots.status == SlotStatus.ENDED
    state = state._replace(
        slots=slots._replace(status=jnp.where(ended, SlotStatus.EMPTY, slots.status).astype(jnp.int8)),
        busy_seconds=jnp.zeros_like(state.busy_seconds),
        kv_token_seconds=jnp.zeros_like(state.kv_token_seconds),
    )
    state = jax.lax.while_loop(
        # The same comparison as in `_iterations_within`: rounded otherwise, a lane could ask for rounds for ever.
        lambda state: jnp.any((state.duration <= until - state.clock) | (_next_start(state) < until)),
        lambda state: _round(site, state, until),
        state,
    )
    slots = state.slots
    return state._replace(
        clock=state.clock - until,
        head_ready=jnp.where(state.head_ready < _NEVER, state.head_ready - until, _NEVER),
        slots=slots._replace(ready=slots.ready - until),
    )


@_advance.def_vmap
def _advance_batched(axis_size: int, in_batched: tuple, site: Site, state: SiteState, until: Array) -> tuple:
    def innermost(leaf: Array, batched: bool) -> Array:
        return jnp.moveaxis(leaf, 0, -1) if batched else jnp.broadcast_to(leaf[..., None], (*leaf.shape, axis_size))

    site_batched, state_batched, until_batched = in_batched
    new = _advance(
        # Where no environment has a site of its own, a last axis of one broadcasts.
        jax.tree.map(
            lambda leaf, batched: jnp.moveaxis(leaf, 0, -1) if batched else leaf[..., None],
            site,
            site_batched,
        ),
        jax.tree.map(innermost, state, state_batched),
        innermost(until, until_batched),
    )
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), new), jax.tree.map(lambda _: True, new)


def _next_start(state: SiteState) -> Float[Array, "*lanes"]:
    """When an expert without an iteration in progress starts the next one, s from now."""
    start = jnp.where(state.num_running > 0, state.clock, jnp.maximum(state.clock, state.head_ready))
    return jnp.where(state.duration == _NEVER, start, _NEVER)


class _Pass(NamedTuple):
    """What `_round` knows of an expert while it goes through the slots in order."""

    position: Int[Array, ""]
    tokens_left: Int[Array, "*lanes"]
    kv_held: Int[Array, "*lanes"]
    num_tokens: Int[Array, "*lanes"]
    num_running: Int[Array, "*lanes"]
    num_decoding: Int[Array, "*lanes"]
    num_admitted: Int[Array, "*lanes"]
    context: Int[Array, "*lanes"]
    to_completion: Int[Array, "*lanes"]
    head_ready: Float[Array, "*lanes"]
    preempted: Bool[Array, "*lanes"]
    turned_away: Bool[Array, "*lanes"]


def _round(site: Site, state: SiteState, until: Float[Array, "*lanes"]) -> SiteState:
    """Apply the iteration in progress, with those like it that follow, up to the next event; schedule the next.

    Does nothing to a lane whose next event lies after `until`.
    """
    # Iterations to apply. Once the head of the queue is ready it may be admitted at the next boundary. A head that
    # was ready when this iteration began was turned away for lack of memory, tokens or seats, and none of these grows.
    k = jnp.minimum(state.max_iterations, _iterations_within(until - state.clock, state.duration, state.growth))
    until_ready = state.head_ready - state.clock
    k_ready = _iterations_within(until_ready, state.duration, state.growth)
    k_ready += _elapsed(k_ready, state.duration, state.growth) < until_ready
    blocked = (until_ready <= 0) | (state.num_running >= site.max_num_seqs)
    k = jnp.where(blocked, k, jnp.minimum(k, jnp.maximum(k_ready, 1)))
    done = k > 0
    elapsed = jnp.where(done, _elapsed(k, state.duration, state.growth), 0.0)
    starts = _next_start(state)
    clock = jnp.where(starts < until, starts, state.clock + elapsed)
    schedules = (done | (starts < until)) & (clock < until)
    seen_at = clock + site.network_delay

    def visit(at: _Pass, slot: Slots) -> tuple[_Pass, Slots]:
        # The iterations end: tokens are computed, and whoever reached its target emits one.
        worked = done & (slot.scheduled > 0)
        emitted = worked & (slot.scheduled == slot.prompt_tokens + slot.generated - slot.computed)
        computed = slot.computed + jnp.where(worked, slot.scheduled * k, 0)
        generated = slot.generated + jnp.where(emitted, k, 0)
        finished = emitted & (generated >= slot.output_tokens)
        since_arrival = seen_at - slot.ready
        ttft = jnp.where(emitted & (slot.generated == 0), since_arrival, slot.ttft)
        latency = jnp.where(finished, since_arrival, slot.latency)
        active = (slot.status == SlotStatus.ACTIVE) & ~finished

        # The next one is scheduled: running requests first, in order of admission, then the queue. Slots are in
        # this order, so what the running ones leave is what the waiting ones see.
        admitted = at.position < state.num_admitted
        running, waiting = active & admitted, active & ~admitted
        need = slot.prompt_tokens + generated - computed
        tokens = jnp.clip(at.tokens_left, 0, need)
        fits = at.kv_held + computed + tokens <= site.kv_capacity
        keep = running & ~at.preempted & (fits | (at.num_running == 0))
        preempt = running & ~keep
        welcome = fits & (tokens > 0) & (at.num_running < site.max_num_seqs) & (slot.ready <= clock)
        admit = waiting & welcome & ~at.turned_away & ~at.preempted
        runs = keep | admit
        tokens = jnp.where(runs, tokens, 0)
        decoding = runs & (tokens == 1) & (need == 1) & (computed >= slot.prompt_tokens)
        waits = active & ~runs
        at = _Pass(
            position=at.position + 1,
            tokens_left=at.tokens_left - tokens,
            kv_held=at.kv_held + jnp.where(runs, computed + tokens, 0),
            num_tokens=at.num_tokens + tokens,
            num_running=at.num_running + runs,
            num_decoding=at.num_decoding + decoding,
            num_admitted=jnp.where(runs, at.position + 1, at.num_admitted),
            context=at.context + jnp.where(decoding, computed + 1, 0),
            to_completion=jnp.where(
                decoding, jnp.minimum(at.to_completion, slot.output_tokens - generated), at.to_completion
            ),
            head_ready=jnp.where(waits, jnp.minimum(at.head_ready, slot.ready), at.head_ready),
            preempted=at.preempted | preempt,
            turned_away=at.turned_away | (waiting & ~admit),
        )
        evict = schedules & preempt
        slot = slot._replace(
            status=jnp.where(finished, SlotStatus.ENDED, slot.status).astype(jnp.int8),
            computed=jnp.where(evict, 0, computed),
            generated=generated,
            scheduled=jnp.where(schedules, tokens, jnp.where(done, 0, slot.scheduled)),
            preemptions=slot.preemptions + evict,
            ttft=ttft,
            latency=latency,
        )
        return at, slot

    zero = jnp.zeros_like(state.num_admitted)
    at = _Pass(
        position=jnp.int32(0),
        tokens_left=zero + site.max_num_batched_tokens,
        kv_held=zero,
        num_tokens=zero,
        num_running=zero,
        num_decoding=zero,
        num_admitted=zero,
        context=zero,
        to_completion=zero + _MANY,
        head_ready=jnp.full_like(state.clock, _NEVER),
        preempted=zero > 0,
        turned_away=zero > 0,
    )
    at, slots = jax.lax.scan(visit, at, state.slots)

    duration = (
        site.iteration_overhead
        + jnp.maximum(site.weight_load, site.compute_per_token * at.num_tokens)
        + site.decode_per_seq * at.num_decoding
        + site.attention_per_token * at.context
    )
    duration = jnp.where(at.num_running > 0, duration, _NEVER)
    to_full = 1 + (site.kv_capacity - at.kv_held) // jnp.maximum(at.num_decoding, 1)
    steady = (at.num_decoding == at.num_running) & ~at.preempted
    max_iterations = jnp.where(steady, jnp.clip(to_full, 1, at.to_completion), 1)
    # Sum over i < k of (duration + growth i) (held + batch i): KV grows by one token per sequence and iteration.
    batch = jnp.where(state.max_iterations > 1, state.num_running, 0).astype(jnp.float32)
    i = k.astype(jnp.float32)
    sum_1, sum_2 = i * (i - 1) / 2, (i - 1) * i * (2 * i - 1) / 6
    held = state.kv_held.astype(jnp.float32)
    kv_token_seconds = held * elapsed + batch * (state.duration * sum_1 + state.growth * sum_2)
    return SiteState(
        slots=slots,
        num_admitted=jnp.where(schedules, at.num_admitted, state.num_admitted),
        clock=clock,
        head_ready=jnp.where(schedules, at.head_ready, state.head_ready),
        duration=jnp.where(schedules, duration, jnp.where(done, _NEVER, state.duration)),
        growth=jnp.where(schedules, site.attention_per_token * at.num_decoding, state.growth),
        max_iterations=jnp.where(schedules, max_iterations, state.max_iterations),
        num_running=jnp.where(schedules | done, at.num_running, state.num_running),
        kv_held=jnp.where(schedules, at.kv_held, state.kv_held),
        busy_seconds=state.busy_seconds + elapsed,
        kv_token_seconds=state.kv_token_seconds + jnp.where(done, kv_token_seconds, 0.0),
    )


def _elapsed(k: Int[Array, "*lanes"], duration: Float[Array, "*lanes"], growth: Float[Array, "*lanes"]) -> Array:
    """Time of k iterations, the first of which takes `duration` and each next one `growth` more."""
    i = k.astype(jnp.float32)
    return i * duration + growth * (i * (i - 1) / 2)


def _iterations_within(
    time: Float[Array, "*lanes"], duration: Float[Array, "*lanes"], growth: Float[Array, "*lanes"]
) -> Int[Array, "*lanes"]:
    """The most iterations that end within `time`: the root of _elapsed(k) = time, rounded down."""
    time = jnp.clip(time, 0.0, 1e6)
    linear = duration - growth / 2
    # duration >= 2 growth, so linear is positive. Its square would overflow where there is no iteration.
    ratio = time / linear
    root = 2 * ratio / (1 + jnp.sqrt(1 + 2 * growth / linear * ratio))
    k = jnp.minimum(root, _MANY).astype(jnp.int32)
    # The root is rounded; the comparison that defines the result is not.
    k += _elapsed(k + 1, duration, growth) <= time
    k -= (_elapsed(k, duration, growth) > time) & (k > 0)
    return k


def _positions(like: Int[Array, "slot *lanes"]) -> Int[Array, "slot *ones"]:
    return jnp.arange(like.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (like.ndim - 1))

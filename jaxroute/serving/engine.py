"""Continuous batching with event skipping: what happens at the experts between two arrivals.

Semantics: docs/reference/semantics.md (iteration-level scheduling, chunked prefill, KV memory, preemption by
recompute, as vLLM V1 does them). Nothing steps token by token: while every running request decodes and
no request can be admitted, any number of iterations is applied in closed form.

Two choices keep this small. *One ordered list per expert*: its slots hold the running requests in order of
admission, then the waiting ones in queue order, so that admission and preemption only move the border
between them (`num_admitted`), and sums over the slots before one give what is left for it. Requests that end leave
holes; `enqueue` closes one when it needs room. *Times are relative to now*: `advance` ends by shifting them, so float32
stays exact in an endless run.

Most experts just keep decoding from one arrival to the next, which is one formula (`_decode_until`). The few whose
schedule changes before that are gathered and taken from event to event until none has another (`_next_event`).

Slots are the leading axis; the axes behind it (`*lanes`: experts, and environments when batched) are
independent of each other. So scalars of a lane broadcast, and reductions over slots are sums of long vectors.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxroute.serving.lanes import computed_once, fold, lanes_last, positions, running_sums
from jaxroute.serving.site import Site

# Finite, so that no product with it is NaN, and later than any time that can occur.
_NEVER = 1e30
_MANY = 2**20

# On a busy site, about a quarter of the lanes has an event, and 2 % have more than two. So it pays to gather a third of
# the lanes at first, and then an eighth of those; below `_FEW_LANES` lanes it does not.
_FEWER = (3, 8)
_FEW_LANES = 64
_CHANGED_BY_EVENTS = ("status", "computed", "generated", "scheduled", "preemptions", "ttft", "latency")
"""The slots' fields that events change; the others need not be put back."""


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
    status: Int[Array, "slot *lanes"]
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
    """Everything that the experts remember between two arrivals."""

    slots: Slots
    num_admitted: Int[Array, "*lanes"]
    """Active slots before this position run, the others wait."""
    clock: Float[Array, "*lanes"]
    """Start of the iteration in progress, or the boundary at which the next is scheduled, s from now."""
    head_ready: Float[Array, "*lanes"]
    """When the head of the waiting queue is (or was) ready, s from now; `_NEVER` if no request waits."""
    duration: Float[Array, "*lanes"]
    """Time of the iteration in progress, s; `_NEVER` if there is none."""
    growth: Float[Array, "*lanes"]
    """How much longer each further decode iteration takes, s."""
    max_iterations: Int[Array, "*lanes"]
    """Iterations like this one until a request ends or KV memory runs out."""
    num_running: Int[Array, "*lanes"]
    context: Int[Array, "*lanes"]
    """Context tokens of the decoding requests in the iteration in progress."""
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
        status=ints,
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
        context=count,
        kv_held=count,
        busy_seconds=time,
        kv_token_seconds=time,
    )


def clear(state: SiteState, failed: Bool[Array, "*lanes"]) -> SiteState:
    """Return the state with failed experts idle, as if nothing had ever arrived there."""
    # All slots of an idle expert are the same.
    return jax.tree.map(lambda idle, now: jnp.where(failed, idle.ravel()[0], now), idle_site(1, 1), state)


def running_and_waiting(state: SiteState) -> tuple[Bool[Array, "slot *lanes"], Bool[Array, "slot *lanes"]]:
    """Return which slots hold a running and which a waiting request."""
    active = state.slots.status == SlotStatus.ACTIVE
    admitted = positions(active) < state.num_admitted
    return active & admitted, active & ~admitted


def num_waiting(state: SiteState) -> Int[Array, "*lanes"]:
    """Length of each waiting queue; preempted requests and those still on the network count."""
    return running_and_waiting(state)[1].sum(0)


def can_accept(
    site: Site, state: SiteState, prompt_tokens: Int[Array, "*lanes"], output_tokens: Int[Array, "*lanes"]
) -> Bool[Array, "*lanes"]:
    """Whether each expert would accept a request of this size now."""
    fits = prompt_tokens + output_tokens <= site.kv_capacity
    return fits & (num_waiting(state) < site.max_waiting)


def has_free_slot(state: SiteState) -> Bool[Array, "*lanes"]:
    """Whether the simulation can hold one more request of each expert."""
    active = (state.slots.status == SlotStatus.ACTIVE).astype(jnp.int32)
    return fold(jnp.add, active) < active.shape[0]


@lanes_last
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
        The new state, and the placement, with which a caller keeps a table of its own in step with the slots.
    """
    chosen = computed_once(chosen)
    slots = state.slots
    position = positions(slots.status)
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
        # Holes at the end of the batch are dropped, or the new request would seem to be admitted.
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
    # 1 stays 1: it may mean that the next iteration is not like this one. At worst, it costs one more event.
    repeats = jnp.where(state.max_iterations > 1, jnp.clip(to_full, 1, to_completion), state.max_iterations)
    return state._replace(slots=slots._replace(output_tokens=output_tokens), max_iterations=repeats)


def advance(site: Site, state: SiteState, gap: Float[Array, ""]) -> SiteState:
    """Let `gap` seconds pass at every expert.

    Afterwards each expert has applied exactly the iterations that ended at or before the new now, and the
    schedule of the iteration that began before it is fixed. Requests that completed are marked
    `SlotStatus.ENDED` with `ttft` and `latency` set.
    """
    return _advance(site, state, gap)


@lanes_last
def _advance(site: Site, state: SiteState, gap: Float[Array, "*lanes"]) -> SiteState:
    """Treat all axes behind the slots as one: experts of all environments are independent of each other."""
    lanes = jnp.broadcast_shapes(
        gap.shape,
        *(leaf.shape for leaf in (*jax.tree.leaves(site), *state[1:])),
        *(leaf.shape[1:] for leaf in state.slots),
    )

    def flat(leaf: Array, ndim: int) -> Array:
        front = leaf.shape[: leaf.ndim - ndim]
        return jnp.broadcast_to(leaf, (*front, *lanes)).reshape(*front, -1)

    site = jax.tree.map(lambda leaf: flat(leaf, leaf.ndim), site)
    slots = Slots(*(flat(leaf, leaf.ndim - 1) for leaf in state.slots))
    state = SiteState(slots, *(flat(leaf, leaf.ndim) for leaf in state[1:]))
    state = _advance_lanes(site, state, flat(gap, gap.ndim))
    return jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-1], *lanes), state)


def _advance_lanes(site: Site, state: SiteState, until: Float[Array, "lane"]) -> SiteState:
    ended = state.slots.status == SlotStatus.ENDED
    zero = jnp.zeros_like(until)
    state = state._replace(
        slots=state.slots._replace(status=jnp.where(ended, SlotStatus.EMPTY, state.slots.status)),
        busy_seconds=zero,
        kv_token_seconds=zero,
    )
    return _decode_until(site, _until_no_event(site, state, until, _FEWER), until)


def _until_no_event(site: Site, state: SiteState, until: Float[Array, "lane"], fewer: tuple[int, ...]) -> SiteState:
    """Let events happen until no lane has another one before `until`.

    All lanes take part until at most one in `fewer[0]` has an event. Then those are gathered, and go on in the same way
    with the rest of `fewer`.
    """
    num_lanes = until.shape[0]
    few = num_lanes // fewer[0] if fewer and num_lanes >= _FEW_LANES else 0

    def one_each(carry: tuple[SiteState, Array]) -> tuple[SiteState, Array]:
        state = _next_event(site, *carry, until)
        return state, _iterations_to_event(site, state)

    def too_many(carry: tuple[SiteState, Array]) -> Bool[Array, ""]:
        return _has_event(*carry, until).sum() > few

    state, event = jax.lax.while_loop(too_many, one_each, (state, _iterations_to_event(site, state)))
    if not few:
        return state
    chosen = jnp.nonzero(_has_event(state, event, until), size=few, fill_value=num_lanes)[0]
    part_site, part, part_until = jax.tree.map(lambda leaf: leaf.at[..., chosen].get(mode="clip"), (site, state, until))
    new = _until_no_event(part_site, part, part_until, fewer[1:])

    def put_back(leaf: Array, new: Array) -> Array:
        return leaf.at[..., chosen].set(new, mode="drop")

    changed = {name: put_back(getattr(state.slots, name), getattr(new.slots, name)) for name in _CHANGED_BY_EVENTS}
    return SiteState(state.slots._replace(**changed), *jax.tree.map(put_back, state[1:], new[1:]))


def _iterations_to_event(site: Site, state: SiteState) -> Int[Array, "lane"]:
    """Iterations like the one in progress until the schedule may change."""
    # Once the head of the queue is ready it may be admitted at the next boundary. A head that was ready when this
    # iteration began was turned away for lack of memory, tokens or seats, and none of these grows.
    until_ready = state.head_ready - state.clock
    to_ready = _iterations_within(until_ready, state.duration, state.growth)
    to_ready += _elapsed(to_ready, state.duration, state.growth) < until_ready
    blocked = (until_ready <= 0) | (state.num_running >= site.max_num_seqs)
    return jnp.where(blocked, state.max_iterations, jnp.clip(to_ready, 1, state.max_iterations))


def _has_event(state: SiteState, event: Int[Array, "lane"], until: Float[Array, "lane"]) -> Bool[Array, "lane"]:
    """Whether the schedule changes, or is due, at or before `until`."""
    # The same comparison as in `_iterations_within`: rounded differently, the loop might never end.
    ends = (state.duration < _NEVER) & (_elapsed(event, state.duration, state.growth) <= until - state.clock)
    return ends | (_next_start(state) < until)


def _next_start(state: SiteState) -> Float[Array, "lane"]:
    """When an expert without an iteration in progress starts the next one, s from now."""
    start = jnp.where(state.num_running > 0, state.clock, jnp.maximum(state.clock, state.head_ready))
    return jnp.where(state.duration == _NEVER, start, _NEVER)


class _Schedule(NamedTuple):
    """The iteration that an expert runs next."""

    tokens: Int[Array, "slot lane"]
    preempted: Bool[Array, "slot lane"]
    num_admitted: Int[Array, "lane"]
    head_ready: Float[Array, "lane"]
    duration: Float[Array, "lane"]
    growth: Float[Array, "lane"]
    max_iterations: Int[Array, "lane"]
    num_running: Int[Array, "lane"]
    context: Int[Array, "lane"]
    kv_held: Int[Array, "lane"]


def _next_event(site: Site, state: SiteState, event: Int[Array, "lane"], until: Float[Array, "lane"]) -> SiteState:
    """Apply the iterations up to the next event, and schedule what follows if that is before `until`.

    Does nothing to a lane that has no event.
    """
    due = _has_event(state, event, until)
    done = due & (state.duration < _NEVER)
    k = jnp.where(done, event, 0)
    elapsed = jnp.where(done, _elapsed(k, state.duration, state.growth), 0.0)
    clock = jnp.where(due & ~done, _next_start(state), state.clock + elapsed)
    schedules = due & (clock < until)

    slots = _end_iterations(site, state.slots, done, k, clock)
    next_ = _schedule(site, slots, state.num_admitted, clock)
    evicted = schedules & next_.preempted
    return SiteState(
        slots=slots._replace(
            computed=jnp.where(evicted, 0, slots.computed),
            scheduled=jnp.where(schedules, next_.tokens, jnp.where(done, 0, slots.scheduled)),
            preemptions=slots.preemptions + evicted,
        ),
        num_admitted=jnp.where(schedules, next_.num_admitted, state.num_admitted),
        clock=clock,
        head_ready=jnp.where(schedules, next_.head_ready, state.head_ready),
        duration=jnp.where(schedules, next_.duration, jnp.where(done, _NEVER, state.duration)),
        growth=jnp.where(schedules, next_.growth, state.growth),
        max_iterations=jnp.where(schedules, next_.max_iterations, state.max_iterations),
        num_running=jnp.where(schedules | done, next_.num_running, state.num_running),
        context=jnp.where(schedules, next_.context, state.context),
        kv_held=jnp.where(schedules, next_.kv_held, state.kv_held),
        busy_seconds=state.busy_seconds + elapsed,
        kv_token_seconds=state.kv_token_seconds + _kv_token_seconds(state, k),
    )


def _end_iterations(
    site: Site, slots: Slots, done: Bool[Array, "lane"], k: Int[Array, "lane"], clock: Float[Array, "lane"]
) -> Slots:
    """Let k iterations end at `clock`: tokens are computed, and a request that has all that it needs emits one."""
    worked = done & (slots.scheduled > 0)
    emitted = worked & (slots.scheduled == slots.prompt_tokens + slots.generated - slots.computed)
    generated = slots.generated + jnp.where(emitted, k, 0)
    finished = emitted & (generated >= slots.output_tokens)
    since_arrival = clock + site.network_delay - slots.ready
    return slots._replace(
        status=jnp.where(finished, SlotStatus.ENDED, slots.status),
        computed=slots.computed + jnp.where(worked, slots.scheduled * k, 0),
        generated=generated,
        ttft=jnp.where(emitted & (slots.generated == 0), since_arrival, slots.ttft),
        latency=jnp.where(finished, since_arrival, slots.latency),
    )


def _schedule(site: Site, slots: Slots, num_admitted: Int[Array, "lane"], clock: Float[Array, "lane"]) -> _Schedule:
    """Schedule the iteration that starts at `clock`.

    Running requests come first, in order of admission, then the queue, up to the first request that does not fit. Slots
    are in this order, so sums over the slots before one give what is left for it.
    """
    active = slots.status == SlotStatus.ACTIVE
    running = active & (positions(active) < num_admitted)
    need = jnp.where(active, slots.prompt_tokens + slots.generated - slots.computed, 0)
    # No more than the budget, so that the sums are exact in float32.
    wanted = jnp.minimum(need, site.max_num_batched_tokens)
    wanted_so_far, computed_so_far, count = running_sums(wanted, jnp.where(active, slots.computed, 0), active)
    tokens = jnp.clip(site.max_num_batched_tokens - (wanted_so_far - wanted), 0, need)
    fits = computed_so_far + jnp.minimum(wanted_so_far, site.max_num_batched_tokens) <= site.kv_capacity
    welcome = fits & (tokens > 0) & (count <= site.max_num_seqs) & (slots.ready <= clock)
    turned_away = active & ~jnp.where(running, fits | (count == 1), welcome)
    (num_turned_away,) = running_sums(turned_away)
    runs = active & (num_turned_away == 0)
    tokens = jnp.where(runs, tokens, 0)
    decoding = runs & (tokens == 1) & (need == 1) & (slots.computed >= slots.prompt_tokens)
    preempted = running & ~runs
    head = turned_away & (num_turned_away == 1)

    num_tokens, num_running, num_decoding = _total(tokens), _total(runs), _total(decoding)
    kv_held = _total(jnp.where(runs, slots.computed, 0)) + num_tokens
    context = _total(jnp.where(decoding, slots.computed + 1, 0))
    to_completion = fold(jnp.minimum, jnp.where(decoding, slots.output_tokens - slots.generated, _MANY))
    to_full = 1 + (site.kv_capacity - kv_held) // jnp.maximum(num_decoding, 1)
    steady = (num_decoding == num_running) & (_total(preempted) == 0)
    return _Schedule(
        tokens=tokens,
        preempted=preempted,
        num_admitted=_total(num_turned_away == 0),
        head_ready=fold(jnp.minimum, jnp.where(head, slots.ready, _NEVER)),
        duration=jnp.where(num_running > 0, site.iteration_time(num_tokens, num_decoding, context), _NEVER),
        growth=site.attention_per_token * num_decoding,
        max_iterations=jnp.where(steady, jnp.clip(to_full, 1, to_completion), 1),
        num_running=num_running,
        context=context,
        kv_held=kv_held,
    )


def _decode_until(site: Site, state: SiteState, until: Float[Array, "lane"]) -> SiteState:
    """Apply the iterations that end by `until` in lanes that have no event before it, and make `until` the new now."""
    left = until - state.clock
    running = state.duration < _NEVER
    k = jnp.where(running, _iterations_within(left, state.duration, state.growth), 0)
    elapsed = jnp.where(k > 0, _elapsed(k, state.duration, state.growth), 0.0)
    # A request that arrives now may join the iteration that starts now.
    pauses = (k > 0) & (elapsed == left)
    context = state.context + k * state.num_running
    duration = site.iteration_time(state.num_running, state.num_running, context)
    slots = state.slots
    decoded = jnp.where(slots.scheduled > 0, k, 0)
    return state._replace(
        slots=slots._replace(
            ready=slots.ready - until,
            computed=slots.computed + decoded,
            generated=slots.generated + decoded,
            scheduled=jnp.where(pauses, 0, slots.scheduled),
        ),
        clock=state.clock + elapsed - until,
        head_ready=jnp.where(state.head_ready < _NEVER, state.head_ready - until, _NEVER),
        duration=jnp.where(pauses, _NEVER, jnp.where(k > 0, duration, state.duration)),
        max_iterations=state.max_iterations - k,
        context=context,
        kv_held=state.kv_held + k * state.num_running,
        busy_seconds=state.busy_seconds + elapsed,
        kv_token_seconds=state.kv_token_seconds + _kv_token_seconds(state, k),
    )


def _kv_token_seconds(state: SiteState, k: Int[Array, "lane"]) -> Float[Array, "lane"]:
    """Sum over i < k of (duration + growth i) (held + batch i): KV grows by one token per sequence and iteration."""
    batch = jnp.where(state.max_iterations > 1, state.num_running, 0).astype(jnp.float32)
    i = k.astype(jnp.float32)
    sum_1, sum_2 = i * (i - 1) / 2, (i - 1) * i * (2 * i - 1) / 6
    held = state.kv_held.astype(jnp.float32) * _elapsed(k, state.duration, state.growth)
    return jnp.where(k > 0, held + batch * (state.duration * sum_1 + state.growth * sum_2), 0.0)


def _total(column: Shaped[Array, "slot lane"]) -> Int[Array, "lane"]:
    return fold(jnp.add, column.astype(jnp.int32))


def _elapsed(k: Int[Array, "*lanes"], duration: Float[Array, "*lanes"], growth: Float[Array, "*lanes"]) -> Array:
    """Time of k iterations, the first of which takes `duration` and each next one `growth` more."""
    i = k.astype(jnp.float32)
    return i * duration + growth * (i * (i - 1) / 2)


def _iterations_within(
    time: Float[Array, "*lanes"], duration: Float[Array, "*lanes"], growth: Float[Array, "*lanes"]
) -> Int[Array, "*lanes"]:
    """The most iterations that end within `time`: the root of _elapsed(k) = time, rounded down."""
    # Longer than any gap, and short enough that nothing below overflows where there is no iteration.
    time = jnp.clip(time, 0.0, 1e9)
    linear = duration - growth / 2
    # duration >= 2 growth, so linear is positive. Its square would overflow where there is no iteration.
    ratio = time / linear
    root = 2 * ratio / (1 + jnp.sqrt(1 + 2 * growth / linear * ratio))
    k = jnp.minimum(root, _MANY).astype(jnp.int32)
    # The root is rounded; the comparison that defines the result is not.
    k += _elapsed(k + 1, duration, growth) <= time
    k -= (_elapsed(k, duration, growth) > time) & (k > 0)
    return k

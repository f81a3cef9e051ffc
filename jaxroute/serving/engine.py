"""Continuous batching with event skipping: what happens at the experts between two arrivals.

Semantics: docs/reference/semantics.md (iteration-level scheduling, chunked prefill, KV memory, preemption by
recompute, as vLLM V1 does them). Nothing steps token by token, and nothing is done for each request that only goes on:
the cost follows what happens, not how many requests there are.

*Progress is one counter per expert.* Every running request that decodes gets one token in every iteration. So the
expert counts its iterations, and a slot holds the number of the iteration at whose end its request will have all its
tokens (`finish`), from the moment at which that is certain. What it has generated follows from the two, and what the
batch costs from four sums (`num_decoding`, `context`, `kv_held`, `num_running`). As a batch takes at least one token of
each seat (`max_num_batched_tokens >= max_num_seqs`), at most one running request is not done with its prefill after an
iteration: the one that was admitted last (`partial`).

*One ordered list per expert.* Its slots hold the running requests in order of admission, then the waiting ones in queue
order. A request is entered at the end (`tail`); admission and preemption only move the border between the two
(`num_admitted`). Requests that end leave holes, and `enqueue` closes all of them when it gets to the last slot.

*Slots are touched by events only*: at one place when a request comes, is admitted, has its first token or is preempted;
and all slots of one expert are looked at when a request ends. Between events, an expert is a few numbers. Most experts
just keep decoding from one arrival to the next, which is one formula (`_decode_until`). The few whose schedule changes
before that are gathered and taken from event to event until none has another (`_next_event`).

*Times are relative to now*: `advance` ends by shifting them, so float32 stays exact in an endless run. The times of
slots are relative to an epoch of their expert, which is moved about every second.

Slots are the last axis; the axes before it (`*lanes`: environments when batched, and experts) are independent of each
other, and treated as one. So the slots of a lane lie side by side, and a lane is gathered in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jaxroute.serving import prefixes
from jaxroute.serving.lanes import batch_first
from jaxroute.serving.prefixes import CacheShape, CacheState, SlotTexts, Text
from jaxroute.serving.site import Site

# Finite, so that no product with it is NaN, and later than any time that can occur.
_NEVER = 1e30
_MANY = 2**20
# The `finish` of a request of which it is not certain yet: it waits, or is prefilled in parts.
_OPEN = 2**30

# On a busy site, about a quarter of the lanes has an event, and 2 % have more than two. So it pays to gather a third of
# the lanes at a time, and at last an eighth of those; below `_FEW_LANES` lanes it does not.
_MANY_LANES, _FEWER_LANES = 3, 8
_FEW_LANES = 64
# The age of an epoch at which it is moved, s: up to it, float32 is as exact as for any time relative to now.
_EPOCH = 1.0


class SlotStatus(IntEnum):
    """What a slot holds."""

    EMPTY = 0
    ACTIVE = 1
    """A request that runs or waits."""
    ENDED = 2
    """A request that completed during the latest `advance`; its outcome is still readable."""


class Slots(NamedTuple):
    """The requests at each expert, in the order described above; any numbers in slots that are empty.

    `slot_status`, `generated`, `computed` and `ages` derive what changes all the time.
    """

    request: Int[Array, "*lanes slot"]
    """The caller's number for the request."""
    prompt_tokens: Int[Array, "*lanes slot"]
    output_tokens: Int[Array, "*lanes slot"]
    arrival: Float[Array, "*lanes slot"]
    """At the router, s from the epoch."""
    finish: Int[Array, "*lanes slot"]
    """Number of the iteration at whose end it completes; `_OPEN` if that is not certain."""
    kept: Int[Array, "*lanes slot"]
    """Output tokens that it had when it was last put into the queue."""
    prefilled: Int[Array, "*lanes slot"]
    """Tokens whose KV it holds until it decodes: what it was prefilled in parts."""
    preemptions: Int[Array, "*lanes slot"]
    ttft: Float[Array, "*lanes slot"]
    """First token, s after arrival, as seen at the expert; valid once `generated` is not 0."""
    latency: Float[Array, "*lanes slot"]
    """Last token, s after arrival, as seen at the expert; valid once it has ended."""
    texts: SlotTexts | None = None
    """None if no expert caches prefixes."""


class SiteState(NamedTuple):
    """Everything that the experts remember between two arrivals."""

    slots: Slots
    tail: Int[Array, "*lanes"]
    """The slots from here on are empty."""
    num_admitted: Int[Array, "*lanes"]
    """Active slots before this position run, the others wait; if any does, the head of the queue is here."""
    num_running: Int[Array, "*lanes"]
    num_waiting: Int[Array, "*lanes"]
    """Length of the queue; preempted requests and those still on the network count."""
    head_arrival: Float[Array, "*lanes"]
    """Of the head of the queue, s from the epoch; `_NEVER` if no request waits."""
    clock: Float[Array, "*lanes"]
    """Start of the iteration in progress, or the boundary at which the next is scheduled, s from now."""
    duration: Float[Array, "*lanes"]
    """Time of the iteration in progress, s; `_NEVER` if there is none."""
    growth: Float[Array, "*lanes"]
    """How much longer each further decode iteration takes, s."""
    max_iterations: Int[Array, "*lanes"]
    """Iterations like this one until a request ends or KV memory runs out."""
    iterations: Int[Array, "*lanes"]
    """Number of iterations that have ended."""
    iterations_before: Int[Array, "*lanes"]
    """The same at the beginning of the latest `advance`."""
    next_finish: Int[Array, "*lanes"]
    """No request completes before the end of the iteration of this number; `_OPEN` if that of none is certain."""
    num_decoding: Int[Array, "*lanes"]
    """Running requests that are done with their prefill."""
    context: Int[Array, "*lanes"]
    """Context tokens of these: their prompts, and what they have generated."""
    num_joining: Int[Array, "*lanes"]
    """Requests whose prefill is done at the end of the iteration in progress."""
    joining_context: Int[Array, "*lanes"]
    """Context tokens of these from then on."""
    kv_held: Int[Array, "*lanes"]
    """KV tokens held at the end of the iteration in progress."""
    partial: Int[Array, "*lanes"]
    """Slot of the running request that is not done with its prefill after the iteration in progress."""
    partial_held: Int[Array, "*lanes"]
    """Its tokens whose KV is held then."""
    partial_need: Int[Array, "*lanes"]
    """Its tokens still to be computed then; 0 if there is no such request."""
    since_epoch: Float[Array, "*lanes"]
    """Time since the epoch of the slots' times, s."""
    busy_seconds: Float[Array, "*lanes"]
    """Time spent in iterations during the latest `advance`, s."""
    kv_token_seconds: Float[Array, "*lanes"]
    """KV tokens held, integrated over that time."""
    cache: CacheState | None = None
    """None if no expert caches prefixes: KV memory then counts in tokens, else in blocks."""


_Tree = TypeVar("_Tree", bound=PyTree)


def idle_site(num_experts: int, num_slots: int, cache: CacheShape | None = None) -> SiteState:
    """Return a site at which nothing has arrived yet; its experts cache prefixes if `cache` says how."""
    ints = jnp.zeros((num_experts, num_slots), jnp.int32)
    floats = jnp.zeros((num_experts, num_slots), jnp.float32)
    slots = Slots(
        request=ints - 1,
        prompt_tokens=ints,
        output_tokens=ints,
        arrival=floats,
        finish=ints,
        kept=ints,
        prefilled=ints,
        preemptions=ints,
        ttft=floats,
        latency=floats,
        texts=None if cache is None else prefixes.empty_texts((num_experts,), num_slots),
    )
    count = jnp.zeros(num_experts, jnp.int32)
    time = jnp.zeros(num_experts, jnp.float32)
    return SiteState(
        slots=slots,
        tail=count,
        num_admitted=count,
        num_running=count,
        num_waiting=count,
        head_arrival=time + _NEVER,
        clock=time,
        duration=time + _NEVER,
        growth=time,
        max_iterations=count,
        iterations=count,
        iterations_before=count,
        next_finish=count + _OPEN,
        num_decoding=count,
        context=count,
        num_joining=count,
        joining_context=count,
        kv_held=count,
        partial=count,
        partial_held=count,
        partial_need=count,
        since_epoch=time,
        busy_seconds=time,
        kv_token_seconds=time,
        cache=None if cache is None else prefixes.idle_cache((num_experts,), cache),
    )


def under_way(
    state: SiteState,
    request: Int[np.ndarray, "request"],
    prompt_tokens: Int[np.ndarray, "request"],
    output_tokens: Int[np.ndarray, "request"],
    generated: Int[np.ndarray, "request"],
    arrival: Float[np.ndarray, "request"],
    num_running: int,
) -> SiteState:
    """Return an idle site with these requests at each expert, in order: the first ones decode, the others wait.

    All have generated some tokens, and fewer than they will in all. The next iteration begins now.
    """
    count = len(request)
    runs = np.arange(count) < num_running

    def put(table: Array, values: np.ndarray) -> Array:
        return table.at[:, :count].set(values.astype(table.dtype))

    def number(value: int) -> Int[Array, "*lanes"]:
        return jnp.full_like(state.tail, value)

    context = int((prompt_tokens + generated)[runs].sum())
    finish = np.where(runs, output_tokens - generated, _OPEN)
    slots = state.slots._replace(
        request=put(state.slots.request, request),
        prompt_tokens=put(state.slots.prompt_tokens, prompt_tokens),
        output_tokens=put(state.slots.output_tokens, output_tokens),
        arrival=put(state.slots.arrival, arrival),
        finish=put(state.slots.finish, finish),
        # Those that run have their latest token from the iteration that has just ended.
        kept=put(state.slots.kept, generated - runs),
    )
    return state._replace(
        slots=slots,
        tail=number(count),
        num_admitted=number(num_running),
        num_running=number(num_running),
        num_waiting=number(count - num_running),
        head_arrival=state.head_arrival if runs.all() else jnp.full_like(state.head_arrival, arrival[num_running]),
        next_finish=number(finish.min(initial=_OPEN)),
        num_decoding=number(num_running),
        context=number(context),
        kv_held=number(context - num_running),
    )


def clear(state: SiteState, failed: Bool[Array, "*lanes"]) -> SiteState:
    """Return the state with failed experts idle, as if nothing had ever arrived there."""
    cache = state.cache
    shape = None if cache is None else CacheShape(cache.block_size, cache.entries.key.shape[-1])

    def cleared(idle: Array, now: Array) -> Array:
        where = failed.reshape(failed.shape + (1,) * (now.ndim - failed.ndim))
        return jnp.where(where, idle[0], now)

    # With the tail at the first slot, all slots are empty whatever is in them.
    return SiteState(state.slots, *jax.tree.map(cleared, idle_site(1, 1, shape)[1:], state[1:]))


def slot_status(state: SiteState) -> Int[Array, "*lanes slot"]:
    """Return the `SlotStatus` of each slot."""
    finish = state.slots.finish
    ended = jnp.where(finish > state.iterations_before[..., None], SlotStatus.ENDED, SlotStatus.EMPTY)
    status = jnp.where(finish > state.iterations[..., None], SlotStatus.ACTIVE, ended)
    return _before_tail(state, status.astype(jnp.int32))


def generated(state: SiteState) -> Int[Array, "*lanes slot"]:
    """Return the output tokens so far; of requests long gone, those that they had."""
    slots = state.slots
    so_far = slots.output_tokens - jnp.maximum(slots.finish - state.iterations[..., None], 0)
    return _before_tail(state, jnp.where(slots.finish == _OPEN, slots.kept, so_far))


def computed(state: SiteState) -> Int[Array, "*lanes slot"]:
    """Return the tokens whose KV is held; any number where no request is active."""
    slots, tokens = state.slots, generated(state)
    return jnp.where(tokens > slots.kept, slots.prompt_tokens + tokens - 1, slots.prefilled)


def ages(state: SiteState) -> Float[Array, "*lanes slot"]:
    """Return the time since requests have arrived at the router, s; of requests long gone as well."""
    return _before_tail(state, state.since_epoch[..., None] - state.slots.arrival)


def cached_tokens(
    state: SiteState, text: Text, request: Int[Array, ""], prompt_tokens: Int[Array, ""]
) -> Int[Array, "*lanes"]:
    """Return how many tokens of a prompt each expert has cached: what it would not compute if it began now.

    Raises:
        AssertionError: the site caches no prefixes.
    """
    experts = state.clock.shape
    given = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, experts), (text, request, prompt_tokens))
    return _cached_tokens(state, *given)


@batch_first
def _cached_tokens(
    state: SiteState, text: Text, request: Int[Array, "*lanes"], prompt_tokens: Int[Array, "*lanes"]
) -> Int[Array, "*lanes"]:
    lanes = _lanes_of(state, *jax.tree.leaves((text, request, prompt_tokens)))
    state = _by_lane(state, lanes)
    text, request, prompt_tokens = jax.tree.map(lambda leaf: _flat(leaf, lanes), (text, request, prompt_tokens))
    assert state.cache is not None
    assert state.slots.texts is not None
    # The iteration in progress, if there is one, fills its blocks from its beginning on.
    begun = state.iterations - (state.duration == _NEVER)
    cache = prefixes.count_up_to(state.cache, begun)
    row = jnp.arange(state.clock.shape[0], dtype=jnp.int32)
    full = _full_blocks(state.slots, state.slots.finish, row, state, begun + 1, state.iterations + 1)
    wanted = prefixes.texts_of(text, request, cache.block_size)
    found = prefixes.find(cache, wanted, prompt_tokens, state.slots.texts, full)
    return (found.blocks * cache.block_size).reshape(lanes)


def head_ready(site: Site, state: SiteState) -> Float[Array, "*lanes"]:
    """Return when the head of the queue reaches the expert, s from now; never, if no request waits."""
    # Always from the same numbers, so that requests that come at the same time stay simultaneous.
    return state.head_arrival - state.since_epoch + site.network_delay


def running_and_waiting(state: SiteState) -> tuple[Bool[Array, "*lanes slot"], Bool[Array, "*lanes slot"]]:
    """Return which slots hold a running and which a waiting request."""
    active = slot_status(state) == SlotStatus.ACTIVE
    admitted = _positions(state) < state.num_admitted[..., None]
    return active & admitted, active & ~admitted


def _before_tail(state: SiteState, values: Shaped[Array, "*lanes slot"]) -> Shaped[Array, "*lanes slot"]:
    """Return the values, and 0 for the slots past the tail, in which anything may be left."""
    return jnp.where(_positions(state) < state.tail[..., None], values, 0)


def _positions(state: SiteState) -> Int[Array, "slot"]:
    return jnp.arange(state.slots.finish.shape[-1], dtype=jnp.int32)


def can_accept(
    site: Site, state: SiteState, prompt_tokens: Int[Array, "*lanes"], output_tokens: Int[Array, "*lanes"]
) -> Bool[Array, "*lanes"]:
    """Whether each expert would accept a request of this size now."""
    room = site.kv_capacity
    if state.cache is not None:
        room = prefixes.num_blocks(room, state.cache.block_size) * state.cache.block_size
    fits = prompt_tokens + output_tokens <= room
    return fits & (state.num_waiting < site.max_waiting)


def has_free_slot(state: SiteState) -> Bool[Array, "*lanes"]:
    """Whether the simulation can hold one more request of each expert."""
    return state.num_running + state.num_waiting < state.slots.finish.shape[-1]


def enqueue(
    state: SiteState,
    chosen: Bool[Array, "*lanes"],
    request: Int[Array, ""],
    prompt_tokens: Int[Array, "*lanes"],
    output_tokens: Int[Array, "*lanes"],
    tables: PyTree[Shaped[Array, "*lanes slot"]] = (),
    entries: PyTree[Shaped[Array, "*lanes"]] = (),
    age: Float[Array, ""] | float = 0.0,
    text: Text | None = None,
) -> tuple[SiteState, Any]:
    """Put one request, arriving now, at the end of the chosen experts' queues (at most one; none if rejected).

    Each expert needs a slot for it; `can_accept` tells. `age` is the time since it arrived, if that is not now, s.
    `text` is needed where prefixes are cached, and nowhere else.

    A caller can keep `tables` of its own, whose entries stay with the slots' requests: the new request's are `entries`,
    one for each table.

    Returns:
        The new state and the new tables.
    """
    experts = state.clock.shape
    texts = rewritten = None
    if state.cache is not None:
        assert text is not None
        # What the session's text was beyond what the request shares, no other turn will ask for.
        session = jnp.where(chosen.any() & text.carries_on, text.session, prefixes.NOBODY)
        texts = prefixes.texts_of(text, jnp.int32(request), state.cache.block_size)
        rewritten = (session, text.shared_tokens // state.cache.block_size)
    given = (age, chosen, request, prompt_tokens, output_tokens, entries, texts, rewritten)
    given = jax.tree.map(lambda value: jnp.broadcast_to(value, experts), given)
    return _enqueue(state, tables, *given)


@batch_first
def _enqueue(
    state: SiteState,
    tables: Any,
    age: Float[Array, "*lanes"],
    chosen: Bool[Array, "*lanes"],
    request: Int[Array, "*lanes"],
    prompt_tokens: Int[Array, "*lanes"],
    output_tokens: Int[Array, "*lanes"],
    entries: Any,
    texts: SlotTexts | None,
    rewritten: tuple[Int[Array, "*lanes"], Int[Array, "*lanes"]] | None,
) -> tuple[SiteState, Any]:
    given = (age, chosen, request, prompt_tokens, output_tokens, entries, texts, rewritten)
    lanes = _lanes_of(state, *jax.tree.leaves(given))
    state, tables = _by_lane(state, lanes), jax.tree.map(lambda table: _rows(table, lanes), tables)
    age, chosen, request, prompt_tokens, output_tokens, entries, texts, rewritten = jax.tree.map(
        lambda leaf: _flat(leaf, lanes), given
    )
    num_lanes, num_slots = state.slots.finish.shape
    # An expert that holds no request begins anew.
    begins = chosen & (state.num_running + state.num_waiting == 0)
    state = state._replace(
        tail=jnp.where(begins, 0, state.tail),
        iterations=jnp.where(begins, 0, state.iterations),
        iterations_before=jnp.where(begins, 0, state.iterations_before),
    )
    if state.cache is not None:
        assert rewritten is not None
        cache = prefixes.rewrite(state.cache, *rewritten)
        state = state._replace(cache=cache._replace(counted=jnp.where(begins, -1, cache.counted)))
    state, tables = _make_room(state, tables, chosen)

    at = (jnp.arange(num_lanes, dtype=jnp.int32), jnp.where(chosen, state.tail, num_slots))

    def enter(table: Array, entry: Array) -> Array:
        return table.at[at].set(entry.astype(table.dtype), mode="drop", unique_indices=True)

    arrival = state.since_epoch - age
    none, no_time = jnp.zeros_like(state.tail), jnp.zeros_like(age)
    new = Slots(
        request=request,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        arrival=arrival,
        finish=jnp.full_like(state.tail, _OPEN),
        kept=none,
        prefilled=none,
        preemptions=none,
        ttft=no_time,
        latency=no_time,
        texts=texts,
    )
    first = chosen & (state.num_waiting == 0)
    state = state._replace(
        slots=jax.tree.map(enter, state.slots, new),
        tail=state.tail + chosen,
        num_admitted=jnp.where(first, state.tail, state.num_admitted),
        num_waiting=state.num_waiting + chosen,
        head_arrival=jnp.where(first, arrival, state.head_arrival),
    )
    tables = jax.tree.map(enter, tables, entries)
    return _as_given((state, tables), lanes)


def _make_room(state: SiteState, tables: Any, chosen: Bool[Array, "lane"]) -> tuple[SiteState, Any]:
    """Move the requests of each chosen lane whose last slot is taken to the front, so that there are no holes."""
    num_lanes, num_slots = state.slots.finish.shape
    # So many get there at a time, about.
    most = max(num_lanes // (2 * num_slots), 8)

    def close_holes(lane: Array, carry: tuple[SiteState, Any]) -> tuple[SiteState, Any]:
        state, tables = carry
        slots, border = state.slots, state.num_admitted.at[lane].get(mode="clip")
        now = state.iterations.at[lane].get(mode="clip")
        active = slots.finish.at[lane].get(mode="clip") > now[:, None]
        # In whole rounds of blocks, so that requests keep their offsets.
        base = now if state.cache is None else now - now % state.cache.block_size
        so_far = jnp.cumsum(active, axis=1, dtype=jnp.int32)
        slot = jnp.arange(num_slots, dtype=jnp.int32)
        before = (active & (slot < border[:, None])).sum(1, dtype=jnp.int32)
        # Those that are active first, in their order; behind them, anything.
        some = jnp.arange(lane.shape[0], dtype=jnp.int32)[:, None]
        order = jnp.zeros_like(so_far).at[some, jnp.where(active, so_far - 1, num_slots)].set(slot, mode="drop")

        def close(table: Array) -> Array:
            rows = table.at[lane].get(mode="clip")
            return table.at[lane].set(jnp.take_along_axis(rows, order, axis=1), mode="drop", unique_indices=True)

        def put(numbers: Array, new: Array) -> Array:
            return numbers.at[lane].set(new, mode="drop", unique_indices=True)

        # Iterations are counted anew, so that the number never overflows.
        slots = jax.tree.map(close, slots)
        finish = slots.finish.at[lane].get(mode="clip")
        finish = jnp.where(finish == _OPEN, _OPEN, finish - base[:, None])
        next_finish = state.next_finish.at[lane].get(mode="clip")
        partial = state.partial.at[lane].get(mode="clip")
        partial = jnp.take_along_axis(so_far, partial[:, None], axis=1)[:, 0] - 1
        state = state._replace(
            slots=slots._replace(finish=put(slots.finish, finish)),
            tail=put(state.tail, so_far[:, -1]),
            num_admitted=put(state.num_admitted, before),
            iterations=put(state.iterations, now - base),
            iterations_before=put(state.iterations_before, now - base),
            next_finish=put(state.next_finish, jnp.where(next_finish == _OPEN, _OPEN, next_finish - base)),
            partial=put(state.partial, jnp.maximum(partial, 0)),
        )
        if state.cache is not None:
            counted = state.cache.counted.at[lane].get(mode="clip")
            state = state._replace(cache=state.cache._replace(counted=put(state.cache.counted, counted - base)))
        return state, jax.tree.map(close, tables)

    return _some_at_a_time(chosen & (state.tail == num_slots), most, close_holes, (state, tables))


def with_output_tokens(site: Site, state: SiteState, output_tokens: Int[Array, "*lanes slot"]) -> SiteState:
    """Return the state as if these were the true lengths, each beyond what has been generated; for planners."""
    slots, iterations = state.slots, state.iterations
    certain = (slot_status(state) == SlotStatus.ACTIVE) & (slots.finish < _OPEN)
    finish = jnp.where(certain, iterations[..., None] + output_tokens - generated(state), slots.finish)
    next_finish = jnp.where(certain, finish, _OPEN).min(-1)
    to_full = _iterations_to_full(site, state)
    # 1 stays 1: it may mean that the next iteration is not like this one. At worst, it costs one more event.
    repeats = jnp.where(state.max_iterations > 1, jnp.clip(to_full, 1, next_finish - iterations), state.max_iterations)
    slots = slots._replace(output_tokens=output_tokens, finish=finish)
    return state._replace(slots=slots, next_finish=next_finish, max_iterations=repeats)


def advance(site: Site, state: SiteState, gap: Float[Array, ""]) -> SiteState:
    """Let `gap` seconds pass at every expert.

    Afterwards each expert has applied exactly the iterations that ended at or before the new now, and the
    schedule of the iteration that began before it is fixed. Requests that completed are `SlotStatus.ENDED` with `ttft`
    and `latency` set.
    """
    return _advance(site, state, jnp.broadcast_to(gap, state.clock.shape))


@batch_first
def _advance(site: Site, state: SiteState, gap: Float[Array, "*lanes"]) -> SiteState:
    """Treat all axes before the slots as one: experts of all environments are independent of each other."""
    lanes = _lanes_of(state, gap, *site)
    state, until = _by_lane(state, lanes), _flat(gap, lanes)
    site = jax.tree.map(lambda leaf: _flat(leaf, lanes), site)
    zero = jnp.zeros_like(until)
    state = state._replace(iterations_before=state.iterations, busy_seconds=zero, kv_token_seconds=zero)
    numbers = state._replace(slots=None)  # type: ignore[arg-type]
    everyone = _Lanes(jnp.arange(until.shape[0], dtype=jnp.int32), site, numbers, until)
    slots, numbers = _let_events_happen(state.slots, everyone)
    state = _move_epoch(_decode_until(site, numbers._replace(slots=slots), until))
    return _as_given(state, lanes)


# ---- Axes: many lanes are one ----------------------------------------------------------------------------------


def _lanes_of(state: SiteState, *others: Array) -> tuple[int, ...]:
    numbers = (leaf.shape for leaf in (*jax.tree.leaves(state[1:-1]), *others))
    return jnp.broadcast_shapes(state.slots.finish.shape[:-1], *numbers)


def _flat(leaf: Array, lanes: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(leaf, lanes).reshape(-1)


def _rows(table: Array, lanes: tuple[int, ...]) -> Array:
    num_slots = table.shape[-1]
    return jnp.broadcast_to(table, (*lanes, num_slots)).reshape(-1, num_slots)


def _by_lane(state: SiteState, lanes: tuple[int, ...]) -> SiteState:
    def by_lane(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (*lanes, *leaf.shape[len(lanes) :])).reshape(-1, *leaf.shape[len(lanes) :])

    return jax.tree.map(by_lane, state)


def _as_given(tree: _Tree, lanes: tuple[int, ...]) -> _Tree:
    return jax.tree.map(lambda leaf: leaf.reshape(*lanes, *leaf.shape[1:]), tree)


_Carry = TypeVar("_Carry")


def _some_at_a_time(
    where: Bool[Array, "lane"], most: int, change: Callable[[Array, _Carry], _Carry], carry: _Carry
) -> _Carry:
    """Let `change` be made to all lanes `where` it is due, to at most so many at a time.

    It is given their numbers, which are past the last lane where there are fewer.
    """
    num_lanes = where.shape[0]

    def some(now: tuple[Array, _Carry]) -> tuple[Array, _Carry]:
        where, carry = now
        lane = jnp.nonzero(where, size=min(most, num_lanes), fill_value=num_lanes)[0].astype(jnp.int32)
        return where.at[lane].set(False, mode="drop", unique_indices=True), change(lane, carry)

    return jax.lax.while_loop(lambda now: now[0].any(), some, (where, carry))[1]


# ---- From event to event ---------------------------------------------------------------------------------------


class _Lanes(NamedTuple):
    """Some of the lanes."""

    row: Int[Array, "lane"]
    """Which ones; the number of lanes where there is none."""
    site: Site
    state: SiteState
    """Without the slots, which stay where they are."""
    until: Float[Array, "lane"]


def _let_events_happen(slots: Slots, lanes: _Lanes) -> tuple[Slots, SiteState]:
    """Let events happen until no lane has another one before `until`.

    Lanes with an event are gathered, many at a time. When few of these have another one, those go on alone.
    """
    num_lanes = lanes.row.shape[0]
    if num_lanes < _FEW_LANES:
        return _until_few_have_events(slots, lanes, 0)
    many = num_lanes // _MANY_LANES
    few = many // _FEWER_LANES

    def many_go_on(chosen: Array, carry: tuple[Slots, SiteState]) -> tuple[Slots, SiteState]:
        slots, state = carry
        part = _gather(lanes._replace(state=state), chosen)
        slots, now = _until_few_have_events(slots, part, few)
        part = part._replace(state=now)
        (left,) = jnp.nonzero(_has_event(part), size=few, fill_value=many)
        slots, last = _until_few_have_events(slots, _gather(part, left.astype(jnp.int32)), 0)
        return slots, _put_back(state, chosen, _put_back(now, left, last))

    return _some_at_a_time(_has_event(lanes), many, many_go_on, (slots, lanes.state))


def _until_few_have_events(slots: Slots, lanes: _Lanes, few: int) -> tuple[Slots, SiteState]:
    """Let one event after the other happen, in all lanes at once, until at most `few` lanes have another one."""

    def too_many(carry: tuple[Slots, SiteState]) -> Bool[Array, ""]:
        return _has_event(lanes._replace(state=carry[1])).sum() > few

    def one_each(carry: tuple[Slots, SiteState]) -> tuple[Slots, SiteState]:
        slots, state = carry
        return _next_event(slots, lanes._replace(state=state))

    return jax.lax.while_loop(too_many, one_each, (slots, lanes.state))


def _gather(lanes: _Lanes, chosen: Int[Array, "some"]) -> _Lanes:
    some = jax.tree.map(lambda leaf: leaf.at[chosen].get(mode="clip"), lanes)
    # Past the last lane there is none, and nothing to do.
    return some._replace(until=jnp.where(chosen < lanes.row.shape[0], some.until, -_NEVER))


def _put_back(state: _Tree, chosen: Int[Array, "some"], new: _Tree) -> _Tree:
    return jax.tree.map(lambda leaf, new: leaf.at[chosen].set(new, mode="drop", unique_indices=True), state, new)


def _iterations_to_event(site: Site, state: SiteState) -> Int[Array, "lane"]:
    """Iterations like the one in progress until the schedule may change."""
    # Once the head of the queue is ready it may be admitted at the next boundary. A head that was ready when this
    # iteration began was turned away for lack of memory, tokens or seats, and none of these grows.
    until_ready = head_ready(site, state) - state.clock
    to_ready = _iterations_within(until_ready, state.duration, state.growth)
    to_ready += _elapsed(to_ready, state.duration, state.growth) < until_ready
    blocked = (until_ready <= 0) | (state.num_running >= site.max_num_seqs)
    return jnp.where(blocked, state.max_iterations, jnp.clip(to_ready, 1, state.max_iterations))


def _has_event(lanes: _Lanes) -> Bool[Array, "lane"]:
    """Whether the schedule changes, or is due, at or before `until`."""
    state, until = lanes.state, lanes.until
    event = _iterations_to_event(lanes.site, state)
    # The same comparison as in `_iterations_within`: rounded differently, the loop might never end.
    ends = (state.duration < _NEVER) & (_elapsed(event, state.duration, state.growth) <= until - state.clock)
    return ends | (_next_start(lanes.site, state) < until)


def _next_start(site: Site, state: SiteState) -> Float[Array, "lane"]:
    """When an expert without an iteration in progress starts the next one, s from now."""
    start = jnp.where(state.num_running > 0, state.clock, jnp.maximum(state.clock, head_ready(site, state)))
    return jnp.where(state.duration == _NEVER, start, _NEVER)


def _next_event(slots: Slots, lanes: _Lanes) -> tuple[Slots, SiteState]:
    """Apply the iterations up to the next event, and schedule what follows if that is before `until`.

    Does nothing to a lane that has no event.
    """
    state, until = lanes.state, lanes.until
    due = _has_event(lanes)
    done = due & (state.duration < _NEVER)
    clock = jnp.where(due & ~done, _next_start(lanes.site, state), state.clock)
    slots, state = _end_iterations(slots, lanes._replace(state=state._replace(clock=clock)), done)
    return _schedule(slots, lanes._replace(state=state), due & (state.clock < until))


def _end_iterations(slots: Slots, lanes: _Lanes, done: Bool[Array, "lane"]) -> tuple[Slots, SiteState]:
    """Let iterations end: all tokens are computed, and each request that is done with its prefill emits one."""
    state = lanes.state
    k = jnp.where(done, _iterations_to_event(lanes.site, state), 0)
    elapsed = jnp.where(done, _elapsed(k, state.duration, state.growth), 0.0)
    slots = slots._replace(
        prefilled=_put(slots.prefilled, lanes.row, state.partial, state.partial_held, done & (state.partial_need > 0))
    )
    state = state._replace(
        clock=state.clock + elapsed,
        duration=jnp.where(done, _NEVER, state.duration),
        iterations=state.iterations + k,
        num_decoding=state.num_decoding + jnp.where(done, state.num_joining, 0),
        context=state.context + k * state.num_decoding + jnp.where(done, state.joining_context, 0),
        num_joining=jnp.where(done, 0, state.num_joining),
        joining_context=jnp.where(done, 0, state.joining_context),
        kv_held=state.kv_held + jnp.maximum(k - 1, 0) * state.num_decoding,
        busy_seconds=state.busy_seconds + elapsed,
        kv_token_seconds=state.kv_token_seconds + _kv_token_seconds(state, k),
    )
    if state.cache is not None:
        state = state._replace(cache=prefixes.count_up_to(state.cache, state.iterations - 1))
    return _complete(slots, lanes._replace(state=state), done & (state.iterations == state.next_finish))


def _complete(slots: Slots, lanes: _Lanes, completes: Bool[Array, "lane"]) -> tuple[Slots, SiteState]:
    """Let all requests leave that have all their tokens now, in lanes that may have some."""
    num_slots = slots.finish.shape[1]

    def some_leave(chosen: Array, carry: tuple[Array, SiteState]) -> tuple[Array, SiteState]:
        latency, state = carry
        row = lanes.row.at[chosen].get(mode="fill", fill_value=slots.finish.shape[0])
        here = jax.tree.map(lambda leaf: leaf.at[chosen].get(mode="clip"), state)

        def of_row(table: Array) -> Array:
            return table.at[row].get(mode="clip")

        finish = of_row(slots.finish)
        used = jnp.arange(num_slots) < here.tail[:, None]
        leaves = used & (finish == here.iterations[:, None])
        since_arrival = here.clock[:, None] + (here.since_epoch[:, None] - of_row(slots.arrival))
        # A first token may be the last, and its time have been rounded differently.
        since_arrival = jnp.maximum(since_arrival, of_row(slots.ttft))
        new = jnp.where(leaves, since_arrival, of_row(latency))
        latency = latency.at[row].set(new, mode="drop", unique_indices=True)
        tokens = of_row(slots.prompt_tokens) + of_row(slots.output_tokens)
        number = leaves.sum(1, dtype=jnp.int32)
        freed = jnp.where(leaves, tokens, 0).sum(1, dtype=jnp.int32)
        others = used & (finish > here.iterations[:, None])
        if here.cache is not None:
            capacity = lanes.site.kv_capacity.at[chosen].get(mode="clip")
            cache = _release_in_order(slots, row, here, capacity, leaves)
            state = state._replace(cache=_put_back(state.cache, chosen, cache))

        def put(numbers: Array, new: Array) -> Array:
            return numbers.at[chosen].set(new, mode="drop", unique_indices=True)

        state = state._replace(
            next_finish=put(state.next_finish, jnp.where(others, finish, _OPEN).min(1)),
            num_running=put(state.num_running, here.num_running - number),
            num_decoding=put(state.num_decoding, here.num_decoding - number),
            context=put(state.context, here.context - freed),
            kv_held=put(state.kv_held, here.kv_held - (freed - number)),
        )
        return latency, state

    most = -(-lanes.row.shape[0] // 4)
    latency, state = _some_at_a_time(completes, most, some_leave, (slots.latency, lanes.state))
    return slots._replace(latency=latency), state


def _release_in_order(
    slots: Slots,
    row: Int[Array, "lane"],
    state: SiteState,
    kv_capacity: Int[Array, "lane"],
    leaves: Bool[Array, "lane slot"],
) -> CacheState:
    """Let requests that have all their tokens give back their blocks, in order of admission."""
    assert state.cache is not None
    full = _full_blocks(slots, slots.finish, row, state, state.iterations, state.iterations)
    all_leave = leaves

    def left(carry: tuple[CacheState, Array]) -> Bool[Array, ""]:
        return carry[1].any()

    def one_leaves(carry: tuple[CacheState, Array]) -> tuple[CacheState, Array]:
        cache, leaves = carry
        position = jnp.argmax(leaves, axis=1).astype(jnp.int32)
        goes = leaves.any(1)
        here = jnp.arange(leaves.shape[1]) == position[:, None]
        # Those behind it still hold theirs.
        others = jnp.where(leaves | ~all_leave, full, 0)
        tokens = _at(slots.prompt_tokens, row, position) + _at(slots.output_tokens, row, position) - 1
        cache = _release(slots, row, cache, kv_capacity, position, tokens, jnp.where(here, 0, others), goes, False)
        cache = prefixes.with_decoding(cache, tokens - state.iterations, -goes.astype(jnp.int32))
        return cache, leaves & ~here

    return jax.lax.while_loop(left, one_leaves, (state.cache, leaves))[0]


def _full_blocks(
    slots: Slots,
    finish: Int[Array, "row slot"],
    row: Int[Array, "lane"],
    state: SiteState,
    iteration: Int[Array, "lane"],
    least: Int[Array, "lane"],
) -> Int[Array, "lane slot"]:
    """Return the full blocks that each running request holds when so many iterations have ended; 0 if it does not run.

    Requests whose `finish` is below `least` have gone.
    """
    assert state.cache is not None

    def of_row(table: Array) -> Array:
        return table.at[row].get(mode="clip")

    finish = of_row(finish)
    position = jnp.arange(finish.shape[1], dtype=jnp.int32)
    tokens = of_row(slots.prompt_tokens) + of_row(slots.output_tokens) - (finish - iteration[:, None]) - 1
    decodes = (position < state.tail[:, None]) & (finish >= least[:, None]) & (finish < _OPEN)
    partly = (position == state.partial[:, None]) & (state.partial_need > 0)[:, None]
    tokens = jnp.where(partly, state.partial_held[:, None], jnp.where(decodes, tokens, 0))
    return tokens // state.cache.block_size


def _release(
    slots: Slots,
    row: Int[Array, "lane"],
    cache: CacheState,
    kv_capacity: Int[Array, "lane"],
    position: Int[Array, "lane"],
    tokens: Int[Array, "lane"],
    others: Int[Array, "lane slot"],
    where: Bool[Array, "lane"],
    keep_own: bool,
) -> CacheState:
    """Let one request of each lane give back its blocks; `others` are the full blocks that the others hold."""
    text, texts = _texts(slots, row, position)
    free = prefixes.free_blocks(cache, kv_capacity)
    return prefixes.release(cache, free, text, tokens, texts, others, where, keep_own)


def _texts(slots: Slots, row: Int[Array, "lane"], position: Int[Array, "lane"]) -> tuple[SlotTexts, SlotTexts]:
    """Return the text of one request of each lane, and those of all its slots."""
    assert slots.texts is not None
    one = jax.tree.map(lambda table: _at(table, row, position), slots.texts)
    return one, jax.tree.map(lambda table: table.at[row].get(mode="clip"), slots.texts)


class _Admission(NamedTuple):
    """A schedule while the queue is being admitted."""

    finish: Int[Array, "row slot"]
    state: SiteState
    tokens: Int[Array, "lane"]
    """Scheduled so far."""
    at_head: Bool[Array, "lane"]
    """Whether the head of the queue is at the border, or else an empty slot."""
    open: Bool[Array, "lane"]
    """Whether the head has not been turned away."""
    decoding: Int[Array, "lane"]
    """Requests that have just been admitted, and decode at once: all they had computed was found in the cache."""
    context: Int[Array, "lane"]
    """Context tokens of these."""
    cached_tokens: Int[Array, "row slot"] | None
    """None if no expert caches prefixes."""


def _schedule(slots: Slots, lanes: _Lanes, starts: Bool[Array, "lane"]) -> tuple[Slots, SiteState]:
    """Schedule the iterations that start at `clock`.

    All running requests that decode get a token each, the one that is not done with its prefill what is left, and then
    the queue, up to the first request that does not fit.
    """
    site, row = lanes.site, lanes.row
    slots, state, preempted = _preempt(slots, lanes, starts)
    budget = site.max_num_batched_tokens

    # The one that is not done with its prefill goes on, in the last place of the batch.
    goes_on = starts & (state.partial_need > 0)
    part = jnp.where(goes_on, jnp.minimum(state.partial_need, budget - state.num_decoding), 0)
    joins = goes_on & (part == state.partial_need)
    kept = _at(slots.kept, row, state.partial)
    finish = state.iterations + _at(slots.output_tokens, row, state.partial) - kept
    # After a preemption, its last token may be computed as if it had decoded all along.
    decodes = joins & (part == 1) & (kept > 0)
    held = state.partial_held + part
    if state.cache is not None:
        cache = prefixes.allocate(state.cache, jnp.where(starts, _blocks_to_go_on(site, state, part), 0))
        counted = jnp.where(starts, state.iterations, cache.counted)
        cache = prefixes.with_decoding(
            cache._replace(counted=counted), held - state.iterations - 1, joins.astype(jnp.int32)
        )
        state = state._replace(cache=cache)
    first = jnp.where(joins, state.partial, state.num_admitted)
    tokens = jnp.where(starts, state.num_decoding + part, 0)
    start = _Admission(
        finish=_put(slots.finish, row, state.partial, finish, joins),
        state=state._replace(
            partial_held=held,
            partial_need=state.partial_need - part,
            num_joining=jnp.where(joins, 1, state.num_joining),
            joining_context=jnp.where(joins, held + 1, state.joining_context),
            next_finish=jnp.where(joins, jnp.minimum(state.next_finish, finish), state.next_finish),
            kv_held=state.kv_held + tokens,
        ),
        tokens=tokens,
        at_head=jnp.ones_like(starts),
        open=starts & ~preempted,
        decoding=decodes.astype(jnp.int32),
        context=jnp.where(decodes, held, 0),
        cached_tokens=None if slots.texts is None else slots.texts.cached_tokens,
    )
    admission = _admit(slots, lanes, start)
    state, tokens = admission.state, admission.tokens
    slots = slots._replace(finish=admission.finish)
    if slots.texts is not None:
        assert admission.cached_tokens is not None
        slots = slots._replace(texts=slots.texts._replace(cached_tokens=admission.cached_tokens))

    time = site.iteration_time(tokens, state.num_decoding + admission.decoding, state.context + admission.context)
    duration = jnp.where(starts, jnp.where(state.num_running > 0, time, _NEVER), state.duration)
    to_full = _iterations_to_full(site, state)
    steady = (state.num_decoding == state.num_running) & ~preempted
    repeats = jnp.where(steady, jnp.clip(to_full, 1, state.next_finish - state.iterations), 1)
    ttft = _note_first_tokens(
        slots, lanes._replace(state=state), first, starts & (state.num_joining > 0), state.clock + duration
    )
    return slots._replace(ttft=ttft), state._replace(
        duration=duration,
        growth=jnp.where(starts, site.attention_per_token * state.num_decoding, state.growth),
        max_iterations=jnp.where(starts, repeats, state.max_iterations),
    )


def _iterations_to_full(site: Site, state: SiteState) -> Int[Array, "*lanes"]:
    """Iterations like the one in progress, itself included, until KV memory runs out."""
    cache = state.cache
    if cache is None:
        return 1 + (site.kv_capacity - state.kv_held) // jnp.maximum(state.num_decoding, 1)
    free = prefixes.free_blocks(cache, site.kv_capacity)
    free -= prefixes.decoding_blocks(cache, cache.counted + 1, state.iterations)
    return 1 + prefixes.iterations_to_full(cache, state.iterations + 1, free)


def _blocks_to_go_on(site: Site, state: SiteState, part: Int[Array, "lane"]) -> Int[Array, "lane"]:
    """Return the blocks that running requests need for their next iteration, `part` tokens of which are prefill."""
    cache = state.cache
    assert cache is not None
    held = jnp.where(state.partial_need > 0, state.partial_held, 0)
    size = cache.block_size
    of_partial = prefixes.blocks_for(held + part, size) - prefixes.blocks_for(held, size)
    return prefixes.decoding_blocks(cache, state.iterations, state.iterations) + of_partial


def _preempt(slots: Slots, lanes: _Lanes, starts: Bool[Array, "lane"]) -> tuple[Slots, SiteState, Bool[Array, "lane"]]:
    """Take memory from the last admitted requests until it lasts for one more token each; tell where that was so."""
    site, row = lanes.site, lanes.row

    def over(state: SiteState) -> Bool[Array, "lane"]:
        part = jnp.minimum(state.partial_need, site.max_num_batched_tokens - state.num_decoding)
        if state.cache is None:
            too_much = state.kv_held + state.num_decoding + part > site.kv_capacity
        else:
            too_much = _blocks_to_go_on(site, state, part) > prefixes.free_blocks(state.cache, site.kv_capacity)
        return starts & too_much & (state.num_running > 1)

    def one_goes(carry: tuple) -> tuple:
        finish, kept, prefilled, preemptions, state, preempted = carry
        position = state.num_admitted - 1
        now = _at(finish, row, position)
        lacks = over(state)
        goes = lacks & (now > state.iterations)  # or else there is none
        is_partial = state.partial_need > 0
        tokens = _at(slots.output_tokens, row, position) - (now - state.iterations)
        tokens = jnp.where(is_partial, _at(kept, row, position), tokens)
        size = _at(slots.prompt_tokens, row, position) + tokens
        decoded = goes & ~is_partial
        held = jnp.where(is_partial, state.partial_held, size - 1)
        if state.cache is not None:
            full = _full_blocks(slots, finish, row, state, state.iterations, state.iterations + 1)
            others = jnp.where(jnp.arange(full.shape[1]) == position[:, None], 0, full)
            cache = _release(slots, row, state.cache, site.kv_capacity, position, held, others, goes, True)
            cache = prefixes.with_decoding(cache, held - state.iterations, -decoded.astype(jnp.int32))
            state = state._replace(cache=cache)
        state = state._replace(
            num_admitted=jnp.where(lacks, position, state.num_admitted),
            num_running=state.num_running - goes,
            num_waiting=state.num_waiting + goes,
            head_arrival=jnp.where(goes, _at(slots.arrival, row, position), state.head_arrival),
            num_decoding=state.num_decoding - decoded,
            context=state.context - jnp.where(decoded, size, 0),
            kv_held=state.kv_held - jnp.where(goes, held, 0),
            partial_need=jnp.where(goes, 0, state.partial_need),
        )
        return (
            _put(finish, row, position, _OPEN, goes),
            _put(kept, row, position, tokens, goes),
            _put(prefilled, row, position, 0, goes),
            _put(preemptions, row, position, _at(preemptions, row, position) + 1, goes),
            state,
            preempted | goes,
        )

    changed = (slots.finish, slots.kept, slots.prefilled, slots.preemptions)
    start = (*changed, lanes.state, jnp.zeros_like(starts))
    finish, kept, prefilled, preemptions, state, preempted = jax.lax.while_loop(
        lambda carry: over(carry[-2]).any(), one_goes, start
    )
    slots = slots._replace(finish=finish, kept=kept, prefilled=prefilled, preemptions=preemptions)
    return slots, state, preempted


def _admit(slots: Slots, lanes: _Lanes, start: _Admission) -> _Admission:
    """Admit from the head of the queue while tokens, seats and memory last."""
    site, row = lanes.site, lanes.row

    def may_enter(now: _Admission) -> Bool[Array, "lane"]:
        state = now.state
        room = (now.tokens < site.max_num_batched_tokens) & (state.num_running < site.max_num_seqs)
        return now.open & room & (state.num_waiting > 0) & (head_ready(site, state) <= state.clock)

    def searches(now: _Admission) -> Bool[Array, "lane"]:
        return now.open & (now.state.num_waiting > 0) & ~now.at_head

    def one_enters(now: _Admission) -> _Admission:
        state, position = now.state, now.state.num_admitted
        asks = now.at_head & may_enter(now)
        kept, output = _at(slots.kept, row, position), _at(slots.output_tokens, row, position)
        need = _at(slots.prompt_tokens, row, position) + kept
        left = site.max_num_batched_tokens - now.tokens
        if state.cache is None:
            cached = jnp.zeros_like(need)
            tokens = jnp.minimum(need, left)
            enters = asks & (state.kv_held + tokens <= site.kv_capacity)
        else:
            cached, tokens, enters, cache = _look_up(slots, lanes, now, need, left, asks)
            state = state._replace(cache=cache)
        joins = enters & (cached + tokens == need)
        stays = enters & (cached + tokens < need)
        # All that it had computed was found: it decodes as if it had never been preempted.
        decodes = joins & (tokens == 1) & (kept > 0)
        certain = state.iterations + output - kept
        finish = _put(now.finish, row, position, certain, joins)
        border = position + (enters | searches(now))
        num_waiting = state.num_waiting - enters
        behind = jnp.minimum(border, finish.shape[1] - 1)
        moved = border > position
        at_head = jnp.where(moved, _at(finish, row, behind) == _OPEN, now.at_head)
        next_arrival = jnp.where(num_waiting > 0, _at(slots.arrival, row, behind), _NEVER)
        state = state._replace(
            num_admitted=border,
            num_running=state.num_running + enters,
            num_waiting=num_waiting,
            head_arrival=jnp.where(moved, next_arrival, state.head_arrival),
            num_joining=state.num_joining + joins,
            joining_context=state.joining_context + jnp.where(joins, need + 1, 0),
            next_finish=jnp.where(joins, jnp.minimum(state.next_finish, certain), state.next_finish),
            kv_held=state.kv_held + jnp.where(enters, cached + tokens, 0),
            partial=jnp.where(stays, position, state.partial),
            partial_held=jnp.where(stays, cached + tokens, state.partial_held),
            partial_need=jnp.where(stays, need - cached - tokens, state.partial_need),
        )
        if state.cache is not None:
            offset = need - state.iterations - 1
            state = state._replace(cache=prefixes.with_decoding(state.cache, offset, joins.astype(jnp.int32)))
        cached_tokens = now.cached_tokens
        if cached_tokens is not None:
            first_time = enters & (_at(cached_tokens, row, position) < 0)
            cached_tokens = _put(cached_tokens, row, position, cached, first_time)
        return _Admission(
            finish=finish,
            state=state,
            tokens=now.tokens + jnp.where(enters, tokens, 0),
            at_head=at_head,
            open=now.open & (enters | ~asks),
            decoding=now.decoding + decodes,
            context=now.context + jnp.where(decodes, need, 0),
            cached_tokens=cached_tokens,
        )

    return jax.lax.while_loop(lambda now: (searches(now) | may_enter(now)).any(), one_enters, start)


def _look_up(
    slots: Slots,
    lanes: _Lanes,
    now: _Admission,
    need: Int[Array, "lane"],
    left: Int[Array, "lane"],
    asks: Bool[Array, "lane"],
) -> tuple[Int[Array, "lane"], Int[Array, "lane"], Bool[Array, "lane"], CacheState]:
    """Return what the head of the queue finds in the cache, what it computes, whether it enters, and the cache then."""
    state, row, position = now.state, lanes.row, now.state.num_admitted
    cache = state.cache
    assert cache is not None
    text, texts = _texts(slots, row, position)
    # Blocks can be found as soon as they are scheduled to be filled.
    full = _full_blocks(slots, now.finish, row, state, state.iterations + 1, state.iterations + 1)
    found = prefixes.find(cache, text, need, texts, full)
    cached = found.blocks * cache.block_size
    tokens = jnp.minimum(need - cached, left)
    new = prefixes.blocks_for(cached + tokens, cache.block_size) - found.blocks
    free = prefixes.free_blocks(cache, lanes.site.kv_capacity) - found.taken.sum(-1)
    enters = asks & (new <= free)
    cache = prefixes.take(cache, found, enters)
    return cached, tokens, enters, prefixes.allocate(cache, jnp.where(enters, new, 0))


def _note_first_tokens(
    slots: Slots,
    lanes: _Lanes,
    first: Int[Array, "lane"],
    joined: Bool[Array, "lane"],
    end: Float[Array, "lane"],
) -> Float[Array, "row slot"]:
    """Note the time to first token of the requests from `first` to the border, whose prefill is done at `end`."""
    state, row = lanes.state, lanes.row

    def left(position: Array) -> Bool[Array, "lane"]:
        return joined & (position < state.num_admitted)

    def one_notes(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        ttft, position = carry
        finish = _at(slots.finish, row, position)
        joins = left(position) & (finish > state.iterations) & (finish < _OPEN)
        joins &= _at(slots.kept, row, position) == 0
        return _put(
            ttft, row, position, end + (state.since_epoch - _at(slots.arrival, row, position)), joins
        ), position + 1

    return jax.lax.while_loop(lambda carry: left(carry[1]).any(), one_notes, (slots.ttft, first))[0]


def _at(table: Shaped[Array, "row slot"], row: Int[Array, "lane"], position: Int[Array, "lane"]) -> Array:
    return table.at[row, position].get(mode="clip")


def _put(
    table: Shaped[Array, "row slot"],
    row: Int[Array, "lane"],
    position: Int[Array, "lane"],
    value: Array | int,
    where: Bool[Array, "lane"],
) -> Array:
    """Enter one value for each lane, `where` it holds."""
    return table.at[jnp.where(where, row, table.shape[0]), position].set(value, mode="drop", unique_indices=True)


# ---- Between events --------------------------------------------------------------------------------------------


def _decode_until(site: Site, state: SiteState, until: Float[Array, "lane"]) -> SiteState:
    """Apply the iterations that end by `until` in lanes that have no event before it, and make `until` the new now."""
    left = until - state.clock
    running = state.duration < _NEVER
    k = jnp.where(running, _iterations_within(left, state.duration, state.growth), 0)
    elapsed = jnp.where(k > 0, _elapsed(k, state.duration, state.growth), 0.0)
    # A request that arrives now may join the iteration that starts now.
    pauses = (k > 0) & (elapsed == left)
    context = state.context + k * state.num_decoding
    duration = site.iteration_time(state.num_decoding, state.num_decoding, context)
    # Of the iteration in progress, all tokens are counted as held.
    held = state.kv_held + (k - pauses) * state.num_decoding
    return state._replace(
        clock=state.clock + elapsed - until,
        duration=jnp.where(pauses, _NEVER, jnp.where(k > 0, duration, state.duration)),
        iterations=state.iterations + k,
        max_iterations=state.max_iterations - k,
        context=context,
        kv_held=held,
        since_epoch=state.since_epoch + until,
        busy_seconds=state.busy_seconds + elapsed,
        kv_token_seconds=state.kv_token_seconds + _kv_token_seconds(state, k),
    )


def _move_epoch(state: SiteState) -> SiteState:
    """Make now the epoch of the slots' times where it is too long ago for them to be exact."""

    def move(lane: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        arrival, head_arrival, since = carry
        passed = since.at[lane].get(mode="clip")
        return (
            arrival.at[lane].add(-passed[:, None], mode="drop", unique_indices=True),
            head_arrival.at[lane].add(-passed, mode="drop", unique_indices=True),
            since.at[lane].set(0.0, mode="drop", unique_indices=True),
        )

    most = max(state.clock.shape[0] // 16, 8)
    times = (state.slots.arrival, state.head_arrival, state.since_epoch)
    arrival, head, since = _some_at_a_time(state.since_epoch > _EPOCH, most, move, times)
    return state._replace(slots=state.slots._replace(arrival=arrival), head_arrival=head, since_epoch=since)


def _kv_token_seconds(state: SiteState, k: Int[Array, "lane"]) -> Float[Array, "lane"]:
    """Sum over i < k of (duration + growth i) (held + batch i): KV grows by one token per sequence and iteration."""
    batch = jnp.where(state.max_iterations > 1, state.num_decoding, 0).astype(jnp.float32)
    i = k.astype(jnp.float32)
    sum_1, sum_2 = i * (i - 1) / 2, (i - 1) * i * (2 * i - 1) / 6
    held = state.kv_held.astype(jnp.float32) * _elapsed(k, state.duration, state.growth)
    return jnp.where(k > 0, held + batch * (state.duration * sum_1 + state.growth * sum_2), 0.0)


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

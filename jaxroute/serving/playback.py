"""Replay requests with a fixed assignment to experts, and return what happened to each."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxroute.errors import UserError
from jaxroute.serving.checks import real_array, whole, whole_array
from jaxroute.serving.engine import SiteState, SlotStatus, advance, can_accept, enqueue, idle_site, slot_status
from jaxroute.serving.prefixes import NOBODY, CacheShape
from jaxroute.serving.sessions import Sessions, Turn, no_sessions, text_of, with_turn
from jaxroute.serving.site import MAX_COUNT, Site, check_site

# So many pieces of a free list are followed at first.
_FEWEST_ENTRIES = 128


class Requests(NamedTuple):
    """Requests in order of arrival. Token counts may differ between experts, as LLMs differ in tokenizer and length."""

    arrival_time: ArrayLike
    """(R,), s, in order; float64, as absolute times may be large. Dates are refused: subtract the first one."""
    prompt_tokens: ArrayLike
    """(R,) or (R, N), at least 1."""
    output_tokens: ArrayLike
    """(R,) or (R, N), at least 1."""
    texts: Texts | None = None
    """Whose text each request continues; None if each has a text of its own."""


class Texts(NamedTuple):
    """Whose text each request continues, for experts that cache prefixes."""

    session: ArrayLike
    """(R,), a number from 0 for each session, or -1 for none."""
    shared_tokens: ArrayLike
    """(R,), the request's first tokens, which its session's text had before; fewer than its prompt has.

    What does not exist yet cannot be shared: while the turn before is in flight, no more counts than what that shared.
    """
    application: ArrayLike
    """(R,), a number from 0 for each application, or -1 for none."""
    system_tokens: ArrayLike
    """(R,), length of the application's system prompt, with which the request begins; the same for all of its
    requests."""


class Outcomes(NamedTuple):
    """What happened to each request, as NumPy arrays of shape (R,)."""

    status: np.ndarray
    """0 completed, 1 rejected on arrival."""
    ttft: np.ndarray
    """First token at the expert, s after `arrival_time`, the way to the expert included; nan if rejected."""
    latency: np.ndarray
    """Last token at the expert, s after `arrival_time`; nan if rejected."""
    preemptions: np.ndarray
    """How often the request lost its KV memory and had to be recomputed."""
    cached_tokens: np.ndarray
    """Tokens of its prompt that were found in the cache when it was admitted first; 0 if rejected."""


def replay(
    site: Site, requests: Requests, assignment: ArrayLike, *, prefix_caching: bool = False, block_size: int = 16
) -> Outcomes:
    """Serve `requests`, request r at expert `assignment[r]`, until the last one has completed.

    Args:
        site: the experts.
        requests: R requests in order of arrival.
        assignment: (R,) expert of each request.
        prefix_caching: whether KV memory is allocated in blocks, in which prefixes are found again; else it is counted
            in tokens.
        block_size: tokens per block.

    Returns:
        Outcomes as seen at the expert; a user sees the answer one network delay later.

    Raises:
        UserError: values that are not numbers, arrays of different lengths, times that go backwards, a count below 1,
            an expert that does not exist.
    """
    if not isinstance(requests, Requests):
        raise UserError(f"requests is a {type(requests).__name__}; give jaxroute.Requests")
    site = check_site(site)
    gaps, prompts, outputs, experts = _check_requests(site, requests, assignment)
    block_size = whole("block_size", block_size, 1, MAX_COUNT)
    turns = _check_texts(requests.texts, prompts) if prefix_caching else None
    if gaps.size == 0:
        empty, none = np.zeros(0), np.zeros(0, np.int32)
        return Outcomes(none, empty, empty, none, none)
    seats = int(np.max(np.asarray(site.max_num_seqs) + np.asarray(site.max_waiting)))
    most = int(np.bincount(experts, minlength=site.num_experts).max())
    # Rounded up to a power of two, so that similar request lists share one compilation.
    num_slots = min(seats, 1 << (most - 1).bit_length())
    given = (gaps, prompts, outputs, experts)
    if turns is None:
        outcomes, _ = replay_program(site, num_slots, *given)
    else:
        num_sessions = 1 << int(turns.session.max() + 1).bit_length()
        # An expert's free list may be in many pieces: if there are more than the program follows, it follows more.
        lost, num_entries = True, _FEWEST_ENTRIES
        while lost:
            cache = CacheShape(block_size, num_entries)
            outcomes, lost = replay_program(site, num_slots, *given, turns, num_sessions, cache)
            num_entries *= 4
    status, ttft, latency, preemptions, cached = (np.asarray(column) for column in outcomes)
    ttft, latency = (np.where(status == 1, np.nan, times) for times in (ttft, latency))
    return Outcomes(status, ttft, latency, preemptions, cached)


def _check_texts(texts: Texts | None, prompts: np.ndarray) -> Turn:
    """Return the columns as int32, and those of requests without session or application if there are none."""
    num_requests = len(prompts)
    if texts is None:
        none, nothing = np.full(num_requests, NOBODY, np.int32), np.zeros(num_requests, np.int32)
        return Turn(*map(jnp.asarray, (none, nothing, none, nothing)))
    columns = []
    for name, least in (("session", NOBODY), ("shared_tokens", 0), ("application", NOBODY), ("system_tokens", 0)):
        column = real_array(f"texts: {name}", getattr(texts, name))
        if column.shape != (num_requests,):
            raise UserError(f"texts: {name} has shape {column.shape}; give one per request, ({num_requests},)")
        columns.append(whole_array(f"texts: {name}", column, least, MAX_COUNT).astype(np.int32))
        too_long = columns[-1] >= prompts.min(axis=1)
        if name.endswith("_tokens") and too_long.any():
            row = int(np.argmax(too_long))
            raise UserError(
                f"texts: {name}[{row}]={columns[-1][row]} is not below the request's prompt_tokens, "
                f"{prompts[row].min()}; a request adds at least one token to what it shares"
            )
    return Turn(*map(jnp.asarray, columns))


def _check_requests(
    site: Site, requests: Requests, assignment: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return gaps (R,) float32, prompt and output tokens (R, N) int32 and experts (R,) int32."""
    times = real_array("requests: arrival_time", requests.arrival_time).astype(np.float64)
    if times.ndim != 1:
        raise UserError(f"requests: arrival_time has shape {times.shape}; give one time per request")
    num_requests, num_experts = times.shape[0], site.num_experts
    if not np.isfinite(times).all():
        raise UserError(f"requests: arrival_time[{int(np.argmin(np.isfinite(times)))}] is not finite")
    gaps = np.diff(times, prepend=times[:1])
    if (gaps < 0).any():
        raise UserError(f"requests: arrival_time[{int(np.argmax(gaps < 0))}] lies before its predecessor; sort them")

    tokens = {}
    for name in ("prompt_tokens", "output_tokens"):
        counts = real_array(f"requests: {name}", getattr(requests, name))
        if counts.shape not in ((num_requests,), (num_requests, num_experts)):
            raise UserError(
                f"requests: {name} has shape {counts.shape}; give ({num_requests},) or "
                f"({num_requests}, {num_experts}), for {num_requests} requests and {num_experts} experts"
            )
        counts = whole_array(f"requests: {name}", counts, 1, MAX_COUNT)
        if counts.ndim == 1:
            counts = np.broadcast_to(counts[:, None], (num_requests, num_experts))
        tokens[name] = counts.astype(np.int32)

    experts = real_array("assignment", assignment)
    if experts.shape != (num_requests,):
        raise UserError(f"assignment has shape {experts.shape}; give one expert per request, ({num_requests},)")
    experts = whole_array("assignment", experts, 0, num_experts - 1)
    return gaps.astype(np.float32), tokens["prompt_tokens"], tokens["output_tokens"], experts.astype(np.int32)


class _Carry(NamedTuple):
    state: SiteState
    table: _Table
    sessions: Sessions | None


class _Table(NamedTuple):
    """Outcomes so far, with one spare row for slots that hold no completed request."""

    status: Int[Array, "rows"]
    ttft: Float[Array, "rows"]
    latency: Float[Array, "rows"]
    preemptions: Int[Array, "rows"]
    cached_tokens: Int[Array, "rows"]


@partial(jax.jit, static_argnames=("num_slots", "num_sessions", "cache"))
def replay_program(
    site: Site,
    num_slots: int,
    gaps: Float[Array, "request"],
    prompts: Int[Array, "request expert"],
    outputs: Int[Array, "request expert"],
    experts: Int[Array, "request"],
    turns: Turn | None = None,
    num_sessions: int = 0,
    cache: CacheShape | None = None,
) -> tuple[tuple[Array, ...], Bool[Array, ""]]:
    """Return the columns of `Outcomes` for requests whose numbers are not checked, and whether `cache` was too small.

    Both times are 0 where the status is 1, rejected. `turns` are needed where `cache` is given, and nowhere else.
    """
    num_requests, num_experts = prompts.shape
    spare_row = num_requests

    def note_completed(table: _Table, state: SiteState) -> _Table:
        slots, texts = state.slots, state.slots.texts
        row = jnp.where(slot_status(state) == SlotStatus.ENDED, slots.request, spare_row)
        return table._replace(
            ttft=table.ttft.at[row].set(slots.ttft),
            latency=table.latency.at[row].set(slots.latency),
            preemptions=table.preemptions.at[row].set(slots.preemptions),
            cached_tokens=table.cached_tokens
            if texts is None
            else table.cached_tokens.at[row].set(texts.cached_tokens),
        )

    def arrive(carry: _Carry, request: tuple[Any, ...]) -> tuple[_Carry, None]:
        state, table, sessions = carry
        number, gap, prompt, output, expert, turn = request
        state = advance(site, state, gap)
        table = note_completed(table, state)
        chosen = jnp.arange(num_experts) == expert
        accepted = chosen & can_accept(site, state, prompt, output)
        text = None
        if sessions is not None:
            text = text_of(sessions, state, turn)
        state, _ = enqueue(state, accepted, number, prompt, output, text=text)
        if sessions is not None:
            assert text is not None
            sessions = with_turn(sessions, text, number, prompt[expert] + output[expert], accepted.any())
        status = jnp.where(accepted.any(), 0, 1)
        return _Carry(state, table._replace(status=table.status.at[number].set(status)), sessions), None

    def wait(carry: _Carry) -> _Carry:
        state, table, sessions = carry
        # In short stretches: times count from now, and stay small and exact.
        state = advance(site, state, jnp.float32(1.0))
        return _Carry(state, note_completed(table, state), sessions)

    # No NaN for those that are rejected, so that this runs under jax_debug_nans.
    times = jnp.zeros(num_requests + 1, jnp.float32)
    counts = jnp.zeros(num_requests + 1, jnp.int32)
    table = _Table(counts, times, times, counts, counts)
    carry = _Carry(
        idle_site(num_experts, num_slots, cache), table, None if cache is None else no_sessions(num_sessions)
    )
    numbers = jnp.arange(num_requests, dtype=jnp.int32)
    carry, _ = jax.lax.scan(arrive, carry, (numbers, gaps, prompts, outputs, experts, turns))
    state, table, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[0].num_running + carry[0].num_waiting > 0), wait, carry
    )
    too_small = jnp.bool_(False) if state.cache is None else (state.cache.overflowed > 0).any()
    return tuple(column[:num_requests] for column in table), too_small

"""Replay requests with a fixed assignment to experts, and return what happened to each."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxroute.errors import UserError
from jaxroute.serving.checks import real_array, whole_array
from jaxroute.serving.engine import SiteState, SlotStatus, advance, can_accept, enqueue, idle_site, slot_status
from jaxroute.serving.site import MAX_COUNT, Site, check_site


class Requests(NamedTuple):
    """Requests in order of arrival. Token counts may differ between experts, as LLMs differ in tokenizer and length."""

    arrival_time: ArrayLike
    """(R,), s, in order; float64, as absolute times may be large. Dates are refused: subtract the first one."""
    prompt_tokens: ArrayLike
    """(R,) or (R, N), at least 1."""
    output_tokens: ArrayLike
    """(R,) or (R, N), at least 1."""


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


def replay(site: Site, requests: Requests, assignment: ArrayLike) -> Outcomes:
    """Serve `requests`, request r at expert `assignment[r]`, until the last one has completed.

    Args:
        site: the experts.
        requests: R requests in order of arrival.
        assignment: (R,) expert of each request.

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
    if gaps.size == 0:
        empty = np.zeros(0)
        return Outcomes(empty.astype(np.int32), empty, empty, empty.astype(np.int32))
    seats = int(np.max(np.asarray(site.max_num_seqs) + np.asarray(site.max_waiting)))
    most = int(np.bincount(experts, minlength=site.num_experts).max())
    # Rounded up to a power of two, so that similar request lists share one compilation.
    num_slots = min(seats, 1 << (most - 1).bit_length())
    outcomes = replay_program(site, num_slots, gaps, prompts, outputs, experts)
    status, ttft, latency, preemptions = (np.asarray(column) for column in outcomes)
    rejected = status == 1
    return Outcomes(status, np.where(rejected, np.nan, ttft), np.where(rejected, np.nan, latency), preemptions)


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


class _Table(NamedTuple):
    """Outcomes so far, with one spare row for slots that hold no completed request."""

    status: Int[Array, "rows"]
    ttft: Float[Array, "rows"]
    latency: Float[Array, "rows"]
    preemptions: Int[Array, "rows"]


@partial(jax.jit, static_argnames="num_slots")
def replay_program(
    site: Site,
    num_slots: int,
    gaps: Float[Array, "request"],
    prompts: Int[Array, "request expert"],
    outputs: Int[Array, "request expert"],
    experts: Int[Array, "request"],
) -> tuple[Array, ...]:
    """Return status, time to first token, latency and preemptions of each request, whose numbers are not checked.

    Both times are 0 where the status is 1, rejected.
    """
    num_requests, num_experts = prompts.shape
    spare_row = num_requests

    def note_completed(table: _Table, state: SiteState) -> _Table:
        slots = state.slots
        row = jnp.where(slot_status(state) == SlotStatus.ENDED, slots.request, spare_row)
        return table._replace(
            ttft=table.ttft.at[row].set(slots.ttft),
            latency=table.latency.at[row].set(slots.latency),
            preemptions=table.preemptions.at[row].set(slots.preemptions),
        )

    def arrive(carry: tuple[SiteState, _Table], request: tuple[Array, ...]) -> tuple[tuple[SiteState, _Table], None]:
        state, table = carry
        number, gap, prompt, output, expert = request
        state = advance(site, state, gap)
        table = note_completed(table, state)
        chosen = jnp.arange(num_experts) == expert
        accepted = chosen & can_accept(site, state, prompt, output)
        state, _ = enqueue(state, accepted, number, prompt, output)
        status = jnp.where(accepted.any(), 0, 1)
        return (state, table._replace(status=table.status.at[number].set(status))), None

    def wait(carry: tuple[SiteState, _Table]) -> tuple[SiteState, _Table]:
        state, table = carry
        # In short stretches: times count from now, and stay small and exact.
        state = advance(site, state, jnp.float32(1.0))
        return state, note_completed(table, state)

    # No NaN for those that are rejected, so that this runs under jax_debug_nans.
    times = jnp.zeros(num_requests + 1, jnp.float32)
    counts = jnp.zeros(num_requests + 1, jnp.int32)
    carry = (idle_site(num_experts, num_slots), _Table(counts, times, times, counts))
    numbers = jnp.arange(num_requests, dtype=jnp.int32)
    carry, _ = jax.lax.scan(arrive, carry, (numbers, gaps, prompts, outputs, experts))
    _, table = jax.lax.while_loop(lambda carry: jnp.any(carry[0].num_running + carry[0].num_waiting > 0), wait, carry)
    return tuple(column[:num_requests] for column in table)

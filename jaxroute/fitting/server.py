"""Replay of one server's log in few slots: the rest of the queue, however long, waits outside of the engine.

The engine needs a slot for each request that runs, and for those that the next iterations may admit. All others wait in
order of arrival, and a request takes the next slot that becomes free. This is exact as long as the slots hold a request
that still waits. With slots for twice `max_num_seqs` requests they always do: one iteration ends at most
`max_num_seqs` of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxroute.serving.engine import SiteState, SlotStatus, advance, enqueue, head_ready, slot_status
from jaxroute.serving.site import Site

# While the last requests are served, times are counted from a new now every second, and stay small and exact.
_STRETCH = 1.0
# More than rounding moves the end of an iteration, and less than an iteration takes.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-7
_FAR = 1e20


class Outcomes(NamedTuple):
    """What each request met, in s after its arrival."""

    ttft: Float[Array, "request lane"]
    """Time to first token."""
    latency: Float[Array, "request lane"]
    """Time to the last token."""
    crowded: Bool[Array, "lane"]
    """Whether all who had a slot ever ran while others waited for one: with more slots, more might have run."""


class _Progress(NamedTuple):
    """A replay between two steps."""

    state: SiteState
    following: Int[Array, "lane"]
    """The next request to get a slot."""
    until_arrival: Float[Array, "lane"]
    """Time until it arrives, s; negative if it is waiting already."""
    ttft: Float[Array, "row lane"]
    latency: Float[Array, "row lane"]
    crowded: Bool[Array, "lane"]


@jax.jit
def serve(
    site: Site,
    start: SiteState,
    gaps: Float[Array, "request"],
    prompts: Int[Array, "request"],
    outputs: Int[Array, "request"],
) -> Outcomes:
    """Let each server of a site serve all requests, independently of the others, until the last one has ended.

    Args:
        site: a server per lane. `max_waiting` has no effect: no request is rejected.
        start: the servers at the beginning. A request that is there already has the number R.
        gaps: time from one arrival to the next, the first from the beginning, s. Below 0 if a request arrived before
            that.
        prompts: prompt tokens, R requests; together with the output tokens at most `kv_capacity`.
        outputs: output tokens.
    """
    num_requests, num_lanes = gaps.shape[0], site.num_experts
    num_slots = start.slots.request.shape[-1]
    lane = jnp.arange(num_lanes)[:, None]

    def step(now: _Progress) -> _Progress:
        left = now.following < num_requests
        full = _num_active(now.state) == num_slots
        waits = left & full & (now.until_arrival <= 0)
        to_arrival = jnp.maximum(now.until_arrival, 0.0)
        gap = jnp.where(left, jnp.where(waits, _to_change(site, now.state), to_arrival), _STRETCH)
        state = advance(site, now.state, gap)
        crowded = now.crowded | (waits & (state.num_waiting == 0))

        slots = state.slots
        row = jnp.where(slot_status(state) == SlotStatus.ENDED, slots.request, num_requests)
        until_arrival = now.until_arrival - gap
        enters = left & (until_arrival <= 0) & (_num_active(state) < num_slots)
        request = jnp.minimum(now.following, num_requests - 1)
        # It came as long ago as it has waited for a slot.
        state, _ = enqueue(state, enters, request, prompts[request], outputs[request], age=-until_arrival)
        following = now.following + enters
        gap_to_next = gaps[jnp.minimum(following, num_requests - 1)]
        return _Progress(
            state,
            following,
            jnp.where(enters, until_arrival + gap_to_next, until_arrival),
            now.ttft.at[row, lane].set(slots.ttft),
            now.latency.at[row, lane].set(slots.latency),
            crowded,
        )

    def unfinished(now: _Progress) -> Bool[Array, ""]:
        return jnp.any(now.following < num_requests) | jnp.any(_num_active(now.state) > 0)

    # One row more takes what belongs to no request.
    unknown = jnp.full((num_requests + 1, num_lanes), jnp.nan, jnp.float32)
    nobody, none = jnp.zeros(num_lanes, jnp.int32), jnp.zeros(num_lanes, bool)
    first = _Progress(start, nobody, jnp.full(num_lanes, gaps[0]), unknown, unknown, none)
    last = jax.lax.while_loop(unfinished, step, first)
    return Outcomes(last.ttft[:num_requests], last.latency[:num_requests], last.crowded)


def _num_active(state: SiteState) -> Int[Array, "lane"]:
    return state.num_running + state.num_waiting


def _to_change(site: Site, state: SiteState) -> Float[Array, "lane"]:
    """Time to just after the first iteration at whose end a request may be admitted or may end, s."""
    # Whoever came during an iteration may be admitted after it; whoever was there before it was turned away.
    iterations = jnp.where(head_ready(site, state) > state.clock, 1, state.max_iterations).astype(jnp.float32)
    end = state.clock + iterations * state.duration + state.growth * (iterations * (iterations - 1) / 2)
    # Without an iteration in progress, the next one begins now.
    end = jnp.where(end < _FAR, jnp.maximum(end, 0.0), 0.0)
    return end * (1 + _RELATIVE) + _ABSOLUTE

"""What a router believes of the experts: who is where, who runs, and how far each request is.

The gateway tells little: where it sent a request, when the first and the last token came back, and perhaps how far
the expert is. The rest is inferred at each event, as docs/how-to/export.md says. All requests live in one array,
(field, slot, expert), in the order in which they were sent to their expert, so that an event costs a few NumPy
operations.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxroute.errors import UserError
from jaxroute.gateway.artefact import FIELDS, LIMIT_FIELDS
from jaxroute.serving import Site
from jaxroute.workloads.limits import Limits

_UNTOLD = -1


class _Held(NamedTuple):
    """What is kept of each request at an expert; each a row of one array (field, slot, expert)."""

    # As the batch has it, in its order.
    first_token: Any
    """Time from its first arrival to its first token, s; 0 if there was none yet."""
    predicted_quality: Any
    predicted_output_tokens: Any
    ttft_limit: Any
    tpot_limit: Any
    e2e_limit: Any
    normalised_limit: Any
    prompt_tokens: Any
    arrived: Any
    """First arrival at the gateway, s."""
    ready: Any
    """When it reaches the expert, s."""
    generated: Any
    """Output tokens so far; not whole where they are inferred."""
    missing: Any
    """Tokens whose KV is not held: 1 for a request that decodes."""
    prefilled: Any
    """When its first token is due, s; infinite until it has been seen in the batch."""
    told: Any
    """1 if it is known to run, 0 to wait, `_UNTOLD` otherwise."""


# Rows of the two arrays, by name.
_HELD = _Held(*range(len(_Held._fields)))
_BATCH = {name: row for row, name in enumerate(FIELDS["batch"])}


class Loads(NamedTuple):
    """How busy each expert is believed to be."""

    running: Int[np.ndarray, "expert"]
    waiting: Int[np.ndarray, "expert"]
    kv_tokens: Float[np.ndarray, "expert"]


class Belief:
    """What is known and inferred of the requests at each expert.

    Times are seconds. Every method that takes an id raises `UserError` if no expert has its request.
    """

    def __init__(self, site: Site, slots: int) -> None:
        """Start with an idle site, given as NumPy arrays; `slots` requests of each expert are shown to the network."""
        num_experts = site.num_experts
        self._site, self._slots = site, slots
        self._expert: dict[Hashable, int] = {}
        self._queues: list[list[Hashable]] = [[] for _ in range(num_experts)]
        self._held = np.zeros((len(_Held._fields), slots, num_experts))
        self._there = np.zeros((slots, num_experts), bool)
        self._running = self._there.copy()
        self._batch = np.zeros((len(_BATCH), slots, num_experts), np.float32)
        self._now = -math.inf
        self._pace = site.iteration_overhead + site.weight_load
        """Time of an iteration of each expert's batch as it is, s."""

    # --- What happens to requests ---------------------------------------------------------------------------

    def expert_of(self, request_id: Hashable) -> int | None:
        """Return the expert that has the request; None if none has."""
        return self._expert.get(request_id)

    def add(
        self,
        request_id: Hashable,
        expert: int,
        *,
        limits: Limits,
        predicted_quality: float,
        predicted_output_tokens: float,
        prompt_tokens: int,
        arrived: float,
    ) -> None:
        """Put a request, sent now, at the end of an expert's queue; `arrived` is its first arrival at the gateway.

        All limits are numbers, infinite where the request has none.
        """
        queue = self._queues[expert]
        if len(queue) == self._held.shape[1]:
            # More requests than the site's limits allow: the gateway may do that. The network sees the first `slots`.
            more = [(0, 0), (0, len(queue)), (0, 0)]
            self._held, self._batch = np.pad(self._held, more), np.pad(self._batch, more)
            self._there = np.pad(self._there, more[1:])
        self._held[:, len(queue), expert] = _Held(
            first_token=0,
            predicted_quality=predicted_quality,
            predicted_output_tokens=predicted_output_tokens,
            **dict(zip(LIMIT_FIELDS, limits, strict=True)),
            prompt_tokens=prompt_tokens,
            arrived=arrived,
            ready=self._now + self._site.network_delay[expert],
            generated=0,
            missing=prompt_tokens,
            prefilled=math.inf,
            told=_UNTOLD,
        )
        self._there[len(queue), expert] = True
        queue.append(request_id)
        self._expert[request_id] = expert

    def remove(self, request_id: Hashable) -> None:
        """Forget a request that has ended."""
        slot, expert = self._place(request_id)
        queue = self._queues[expert]
        self._held[:, slot : len(queue) - 1, expert] = self._held[:, slot + 1 : len(queue), expert]
        del queue[slot], self._expert[request_id]
        self._there[len(queue), expert] = False

    def remove_all(self, expert: int) -> list[Hashable]:
        """Forget all requests of an expert; returns their ids, in the order of its queue."""
        ids, self._queues[expert] = self._queues[expert], []
        self._there[:, expert] = False
        for request_id in ids:
            del self._expert[request_id]
        return ids

    def first_token(self, request_id: Hashable, now: float) -> None:
        """The first token has come back to the gateway."""
        at = self._place(request_id)
        self.advance(now)
        expert = at[1]
        # The token has been on its way, and the expert has gone on since.
        since = self._site.network_delay[expert] / self._pace[expert]
        self._held[(_HELD.first_token, *at)] = now - self._held[(_HELD.arrived, *at)]
        self._held[(_HELD.generated, *at)] = 1 + since
        self._held[(_HELD.missing, *at)] = 1
        self._held[(_HELD.told, *at)] = _UNTOLD

    def progress(
        self, request_id: Hashable, now: float, *, generated: int, kv_tokens: int | None, running: bool | None
    ) -> None:
        """The expert has got this far; arguments are those of `Router.progress`."""
        at = self._place(request_id)
        self.advance(now)
        total = self._held[(_HELD.prompt_tokens, *at)] + generated
        if kv_tokens is None:
            kv_tokens = total - 1 if generated and running is not False else 0
        first = _HELD.first_token, *at
        if not generated:
            self._held[first] = 0
        elif not self._held[first]:
            # Sooner than expected.
            self._held[first] = now + self._site.network_delay[at[1]] - self._held[(_HELD.arrived, *at)]
        self._held[(_HELD.generated, *at)] = generated
        self._held[(_HELD.missing, *at)] = max(total - kv_tokens, 1)
        self._held[(_HELD.prefilled, *at)] = math.inf
        self._held[(_HELD.told, *at)] = _UNTOLD if running is None else running

    def age(self, request_id: Hashable, now: float) -> float:
        """Time since the request's first arrival, s."""
        return float(now - self._held[(_HELD.arrived, *self._place(request_id))])

    def _place(self, request_id: Hashable) -> tuple[int, int]:
        """Return slot and expert of a request."""
        expert = self._expert.get(request_id)
        if expert is None:
            raise UserError(f"request {request_id!r} is at no expert; it has ended, was sent away, or was never routed")
        return self._queues[expert].index(request_id), expert

    # --- What is inferred -----------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let the experts decode until now, at the pace of their batch (docs/reference/semantics.md, step 4).

        Raises:
            UserError: the clock goes back; nothing has changed then.
        """
        gap = now - self._now
        if not gap >= 0 or now == math.inf:
            raise UserError(f"the clock goes back: now={now} comes after now={self._now}")
        self._now = now
        held, site = self._held, self._site
        self._running = running = self._in_batch(now)
        missing, generated, prefilled = (held[row] for row in (_HELD.missing, _HELD.generated, _HELD.prefilled))
        decoding = running & (missing == 1)
        num_seqs = decoding.sum(0)
        context = ((held[_HELD.prompt_tokens] + generated) * decoding).sum(0)
        self._pace = pace = site.iteration_time(num_seqs, num_seqs, context)
        if not 0 < gap < math.inf:
            return
        generated += decoding * (gap / pace)
        prefilling = running & (missing > 1)
        if not prefilling.any():
            return
        new = prefilling & (prefilled == math.inf)
        # On average, half an iteration is left when it comes; then follows the one that completes its prefill.
        decode = np.maximum(site.weight_load, site.compute_per_token * num_seqs)
        stall = np.maximum(site.compute_per_token * ((missing * new).sum(0) + num_seqs) - decode, 0)
        np.copyto(prefilled, np.maximum(now - gap, held[_HELD.ready]) + 1.5 * pace + stall, where=new)
        due = prefilling & (prefilled <= now)
        np.add(generated, 1 + (now - prefilled) / pace, out=generated, where=due)
        first = held[_HELD.first_token]
        np.copyto(first, prefilled + site.network_delay - held[_HELD.arrived], where=due & (first == 0))
        missing[due] = 1

    def _in_batch(self, now: float) -> Bool[np.ndarray, "slot expert"]:
        """Return who is in the batch: those known to be, and the first to come, as seats and memory allow."""
        held, site = self._held, self._site
        told = held[_HELD.told]
        candidate = self._there & (told != 0)
        place = candidate.cumsum(0)
        tokens = (candidate * (held[_HELD.prompt_tokens] + held[_HELD.generated])).cumsum(0)
        fits = (place <= site.max_num_seqs) & ((tokens <= site.kv_capacity) | (place == 1))
        return candidate & ((told == 1) | (fits & (held[_HELD.ready] <= now)))

    def loads(self) -> Loads:
        """Return how busy the experts are, as of the latest `advance`."""
        # Requests may have come or gone since.
        running = self._in_batch(self._now)
        tokens = np.maximum(
            self._held[_HELD.prompt_tokens] + self._held[_HELD.generated] - self._held[_HELD.missing], 0
        )
        return Loads(running.sum(0), (self._there & ~running).sum(0), (running * tokens).sum(0))

    def batch(self) -> Float[np.ndarray, "field slot expert"]:
        """Return the fields of a `Batch` as of the latest `advance`, float32; the next call overwrites it."""
        held, batch, running = self._held, self._batch, self._running
        generated = np.floor(held[_HELD.generated])
        batch[_BATCH["running"]] = running
        batch[_BATCH["waiting"]] = self._there & ~running
        batch[_BATCH["prompt_tokens"]] = held[_HELD.prompt_tokens]
        batch[_BATCH["computed"]] = running * (held[_HELD.prompt_tokens] + generated - held[_HELD.missing])
        batch[_BATCH["generated"]] = generated
        batch[_BATCH["age"]] = self._now - held[_HELD.arrived]
        # The others come in the same order.
        batch[_BATCH["first_token"] :] = held[: _HELD.prompt_tokens]
        return batch[:, : self._slots]

"""A trained router in a gateway: it is told what happens to requests, and says where to send the next one.

`Router.load` reads what `python -m jaxroute export` wrote. The router keeps the observation graph itself, on the host:
who is where, for how long, and what is left of it. What the gateway does not tell is
inferred, as docs/how-to/export.md says.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jaxtyping import Bool, Float

from jaxroute.env.environment import ARRIVAL_WINDOW, LATENCY_WINDOW
from jaxroute.env.types import Batch
from jaxroute.errors import UserError
from jaxroute.gateway.artefact import FIELDS, MANIFEST, compile_decision, load_predictor, read_manifest
from jaxroute.serving import ExpertConfig, SiteConfig, build_site

_BATCH = Batch(*range(len(Batch._fields)))


class _Held(NamedTuple):
    """What is kept of each request at an expert; each a row of one array (field, slot, expert)."""

    # As the batch has it, in its order.
    latency_requirement: Any
    predicted_quality: Any
    predicted_output_tokens: Any
    prompt_tokens: Any
    arrived: Any
    """First arrival at the gateway, s."""
    ready: Any
    """When it reaches the expert, s."""
    generated: Any
    """Output tokens so far; between whole ones where that is inferred."""
    missing: Any
    """Tokens whose KV is not held: 1 for a request that decodes."""
    prefilled: Any
    """When its first token is due, s; infinite as long as it has not been seen in the batch."""
    told: Any
    """1 if it is known to run, 0 to wait, `_UNTOLD` otherwise."""


_HELD = _Held(*range(len(_Held._fields)))
_UNTOLD = -1


class Router:
    """Route the requests of one gateway; not for several threads at once.

    Times are seconds of any clock that does not go back. Experts are numbered as in `experts`. A request's id may be
    anything that a dictionary takes as a key, and may be used again once its request has ended.
    """

    experts: list[str]
    """What the number of an expert stands for: its LLM and accelerator."""
    logits: Float[np.ndarray, "expert"]
    """Scores of the latest decision, the chosen expert's the highest; -1e9 for those that are down or full."""

    def __init__(
        self,
        site: SiteConfig,
        log_length_error: Sequence[float],
        slots: int,
        rate: float,
        decide: Callable[..., Any],
        predict: Callable[[str], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        """Start with an idle site; use `load`.

        `decide` is the exported function, without its first argument; `predict` returns (expert,) arrays.
        """
        self.experts = [expert.label for expert in site.experts]
        self._site = jax.tree.map(lambda column: np.asarray(column, np.float64), build_site(site))
        self._slots = slots
        self._decide, self._predict = decide, predict
        num_experts = len(self.experts)
        self._where: dict[Hashable, int] = {}
        self._queues: list[list[Hashable]] = [[] for _ in range(num_experts)]
        self._held = np.zeros((len(_Held._fields), slots, num_experts))
        self._batch = np.zeros((len(FIELDS["batch"]), slots, num_experts), np.float32)
        self._experts = np.zeros((len(FIELDS["experts"]), num_experts), np.float32)
        self._arrival = np.zeros(len(FIELDS["arrival"]), np.float32)
        self._up = np.ones(num_experts, bool)
        self._there = np.zeros((slots, num_experts), bool)
        self._iteration_time = self._site.iteration_overhead + self._site.weight_load
        self._mean_gap = 1 / rate
        self._latency = np.zeros((2, num_experts))  # discounted sum and count
        self._ended = np.zeros((2, num_experts))  # since the latest decision
        self.logits = np.full(num_experts, np.nan, np.float32)
        self._now = -math.inf
        self._last_arrival: float | None = None
        self._last_decision: float | None = None

    @classmethod
    def load(cls, folder: str | Path, *, rate: float | None = None, platform: str = "cpu") -> Router:
        """Read and compile an exported router.

        Args:
            folder: what `python -m jaxroute export` wrote.
            rate: requests per second to expect at the start, that of the export by default; it is soon forgotten.
            platform: cpu, which decides fastest, or cuda.

        Raises:
            UserError: the folder is incomplete, damaged, or of another version.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        try:
            experts = [ExpertConfig(**expert) for expert in manifest["site"]["experts"]]
            site = SiteConfig(manifest["site"]["name"], experts)
            errors, slots = [float(error) for error in manifest["log_length_error"]], int(manifest["slots"])
            expected = float(manifest["rate"]) if rate is None else rate
            columns = manifest["predictor"]
            table = build_site(site)
            rows = [getattr(table, name) for name in FIELDS["site"][:-1]] + [errors]
            values = np.stack([np.asarray(row, np.float32) for row in rows])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error}); export the router again") from None
        if not 0 < expected < math.inf:
            raise UserError(f"rate={expected} must be above 0 requests per second, and finite")
        decide = compile_decision(folder, values, slots, platform, f"jax {manifest.get('jax')}")
        return cls(site, errors, slots, expected, decide, load_predictor(folder, columns) if columns else None)

    def route(
        self,
        request_id: Hashable,
        *,
        now: float,
        prompt_tokens: int,
        latency_requirement: float,
        predicted_quality: Sequence[float] | Float[np.ndarray, "expert"] | None = None,
        predicted_output_tokens: Sequence[float] | Float[np.ndarray, "expert"] | None = None,
        prompt: str | None = None,
        arrived: float | None = None,
    ) -> int:
        """Choose the expert of an arriving request; from now on the request counts as being there.

        Args:
            request_id: a new one.
            now: s.
            prompt_tokens: at least 1.
            latency_requirement: s per output token.
            predicted_quality: at each expert, from 0 to 1.
            predicted_output_tokens: at each expert, the median.
            prompt: its text, in the place of both predictions, if the router was exported with a predictor.
            arrived: when it arrived first, if an expert has given it back; it does not count as an arrival then.

        Returns:
            The expert's number. Every expert may be full: then one of them, which may refuse (`rejected`).

        Raises:
            UserError: a value out of range, an id that is taken, a clock that goes back.
        """
        if request_id in self._where:
            raise UserError(
                f"request {request_id!r} is at expert {self._where[request_id]} already; report its end first"
            )
        if prompt_tokens < 1 or not 0 < latency_requirement < math.inf:
            raise UserError(
                f"request {request_id!r}: prompt_tokens={prompt_tokens} must be at least 1, and "
                f"latency_requirement={latency_requirement} above 0 s per token"
            )
        if arrived is not None and not -math.inf < arrived <= now:
            raise UserError(f"request {request_id!r}: arrived={arrived} must not be later than now={now}")
        quality, length = self._predictions(request_id, predicted_quality, predicted_output_tokens, prompt)
        self._advance(now)
        self._note_arrival(now, again=arrived is not None)
        arrived = now if arrived is None else arrived
        self._look(now)
        sums, counts = self._latency
        self._experts[0] = sums / np.maximum(counts, 1e-6)
        self._experts[1] = self._up
        self._experts[2] = quality
        self._experts[3] = length
        self._arrival[:] = prompt_tokens, latency_requirement, now - arrived, self._mean_gap
        chosen, logits = self._decide(self._batch[:, : self._slots], self._experts, self._arrival)
        self.logits = np.asarray(logits)
        expert = int(chosen)
        self._register(
            request_id,
            expert,
            _Held(
                latency_requirement=latency_requirement,
                predicted_quality=quality[expert],
                predicted_output_tokens=length[expert],
                prompt_tokens=prompt_tokens,
                arrived=arrived,
                ready=now + self._site.network_delay[expert],
                generated=0,
                missing=prompt_tokens,
                prefilled=math.inf,
                told=_UNTOLD,
            ),
        )
        return expert

    def rejected(self, request_id: Hashable) -> None:
        """The expert has refused the request.

        Raises:
            UserError: an unknown id.
        """
        self._remove(request_id)

    def first_token(self, request_id: Hashable, *, now: float) -> None:
        """The first token of the answer has arrived.

        Raises:
            UserError: an unknown id, a clock that goes back.
        """
        at = self._at(request_id)
        self._advance(now)
        expert = at[1]
        # It has been on its way, and the expert has gone on.
        since = self._site.network_delay[expert] / self._iteration_time[expert]
        self._held[(_HELD.generated, *at)] = 1 + since
        self._held[(_HELD.missing, *at)] = 1
        self._held[(_HELD.told, *at)] = _UNTOLD

    def progress(
        self,
        request_id: Hashable,
        *,
        now: float,
        generated: int,
        kv_tokens: int | None = None,
        running: bool | None = None,
    ) -> None:
        """How far the expert is with a request, as far as the gateway knows.

        Args:
            request_id: of a request at an expert.
            now: when it was so far, s.
            generated: output tokens so far.
            kv_tokens: tokens whose KV the expert holds; by default all but the latest, once there is one.
            running: whether it is in the batch, or else in the queue, which is believed until told otherwise or the
                first token; by default it is inferred.

        Raises:
            UserError: an unknown id, a count below 0, a clock that goes back.
        """
        at = self._at(request_id)
        if generated < 0 or (kv_tokens is not None and kv_tokens < 0):
            raise UserError(
                f"request {request_id!r}: generated={generated} and kv_tokens={kv_tokens} must not be negative"
            )
        self._advance(now)
        total = self._held[(_HELD.prompt_tokens, *at)] + generated
        if kv_tokens is None:
            kv_tokens = total - 1 if generated and running is not False else 0
        self._held[(_HELD.generated, *at)] = generated
        self._held[(_HELD.missing, *at)] = max(total - kv_tokens, 1)
        self._held[(_HELD.prefilled, *at)] = math.inf
        self._held[(_HELD.told, *at)] = _UNTOLD if running is None else running

    def finished(self, request_id: Hashable, *, now: float, output_tokens: int) -> None:
        """The last token of the answer has arrived.

        Raises:
            UserError: an unknown id, fewer than 1 token, a clock that goes back.
        """
        slot, expert = self._at(request_id)
        if output_tokens < 1:
            raise UserError(f"request {request_id!r}: output_tokens={output_tokens} must be at least 1")
        self._advance(now)
        self._ended[:, expert] += (now - self._held[_HELD.arrived, slot, expert]) / output_tokens, 1
        self._remove(request_id)

    def failed(self, request_id: Hashable) -> None:
        """The request has ended without an answer: it was cancelled, or went wrong.

        Raises:
            UserError: an unknown id.
        """
        self._remove(request_id)

    def expert_down(self, expert: int) -> list[Hashable]:
        """The expert does not serve any more, and has forgotten its requests, and so does the router.

        Returns:
            Their ids. They may be routed again, with `arrived`.

        Raises:
            UserError: an unknown expert.
        """
        expert = self._number(expert)
        lost = self._queues[expert]
        self._queues[expert] = []
        self._there[:, expert] = False
        for request_id in lost:
            del self._where[request_id]
        self._up[expert] = False
        return lost

    def expert_up(self, expert: int) -> None:
        """The expert serves again, idle.

        Raises:
            UserError: an unknown expert.
        """
        self._up[self._number(expert)] = True

    # --- What is known --------------------------------------------------------------------------------------

    def _number(self, expert: int) -> int:
        try:
            number = operator.index(expert)
        except TypeError:
            number = -1
        if not 0 <= number < len(self.experts):
            raise UserError(f"expert {expert!r} is unknown; experts are numbered from 0 to {len(self.experts) - 1}")
        return number

    def _at(self, request_id: Hashable) -> tuple[int, int]:
        """Return slot and expert of a request."""
        expert = self._where.get(request_id)
        if expert is None:
            raise UserError(f"request {request_id!r} is at no expert; it has ended, or was never routed")
        return self._queues[expert].index(request_id), expert

    def _register(self, request_id: Hashable, expert: int, held: _Held) -> None:
        queue = self._queues[expert]
        if len(queue) == self._held.shape[1]:
            # More than the site's limits let in: the gateway's business. The network sees the first ones.
            more = [(0, 0), (0, len(queue)), (0, 0)]
            self._held, self._batch = np.pad(self._held, more), np.pad(self._batch, more)
            self._there = np.pad(self._there, more[1:])
        self._held[:, len(queue), expert] = held
        queue.append(request_id)
        self._where[request_id] = expert
        self._there[len(queue) - 1, expert] = True

    def _remove(self, request_id: Hashable) -> None:
        slot, expert = self._at(request_id)
        queue = self._queues[expert]
        self._held[:, slot : len(queue) - 1, expert] = self._held[:, slot + 1 : len(queue), expert]
        del queue[slot], self._where[request_id]
        self._there[len(queue), expert] = False

    def _predictions(
        self, request_id: Hashable, quality: Any, length: Any, prompt: str | None
    ) -> tuple[Float[np.ndarray, "expert"], Float[np.ndarray, "expert"]]:
        where = f"request {request_id!r}"
        if prompt is not None:
            if self._predict is None:
                raise UserError(f"{where}: this router has no predictor; give both predictions, or export it with one")
            if quality is not None or length is not None:
                raise UserError(f"{where}: give the prompt or predictions, not both")
            quality, length = self._predict(prompt)
        quality, length = (np.asarray([] if values is None else values, float) for values in (quality, length))
        if quality.shape != self._up.shape or length.shape != self._up.shape:
            raise UserError(
                f"{where}: predicted_quality has shape {quality.shape} and predicted_output_tokens {length.shape}; "
                f"give a value for each of the {len(self.experts)} experts"
            )
        if not ((quality >= 0) & (quality <= 1) & (length > 0) & (length < math.inf)).all():
            raise UserError(
                f"{where}: predicted_quality {quality.tolist()} must lie from 0 to 1, and predicted_output_tokens "
                f"{length.tolist()} be above 0"
            )
        return quality, length

    def _note_arrival(self, now: float, *, again: bool) -> None:
        """Update the recent arrival rate and the recent latencies, as the environment does."""
        if not again:
            if self._last_arrival is not None:
                self._mean_gap += (now - self._last_arrival - self._mean_gap) / ARRIVAL_WINDOW
            self._last_arrival = now
        if self._last_decision is not None:
            self._latency *= math.exp((self._last_decision - now) / LATENCY_WINDOW)
        self._latency += self._ended
        self._ended[:] = 0
        self._last_decision = now

    # --- What is inferred -----------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Let the experts decode until now, at the pace of their batch (docs/reference/semantics.md, step 4)."""
        gap = now - self._now
        if not gap >= 0 or now == math.inf:
            raise UserError(f"the clock goes back: now={now} comes after now={self._now}")
        self._now = now
        held, site = self._held, self._site
        self._running = running = self._batched(now)
        missing, generated, prefilled = (held[row] for row in (_HELD.missing, _HELD.generated, _HELD.prefilled))
        decoding = running & (missing == 1)
        num_seqs = decoding.sum(0)
        context = ((held[_HELD.prompt_tokens] + generated) * decoding).sum(0)
        compute = np.maximum(site.weight_load, site.compute_per_token * num_seqs)
        self._iteration_time = pace = (
            site.iteration_overhead + compute + site.decode_per_seq * num_seqs + site.attention_per_token * context
        )
        if not 0 < gap < math.inf:
            return
        generated += decoding * (gap / pace)
        prefilling = running & (missing > 1)
        if not prefilling.any():
            return
        new = prefilling & (prefilled == math.inf)
        # On average half an iteration is left to run when it comes; then one that completes its prefill.
        stall = np.maximum(site.compute_per_token * ((missing * new).sum(0) + num_seqs) - compute, 0)
        np.copyto(prefilled, np.maximum(now - gap, held[_HELD.ready]) + 1.5 * pace + stall, where=new)
        due = prefilling & (prefilled <= now)
        np.add(generated, 1 + (now - prefilled) / pace, out=generated, where=due)
        missing[due] = 1

    def _batched(self, now: float) -> Bool[np.ndarray, "slot expert"]:
        """Return who is in the batch: who is known to be, and the first to come as far as seats and memory reach."""
        held, site = self._held, self._site
        told = held[_HELD.told]
        candidate = self._there & (told != 0)
        place = candidate.cumsum(0)
        tokens = (candidate * (held[_HELD.prompt_tokens] + held[_HELD.generated])).cumsum(0)
        fits = (place <= site.max_num_seqs) & ((tokens <= site.kv_capacity) | (place == 1))
        return candidate & ((told == 1) | (fits & (held[_HELD.ready] <= now)))

    def _look(self, now: float) -> None:
        """Write what is known and inferred of the requests as the exported function takes it."""
        held, batch, running = self._held, self._batch, self._running
        generated = np.floor(held[_HELD.generated])
        batch[_BATCH.running] = running
        batch[_BATCH.waiting] = self._there & ~running
        batch[_BATCH.prompt_tokens] = held[_HELD.prompt_tokens]
        batch[_BATCH.computed] = running * (held[_HELD.prompt_tokens] + generated - held[_HELD.missing])
        batch[_BATCH.generated] = generated
        batch[_BATCH.age] = now - held[_HELD.arrived]
        # Three fields in the same order.
        batch[_BATCH.latency_requirement :] = held[: _HELD.prompt_tokens]


# --- Reading an export --------------------------------------------------------------------------------------

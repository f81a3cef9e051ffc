"""The guard around a policy: a rule decides where the policy fails, is late, or meets what it was not trained on.

A trained policy runs in a thread of its own, so that one that hangs holds up no request for longer than its deadline. A
rule is what the fallback is, and needs none.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxroute.gateway.artefact import FIELDS

RAISED, LATE, OUTSIDE = "raised", "late", "outside training"
"""Why the fallback decided."""

_ARRIVAL = {name: row for row, name in enumerate(FIELDS["arrival"])}
_EXPERTS = {name: row for row, name in enumerate(FIELDS["experts"])}
_SITE = {name: row for row, name in enumerate(FIELDS["site"])}
# The rate is a mean over some hundreds of arrivals, and varies by chance.
_TOLERANCE = 1.25


class Trained(NamedTuple):
    """The greatest of what a policy has met in training."""

    experts: int
    load: float
    """Requests per second over the tokens per second of the site's full batches."""
    prompt_tokens: int
    output_tokens: float

    def breach(self, site: np.ndarray, experts: np.ndarray, arrival: np.ndarray) -> str | None:
        """Return what is greater than anything in training, or None; arguments are those of a decision."""
        num_experts = site.shape[1]
        if num_experts > self.experts:
            return f"{num_experts} experts, and {self.experts} in training"
        prompt = arrival[_ARRIVAL["prompt_tokens"]]
        if prompt > self.prompt_tokens:
            return f"a prompt of {prompt:.0f} tokens, and {self.prompt_tokens} in training"
        length = experts[_EXPERTS["predicted_output_tokens"]].max()
        if length > self.output_tokens:
            return f"an answer of {length:.0f} predicted tokens, and {self.output_tokens:.0f} in training"
        capacity = (experts[_EXPERTS["up"]] * site[_SITE["max_num_seqs"]] / site[_SITE["weight_load"]]).sum()
        load = 1 / max(float(arrival[_ARRIVAL["slow_gap"]]), 1e-9) / max(float(capacity), 1e-9)
        if load > self.load * _TOLERANCE:
            return f"{load / self.load:.1f} times the greatest load in training"
        return None


class Guard:
    """A decision that is always taken, in time, by the policy or else by the fallback."""

    reason: str | None
    """Why the fallback took the latest decision: one of the above; None if the policy took it."""
    detail: str | None
    """The same in more words."""

    def __init__(
        self,
        decide: Callable[..., Any],
        fallback: Callable[..., Any],
        *,
        seconds: float | None,
        site: np.ndarray,
        trained: Trained | None = None,
    ) -> None:
        """Start the policy's thread, if it gets one.

        Args:
            decide: the policy's decision, on arrays as in `FIELDS`; likewise `fallback`.
            fallback: a rule, which is taken to be quick.
            seconds: most time for a decision; None for a rule, which is waited for.
            site: the site's array.
            trained: what the policy was trained on; None trusts it everywhere.
        """
        self._decide, self._fallback, self._seconds = decide, fallback, seconds
        self._site, self._trained = site, trained
        self._orders: queue.SimpleQueue[tuple[np.ndarray, ...] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outstanding = 0
        self.reason = self.detail = None
        # A daemon: a policy that hangs for ever does not keep the process from ending.
        if seconds is not None:
            threading.Thread(target=self._work, name="policy", daemon=True).start()

    def __call__(self, *seen: np.ndarray) -> tuple[Any, Any, Any]:
        """Return action, scores, and the best net value that an expert offers."""
        self.reason, self.detail, answer = self._ask(seen)
        if self.reason is None:
            return answer
        return self._fallback(*seen)

    def close(self) -> None:
        """End the policy's thread, once it has ended what it is at."""
        self._orders.put(None)

    def warm_up(self, slots: int) -> None:
        """Take a decision of each at an idle site, however long that takes."""
        num_experts = self._site.shape[1]
        batch, experts, arrival = (np.zeros(len(FIELDS[name]), np.float32) for name in ("batch", "experts", "arrival"))
        arrival[:] = 1
        idle = np.zeros((len(batch), slots, num_experts), np.float32), np.ones((len(experts), num_experts), np.float32)
        self._decide(*idle, arrival)
        self._fallback(*idle, arrival)

    def _ask(self, seen: tuple[np.ndarray, ...]) -> tuple[str | None, str | None, Any]:
        if self._trained is not None and (breach := self._trained.breach(self._site, seen[1], seen[2])):
            return OUTSIDE, breach, None
        if self._seconds is None:
            answer = self._checked(seen)
            return (RAISED, _said(answer), None) if isinstance(answer, Exception) else (None, None, answer)
        while self._outstanding:
            # It was late; is it done by now?
            try:
                self._answers.get_nowait()
            except queue.Empty:
                return LATE, "an earlier decision is still being taken", None
            self._outstanding -= 1
        # Copies: it may still look at them when the next request comes.
        self._orders.put(tuple(array.copy() for array in seen))
        try:
            answer = self._answers.get(timeout=self._seconds)
        except queue.Empty:
            self._outstanding += 1
            return LATE, f"no decision within {self._seconds * 1000:g} ms", None
        if isinstance(answer, Exception):
            return RAISED, _said(answer), None
        return None, None, answer

    def _work(self) -> None:
        while (seen := self._orders.get()) is not None:
            self._answers.put(self._checked(seen))

    def _checked(self, seen: tuple[np.ndarray, ...]) -> tuple[int, np.ndarray, float] | Exception:
        """Return the policy's decision, or what it raised."""
        try:
            return _on_host(self._decide(*seen), self._site.shape[1])
        except Exception as error:  # whatever it is, the fallback decides
            return error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _on_host(answer: Any, num_experts: int) -> tuple[int, np.ndarray, float]:
    """Return a decision as numbers of the host.

    Raises:
        ValueError: it is no action, or a score is not a number.
    """
    action, scores, net = answer
    number, values = int(action), np.asarray(scores)
    if not 0 <= number < len(values) or len(values) not in (num_experts, num_experts + 1):
        raise ValueError(f"action {number} of {len(values)}")
    if np.isnan(values).any():
        raise ValueError("scores that are not numbers")
    return number, values, float(net)

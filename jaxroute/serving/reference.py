"""The serving semantics in plain Python, one iteration at a time: the place to start reading.

The engine (`jaxroute.serving.engine`) skips events and runs in float32 on a device. This module does neither: it uses
float64 and absolute times, it is meant to be believed by reading, and it shares no code with the engine. Tests hold the
engine to it.

Read it in this order; docs/reference/semantics.md says the same in words, and "step n" in the comments is its step n.

1. `Request`: what an expert remembers of a request. `need` and `decoding` are what every later step turns on.
2. `Expert.schedule`: steps 1 to 4, who takes part in the next iteration and how long it takes. It calls `share_tokens`
   (the token budget) and `kv_in_use` (the memory).
3. `Expert.apply`: step 5, what counts when the iteration ends.
4. `Expert.arrive` and `Expert.advance`: what happens between two arrivals, and when a request is rejected.
5. `simulate`: all requests, each at the expert that it is assigned to.

Then read the engine: it keeps the requests of an expert in slots in the order of `running` followed by `waiting`, and
applies many iterations at once while `schedule` would decide the same.

Conventions where the semantics leave a choice:

- `ttft` and `latency` are measured at the expert, from the request's arrival at the router: they contain the network
  delay to the expert, but not the way back. They are nan if the request was rejected.
- An iteration that starts at clock c sees every request that is ready by c, including one that arrives at c. So at an
  arrival at time T, iterations that end at or before T have been applied, and only iterations that start strictly
  before T have a fixed schedule.
- Only sequences that are scheduled (n > 0) count as decoding in the cost of an iteration.
- Every expert runs on after the last arrival until it is empty.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

COMPLETED, REJECTED = 0, 1


@dataclass
class Request:
    """A request at its expert; times in s, lengths in tokens."""

    index: int
    arrival: float  # at the router
    ready: float  # when it has crossed the network
    prompt: int
    output: int
    computed: int = 0  # KV tokens held
    generated: int = 0  # output tokens so far
    preemptions: int = 0
    first_token: float = math.nan
    finish: float = math.nan

    @property
    def need(self) -> int:
        """Tokens still to compute before the next one can be emitted."""
        return self.prompt + self.generated - self.computed

    @property
    def decoding(self) -> bool:
        """Whether its next step computes one token and emits the next."""
        return self.computed >= self.prompt and self.need == 1


@dataclass(frozen=True)
class Iteration:
    """One iteration as it was scheduled, for tests of invariants. Requests are given by their index."""

    expert: int
    start: float
    end: float
    running: tuple[int, ...]  # in order of admission
    computed: tuple[int, ...]  # of each running request, at the start
    tokens: tuple[int, ...]  # scheduled for each running request
    decoding: tuple[bool, ...]
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    waiting: tuple[int, ...]  # what is left in the queue, head first


@dataclass(frozen=True)
class Result:
    """Outcomes per request (R,) and totals per expert (N,)."""

    status: np.ndarray
    ttft: np.ndarray
    latency: np.ndarray
    preemptions: np.ndarray
    iterations: np.ndarray
    busy_seconds: np.ndarray
    closest_call: float  # s; see `simulate`


@dataclass
class Expert:
    """One expert: its limits, its queue and its running batch."""

    index: int
    iteration_overhead: float
    weight_load: float
    compute_per_token: float
    decode_per_seq: float
    attention_per_token: float
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    kv_capacity: int
    network_delay: float

    clock: float = -math.inf  # end of the last iteration that was applied
    running: list[Request] = field(default_factory=list)  # in order of admission
    waiting: deque[Request] = field(default_factory=deque)  # preempted ones in front
    tokens: list[int] = field(default_factory=list)  # n of each running request in the current iteration
    current: Iteration | None = None  # scheduled, but not ended yet
    log: list[Iteration] = field(default_factory=list)

    def arrive(self, request: Request) -> bool:
        """Receive a request that the router has sent here now; returns whether it is accepted."""
        self.advance(request.arrival)
        if len(self.waiting) >= self.max_waiting or request.prompt + request.output > self.kv_capacity:
            return False
        self.waiting.append(request)
        return True

    def advance(self, until: float) -> None:
        """Apply iterations that end at or before `until`; schedule those that start strictly before it."""
        while True:
            if self.current is None:
                if not self.running and not self.waiting:
                    return
                # Step 0: an idle expert jumps to the moment at which the head of the queue is ready.
                start = self.clock if self.running else max(self.clock, self.waiting[0].ready)
                if start >= until:
                    return
                self.schedule(start)
            iteration = self.current
            assert iteration is not None
            if iteration.end > until:
                return
            self.apply(iteration)

    def share_tokens(self) -> None:
        """Step 1: in order of admission, each running request gets what it needs while the budget lasts."""
        left = self.max_num_batched_tokens
        self.tokens = []
        for request in self.running:
            n = min(request.need, left)
            self.tokens.append(n)
            left -= n

    def kv_in_use(self) -> int:
        """KV tokens at the end of the iteration that is being scheduled."""
        return sum(request.computed for request in self.running) + sum(self.tokens)

    def schedule(self, start: float) -> None:
        """Steps 1 to 4: choose who runs, and how long that takes."""
        admitted, preempted = [], []
        self.share_tokens()

        # Step 2: the most recently admitted request gives way, and recomputes everything later.
        while self.kv_in_use() > self.kv_capacity and len(self.running) > 1:
            victim = self.running.pop()
            victim.computed = 0
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            preempted.append(victim.index)
            self.share_tokens()

        # Step 3: first come, first served; the first that cannot be admitted blocks those behind it.
        while not preempted and self.waiting:
            head = self.waiting[0]
            left = self.max_num_batched_tokens - sum(self.tokens)
            n = min(head.need, left)
            if left <= 0 or len(self.running) >= self.max_num_seqs or head.ready > start:
                break
            if self.kv_in_use() + n > self.kv_capacity:
                break
            self.running.append(self.waiting.popleft())
            self.tokens.append(n)
            admitted.append(head.index)

        # Step 4: the cost.
        decoding = [request.decoding and n > 0 for request, n in zip(self.running, self.tokens, strict=True)]
        context = sum(request.computed + 1 for request, d in zip(self.running, decoding, strict=True) if d)
        duration = (
            self.iteration_overhead
            + max(self.weight_load, self.compute_per_token * sum(self.tokens))
            + self.decode_per_seq * sum(decoding)
            + self.attention_per_token * context
        )
        self.current = Iteration(
            expert=self.index,
            start=start,
            end=start + duration,
            running=tuple(request.index for request in self.running),
            computed=tuple(request.computed for request in self.running),
            tokens=tuple(self.tokens),
            decoding=tuple(decoding),
            admitted=tuple(admitted),
            preempted=tuple(preempted),
            waiting=tuple(request.index for request in self.waiting),
        )
        self.log.append(self.current)

    def apply(self, iteration: Iteration) -> None:
        """Step 5: the iteration ends; its tokens count now."""
        self.clock = iteration.end
        for request, n in zip(self.running, self.tokens, strict=True):
            request.computed += n
            if request.need == 0:
                request.generated += 1
                if request.generated == 1:
                    request.first_token = self.clock
                if request.generated == request.output:
                    request.finish = self.clock
        self.running = [request for request in self.running if request.generated < request.output]
        self.current = None


def simulate(
    site: Mapping[str, np.ndarray],
    arrival_time: np.ndarray,
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    assignment: np.ndarray,
    observe: Callable[[Iteration], None] | None = None,
) -> Result:
    """Serve R requests at N experts, each at the expert that it is assigned to, until all have completed.

    Args:
        site: the ten fields of a `Site`, each an array (N,).
        arrival_time: (R,), s, in order.
        prompt_tokens: (R,), or (R, N) if they depend on the expert.
        output_tokens: (R,) or (R, N).
        assignment: (R,), the expert of each request.
        observe: called with every iteration, expert by expert, in order of time.

    Returns:
        Outcomes and totals. `closest_call` is the smallest time between a request's arrival or readiness and the start
        of an iteration of its expert, unless they coincide. What happens next depends on which comes first, so a
        simulator of lower precision can be held to this one only if its error is smaller than that.
    """
    arrival_time = np.asarray(arrival_time, np.float64)
    assignment = np.asarray(assignment)
    rows = np.arange(len(arrival_time))
    prompt, output = (
        tokens[rows, assignment] if tokens.ndim == 2 else tokens
        for tokens in (np.asarray(prompt_tokens), np.asarray(output_tokens))
    )
    num_experts = len(site["weight_load"])
    experts = [
        # item() turns NumPy scalars into Python's int and float (64 bit).
        Expert(index=e, **{name: np.asarray(values)[e].item() for name, values in site.items()})
        for e in range(num_experts)
    ]

    requests = []
    status = np.full(len(rows), COMPLETED)
    for r in rows:
        # Experts do not influence each other: it is enough to bring the chosen one up to date.
        expert = experts[assignment[r]]
        arrival = float(arrival_time[r])
        request = Request(
            index=int(r),
            arrival=arrival,
            ready=arrival + expert.network_delay,
            prompt=int(prompt[r]),
            output=int(output[r]),
        )
        requests.append(request)
        if not expert.arrive(request):
            status[r] = REJECTED
    for expert in experts:
        expert.advance(math.inf)
        if observe is not None:
            for iteration in expert.log:
                observe(iteration)

    return Result(
        status=status,
        ttft=np.array([request.first_token - request.arrival for request in requests]),
        latency=np.array([request.finish - request.arrival for request in requests]),
        preemptions=np.array([request.preemptions for request in requests], int),
        iterations=np.array([len(expert.log) for expert in experts]),
        busy_seconds=np.array([sum(it.end - it.start for it in expert.log) for expert in experts]),
        closest_call=min(
            (
                _closest_call(expert, [requests[r] for r in rows if assignment[r] == e])
                for e, expert in enumerate(experts)
            ),
            default=math.inf,
        ),
    )


def _closest_call(expert: Expert, requests: list[Request]) -> float:
    starts = np.array([it.start for it in expert.log])
    times = np.array([t for request in requests for t in (request.arrival, request.ready)])
    if len(starts) == 0 or len(times) == 0:
        return math.inf
    after = np.searchsorted(starts, times)
    near = np.stack([starts[np.clip(after + shift, 0, len(starts) - 1)] for shift in (-1, 0, 1)])
    # An idle expert starts exactly when a request is ready: that is no close call.
    distance = np.abs(near - times)
    return float(distance[distance > 0].min(initial=math.inf))

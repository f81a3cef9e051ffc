"""The serving semantics in plain Python, one iteration at a time: the place to start reading.

The engine (`jaxroute.serving.engine`) skips events and runs in float32 on a device. This module does neither: it uses
float64 and absolute times, it is meant to be believed by reading, and it shares no code with the engine. Tests hold the
engine to it.

Read it in this order; docs/reference/semantics.md says the same in words, and "step n" in the comments is its step n.

1. `Request`: what an expert remembers of a request. `need` and `decoding` are what every later step turns on.
2. `Expert.schedule`: steps 1 to 4, who takes part in the next iteration and how long it takes. It calls `share_tokens`
   (the token budget) and `lacks_memory`.
3. `Expert.apply`: step 5, what counts when the iteration ends.
4. `Expert.arrive` and `Expert.advance`: what happens between two arrivals, and when a request is rejected.
5. `simulate`: all requests, each at the expert that it is assigned to.
6. `BlockPool` and `Texts`: prefix caching, where it is on. Without it, KV memory is counted in tokens.

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
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

COMPLETED, REJECTED = 0, 1


class BlockPool:
    """KV memory in blocks, and what each of them holds: vLLM V1's block pool.

    A block is held by the requests that use it. One that nobody holds is on the free list; what it holds stays there
    to be found, until it is allocated again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        # Oldest first. A dictionary, as blocks are taken out of its middle.
        self.free: dict[int, None] = dict.fromkeys(range(num_blocks))
        self.holders = [0] * num_blocks
        self.content: list[Hashable] = [None] * num_blocks
        # The same content may be in several blocks; the first of them is found.
        self.blocks_with: dict[Hashable, dict[int, None]] = {}

    def find(self, contents: Iterable[Hashable]) -> list[int]:
        """Return the blocks that hold the longest run of these contents, from the first one on."""
        found = []
        for content in contents:
            blocks = self.blocks_with.get(content)
            if not blocks:
                break
            found.append(next(iter(blocks)))
        return found

    def num_free_without(self, found: list[int]) -> int:
        """Return how many blocks could be allocated, if these are to be kept."""
        return len(self.free) - sum(block in self.free for block in found)

    def hold(self, found: list[int]) -> None:
        """Let one more request hold these blocks, and take those that nobody held off the free list."""
        for block in found:
            self.free.pop(block, None)
            self.holders[block] += 1

    def allocate(self, number: int) -> list[int]:
        """Give the oldest free blocks to a request; what they held is gone."""
        blocks = []
        for _ in range(number):
            block = next(iter(self.free))
            del self.free[block]
            content = self.content[block]
            if content is not None:
                del self.blocks_with[content][block]
                if not self.blocks_with[content]:
                    del self.blocks_with[content]
            self.content[block] = None
            self.holders[block] = 1
            blocks.append(block)
        return blocks

    def fill(self, block: int, content: Hashable) -> None:
        """Note what a block holds that is full now; once noted, it stays."""
        if self.content[block] is None:
            self.content[block] = content
            self.blocks_with.setdefault(content, {})[block] = None

    def release(self, blocks: list[int]) -> None:
        """Let a request go: blocks that nobody holds any more go to the end of the free list, its last one first."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None


@dataclass
class Texts:
    """Whose text each request continues; arrays (R,).

    A request begins with the first `system_tokens` of its application's system prompt, and what it shares of its
    session's text are its first `shared_tokens`. It cannot share what does not exist yet: while the turn that carries
    the session's text on is in flight, no more than what that turn shared. A turn that comes while others of its
    session are in flight does not carry the text on.
    """

    session: np.ndarray  # -1 for none
    shared_tokens: np.ndarray
    application: np.ndarray  # -1 for none
    system_tokens: np.ndarray  # the same for all requests of an application
    block_size: int = 16


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
    contents: list[Hashable] = field(default_factory=list)  # of each block that its text will fill
    blocks: list[int] = field(default_factory=list)  # that it holds
    cached: int | None = None  # tokens that it found when it was admitted first
    shared: int = 0  # tokens of its session's text with which it begins

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
    cached_tokens: np.ndarray  # found in the cache at the first admission
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
    pool: BlockPool | None = None  # None: KV memory is counted in tokens, and nothing is cached

    clock: float = -math.inf  # end of the last iteration that was applied
    running: list[Request] = field(default_factory=list)  # in order of admission
    waiting: deque[Request] = field(default_factory=deque)  # preempted ones in front
    tokens: list[int] = field(default_factory=list)  # n of each running request in the current iteration
    current: Iteration | None = None  # scheduled, but not ended yet
    log: list[Iteration] = field(default_factory=list)

    def arrive(self, request: Request) -> bool:
        """Receive a request that the router has sent here now; returns whether it is accepted."""
        self.advance(request.arrival)
        room = self.kv_capacity if self.pool is None else self.pool.num_blocks * self.pool.block_size
        if len(self.waiting) >= self.max_waiting or request.prompt + request.output > room:
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

    def new_blocks(self, request: Request, n: int) -> int:
        """Blocks that a request needs for n more tokens, beyond those that it holds."""
        assert self.pool is not None
        return math.ceil((request.computed + n) / self.pool.block_size) - len(request.blocks)

    def lacks_memory(self) -> bool:
        """Whether what is scheduled for the running requests needs more memory than there is."""
        if self.pool is None:
            return self.kv_in_use() > self.kv_capacity
        needed = sum(self.new_blocks(request, n) for request, n in zip(self.running, self.tokens, strict=True))
        return needed > len(self.pool.free)

    def allocate(self, request: Request, n: int) -> None:
        """Give a request the blocks for n more tokens; those that these fill can be found from now on."""
        if self.pool is None:
            return
        request.blocks += self.pool.allocate(self.new_blocks(request, n))
        size = self.pool.block_size
        for j in range(request.computed // size, (request.computed + n) // size):
            self.pool.fill(request.blocks[j], request.contents[j])

    def find(self, request: Request) -> list[int]:
        """Return the blocks that hold the beginning of a request's text; at least one token is left to compute."""
        if self.pool is None:
            return []
        return self.pool.find(request.contents[: (request.prompt + request.generated - 1) // self.pool.block_size])

    def schedule(self, start: float) -> None:
        """Steps 1 to 4: choose who runs, and how long that takes."""
        admitted, preempted = [], []
        self.share_tokens()

        # Step 2: the most recently admitted request gives way, and recomputes later what it does not find again.
        while self.lacks_memory() and len(self.running) > 1:
            victim = self.running.pop()
            if self.pool is not None:
                self.pool.release(victim.blocks)
            victim.blocks = []
            victim.computed = 0
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            preempted.append(victim.index)
            self.share_tokens()
        for request, n in zip(self.running, self.tokens, strict=True):
            self.allocate(request, n)

        # Step 3: first come, first served; the first that cannot be admitted blocks those behind it.
        while not preempted and self.waiting:
            head = self.waiting[0]
            left = self.max_num_batched_tokens - sum(self.tokens)
            if left <= 0 or len(self.running) >= self.max_num_seqs or head.ready > start:
                break
            found = self.find(head)
            cached = 0 if self.pool is None else len(found) * self.pool.block_size
            n = min(head.need - cached, left)
            if self.pool is None:
                if self.kv_in_use() + n > self.kv_capacity:
                    break
            else:
                new = math.ceil((cached + n) / self.pool.block_size) - len(found)
                if new > self.pool.num_free_without(found):
                    break
                self.pool.hold(found)
            head.blocks, head.computed = found, cached
            head.cached = cached if head.cached is None else head.cached
            self.running.append(self.waiting.popleft())
            self.tokens.append(n)
            self.allocate(head, n)
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
                    if self.pool is not None:
                        self.pool.release(request.blocks)
        self.running = [request for request in self.running if request.generated < request.output]
        self.current = None


def simulate(
    site: Mapping[str, np.ndarray],
    arrival_time: np.ndarray,
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    assignment: np.ndarray,
    observe: Callable[[Iteration], None] | None = None,
    texts: Texts | None = None,
) -> Result:
    """Serve R requests at N experts, each at the expert that it is assigned to, until all have completed.

    Args:
        site: the ten fields of a `Site`, each an array (N,).
        arrival_time: (R,), s, in order.
        prompt_tokens: (R,), or (R, N) if they depend on the expert.
        output_tokens: (R,) or (R, N).
        assignment: (R,), the expert of each request.
        observe: called with every iteration, expert by expert, in order of time.
        texts: whose text each request continues, for experts that cache prefixes; None if they do not.

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

    if texts is not None:
        for expert in experts:
            expert.pool = BlockPool(expert.kv_capacity // texts.block_size, texts.block_size)

    requests: list[Request] = []
    status = np.full(len(rows), COMPLETED)
    turns: dict[int, list[Request]] = {}  # of each session: the one that carries its text on, then others in flight
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
        of_session = turns.setdefault(int(texts.session[r]), []) if texts is not None and texts.session[r] >= 0 else []
        for turn in of_session:
            experts[assignment[turn.index]].advance(arrival)
        carries_on = not any(math.isnan(turn.finish) for turn in of_session)
        if texts is not None:
            request.contents = _contents(texts, request, of_session[0] if of_session else None)
        if not expert.arrive(request):
            status[r] = REJECTED
        elif carries_on:
            of_session[:] = [request]
        else:
            of_session.append(request)
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
        cached_tokens=np.array([request.cached or 0 for request in requests], int),
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


def _contents(texts: Texts, request: Request, before: Request | None) -> list[Hashable]:
    """Name what each block of a request's text holds, given the turn that carries its session's text on so far."""
    size, r = texts.block_size, request.index
    system = int(texts.system_tokens[r]) // size if texts.application[r] >= 0 else 0
    shared = 0
    if before is not None:
        text = before.prompt + before.output
        if math.isnan(before.finish):
            text = before.shared
        request.shared = min(int(texts.shared_tokens[r]), text)
        shared = request.shared // size
    names: list[Hashable] = [(r, "own", j) for j in range((request.prompt + request.output) // size)]
    if before is not None:
        names[:shared] = before.contents[:shared]
    names[:system] = [(texts.application[r].item(), "system", j) for j in range(min(system, len(names)))]
    return names


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

"""Serving cases for the tests: small ones worked out by hand, random ones, and the measured vLLM run."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

COEFFICIENTS = (
    "iteration_overhead",
    "weight_load",
    "compute_per_token",
    "decode_per_seq",
    "attention_per_token",
    "network_delay",
)
LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "kv_capacity")

NAN = float("nan")


def site_arrays(*experts: dict[str, float]) -> dict[str, np.ndarray]:
    """The fields of a site, from one dict per expert. Coefficients are float32, as in the engine."""
    return {
        **{name: np.array([expert[name] for expert in experts], np.float32) for name in COEFFICIENTS},
        **{name: np.array([expert[name] for expert in experts], np.int32) for name in LIMITS},
    }


@dataclass(frozen=True)
class Case:
    """A site, requests and an assignment; for hand-made cases also what must come out."""

    site: dict[str, np.ndarray]
    arrival_time: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    assignment: np.ndarray
    expected: dict[str, list] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple:
        return self.site, self.arrival_time, self.prompt_tokens, self.output_tokens, self.assignment


# ---- By hand -----------------------------------------------------------------------------------------------

# Round binary fractions, so that float32 is exact and ties in time are ties on every machine.
# An iteration takes 1/4 + max(1, tokens / 8) + decoding / 16 + context / 64 seconds.
PENCIL = {
    "iteration_overhead": 1 / 4,
    "weight_load": 1.0,
    "compute_per_token": 1 / 8,
    "decode_per_seq": 1 / 16,
    "attention_per_token": 1 / 64,
    "network_delay": 0.0,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 2048,
    "max_waiting": 4,
    "kv_capacity": 1000,
}
# An iteration takes one second, whatever it does.
CLOCKWORK = PENCIL | {
    "iteration_overhead": 0.0,
    "compute_per_token": 0.0,
    "decode_per_seq": 0.0,
    "attention_per_token": 0.0,
}

# Every hand-made case has the same shape, so that the engine compiles once for all of them: the requests that
# fill it up go, after all the others, to one more expert.
HAND_EXPERTS, HAND_REQUESTS = 3, 6


def _hand(experts: list[dict], requests: list[tuple], assignment: list[int] | None = None, **expected: list) -> Case:
    """`requests` holds (arrival_time, prompt_tokens, output_tokens); tokens may be a list, one per expert."""
    size, filler = len(requests), HAND_REQUESTS - len(requests)
    arrival_time, prompt_tokens, output_tokens = zip(*requests, *[(requests[-1][0], 1, 1)] * filler, strict=True)
    experts = experts + [CLOCKWORK | {"max_waiting": HAND_REQUESTS}] * (HAND_EXPERTS - len(experts))
    return Case(
        site_arrays(*experts),
        np.array(arrival_time),
        np.array([_per_expert(tokens) for tokens in prompt_tokens]),
        np.array([_per_expert(tokens) for tokens in output_tokens]),
        np.array((assignment or [0] * size) + [HAND_EXPERTS - 1] * filler),
        expected={"status": [0] * size, "preemptions": [0] * size, **expected},
    )


def _per_expert(tokens: int | list[int]) -> list[int]:
    row = tokens if isinstance(tokens, list) else [tokens]
    return row + [row[-1]] * (HAND_EXPERTS - len(row))


HAND_CASES = {
    # Prefill of 16 tokens: 1/4 + 16/8. Two decode iterations: 5/4 + 1/16 + 17/64 and 5/4 + 1/16 + 18/64.
    "one request": _hand([PENCIL], [(2.0, 16, 3)], ttft=[2.25], latency=[2.25 + 1.578125 + 1.59375]),
    # A prefill of one token is not decoding: 5/4, then 5/4 + 1/16 + 2/64.
    "prompt of one token": _hand([PENCIL], [(0.0, 1, 2)], ttft=[1.25], latency=[1.25 + 1.34375]),
    # The second waits for the end of the first's prefill (2.25), and then both pay for each other:
    # 1/4 + 9/8 + 1/16 + 17/64 = 1.703125, and 5/4 + 2/16 + (18 + 9)/64 = 1.796875.
    "interference": _hand(
        [PENCIL],
        [(0.0, 16, 3), (1.0, 8, 2)],
        ttft=[2.25, 3.953125 - 1],
        latency=[5.75, 5.75 - 1],
    ),
    # The same two requests at different experts do not meet.
    "no interference": _hand(
        [PENCIL, PENCIL],
        [(0.0, 16, 3), (1.0, 8, 2)],
        [0, 1],
        ttft=[2.25, 1.25],
        latency=[2.25 + 1.578125 + 1.59375, 1.25 + 1.25 + 1 / 16 + 9 / 64],
    ),
    # KV for 15 tokens. t=2: 13 + 3 > 15, the last admitted (third) goes. t=5: 15 + 2 > 15, the second goes,
    # in front of the third. t=6 and 7: the second (8 tokens) does not fit and holds up the third (5), which
    # would. t=8: the first is finished, both are admitted, recompute 8 and 5 tokens, and finish at 10 and 11.
    "preemption": _hand(
        [CLOCKWORK | {"kv_capacity": 15}],
        [(0.0, 4, 8), (0.25, 4, 6), (0.5, 4, 4)],
        ttft=[1.0, 1.75, 1.5],
        latency=[8.0, 9.75, 10.5],
        preemptions=[0, 1, 1],
    ),
    # KV for 9 tokens. t=2: 9 + 4 > 9 and, without the fourth, 8 + 3 > 9: the third goes as well. t=3: the
    # second goes (9 + 2 > 9). t=4: the first is finished, the others recompute 3, 2 and 2 tokens.
    "two preempted at once": _hand(
        [CLOCKWORK | {"kv_capacity": 9}],
        [(0.0, 5, 4), (0.25, 1, 3), (0.5, 1, 2), (0.75, 1, 2)],
        ttft=[1.0, 1.75, 1.5, 1.25],
        latency=[4.0, 4.75, 4.5, 4.25],
        preemptions=[0, 1, 1, 1],
    ),
    # Budget 8: the first prompt takes 8 + 8 + 4 tokens (1.25 + 1.25 + 0.75 s). At 3.25 one token goes to its
    # decoding and 7 of 10 to the second prompt (1/4 + 1 + 1/16 + 21/64), at 4.890625 the last three (3/4).
    "chunked prefill": _hand(
        [PENCIL | {"weight_load": 1 / 2, "max_num_batched_tokens": 8}],
        [(0.0, 20, 2), (3.0, 10, 1)],
        ttft=[3.25, 5.640625 - 3],
        latency=[4.890625, 5.640625 - 3],
    ),
    # Two places: the third waits until both others are finished at 3.
    "batch limit": _hand(
        [CLOCKWORK | {"max_num_seqs": 2}],
        [(0.0, 4, 3), (0.25, 4, 2), (0.5, 4, 2)],
        ttft=[1.0, 1.75, 3.5],
        latency=[3.0, 2.75, 4.5],
    ),
    # Nobody is admitted in the iteration of a preemption. Budget 8, KV for 22 tokens. t=1: 9 + 7 <= 22, the
    # second starts its prompt. t=2: 10 + 14 > 22, it goes, and although 10 + 7 <= 22 it is back only at t=3;
    # and so on until t=8. t=10: the first is finished, and the second computes 8 + 8 + 2 tokens.
    "no admission after a preemption": _hand(
        [CLOCKWORK | {"kv_capacity": 22, "max_num_batched_tokens": 8}],
        [(0.0, 8, 10), (0.5, 18, 1)],
        ttft=[1.0, 12.5],
        latency=[10.0, 12.5],
        preemptions=[0, 4],
    ),
    # Ready half a second after arrival. The second is still on the way when the idle expert starts at 1.5
    # with the first, and waits until 3.75.
    "network delay": _hand(
        [PENCIL | {"network_delay": 1 / 2}],
        [(1.0, 16, 1), (1.25, 8, 1)],
        ttft=[2.75, 3.75 + 1.25 - 1.25],
        latency=[2.75, 3.75 + 1.25 - 1.25],
    ),
    # One more token than the KV cache holds, and exactly as many.
    "rejected for KV": _hand(
        [CLOCKWORK | {"kv_capacity": 15}],
        [(0.0, 10, 6), (0.5, 10, 5)],
        status=[1, 0],
        ttft=[NAN, 1.0],
        latency=[NAN, 5.0],
    ),
    # One runs, one waits, one place: the third is turned away, the fourth comes when the second is running.
    "rejected for the queue": _hand(
        [CLOCKWORK | {"max_num_seqs": 1, "max_waiting": 1}],
        [(0.0, 4, 1), (0.25, 4, 1), (0.5, 4, 1), (1.25, 4, 1)],
        status=[0, 0, 1, 0],
        ttft=[1.0, 1.75, NAN, 1.75],
        latency=[1.0, 1.75, NAN, 1.75],
    ),
    # KV for 15 tokens. t=3: 15 + 2 > 15, the second goes, and takes the only place in the queue until the
    # first is finished at 8: the third is turned away. The fourth comes when the second is running again.
    "a preempted request takes a place": _hand(
        [CLOCKWORK | {"kv_capacity": 15, "max_waiting": 1}],
        [(0.0, 4, 8), (0.25, 8, 3), (3.5, 1, 1), (8.5, 1, 1)],
        status=[0, 0, 1, 0],
        ttft=[1.0, 1.75, NAN, 1.5],
        latency=[8.0, 8.75, NAN, 1.5],
        preemptions=[0, 1, 0, 0],
    ),
    # The expert is idle from 2.0 until the second arrives.
    "idle in between": _hand([CLOCKWORK], [(0.0, 4, 2), (2.5, 4, 2)], ttft=[1.0, 1.0], latency=[2.0, 2.0]),
    # The network counts as queue: at 1.25 and at 1.5 (the iteration that starts then is not fixed yet) the
    # first is still in it; at 1.75 it is running.
    "the network takes a place": _hand(
        [CLOCKWORK | {"network_delay": 1 / 2, "max_waiting": 1}],
        [(1.0, 4, 1), (1.25, 4, 1), (1.5, 4, 1), (1.75, 4, 1)],
        status=[0, 1, 1, 0],
        ttft=[1.5, NAN, NAN, 1.75],
        latency=[1.5, NAN, NAN, 1.75],
    ),
    # A request that arrives at the very end of an iteration takes part in the next.
    "arrival at a boundary": _hand(
        [CLOCKWORK],
        [(0.0, 4, 6), (1.0, 4, 3), (4.0, 4, 1)],
        ttft=[1.0, 1.0, 1.0],
        latency=[6.0, 3.0, 1.0],
    ),
    # At 1.0 the first is finished, but the iteration that admits the second is not fixed: it still waits.
    "queue at a boundary": _hand(
        [CLOCKWORK | {"max_num_seqs": 1, "max_waiting": 1}],
        [(0.0, 4, 1), (0.5, 4, 1), (1.0, 4, 1), (1.5, 4, 1)],
        status=[0, 0, 1, 0],
        ttft=[1.0, 1.5, NAN, 1.5],
        latency=[1.0, 1.5, NAN, 1.5],
    ),
    # Tokens per expert: each request takes its own expert's column.
    "tokens per expert": _hand(
        [CLOCKWORK | {"kv_capacity": 15}, CLOCKWORK],
        [(0.0, [4, 100], [3, 50]), (0.25, [100, 4], [50, 5]), (0.5, [100, 4], [1, 99])],
        [0, 1, 0],
        status=[0, 0, 1],
        ttft=[1.0, 1.0, NAN],
        latency=[3.0, 5.0, NAN],
    ),
}


# ---- Random ------------------------------------------------------------------------------------------------

# The largest limits of a random site, always those of its last expert: the engine's shapes depend on them.
MAX_SEQS, MAX_WAITING = 8, 8


def random_site(rng: np.random.Generator, num_experts: int, num_padded: int) -> dict[str, np.ndarray]:
    """Experts of very different speed with little memory; those after `num_experts` fill up the shape."""
    experts = [
        {
            "iteration_overhead": rng.uniform(0.0, 0.004),
            "weight_load": rng.uniform(0.004, 0.03),
            "compute_per_token": rng.uniform(0.02e-3, 0.4e-3),
            "decode_per_seq": rng.choice([0.0, rng.uniform(0.0, 1e-3)]),
            "attention_per_token": rng.choice([0.0, rng.uniform(0.0, 3e-6)]),
            "network_delay": rng.choice([0.0, rng.uniform(0.0, 0.05)]),
            "max_num_seqs": rng.integers(1, MAX_SEQS, endpoint=True),
            "max_num_batched_tokens": rng.choice([16, 256, 2048]),
            "max_waiting": rng.integers(1, MAX_WAITING, endpoint=True),
            "kv_capacity": rng.integers(250, 1500),
        }
        for _ in range(num_padded)
    ]
    if num_padded > num_experts:
        experts[-1] |= {"max_num_seqs": MAX_SEQS, "max_waiting": MAX_WAITING}
    return site_arrays(*experts)


def random_case(seed: int, num_requests: int, num_experts: int, padded: tuple[int, int]) -> Case:
    """Requests in bursts to random experts. `padded` is the shape (R, N) that the case is filled up to."""
    rng = np.random.default_rng(seed)
    num_rows, num_columns = padded
    site = random_site(rng, num_experts, num_columns)
    rate = rng.uniform(2.0, 12.0) * num_experts
    arrival = np.cumsum(rng.gamma(0.5, 2.0 / rate, num_rows))
    prompt = np.clip(rng.lognormal(4.3, 1.0, (num_rows, num_columns)), 1, 700)
    output = np.clip(rng.lognormal(3.6, 0.9, (num_rows, num_columns)), 1, 200)
    if rng.random() < 0.25:
        # A few tokens each: one preemption frees so little that several must go at once.
        prompt, output = 1 + prompt / 32, 1 + output / 4
        site["kv_capacity"] = site["kv_capacity"] // 20
    prompt, output = prompt.astype(np.int32), output.astype(np.int32)
    assignment = rng.integers(0, num_experts, num_rows)
    # What fills up the shape must not matter: single tokens, one a second, at an expert that nobody else
    # uses.
    assignment[num_requests:] = num_columns - 1
    arrival[num_requests:] = arrival[num_requests - 1] + np.arange(1, num_rows - num_requests + 1)
    prompt[num_requests:] = output[num_requests:] = 1
    return Case(site, arrival, prompt, output, assignment)


def heavy_case() -> Case:
    """1,500 requests, six experts: hundreds of preemptions, chunked prefill, network delays, rejections."""
    rng = np.random.default_rng(HEAVY_SEED)
    count, num_experts = 1500, 6
    experts = [
        {
            "iteration_overhead": rng.uniform(0.001, 0.004),
            "weight_load": rng.uniform(0.006, 0.03),
            "compute_per_token": rng.uniform(0.02e-3, 0.1e-3),
            "decode_per_seq": rng.uniform(0.0, 0.4e-3),
            "attention_per_token": rng.uniform(0.0, 3e-7),
            "network_delay": (0.0, 0.0, 0.005, 0.01, 0.02, 0.04)[e],
            "max_num_seqs": 16,
            "max_num_batched_tokens": (256, 2048)[e % 2],
            "max_waiting": (8, 16)[e // 3],
            "kv_capacity": rng.integers(1500, 3000),
        }
        for e in range(num_experts)
    ]
    return Case(
        site=site_arrays(*experts),
        arrival_time=np.cumsum(rng.exponential(1 / 20.0, count)),
        prompt_tokens=np.clip(rng.lognormal(5.0, 0.9, count), 4, 1200).astype(np.int32),
        output_tokens=np.clip(rng.lognormal(3.9, 0.8, count), 1, 300).astype(np.int32),
        assignment=rng.integers(0, num_experts, count),
    )


class RealSize(NamedTuple):
    """What overloads servers with so many seats, and a seed with no close call (see below)."""

    max_num_seqs: int
    max_waiting: int
    rate: float
    """Requests/s."""
    second: float
    """Share of the requests that goes to the second server."""
    lengths: tuple[float, float]
    """Of prompts and answers, as shares of the memory that there is for each seat."""
    seed: int


REAL_SIZES = (RealSize(256, 32, 60.0, 0.25, (0.4, 1.2), 1), RealSize(1024, 512, 300.0, 0.4, (0.3, 1.8), 5))


def real_size_case(size: RealSize) -> Case:
    """3,000 requests at two servers of real size, with 40,000 and 400,000 KV tokens."""
    rng = np.random.default_rng(size.seed)
    count, capacity = 3000, np.array([40_000, 400_000])
    server = {
        "iteration_overhead": 0.002,
        "weight_load": 0.013,
        "compute_per_token": 7e-5,
        "decode_per_seq": 2.4e-5,
        "attention_per_token": 5e-8,
        "network_delay": 0.0,
        "max_num_seqs": size.max_num_seqs,
        "max_num_batched_tokens": 2048,
        "max_waiting": size.max_waiting,
    }
    typical = np.array(size.lengths)[:, None, None] * capacity / size.max_num_seqs
    prompt, output = np.clip(rng.lognormal(0.0, 0.6, (2, count, 2)) * typical, 2, capacity // 4).astype(np.int32)
    return Case(
        site=site_arrays(*(server | {"kv_capacity": tokens} for tokens in capacity)),
        arrival_time=np.cumsum(rng.exponential(1 / size.rate, count)),
        prompt_tokens=prompt,
        output_tokens=output,
        assignment=(rng.random(count) < size.second).astype(int),
    )


# A seed with no close call (see `reference.simulate`): among 1,500 arrivals one usually falls so near to the
# start of an iteration that single precision cannot tell which came first.
HEAVY_SEED = 28


# ---- Measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A measured run: what was sent, and the mean latencies in seconds."""

    case: Case
    means: dict[str, float]


def vllm_run(data_dir: Path) -> Measured:
    """vLLM 0.19, Llama-3.1-8B on an RTX 4090, with the coefficients that were fitted to this hardware."""
    with gzip.open(data_dir / "vllm_runs" / "requests.jsonl.gz", "rt") as lines:
        rows = sorted((json.loads(line) for line in lines), key=lambda row: row["queued_ts"])
    queued, first, last = (
        np.array([row[name] for row in rows]) for name in ("queued_ts", "first_token_ts", "last_token_ts")
    )
    prompt, output = (np.array([row[name] for row in rows]) for name in ("input_toks", "output_toks"))
    site = site_arrays(
        {
            "iteration_overhead": 0.0,
            "weight_load": 17.09e-3,
            "compute_per_token": 0.0917e-3,
            "decode_per_seq": 0.0414e-3,
            "attention_per_token": 1.388e-7,
            "network_delay": 0.0,
            "max_num_seqs": 256,
            "max_num_batched_tokens": 2048,
            "max_waiting": len(rows),
            "kv_capacity": 41_408,
        }
    )
    case = Case(site, queued - queued[0], prompt, output, np.zeros(len(rows), int))
    return Measured(case, mean_latencies(first - queued, last - queued, output))


def mean_latencies(ttft: np.ndarray, latency: np.ndarray, output_tokens: np.ndarray) -> dict[str, float]:
    """Mean TTFT, TPOT and end-to-end latency."""
    several = output_tokens > 1
    tpot = (latency - ttft)[several] / (output_tokens[several] - 1)
    return {"ttft": ttft.mean(), "tpot": tpot.mean(), "latency": latency.mean()}

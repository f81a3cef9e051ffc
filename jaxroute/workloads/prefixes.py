"""What the prompts of a trace have in common: the ids of their blocks, and how much of them a cache would hold."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

SESSION_BLOCK = 16
"""Tokens of a block where ids are derived from sessions: vLLM's default."""


class Prefixes(NamedTuple):
    """Ids of the blocks of each request's text, on the host; equal ids stand for equal text from its beginning on.

    They are kept as runs of consecutive numbers: what a prompt adds to what others have is numbered on in Mooncake's
    traces and in `session_prefixes`, so that a prompt of a thousand blocks takes a few runs.
    """

    first: Int64[np.ndarray, "run"]
    """First id of each run."""
    length: Int64[np.ndarray, "run"]
    """Ids in each run, at least 1."""
    offsets: Int64[np.ndarray, "request_plus_1"]
    """Request r has the runs from `offsets[r]` to `offsets[r + 1]`."""
    block_size: int
    """Tokens of a block; a request's last block may be shorter."""

    def blocks(self, request: int) -> list[int]:
        """Return the ids of a request's blocks: those of its prompt, then those of its answer, if they are known."""
        runs = slice(self.offsets[request], self.offsets[request + 1])
        starts, lengths = self.first[runs].tolist(), self.length[runs].tolist()
        return list(
            chain.from_iterable(range(start, start + length) for start, length in zip(starts, lengths, strict=True))
        )

    def prompt_blocks(self, prompt_tokens: Int64[np.ndarray, "request"]) -> Int64[np.ndarray, "request"]:
        """Return how many blocks each prompt has."""
        return -(-prompt_tokens // self.block_size)


def listed_prefixes(ids: Sequence[Sequence[int]], block_size: int) -> Prefixes:
    """Return the prefixes of requests whose ids are listed, such as Mooncake's `hash_ids`.

    Args:
        ids: per request those of its blocks, in order; each fits int64.
        block_size: tokens.

    """
    counts = np.array([len(row) for row in ids], np.int64)
    flat = np.fromiter(chain.from_iterable(ids), np.int64, counts.sum())
    ends = np.cumsum(counts)
    # A run begins with a request, or where the numbers do not go on.
    begins = np.ones(len(flat), bool)
    begins[1:] = flat[1:] != flat[:-1] + 1
    begins[(ends - counts)[counts > 0]] = True
    starts = np.flatnonzero(begins)
    return Prefixes(
        flat[starts],
        np.diff(starts, append=len(flat)),
        np.concatenate([[0], np.searchsorted(starts, ends)]).astype(np.int64),
        block_size,
    )


def joined_prefixes(parts: Sequence[Prefixes]) -> Prefixes:
    """Return the prefixes of all requests of some parts, in their order."""
    before = np.cumsum([0, *(len(part.first) for part in parts[:-1])])
    offsets = [part.offsets[1:] + number for part, number in zip(parts, before, strict=True)]
    return Prefixes(
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        parts[0].block_size,
    )


def session_prefixes(
    session: Int64[np.ndarray, "request"],
    prompt_tokens: Int64[np.ndarray, "request"],
    output_tokens: Int64[np.ndarray, "request"],
    block_size: int = SESSION_BLOCK,
) -> Prefixes:
    """Return the prefixes of requests of which only the sessions are known.

    A prompt begins with what the request before it in its session had, prompt and answer, up to all but the last of its
    own tokens. Whole blocks of that keep their ids; the rest of the prompt and the answer get new ones.

    Args:
        session: a number per session, -1 for a request without one.
        prompt_tokens: tokens.
        output_tokens: tokens.
        block_size: tokens.

    """
    latest: dict[int, int] = {}  # of each session, its latest request
    first, length, offsets = array("q"), array("q"), array("q", [0])
    next_id = 0
    texts = (prompt_tokens + output_tokens).tolist()
    for request, (number, prompt, text) in enumerate(zip(session.tolist(), prompt_tokens.tolist(), texts, strict=True)):
        before = latest.get(number) if number >= 0 else None
        shared = 0
        if before is not None:
            shared = max(min(texts[before], prompt - 1), 0) // block_size
            left = shared
            for run in range(offsets[before], offsets[before + 1]):
                if not left:
                    break
                taken = min(length[run], left)
                first.append(first[run])
                length.append(taken)
                left -= taken
        new = -(-text // block_size) - shared
        if new:
            first.append(next_id)
            length.append(new)
            next_id += new
        offsets.append(len(first))
        if number >= 0:
            latest[number] = request
    return Prefixes(np.array(first), np.array(length), np.array(offsets), block_size)


class PrefixCache:
    """The prefix cache of one server that serves one request after the other.

    A request finds the longest run of its first blocks that are there. Its other blocks take the place of the least
    recently used ones, and of one request's blocks the last goes first: the order of vLLM's block pool (`BlockPool` in
    `jaxroute.serving.reference`) whose requests hold their blocks for no time. Of a request that is longer than the
    cache, only the first blocks stay.
    """

    def __init__(self, capacity: int | None = None) -> None:
        """Make an empty cache of so many blocks, or without bound."""
        self._capacity = capacity
        self._order: OrderedDict[int, None] = OrderedDict()  # the block to be lost next comes first

    def find(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks are there, from the first one on and without a gap."""
        for number, block in enumerate(blocks):
            if block not in self._order:
                return number
        return len(blocks)

    def add(self, blocks: Sequence[int]) -> None:
        """Keep a request's blocks."""
        order = self._order
        for block in reversed(blocks):
            order[block] = None
            order.move_to_end(block)
        if self._capacity is not None:
            while len(order) > self._capacity:
                order.popitem(last=False)


def hit_rate(prefixes: Prefixes, prompt_tokens: Int64[np.ndarray, "request"], cache_tokens: int | None) -> float:
    """Return the share of the prompts' blocks that a server finds in its cache, if it serves all requests in order.

    Requests come one by one, and each holds its blocks for no time: how long requests are served plays no role.

    Args:
        prefixes: of the requests.
        prompt_tokens: tokens.
        cache_tokens: size of the cache, of which whole blocks count; None for one without bound.

    Returns:
        From 0 to 1; nan if no prompt has a block.

    """
    cache = PrefixCache(None if cache_tokens is None else cache_tokens // prefixes.block_size)
    asked = prefixes.prompt_blocks(prompt_tokens).tolist()
    found = 0
    for request, number in enumerate(asked):
        blocks = prefixes.blocks(request)
        found += cache.find(blocks[:number])
        cache.add(blocks)
    return found / sum(asked) if sum(asked) else float("nan")

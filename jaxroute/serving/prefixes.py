"""Prefix caching with event skipping: which blocks of KV memory hold what, without a list of blocks.

Semantics: docs/reference/semantics.md (blocks, hits, the free list), as vLLM V1 has them. The reference keeps every
block; here an expert keeps a few numbers, and one entry for each piece of text on its free list.

*Texts are chains.* A request's text has up to three parts: its application's system prompt, its session's text, and
what is its own. A full block is known by its chain and its place in it. Of each chain an expert holds a beginning,
and nothing else: a request that frees blocks frees the last one first, and one that takes blocks off the free list
takes the first ones with them. So the longest run of cached blocks is the greatest place that a request there holds,
or that an entry reaches.

*An entry's end is a deadline.* Blocks are allocated from the head of the free list and come back at its tail. A block
that goes there when F blocks are free is allocated again once F more have been. So an entry (chain, first block, end)
notes the number of allocations up to which its last block stays, and shrinks by one block for each one after that.
Where a hit takes blocks out of the list, those behind them move up.

*Decoding requests allocate by the clock*: one block every `block_size` iterations. How many do so in each of these is
all that has to be known to count the blocks of any number of iterations (`offsets`).

The axes before the named ones are lanes, as in the engine.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NOBODY = -1
"""No session, or no application."""
# Sessions are numbered from 0, applications and requests likewise: each has chains of its own.
_APPLICATIONS, _REQUESTS = 2**29, -2
# More blocks than any text has.
_ENDLESS = 2**28


class CacheShape(NamedTuple):
    """How prefixes are cached; static."""

    block_size: int
    """Tokens per block."""
    num_entries: int
    """How many pieces of text on its free list the simulation follows at an expert. If there are more, the oldest
    counts as gone, and `overflowed` says how often."""


class Text(NamedTuple):
    """Whose text a request continues."""

    session: Int[Array, "*lanes"]
    """`NOBODY` if none."""
    shared_tokens: Int[Array, "*lanes"]
    """Its first tokens, which are its session's text so far; fewer than its prompt has."""
    carries_on: Bool[Array, "*lanes"]
    """Whether what it adds becomes its session's text: it does if no other request of its session is in flight."""
    application: Int[Array, "*lanes"]
    """`NOBODY` if none."""
    system_tokens: Int[Array, "*lanes"]
    """Length of its application's system prompt, with which it begins; the same for all of its requests."""


class SlotTexts(NamedTuple):
    """The texts of the requests at each expert."""

    system_key: Int[Array, "*lanes slot"]
    session_key: Int[Array, "*lanes slot"]
    own_key: Int[Array, "*lanes slot"]
    system_end: Int[Array, "*lanes slot"]
    """In blocks: where its application's part ends."""
    session_end: Int[Array, "*lanes slot"]
    """In blocks: where its session's part ends, and its own begins."""
    cached_tokens: Int[Array, "*lanes slot"]
    """What was found when the request was first admitted; -1 until then."""


class Entries(NamedTuple):
    """Pieces of text on the free list: a ring, in the order of the list from `CacheState.oldest` on."""

    key: Int[Array, "*lanes entry"]
    """The chain."""
    first: Int[Array, "*lanes entry"]
    end: Int[Array, "*lanes entry"]
    """The blocks from `first` up to `end`."""
    deadline: Int[Array, "*lanes entry"]
    """Number of allocations up to which the last one of them stays."""


class CacheState(NamedTuple):
    """What an expert's KV memory holds."""

    held: Int[Array, "*lanes"]
    """Blocks that running requests hold, up to iteration `counted`."""
    allocated: Int[Array, "*lanes"]
    """Blocks allocated so far."""
    counted: Int[Array, "*lanes"]
    """Number of the iteration up to which the blocks of decoding requests are counted."""
    offsets: Int[Array, "*lanes offset"]
    """How many decoding requests need a block in the iterations whose number plus the offset is a multiple of the block
    size."""
    oldest: Int[Array, "*lanes"]
    """Which entry is overwritten next."""
    overflowed: Int[Array, "*lanes"]
    """How many entries were overwritten that still held something."""
    entries: Entries

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.offsets.shape[-1]


def idle_cache(lanes: tuple[int, ...], shape: CacheShape) -> CacheState:
    """Return memory in which there is nothing."""
    count = jnp.zeros(lanes, jnp.int32)
    entries = jnp.zeros((*lanes, shape.num_entries), jnp.int32)
    return CacheState(
        held=count,
        allocated=count,
        counted=count - 1,
        offsets=jnp.zeros((*lanes, shape.block_size), jnp.int32),
        oldest=count,
        overflowed=count,
        entries=Entries(key=entries + NOBODY, first=entries, end=entries, deadline=entries),
    )


def empty_texts(lanes: tuple[int, ...], num_slots: int) -> SlotTexts:
    """Return the texts of slots without requests."""
    return SlotTexts(*(jnp.full((*lanes, num_slots), NOBODY, jnp.int32) for _ in SlotTexts._fields))


def texts_of(text: Text, request: Int[Array, "*lanes"], block_size: int) -> SlotTexts:
    """Lay out the text of an arriving request."""
    system_end = jnp.where(text.application >= 0, text.system_tokens // block_size, 0)
    shared_end = jnp.where(text.carries_on, _ENDLESS, text.shared_tokens // block_size)
    return SlotTexts(
        system_key=jnp.where(text.application >= 0, _APPLICATIONS + text.application, NOBODY),
        session_key=jnp.where(text.session >= 0, text.session, NOBODY),
        own_key=_REQUESTS - request,
        system_end=system_end,
        session_end=jnp.where(text.session >= 0, jnp.maximum(shared_end, system_end), system_end),
        cached_tokens=jnp.full_like(request, -1),
    )


def num_blocks(kv_capacity: Int[Array, "*lanes"], block_size: int) -> Int[Array, "*lanes"]:
    """Return how many blocks an expert's memory has."""
    return kv_capacity // block_size


def free_blocks(cache: CacheState, kv_capacity: Int[Array, "*lanes"]) -> Int[Array, "*lanes"]:
    """Return how many blocks nobody holds, as of iteration `cache.counted`."""
    return num_blocks(kv_capacity, cache.block_size) - cache.held


# ---- Allocation ------------------------------------------------------------------------------------------------


def blocks_for(tokens: Int[Array, "*lanes"], block_size: int) -> Int[Array, "*lanes"]:
    """Return how many blocks so many tokens take."""
    return -(-tokens // block_size)


def with_decoding(cache: CacheState, offset: Int[Array, "*lanes"], change: Int[Array, "*lanes"]) -> CacheState:
    """Count one more (1) or one fewer (-1) request that holds `offset` tokens more than the iteration has for a number.

    Nothing changes where `change` is 0.
    """
    of_offset = jnp.arange(cache.block_size, dtype=jnp.int32) == (offset % cache.block_size)[..., None]
    return cache._replace(offsets=cache.offsets + of_offset * change[..., None])


def decoding_blocks(cache: CacheState, first: Int[Array, "*lanes"], last: Int[Array, "*lanes"]) -> Int[Array, "*lanes"]:
    """Return how many blocks the decoding requests need in the iterations from `first` to `last`."""
    rounds, rest = jnp.divmod(jnp.maximum(last - first + 1, 0), cache.block_size)
    partly = jnp.where(_until_due(cache, first) < rest[..., None], cache.offsets, 0)
    return rounds * cache.offsets.sum(-1, dtype=jnp.int32) + partly.sum(-1, dtype=jnp.int32)


def iterations_to_full(
    cache: CacheState, first: Int[Array, "*lanes"], free: Int[Array, "*lanes"]
) -> Int[Array, "*lanes"]:
    """Return for how many iterations from `first` on so many free blocks last."""
    requests = cache.offsets.sum(-1, dtype=jnp.int32)
    rounds, rest = jnp.divmod(free, jnp.maximum(requests, 1))
    within = jnp.arange(1, cache.block_size, dtype=jnp.int32)
    due = _until_due(cache, first)[..., None, :] < within[:, None]
    needed = jnp.where(due, cache.offsets[..., None, :], 0).sum(-1, dtype=jnp.int32)
    more = (needed <= rest[..., None]).sum(-1, dtype=jnp.int32)
    return jnp.where(requests > 0, rounds * cache.block_size + more, _ENDLESS)


def _until_due(cache: CacheState, first: Int[Array, "*lanes"]) -> Int[Array, "*lanes offset"]:
    """Iterations from `first` to the one in which requests of each offset need a block."""
    return (-jnp.arange(cache.block_size, dtype=jnp.int32) - first[..., None]) % cache.block_size


def allocate(cache: CacheState, blocks: Int[Array, "*lanes"]) -> CacheState:
    """Take so many blocks from the head of the free list."""
    return cache._replace(held=cache.held + blocks, allocated=cache.allocated + blocks)


def count_up_to(cache: CacheState, iteration: Int[Array, "*lanes"]) -> CacheState:
    """Allocate what the decoding requests needed in the iterations up to this one."""
    cache = allocate(cache, decoding_blocks(cache, cache.counted + 1, iteration))
    return cache._replace(counted=jnp.maximum(cache.counted, iteration))


# ---- What is cached --------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What an expert holds of a request's text."""

    blocks: Int[Array, "*lanes"]
    """The longest run of cached blocks, from the first one on."""
    taken: Int[Array, "*lanes entry"]
    """How many of these each entry of the free list has."""


def find(
    cache: CacheState,
    text: SlotTexts,
    tokens: Int[Array, "*lanes"],
    texts: SlotTexts,
    full: Int[Array, "*lanes slot"],
) -> Found:
    """Look up a text of so many tokens, at least one of which is left to compute.

    Args:
        cache: the expert's memory.
        text: the text that is looked up, `(*lanes,)`.
        tokens: how long it is.
        texts: those of the requests at the expert.
        full: full blocks that each of them holds; 0 if it does not run.
    """
    entries = cache.entries
    end = _present_end(cache)
    live = end > entries.first

    def reach(key: Array, keys: Array, part_end: Array) -> Int[Array, "*lanes"]:
        """The end of what requests and entries have of a chain."""
        listed = jnp.where(live & (entries.key == key[..., None]), end, 0).max(-1)
        return jnp.maximum(_held_by(key, keys, part_end, full), jnp.where(key == NOBODY, 0, listed))

    system = jnp.minimum(reach(text.system_key, texts.system_key, texts.system_end), text.system_end)
    session = jnp.minimum(reach(text.session_key, texts.session_key, texts.session_end), text.session_end)
    own = jnp.where(live & (entries.key == text.own_key[..., None]), end, 0).max(-1)

    blocks = jnp.where(system < text.system_end, system, jnp.maximum(system, session))
    blocks = jnp.where(blocks < text.session_end, blocks, jnp.maximum(blocks, own))
    blocks = jnp.minimum(blocks, (tokens - 1) // cache.block_size)

    def part(key: Array, most: Array) -> Int[Array, "*lanes entry"]:
        is_part = live & (entries.key == key[..., None]) & (key != NOBODY)[..., None]
        return jnp.where(is_part, jnp.maximum(jnp.minimum(end, most[..., None]) - entries.first, 0), 0)

    taken = part(text.system_key, blocks) + part(text.own_key, blocks)
    return Found(blocks, taken + part(text.session_key, jnp.minimum(blocks, text.session_end)))


def _held_by(
    key: Int[Array, "*lanes"],
    keys: Int[Array, "*lanes slot"],
    part_end: Int[Array, "*lanes slot"],
    full: Int[Array, "*lanes slot"],
) -> Int[Array, "*lanes"]:
    """The end of what requests with so many full blocks hold of a chain, which is their texts' up to `part_end`."""
    same = (keys == key[..., None]) & (key != NOBODY)[..., None]
    return jnp.where(same, jnp.minimum(full, part_end), 0).max(-1)


def _present_end(cache: CacheState) -> Int[Array, "*lanes entry"]:
    """Where what is left of each entry ends: its last blocks are allocated first."""
    entries = cache.entries
    gone = jnp.maximum(cache.allocated[..., None] - entries.deadline, 0)
    return jnp.maximum(entries.end - gone, entries.first)


def take(cache: CacheState, found: Found, where: Bool[Array, "*lanes"]) -> CacheState:
    """Take what was found off the free list; what is behind it there moves up."""
    taken = jnp.where(where[..., None], found.taken, 0)
    # In the order of the list, which begins at `oldest`.
    place = jnp.arange(taken.shape[-1], dtype=jnp.int32)
    up_to = jnp.cumsum(taken, -1)
    wraps = place < cache.oldest[..., None]
    before_oldest = jnp.where(wraps, taken, 0).sum(-1, keepdims=True)
    ahead = up_to - taken - before_oldest + jnp.where(wraps, up_to[..., -1:], 0)
    entries = cache.entries
    return cache._replace(
        held=cache.held + taken.sum(-1),
        entries=entries._replace(first=entries.first + taken, deadline=entries.deadline - ahead),
    )


# ---- Release ---------------------------------------------------------------------------------------------------


def release(
    cache: CacheState,
    free: Int[Array, "*lanes"],
    text: SlotTexts,
    tokens: Int[Array, "*lanes"],
    texts: SlotTexts,
    full: Int[Array, "*lanes slot"],
    where: Bool[Array, "*lanes"],
    keep_own: bool,
) -> CacheState:
    """Let a request go that holds so many tokens, of which others may hold the beginning.

    Args:
        cache: the expert's memory.
        free: its free blocks.
        text: the request's, `(*lanes,)`.
        tokens: that it holds.
        texts: those of all requests at the expert.
        full: full blocks that each of the others holds; 0 for those that do not run.
        where: lanes in which it goes.
        keep_own: whether it may come back for what is its own.
    """
    whole = tokens // cache.block_size

    system_end = jnp.minimum(text.system_end, whole)
    session_end = jnp.clip(text.session_end, system_end, whole)
    system_first = jnp.minimum(_held_by(text.system_key, texts.system_key, texts.system_end, full), system_end)
    of_session = _held_by(text.session_key, texts.session_key, texts.session_end, full)
    session_first = jnp.clip(of_session, system_end, session_end)
    # The last block first: the one that is not full, its own, its session's, its application's.
    deadline = cache.allocated + free + blocks_for(tokens, cache.block_size) - whole
    freed = deadline - cache.allocated - free
    for key, first, end, kept in (
        (text.own_key, session_end, whole, keep_own),
        (text.session_key, session_first, session_end, True),
        (text.system_key, system_first, system_end, True),
    ):
        size = end - first
        if kept:
            cache = _append(cache, key, first, end, deadline, where & (size > 0) & (key != NOBODY))
        deadline, freed = deadline + size, freed + size
    return cache._replace(held=cache.held - jnp.where(where, freed, 0))


def _append(
    cache: CacheState,
    key: Int[Array, "*lanes"],
    first: Int[Array, "*lanes"],
    end: Int[Array, "*lanes"],
    deadline: Int[Array, "*lanes"],
    where: Bool[Array, "*lanes"],
) -> CacheState:
    """Enter a piece of text at the end of the free list."""
    entries = cache.entries
    num_entries = entries.key.shape[-1]
    here = (jnp.arange(num_entries, dtype=jnp.int32) == cache.oldest[..., None]) & where[..., None]
    lost = (here & (_present_end(cache) > entries.first)).any(-1)
    new = Entries(key, first, end, deadline)
    return cache._replace(
        entries=jax.tree.map(lambda table, value: jnp.where(here, value[..., None], table), entries, new),
        oldest=jnp.where(where, (cache.oldest + 1) % num_entries, cache.oldest),
        overflowed=cache.overflowed + lost,
    )


def rewrite(cache: CacheState, session: Int[Array, "*lanes"], shared: Int[Array, "*lanes"]) -> CacheState:
    """Forget what experts hold of a session's text beyond `shared` blocks, as it goes on differently from there.

    No request of the session may be in flight.
    """
    entries = cache.entries
    same = (entries.key == session[..., None]) & (session >= 0)[..., None]
    end = jnp.where(same, jnp.minimum(entries.end, jnp.maximum(shared[..., None], entries.first)), entries.end)
    return cache._replace(entries=entries._replace(end=end, deadline=entries.deadline + entries.end - end))

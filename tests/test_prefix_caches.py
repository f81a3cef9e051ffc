"""What a prefix cache finds of a trace: rates counted by hand, vLLM's block pool, and a published trace."""

import numpy as np
import pytest

from jaxroute.serving.reference import BlockPool
from jaxroute.workloads import PrefixCache, hit_rate, read_trace
from jaxroute.workloads.prefixes import listed_prefixes, session_prefixes


def rate(ids, cache_blocks, block_size=4):
    tokens = np.array([block_size * len(row) for row in ids])
    size = None if cache_blocks is None else block_size * cache_blocks
    return hit_rate(listed_prefixes(ids, block_size), tokens, size)


def test_rates_counted_by_hand():
    ids = [[0, 1, 2], [0, 3], [0, 1, 2, 4], [5], [0, 3]]
    assert rate(ids, None) == (1 + 3 + 2) / 12
    # After the second request: 0, 3, 1, from the last to be lost to the first. 3 and what lacked of the third follow.
    assert rate(ids, 3) == (1 + 2 + 1) / 12
    assert rate(ids, 0) == 0
    assert np.isnan(rate([[], []], None))


def test_a_block_counts_only_behind_those_before_it():
    assert rate([[0, 1, 2], [9, 1, 2]], None) == 0


def test_what_is_longer_than_the_cache_leaves_its_beginning():
    assert rate([[0, 1, 2, 3], [0, 1, 2, 3]], 2) == 2 / 8


def test_a_cache_counts_whole_blocks():
    prefixes, tokens = listed_prefixes([[0, 1], [0, 1]], 16), np.array([20, 20])
    assert hit_rate(prefixes, tokens, 31) == 1 / 4


def test_an_answer_is_found_by_the_next_turn_and_is_not_asked_for():
    prompt, output = np.array([16, 49]), np.array([32, 1])
    prefixes = session_prefixes(np.array([0, 0]), prompt, output)
    assert hit_rate(prefixes, prompt, None) == 3 / 5  # one block is asked for by the first turn, four by the second
    apart = session_prefixes(np.array([-1, -1]), prompt, output)
    assert hit_rate(apart, prompt, None) == 0


def test_runs_that_go_on_over_two_requests_stay_apart():
    prefixes = listed_prefixes([[0, 1], [2, 3], [], [4, 6]], 16)
    assert [prefixes.blocks(request) for request in range(4)] == [[0, 1], [2, 3], [], [4, 6]]
    np.testing.assert_array_equal(prefixes.first, [0, 2, 4, 6])


@pytest.mark.parametrize("capacity", [8, 30, 100])
def test_the_cache_is_the_block_pool_whose_requests_go_at_once(capacity):
    rng = np.random.default_rng(capacity)
    texts = [[]]
    for _ in range(400):
        trunk = texts[rng.integers(max(0, len(texts) - 20), len(texts))]
        trunk = trunk[: rng.integers(0, min(len(trunk), 5) + 1)]
        texts.append([*trunk, *(1000 * len(texts) + np.arange(rng.integers(1, 4))).tolist()])
    cache, pool, hits = PrefixCache(capacity), BlockPool(capacity, 16), 0
    for text in texts:
        found = pool.find(text)
        assert cache.find(text) == len(found)
        hits += len(found)
        pool.hold(found)
        blocks = [*found, *pool.allocate(len(text) - len(found))]
        for block, content in zip(blocks, text, strict=True):
            pool.fill(block, content)
        pool.release(blocks)
        cache.add(text)
    assert hits > 100


def test_a_published_trace(data_dir):
    trace = read_trace(data_dir / "mooncake" / "conversation_trace.jsonl.gz")
    assert trace.prefixes is not None
    assert trace.prefixes.prompt_blocks(trace.prompt_tokens).sum() == 288_500
    assert hit_rate(trace.prefixes, trace.prompt_tokens, None) == 105_710 / 288_500
    rates = [hit_rate(trace.prefixes, trace.prompt_tokens, size) for size in (10**4, 10**5, 10**6, 10**7)]
    np.testing.assert_allclose(rates, [0.0417, 0.0419, 0.0533, 0.2852], atol=5e-5)

"""Prefix caching: the engine against the reference, which keeps every block."""

import numpy as np
import pytest
from cases import PENCIL, random_site, site_arrays
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxroute
from jaxroute import Texts
from jaxroute.errors import UserError
from jaxroute.serving.reference import Result, simulate
from jaxroute.serving.reference import Texts as ReferenceTexts

TOLERANCE = 1e-3  # s, on every request
# As in test_replay: events that are nearer to each other than this say nothing.
RESOLUTION = 1e-5  # s
# A seed without such events among 3,000 requests.
LONG_SEED = 1


def sessions_case(rng, site, num_requests, *, rate, turns=6, system=40, prompt=60, output=40, apps=3, edits=0.2):
    """Requests of chats that come in turns, of several applications, and some with neither, at random experts."""
    num_experts = len(site["kv_capacity"])
    room = int(site["kv_capacity"].min())
    arrival = np.cumsum(rng.exponential(1 / rate, num_requests))
    lengths = rng.integers(0, system + 1, apps)
    live: list[dict] = []
    number = 0
    rows = []
    for _ in range(num_requests):
        kind = rng.random()
        new, answer = int(rng.integers(1, prompt)), int(rng.integers(1, output))
        if kind < 0.15:
            rows.append((-1, 0, -1, 0, new, answer, int(rng.integers(num_experts))))
            continue
        if kind < 0.4 or not live:
            app = int(rng.integers(-1, apps))
            live.append({"session": number, "app": app, "text": 0, "left": int(rng.integers(1, turns + 1))})
            number += 1
        chat = live[int(rng.integers(len(live)))]
        head = int(lengths[chat["app"]]) if chat["app"] >= 0 else 0
        shared = chat["text"]
        if shared and rng.random() < edits:
            shared = int(rng.integers(0, shared + 1))
        start = max(shared, head)
        if start + new + answer > room:
            live.remove(chat)
            rows.append((-1, 0, -1, 0, new, answer, int(rng.integers(num_experts))))
            continue
        expert = chat.setdefault("expert", int(rng.integers(num_experts)))
        if rng.random() < 0.3:
            expert = chat["expert"] = int(rng.integers(num_experts))
        rows.append((chat["session"], shared, chat["app"], head, start + new, answer, expert))
        chat["text"] = start + new + answer
        chat["left"] -= 1
        if chat["left"] <= 0:
            live.remove(chat)
    session, shared, app, head, prompts, outputs, experts = (np.array(column) for column in zip(*rows, strict=True))
    return arrival, prompts, outputs, experts, (session, shared, app, head)


def both(site, case, block_size):
    arrival, prompts, outputs, experts, texts = case
    expected = simulate(site, arrival, prompts, outputs, experts, texts=ReferenceTexts(*texts, block_size))
    outcomes = jaxroute.replay(
        jaxroute.Site(**site),
        jaxroute.Requests(arrival, prompts, outputs, Texts(*texts)),
        experts,
        prefix_caching=True,
        block_size=block_size,
    )
    return outcomes, expected


def assert_agree(outcomes: "jaxroute.Outcomes", expected: Result) -> None:
    for name in ("status", "preemptions", "cached_tokens"):
        np.testing.assert_array_equal(getattr(outcomes, name), getattr(expected, name), err_msg=name)
    for name in ("ttft", "latency"):
        np.testing.assert_allclose(
            getattr(outcomes, name), getattr(expected, name), rtol=0, atol=TOLERANCE, err_msg=name
        )


# One shape for all random cases, so that the engine compiles once.
NUM_REQUESTS, NUM_SESSIONS = 200, 128


@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.sampled_from([2.0, 5.0, 10.0, 30.0]),
    system=st.sampled_from([0, 30, 80]),
)
def test_random_sessions_agree_with_the_reference(seed, rate, system):
    """Chats in turns, some edited, some overtaking each other, at experts that keep only a few of them."""
    rng = np.random.default_rng(seed)
    site = random_site(rng, 2, 3)
    site["kv_capacity"] = rng.choice([120, 200, 400], 3).astype(np.int32)
    case = sessions_case(rng, site, NUM_REQUESTS, rate=rate, turns=8, system=system, prompt=30, output=60)
    outcomes, expected = both(site, case, 16)
    assume(expected.closest_call > RESOLUTION)
    assert_agree(outcomes, expected)


def long_case(seed: int):
    """3,000 requests of some 700 chats at three slow experts, whose caches thrash and whose memory runs out."""
    rng = np.random.default_rng(seed)
    server = PENCIL | {"iteration_overhead": 0.01, "weight_load": 0.05, "compute_per_token": 2e-4}
    server |= {"decode_per_seq": 1e-3, "attention_per_token": 3e-6, "max_num_seqs": 16, "max_waiting": 64}
    site = site_arrays(*(server | {"kv_capacity": tokens} for tokens in (1200, 1600, 3000)))
    return site, sessions_case(rng, site, 3000, rate=2.5, turns=12, system=200, prompt=120, output=120, apps=5)


def test_a_long_case_agrees_with_the_reference():
    site, case = long_case(LONG_SEED)
    outcomes, expected = both(site, case, 16)
    assert expected.closest_call > RESOLUTION
    assert expected.preemptions.sum() >= 300
    prompts = case[1][expected.status == 0].sum()
    assert 0.1 < expected.cached_tokens.sum() / prompts < 0.9
    assert_agree(outcomes, expected)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("session", [0, 0.5], "texts: session"),
        ("session", [0, -2], "texts: session"),
        ("application", [0], "texts: application has shape"),
        ("shared_tokens", [0, 9], r"texts: shared_tokens\[1\]=9 is not below the request's prompt_tokens, 9"),
        ("system_tokens", [9, 0], r"texts: system_tokens\[0\]=9 is not below"),
    ],
)
def test_what_is_no_text_is_refused(column, values, message):
    texts = Texts([0, 0], [0, 4], [-1, -1], [0, 0])._replace(**{column: values})
    requests = jaxroute.Requests([0.0, 1.0], [9, 9], [2, 2], texts)
    with pytest.raises(UserError, match=message):
        jaxroute.replay(jaxroute.Site(**site_arrays(PENCIL)), requests, [0, 0], prefix_caching=True)

"""Seats, queue and slots are three things: queues without bound, and what the simulation has no room for."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.evaluation.judge import evaluate, overflow_line
from jaxroute.scenarios import build_env
from jaxroute.serving.site import UNBOUNDED

UNBOUNDED_QUEUES = ("site=edge3", "bank.num_prompts=200", *(f"site.experts.{n}.max_waiting=null" for n in range(3)))
NUM_STEPS = 160


def episode(*words, expert=0):
    """Send all requests to one expert; returns the environment, its parameters and each step's info."""
    env, params = build_env(load_config([*UNBOUNDED_QUEUES, *words]))

    def step(state, key):
        _, state, _, _, _, info = env.step(key, state, jnp.int32(expert), params)
        return state, info

    start = jax.jit(env.reset)(jax.random.key(0), params)[1]
    state, info = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys))(
        start, jax.random.split(jax.random.key(1), NUM_STEPS)
    )
    return env, params, state, jax.device_get(info)


def in_flight(state):
    return int(state.site.num_running[0] + state.site.num_waiting[0])


def test_a_queue_without_bound_rejects_nothing_and_what_does_not_fit_is_counted():
    env, params, state, info = episode("workload.rate=20", "env.num_slots=14")
    assert (params.site.max_waiting == UNBOUNDED).all()
    assert env.num_slots == 14
    assert not info["rejected"].any()
    assert info["overflowed"].sum() > 20
    active = in_flight(state)
    assert active <= 14
    # Every request ends once: overflowed or completed; or it is still there.
    assert info["overflowed"].sum() + info["num_completed"].sum() + active == NUM_STEPS
    assert not info["overflowed"][:14].any()


def test_with_enough_slots_nothing_overflows():
    """And the queue grows beyond what a bounded one would hold."""
    env, _, state, info = episode("workload.rate=20", "env.num_slots=200")
    assert env.num_slots == 200
    assert not info["rejected"].any()
    assert not info["overflowed"].any()
    assert in_flight(state) > 40


@pytest.mark.parametrize(
    ("words", "slots"),
    [
        (["site=edge3"], 4 + 2),
        ([*UNBOUNDED_QUEUES, "workload.rate=30"], 4 + 16),
        ([*UNBOUNDED_QUEUES, "workload.rate=0.3"], 4 + 16),
        ([*UNBOUNDED_QUEUES, "site.experts.0.max_waiting=500"], 4 + 500),
        (["site=rack4", "workload.rate=40"], 256 + 100),
        (["site=rack16", "workload.rate=160"], 1024 + 100),
    ],
    ids=str,
)
def test_slots_are_chosen_from_the_load(words, slots):
    assert build_env(load_config(words))[0].num_slots == slots


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["site=rack4", "env.num_slots=200"], "env: num_slots=200 is less than the 256 seats of site rack4"),
        (["env.num_slots=0"], "env: num_slots=0 must be at least 1"),
    ],
)
def test_too_few_slots(words, message):
    with pytest.raises(UserError) as raised:
        build_env(load_config(words))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_an_evaluation_says_by_how_much_and_what_to_set():
    words = ("policies=[random]", "eval.episodes=2", "eval.requests=150", "eval.warmup=10", "eval.loads=[1]")
    config = load_config([*UNBOUNDED_QUEUES, "workload.rate=60", "env.num_slots=13", *words])
    console = Console(file=io.StringIO(), width=500)
    result = evaluate(config, console, command="test")
    share = float(np.mean(result.summaries[60.0]["random"]["overflow_rate"]))
    assert share > 0.1
    said = console.file.getvalue()
    assert f"Up to {share:.1%} of the requests (random at 60 requests/s)" in said
    assert "set for instance env.num_slots=26" in said


def test_nothing_is_said_where_slots_sufficed():
    assert overflow_line({8.0: {"random": {"overflow_rate": np.zeros(3)}}}, 16) == ""


@pytest.mark.parametrize("site", ["rack4", "rack16"])
def test_every_number_of_a_rack_is_vllms(site):
    """Seats and batches by the card, as EngineArgs.get_batch_defaults has them; an unbounded queue."""
    for expert in load_config([f"site={site}"]).site.experts:
        large = expert.accelerator in ("H100", "4x H100", "RTX PRO 6000")
        defaults = (1024, 8192, None) if large else (256, 2048, None)
        assert (expert.max_num_seqs, expert.max_num_batched_tokens, expert.max_waiting) == defaults
        assert 20_000 < expert.kv_capacity < 1_500_000

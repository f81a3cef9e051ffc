"""Routing rules: one observation that pins each decision, full experts, ties, memory, and the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from episodes import NUM_ENVS, ROUTERS, changed, edge6, play
from observations import NUM_EXPERTS, observation

from jaxroute.banks.bank import NoWorse
from jaxroute.errors import UserError
from jaxroute.policies import LEARNED, RULES, learned_policy, rules_named
from jaxroute.policies.rules import EXPLORATION, LEAST, MOST, PREFIX_RULES

DRAWS = {"random", "weighted_random", "power_of_two", "lowest_latency", "prefix_affinity", "session_hash"}
"""Rules that decide with their key."""

# Not those tuned on some workload, which may change.
PARAMS = {"slo_headroom": LEAST, "quality_threshold": 0.1, "win_rate": 0.4, "weighted_sum": 0.2}
HYBRID = ("hybrid_det", "hybrid_prob", "hybrid_trans")
PARAMS |= {"sticky_until_saturated": 0.2}
PARAMS |= {"interference_aware": (0.5, 1.0)} | dict.fromkeys(HYBRID, 0.7)


@jax.jit
def all_decisions(obs, key):
    return {name: rule.act(PARAMS.get(name, rule.params), obs, key, rule.memory)[0] for name, rule in RULES.items()}


MANY = 1024
many_decisions = jax.jit(jax.vmap(all_decisions))


def decide(name, obs, seed=0):
    return int(all_decisions(obs, jax.random.key(seed))[name])


# ---- Each rule's decision ----------------------------------------------------------------------------------

PINNED = {
    # Waiting and running, and as many slots of either count the same: 3, 2 and 1 in all.
    "shortest_queue": [({"num_waiting": [2, 0, 0], "num_running": [1, 2, 1]}, 2)],
    # 4 * 1 + 0, 3, 5: nobody waits at the second, although it holds more requests than the first.
    "vllm_dp": [({"num_waiting": [1, 0, 1], "num_running": [0, 3, 1]}, 1)],
    # 0.3, 0.25 and 0.2, where the tokens in use rise.
    "least_kv": [({"kv_used": [300, 500, 1000], "kv_capacity": [1000, 2000, 5000]}, 2)],
    # 900 / 3, 400 / 1, 500 / 2; the idle second counts as if it held one.
    "free_kv_per_request": [
        (
            {
                "kv_used": [100, 600, 500],
                "kv_capacity": 1000,
                "num_running": [2, 0, 1],
                "num_waiting": [1, 0, 1],
            },
            1,
        )
    ],
    "shortest_work": [
        # 400 * 0.02 / 4, 300 * 0.02 / 2, and 300 * 0.02 / 4 but 1,000 * 0.001 of prefill before: 2, 3, 2.5 s.
        (
            {
                "pending_output": [400, 300, 300],
                "pending_prefill": [0, 0, 1000],
                "compute_per_token": 1e-3,
                "num_running": [4, 2, 4],
            },
            0,
        ),
        # 16 requests, but 8 seats: 1,200 * 0.02 / 8 = 3 s; those on their way find a seat: 200 * 0.02 / 2 = 2 s.
        ({"pending_output": [1200, 200, 250], "num_running": [8, 0, 2], "num_waiting": [8, 2, 0]}, 1),
    ],
    "llm_d": [
        # Queue 0, 1/3, 1 and KV 0.9, 0.6, 0.1.
        ({"num_waiting": [3, 2, 0], "kv_used": [1000, 4000, 9000]}, 2),
        ({"num_waiting": [3, 2, 0], "kv_used": [1000, 1000, 9000]}, 1),
        # All queues equal: the KV memory decides.
        ({"num_waiting": 2, "kv_used": [5000, 4000, 6000]}, 1),
        # The long queue of a full expert stretches no scale: 1 + 0.5 against 0 + 0.9.
        ({"num_waiting": [4, 0, 1], "kv_used": [0, 5000, 1000], "available": [False, True, True]}, 1),
    ],
    "dynamo_kv": [
        # Blocks beside the arriving prompt's: 20 + 10, 5 + 20, 0 + 26.
        ({"pending_prefill": [320, 80, 0], "kv_used": [160, 320, 416]}, 1),
        # A block that is in use in part is in use: 10.5 + 7 against 10.25 + 8, with 7 * 16 = 112.
        ({"pending_prefill": [168, 164, 168], "kv_used": [112, 113, 113]}, 0),
        # What is cached need not be prefilled: 20 - 6 + 10 against 5 + 20.
        ({"pending_prefill": [320, 80, 320], "kv_used": [160, 320, 416], "cached_tokens": [96, 0, 0]}, 0),
    ],
    # With L = 0.04; closest to it is the second.
    "slo_headroom": [
        ({"normalised_latency": [0.02, 0.038, 0.05]}, 1),
        # Nobody meets it: the smallest violation, unless one is idle.
        ({"normalised_latency": [0.07, 0.05, 0.09], "num_running": 1}, 1),
        ({"normalised_latency": [0.07, 0.05, 0.09], "num_running": [1, 1, 0]}, 2),
        ({"normalised_latency": [0.07, 0.05, 0.09], "num_running": [0, 1, 0]}, 0),
    ],
    # 0.1 + 100 * 0.02, 0.5 + 100 * 0.01, 0.05 + 300 * 0.01: neither the first token nor the pace nor the length alone.
    "shortest_expected_delay": [
        (
            {
                "ttft": [0.1, 0.5, 0.05],
                "tpot": [0.02, 0.01, 0.01],
                "predicted_output_tokens": [100, 100, 300],
            },
            1,
        )
    ],
    "quality_only": [({"predicted_quality": [0.3, 0.6, 0.5], "in_time": [1, 0, 1], "qos": [0.3, 0, 0.5]}, 1)],
    # Within 0.1 of the best: the last two, of which the second is faster. The fastest is not good enough.
    "quality_threshold": [
        ({"predicted_quality": [0.75, 0.82, 0.9], "weight_load": [0.01, 0.02, 0.04]}, 1),
        ({"predicted_quality": [0.75, 0.78, 0.9], "weight_load": [0.01, 0.02, 0.04]}, 2),
        # Good enough is judged by the best that can be had: within 0.1 of 0.82 is the second alone.
        (
            {
                "predicted_quality": [0.6, 0.82, 0.95],
                "weight_load": [0.01, 0.02, 0.04],
                "available": [True, True, False],
            },
            1,
        ),
    ],
    # Strong is the last, with q = 0.8; weak the second, the fastest. It wins with 0.8 * 0.6 > 0.4, then 0.8 * 0.4.
    "win_rate": [
        ({"predicted_quality": [0.5, 0.4, 0.8], "weight_load": [0.03, 0.01, 0.02]}, 2),
        ({"predicted_quality": [0.5, 0.6, 0.8], "weight_load": [0.03, 0.01, 0.02]}, 1),
        # A full one is neither: of the others 0.5 * 0.6 wins too seldom.
        (
            {
                "predicted_quality": [0.5, 0.4, 0.8],
                "weight_load": [0.03, 0.01, 0.02],
                "available": [True, True, False],
            },
            1,
        ),
    ],
    "lowest_latency": [
        ({"recent_latency": [0.05, 0.03, 0.034]}, 1),
        # Where nothing completed lately, nothing is slow.
        ({"recent_latency": [0.05, 0.03, 0.0]}, 2),
    ],
    # q - 0.2 l / L: 0.65, but too late; 0.6 - 0.15; 0.55 - 0.05.
    "weighted_sum": [
        ({"predicted_quality": [0.9, 0.6, 0.55], "normalised_latency": [0.05, 0.03, 0.01]}, 2),
        # Nobody meets the requirement of 0.04: all compete, 0.9 - 0.25, 0.6 - 0.225, 0.55 - 0.3.
        ({"predicted_quality": [0.9, 0.6, 0.55], "normalised_latency": [0.05, 0.045, 0.06]}, 0),
    ],
    "interference_aware": [
        # Created 4 * 0.1, 1 * 0.3, 2 * 0.2, of 0.4; received 1, 0.3 and 1.4, of 1.4: 0.86, 0.48 and 1.
        (
            {
                "num_running": [4, 1, 1],
                "num_waiting": [0, 0, 1],
                "tpot": [0.022, 0.026, 0.024],
                "tpot_alone": [0.011, 0.02, 0.01],
            },
            1,
        ),
        # The same created; received 0.1, 1.6 and 0.5: 0.53, 0.88 and 0.66.
        (
            {
                "num_running": [4, 1, 1],
                "num_waiting": [0, 0, 1],
                "tpot": [0.022, 0.026, 0.024],
                "tpot_alone": [0.02, 0.01, 0.016],
            },
            0,
        ),
        # The second would be too late; if all were, it would not matter.
        (
            {
                "num_running": [4, 1, 2],
                "tpot": [0.022, 0.026, 0.023],
                "tpot_alone": [0.011, 0.026, 0.0225],
                "normalised_latency": [0.03, 0.05, 0.03],
            },
            2,
        ),
        ({"num_running": [4, 1, 2], "tpot": [0.022, 0.021, 0.023], "normalised_latency": 0.05}, 1),
    ],
    # 3 c / 100 + 2 queue + 2 (1 - K): 1.5 + 0 + 2, 0 + 2 + 2 and 0.9 + 2 + 1.
    "llm_d_prefix": [
        ({"cached_tokens": [50, 0, 30], "num_waiting": [2, 0, 0], "kv_used": [0, 0, 5000]}, 1),
        ({"cached_tokens": [50, 0, 90], "num_waiting": [2, 0, 0], "kv_used": [0, 0, 5000]}, 2),
    ],
    # 0.1 ms a token: an expert with more than 2,000 tokens to prefill is saturated.
    "sticky_until_saturated": [
        ({"cached_tokens": [80, 48, 0], "pending_prefill": [1900, 0, 0]}, 0),
        ({"cached_tokens": [80, 48, 0], "pending_prefill": [2100, 500, 0]}, 1),
        # All that have some of it are saturated: 2,120, 2,152 and 600 tokens to prefill.
        ({"cached_tokens": [80, 48, 0], "pending_prefill": [2100, 2100, 500]}, 2),
        # Of equal prefixes, the one with less to prefill.
        ({"cached_tokens": [48, 48, 0], "pending_prefill": [500, 400, 0]}, 1),
        ({"cached_tokens": [80, 48, 0], "available": [False, True, True]}, 1),
    ],
    "cache_aware": [
        ({"cached_tokens": [16, 48, 0], "num_running": [0, 5, 0]}, 1),
        # Less than 0.3 of the prompt: the fewest requests.
        ({"cached_tokens": [16, 0, 0], "num_running": [3, 2, 1]}, 2),
        # 70 more than the idlest, and more than 1.5 times as many.
        ({"cached_tokens": [0, 48, 0], "num_running": [2, 71, 1]}, 2),
        ({"cached_tokens": [0, 48, 0], "num_running": [150, 214, 160]}, 1),
        # The longest prefix is at one that would refuse.
        ({"cached_tokens": [0, 90, 40], "available": [True, False, True]}, 2),
    ],
    "prefix_affinity": [
        ({"cached_tokens": [0, 16, 0], "num_running": [0, 5, 0]}, 1),
        ({"cached_tokens": [16, 16, 0], "num_running": [5, 4, 0]}, 1),
    ],
    "qos_greedy": [({"qos": [0.4, 0.3, 0.6], "qos_loss": [0, 0, 0.5], "predicted_quality": [0.4, 0.9, 0.6]}, 2)],
    "impact_greedy": [({"qos": [0.4, 0.3, 0.6], "qos_loss": [0, 0, 0.5]}, 0)],
}
# Without scores of heads they go by the predicted qualities, alike.
PINNED |= {
    name: [
        # No worse than the best, 0.8: with 1 - 0.8 * 0.5 = 0.6, 1 - 0.8 * 0.3 = 0.76 and 1 - 0.8 * 0.2 = 0.84.
        ({"predicted_quality": [0.5, 0.7, 0.8], "weight_load": [0.01, 0.02, 0.04]}, 1),
        # 0.52, 0.68 and 0.84: the best alone is good enough. Then 0.64, 0.76 and 0.7.
        ({"predicted_quality": [0.4, 0.6, 0.8], "weight_load": [0.01, 0.02, 0.04]}, 2),
        ({"predicted_quality": [0.4, 0.6, 0.5], "weight_load": [0.01, 0.02, 0.04]}, 1),
        # 0.72, 0.76 and 0.68: where nobody is likely to be right, the fastest will do.
        ({"predicted_quality": [0.3, 0.4, 0.2], "weight_load": [0.01, 0.02, 0.04]}, 0),
        # The best that can be had is 0.6, and no worse than that is the second with 0.76.
        (
            {
                "predicted_quality": [0.4, 0.6, 1.0],
                "weight_load": [0.01, 0.02, 0.04],
                "available": [True, True, False],
            },
            1,
        ),
    ]
    for name in HYBRID
}
CASES = [(name, changes, expected) for name, cases in PINNED.items() for changes, expected in cases]


@pytest.mark.parametrize(("name", "changes", "expected"), CASES, ids=[case[0] for case in CASES])
def test_decisions(name, changes, expected):
    assert decide(name, observation(**changes)) == expected


def test_every_rule_is_pinned():
    assert len(RULES) - len(PREFIX_RULES) == 24  # as the README says
    assert set(RULES) == {*PINNED, "random", "weighted_random", "power_of_two", "round_robin", "session_hash"}
    assert all(rule.name == name for name, rule in RULES.items())


def shares(name, obs):
    """How often each expert is chosen."""
    obs = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (MANY, *leaf.shape)), obs)
    chosen = many_decisions(obs, jax.random.split(jax.random.key(0), MANY))[name]
    return np.bincount(chosen, minlength=NUM_EXPERTS) / MANY


def test_random_is_uniform():
    np.testing.assert_allclose(shares("random", observation()), 1 / 3, atol=0.05)


def test_weighted_random_follows_capacity():
    # 8 / 0.02, 16 / 0.02 and 8 / 0.04 sequences per second: 2 to 4 to 1.
    changes = {"max_num_seqs": [8, 16, 8], "weight_load": [0.02, 0.02, 0.04]}
    np.testing.assert_allclose(shares("weighted_random", observation(**changes)), [2 / 7, 4 / 7, 1 / 7], atol=0.05)
    changes["available"] = [True, False, True]
    np.testing.assert_allclose(shares("weighted_random", observation(**changes)), [2 / 3, 0, 1 / 3], atol=0.05)


def test_power_of_two_takes_the_better_of_two():
    # 500, 450 and 470 tokens: the second wins every draw that it is in, the first none.
    changes = {"pending_prefill": [100, 400, 0], "pending_output": [400, 50, 470]}
    np.testing.assert_allclose(shares("power_of_two", observation(**changes)), [0, 2 / 3, 1 / 3], atol=0.05)
    # Only those with room are drawn.
    assert shares("power_of_two", observation(**changes, available=[True, False, True])).tolist() == [0, 0, 1]
    # Of two alike, the lower index.
    np.testing.assert_allclose(shares("power_of_two", observation()), [2 / 3, 1 / 3, 0], atol=0.05)


def test_slo_headroom_explores():
    obs = observation(normalised_latency=[0.02, 0.038, 0.05])
    explored = shares("slo_headroom", obs)
    assert explored[0] == 0
    assert 0 < explored[2] < 3 * EXPLORATION
    # If all meet L, or none does, there is nothing to explore.
    assert shares("slo_headroom", observation(normalised_latency=[0.02, 0.038, 0.03])).tolist() == [0, 1, 0]
    assert shares("slo_headroom", observation(normalised_latency=[0.05, 0.06, 0.07])).tolist() == [1, 0, 0]


def test_slo_headroom_can_take_the_furthest():
    rule, key = RULES["slo_headroom"], jax.random.key(0)
    obs = observation(normalised_latency=[0.03, 0.038, 0.02])
    assert [int(rule.act(side, obs, key, rule.memory)[0]) for side in (LEAST, MOST)] == [1, 2]


def test_lowest_latency_draws_among_the_close():
    obs = observation(recent_latency=[0.0328, 0.03, 0.0332])
    assert {decide("lowest_latency", obs, seed) for seed in range(20)} == {0, 1}


def test_round_robin_takes_turns():
    rule = RULES["round_robin"]
    obs, memory, actions = observation(), rule.memory, []
    for _ in range(7):
        action, memory = rule.act(rule.params, obs, jax.random.key(0), memory)
        actions.append(int(action))
    assert actions == [0, 1, 2, 0, 1, 2, 0]
    # Its turn has come, but it is full: the next one serves, and the one after that is next.
    action, memory = rule.act(rule.params, observation(available=[True, False, True]), jax.random.key(0), memory)
    assert int(action) == 2
    action, _ = rule.act(rule.params, obs, jax.random.key(0), memory)
    assert int(action) == 0


def test_sessions_keep_their_expert():
    """Each session its own, whatever the load; all experts are used; a full one leaves the others' where they are."""
    sessions = [observation(session=jnp.int32(s), num_running=[s % 7, 1, 5]) for s in range(60)]
    chosen = [decide("session_hash", obs, seed) for seed, obs in enumerate(sessions)]
    assert chosen == [decide("session_hash", observation(session=jnp.int32(s))) for s in range(60)]
    assert min(np.bincount(chosen, minlength=NUM_EXPERTS)) > 10
    without = [
        decide("session_hash", observation(session=jnp.int32(s), available=[True, False, True])) for s in range(60)
    ]
    assert all(now == then for now, then in zip(without, chosen, strict=True) if then != 1)
    # Without a session, anywhere.
    assert {decide("session_hash", observation(session=jnp.int32(-1)), seed) for seed in range(30)} == {0, 1, 2}


def test_rules_by_prefix_are_named_or_asked_for():
    assert not {rule.name for rule in rules_named(None)} & set(PREFIX_RULES)
    assert {rule.name for rule in rules_named(None, prefixes=True)} >= set(PREFIX_RULES)
    assert rules_named(["cache_aware"]) == [RULES["cache_aware"]]


def test_interference_aware_weighs_and_admits():
    rule, key = RULES["interference_aware"], jax.random.key(0)
    # Created 0.4 and 0.3; received 0.1 and 1.6; latencies of three quarters of the limit, and half as much again.
    changes = {"num_running": [4, 1, 4], "tpot": [0.022, 0.026, 0.03], "tpot_alone": [0.02, 0.01, 0.01]}
    obs = observation(**changes, normalised_latency=[0.03, 0.06, 0.03])

    def chosen(delta, theta):
        return int(rule.act((delta, theta), obs, key, ())[0])

    assert chosen(1.0, 0.5) == 1  # created alone: the old rule
    assert chosen(0.0, 0.5) == 0
    assert chosen(1.0, 0.7) == 0  # the second has L / latency = 2 / 3
    assert chosen(1.0, 1.5) == 1  # none is admitted, so all are


def test_hybrid_rules_go_by_the_scores_of_the_heads():
    no_worse = NoWorse(*(jnp.array(score) for score in ([0.8, 0.9, 1.0], [0.6, 0.9, 1.0], [0.2, 0.6, 1.0])))
    # Predicted qualities say otherwise.
    changes = {"predicted_quality": [0.9, 0.1, 0.1], "weight_load": [0.01, 0.02, 0.04]}
    for name, expected in (("hybrid_det", 0), ("hybrid_prob", 1), ("hybrid_trans", 2)):
        rule = RULES[name]
        action, _ = rule.act(0.7, observation(no_worse=no_worse, **changes), jax.random.key(0), rule.memory)
        assert int(action) == expected
        # Neither of those that are left is good enough: the better score.
        full = observation(no_worse=no_worse, **changes, available=[True, True, False])
        assert int(rule.act(0.95, full, jax.random.key(0), rule.memory)[0]) == 1


@pytest.mark.parametrize("name", ["weighted_sum", "slo_headroom", "interference_aware"])
def test_who_is_full_is_ignored_when_a_rule_asks_who_meets_the_limit(name):
    # The only one in time is full: the others compete as if none were.
    changes = {
        "predicted_quality": [0.9, 0.8, 0.5],
        "normalised_latency": [0.1, 0.05, 0.01],
        "num_running": [3, 1, 5],
        "tpot": 0.03,
    }
    assert decide(name, observation(**changes)) == 2
    assert decide(name, observation(**changes, available=[True, True, False])) == 1


# ---- What holds for every rule -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arbitrary():
    """Decisions on observations that make no sense, with every pattern of full experts."""
    count = MANY
    rng = np.random.default_rng(0)
    numbers = jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.choice([0.0, 1e-3, 0.5, 1.0, 50.0], (count, *leaf.shape)), jnp.float32)
            if leaf.dtype == jnp.float32
            else jnp.zeros((count, *leaf.shape), bool)
        ),
        observation(),
    )
    available = (np.arange(count)[:, None] >> np.arange(NUM_EXPERTS)) % 2 == 1
    arrival = numbers.arrival._replace(limits=jax.tree.map(lambda limit: limit + 1e-3, numbers.arrival.limits))
    positive = ("max_num_seqs", "kv_capacity", "weight_load", "iteration_time")
    experts = numbers.experts._replace(**{name: getattr(numbers.experts, name) + 1e-3 for name in positive})
    obs = numbers._replace(arrival=arrival, experts=experts._replace(available=jnp.asarray(available)))
    keys = jax.random.split(jax.random.key(0), count)
    return available, jax.tree.map(np.asarray, many_decisions(obs, keys))


@pytest.mark.parametrize("name", RULES)
def test_full_experts_are_spared(arbitrary, name):
    available, decisions = arbitrary
    taken = np.take_along_axis(available, decisions[name][:, None], -1)[:, 0]
    np.testing.assert_array_equal(taken, available.any(-1))


@pytest.mark.parametrize("name", RULES)
def test_the_last_one_with_room_is_taken(name):
    """However bad it looks."""
    for left in range(NUM_EXPERTS):
        only = np.arange(NUM_EXPERTS) == left
        changes = {field: np.where(only, 9.0, 0.1) for field in ("num_waiting", "num_running", "ttft", "tpot")}
        changes |= {field: np.where(only, 0.1, 0.9) for field in ("predicted_quality", "qos")}
        changes |= {field: np.where(only, 0.5, 0.01) for field in ("recent_latency", "normalised_latency")}
        assert decide(name, observation(**changes, available=only)) == left


@pytest.mark.parametrize("name", RULES)
def test_all_full_is_still_a_decision(arbitrary, name):
    available, decisions = arbitrary
    actions = decisions[name]
    assert np.issubdtype(actions.dtype, np.integer)
    assert set(actions[~available.any(-1)].tolist()) <= set(range(NUM_EXPERTS))
    assert (~available.any(-1)).sum() > 10


@pytest.mark.parametrize("name", sorted(set(PINNED) - DRAWS | {"round_robin"}))
def test_ties_go_to_the_lowest_index(name):
    assert decide(name, observation()) == 0
    assert decide(name, observation(available=[False, True, True])) == 1


def test_only_rules_that_draw_depend_on_the_key():
    for name in RULES:
        decided = {decide(name, observation(), seed) for seed in range(20)}
        assert (len(decided) > 1) == (name in DRAWS), name


# ---- In the environment ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played():
    """Each rule for an episode, jitted, vmapped and scanned."""
    _, params = edge6()
    # Few seats, so that some experts are full at times.
    params = changed(params, (10.0, 40.0), max_num_seqs=4, max_waiting=2)
    episodes = {}
    for start in range(1, len(ROUTERS), NUM_ENVS):
        names = ROUTERS[start : start + NUM_ENVS]
        batch = play(params, seed=7, routers=names)
        for e, name in enumerate(names):
            episodes[name] = jax.tree.map(lambda leaf, e=e: leaf[e], batch)
    return episodes


@pytest.mark.parametrize("name", RULES)
def test_every_rule_routes(played, name):
    episode = played[name]
    assert np.isfinite(episode.reward).all()
    available = episode.obs.experts.available
    chosen = np.take_along_axis(available, episode.action[:, None], -1)[:, 0]
    np.testing.assert_array_equal(chosen, available.any(-1))
    assert episode.info["num_completed"].sum() > 0


def test_rules_decide_in_the_loop_as_outside(played):
    for name in set(PINNED) - DRAWS - set(PARAMS):
        episode = played[name]
        obs = jax.tree.map(lambda leaf: leaf[40], episode.obs)
        assert decide(name, obs) == episode.action[40], name


def test_memory_is_carried(played):
    episode = played["round_robin"]
    room = episode.obs.experts.available.all(-1)
    undisturbed = room[1:] & room[:-1]
    assert undisturbed.sum() > 5
    turns = np.diff(episode.action) % 6
    assert (turns[undisturbed] == 1).all()


# ---- Learned and registered --------------------------------------------------------------------------------


def test_the_learned_router_takes_the_highest_logit():
    class Scale:
        def prepare(self, obs):
            return obs

        def apply(self, params, obs):
            return params * obs.candidates.predicted_quality, jnp.float32(0.0)

    obs = observation(predicted_quality=[0.5, 0.9, 0.1])
    for params, expected in ((1.0, 1), (-1.0, 2)):
        policy = learned_policy(Scale(), params)
        action, memory = policy.act(policy.params, obs, jax.random.key(0), policy.memory)
        assert (policy.name, int(action), memory) == (LEARNED, expected, policy.memory)


def test_rules_are_found_by_name():
    assert [rule.name for rule in rules_named(["qos_greedy", "random"])] == ["qos_greedy", "random"]
    assert [rule.name for rule in rules_named(None, prefixes=True)] == list(RULES)
    with pytest.raises(UserError):
        rules_named([])


def test_a_rule_named_twice_is_one_line():
    with pytest.raises(UserError, match=r"^policies: random is there 2 times; name each once$"):
        rules_named(["random", "qos_greedy", "random"])


@pytest.mark.parametrize(
    ("name", "suggested"), [("qos_gredy", "qos_greedy"), ("shortest-queue", "shortest_queue"), ("xyz", "random")]
)
def test_an_unknown_rule_is_one_line(name, suggested):
    with pytest.raises(UserError) as caught:
        rules_named(["random", name])
    message = str(caught.value)
    assert name in message
    assert suggested in message
    assert "\n" not in message

"""The action impact estimator: pencil values, bounds, extremes, and how well it predicts simulated episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PENCIL, site_arrays
from episodes import NUM_ENVS, NUM_STEPS, changed, edge6, play
from hypothesis import given
from hypothesis import strategies as st

import jaxroute
from jaxroute.env.impact import assess, estimate_impact
from jaxroute.env.types import Batch, Described
from jaxroute.serving.reference import simulate
from jaxroute.workloads.limits import Limits

NUM_EXPERTS, NUM_SLOTS = 6, 8
"""Of every hand-made case, so that the estimator compiles once."""
LOG_ERROR = 0.5
GAP = {"expert": 0}
"""An empty slot of the first expert, among others."""
MEAN_OVER_MEDIAN = np.exp(LOG_ERROR**2 / 2)


@jax.jit
def estimate(site, log_error, batch, request):
    outlook, load = assess(site, log_error, batch)
    return outlook, estimate_impact(site, log_error, batch, outlook, load, request)


def in_flight(expert, **known):
    """A request at an expert: decoding its fifth token of some twenty, after a prompt of ten, unless told otherwise."""
    usual = {
        "running": True,
        "prompt_tokens": 10,
        "generated": 4,
        "age": 10.0,
        "normalised": 4.0,
        "predicted_quality": 0.5,
        "predicted_output_tokens": 20 / MEAN_OVER_MEDIAN,
    }
    request = {"expert": expert, **usual, **known}
    request.setdefault("computed", request["prompt_tokens"] + max(request["generated"] - 1, 0))
    return request


def waiting(expert, **known):
    return in_flight(expert, **{"running": False, "generated": 0, "computed": 0} | known)


def predict(requests=(), experts=None, prompt_tokens=16, mean_length=8.0, quality=0.75, **limits):
    """Outlook and impact, as NumPy arrays, of an arrival at `NUM_EXPERTS` experts of the kind in tests/cases.py.

    Unless limits are given, all requests limit the normalised latency alone. If others are, what a request does not
    limit is infinite.
    """
    experts = experts or [{}] * NUM_EXPERTS
    site = jaxroute.Site(**site_arrays(*(PENCIL | {"network_delay": 0.5} | changes for changes in experts)))
    limits = limits or {"normalised": 2.0}
    limited = ["normalised"] if list(limits) == ["normalised"] else Limits._fields
    first_token = ["first_token"] * (len(limited) > 1)
    names = ["prompt_tokens", "computed", "generated", "age", "predicted_quality", "predicted_output_tokens"]
    fields = {name: np.zeros((NUM_SLOTS, NUM_EXPERTS), np.float32) for name in [*names, *first_token, *limited]}
    running, waiting = (np.zeros((NUM_SLOTS, NUM_EXPERTS), bool) for _ in range(2))
    used = [0] * NUM_EXPERTS
    for request in requests:
        expert = request["expert"]
        slot = used[expert]
        used[expert] += 1
        if request is GAP:
            continue
        running[slot, expert], waiting[slot, expert] = request["running"], not request["running"]
        for name, column in fields.items():
            column[slot, expert] = request.get(name, np.inf)
    length = np.full(NUM_EXPERTS, mean_length / MEAN_OVER_MEDIAN)
    batch = Batch(
        running,
        waiting,
        first_token=fields.pop("first_token", None),
        limits=Limits(**{name: fields.pop(name) for name in limited}),
        **fields,
    )
    limits = Limits(**{name: limits.get(name, np.inf) for name in limited})
    request = Described(prompt_tokens, limits, 0.0, np.full(NUM_EXPERTS, quality), length)
    request = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), request)
    return jax.tree.map(np.asarray, estimate(site, jnp.full(NUM_EXPERTS, LOG_ERROR), batch, request))


# ---- With pencil and paper ---------------------------------------------------------------------------------


def test_an_empty_expert():
    # A decode iteration at the middle of the answer: 1/4 + 1 + 1/16 + (16 + 8 / 2) / 64 = 1.625 s. The prompt is
    # prefilled in one that takes (16 + 1) / 8 - 1 = 1.125 s longer. Half a second there and half a second back.
    outlook, impact = predict()
    np.testing.assert_allclose(impact.ttft, 0.5 + 1.125 + 1.625)
    np.testing.assert_allclose(impact.tpot, 1.625)
    np.testing.assert_allclose(impact.normalised_latency, (3.25 + 7 * 1.625 + 0.5) / 8, rtol=1e-6)
    for value in (impact.qos_loss, impact.added_violations, outlook.expected_qos, outlook.pending_output):
        np.testing.assert_array_equal(value, 0)


def test_a_batch_of_two():
    # Alone with 10 + 4 tokens of context: 1/4 + 1 + 1/16 + 14 / 64 = 1.53125 s per iteration, half of which is left.
    # Together: 1/4 + 1 + 2/16 + (14 + 20) / 64 = 1.90625 s, and a prefill of (16 + 2) / 8 - 1 = 1.25 s.
    outlook, impact = predict([in_flight(0)])
    assert outlook.iteration_time[0] == pytest.approx(1.53125)
    assert impact.tpot[0] == pytest.approx(1.90625)
    assert impact.ttft[0] == pytest.approx(0.5 + 1.53125 / 2 + 1.25 + 1.90625)
    assert outlook.kv_used[0] == 13
    assert outlook.pending_prefill[0] == 0
    # The other experts do not notice.
    _, empty = predict()
    np.testing.assert_array_equal(impact.ttft[1:], empty.ttft[1:])


def test_a_seat_must_become_free():
    # One seat: with one running and one waiting, two must leave before the arrival runs.
    outlook, impact = predict([in_flight(0), waiting(0)], experts=[{"max_num_seqs": 1}] * NUM_EXPERTS)
    _, empty = predict(experts=[{"max_num_seqs": 1}] * NUM_EXPERTS)
    remaining = outlook.pending_output[0] / 2
    assert outlook.remaining_tokens[0, 0] + outlook.remaining_tokens[1, 0] == pytest.approx(2 * remaining)
    assert impact.ttft[0] - empty.ttft[0] > 2 * remaining * outlook.iteration_time[0]
    # The first in line waits for one.
    assert outlook.in_time[0, 0] > outlook.in_time[1, 0]


def test_a_gap_in_the_queue_is_nobodys_place():
    seats = [{"max_num_seqs": 1}] * NUM_EXPERTS
    queue = predict([in_flight(0), waiting(0), waiting(0)], seats)
    gap = predict([in_flight(0), waiting(0), GAP, waiting(0)], seats)
    np.testing.assert_allclose(gap[0].in_time[3, 0], queue[0].in_time[2, 0])
    np.testing.assert_allclose(gap[1].ttft, queue[1].ttft)


def test_memory_must_become_free():
    crowd = [in_flight(0, prompt_tokens=300) for _ in range(3)]
    _, roomy = predict(crowd, experts=[{"kv_capacity": 3000}] * NUM_EXPERTS)
    _, full = predict(crowd, experts=[{"kv_capacity": 913}] * NUM_EXPERTS)
    assert full.ttft[0] > roomy.ttft[0] + 5


def test_the_latest_to_come_runs_out_of_memory():
    """Two requests of 304 tokens with some sixteen to come, of which the memory holds one and most of the other."""
    pair = [in_flight(0, prompt_tokens=300, normalised=14.0) for _ in range(2)]
    (roomy, at_ease), (full, cramped) = (predict(pair, [{"kv_capacity": kv}] * NUM_EXPERTS) for kv in (10_000, 620))
    assert full.in_time[0, 0] == roomy.in_time[0, 0] > 0.5
    to_come = roomy.remaining_tokens[1, 0]
    odds = np.exp(((608 + to_come) / 620 - 1) / 0.04)
    # An iteration of the two, and half a second for the way back after ten.
    left = 14.0 * (4 + to_come) - (10.5 + roomy.iteration_time[0] * to_come)
    delay = 2 * roomy.iteration_time[0] * to_come
    late = odds / (1 + odds) * np.exp(-left / delay)
    assert late > 0.3
    assert full.in_time[1, 0] == pytest.approx(roomy.in_time[1, 0] * (1 - late), rel=1e-4)
    # The next one would not even find memory for its prompt at once.
    assert cramped.ttft[0] > at_ease.ttft[0] + delay / 4
    assert cramped.normalised_latency[0] > at_ease.normalised_latency[0]
    np.testing.assert_array_equal(cramped.in_time[1:], at_ease.in_time[1:])


def test_a_longer_queue_is_less_certain():
    """Behind it, the wait's spread shows: far from even odds, the probability is nearer to a half."""
    seat = [{"max_num_seqs": 1}] * NUM_EXPERTS
    for factor in (0.8, 1.25):
        by_queue = []
        for queue in (0, 4):
            crowd = [in_flight(0)] * (queue > 0) + [waiting(0)] * queue
            _, impact = predict(crowd, seat)
            _, judged = predict(crowd, seat, normalised=factor * impact.normalised_latency[0])
            by_queue.append(judged.in_time[0])
        assert abs(by_queue[0] - 0.5) > abs(by_queue[1] - 0.5) + 0.05


def test_even_odds_at_the_predicted_latency():
    _, impact = predict()
    for factor, probability in ((1.0, 0.5), (4.0, 1.0), (0.25, 0.0)):
        _, judged = predict(normalised=factor * impact.normalised_latency[0])
        np.testing.assert_allclose(judged.in_time, probability, atol=1e-3)
        np.testing.assert_allclose(judged.qos, 0.75 * judged.in_time, rtol=1e-6)


@pytest.mark.parametrize("generated", [0, 5, 20, 60])
def test_expected_remaining_tokens_are_those_of_a_log_normal(generated):
    outlook, _ = predict([in_flight(0, generated=generated)])
    lengths = np.exp(np.random.default_rng(0).normal(np.log(20 / MEAN_OVER_MEDIAN), LOG_ERROR, 1_000_000))
    expected = (lengths[lengths > generated] - generated).mean()
    assert outlook.remaining_tokens[0, 0] == pytest.approx(expected, rel=0.02)
    assert outlook.pending_output[0] == outlook.remaining_tokens[0, 0]


def test_a_runaway_answer_is_not_about_to_end():
    """A log-normal that has outlived four deviations is expected to go on for longer, not for one token."""
    outlook, _ = predict([in_flight(0, generated=20 * multiple) for multiple in (2, 4, 8, 16, 1000)])
    assert (np.diff(outlook.remaining_tokens[:5, 0]) > 0).all()


# ---- Against the simulator ---------------------------------------------------------------------------------


def test_alone_on_a_real_expert_as_simulated():
    """One request of the predicted length, on each expert of edge6."""
    _, params = edge6()
    site = {name: np.asarray(values) for name, values in params.site._asdict().items()}
    exact = jnp.full(NUM_EXPERTS, 1e-3)
    none, nothing = (np.zeros((NUM_SLOTS, NUM_EXPERTS), kind) for kind in (bool, np.float32))
    nobody = Batch(none, none, *[nothing] * 4, None, Limits(normalised=nothing), nothing, nothing)
    for prompt, length in ((30, 20), (200, 150), (1500, 800)):
        request = Described(
            prompt_tokens=jnp.float32(prompt),
            limits=Limits(normalised=jnp.float32(0.05)),
            age=jnp.float32(0.0),
            predicted_quality=jnp.ones(6),
            predicted_output_tokens=jnp.full(6, length, jnp.float32),
        )
        _, impact = estimate(params.site, exact, nobody, request)
        apart = simulate(site, 1e3 * np.arange(6), np.full(6, prompt), np.full(6, length), np.arange(6))
        per_token = (apart.latency + site["network_delay"]) / length
        np.testing.assert_allclose(impact.ttft, apart.ttft, rtol=0.03)
        np.testing.assert_allclose(impact.normalised_latency, per_token, rtol=0.01)


# ---- Bounds ------------------------------------------------------------------------------------------------


def assert_in_bounds(outlook, impact):
    for leaf in jax.tree.leaves((outlook, impact)):
        assert np.isfinite(leaf).all()
        assert (leaf >= 0).all()
    for probability in (outlook.in_time, impact.in_time):
        assert (probability <= 1).all()
    assert (impact.qos_loss <= outlook.expected_qos + 1e-5).all()
    assert (impact.normalised_latency > 0).all()


@pytest.mark.parametrize("more", [in_flight, waiting], ids=["running", "waiting"])
def test_more_load_is_worse(more):
    """Expert e holds e requests."""
    requests = [more(e) for e in range(NUM_EXPERTS) for _ in range(e)]
    for changes in ({}, {"max_num_seqs": 5}, {"weight_load": 0.1}, {"kv_capacity": 90}):
        experts = {"max_num_seqs": 8} | changes
        outlook, impact = predict(requests, experts=[experts] * NUM_EXPERTS, normalised=3.0)
        assert_in_bounds(outlook, impact)
        assert (np.diff(impact.in_time) <= 1e-6).all(), experts
        assert impact.in_time[0] > impact.in_time[-1] + 0.05, experts
        assert (np.diff(impact.normalised_latency) >= -1e-5).all(), experts
        assert (np.diff(impact.ttft) > 0).all(), experts
        assert (impact.qos_loss[0], impact.added_violations[0]) == (0, 0)


def test_neighbours_lose_most_at_the_edge():
    """At ease, near its limit, hopeless: only the middle one has something to lose."""
    outlook, impact = predict([in_flight(e, normalised=limit) for e, limit in enumerate((20.0, 1.8, 0.5))])
    assert outlook.in_time[0, 0] > 0.99
    assert 0.2 < outlook.in_time[0, 1] < 0.8
    assert outlook.in_time[0, 2] < 0.01
    assert impact.qos_loss[1] > 0.1
    assert impact.added_violations[1] == pytest.approx(impact.qos_loss[1] / 0.5)
    assert (impact.qos_loss[[0, 2]] < 0.01).all()


def test_longer_prompts_and_answers_cost_neighbours_more():
    crowd = [in_flight(0, normalised=2.4) for _ in range(3)]
    losses = [predict(crowd, prompt_tokens=p, mean_length=n)[1].qos_loss[0] for p, n in ((1, 4), (64, 4), (64, 40))]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize(
    ("requests", "arrival"),
    [
        ([in_flight(0, generated=100_000)], {}),
        ([in_flight(0, generated=1, predicted_output_tokens=1e-3)], {}),
        ([in_flight(0, prompt_tokens=1, generated=0, computed=0, age=0.0)], {"prompt_tokens": 1, "mean_length": 1.0}),
        ([in_flight(0, prompt_tokens=990, generated=10) for _ in range(8)], {"prompt_tokens": 999}),
        ([waiting(0, prompt_tokens=999, predicted_output_tokens=1e6) for _ in range(8)], {"mean_length": 1e6}),
        ([in_flight(0, age=1e6, normalised=1e-6)], {"normalised": 1e-6}),
        ([in_flight(0, predicted_quality=0.0, normalised=1e6)], {"normalised": 1e6}),
    ],
    ids=["runaway", "shorter than a token", "single tokens", "full memory", "long queue", "hopeless", "no limit"],
)
def test_extremes(requests, arrival):
    assert_in_bounds(*predict(requests, **arrival))


slot = st.fixed_dictionaries(
    {
        "running": st.booleans(),
        "prompt_tokens": st.integers(1, 4000),
        "generated": st.integers(0, 5000),
        "age": st.floats(0, 1000),
        "normalised": st.floats(1e-3, 10),
        "predicted_quality": st.floats(0, 1),
        "predicted_output_tokens": st.floats(1e-2, 5000),
    }
)


@given(
    batch=st.lists(slot, max_size=NUM_SLOTS),
    expert=st.fixed_dictionaries(
        {
            "weight_load": st.floats(1e-3, 1),
            "compute_per_token": st.floats(0, 0.01),
            "network_delay": st.floats(0, 1),
            "max_num_seqs": st.integers(1, 8),
            "kv_capacity": st.integers(10, 20_000),
        }
    ),
    prompt_tokens=st.integers(1, 4000),
    mean_length=st.floats(0.1, 5000),
)
def test_any_batch(batch, expert, prompt_tokens, mean_length):
    batch = sorted(batch, key=lambda request: not request["running"])
    requests = [in_flight(0, **request) for request in batch]
    outlook, impact = predict(requests, [expert] * NUM_EXPERTS, prompt_tokens, mean_length=mean_length)
    assert_in_bounds(outlook, impact)
    assert (impact.qos_loss[1:] == 0).all()
    if len(batch) < expert["max_num_seqs"]:
        # Company never makes the arrival faster.
        assert impact.normalised_latency[0] >= impact.normalised_latency[1] * (1 - 1e-5)


# ---- Calibration on simulated episodes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    """What `qos_greedy` was told of the expert that it chose on edge6 at the usual load, and what came out.

    Of requests that completed: nobody is rejected at this load, and the few per cent that are still running at the
    end of the episode are mostly runaway answers.
    """
    _, params = edge6()
    played = play(changed(params, (10.0, 10.0)), routers=("qos_greedy",), num_chunks=6)
    num_steps, columns = 6 * NUM_STEPS, []
    for e in range(NUM_ENVS):
        ended = played.info["ended"][e]
        request, expert = played.info["request"][e][ended], np.nonzero(ended)[2]
        # After a warm-up, and early enough that all but the longest answers end within the episode.
        known = (request >= num_steps // 8) & (request < num_steps * 5 // 8)
        request, expert = request[known], expert[known]
        impact = jax.tree.map(lambda leaf, e=e, at=(request, expert): leaf[e][at], played.obs.candidates.impact)
        outcome = {name: played.info[name][e][ended][known] for name in ("latency", "output_tokens", "in_time", "ttft")}
        columns.append(
            {
                "expert": expert,
                "predicted_latency": impact.normalised_latency,
                "latency": outcome["latency"] / outcome["output_tokens"],
                "predicted_in_time": impact.in_time,
                "in_time": outcome["in_time"],
                "predicted_ttft": impact.ttft,
                "ttft": outcome["ttft"],
            }
        )
    assert played.info["rejected"].mean() < 0.01
    merged = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    assert len(merged["expert"]) > 0.9 * NUM_ENVS * num_steps / 2
    return merged


def rank_correlation(a, b):
    """Spearman's, for values with few ties."""
    return np.corrcoef(*(np.argsort(np.argsort(values)) for values in (a, b)))[0, 1]


def test_the_share_in_time_is_predicted(calibration):
    assert calibration["predicted_in_time"].mean() == pytest.approx(calibration["in_time"].mean(), abs=0.03)


def test_latencies_are_ranked(calibration):
    assert rank_correlation(calibration["predicted_latency"], calibration["latency"]) > 0.9
    assert np.median(calibration["latency"] / calibration["predicted_latency"]) == pytest.approx(1, abs=0.1)


def test_latencies_are_ranked_at_each_expert(calibration):
    """Much of the rank correlation above only says that some LLMs are slower than others; this does not."""
    for expert, count in zip(*np.unique(calibration["expert"], return_counts=True), strict=True):
        if count > 50:
            here = calibration["expert"] == expert
            assert rank_correlation(calibration["predicted_latency"][here], calibration["latency"][here]) > 0.5


def test_times_to_first_token_are_ranked(calibration):
    assert rank_correlation(calibration["predicted_ttft"], calibration["ttft"]) > 0.7
    assert calibration["predicted_ttft"].mean() == pytest.approx(calibration["ttft"].mean(), rel=0.25)

"""The reference itself: worked examples, invariants, and the measured run."""

import itertools

import numpy as np
import pytest
from cases import HAND_CASES, PENCIL, Case, mean_latencies, random_case, site_arrays, vllm_run
from hypothesis import given
from hypothesis import strategies as st

from jaxroute.serving.reference import Iteration, simulate

PADDED = (64, 6)


@pytest.mark.parametrize("case", HAND_CASES.values(), ids=HAND_CASES)
def test_worked_examples(case):
    result = simulate(*case.inputs)
    for name, expected in case.expected.items():
        np.testing.assert_array_equal(getattr(result, name)[: len(expected)], expected, err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), num_experts=st.integers(1, 5))
def test_limits_and_conservation(seed, num_experts):
    case = random_case(seed, PADDED[0], num_experts, PADDED)
    log: list[Iteration] = []
    result = simulate(*case.inputs, observe=log.append)
    limits = [{name: values[e] for name, values in case.site.items()} for e in range(PADDED[1])]

    for it in log:
        limit = limits[it.expert]
        assert 1 <= len(it.running) <= limit["max_num_seqs"]
        assert 1 <= sum(it.tokens) <= limit["max_num_batched_tokens"]
        assert all(n >= 0 for n in it.tokens)
        # Not even a single request exceeds the memory: those that would are turned away on arrival.
        assert sum(it.computed) + sum(it.tokens) <= limit["kv_capacity"]
        assert not (it.admitted and it.preempted)
        assert it.running[len(it.running) - len(it.admitted) :] == it.admitted
        assert len(set(it.running + it.waiting)) == len(it.running) + len(it.waiting)

    for e in range(PADDED[1]):
        own = [it for it in log if it.expert == e]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
        assert result.iterations[e] == len(own)
        assert result.busy_seconds[e] == pytest.approx(sum(it.end - it.start for it in own))

    rows = np.arange(PADDED[0])
    prompt, output = (t[rows, case.assignment] for t in (case.prompt_tokens, case.output_tokens))
    scheduled, preempted = np.zeros(PADDED[0], int), np.zeros(PADDED[0], int)
    for it in log:
        scheduled[list(it.running)] += it.tokens
        preempted[list(it.preempted)] += 1
    completed = result.status == 0
    np.testing.assert_array_equal(preempted, result.preemptions)
    # Everything but the last token passes through the model once, and again whatever a preemption threw away.
    once = completed & (preempted == 0)
    np.testing.assert_array_equal(scheduled[once], (prompt + output - 1)[once])
    assert (scheduled[completed] >= (prompt + output - 1)[completed]).all()
    assert (scheduled[~completed] == 0).all()
    assert np.isfinite(result.ttft[completed]).all()
    assert (result.ttft[completed] > 0).all()
    assert (result.latency >= result.ttft)[completed].all()
    assert np.isnan(result.ttft[~completed]).all()
    assert np.isnan(result.latency[~completed]).all()


def test_random_cases_reach_the_rare_branches():
    log: list[Iteration] = []
    results = [simulate(*random_case(seed, PADDED[0], 3, PADDED).inputs, observe=log.append) for seed in range(12)]
    assert sum(result.preemptions.sum() for result in results) > 50
    assert max(result.preemptions.max() for result in results) > 1
    assert sum(result.status.sum() for result in results) > 50
    # A preemption of two at once, and a prompt in pieces beside a decoding sequence.
    assert any(len(it.preempted) > 1 for it in log)
    assert any(any(it.decoding) and it.tokens[-1] > 1 and it.computed[-1] > 0 for it in log)


def test_tokens_per_expert_are_the_column_of_the_chosen_one():
    case = random_case(5, PADDED[0], 5, PADDED)
    rows = np.arange(PADDED[0])
    prompt, output = (t[rows, case.assignment] for t in (case.prompt_tokens, case.output_tokens))
    wide = simulate(*case.inputs)
    narrow = simulate(case.site, case.arrival_time, prompt, output, case.assignment)
    for name in ("status", "ttft", "latency", "preemptions"):
        np.testing.assert_array_equal(getattr(wide, name), getattr(narrow, name))


def test_time_may_start_anywhere():
    case = HAND_CASES["preemption"]
    later = simulate(case.site, case.arrival_time - 64.0, *case.inputs[2:])
    np.testing.assert_array_equal(later.latency, simulate(*case.inputs).latency)


def test_closest_call():
    # The only iteration starts at 0 with the first request; the second starts at 2.25, 1/16 s after the
    # second arrival.
    case = Case(site_arrays(PENCIL), *map(np.array, ([0.0, 2.1875], [16, 16], [1, 1], [0, 0])))
    assert simulate(*case.inputs).closest_call == 0.0625


def test_measured_vllm_run(data_dir):
    run = vllm_run(data_dir)
    result = simulate(*run.case.inputs)
    means = mean_latencies(result.ttft, result.latency, run.case.output_tokens)
    assert (result.status == 0).all()
    assert result.preemptions.sum() > 100
    for name, measured in run.means.items():
        assert means[name] == pytest.approx(measured, rel=0.02), name

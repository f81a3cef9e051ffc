"""Arrival processes: mean, spread and order of the gaps, and what a wrong workload says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workloads.arrivals import (
    PROCESSES,
    ArrivalState,
    RequirementConfig,
    WorkloadConfig,
    build_workload,
    first_arrival_state,
)

NUM_GAPS = 50_000
RECORDED = [0.0, 0.5, 0.5, 3.5, 4.0]
"""Arrival times in s; two of them at once."""


def workload(**changes):
    good = {"name": "mine", "arrivals": "poisson", "rate": 8.0, "requirements": [RequirementConfig("only", 0.05, 1.0)]}
    return WorkloadConfig(**(good | changes))


def write_trace(folder, times):
    rows = [f"2023-11-16 18:15:{10 + time:09.6f},100,20" for time in times]
    path = folder / "trace.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


@partial(jax.jit, static_argnames="process")
def run(process, params, keys, state):
    def step(state, key):
        gap, state = process(key, state, params)
        return state, gap

    return jax.lax.scan(step, state, keys)


def gaps_of(built, seed, count=NUM_GAPS, position=0):
    """The gaps of a run, and the state after it."""
    keys = jax.random.split(jax.random.key(seed), count)
    state, gaps = run(built.process, built.params, keys, ArrivalState(jnp.int32(position)))
    return np.asarray(gaps), state


# ---- Gaps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 4.0)], ids=["poisson", "gamma .5", "gamma 4"]
)
def test_random_gaps_have_mean_one_and_the_right_spread(arrivals, cv):
    gaps, _ = gaps_of(build_workload(workload(arrivals=arrivals, cv=cv), None), seed=0)
    assert np.isfinite(gaps).all()
    assert (gaps >= 0).all()
    # Five standard errors of the mean; the spread of a heavy tail is known less well.
    assert gaps.mean() == pytest.approx(1, abs=5 * cv / NUM_GAPS**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    # Renewal processes: a gap says nothing of the next one.
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_poisson_gaps_are_memoryless():
    gaps, _ = gaps_of(build_workload(workload(), None), seed=1)
    for time in (0.5, 1.0, 2.0):
        assert (gaps > time).mean() == pytest.approx(np.exp(-time), abs=0.01)


def test_a_trace_is_replayed_in_order_and_starts_over(tmp_path):
    config = workload(arrivals="trace", rate=None, trace=str(write_trace(tmp_path, RECORDED)))
    built = build_workload(config, None)
    recorded = np.diff(RECORDED)
    assert recorded.mean() == 1.0  # so gaps in units of their mean are gaps in s
    gaps, state = gaps_of(built, seed=0, count=10, position=1)
    np.testing.assert_allclose(gaps, np.resize(np.roll(recorded, -1), 10), rtol=1e-6)
    assert state.position == 11 % len(recorded)
    assert gaps[: len(recorded)].mean() == pytest.approx(1)


def test_a_trace_starts_at_a_random_gap(tmp_path):
    built = build_workload(workload(arrivals="trace", trace=str(write_trace(tmp_path, RECORDED))), None)
    keys = jax.random.split(jax.random.key(0), 100)
    starts = jax.jit(jax.vmap(first_arrival_state, (0, None)))(keys, built.params).position
    assert set(np.asarray(starts).tolist()) == set(range(len(RECORDED) - 1))


def test_a_trace_is_looked_up_in_the_data_folder(tmp_path):
    write_trace(tmp_path, RECORDED)
    built = build_workload(workload(arrivals="trace", rate=None, trace="trace.csv"), tmp_path)
    assert built.rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rate", "rate_scale", "expected"), [(None, 1.0, 0.25), (None, 2.0, 0.5), (8.0, 1.0, 8.0), (8.0, 0.5, 4.0)]
)
def test_the_rate_is_the_recorded_one_unless_given(tmp_path, rate, rate_scale, expected):
    path = write_trace(tmp_path, [0.0, 4.0, 8.0])
    built = build_workload(workload(arrivals="trace", rate=rate, rate_scale=rate_scale, trace=str(path)), None)
    assert built.rate == pytest.approx(expected)
    np.testing.assert_allclose(built.params.gaps, [1.0, 1.0])


def test_every_process_is_configurable(tmp_path):
    for name in PROCESSES:
        built = build_workload(workload(arrivals=name, trace=str(write_trace(tmp_path, RECORDED))), None)
        assert built.process is PROCESSES[name]


def test_shares_become_probabilities():
    classes = [RequirementConfig("tight", 0.02, 3.0), RequirementConfig("loose", 0.08, 1.0)]
    built = build_workload(workload(requirements=classes), None)
    np.testing.assert_allclose(built.share, [0.75, 0.25])
    np.testing.assert_allclose(built.requirement, [0.02, 0.08])


# ---- Mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arrivals": "possion"}, "possion"),
        ({"rate": None}, "rate"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"rate": float("inf")}, "rate=inf"),
        ({"rate_scale": 0.0}, "rate_scale"),
        ({"arrivals": "gamma", "cv": 0.0}, "cv=0.0"),
        ({"arrivals": "trace"}, "trace"),
        ({"requirements": []}, "requirements"),
        ({"requirements": [RequirementConfig("tight", 0.0, 1.0)]}, "tight"),
        ({"requirements": [RequirementConfig("tight", 0.02, -1.0)]}, "tight"),
        ({"requirements": [RequirementConfig("tight", 0.02, 0.0)]}, "shares"),
    ],
    ids=str,
)
def test_a_wrong_workload_is_one_line(changes, named):
    with pytest.raises(UserError) as caught:
        workload(**changes)
    assert_one_line(caught.value, "workload mine", named)


def test_a_trace_without_data_folder_is_one_line():
    with pytest.raises(UserError) as caught:
        build_workload(workload(arrivals="trace", trace="trace.csv"), None)
    assert_one_line(caught.value, "trace.csv", "JAXROUTE_DATA")


def test_a_missing_trace_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        build_workload(workload(arrivals="trace", trace="trace.csv"), tmp_path)
    assert_one_line(caught.value, "trace.csv")


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0]], ids=["one request", "one moment"])
def test_a_trace_without_gaps_is_one_line(tmp_path, times):
    path = write_trace(tmp_path, times)
    with pytest.raises(UserError) as caught:
        build_workload(workload(arrivals="trace", trace=str(path)), None)
    assert_one_line(caught.value, "trace.csv", "two requests")


def assert_one_line(error, *named):
    message = str(error)
    assert "\n" not in message
    for name in named:
        assert name in message

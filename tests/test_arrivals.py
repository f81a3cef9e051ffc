"""Arrival processes: mean, spread and order of the gaps, and what a wrong workload says."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workloads.arrivals import (
    PROCESSES,
    RequirementConfig,
    Workload,
    WorkloadConfig,
    build_workload,
    first_arrival_state,
    training_mix,
)

NUM_GAPS = 50_000
NUM_ENVS, NUM_STEPS = 400, 1000
RECORDED = [0.0, 0.5, 0.5, 3.5, 4.0]
"""Arrival times in s; two of them at once."""


def requirement(name, normalised, share=1.0):
    return RequirementConfig(name=name, share=share, normalised=normalised)


def workload(**changes):
    good = {"name": "mine", "arrivals": "poisson", "rate": 8.0, "requirements": [requirement("only", 0.05)]}
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
    start = first_arrival_state(jax.random.key(seed), built.params)._replace(position=jnp.int32(position))
    state, gaps = run(built.process, built.params, jax.random.split(jax.random.key(seed), count), start)
    return np.asarray(gaps), state


@jax.jit
def first_states(keys, params):
    return jax.vmap(first_arrival_state, (0, None))(keys, params)


@partial(jax.jit, static_argnames="process")
def run_all(process, params, keys, states):
    """Gap and state after it, (environment, gap)."""

    def episode(keys, state):
        def step(state, key):
            gap, state = process(key, state, params)
            return state, (gap, state)

        return jax.lax.scan(step, state, keys)[1]

    return jax.vmap(episode)(keys, states)


def starts_of(built):
    """The keys of many episodes, (environment, gap), and their first states."""
    states = first_states(jax.random.split(jax.random.key(0), NUM_ENVS), built.params)
    return jax.random.split(jax.random.key(1), (NUM_ENVS, NUM_STEPS)), states


def episodes_of(built, **changes):
    """Gaps and states of many episodes; `changes` replace parts of their first states."""
    keys, states = starts_of(built)
    changes = {name: jnp.full_like(getattr(states, name), value) for name, value in changes.items()}
    return jax.tree.map(np.asarray, run_all(built.process, built.params, keys, states._replace(**changes)))


def with_pattern(built, **changes):
    """The same with one pattern for all environments."""
    pattern = built.params.pattern._replace(
        **{name: jnp.full(2, value, jnp.float32) for name, value in changes.items()}
    )
    return built._replace(params=built.params._replace(pattern=pattern))


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


@pytest.mark.parametrize(
    "options",
    [
        {"arrivals": "mmpp", "burst_seconds": 2.0},
        {"arrivals": "mmpp", "burst_seconds": 0.05},  # so short that many gaps outlast the switches a gap may hold
        {"arrivals": "mmpp", "burst_ratio": 1.0},
        {"arrivals": "diurnal"},
        {"arrivals": "diurnal", "amplitude": 0.8, "period": 25.0},
        {"arrivals": "mixed"},
    ],
    ids=str,
)
def test_varying_rates_have_mean_one_from_the_first_gap(options):
    gaps, _ = episodes_of(build_workload(workload(**options), None))
    assert np.isfinite(gaps).all()
    assert (gaps >= 0).all()
    for some in (gaps, gaps[:, :50]):
        means = some.mean(1, dtype=np.float64)
        assert abs(means.mean() - 1) < 4 * means.std() / NUM_ENVS**0.5


@pytest.mark.parametrize(("ratio", "share"), [(4.0, 0.2), (2.0, 0.5)])
def test_bursts_disperse_counts_as_in_theory(ratio, share):
    config = workload(arrivals="mmpp", burst_ratio=ratio, burst_share=share, burst_seconds=2.0)
    gaps, _ = episodes_of(build_workload(config, None))
    window, edges = 40.0, np.arange(100.0, 601.0, 40.0)
    assert (gaps.sum(1) > edges[-1]).all()
    counts = np.stack([np.histogram(times, edges)[0] for times in np.cumsum(gaps, axis=1)])
    difference = (ratio - 1) / (1 + share * (ratio - 1))
    length = 2.0 * 8.0
    s = 1 / length + share / ((1 - share) * length)
    expected = 1 + 2 * share * (1 - share) * difference**2 / s * (1 - (1 - np.exp(-s * window)) / (s * window))
    assert counts.mean() == pytest.approx(window, rel=0.03)
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("arrivals", "start"), [("mmpp", {}), ("mixed", {"kind": 2})], ids=["mmpp", "mixed"])
def test_the_rate_in_a_burst_is_a_multiple(arrivals, start):
    built = with_pattern(build_workload(workload(arrivals=arrivals), None), burst_ratio=3.0)
    for in_burst, mean in ((False, 1.4), (True, 1.4 / 3)):
        gaps, states = episodes_of(built, in_burst=in_burst, until_switch=np.inf, **start)
        assert (states.in_burst == in_burst).all()
        assert gaps.mean() == pytest.approx(mean, rel=0.02)
        assert gaps.std() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(("arrivals", "start"), [("diurnal", {}), ("mixed", {"kind": 3})], ids=["diurnal", "mixed"])
def test_requests_come_where_the_sine_is_high(arrivals, start):
    built = with_pattern(build_workload(workload(arrivals=arrivals), None), amplitude=0.6, period=200.0)
    _, states = episodes_of(built, **start)
    bins = 12
    counts = np.histogram(states.phase % (2 * np.pi), bins, range=(0, 2 * np.pi))[0]
    centre = (np.arange(bins) + 0.5) * 2 * np.pi / bins
    # The sinc: a sine's mean over a bin, by its value at the centre.
    expected = 1 + 0.6 * np.sinc(1 / bins) * np.sin(centre)
    np.testing.assert_allclose(counts / counts.mean(), expected, atol=0.05)


@pytest.mark.parametrize(("amplitude", "period"), [(0.6, 600.0), (0.8, 25.0)])
def test_a_swing_is_a_poisson_process(amplitude, period):
    built = build_workload(workload(arrivals="diurnal", amplitude=amplitude, period=period), None)
    gaps, states = episodes_of(built)
    speed = 2 * np.pi / (period * 8.0)
    gaps, before, after = gaps[:, 1:].astype(float), states.phase[:, :-1].astype(float), states.phase[:, 1:]
    np.testing.assert_allclose(np.cos(before + gaps * speed), np.cos(after), atol=1e-5)
    # The rate over a gap adds up to an exponential, wherever the gap begins.
    work = gaps + amplitude / speed * (np.cos(before) - np.cos(before + gaps * speed))
    for part in (work[np.sin(before) < 0], work[np.sin(before) > 0]):
        for time in (0.1, 0.5, 1.0, 2.0, 4.0):
            assert (part > time).mean() == pytest.approx(np.exp(-time), abs=0.005)


def test_mixed_environments_draw_kinds_and_patterns_and_keep_them():
    _, states = episodes_of(build_workload(workload(arrivals="mixed"), None))
    for leaf in (states.kind, *states.pattern):
        assert (leaf == leaf[:, :1]).all()
    assert np.bincount(states.kind[:, 0], minlength=4).min() > NUM_ENVS / 6
    ranges = [(1, 4), (2, 6), (5 * 8, 60 * 8), (0.2, 0.8), (60 * 8, 1200 * 8)]
    drawn = [
        np.log(values[:, 0] / low) / np.log(high / low)
        for values, (low, high) in zip(states.pattern, ranges, strict=True)
    ]
    for values in drawn:
        np.testing.assert_allclose(np.quantile(values, [0, 0.5, 1]), [0, 0.5, 1], atol=0.1)
        assert -1e-5 < values.min() < values.max() < 1 + 1e-5
    # Each apart from the others.
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 0.2


@pytest.mark.parametrize(("kind", "cv", "spread"), [(0, 4.0, 1.0), (1, 1.0, 1.0), (1, 2.0, 2.0), (1, 4.0, 4.0)])
def test_clustered_gaps_have_the_right_spread(kind, cv, spread):
    gaps, _ = episodes_of(with_pattern(build_workload(workload(arrivals="mixed"), None), cv=cv), kind=kind)
    assert gaps.mean() == pytest.approx(1, abs=5 * spread / gaps.size**0.5)
    assert gaps.std() == pytest.approx(spread, rel=0.03)
    assert abs(np.corrcoef(gaps[:, 1:].ravel(), gaps[:, :-1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("arrivals", ["mmpp", "diurnal", "mixed"])
def test_an_environment_alone_is_as_among_others(arrivals):
    built = build_workload(workload(arrivals=arrivals), None)
    gaps, _ = episodes_of(built)
    np.testing.assert_array_equal(gaps, episodes_of(built)[0])
    assert len(np.unique(gaps[:, 0])) == NUM_ENVS
    keys, states = starts_of(built)
    _, alone = run(built.process, built.params, keys[3], jax.tree.map(lambda leaf: leaf[3], states))
    np.testing.assert_allclose(alone[:100], gaps[3, :100], rtol=1e-3)


def test_seconds_are_those_of_the_nominal_rate():
    config = workload(arrivals="mmpp", rate=4.0, burst_seconds=3.0, period=100.0)
    pattern = build_workload(config, None).params.pattern
    np.testing.assert_array_equal(pattern.burst_length, [12.0, 12.0])
    np.testing.assert_array_equal(pattern.period, [400.0, 400.0])


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


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.25), (8.0, 8.0)])
def test_the_rate_is_the_recorded_one_unless_given(tmp_path, rate, expected):
    path = write_trace(tmp_path, [0.0, 4.0, 8.0])
    built = build_workload(workload(arrivals="trace", rate=rate, trace=str(path)), None)
    assert built.rate == pytest.approx(expected)
    np.testing.assert_allclose(built.params.gaps, [1.0, 1.0])


def test_every_process_is_configurable(tmp_path):
    for name in PROCESSES:
        built = build_workload(workload(arrivals=name, trace=str(write_trace(tmp_path, RECORDED))), None)
        assert built.process is PROCESSES[name]


def test_shares_become_probabilities():
    classes = [requirement("tight", 0.02, 3.0), requirement("loose", 0.08)]
    built = build_workload(workload(requirements=classes), None)
    np.testing.assert_allclose(built.share, [0.75, 0.25])
    np.testing.assert_allclose(built.limits.normalised, [0.02, 0.08])


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
        ({"arrivals": "gamma", "cv": 0.0}, "cv=0.0"),
        ({"burst_ratio": 0.5}, "burst_ratio=0.5"),
        ({"burst_ratio": float("inf")}, "burst_ratio=inf"),
        ({"burst_share": 0.0}, "burst_share=0.0"),
        ({"burst_share": 1.0}, "burst_share=1.0"),
        ({"burst_seconds": 0.0}, "burst_seconds=0.0"),
        ({"amplitude": -0.1}, "amplitude=-0.1"),
        ({"amplitude": 1.0}, "amplitude=1.0"),
        ({"period": float("nan")}, "period=nan"),
        ({"arrivals": "trace"}, "trace"),
        ({"requirements": []}, "requirements"),
        ({"requirements": [requirement("tight", 0.0)]}, "tight"),
        ({"requirements": [requirement("tight", 0.02, -1.0)]}, "tight"),
        ({"requirements": [requirement("tight", 0.02, 0.0)]}, "shares"),
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


# ---- What training meets ------------------------------------------------------------------------------------


def mix_of(**changes: object) -> Workload:
    config = workload(**changes)
    return training_mix(config, build_workload(config, None))


@pytest.mark.parametrize("arrivals", [name for name in PROCESSES if name not in ("poisson", "mixed")])
def test_a_fifth_of_the_training_mix_follows_the_workloads_own_process(tmp_path, arrivals):
    options = {"arrivals": arrivals, "rate": 8.0, "cv": 9.0, "burst_ratio": 30.0, "amplitude": 0.95}
    if arrivals == "trace":
        options["trace"] = str(write_trace(tmp_path, RECORDED))
    built = mix_of(**options)
    keys, starts = starts_of(built)
    own = np.asarray(starts.kind) == 4
    assert 0.1 < own.mean() < 0.3
    # An environment that follows the workload's own process does so draw by draw.
    number = int(np.flatnonzero(own)[0])
    start = jax.tree.map(lambda leaf: leaf[number], starts)
    _, mixed_gaps = run(built.process, built.params, keys[number], start)
    _, own_gaps = run(PROCESSES[arrivals], built.params, keys[number], start)
    np.testing.assert_allclose(mixed_gaps, own_gaps, rtol=1e-5)
    # The others vary as `mixed` has it, not with the workload's own figures.
    assert np.asarray(starts.pattern.burst_ratio)[~own].max() <= 6.0
    np.testing.assert_array_equal(np.asarray(starts.pattern.burst_ratio)[own], np.float32(30.0))


def test_the_mix_of_poisson_arrivals_is_mixed_itself():
    built, expected = mix_of(arrivals="poisson", rate=8.0), build_workload(workload(arrivals="mixed", rate=8.0), None)
    assert built.process is expected.process
    chex.assert_trees_all_equal(built.params, expected.params)


def test_the_training_mix_keeps_the_mean_gap(tmp_path):
    gaps, _ = episodes_of(mix_of(arrivals="trace", trace=str(write_trace(tmp_path, RECORDED))))
    assert gaps.mean() == pytest.approx(1, abs=0.1)

"""A log is replayed in few slots, whatever its length and its queue, as in as many as it has requests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import jaxroute
from jaxroute.fitting import Limits, ServingLog, calibrate
from jaxroute.fitting.calibration import _corrected, _most_held, _Replay
from jaxroute.fitting.server import serve
from jaxroute.fitting.windows import choose_windows, most_decoding
from jaxroute.serving.engine import SlotStatus, idle_site, slot_status
from jaxroute.serving.site import check_site

NUM_REQUESTS = 200
LIMITS = Limits(max_num_seqs=16, max_num_batched_tokens=1024, iteration_overhead=0.001, kv_capacity=7000)
TIMES = {"weight_load": 0.012, "compute_per_token": 8e-5, "decode_per_seq": 4e-4, "attention_per_token": 1.5e-6}


def server(num_requests):
    values = TIMES | dataclasses.asdict(LIMITS) | {"max_waiting": num_requests, "network_delay": 0.0}
    return check_site(jaxroute.Site(**{name: np.array([value]) for name, value in values.items()}))


def drawn(num_requests, rate):
    rng = np.random.default_rng(2)
    arrival = np.cumsum(rng.exponential(size=num_requests) / rate)
    return arrival - arrival[0], rng.integers(20, 1200, num_requests), rng.integers(1, 200, num_requests)


def served(arrival, prompt, output, num_slots):
    gaps = np.diff(arrival, prepend=arrival[0]).astype(np.float32)
    columns = (prompt.astype(np.int32), output.astype(np.int32))
    outcomes = serve(server(len(arrival)), idle_site(1, num_slots), gaps, *columns)
    return np.asarray(outcomes.ttft)[:, 0], np.asarray(outcomes.latency)[:, 0], bool(outcomes.crowded[0])


@pytest.mark.parametrize("rate", [1.0, 8.0, 1e9])
def test_few_slots_serve_any_queue(rate):
    """Idle, overloaded, and all requests at once: as the engine does with a slot for each request."""
    requests = drawn(NUM_REQUESTS, rate)
    expected = jaxroute.replay(server(NUM_REQUESTS), jaxroute.Requests(*requests), np.zeros(NUM_REQUESTS, int))
    ttft, latency, crowded = served(*requests, num_slots=2 * LIMITS.max_num_seqs)
    np.testing.assert_allclose(ttft, expected.ttft, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(latency, expected.latency, rtol=1e-5, atol=1e-5)
    assert not crowded
    # With fewer slots than requests that may run, it says that others might have run.
    assert served(*requests, num_slots=8)[2] == (rate > 1)


@pytest.fixture(scope="module")
def long_log():
    """3,000 requests, quiet and overloaded by turns."""
    arrival, prompt, output = drawn(3000, np.where(np.arange(3000) // 200 % 2, 4.0, 1.0))
    ttft, latency, _ = served(arrival, prompt, output, num_slots=32)
    return ServingLog(arrival, arrival + ttft, arrival + latency, prompt, output)


def test_a_long_log_has_bounded_windows_and_slots(long_log):
    assert np.quantile(long_log.ttft, 0.9) > 10
    windows = choose_windows(long_log, 3000 * 9 // 10)
    assert len(windows) == 2
    replay = _Replay(long_log, LIMITS, ["weight_load"])
    assert replay.most_slots <= 2 * max(LIMITS.max_num_seqs, most_decoding(long_log)) * 2
    for window in windows:
        assert len(window.requests) == 1024
        assert window.compared.sum() > 900
        assert (window.requests[window.compared] < 2700).all()
        state = window.server(long_log, 4, replay.most_slots, LIMITS.max_num_seqs)
        assert state.slots.request.shape == (4, replay.most_slots)
        assert ((np.asarray(slot_status(state)) == SlotStatus.ACTIVE).sum(1) == len(window.running)).all()
        assert (np.asarray(state.num_running) <= LIMITS.max_num_seqs).all()
    assert len(windows[0].running) == 0
    assert len(windows[1].running) > 0


def test_a_window_goes_on_as_the_log_did(long_log):
    """From the state that the log shows, the true server serves the window's requests as it did, nearly."""
    prompt, output = long_log.prompt_tokens, long_log.output_tokens
    window = choose_windows(long_log, 2700)[1]
    assert np.quantile(long_log.ttft[window.requests], 0.9) > 10  # a queue comes and goes in it
    state = window.server(long_log, 1, 64, LIMITS.max_num_seqs)
    columns = (column[window.requests].astype(np.int32) for column in (prompt, output))
    outcomes = serve(server(3000), state, window.gaps(long_log), *columns)
    compared = window.compared
    for simulated, measured in ((outcomes.ttft, long_log.ttft), (outcomes.latency, long_log.latency)):
        measured = measured[window.requests][compared]
        np.testing.assert_allclose(np.asarray(simulated)[compared, 0], measured, rtol=0.03)


def test_a_guess_is_corrected_by_how_far_it_is_off_on_a_replay():
    """A toy's guess is off by some percent, by more the farther the coefficients are from the true ones."""
    true, memory = np.array([-4.0, -9.0, -8.0, -15.0, 10.6]), np.arange(5) == 4

    def guess_again(at):
        off = at[:4] - true[:4]
        return at[:4] + np.array([0.02, -0.03, 0.07, -0.05]) + 0.1 * off + 0.05 * np.roll(off, 1)

    guess = np.append(guess_again(true), 10.7)
    found = _corrected(guess, memory, guess_again, loss=lambda at: np.square(at - true).sum(1))
    np.testing.assert_allclose(found[:4], true[:4], atol=1e-4)
    assert found[4] == 10.7  # memory stays
    # Corrections that lead nowhere are not taken.
    kept = _corrected(guess, memory, lambda at: at[:4] + 1.0, loss=lambda at: np.square(at - true).sum(1))
    np.testing.assert_array_equal(kept, guess)


@pytest.mark.slow
def test_the_server_of_a_long_overloaded_log_is_found(long_log):
    fit = calibrate(long_log, LIMITS, share=0.9)
    assert fit.num_compared < fit.num_fitted
    for name, value in TIMES.items():
        assert fit.coefficients[name] == pytest.approx(value, rel=0.02), name


@pytest.mark.parametrize("rate", [4.0, 1e9])
def test_a_window_never_begins_in_a_queue(rate):
    """The log does not tell who was preempted there: of an overloaded log the beginning is replayed."""
    arrival, prompt, output = drawn(3000, rate)
    ttft, latency, _ = served(arrival, prompt, output, num_slots=32)
    log = ServingLog(arrival, arrival + ttft, arrival + latency, prompt, output)
    (window,) = choose_windows(log, 2700)
    assert len(window.running) == 0
    np.testing.assert_array_equal(window.requests, np.arange(1024))


def test_memory_that_was_held_is_added_up_piece_by_piece(monkeypatch):
    arrival, prompt, output = drawn(NUM_REQUESTS, 8.0)
    ttft, latency, _ = served(arrival, prompt, output, num_slots=32)
    log = ServingLog(arrival, arrival + ttft, arrival + latency, prompt, output)
    most = _most_held(log)
    assert 5000 < most < 8000
    monkeypatch.setattr("jaxroute.fitting.calibration._TIMES_AT_ONCE", 7)
    assert _most_held(log) == pytest.approx(most, rel=1e-12)

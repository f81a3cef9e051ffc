"""Calibration finds what a synthetic log was made with, says what it cannot know, and refuses broken logs."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from serving import emulated

import jaxroute
from jaxroute.commands.calibrate import main
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.fitting import Limits, ServingLog, calibrate, fit_profile, read_log
from jaxroute.serving.reference import Expert, Request

pytestmark = pytest.mark.slow

NUM_REQUESTS = 120
TRUE = {
    "weight_load": 0.012,
    "compute_per_token": 8e-5,
    "decode_per_seq": 4e-4,
    "attention_per_token": 1.5e-6,
    "kv_capacity": 7000,
}
LIMITS = Limits(max_num_seqs=16, max_num_batched_tokens=1024)


@pytest.fixture(scope="module")
def log():
    """Quiet spells and bursts, short and long requests: every coefficient matters somewhere."""
    rng = np.random.default_rng(1)
    gaps = np.where(np.arange(NUM_REQUESTS) // 12 % 2, 0.9, 0.15) * rng.exponential(size=NUM_REQUESTS)
    arrival = np.cumsum(gaps)
    prompt = rng.integers(20, 1200, NUM_REQUESTS)
    output = rng.integers(1, 200, NUM_REQUESTS)
    one = {name: np.array([value]) for name, value in TRUE.items()}
    site = jaxroute.Site(
        **one, iteration_overhead=np.array([0.0]), max_num_seqs=np.array([16]), max_num_batched_tokens=np.array([1024]),
        max_waiting=np.array([128]), network_delay=np.array([0.0]),
    )  # fmt: skip
    outcomes = jaxroute.replay(site, jaxroute.Requests(arrival, prompt, output), np.zeros(NUM_REQUESTS, int))
    assert outcomes.preemptions.sum() > 0
    return ServingLog(arrival, arrival + outcomes.ttft, arrival + outcomes.latency, prompt, output)


def rows_of(log):
    names = ("arrival_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*log, strict=True)]


def test_known_coefficients_are_recovered(log):
    fit = calibrate(log, LIMITS)
    assert fit.num_fitted == NUM_REQUESTS // 3
    for name in list(TRUE)[:-1]:
        assert fit.coefficients[name] == pytest.approx(TRUE[name], rel=0.03), name
    for name, (measured, simulated) in fit.means.items():
        assert simulated == pytest.approx(measured, rel=0.05), name
    # No request of the first third had to wait for memory, and that is what it says.
    assert set(fit.undetermined()) == {"kv_capacity"}
    assert fit.coefficients["kv_capacity"] == pytest.approx(TRUE["kv_capacity"], rel=0.05)


def test_what_the_log_does_not_determine_is_said(log):
    """One request at a time: nobody decodes beside another, and memory is never short."""
    alone = np.arange(NUM_REQUESTS) * 30.0
    prompt, output = log.prompt_tokens, np.maximum(log.output_tokens, 20)
    first = alone + np.maximum(TRUE["compute_per_token"] * prompt, TRUE["weight_load"])
    last = first + (output - 1) * (TRUE["weight_load"] + TRUE["decode_per_seq"])
    undetermined = calibrate(ServingLog(alone, first, last, prompt, output), LIMITS).undetermined()
    assert "least it can be" in undetermined["kv_capacity"]
    assert "decode_per_seq" in undetermined
    assert "compute_per_token" not in undetermined


def test_command(log, tmp_path, capsys, monkeypatch):
    path = tmp_path / "served.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows_of(log))).encode()))
    out = tmp_path / "site" / "mine.yaml"
    options = ["--model", "gemma-2-2b-it", "--max-num-seqs", "16", "--max-num-batched-tokens", "1024"]
    assert main([str(path), "--out", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert "mean TTFT" in said
    config = load_config([f"hydra.searchpath=[{tmp_path}]", "site=mine"])
    assert config.site.experts[0].weight_load == pytest.approx(TRUE["weight_load"], rel=0.02)
    assert sorted(file.name for file in out.parent.iterdir()) == ["mine.yaml", "mine_served.png"]
    assert main([str(path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_requests_before_a_time_are_left_out(log, tmp_path):
    path = tmp_path / "served.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of(log))))
    since = float(log.arrival_time[50])
    later = read_log(path, since)
    assert len(later.ttft) == NUM_REQUESTS - 50
    np.testing.assert_allclose(later.latency, log.latency[50:])


def test_vllm_benchmark_results(tmp_path):
    result = {
        "start_times": [100.0 + number for number in range(40)] + [140.0],
        "ttfts": [0.5] * 40 + [0.0],
        "itls": [[0.1, 0.2]] * 40 + [[]],
        "input_lens": [7] * 41,
        "output_lens": [3] * 40 + [0],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    log = read_log(path)
    assert len(log.ttft) == 40  # the last one failed
    np.testing.assert_allclose(log.ttft, 0.5)
    np.testing.assert_allclose(log.latency, 0.8)
    del result["start_times"]
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match="start_times missing; record it with vllm bench serve"):
        read_log(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_time": 10.0}, ":41: the request arrives more than a minute before the row above"),
        ({"first_token_time": 1.0}, ":41: the request has its first token before it arrives"),
        ({"last_token_time": 5000.05}, ":41: the request has its last token before its first"),
        ({"last_token_time": None}, ":41: last_token_time is missing"),
        ({"last_token_time": float("inf")}, ":41: the request has a time, or a number of tokens, that is not finite"),
        ({"arrival_time": -5000.0}, "negative time|before the row above"),
        ({"prompt_tokens": 0}, ":41: the request needs at least 1 prompt"),
        ({"output_tokens": "many"}, ":41: output_tokens='many' is not a number"),
    ],
)
def test_broken_rows_are_named(tmp_path, capsys, change, message):
    rows = [
        {
            "arrival_time": 4960.0 + number, "first_token_time": 4960.1 + number, "last_token_time": 4962.0 + number,
            "prompt_tokens": 10, "output_tokens": 5,
        }
        for number in range(60)
    ]  # fmt: skip
    rows[40] |= change
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        read_log(path)
    assert main([str(path), "--out", str(tmp_path / "mine.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")
    assert list(tmp_path.iterdir()) == [path]


def test_too_few_requests(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival_time,first_token_time,last_token_time,prompt_tokens,output_tokens\n" + "0,1,2,3,4\n" * 29)
    with pytest.raises(UserError, match="has 29 requests; a calibration needs at least 30"):
        read_log(path)


def test_a_profile(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["batch,context,prompt,ms"]
    for batch in (1, 4, 16, 64):
        for context in (500, 5000, 20000):
            rows.append(f"{batch},{context},0,{1e3 * (0.002 + 0.015 + 4e-5 * batch + 1.4e-7 * context):.6f}")
    rows += [f"0,0,{prompt},{1e3 * (0.002 + 9e-5 * prompt):.6f}" for prompt in rng.integers(400, 4000, 8)]
    path = tmp_path / "profile.csv"
    path.write_text("\n".join(rows))
    limits = Limits(iteration_overhead=0.002, kv_capacity=10000)
    found, errors = fit_profile(path, limits)
    expected = {"weight_load": 0.015, "compute_per_token": 9e-5, "decode_per_seq": 4e-5, "attention_per_token": 1.4e-7}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.01), name
        assert errors[name] < 0.01
    path.write_text("\n".join([*rows, "1,2,3,-4"]))
    with pytest.raises(UserError, match=rf"{path}:22: negative"):
        fit_profile(path, limits)
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match="give --kv-capacity"):
        fit_profile(path, Limits())


def served_at(coefficients, arrival, prompt, output, law=None):
    """Serve requests as the reference does, as measured from one network delay away; `law` replaces the cost."""

    class Server(Expert):
        def schedule(self, start):
            super().schedule(start)
            if law is not None:
                iteration = self.current
                context = sum(held + 1 for held, d in zip(iteration.computed, iteration.decoding, strict=True) if d)
                seconds = law(sum(iteration.tokens), sum(iteration.decoding), context)
                self.current = dataclasses.replace(iteration, end=start + seconds)

    delay = coefficients["network_delay"]
    server = Server(index=0, **coefficients)
    requests = [
        Request(number, at, at + delay, int(prompt[number]), int(output[number]))
        for number, at in enumerate(arrival.tolist())
    ]
    assert all(map(server.arrive, requests))
    server.advance(np.inf)
    first, last = (np.array([getattr(r, name) for r in requests]) + delay for name in ("first_token", "finish"))
    return ServingLog(arrival, first, last, prompt, output)


GIVEN = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_waiting": 500, "iteration_overhead": 0.0}


def requests_of(seed, rate, number=240):
    rng = np.random.default_rng(seed)
    gaps = np.where(np.arange(number) // 30 % 2, 2.0, 0.5) * rng.exponential(1 / rate, number)
    return np.cumsum(gaps), rng.integers(20, 1500, number), rng.integers(2, 200, number)


def test_a_tensor_parallel_server_and_the_way_to_it():
    """Four accelerators: a quarter of the weights each, and a large cost of an iteration for their talk."""
    true = {
        "weight_load": 0.0051 + 0.0040, "compute_per_token": 3.3e-5, "decode_per_seq": 1.2e-5,
        "attention_per_token": 9e-8, "kv_capacity": 200_000, "network_delay": 0.012,
    }  # fmt: skip
    log = served_at(true | GIVEN, *requests_of(3, 6.0))
    fit = calibrate(log, Limits(32, 2048, 0.0, 200_000, None), 0.5)
    for name in ("weight_load", "compute_per_token", "network_delay"):
        assert fit.coefficients[name] == pytest.approx(true[name], rel=0.05), name
    for name, (measured, simulated) in fit.means.items():
        assert simulated == pytest.approx(measured, rel=0.05), name


def test_a_mixture_of_experts():
    """A token touches 8 of 128 experts, and those of a batch are read once: no straight line, but not far from one."""

    def law(tokens, decoding, context):
        touched = 1 - (1 - 8 / 128) ** max(tokens, 1)
        return max(0.003 + 0.018 * touched, 6e-5 * tokens) + 2e-5 * decoding + 1e-7 * context

    given = GIVEN | {
        "weight_load": 0.02, "compute_per_token": 6e-5, "decode_per_seq": 0.0, "attention_per_token": 0.0,
        "kv_capacity": 100_000, "network_delay": 0.004,
    }  # fmt: skip
    log = served_at(given, *requests_of(4, 4.0), law=law)
    fit = calibrate(log, Limits(32, 2048, 0.0, 100_000, None), 0.5)
    for name, (measured, simulated) in fit.means.items():
        assert simulated == pytest.approx(measured, rel=0.08), name


def test_a_probe_of_a_live_server(site, loop, tmp_path, capsys):
    """How near it comes is not asked here: the emulated server keeps to the wall clock, which a busy machine blurs."""
    patient = [dataclasses.replace(expert, max_waiting=None) for expert in site.experts]
    fleet = emulated(dataclasses.replace(site, experts=patient), speed=1.0)
    loop.run(fleet.start())
    out = tmp_path / "mine.yaml"
    options = ["--max-num-seqs", "4", "--probe-batch", "4", "--probe-tokens", "24", "--kv-capacity", "10082"]
    try:
        assert main(["--probe", fleet.urls[0], "--out", str(out), *options]) == 0
        said = capsys.readouterr().out
        assert main(["--probe", fleet.urls[0] + "/nothing", "--out", str(tmp_path / "other.yaml"), *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: --probe={fleet.urls[0]}/nothing")
    finally:
        loop.run(fleet.stop())
    assert "mean TPOT" in said
    (found,) = OmegaConf.load(out).experts
    assert found.model == site.experts[0].model
    assert (found.max_num_seqs, found.max_waiting, found.kv_capacity) == (4, None, 10082)
    assert min(found.weight_load, found.compute_per_token) > 0


def test_logs_or_a_probe(tmp_path, capsys):
    for words in ([], ["log.csv", "--probe", "http://127.0.0.1:1/v1"]):
        assert main([*words, "--out", str(tmp_path / "mine.yaml")]) == 2
        assert "give logs, or --probe URL" in capsys.readouterr().err


def test_draws_are_as_wide_as_what_is_known_and_trade_offs_are_told(log):
    fit = calibrate(log, LIMITS)
    drawn = fit.draws(4000, np.random.default_rng(0))
    assert np.ptp(drawn["kv_capacity"]) == 0  # nothing is known of it
    for name in list(TRUE)[:-1]:
        expected = np.hypot(fit.standard_error[name], 0.005)
        assert np.log(drawn[name]).std() == pytest.approx(expected, rel=0.1), name
    # Two that only their sum is known of.
    half = np.array([[0.09, -0.0895], [-0.0895, 0.09]])
    vague = fit._replace(names=("weight_load", "attention_per_token"), covariance=half)
    (said,) = vague.trade_offs()
    assert "weight_load +35%" in said
    assert "attention_per_token -26%" in said
    assert not fit.trade_offs()

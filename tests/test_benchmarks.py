"""The benchmarks as a user types them, at their smallest: they run, print a table and write their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from benchmarks import prefix_caches, publish
from benchmarks.history import draw, read_history
from benchmarks.reliability import Routed, reliability, summary
from jaxroute.devices import usable_cores
from jaxroute.workloads import read_trace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
# The one that compiles least, as the others are made of the same parts, and one that draws a figure of its own.
MAIN_FIGURES = {
    "network": ["dense forward, ms", "segment forward, ms"],
    "reliability": ["edge6 impact_greedy, calibration error", "edge6 shortest_queue, calibration error"],
}


def shell(name, *args, cwd):
    """Run a benchmark as a new process, in a folder that takes what it writes."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False)


def written(folder, name):
    return json.loads((folder / "outputs" / "benchmarks" / f"{name}.json").read_text())


@pytest.fixture
def history(tmp_path, monkeypatch):
    """An empty folder in the place of the committed history, and the current one for what is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publish, "HISTORY", tmp_path / "history")
    return tmp_path / "history"


def test_reliability_of_predictions_made_by_hand():
    """Four of five requests that were given 0.85 are in time, and none of the five that were given 0.25."""
    times = np.arange(1.0, 11.0)
    routed = Routed(
        predicted_in_time=np.repeat([0.85, 0.25], 5),
        predicted_ttft=times + 0.5,
        predicted_tpot=2 * times,
        in_time=np.arange(10) < 4,
        ttft=times,
        tpot=np.where(times < 10, times, np.nan),
    )
    figures = summary(routed)
    assert figures["predicted_in_time"] - figures["in_time"] == pytest.approx(0.55 - 0.4)
    assert figures["calibration_error"] == pytest.approx((0.05 + 0.25) / 2)
    assert figures["ttft_bias"] == pytest.approx(0.5)
    assert (figures["tpot_bias"], figures["tpot_ratio"]) == (5.0, 2.0)
    np.testing.assert_array_equal(reliability(routed)["count"], [0, 0, 5, 0, 0, 0, 0, 0, 5, 0])


@pytest.mark.parametrize("name", MAIN_FIGURES)
def test_each_benchmark_writes_its_figures_and_the_machine(name, tmp_path):
    done = shell(name, "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = written(tmp_path, name)
    assert set(MAIN_FIGURES[name]) <= set(result["main"])
    assert all(isinstance(value, float) for value in result["main"].values())
    assert result["machine"]["cores"] == usable_cores()
    assert {"date", "version", "commit"} <= set(result)


def test_rules_over_two_caches_made_by_hand(tmp_path, monkeypatch):
    """Three sessions of two turns: the first asks for two blocks, the second for four, of which it may find three."""
    path = tmp_path / "trace.csv"
    turns = [(32, "a"), (50, "a"), (32, "b"), (32, "c"), (50, "b"), (50, "c")]
    rows = "".join(f"{time},{prompt},16,{name}\n" for time, (prompt, name) in enumerate(turns))
    path.write_text("arrival_time,prompt_tokens,output_tokens,session\n" + rows)
    trace = read_trace(path)
    texts = [trace.prefixes.blocks(request) for request in range(6)]

    def found(name, servers=2, cache=None):
        rate = prefix_caches.route(trace, texts, prefix_caches.make(name), servers, cache)["hit_rate"]
        return pytest.approx(rate * 18)

    # The latest request alone is outstanding, so that the least loaded server is the other one.
    monkeypatch.setattr(prefix_caches, "OUTSTANDING_SECONDS", 1.5)
    assert found("round robin") == found("least loaded") == 6  # b and c come back to their servers, a does not
    assert found("session hash") == found("cache-aware") == found("longest prefix") == 9
    # Six blocks hold all of b when it comes back, which leaves the first one of c.
    assert found("one server", 1, 6 * 16) == 3 + 3 + 1
    monkeypatch.setattr(prefix_caches, "BALANCE_ABS_THRESHOLD", 0)
    assert found("cache-aware") == 6


def test_prefix_caches_of_a_small_trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"{time},{100 + time},20,{time % 7}\n" for time in range(60))
    path.write_text("arrival_time,prompt_tokens,output_tokens,session\n" + rows)
    done = shell("prefix_caches", "--quick", "--trace", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rates = {
        (row["rule"], row["servers"], row["cache"]): row["hit_rate"]
        for row in written(tmp_path, "prefix_caches")["rows"]
    }
    assert rates["round robin", 2, None] < rates["session hash", 2, None] <= rates["one server", 1, None]
    assert (tmp_path / "outputs" / "benchmarks" / "prefix_caches.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("arrival_time,prompt_tokens,output_tokens\n0,1,1\n")
    done = shell("prefix_caches", "--quick", "--trace", str(path), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "trace.csv does not say what prompts have in common" in done.stderr


def test_comparison_with_plain_python_and_stable_baselines3(tmp_path):
    pytest.importorskip("gymnasium")
    pytest.importorskip("stable_baselines3")
    done = shell("compare", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = written(tmp_path, "compare")["rows"]
    reference, ours = rows["reference simulator, one site"], rows["jaxroute.replay, one site"]
    assert ours["mean_latency_seconds"] == pytest.approx(reference["mean_latency_seconds"], abs=1e-3)
    assert rows["jaxroute PPO, mlp"]["ratio"] > 0


def test_comparison_names_the_extra_if_it_is_missing(tmp_path):
    # What Python finds first: a module that is not there.
    (tmp_path / "gymnasium.py").write_text("raise ModuleNotFoundError(name='gymnasium')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.compare"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: module gymnasium is missing; at the top of a checkout, run pip install -e '.[benchmark]' first"
    ]


def test_a_slowdown_shows_in_the_history(history):
    for speed, milliseconds in ((100.0, 1.0), (110.0, 1.0), (90.0, 1.0), (50.0, 0.5)):
        figures = {"training, steps/s": speed, "decision, ms": milliseconds}
        publish.publish("example", Table("figure"), {"rows": []}, figures, remember=True)
    speed, latency = read_history(history)
    assert (speed.figure, speed.values) == ("training, steps/s", [100.0, 110.0, 90.0, 50.0])
    assert speed.gain == pytest.approx(0.5)
    assert latency.gain == pytest.approx(2.0)
    draw([speed, latency], history / "history.png")
    assert (history / "history.png").stat().st_size > 0


def test_a_run_not_to_be_remembered_leaves_no_line(history):
    publish.publish("example", Table("figure"), {"rows": [1]}, {"training, steps/s": 1.0}, remember=False)
    assert written(history.parent, "example")["rows"] == [1]
    assert read_history(history) == []

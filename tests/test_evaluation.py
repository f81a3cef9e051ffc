"""Metrics, intervals and the files of an evaluation."""

from __future__ import annotations

import csv
import errno
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxroute
from jaxroute.errors import UserError
from jaxroute.evaluation.episodes import _at_load, evaluate_policies
from jaxroute.evaluation.metrics import LOADS, METRICS, EpisodeRecords, Outcome, summarise
from jaxroute.evaluation.report.figures import plot_expert_choice, plot_policy_comparison, plot_qos_against_load
from jaxroute.evaluation.report.tables import markdown_table, results_table, summary_text
from jaxroute.evaluation.report.write import write_all, write_results_json
from jaxroute.evaluation.result import EvaluationResult
from jaxroute.evaluation.statistics import Interval, mean_ci95, paired_difference, student_t_975
from jaxroute.policies import rules_named
from jaxroute.workloads.limits import Limits

pytestmark = pytest.mark.filterwarnings("error")

NAN = math.nan


# --- Metrics -------------------------------------------------------------------------------------------


def hand_made_records() -> EpisodeRecords:
    """Seven requests: three in time (one exactly), one late, one rejected, one in flight, one declined; then seven
    rejected."""
    status = [
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        Outcome.REJECTED,
        Outcome.IN_FLIGHT,
        Outcome.COMPLETED,
        Outcome.DECLINED,
    ]
    nothing = [NAN] * 7
    return EpisodeRecords(
        status=np.array([status, [Outcome.REJECTED] * 7], np.int8),
        expert=np.array([[0, 0, 1, 1, 1, 1, 2]] * 2),
        quality=np.array([[0.5, 0.8, 1.0, 0.9, 0.7, 0.4, 0.0]] * 2),
        limits=Limits(
            ttft=np.array([[math.inf, 0.5, 0.4, 1.0, 1.0, math.inf, 1.0]] * 2),
            normalised=np.array([[1.0, 0.2, 0.1, 1.0, 1.0, 3.0, 1.0]] * 2),
        ),
        output_tokens=np.array([[10, 10, 5, 0, 7, 1, 0]] * 2),
        ttft=np.array([[1.0, 0.5, 0.5, NAN, NAN, 2.0, NAN], nothing]),
        latency=np.array([[5.0, 2.0, 2.5, NAN, NAN, 2.0, NAN], nothing]),  # per token: .5, .2, .5, -, -, 2, -
        preemptions=np.array([[0, 0, 2, 0, 9, 0, 0], [0] * 7]),
        spent=np.zeros((2, 7)),
        busy_seconds=np.array([[3.0, 5.0], [0.0, 0.0]]),
        kv_token_seconds=np.array([[1.5e6, 0.5e6], [0.0, 0.0]]),
        duration=np.array([10.0, 10.0]),
        load_counts=np.array([[[1.0, 0, 2, 0, 3], [6, 0, 0, 0, 0]]] * 2),
        choice_counts=np.array([[[1.0, 0, 1, 0, 0], [4, 0, 0, 0, 0]]] * 2),
    )


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("avg_qos", (0.5 + 0.8 + 0.4) / 6),
        ("qos_per_second", 0.17),
        ("spent_per_request", 0),
        ("in_time_rate", 3 / 6),
        ("violation_rate", 1 / 6),
        ("ttft_violation_rate", 1 / 6),
        ("normalised_violation_rate", 1 / 6),
        ("rejection_rate", 1 / 6),
        ("declined_rate", 1 / 6),
        ("cloud_rate", 0),
        ("lost_rate", 0),
        ("mean_quality", (0.5 + 0.8 + 1.0 + 0.4) / 4),
        ("qos_per_busy_second", 1.7 / 8),
        ("qos_per_million_kv_token_seconds", 1.7 / 2),
        ("ttft_mean", 1.0),
        ("ttft_p50", 0.75),
        ("ttft_p95", 1.85),  # sorted .5 .5 1 2, at .95 * 3 = 2.85
        ("ttft_p99", 1.97),
        ("tpot_mean", (4 / 9 + 1.5 / 9 + 2 / 4) / 3),  # the answer of one token has none
        ("tpot_p50", 4 / 9),
        ("normalised_latency_mean", 0.8),
        ("normalised_latency_p50", 0.5),
        ("e2e_mean", 2.875),
        ("e2e_p50", 2.25),
        ("goodput", 0.3),
        ("tokens_per_second", 2.6),
        ("preemptions_per_request", 2 / 6),
        ("expert_share", [2 / 6, 3 / 6]),
        ("expert_utilisation", [0.3, 0.5]),
        ("expert_load", [[1 / 7, 0, 2 / 7, 0, 3 / 7], [6 / 7, 0, 0, 0, 0]]),
        ("expert_choice", [[1 / 7, 0, 1 / 7, 0, 0], [4 / 7, 0, 0, 0, 0]]),
    ],
)
def test_metrics_by_hand(metric, expected):
    np.testing.assert_allclose(summarise(hand_made_records())[metric][0], expected, rtol=1e-12)


def test_warmup_is_not_counted():
    summary = summarise(hand_made_records(), warmup=1)
    np.testing.assert_allclose(summary["avg_qos"][0], 1.2 / 5)
    np.testing.assert_allclose(summary["expert_share"][0], [0.2, 0.6])
    np.testing.assert_allclose(summary["goodput"][0], 0.2)
    for warmup in (-1, 7):
        with pytest.raises(UserError, match="warmup"):
            summarise(hand_made_records(), warmup=warmup)


def test_what_the_cloud_answers_counts_and_is_paid_for():
    """The request that was declined has gone to the cloud instead, at a price."""
    records = hand_made_records()
    of_cloud = {"status": Outcome.COMPLETED, "quality": 0.6, "output_tokens": 10, "ttft": 0.5, "latency": 5.0}
    for name, value in (of_cloud | {"spent": 0.3}).items():
        getattr(records, name)[0, 6] = value
    summary = {name: values[0] for name, values in summarise(records).items()}
    expected = {"avg_qos": 2.3 / 6, "in_time_rate": 4 / 6, "declined_rate": 0, "cloud_rate": 1 / 6}
    expected |= {"spent_per_request": 0.3 / 6, "mean_quality": 3.3 / 5, "tokens_per_second": 3.6}
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value), name
    np.testing.assert_allclose(summary["expert_share"], [2 / 6, 3 / 6])


def test_nothing_completed():
    summary = {metric: values[1] for metric, values in summarise(hand_made_records()).items()}
    assert summary["avg_qos"] == 0
    assert summary["rejection_rate"] == 1
    assert summary["goodput"] == summary["tokens_per_second"] == 0
    for metric in ("mean_quality", "qos_per_busy_second", "ttft_mean", "tpot_p95", "e2e_p99"):
        assert math.isnan(summary[metric]), metric


def test_nothing_ended():
    records = hand_made_records()
    records = records._replace(status=np.full_like(records.status, Outcome.IN_FLIGHT), duration=np.zeros(2))
    per_arrival = ("expert_load", "expert_choice")
    for metric, values in summarise(records).items():
        assert np.isnan(values).all() or metric.startswith("qos") or metric in per_arrival, metric


def test_every_metric_is_defined_and_has_its_shape():
    records = hand_made_records()
    assert list(summarise(records)) == [
        name for name in METRICS if name not in ("tpot_violation_rate", "e2e_violation_rate")
    ], "a limit that no class of service has is not measured"
    limits = records.limits._replace(tpot=records.limits.ttft, e2e=records.limits.ttft)
    summary = summarise(records._replace(limits=limits))
    assert list(summary) == list(METRICS)
    for metric, values in summary.items():
        per_load = metric in ("expert_load", "expert_choice")
        per_expert = metric.startswith("expert_")
        assert values.shape == ((2, 2, len(LOADS)) if per_load else (2, 2) if per_expert else (2,)), metric


def test_rates_add_up_on_random_records():
    summary = summarise(random_records(np.random.default_rng(0), quality=0.6))
    names = ("in_time_rate", "violation_rate", "rejection_rate", "declined_rate", "lost_rate")
    np.testing.assert_allclose(sum(summary[name] for name in names), 1)
    assert (summary["declined_rate"] > 0).all()
    np.testing.assert_allclose(summary["expert_share"].sum(axis=1), 1 - summary["declined_rate"])
    assert (summary["avg_qos"] <= summary["in_time_rate"]).all()


@pytest.fixture(scope="module")
def counted() -> tuple[dict[str, EpisodeRecords], dict[str, int]]:
    """Records of two rules on a site of three experts, where requests are never retried."""
    env, params = jaxroute.make("edge-poisson", site="edge3", rate=1.5)
    settings = {"episodes": 3, "requests": 80, "warmup": 20}
    policies = rules_named(["random", "shortest_queue"])
    return evaluate_policies(env, params, policies, [1.5], seed=1, **settings)[1.5], settings


def test_every_decision_is_counted_once(counted):
    by_policy, settings = counted
    for records in by_policy.values():
        assert records.load_counts.shape == records.choice_counts.shape == (3, 3, len(LOADS))
        np.testing.assert_array_equal(records.load_counts.sum(2), settings["requests"])  # every expert is up
        assert (records.choice_counts <= records.load_counts).all()
        # The same choices as request by request, ended or not.
        chosen = records.expert[:, settings["warmup"] :, None] == np.arange(3)
        np.testing.assert_array_equal(records.choice_counts.sum(2), chosen.sum(1))


def test_choices_follow_the_load(counted):
    """The busier an expert is, the less shortest_queue gives it."""
    records = counted[0]["shortest_queue"]
    share = records.choice_counts.sum((0, 1)) / records.load_counts.sum((0, 1))
    assert share[0] > 0.9
    assert (np.diff(share) < 0).all()


@pytest.mark.parametrize(
    ("seats", "in_flight", "loads"),
    [(12, [2, 3, 12], [0, 1, 4]), (4, [0, 3, 9], [0, 3, 4]), (3, [1, 2, 3], [1, 2, 4])],
)
def test_bins_of_load(seats, in_flight, loads):
    env, params = jaxroute.make("edge-poisson", site="edge3")
    experts = env.reset(jax.random.key(0), params)[0].experts
    running = jnp.minimum(jnp.array(in_flight, jnp.float32), seats)
    experts = experts._replace(
        num_running=running, num_waiting=jnp.array(in_flight) - running, max_num_seqs=jnp.full(3, seats, jnp.float32)
    )
    assert np.argwhere(_at_load(experts)).tolist() == [list(pair) for pair in enumerate(loads)]
    down = experts._replace(up=jnp.array([True, False, True]))
    assert _at_load(down).sum(1).tolist() == [1, 0, 1]


# --- Statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees_of_freedom", "quantile"),  # from printed tables
    [
        *[(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (10, 2.228), (11, 2.201), (12, 2.179)],
        *[(15, 2.131), (20, 2.086), (30, 2.042), (60, 2.000), (120, 1.980), (10**6, 1.960)],
    ],
)
def test_student_t_quantiles(degrees_of_freedom, quantile):
    assert student_t_975(degrees_of_freedom) == pytest.approx(quantile, abs=1e-3)


def test_student_t_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="at least 1"):
        student_t_975(0)


def test_mean_ci95_by_hand():
    mean, ci95 = mean_ci95(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3
    assert ci95 == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=1e-3)


def test_mean_ci95_without_enough_seeds():
    assert mean_ci95(np.array([0.7]))[0] == 0.7
    assert math.isnan(mean_ci95(np.array([0.7])).ci95)
    assert all(map(math.isnan, mean_ci95(np.array([NAN, NAN]))))
    assert mean_ci95(np.array([1.0, NAN, 3.0])) == mean_ci95(np.array([1.0, 3.0]))


def test_paired_difference_cancels_common_noise():
    rng = np.random.default_rng(0)
    common = rng.normal(0.6, 0.1, 20)
    a, b = common + 0.01 + rng.normal(0, 1e-3, 20), common
    difference = paired_difference(a, b)
    assert abs(difference.mean - 0.01) < difference.ci95 < 1e-3 < mean_ci95(a).ci95
    assert paired_difference(np.array([3.0, 5.0]), np.array([1.0, 3.0])) == Interval(2.0, 0.0)
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(a, b[:1])


# --- Reports -------------------------------------------------------------------------------------------


def random_records(rng: np.random.Generator, quality: float, episodes: int = 4) -> EpisodeRecords:
    shape, experts = (episodes, 60), (episodes, 3)
    fate = rng.random(shape)
    rejected, declined = fate < 0.1, (fate >= 0.1) & (fate < 0.2)
    tokens = rng.integers(1, 50, shape)
    latency = np.where(rejected | declined, NAN, tokens * rng.lognormal(-3.0, 0.5, shape))
    load_counts = rng.multinomial(shape[1], np.full(len(LOADS), 1 / len(LOADS)), experts)
    return EpisodeRecords(
        status=np.select([rejected, declined], [Outcome.REJECTED, Outcome.DECLINED], Outcome.COMPLETED).astype(np.int8),
        expert=np.where(declined, 3, rng.integers(0, 3, shape)),
        quality=np.clip(quality + rng.normal(0, 0.05, shape), 0, 1).astype(np.float32),
        limits=Limits(normalised=np.full(shape, 0.07, np.float32)),
        output_tokens=tokens,
        ttft=latency * 0.1,
        latency=latency,
        preemptions=rng.integers(0, 2, shape),
        spent=np.zeros(shape),
        busy_seconds=rng.uniform(1, 5, experts).astype(np.float32),
        kv_token_seconds=rng.uniform(1e4, 5e4, experts).astype(np.float32),
        duration=np.full(episodes, 6.0, np.float32),
        load_counts=load_counts.astype(np.float32),
        choice_counts=rng.binomial(load_counts, 1 / 3).astype(np.float32),
    )


def make_result(episodes: int = 4, rates: tuple[float, ...] = (4.0, 8.0)) -> EvaluationResult:
    qualities = {"random": 0.5, "learned": 0.8, "qos<greedy>": 0.7, "clairvoyant": 0.9, "broken": 0.1}
    summaries = {}
    for rate in rates:
        summaries[rate] = {
            name: summarise(random_records(np.random.default_rng(int(rate)), quality, episodes))
            for name, quality in qualities.items()
        }
        broken = summaries[rate]["broken"]  # a policy of which nothing was ever completed
        summaries[rate]["broken"] = {key: np.full_like(value, NAN) for key, value in broken.items()} | {
            "avg_qos": np.zeros(episodes)
        }
    return EvaluationResult(
        workload="bursts",
        site="six",
        bank="default",
        rates=rates,
        nominal_rate=rates[-1],
        episodes=episodes,
        requests=60,
        warmup=0,
        reference="learned",
        expert_names=["small", "medium", "large"],
        summaries=summaries,
        upper_references=["clairvoyant"],
        provenance={"version": "0.1.0", "eval": {"episodes": episodes, "tolerance": NAN}, "path": Path("x")},
    )


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    return make_result()


@pytest.fixture(scope="module")
def written(result, tmp_path_factory) -> dict[str, Path]:
    return write_all(result, tmp_path_factory.mktemp("report") / "new")


def test_write_all(written):
    expected = "comparison.png expert_choice.png expert_share.png qos_against_load.png quality_latency.png"
    assert sorted(written) == [*expected.split(), "report.html", "results.csv", "results.json"]
    assert sorted(written) == sorted(path.name for path in written["report.html"].parent.iterdir())
    for name, path in written.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size < 200_000


def strict_json(path: Path) -> dict:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=reject)


# Requests limit their normalised latency alone here.
MEASURED = [
    name for name in METRICS if name not in ("ttft_violation_rate", "tpot_violation_rate", "e2e_violation_rate")
]


def test_json(result, written):
    content = strict_json(written["results.json"])
    assert (content["workload"], content["episodes"], content["rate"]) == ("bursts", 4, 8.0)
    assert [load["rate"] for load in content["loads"]] == [4.0, 8.0]
    assert content["loads"][1]["policies"] == content["policies"]
    assert content["loads"][1]["paired_difference"] == content["paired_difference"]
    assert list(content["policies"]) == ["clairvoyant", "learned", "qos<greedy>", "random", "broken"]
    learned = content["policies"]["learned"]
    assert list(learned) == MEASURED
    mean, ci95 = mean_ci95(result.summaries[8.0]["learned"]["avg_qos"])
    assert learned["avg_qos"] == {"mean": mean, "ci95": ci95}
    assert sum(learned["expert_share"]) == pytest.approx(1 - learned["declined_rate"]["mean"])
    assert content["policies"]["broken"]["ttft_p95"] == {"mean": None, "ci95": None}
    assert content["policies"]["broken"]["expert_share"] == [None] * 3
    np.testing.assert_allclose(learned["expert_choice"], result.expert_means(8.0, "learned", "expert_choice"))
    assert set(content["paired_difference"]) == set(content["policies"]) - {"learned"}
    assert content["paired_difference"]["random"]["mean"] > 0 > content["paired_difference"]["clairvoyant"]["mean"]
    assert content["provenance"]["eval"] == {"episodes": 4, "tolerance": None}


def test_csv(result, written):
    with written["results.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["workload", "rate", "policy", "metric", "mean", "ci95"]
    values = {(row["rate"], row["policy"], row["metric"]): row for row in rows}
    assert len(values) == len(rows) == 2 * (5 * (len(MEASURED) - 4 + 2 * 3 + 2 * 3 * len(LOADS)) + 4)
    mean, ci95 = mean_ci95(result.summaries[4.0]["random"]["e2e_p50"])
    row = values["4", "random", "e2e_p50"]
    assert (float(row["mean"]), float(row["ci95"])) == pytest.approx((mean, ci95))
    assert values["4", "broken", "e2e_p50"]["mean"] == ""
    assert ("8", "learned", "expert_share[large]") in values
    at_load = values["8", "random", "expert_choice[large][75]"]
    assert float(at_load["mean"]) == pytest.approx(result.summaries[8.0]["random"]["expert_choice"][:, 2, 3].mean())
    assert ("8", "random", "paired_difference") in values
    assert ("8", "learned", "paired_difference") not in values


def test_html_is_self_contained_and_escaped(result, written):
    page = written["report.html"].read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|<link|<script|@import|url\(""", page)
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 5
    assert "qos&lt;greedy&gt;" in page
    assert "qos<greedy>" not in page
    assert "4 requests per second" in page
    assert "eval.tolerance" in page
    for metric in METRICS.values():
        assert metric.label.split(",")[0] in page


def test_terminal_table_fits(result):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(results_table(result))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in capture.get()
    names = [line.split()[0] for line in lines if line.split() and line.split()[0] in result.summaries[8.0]]
    assert names == result.ranking(8.0)


def test_cloud_and_spending_are_shown_where_there_is_a_cloud(result):
    """And declined requests always, beside the rejected ones."""

    def shown(result):
        console = Console(width=100)
        with console.capture() as capture:
            console.print(results_table(result))
        assert max(map(len, capture.get().splitlines())) <= 100
        assert "…" not in capture.get()
        return markdown_table(result).splitlines()

    header, _, best, *_ = shown(result)
    assert [cell.strip() for cell in header.split("|")][3:6] == ["late (%)", "rej. (%)", "decl. (%)"]
    declined = 100 * result.interval(8.0, "clairvoyant", "declined_rate").mean
    assert best.split("|")[5].strip() == f"{declined:.1f}"
    assert "cloud" not in header
    some = dict(result.summaries[8.0]["random"])
    some |= {"cloud_rate": np.full(4, 0.25), "spent_per_request": np.full(4, 0.0125)}
    used = replace(result, summaries=result.summaries | {8.0: result.summaries[8.0] | {"random": some}})
    header, _, *rows = shown(used)
    assert "| cloud (%) | spent (per req.) |" in header
    (row,) = [row for row in rows if "`random`" in row]
    assert "| 25.0 | 0.013 |" in row or "| 25.0 | 0.012 |" in row


def test_declined_requests_have_bars_of_their_own(result):
    """Late, rejected and declined add up to the number beside them."""
    bars = plot_policy_comparison(result).axes[1]
    widths = {group.get_label(): [bar.get_width() for bar in group] for group in bars.containers}
    assert list(widths) == ["late", "rejected", "declined"]
    assert {text.get_text() for text in bars.get_legend().get_texts()} == set(widths)
    for place, policy in enumerate(result.ranking(8.0)):
        rates = ("violation_rate", "rejection_rate", "declined_rate")
        expected = [np.nan_to_num(100 * result.interval(8.0, policy, rate).mean) for rate in rates]
        np.testing.assert_allclose([widths[name][place] for name in widths], expected)


def test_markdown_table(result):
    lines = markdown_table(result, rate=4.0).splitlines()
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "**`learned`**" in lines[3]


def test_summary_in_words(result):
    text = summary_text(result)
    assert text.startswith("At 8 requests/s on bursts, learned reached an average QoS of 0.")
    declined = 100 * result.interval(8.0, "learned", "declined_rate").mean
    assert f"It declined {declined:.1f} %, which count as 0." in text
    assert "above the best other policy, qos<greedy> (paired over 4 episodes)" in text
    assert "at each of the 2 loads it is ahead at 2." in text
    assert "clairvoyant, which sees what no router can" in text


def test_without_a_reference(result, tmp_path):
    alone = replace(result, reference=None)
    content = strict_json(write_results_json(alone, tmp_path / "results.json"))
    assert content["paired_difference"] == {}
    assert "- it" not in markdown_table(alone)
    assert "learned was the best policy" in summary_text(alone)


def test_single_seed_has_no_intervals(tmp_path):
    single = make_result(episodes=1, rates=(8.0,))
    content = strict_json(write_results_json(single, tmp_path / "results.json"))
    assert content["policies"]["learned"]["avg_qos"]["mean"] > 0
    assert content["policies"]["learned"]["avg_qos"]["ci95"] is None
    assert "±" not in markdown_table(single)
    assert "too few to tell" in summary_text(single)
    for plot in (plot_policy_comparison, plot_qos_against_load):  # those that draw intervals
        plot(single).draw_without_rendering()


@pytest.mark.parametrize("reference", [None, "random"])
def test_one_policy_in_one_episode_is_enough(reference, tmp_path):
    """Nobody to compare with, and no interval: every file and every sentence is there all the same."""
    single = make_result(episodes=1, rates=(8.0,))
    alone = {8.0: {"random": single.summaries[8.0]["random"]}}
    result = replace(single, summaries=alone, reference=reference, upper_references=[])
    written = write_all(result, tmp_path)
    content = strict_json(written["results.json"])
    assert list(content["policies"]) == ["random"]
    assert content["paired_difference"] == {}
    assert "1 episode of 60 requests" in written["report.html"].read_text()
    assert "random" in summary_text(result)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(results_table(result))
    assert "random" in capture.get()


def test_a_full_disk_is_reported_in_one_line(result, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"results\.json cannot be written \(No space left on device\)") as raised:
        write_all(result, tmp_path / "new")
    assert "\n" not in str(raised.value)


def test_judging_loads_no_drawing():
    """Matplotlib and Jinja take seconds to import, and are needed only once there is something to draw."""
    later = ("matplotlib", "jinja2", "orbax.checkpoint", "wandb")
    code = "import sys, jaxroute.evaluation.study.run, jaxroute.evaluation.judge\n"
    code += f"print([name for name in {later} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_choices_are_drawn_where_there_were_enough(result):
    """A line per policy in every expert's panel, at the share of the choices; nothing where too little was seen."""
    summary = dict(result.summaries[8.0]["learned"])
    summary["expert_load"] = np.array([[[0.5, 0.4, 0.1, 0.0, 0.0]] * 3] * 4)
    summary["expert_choice"] = np.array([[[0.1, 0.2, 0.05, 0.0, 0.0]] * 3] * 4)
    few = replace(result, summaries=result.summaries | {8.0: result.summaries[8.0] | {"learned": summary}})
    panels = plot_expert_choice(few).axes
    assert [axes.get_title("left") for axes in panels] == ["small", "medium", "large"]
    for axes in panels:
        lines = {line.get_label(): line for line in axes.lines}
        assert len(axes.lines) == 5
        assert {"learned", "qos<greedy>", "clairvoyant"} <= set(lines)
        np.testing.assert_allclose(lines["learned"].get_ydata(), [20, 50, NAN, NAN, NAN])


def test_policies_may_be_missing_at_a_load(result):
    """Planning is slow, so it may be evaluated at one load only."""
    partial = {4.0: {"learned": result.summaries[4.0]["learned"]}, 8.0: result.summaries[8.0]}
    figure = plot_qos_against_load(replace(result, summaries=partial))
    assert len(figure.axes[0].lines) == 5


def test_result_must_be_complete(result):
    with pytest.raises(ValueError, match="nominal_rate"):
        replace(result, nominal_rate=5.0)
    with pytest.raises(ValueError, match="lack the rate"):
        replace(result, rates=[8.0, 9.0])
    with pytest.raises(ValueError, match="reference"):
        replace(result, reference="nobody")

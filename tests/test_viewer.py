"""The episode viewer: what is recorded agrees with the evaluation, and the page stands alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from browser import CHROMIUM, opened

import jaxroute
from jaxroute.commands.eval import main as eval_main
from jaxroute.config import load_config
from jaxroute.evaluation.episodes import evaluate_policies
from jaxroute.evaluation.metrics import Outcome
from jaxroute.evaluation.viewer import record
from jaxroute.evaluation.viewer.record import (
    Ending,
    Phase,
    episode_content,
    record_episode,
    view_html,
)
from jaxroute.networks import build_network
from jaxroute.policies import learned_policy, rules_named

pytestmark = pytest.mark.slow

SEED, WARMUP, REQUESTS = 5, 20, 80
LABELS = ["a", "b </script> & <b>", "c"]
# Busy enough that requests are late, rejected and preempted; experts fail often.
RATE = 6.0
OUTAGES = ("dynamics.mean_uptime=4", "dynamics.mean_downtime=2")


# A cloud with few places, for a rule that sends away what is worth little.
CLOUD = (
    "site.cloud={model: gemma-2-27b-it, ttft: 0.5, tpot: 0.02, price_per_request: 0.02, price_per_1000_tokens: 0.1, "
)
CLOUD += "ttft_spread: 0.8, slow_share: 0.3, max_in_flight: 2}"


def recorded(outages="none", rule="round_robin", overrides=()):
    overrides = (f"dynamics.outages={outages}", *OUTAGES, *overrides)
    env, params = jaxroute.make("edge3-poisson", rate=RATE, overrides=overrides)
    (policy,) = rules_named([rule])
    recording = record_episode(env, params, policy, seed=SEED, requests=REQUESTS, warmup=WARMUP)
    content = episode_content(recording, LABELS, first=WARMUP, last=WARMUP + REQUESTS - 1)
    return env, params, policy, recording, content


KINDS = {
    "none": ("none",),
    "lost": ("lost",),
    "retried": ("retried",),
    "cloud": ("none", "round_robin+price", [CLOUD]),
}


@pytest.fixture(scope="module", params=list(KINDS))
def episode(request):
    return request.param, *recorded(*KINDS[request.param])


def test_every_request_is_there_and_ends_once(episode):
    outages, _, _, policy, _, content = episode
    stays = content["stays"]
    shown = [stay for stay in stays if stay["number"] >= WARMUP]
    assert {stay["number"] for stay in shown} == set(range(WARMUP, WARMUP + REQUESTS))
    # A request has one end; what comes before is only given back, where experts that fail do that.
    ends = Counter(stay["number"] for stay in stays if stay["outcome"] != Ending.GIVEN_BACK)
    assert set(ends.values()) == {1}
    outcomes = {stay["outcome"] for stay in stays}
    assert {Ending.IN_TIME, Ending.LATE} <= outcomes
    assert (Ending.REJECTED in outcomes) or "+" in policy.name
    assert (Ending.DECLINED in outcomes) == ("+" in policy.name)
    assert (Ending.LOST in outcomes) == (outages == "lost")
    assert (Ending.GIVEN_BACK in outcomes) == (outages == "retried")
    for stay in stays:
        assert (stay["end"] is None) == (stay["outcome"] == Ending.IN_FLIGHT)
        assert (stay["ttft"] is not None) == (stay["outcome"] in (Ending.IN_TIME, Ending.LATE))


def test_outcomes_are_those_of_an_evaluation(episode):
    _, env, params, policy, _, content = episode
    records = evaluate_policies(env, params, [policy], [RATE], seed=SEED, episodes=1, requests=REQUESTS, warmup=WARMUP)[
        RATE
    ][policy.name]
    status = {
        Ending.IN_TIME: Outcome.COMPLETED,
        Ending.LATE: Outcome.COMPLETED,
        Ending.REJECTED: Outcome.REJECTED,
        Ending.LOST: Outcome.LOST,
        Ending.DECLINED: Outcome.DECLINED,
    }
    for stay in content["stays"]:
        number = stay["number"]
        if stay["outcome"] in (Ending.IN_FLIGHT, Ending.GIVEN_BACK):
            continue
        assert status[stay["outcome"]] == records.status[0, number]
        assert stay["expert"] == records.expert[0, number]
        assert stay["quality"] == pytest.approx(records.quality[0, number], abs=1e-4)
        if stay["ttft"] is not None:
            latency, limit = records.latency[0, number], records.limits.normalised[0, number]
            assert stay["limits"] == {"normalised": pytest.approx(limit, abs=1e-5)}
            assert stay["end"] - stay["arrival"] == pytest.approx(latency, abs=1e-3)
            assert stay["ttft"] == pytest.approx(records.ttft[0, number], abs=1e-4)
            assert stay["preemptions"] == records.preemptions[0, number]
            assert (stay["outcome"] == Ending.IN_TIME) == (latency / stay["output_tokens"] <= limit)


def test_who_is_sent_away_has_a_stay_of_its_own(episode):
    """Beyond the last expert: it ends at once if it is declined, and with the answer if the cloud takes it."""
    kind, *_, content = episode
    away = [stay for stay in content["stays"] if stay["expert"] == 3]
    declined = [stay for stay in away if stay["outcome"] == Ending.DECLINED]
    assert bool(declined) == (kind == "cloud")
    assert {stay["outcome"] for stay in away if stay not in declined} == (
        {Ending.IN_TIME, Ending.LATE} if kind == "cloud" else set()
    )
    assert all(stay["end"] == stay["routed"] and stay["quality"] == 0 for stay in declined)
    assert not any(stay["samples"]["phase"] for stay in away)
    decisions = content["decisions"]
    places = np.sum(decisions["expert"] == 3)
    assert places == sum(stay["routed"] >= 0 for stay in away)
    # What away was worth to each request, as the router saw it.
    assert (decisions["away_cost"] > 0).any() == (kind == "cloud")
    np.testing.assert_array_equal(decisions["away_cost"] > 0, decisions["away_to_cloud"])


def test_samples_are_of_the_time_at_the_expert(episode):
    *_, recording, content = episode
    time = content["decisions"]["time"]
    in_flight = np.zeros(len(time), int)
    kv = np.zeros((len(time), 3))
    for stay in content["stays"]:
        samples = stay["samples"]
        count = len(samples["phase"])
        if not count:
            continue
        at = slice(stay["sampled_from"], stay["sampled_from"] + count)
        in_flight[at] += 1
        kv[at, stay["expert"]] += samples["computed"]
        assert (time[at] >= stay["routed"]).all()
        if stay["end"] is not None:
            assert (time[at] <= stay["end"] + 1e-4).all()
        assert (np.diff(samples["generated"]) >= 0).all()
        assert (np.diff(samples["preemptions"]) >= 0).all()
        assert samples["generated"][-1] < stay["output_tokens"]
        for phase, generated, computed in zip(samples["phase"], samples["generated"], samples["computed"], strict=True):
            if phase == Phase.WAITING:
                assert computed == 0
            if phase == Phase.DECODE:
                assert computed == stay["prompt_tokens"] + generated - 1
    decisions = recording.decisions
    begin = int(np.argmax(decisions.request.number == WARMUP))
    active = (decisions.running | decisions.waiting)[begin : begin + len(time)]
    assert (in_flight == active.sum((1, 2))).all()
    assert (kv == content["decisions"]["kv"]).all()


def test_probabilities_are_those_of_the_network():
    env, params = jaxroute.make("edge3-poisson", rate=RATE)
    network = build_network(load_config().network, away=True)
    obs, _ = env.reset(jax.random.key(0), params)
    policy = learned_policy(network, network.init(jax.random.key(1), network.prepare(obs)))
    recording = record_episode(env, params, policy, seed=SEED, requests=10, warmup=0, network=network)
    probability = recording.decisions.probability
    assert probability.shape == (10, 4)
    assert np.allclose(probability.sum(1), 1, atol=1e-5)
    assert (probability.argmax(1) == recording.decisions.expert).all()


def page_json(page):
    (text,) = re.findall(r'<script type="application/json" id="episode">(.*?)</script>', page, re.DOTALL)
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer")
    arguments = ["view=impact_greedy+decline", "site=edge3", "workload.rate=12", "eval.requests=30", "eval.warmup=5"]
    assert eval_main([*arguments, f"output_dir={folder}"]) == 0
    return (folder / "view.html").read_text()


def test_page_stands_alone(page):
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|@import|url\(|fetch\(|XMLHttpRequest", page)
    assert re.findall(r"<link[^>]*href=\"([^\"]*)\"", page) == ["data:,"]


def test_page_holds_the_episode(page):
    episode = page_json(page)
    decisions = episode["decisions"]
    assert decisions["number"] == list(range(5, 35))
    assert decisions["time"][0] == 0
    for column in decisions.values():
        assert len(column) == 30
    assert decisions["probability"][0] == [None] * 4
    assert decisions["away_qos"] == [0] * 30
    declined = [stay for stay in episode["stays"] if stay["outcome"] == Ending.DECLINED]
    assert 0 < len(declined) < 30
    assert all(stay["expert"] == 3 for stay in declined)
    assert len(episode["experts"]) == 3
    assert episode["endings"] == {ending.name: ending for ending in Ending}
    assert episode["phases"] == {phase.name: phase for phase in Phase}


def test_the_script_has_no_codes_of_its_own():
    """It takes every name of an ending and a phase from the page's data."""
    script = Path(record.__file__).with_name("viewer.js").read_text()
    for codes, source in ((Ending, "episode.endings"), (Phase, "episode.phases")):
        (names,) = re.findall(rf"const {{([^}}]*)}} = {re.escape(source)};", script)
        assert {name.strip() for name in names.split(",")} == {code.name for code in codes}
        assert not re.findall(rf"\b(?:{'|'.join(code.name for code in codes)})\s*=\s*\d", script)


def test_text_from_outside_is_escaped():
    *_, content = recorded()
    page = view_html(
        {"workload": "<i>", "site": "s", "bank": "b", "policy": "p", "rate": 1.0, **content}, {"seed": "0"}
    )
    assert page_json(page)["experts"][1]["label"] == LABELS[1]
    assert "<i>" not in page.split("<body>")[1].split("</header>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("seats", "drawn"), [(4, 4), (256, 32)])
def test_of_many_seats_those_are_drawn_that_anybody_takes(seats, drawn, loop, tmp_path):
    *_, content = recorded()
    content = content | {"experts": [expert | {"max_num_seqs": seats} for expert in content["experts"]]}
    path = tmp_path / "view.html"
    path.write_text(
        view_html({"workload": "w", "site": "s", "bank": "b", "policy": "p", "rate": 1.0, **content}, {"seed": "0"})
    )

    async def run():
        async with opened(path.as_uri()) as page:
            await page.until("document.querySelectorAll('article.expert').length == 3")
            cells = await page.value("document.querySelector('.cells').children.length")
            many = await page.value("document.querySelectorAll('article.many').length")
            return cells, many, page.problems

    assert loop.run(run()) == (drawn, 3 * (seats > drawn), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view=slo_headrom"], "view=slo_headrom is unknown (did you mean slo_headroom?)"),
        (["view=true"], "view=true is unknown; choose jaxroute or a rule: random,"),
        (["view=jaxroute"], "view=jaxroute needs a trained router; add checkpoint=outputs/<run>"),
        (["view=random", "study=quick"], "view=random shows one episode"),
        (["view=random+prize"], "view=random+prize: the form prize is unknown (did you mean price?)"),
        (
            ["view=random+price", "site=edge3", "env.away=false"],
            "policy random+price sends requests away, and env.away",
        ),
    ],
)
def test_mistakes_in_one_line(arguments, message, capsys, tmp_path):
    assert eval_main([*arguments, f"output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()

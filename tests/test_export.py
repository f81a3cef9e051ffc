"""An exported router: it decides as the policy does, infers what it is not told, and refuses what is broken."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.exported_router import ENDS, EVERYTHING, STREAMING, play
from jaxroute.commands.export import main
from jaxroute.config import load_config
from jaxroute.env.gateways import UNREAD
from jaxroute.env.types import Prices
from jaxroute.errors import UserError
from jaxroute.gateway import CLOUD, DECLINED, Router
from jaxroute.gateway.artefact import FIELDS, LIMIT_FIELDS
from jaxroute.networks import build_network
from jaxroute.runs import load_policy, save_params, write_config
from jaxroute.scenarios import build_env
from jaxroute.serving import CloudConfig, ExpertConfig, SiteConfig
from jaxroute.training.export import export_router

pytestmark = pytest.mark.slow

pytest.importorskip("flatbuffers")

# Few seats, little memory: queues fill up, requests are turned away and preempted. Without a network delay, what the
# environment shows at a decision is what has come back to the gateway.
SMALL = [
    f"site.experts.{expert}.{name}={value}"
    for expert in range(3)
    for name, value in (("max_num_seqs", 4), ("max_waiting", 2), ("kv_capacity", 2500), ("network_delay", 0.0))
]
OPTIONS = ["site=edge3", "workload.rate=5", "bank.num_prompts=200", "network.hidden=8", *SMALL]
# One program for all: without outages they are a thousand years apart.
CALM = ["dynamics.outages=retried", "dynamics.mean_uptime=3e10"]
FAILING = ["dynamics.outages=retried", "dynamics.mean_uptime=10", "dynamics.mean_downtime=3"]
EPISODES, REQUESTS = 2, 250
# Few places, slow answers, and some requests that may not go there.
WITH_CLOUD = [
    "site.cloud={model: gemma-2-27b-it, ttft: 0.4, tpot: 0.02, price_per_request: 0.05, price_per_1000_tokens: 0.1, "
    "slow_share: 0.2, max_in_flight: 3}",
    "workload.local_only=0.3",
]


def write_run(run, seed, options=OPTIONS):
    """What a training would have written, of a network that has opinions of its own."""
    config = load_config(options)
    env, params = build_env(config)
    network = build_network(config.network, config.env.away)
    shapes = jax.eval_shape(
        lambda key: network.init(key, network.prepare(env.reset(key, params)[0])), jax.random.key(0)
    )
    rng = np.random.default_rng(seed)
    weights = jax.tree.map(lambda leaf: np.asarray(rng.standard_normal(leaf.shape), np.float32), shapes)
    weights["params"]["log_trust"] = np.float32(2.0)
    run.mkdir()
    write_config(run, config)
    save_params(run, 7, weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, seed=2)
    return run


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "router"
    export_router(run, folder)
    return folder


@pytest.fixture(scope="module")
def with_cloud(run):
    """The same network, where requests may go to a cloud."""
    folder = run.parent / "with_cloud"
    export_router(run, folder, overrides=WITH_CLOUD)
    return folder


def played(run, exported, told, options=CALM):
    env, params = build_env(load_config([*OPTIONS, *options]))
    routers = None if told is None else [Router.load(exported) for _ in range(EPISODES)]
    return play(env, params, load_policy(run, env, params), routers, told or "", episodes=EPISODES, requests=REQUESTS)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """Other weights, by which experts are often nearly equal: run, export, and the policy's average QoS."""
    folder = tmp_path_factory.mktemp("undecided")
    write_run(folder / "run", seed=33)
    export_router(folder / "run", folder / "router")
    return folder / "run", folder / "router", np.nanmean(played(folder / "run", None, None).qos)


# --- It decides as the policy does -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [CALM, FAILING, [*CALM, *WITH_CLOUD]], ids=["calm", "failing", "cloud"])
def test_told_everything_it_decides_as_the_policy_in_the_environment(run, exported, with_cloud, options):
    episodes = played(run, with_cloud if WITH_CLOUD[0] in options else exported, EVERYTHING, options)
    counts = episodes.counts
    # Retries take decisions of their own.
    assert (counts.sum() > EPISODES * REQUESTS) == episodes.again[counts].any() == (options is FAILING)
    # All three experts, and away.
    assert (np.bincount(episodes.chosen[counts], minlength=4) > 10).all()
    eligible = episodes.policy_logits > -1e8
    assert (eligible.sum(-1)[counts] < 4).mean() > 0.02
    np.testing.assert_array_equal((episodes.logits > -1e8)[counts], eligible[counts])
    difference = np.abs(np.where(eligible, episodes.logits - episodes.policy_logits, 0)).max(-1)
    assert difference[counts].max() < 1e-4  # sums come in another order
    best, second = np.sort(np.where(eligible, episodes.policy_logits, -1e9))[..., [-1, -2]].T
    sure = counts & ((best - second).T > 1e-3)
    assert sure[counts].mean() > 0.99
    np.testing.assert_array_equal(episodes.chosen[sure], episodes.preferred[sure])


def test_a_run_that_must_not_send_away(tmp_path):
    """Its export has no such action, and no cloud, whatever the site says."""
    write_run(tmp_path / "run", seed=2, options=[*OPTIONS, "env.away=false"])
    manifest = export_router(tmp_path / "run", tmp_path / "router", overrides=WITH_CLOUD)
    assert manifest["away"] is False
    router = Router.load(tmp_path / "router")
    chosen = [arrive(router, number, 0.01 * number, predictions=3) for number in range(40)]
    assert set(chosen) <= {0, 1, 2}
    assert router.logits.shape == (3,)
    assert router.reason == f"expert {chosen[-1]} scores {router.logits.max():.2f}, the best"
    with pytest.raises(UserError, match="cloud_price=1 is given, and the exported site has no cloud"):
        arrive(router, "a", 1.0, predictions=3, cloud_price=1)


@pytest.mark.parametrize("told", [STREAMING, ENDS])
def test_told_little_it_still_decides_nearly_as_well(undecided, told):
    run, exported, policy_qos = undecided
    episodes = played(run, exported, told)
    assert 0.9 < (episodes.chosen == episodes.preferred)[episodes.counts].mean() < 1
    assert np.nanmean(episodes.qos) == pytest.approx(policy_qos, abs=0.05)


# --- What it keeps, and infers ------------------------------------------------------------------------------

# One decode iteration: 2 ms + max(10 ms, .1 ms b) + 1 ms b + .01 ms per context token.
EXPERT = ExpertConfig(
    model="m", accelerator="a", iteration_overhead=0.002, weight_load=0.010, compute_per_token=1e-4,
    decode_per_seq=0.001, attention_per_token=1e-5, max_num_seqs=2, max_num_batched_tokens=512, max_waiting=3,
    kv_capacity=1000, network_delay=0.004,
)  # fmt: skip


CLOUD_CONFIG = CloudConfig(
    model="m", ttft=0.5, tpot=0.02, price_per_request=0.05, price_per_1000_tokens=0.1, max_in_flight=2
)


class Recorder:
    """Stands for the exported function: keeps what it is given, and chooses what it is told to."""

    def __init__(self):
        self.choice, self.net = 0, 0.25
        self.logits = [3.0, 1.0]

    def __call__(self, batch, experts, arrival):
        self.batch = SimpleNamespace(**dict(zip(FIELDS["batch"], batch.copy(), strict=True)))
        self.experts = dict(zip(FIELDS["experts"], experts.copy(), strict=True))
        self.arrival = dict(zip(FIELDS["arrival"], arrival.tolist(), strict=True))
        return np.int32(self.choice), np.float32(self.logits), np.float32(self.net)


@pytest.fixture
def seen():
    return Recorder()


@pytest.fixture
def router(seen):
    return Router(SiteConfig("s", [EXPERT, EXPERT]), [0.5, 0.5], 5, 2.0, seen)


@pytest.fixture
def away(seen):
    """One that may send away, to a cloud with two places."""
    seen.logits = [3.0, 1.0, 2.5]
    site = SiteConfig("s", [EXPERT, EXPERT], cloud=CLOUD_CONFIG)
    return Router(site, [0.5, 0.5], 5, 2.0, seen, prices=Prices(0.02, 1.0), away=True)


def arrive(router, request_id, now, prompt_tokens=100, predictions=2, **options):
    quality, length = [0.25, 0.5, 0.75, 1.0][:predictions], [40, 80, 120, 160][:predictions]
    given = {"predicted_quality": quality, "predicted_output_tokens": length}
    options = {"normalised": 0.05, **given, **options}
    return router.route(request_id, now=now, prompt_tokens=prompt_tokens, **options)


def look(router, seen, now):
    """What the router knows of expert 0 at `now`, by way of a request that is taken back."""
    arrive(router, "look", now)
    router.rejected("look")
    return at_expert(seen, 0)


def at_expert(seen, expert):
    """The slots of an expert, by field."""
    return SimpleNamespace(**{name: column[:, expert].tolist() for name, column in vars(seen.batch).items()})


def test_a_request_is_where_it_was_sent(router, seen):
    seen.choice = 1
    assert arrive(router, "a", 0.0, normalised=None, ttft=0.25, e2e=8) == 1
    assert [seen.arrival[name] for name in LIMIT_FIELDS] == [0.25, math.inf, 8, math.inf]
    arrive(router, "b", 1.5)
    assert [seen.arrival[name] for name in LIMIT_FIELDS[:3]] == [math.inf] * 3
    first, batch = at_expert(seen, 0), at_expert(seen, 1)
    assert (first.running[0], first.waiting[0], batch.running[0], batch.waiting[0]) == (0, 0, 1, 0)
    assert (batch.prompt_tokens[0], batch.age[0]) == (100, 1.5)
    assert [getattr(batch, name)[0] for name in LIMIT_FIELDS] == [0.25, math.inf, 8, math.inf]
    assert (batch.predicted_quality[0], batch.predicted_output_tokens[0]) == (0.5, 80)


def test_first_come_first_served_into_seats(router, seen):
    for number, now in enumerate((0.0, 0.01, 0.02, 0.03)):
        arrive(router, number, now)
    assert look(router, seen, 0.05).running == [1, 1, 0, 0, 0]
    router.finished(1, now=0.06, output_tokens=1)
    batch = look(router, seen, 0.07)
    assert (batch.running, batch.waiting) == ([1, 1, 0, 0, 0], [0, 0, 1, 0, 0])
    assert [round(age, 3) for age in batch.age[:3]] == [0.07, 0.05, 0.04]
    router.failed(0)
    assert look(router, seen, 0.08).running == [1, 1, 0, 0, 0]
    assert look(router, seen, 0.09).waiting == [0] * 5


def test_memory_bounds_the_batch(router, seen):
    arrive(router, "a", 0.0, prompt_tokens=600)
    arrive(router, "b", 0.0, prompt_tokens=500)
    arrive(router, "c", 0.0, prompt_tokens=10)  # would fit, but is behind
    assert look(router, seen, 1.0).running == [1, 0, 0, 0, 0]


def test_the_first_token_is_as_late_as_it_came(router, seen):
    for number in range(3):
        arrive(router, number, 0.25 * number)
    router.first_token(0, now=0.75)
    router.first_token(1, now=1.0)
    batch = look(router, seen, 1.5)
    assert batch.first_token[:2] == [0.75, 0.75]
    # The third still waits for a seat. As others leave, each keeps its own.
    assert (batch.first_token[2], batch.generated[2]) == (0, 0)
    router.finished(0, now=1.5, output_tokens=30)
    assert look(router, seen, 1.5).first_token[:2] == [0.75, 0]
    # It has a token already, sooner than expected, and 4 ms to go.
    router.progress(2, now=1.5, generated=1, running=True)
    assert look(router, seen, 1.5).first_token[1] == pytest.approx(1.004)
    # Given back by an expert that fails, a request starts anew, and is as old as it is.
    router.expert_down(0)
    router.expert_up(0)
    arrive(router, 1, 2.0, arrived=0.25)
    router.first_token(1, now=2.25)
    assert look(router, seen, 2.5).first_token[0] == 2.0


def test_on_the_network_a_request_waits(router, seen):
    arrive(router, "a", 0.0)
    assert look(router, seen, 0.0039).waiting[0]
    assert look(router, seen, 0.0041).running[0]


def test_tokens_come_at_the_pace_of_the_batch(router, seen):
    arrive(router, "a", 0.0)
    arrive(router, "b", 0.0)
    router.progress("b", now=0.0, generated=0, running=False)
    router.first_token("a", now=0.1)
    batch = look(router, seen, 0.1)
    assert (batch.generated[:2], batch.computed[:2]) == ([1, 0], [100, 0])
    # Alone: 12 + 1 + 101 * .01 = 14 ms, of which 4 ms, the way of the first token, have passed already.
    assert look(router, seen, 0.1 + 8.9 * 0.01401 - 0.004).generated[0] == 9
    assert look(router, seen, 0.1 + 9.1 * 0.01401 - 0.004).generated[0] == 10
    router.first_token("b", now=0.3)
    before = look(router, seen, 0.3)
    # Two of them: 12 + 2 + (200 + generated) * .01 ms.
    pace = 0.014 + 1e-5 * (200 + before.generated[0] + 1)
    after = look(router, seen, 0.3 + 20 * pace)
    assert after.generated[0] - before.generated[0] == pytest.approx(20, abs=1)
    assert after.generated[1] == pytest.approx(21, abs=1)
    assert after.computed[:2] == [99 + generated for generated in after.generated[:2]]


def test_without_word_of_a_first_token_it_is_expected(router, seen):
    arrive(router, "a", 0.0, prompt_tokens=500)
    look(router, seen, 0.01)
    # From .004 on: one and a half iterations of 12 ms, and 40 ms that 500 tokens take longer.
    assert look(router, seen, 0.061).generated[0] == 0
    batch = look(router, seen, 0.063)
    assert (batch.generated[0], batch.computed[0]) == (1, 500)
    assert batch.first_token[0] == pytest.approx(0.062 + 0.004)
    assert look(router, seen, 0.2).generated[0] > 5


def test_what_is_told_is_believed(router, seen):
    for number in range(3):
        arrive(router, number, 0.0)
    router.progress(0, now=1.0, generated=7, running=False)
    router.progress(1, now=1.0, generated=3)
    router.progress(2, now=1.0, generated=0, kv_tokens=60, running=True)
    batch = look(router, seen, 1.0)
    assert batch.running == [0, 1, 1, 0, 0]
    assert (batch.generated[:3], batch.computed[:3]) == ([7, 3, 0], [0, 102, 60])
    # It is preempted until there is word of it.
    assert look(router, seen, 3.0).waiting == [1, 0, 0, 0, 0]
    router.progress(0, now=3.0, generated=7, running=True)
    assert look(router, seen, 3.0).computed[0] == 106


def test_recent_latency_and_rate_are_those_of_the_environment(router, seen):
    arrive(router, "a", 10.0)
    assert seen.arrival["gap"] == seen.arrival["slow_gap"] == 0.5
    arrive(router, "b", 10.2)
    assert seen.arrival["gap"] == pytest.approx(0.5 - 0.3 / 32)
    assert seen.arrival["slow_gap"] == pytest.approx(0.5 - 0.3 / 512)
    router.finished("a", now=11.0, output_tokens=20)
    arrive(router, "c", 12.2)
    assert seen.arrival["gap"] == pytest.approx((0.5 - 0.3 / 32) * 31 / 32 + 2 / 32)
    assert seen.arrival["slow_gap"] == pytest.approx((0.5 - 0.3 / 512) * 511 / 512 + 2 / 512)
    np.testing.assert_allclose(seen.experts["recent_latency"], [0.05, 0], rtol=1e-6)
    router.finished("b", now=42.2, output_tokens=100)
    arrive(router, "d", 72.2)
    # 60 s later the first one counts 1/e, while the second, like any since the last arrival, counts in full.
    mean = (0.05 / np.e + 0.32) / (1 / np.e + 1)
    np.testing.assert_allclose(seen.experts["recent_latency"], [mean, 0], rtol=1e-6)


def test_net_values_and_the_latest_gap_are_remembered(router, seen):
    arrive(router, "a", 10.0)
    assert [seen.arrival[name] for name in ("net", "net_square", "latest_gap")] == [0, 0, 0]
    seen.net = -0.5
    arrive(router, "b", 10.5)
    # What the decision before offered at best, 0.25, counts a 32nd.
    assert seen.arrival["net"] == pytest.approx(0.25 / 32)
    assert seen.arrival["net_square"] == pytest.approx(0.25**2 / 32)
    assert seen.arrival["latest_gap"] == 0.5
    arrive(router, "c", 12.0)
    assert seen.arrival["net"] == pytest.approx(0.25 / 32 * 31 / 32 - 0.5 / 32)
    assert seen.arrival["net_square"] == pytest.approx(0.25**2 / 32 * 31 / 32 + 0.25 / 32)
    assert seen.arrival["latest_gap"] == 1.5


def test_prices_are_the_configured_ones_unless_given(away, seen):
    def prices():
        return [round(seen.arrival[name], 6) for name in ("accelerator_price", "cloud_price")]

    arrive(away, "a", 0.0, predictions=3)
    assert prices() == [0.02, 1.0]
    arrive(away, "b", 0.0, predictions=3, accelerator_price=0.5, cloud_price=0)
    assert prices() == [0.5, 0.0]
    arrive(away, "c", 0.0, predictions=3)
    assert prices() == [0.02, 1.0]


def test_what_is_below_the_quality_floor_is_predicted_to_be_nothing(away, seen):
    arrive(away, "a", 0.0, predictions=3, quality_floor=0.5)
    np.testing.assert_array_equal(seen.experts["predicted_quality"], [0, 0.5])
    assert seen.arrival["cloud_predicted_quality"] == 0.75
    arrive(away, "b", 0.0, predictions=3, quality_floor=0.8)
    np.testing.assert_array_equal(seen.experts["predicted_quality"], [0, 0])
    assert seen.arrival["cloud_predicted_quality"] == 0


def test_what_is_declined_is_nowhere(away, seen):
    assert away.reason == "no decision yet"
    seen.choice = 2
    assert arrive(away, "a", 0.0, predictions=3, local_only=True) == DECLINED
    assert seen.arrival["to_cloud"] == 0
    assert away.reason == "declined: away scores 2.50, and expert 0 scores 3.00, the best expert"
    with pytest.raises(UserError, match="'a' is at no expert; it has ended, was sent away, or was never routed"):
        away.finished("a", now=1.0, output_tokens=5)
    seen.choice = 0
    assert arrive(away, "a", 1.0, predictions=3) == 0
    assert seen.batch.waiting.sum() == seen.batch.running.sum() == 0
    assert away.reason == "expert 0 scores 3.00, and away scores 2.50"


def test_whoever_may_not_go_away_goes_to_the_best_expert(away, seen):
    seen.choice, seen.logits = 2, [-1e9, 1.0, 2.5]
    assert arrive(away, "a", 0.0, predictions=3, may_go_away=False) == 1
    words = "expert 1 scores 1.00, the best expert; away scores 2.50, but the request must go to an expert"
    assert away.reason == words
    assert arrive(away, "b", 0.0, predictions=3) == CLOUD
    assert away.reason == "to the cloud: away scores 2.50, and expert 1 scores 1.00, the best expert"


def test_the_cloud_has_so_many_places(away, seen):
    seen.choice = 2
    assert [arrive(away, number, 0.0, predictions=3) for number in range(3)] == [CLOUD, CLOUD, DECLINED]
    assert seen.arrival["to_cloud"] == 0
    with pytest.raises(UserError, match="request 0 is in the cloud already; report its end first"):
        arrive(away, 0, 0.5, predictions=3)
    away.first_token(0, now=1.0)
    for number, end in enumerate(
        (
            lambda: away.finished(0, now=2.0, output_tokens=9),
            lambda: away.failed(1),
            lambda: away.rejected(3),
        )
    ):
        assert arrive(away, "full", 2.0, predictions=3) == DECLINED
        end()
        assert arrive(away, number + 3, 2.0, predictions=3) == CLOUD
        told = [seen.arrival[name] for name in ("to_cloud", "cloud_predicted_quality", "cloud_predicted_output_tokens")]
        assert told == [1, 0.75, 120]
    # Nothing of it is at an expert, or counts among their latencies.
    assert seen.batch.waiting.sum() == seen.batch.running.sum() == 0
    assert (seen.experts["recent_latency"] == 0).all()
    np.testing.assert_array_equal(seen.experts["predicted_quality"], [0.25, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_price": -0.1}, "request 'b': accelerator_price=-0.1 must not be negative, and finite"),
        ({"accelerator_price": float("nan")}, "accelerator_price=nan must not be negative, and finite"),
        ({"cloud_price": float("inf")}, "cloud_price=inf must not be negative, and finite"),
        ({"cloud_price": "dear"}, "cloud_price is 'dear'; give a number"),
        ({"quality_floor": 1.5}, "quality_floor=1.5 must lie between 0 and 1"),
        ({"may_go_away": None}, "may_go_away=None must be True or False"),
        ({"local_only": 1}, "local_only=1 must be True or False"),
        ({"predictions": 2}, "give a value for each of the 2 experts, and one more for the cloud"),
        ({"predictions": 4}, "give a value for each of the 2 experts, and one more for the cloud"),
    ],
    ids=str,
)
def test_mistakes_about_away_change_nothing(away, seen, options, message):
    arrive(away, "a", 1.0, predictions=3)
    with pytest.raises(UserError, match=message) as caught:
        arrive(away, "b", 2.0, **{"predictions": 3} | options)
    assert "\n" not in str(caught.value)
    arrive(away, "b", 2.0, predictions=3)
    assert seen.arrival["latest_gap"] == 1.0


def test_an_expert_that_fails_gives_its_requests_back(router, seen):
    arrive(router, "a", 0.0)
    arrive(router, "b", 0.1)
    gap = seen.arrival["gap"]
    assert router.expert_down(0) == ["a", "b"]
    seen.choice = 1
    arrive(router, "a", 0.3, arrived=0.0)
    assert seen.experts["up"].tolist() == [0, 1]
    assert seen.arrival["age"] == pytest.approx(0.3)
    assert seen.arrival["gap"] == gap
    assert seen.arrival["latest_gap"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="'b' is at no expert"):
        router.finished("b", now=0.4, output_tokens=1)
    router.expert_up(0)
    assert look(router, seen, 0.5).waiting == [0] * 5
    assert seen.experts["up"].tolist() == [1, 1]
    assert seen.batch.age[0, 1] == pytest.approx(0.5)
    assert router.expert_down(0) == []


def test_more_requests_than_the_site_lets_in(router, seen):
    for number in range(12):
        arrive(router, number, 0.0)
    assert seen.batch.running.shape == (5, 2)
    batch = look(router, seen, 0.01)
    assert (batch.running, batch.waiting) == ([1, 1, 0, 0, 0], [0, 0, 1, 1, 1])
    for number in range(9):
        router.failed(number)
    assert look(router, seen, 0.02).running == [1, 1, 0, 0, 0]
    assert look(router, seen, 0.02).waiting == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda router: arrive(router, "a", 2.0), "'a' is at expert 0 already"),
        (lambda router: arrive(router, "b", 0.5), r"the clock goes back: now=0.5 comes after now=1.0"),
        (lambda router: arrive(router, "b", float("nan")), "the clock goes back"),
        (
            lambda router: arrive(router, "b", 2.0, prompt_tokens=0),
            "prompt_tokens=0 must be a whole number, at least 1",
        ),
        (
            lambda router: arrive(router, "b", 2.0, normalised=None),
            "request 'b': it limits nothing; give one of ttft, tpot, e2e, normalised, in s",
        ),
        (lambda router: arrive(router, "b", 2.0, normalised=0), "request 'b': normalised=0 must be above 0 s, and fin"),
        (lambda router: arrive(router, "b", 2.0, ttft=-1), "ttft=-1 must be above 0 s, and finite"),
        (lambda router: arrive(router, "b", 2.0, tpot=math.nan), "tpot=nan must be above 0 s, and finite"),
        (lambda router: arrive(router, "b", 2.0, e2e=math.inf), "e2e=inf must be above 0 s, and finite"),
        (lambda router: arrive(router, "b", 2.0, arrived=3.0), "arrived=3.0 must not be later than now=2.0"),
        (lambda router: arrive(router, "b", 2.0, predicted_quality=[0.5]), "give a value for each of the 2 experts"),
        (lambda router: arrive(router, "b", 2.0, predicted_quality=None), "give a value for each of the 2 experts"),
        (lambda router: arrive(router, "b", 2.0, predicted_quality=[0.5, 1.5]), "must lie from 0 to 1"),
        (lambda router: arrive(router, "b", 2.0, predicted_output_tokens=[0, float("nan")]), "be above 0"),
        (lambda router: arrive(router, "b", 2.0, prompt="text"), "no predictor"),
        (lambda router: router.rejected("b"), "'b' is at no expert"),
        (lambda router: router.failed("b"), "'b' is at no expert"),
        (lambda router: router.first_token("b", now=2.0), "'b' is at no expert"),
        (lambda router: router.first_token("a", now=0.0), "the clock goes back"),
        (lambda router: router.finished("a", now=0.0, output_tokens=1), "the clock goes back"),
        (
            lambda router: router.finished("a", now=2.0, output_tokens=0),
            "output_tokens=0 must be a whole number, at least 1",
        ),
        (lambda router: router.progress("a", now=2.0, generated=-1), "generated=-1 must be a whole number, at least 0"),
        (lambda router: router.expert_down(2), "expert 2 is unknown; experts are numbered from 0 to 1"),
        (lambda router: router.expert_up("m"), "expert 'm' is unknown"),
    ],
)
def test_mistakes_are_named_and_change_nothing(router, seen, mistake, message):
    arrive(router, "a", 1.0)
    before = router._belief._held.copy()
    with pytest.raises(UserError, match=message) as caught:
        mistake(router)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(router._belief._held, before)
    batch = look(router, seen, 1.0)
    assert (batch.waiting, batch.age[0]) == ([1, 0, 0, 0, 0], 0)


# --- The artefact --------------------------------------------------------------------------------------------


def test_the_folder_says_what_it_is(run, exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    config = load_config(OPTIONS)
    assert manifest["site"] == dataclasses.asdict(config.site)
    assert manifest["network"] == dataclasses.asdict(config.network)
    assert (manifest["slots"], manifest["rate"], manifest["checkpoint"]) == (6, 5.0, "run, 7 steps")
    assert (manifest["away"], manifest["prices"]) == (True, {"accelerator": 0.02, "cloud": 1.0})
    assert manifest["platforms"] == ["cpu", "cuda"]
    assert manifest["requirements"] == [dataclasses.asdict(limited) for limited in config.workload.requirements]
    bank = build_env(config)[1].bank
    np.testing.assert_allclose(manifest["log_length_error"], bank.log_length_error)
    assert b".py" not in (exported / "decide.jax_export").read_bytes()
    assert {path.name for path in exported.iterdir()} == {"manifest.json", *manifest["files"]}
    assert Router.load(exported).experts == [expert.label for expert in config.site.experts]


def test_gauges_tell_of_requests_that_came_past_it(router, seen):
    arrive(router, "a", 1.0)
    assert seen.arrival["gauge_age"] == UNREAD
    assert seen.experts["others_running"].tolist() == [0, 0]
    router.gauges(0, now=1.5, running=4, waiting=3, kv_tokens=900)
    held = 900 - router.loads.kv_tokens[0]
    router.gauges(1, now=2.0, running=1, waiting=0)
    arrive(router, "b", 3.0, prompt_tokens=132)
    # One of those in the batch is its own.
    assert seen.experts["others_running"].tolist() == [3, 1]
    assert seen.experts["others_waiting"].tolist() == [3, 0]
    assert seen.experts["others_kv_tokens"].tolist() == pytest.approx([held, 100 + 80 / 2])
    assert seen.arrival["gauge_age"] == 1.5
    # Means over 32 requests.
    assert seen.arrival["typical_prompt_tokens"] == 101
    assert seen.arrival["typical_normalised_per_second"] == pytest.approx(20)
    assert seen.arrival["typical_ttft_per_second"] == 0
    assert seen.experts["typical_quality"].tolist() == [0.25, 0.5]
    # Fewer than its own: what has just been sent is not there yet.
    router.gauges(0, now=3.0, running=0, waiting=0)
    arrive(router, "c", 3.0)
    assert seen.experts["others_running"].tolist() == [0, 1]
    # It ended after the figures had been asked for, and may be among them.
    router.finished("c", now=4.0, output_tokens=40)
    router.gauges(0, now=4.5, asked=3.5, running=3, waiting=0)
    arrive(router, "d", 5.0)
    assert seen.experts["others_running"].tolist() == [0, 1]
    router.gauges(0, now=5.0, running=4, waiting=0)
    arrive(router, "e", 5.0)
    assert seen.experts["others_running"].tolist() == [1, 1]
    for mistake, message in (
        ({"expert": 2, "running": 0, "waiting": 0}, "expert 2 is unknown"),
        ({"expert": 0, "running": -1, "waiting": 0}, "running"),
        ({"expert": 0, "running": 0, "waiting": 0, "kv_tokens": math.nan}, "kv_tokens=nan"),
    ):
        with pytest.raises(UserError, match=message):
            router.gauges(**{"now": 5.0} | mistake)


def test_the_same_network_for_another_site(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "router"), "site=edge6", "bank.seed=1"]) == 0
    assert "6 experts of site edge6, 16 requests each" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "router" / "manifest.json").read_text())
    assert len(manifest["log_length_error"]) == 6
    shapes = [aval.shape for aval in jax.export.deserialize(
        bytearray((tmp_path / "router" / "decide.jax_export").read_bytes())
    ).in_avals]  # fmt: skip
    assert shapes == [
        (len(fields), *rest) for fields, rest in zip(FIELDS.values(), [(6,), (16, 6), (6,), ()], strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{exported}"], "exists already"),
        (["network.hidden=4"], "network.hidden=4 does not change an export"),
        (["site=nowhere"], "unknown site nowhere"),
        (["bank=zeroeval", "data_dir=/nowhere"], "/nowhere"),
        (["--predictor", "{tmp}", "--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=str,
)
def test_an_export_that_fails_leaves_nothing(run, exported, tmp_path, capsys, options, message):
    options = [option.format(exported=exported, tmp=tmp_path) for option in options]
    assert main([str(run), "--out", str(tmp_path / "router"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_needed(tmp_path, capsys):
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "router")]) == 2
    assert f"error: run {tmp_path / 'run'} does not exist" in capsys.readouterr().err


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not an exported router's"),
        (lambda folder: edit(folder, format_version=2), "format 2, and this jaxroute reads format 4; export it again"),
        (lambda folder: edit(folder, prices={"accelerator": 0.02}), "is damaged"),
        (lambda folder: edit(folder, files={}), "is damaged"),
        (lambda folder: edit(folder, site={"name": "s"}), "is damaged"),
        (lambda folder: edit(folder, slots=7), "is damaged"),
        (lambda folder: (folder / "decide.jax_export").unlink(), r"decide\.jax_export is missing or damaged"),
        (lambda folder: (folder / "decide.jax_export").write_bytes(b"x"), r"decide\.jax_export is missing or damaged"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused(exported, tmp_path, damage, message):
    folder = tmp_path / "router"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Router.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_an_export_that_this_jax_cannot_read(exported, tmp_path, monkeypatch):
    def refuse(blob):
        raise ValueError("too old")

    monkeypatch.setattr(jax.export, "deserialize", refuse)
    with pytest.raises(UserError, match=r"exported by jax \S+, which jax \S+ cannot read"):
        Router.load(exported)


def test_a_platform_that_is_not_there(exported):
    with pytest.raises(UserError, match="platform=tpu is unknown; choose cpu or cuda"):
        Router.load(exported, platform="tpu")
    if "cuda" not in {device.platform for device in jax.devices()}:
        with pytest.raises(UserError, match="finds no such device"):
            Router.load(exported, platform="cuda")


# --- Predictions from text ----------------------------------------------------------------------------------


@pytest.fixture
def predictor(tmp_path):
    """A predictor of three LLMs in an order of its own, fitted to nothing."""
    predictors = pytest.importorskip("jaxroute.predictors.predictor")
    features = pytest.importorskip("jaxroute.predictors.features")
    counts = features.count(PROMPTS)
    scale = features.fit_features(counts, seed=0)
    encoded = scale.encode(counts)
    rng = np.random.default_rng(0)
    shapes = ((encoded.grams.shape[1], 6), (encoded.dense.shape[1], 6), 6)
    weights = predictors.Weights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    models = ("gemma-2-27b-it", "gemma-2-2b-it", "Qwen2-7B-Instruct")
    predictor = predictors.Predictor(models, np.array([0.3, 0.1, 0.2]), scale, weights)
    predictor.save(tmp_path / "predictor")
    return predictor


PROMPTS = ["Is 91 prime?", "Prove that there are infinitely many primes.", "Is 97 prime, and why?"]


def test_predictions_from_the_prompt(run, predictor, tmp_path):
    folder, stored = tmp_path / "router", tmp_path / "predictor"
    with pytest.raises(UserError, match=r"does not know Meta-Llama-3\.1-8B-Instruct, only gemma-2-27b-it, "):
        export_router(run, folder, predictor=stored)
    assert not folder.exists()
    stand_in = "bank.models={Meta-Llama-3.1-8B-Instruct: Qwen2-7B-Instruct}"
    manifest = export_router(run, folder, predictor=stored, overrides=[stand_in])
    assert manifest["predictor"] == ["gemma-2-2b-it", "Qwen2-7B-Instruct", "gemma-2-27b-it"]
    assert manifest["log_length_error"] == [0.1, 0.2, 0.3]
    shutil.rmtree(stored)

    told, predicting = Router.load(folder), Router.load(folder)
    common = {"prompt_tokens": 50, "normalised": 0.03}
    order = [1, 2, 0]
    for number, prompt in enumerate(PROMPTS):
        quality, length = predictor([prompt])
        given = {"predicted_quality": quality[0, order], "predicted_output_tokens": length[0, order]}
        told.route(number, now=number / 10, **common, **given)
        predicting.route(number, now=number / 10, **common, prompt=prompt)
        np.testing.assert_array_equal(told.logits, predicting.logits)
    with pytest.raises(UserError, match="not both"):
        predicting.route(9, now=1.0, **common, **given, prompt="text")
    (folder / "predictor" / "predictor.npz").write_bytes(b"others")
    with pytest.raises(UserError, match=r"predictor\.npz is missing or damaged"):
        Router.load(folder)

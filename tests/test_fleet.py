"""Fleet files, and the policies that they name: what is wrong with one is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from serving import fleet_options, write_fleet

from jaxroute.commands.fleets import load_fleet, write_emulated_fleet
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.gateway import CLOUD, DECLINED, Router
from jaxroute.gateway.fleet import read_fleet
from jaxroute.gateway.rules import Assessor, Surroundings, rule_named, rule_router, slots_of
from jaxroute.gateway.why import why
from jaxroute.policies import FORMS, RULES
from jaxroute.scenarios import build_env
from jaxroute.serving import CloudConfig, SiteConfig
from jaxroute.training.export import export_router, router_of

pytestmark = pytest.mark.slow

MODELS = ["gemma-2-2b-it", "Meta-Llama-3.1-8B-Instruct", "gemma-2-27b-it"]
URLS = [f"http://10.0.0.{number}:8000/v1" for number in range(3)]


@pytest.fixture(scope="module")
def site():
    return load_config(["site=edge3"]).site


def changed(key, value):
    """Options of a fleet file, with another value somewhere; None leaves it out."""
    options = fleet_options(URLS, MODELS)
    place = options
    *names, last = key.split(".")
    for name in names:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return options


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("experts.0.url", None, "experts.0.url is missing; give it a value"),
        ("experts.1.model", None, "experts.1.model is missing"),
        ("experts.1.url", URLS[0] + "/", "experts.1.url is that of experts.0 too, http://10.0.0.0:8000/v1"),
        ("experts.1.url", "10.0.0.1:8000", "experts.1.url=10.0.0.1:8000 is no address; write for instance http"),
        ("experts.0.metrics", "here", "experts.0.metrics=here is no address"),
        ("experts.0.model", "auto", "experts.0.model is auto, which leaves the choice to the policy"),
        ("experts.0.quality", 1.5, "experts.0.quality=1.5 must be from 0 to 1"),
        ("experts.0.output_tokens", 0, "experts.0.output_tokens=0.0 must be above 0"),
        ("experts.0.output_tokens", "many", "experts.0.output_tokens: Value 'many'"),
        ("experts.0.key_env", "NO_SUCH_KEY", "experts.0.key_env: the environment variable NO_SUCH_KEY is not set"),
        ("experts.0.urll", "x", r"unknown option experts.0.urll \(did you mean experts.0.url\?\)"),
        ("experts", [], "experts is empty; list at least one server"),
        ("experts", "x", "experts is 'x'; give it as name: value"),
        ("classes", [1], "classes.0 is 1; give it as name: value"),
        ("guard.decision_ms", "fast", "guard.decision_ms: Value 'fast'"),
        ("shadow", "llm_d", "shadow: "),
        ("experts", ["x"], "experts.0 is 'x'; give it as name: value"),
        ("polcy", "x", r"unknown option polcy \(did you mean policy\?\)"),
        ("guard.decision_s", 1, r"unknown option guard.decision_s \(did you mean guard.decision_ms\?\)"),
        ("guard.decision_ms", 0, "guard.decision_ms=0.0 must be above 0"),
        ("limits.in_flight", -1, "limits.in_flight=-1 must be above 0"),
        ("limits", 7, "limits is 7; give it as name: value"),
        (
            "classes.standard.tpott",
            1,
            r"unknown option classes.standard.tpott \(did you mean classes.standard.tpot\?\)",
        ),
        ("classes.other.ttft", -0.1, "classes.other.ttft=-0.1 must be above 0 s"),
        ("classes.other.decline", False, "classes.other limits nothing; give one of ttft, tpot, e2e, normalised"),
        ("default_class", "standart", r"default_class=standart is no class \(did you mean standard\?\)"),
        ("listen", "8080", "listen=8080 must be an address and a port"),
        ("keys", ["secret"], "keys.0 is no SHA-256; make one with: printf"),
        ("speed", 0, "speed=0.0 must be above 0"),
        ("rate", -1, "rate=-1.0 must be above 0"),
        ("cloud.url", "http://c/v1", "cloud.model is missing"),
        ("site", None, "site is missing: the rule impact_greedy needs the servers' speed"),
        ("site", "edge33", "unknown site edge33; choose one of edge16, edge3"),
        ("site", "mine.yaml", "site=mine.yaml: .*mine.yaml cannot be read"),
        ("site", "edge6", "experts lists 3 servers, and site edge6 has 6: gemma-2-2b-it, Qwen2-7B-Instruct"),
        ("policy", "impact_greedi", r"policy=impact_greedi is no exported router.*\(did you mean impact_greedy\?\)"),
        ("policy", "impact_greedy+declin", r"the form declin is unknown \(did you mean decline\?\)"),
        ("fallback", "nothing", "fallback: policies: nothing is unknown"),
        ("shadow", ["impact_greedy", "x"], "shadow: policies: x is unknown"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, key, value, message):
    path = write_fleet(tmp_path / "fleet.yaml", changed(key, value))
    with pytest.raises(UserError, match=message) as raised:
        load_fleet(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no fleet file: it lists no experts"),
        ("- a\n- b\n", "is no fleet file"),
        ("experts: [", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("policy: !!python/object/apply:os.system [ls]\n", "line 1: could not determine a constructor"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_fleet_file_is_refused(tmp_path, text, message):
    path = tmp_path / "fleet.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_fleet(path)
    with pytest.raises(UserError, match=r"cannot be read .*; name a fleet file"):
        read_fleet(tmp_path / "missing.yaml")


def test_every_key_of_the_contract_is_understood(tmp_path, monkeypatch):
    """The fleet file of docs/gateway.md."""
    for name in ("LAB_KEY", "CLOUD_KEY"):
        monkeypatch.setenv(name, "sk-1")
    text = (
        "listen: 127.0.0.1:8080\npolicy: impact_greedy+rate_price\nfallback: impact_greedy\n"
        "shadow: [llm_d, shortest_queue]\nexperts:\n"
        '  - {url: "http://10.0.0.1:8000/v1", model: google/gemma-2-9b-it, metrics: "http://10.0.0.1:8000/metrics", '
        "key_env: LAB_KEY, quality: 0.6, output_tokens: 200}\n"
        "site: lab\n"
        "classes: {interactive: {ttft: 0.5, tpot: 0.03, decline: false}, standard: {normalised: 0.08}}\n"
        'cloud: {url: "https://cloud.example/v1", model: large, key_env: CLOUD_KEY, price_per_request: 0.05, '
        "price_per_1k_tokens: 0.02}\n"
        "default_class: standard\nguard: {decision_ms: 5}\n"
        "limits: {in_flight: 2000, body_bytes: 4000000, connect_s: 2, first_byte_s: 120}\n"
        "log: {path: decisions.jsonl, prompts: false, rotate_bytes: 100000000}\n"
    )
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    fleet = read_fleet(path)
    assert fleet.usual_class == "standard"
    assert not fleet.classes["interactive"].decline
    assert fleet.address == ("127.0.0.1", 8080)
    assert not fleet.is_public
    path.write_text(text.replace("127.0.0.1:8080", '"[::]:80"'))
    assert read_fleet(path).is_public


def test_emulated_servers_of_a_changed_site_bring_it_along(tmp_path):
    config = load_config(["site=edge3", "site.experts.1.max_num_seqs=3"])
    _, params = build_env(config)
    path = tmp_path / "fleet.yaml"
    write_emulated_fleet(path, config, params, URLS, 2.0)
    fleet, policies = load_fleet(path)
    assert policies.around.site == config.site
    assert fleet.speed == 2.0
    assert fleet.usual_class == "interactive"
    written = OmegaConf.load(path)
    assert written.site == "fleet-site.yaml"
    np.testing.assert_allclose(policies.around.log_length_error, params.bank.log_length_error, atol=1e-3)


# --- Rules as routers ---------------------------------------------------------------------------------------


def surroundings(site, **more):
    return Surroundings(site, (0.5,) * len(site.experts), slots_of(site), away=True, **more)


def sent(router, number, now, **more):
    options = {"prompt_tokens": 100, "normalised": 0.05, "predicted_quality": [0.3, 0.6, 0.7]}
    options["predicted_output_tokens"] = [100.0] * len(options["predicted_quality"])
    return router.route(number, now=now, **(options | more))


def test_every_rule_runs_on_the_gateway_and_decides_as_in_the_environment(site):
    """One observation, one decision: the rule's own, compiled here, with or without any form."""
    around = surroundings(site)
    rules = [rule_named(name, away=True) for name in (*RULES, *(f"impact_greedy+{form}" for form in FORMS))]
    assessor = Assessor(around, [rule.name for rule in rules])
    router = rule_router(rule_named("least_kv", away=True), around, rate=2.0)
    chosen = set()
    for number in range(30):
        sent(router, number, number * 0.01)
        shadows = assessor(router.seen).shadows
        assert shadows.keys() == {rule.name for rule in rules}
        assert all(0 <= action <= 3 for action in shadows.values())
        # Those that need no memory and do not draw, from what the assessment says.
        expected = assessor(router.seen).expected
        eligible = np.array(expected["eligible"]) > 0
        in_flight = np.array(expected["running"]) + np.array(expected["waiting"])
        net = np.array(expected["qos"]) - np.array(expected["qos_loss"])
        assert shadows["shortest_queue"] == np.where(eligible, in_flight, np.inf).argmin()
        assert net[shadows["impact_greedy"]] == pytest.approx(net[eligible].max(), abs=2e-3)
        chosen.add(shadows["impact_greedy+decline"])
    # The site fills up, so that some are declined.
    assert 3 in chosen


def test_a_rule_remembers_what_it_has_done(site):
    router = rule_router(rule_named("round_robin", away=True), surroundings(site), rate=1.0)
    assert [sent(router, number, number * 0.1) for number in range(5)] == [0, 1, 2, 0, 1]


def test_a_form_declines_unless_the_request_must_stay(site):
    router = rule_router(rule_named("quality_only+decline", away=True), surroundings(site), rate=1.0)
    worthless = {"predicted_quality": [0.01, 0.02, 0.03]}
    assert sent(router, 1, 0.0, **worthless) == DECLINED
    # It stays where the rule would have sent it.
    assert sent(router, 1, 0.0, may_go_away=False, **worthless) == 2
    assert np.argmax(router.logits) == 3


def test_a_rule_sends_away_to_the_cloud(site):
    cloud = CloudConfig("far", 0.1, 0.001, price_per_request=0.01, price_per_1000_tokens=0.01, max_in_flight=1)
    router = rule_router(
        rule_named("impact_greedy+price", away=True), surroundings(SiteConfig(site.name, site.experts, cloud)), rate=1.0
    )
    better = {"predicted_quality": [0.1, 0.1, 0.1, 0.9], "predicted_output_tokens": [100.0] * 4}
    assert sent(router, 1, 0.0, **better) == CLOUD
    assert sent(router, 2, 0.1, **better) != CLOUD  # its only place is taken
    router.finished(1, now=1.0, output_tokens=9)
    assert sent(router, 3, 1.0, local_only=True, **better) != CLOUD
    assert sent(router, 4, 1.0, **better) == CLOUD


def test_among_leaves_the_choice_to_some(site):
    router = rule_router(rule_named("quality_only", away=True), surroundings(site), rate=1.0)
    assert [sent(router, n, 0.1 * n, among=among) for n, among in enumerate([[0], [0, 1], [2, 0], None])] == [
        0,
        1,
        2,
        2,
    ]
    for among, message in (([], "among is empty"), ([3], "expert 3 is unknown")):
        with pytest.raises(UserError, match=message):
            sent(router, 9, 1.0, among=among)


def test_a_router_takes_over_from_another_of_the_same_site(site):
    around = surroundings(site)
    old = rule_router(rule_named("quality_only", away=True), around, rate=1.0)
    for number in range(3):
        sent(old, number, 0.1 * number)
    old.expert_down(0)
    new = rule_router(rule_named("shortest_queue", away=True), around, rate=9.0)
    new.take_over(old)
    assert (new.loads.running + new.loads.waiting).tolist() == [0, 0, 3]
    assert new.up.tolist() == [False, True, True]
    assert sent(new, 9, 1.0) == 1
    # Either is told of the ends of those that it has sent.
    old.finished(1, now=2.0, output_tokens=5)
    new.finished(2, now=2.0, output_tokens=5)
    assert (new.loads.running + new.loads.waiting).tolist() == [0, 1, 1]
    other = rule_router(rule_named("random", away=True), surroundings(load_config(["site=edge6"]).site), rate=1.0)
    with pytest.raises(UserError, match="of the same site"):
        other.take_over(new)


def test_a_rule_with_a_form_needs_an_away():
    with pytest.raises(UserError, match=r"policy random\+decline sends requests away"):
        rule_named("random+decline", away=False)


def test_rules_on_the_gateway_load_no_flax():
    program = "import sys; import jaxroute.gateway.rules; print('flax' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False False\n"


def test_a_pretrained_router_decides_in_process_as_it_does_exported(tmp_path):
    run = Path("pretrained/edge6")
    manifest = export_router(run, tmp_path / "router")
    exported = Router.load(tmp_path / "router")
    live, described = router_of(run)
    assert {key: value for key, value in manifest.items() if key != "files"} == described
    assert described["trained"]["experts"] == 6
    assert json.loads((tmp_path / "router/manifest.json").read_text())["trained"] == described["trained"]
    rng = np.random.default_rng(0)
    for number in range(60):
        quality, length = rng.uniform(0, 1, 6), rng.uniform(50, 400, 6)
        request = {"predicted_quality": quality, "predicted_output_tokens": length, "now": 0.05 * number}
        choices = [router.route(number, prompt_tokens=100, normalised=0.03, **request) for router in (exported, live)]
        assert choices[0] == choices[1]
        np.testing.assert_allclose(exported.logits, live.logits, rtol=1e-4, atol=1e-4)


# --- In words -----------------------------------------------------------------------------------------------

EXPECTED = {
    "quality": [0.5, 0.62, 0.7],
    "in_time": [1.0, 0.97, 0.29],
    "qos_loss": [0.0, 0.0, 0.05],
    "qos": [0.5, 0.6, 0.2],
    "eligible": [1, 1, 1],
}
NAMES = ["small", "medium", "large"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {"choice": 1},
            "edge6 chose medium: quality .62, in time with 97 %. "
            "large was better by .08 but would have been late with 71 %.",
        ),
        (
            {"choice": 1, "fallback": "qos_greedy", "guard": "late"},
            "the fallback qos_greedy (late) chose medium: quality .62, in time with 97 %. "
            "large was better by .08 but would have been late with 71 %.",
        ),
        ({"choice": 2}, "edge6 chose large: quality .70, in time with 29 %, and others lose .05."),
        (
            {"choice": 2, "named": "large"},
            "The client named large. quality .70, in time with 29 %, and others lose .05.",
        ),
        (
            {"choice": -1},
            "edge6 declined it: medium offered most: quality .62, in time with 97 %, and others would have lost .00, "
            ".60 in all.",
        ),
        (
            {"choice": -2, "cloud": {"qos": 0.8, "cost": 0.1}},
            "edge6 sent it to the cloud: medium offered most: quality .62, in time with 97 %, and others would have "
            "lost .00, .60 in all. The cloud offered .80 at a cost of .10.",
        ),
        ({"choice": None, "error": "no server is up"}, "No decision was taken: no server is up"),
        ({"choice": 0, "expected": None}, "edge6 chose small. What it expected was not recorded."),
    ],
)
def test_a_decision_in_words(record, text):
    assert why({"policy": "edge6", "expected": EXPECTED, **record}, NAMES) == text


def test_an_expert_that_was_full_or_busy_is_said_to_be():
    expected = EXPECTED | {"eligible": [1, 1, 0], "quality": [0.5, 0.62, 0.7]}
    assert "large was better by .08 but was down or full." in why(
        {"policy": "p", "choice": 1, "expected": expected}, NAMES
    )
    expected = EXPECTED | {"in_time": [1, 1, 1]}
    assert "but others would have lost .05 there." in why({"policy": "p", "choice": 1, "expected": expected}, NAMES)


def test_keys_are_drawn_anew_for_each_decision(site):
    """A rule that draws does not choose the same for ever."""
    router = rule_router(rule_named("random", away=True), surroundings(site), rate=1.0)
    choices = []
    for number in range(30):
        choices.append(sent(router, number, number * 1.0))
        router.failed(number)
    assert len(set(choices)) == 3

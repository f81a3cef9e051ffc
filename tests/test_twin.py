"""The twin: exact where it knows everything, honest where it does not, and clear about what is wrong with a log."""

from __future__ import annotations

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from benchmarks.twin import Emulated, rule
from jaxroute.commands.twin import main
from jaxroute.errors import UserError
from jaxroute.evaluation.statistics import student_t_975
from jaxroute.evaluation.twin import judge, read_recorded
from jaxroute.evaluation.twin.drift import find_drift, paces, ratios
from jaxroute.evaluation.twin.judge import REFUSED, blocks_of, difference
from jaxroute.evaluation.twin.others import Stream, join
from jaxroute.evaluation.twin.servers import Servers, draw_lengths
from jaxroute.evaluation.twin.simulate import Played
from jaxroute.gateway.fleet import read_fleet
from jaxroute.serving.reference import simulate as reference

pytestmark = pytest.mark.slow

NUM_REQUESTS = 220


@pytest.fixture(scope="module")
def emulated():
    return Emulated()


@pytest.fixture(scope="module")
def traffic(emulated):
    """Requests, the lengths of all answers, and the log of a gateway that takes the shortest queue."""
    requests, lengths = emulated.requests(0, NUM_REQUESTS, 1.2)
    log, _ = emulated.served(requests, lengths, rule("shortest_queue"))
    return requests, lengths, log


@pytest.fixture
def fleet_file(emulated, tmp_path):
    experts = [{"url": f"http://127.0.0.1:900{e}/v1", "model": model} for e, model in enumerate(emulated.servers)]
    options = {"policy": "shortest_queue", "fallback": "shortest_queue", "site": "edge3", "experts": experts}
    path = tmp_path / "fleet.yaml"
    OmegaConf.save(OmegaConf.create(options | {"classes": {"standard": {"normalised": 0.04}}}), path)
    return path


# --- Playing a log ------------------------------------------------------------------------------------------


def test_a_log_is_played_as_the_reference_serves_it(emulated, traffic):
    _, lengths, log = traffic
    of = log.answered
    site = {name: np.asarray(column) for name, column in emulated.site._asdict().items()}
    expected = reference(site, log.arrival[of], log.prompt_tokens[of], lengths[of], log.choice[of])
    delay = emulated.site.network_delay[log.choice[of]]
    np.testing.assert_allclose(log.ttft[of], expected.ttft + delay, atol=1e-3)
    np.testing.assert_allclose(log.latency[of], expected.latency + delay, atol=1e-3)


def test_what_was_chosen_is_chosen_again_and_the_policy_is_asked(emulated, traffic):
    _, lengths, log = traffic
    again, played = emulated.served(log, lengths, None)
    np.testing.assert_array_equal(again.choice, log.choice)
    np.testing.assert_allclose(again.latency, log.latency, atol=1e-4)
    assert played.qos[0].mean() == pytest.approx(log.measured_qos.mean(), abs=1e-6)


# --- What is not known --------------------------------------------------------------------------------------


def servers_of(emulated, draws=3):
    site = type(emulated.site)(*(np.repeat(column[None], draws, axis=0) for column in emulated.site))
    number = len(emulated.servers)
    return Servers(site, (None,) * number, {}, np.full(number, 9), np.full(number, 9999), np.full(number, 0.5))


def test_lengths_of_answers_are_those_measured_or_as_uncertain_as_the_log_shows(emulated):
    requests, lengths = emulated.requests(5, 2000, 1.2)
    choice = np.arange(2000) % 3
    log = requests._replace(choice=choice, output_tokens=lengths[np.arange(2000), choice])
    drawn = draw_lengths(log, servers_of(emulated), 3, seed=0)
    assert (drawn[:, np.arange(2000), choice] == log.output_tokens).all()
    for server in range(3):
        elsewhere = choice != server
        true, predicted = lengths[elsewhere, server], log.predicted_tokens[elsewhere, server]
        found, expected = (np.log(tokens / predicted) for tokens in (drawn[0][elsewhere, server], true))
        assert found.mean() == pytest.approx(expected.mean(), abs=0.08)
        assert found.std() == pytest.approx(expected.std(), rel=0.25)
        # Long answers are less certain than short ones, as in the log.
        long = predicted > np.median(predicted)
        assert (found[long].std() > found[~long].std()) == (expected[long].std() > expected[~long].std())


def test_an_interval_has_both_the_blocks_and_the_draws():
    blocks = np.repeat(np.arange(12), 10)
    rng = np.random.default_rng(0)
    of_block = rng.normal(0, 1, 12)[blocks]
    only_blocks = difference(np.tile(of_block, (8, 1)), np.zeros((8, 120)), blocks)
    expected = student_t_975(11) * of_block[::10].std(ddof=1) / np.sqrt(12)
    assert only_blocks.ci95 == pytest.approx(expected, rel=1e-6)
    only_draws = difference(np.tile(rng.normal(0, 1, (8, 1)), 120), np.zeros((8, 120)), blocks)
    assert only_draws.ci95 > 0
    both = difference(of_block + np.zeros((8, 1)), rng.normal(0, 1, (8, 1)) + np.zeros((8, 120)), blocks)
    assert both.ci95 > only_blocks.ci95


# --- Drift --------------------------------------------------------------------------------------------------


def played_like(log, factor=1.0):
    """A replay that takes `factor` times as long as was measured."""
    ttft, latency = log.ttft[None], log.ttft[None] + factor * (log.latency - log.ttft)[None]
    none = np.zeros((1, len(log.arrival)))
    return Played(log.choice[None], log.choice[None], ttft, latency, none, none, none, none > 0, none)


def test_a_server_that_slows_down_is_found_soon_and_followed(traffic):
    _, _, log = traffic
    fitted = np.arange(NUM_REQUESTS) < NUM_REQUESTS // 2
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(0, 0.01, NUM_REQUESTS))
    assert find_drift(log, played_like(log, noise), fitted) == []
    change = 140
    slower = np.where((log.choice == 0) & (np.arange(NUM_REQUESTS) >= change), 1.3, 1.0)
    slowed = played_like(log, noise / slower)
    (drift,) = find_drift(log, slowed, fitted)
    assert (drift.server, drift.kind) == (0, "speed")
    assert abs(drift.since - change) < 12
    assert drift.found_within <= 8
    assert drift.pace == pytest.approx(1.3, rel=0.02)
    blocks = blocks_of(log)
    table = paces(log, ratios(log, slowed), blocks, [drift], np.ones(NUM_REQUESTS, bool))
    np.testing.assert_allclose(table[: blocks[change] - 1, 0], 1.0, atol=0.03)
    np.testing.assert_allclose(table[blocks[change] + 1 :, 0], 1.3, atol=0.04)
    assert (table[:, 1:] == 1).all()


def test_others_at_a_server_are_seen_by_late_first_tokens(traffic):
    _, _, log = traffic
    fitted = np.arange(NUM_REQUESTS) < NUM_REQUESTS // 2
    early = played_like(log)
    late = np.where((log.choice == 0) & (np.arange(NUM_REQUESTS) >= 120), 0.3, 1.0)
    (drift,) = find_drift(
        log, early._replace(ttft=early.ttft * late, latency=early.latency - early.ttft * (1 - late)), fitted
    )
    assert (drift.server, drift.kind) == (0, "queue")
    joined = join(log, np.ones((2, NUM_REQUESTS, 3), int), [Stream(0, float(log.arrival[140]), 0.5)], seed=0)
    assert (joined.forced[:, joined.own] == -1).all()
    assert set(joined.forced[:, ~joined.own].ravel()) == {0, 3}
    assert (joined.forced[0] != joined.forced[1]).any()
    assert (joined.recorded.arrival[~joined.own] >= log.arrival[140]).all()
    assert (joined.forced == 0).sum(1) == pytest.approx(0.5 * (log.arrival[-1] - log.arrival[140]), rel=0.6)
    np.testing.assert_array_equal(joined.recorded.arrival[joined.own], log.arrival)
    # Nothing of the accelerators' time is lost.
    busy = np.random.default_rng(0).random((1, len(joined.own), 3))
    whole = np.zeros((1, len(joined.own)))
    own = joined.own_part(Played(*[whole] * 6, busy, whole, whole))
    assert own.busy_seconds.shape == (1, NUM_REQUESTS, 3)
    assert own.busy_seconds.sum() == pytest.approx(busy.sum())


# --- The verdict --------------------------------------------------------------------------------------------


def test_the_command_as_a_user_types_it(emulated, traffic, fleet_file, tmp_path, capsys, monkeypatch):
    _, _, log = traffic
    emulated.write_log(log, tmp_path / "decisions.jsonl")
    monkeypatch.chdir(tmp_path)
    words = ["decisions.jsonl", "--fleet", "fleet.yaml", "--policies", "router", "--draws", "4", "--share", "0.7"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "the twin errs by 0.0" in said
    assert "no difference to shortest_queue is shown" in said
    found = json.loads((tmp_path / "outputs" / "twin" / "twin.json").read_text())
    (policy,) = found["policies"]
    assert policy["agreement"] > 0.95
    assert abs(policy["gain"]["mean"]) < policy["gain"]["ci95"]
    assert found["check"]["whole"]["e2e"]["predicted"] == pytest.approx(
        found["check"]["whole"]["e2e"]["measured"], rel=0.05
    )
    page = (tmp_path / "outputs" / "twin" / "twin.html").read_text()
    assert "Twin of a fleet" in page
    assert "gemma-2-2b-it" in page


def test_no_verdict_where_the_log_contradicts_the_twin(emulated, traffic):
    """The log says of a shadow what the rule would not choose."""
    _, _, log = traffic
    lying = log._replace(shadow={"shortest_queue": (log.choice + 1) % 3})
    twin = judge(lying, [rule("shortest_queue")], emulated.site, emulated.bank.log_length_error, share=0.7, draws=4)
    (judged,) = twin.policies
    assert judged.status == REFUSED
    assert [reason for reason in judged.reasons if "chooses as the log says in" in reason]


def test_a_mistake_is_one_line(fleet_file, tmp_path, capsys):
    log = tmp_path / "log.csv"
    log.write_text("arrival_time,first_token_time\n0,1\n")
    for words, message in (
        ([str(log), "--fleet", str(fleet_file)], "expert, the server that answered"),
        ([str(log), "--fleet", str(fleet_file), "--share", "1"], "--share=1 must be from 0.1 to 0.9"),
        ([str(log), "--fleet", str(fleet_file), "--policies", "impact_gredy"], "did you mean impact_greedy"),
        ([str(log), "--fleet", str(tmp_path / "no.yaml")], "cannot be read"),
        ([str(log)], "--fleet"),
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def test_a_growing_log_is_watched(emulated, traffic, fleet_file, tmp_path, capsys, monkeypatch):
    _, lengths, log = traffic
    half = log.part(slice(0, 150))
    pace = np.ones((NUM_REQUESTS, 3))
    pace[150:, 0] = 1.6
    slower, _ = emulated.served(log, lengths, None, pace=pace)
    emulated.write_log(half, tmp_path / "log.jsonl")
    rounds = []

    def wait(seconds):
        rounds.append(seconds)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        emulated.write_log(slower._replace(policy="shortest_queue"), tmp_path / "log.jsonl")

    monkeypatch.setattr("jaxroute.commands.twin.time.sleep", wait)
    words = [str(tmp_path / "log.jsonl"), "--fleet", str(fleet_file), "--watch", "7", "--share", "0.7"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().out
    assert rounds == [7, 7]
    assert said.count("gemma-2-2b-it has been") == 1
    assert "slower since" in said


# --- Logs that are not what they should be ------------------------------------------------------------------


def read(emulated, log, fleet_file, tmp_path, change=lambda records: records, begin=1.7e9):
    path = tmp_path / "log.jsonl"
    emulated.write_log(log, path, begin)
    records = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return read_recorded([path], read_fleet(fleet_file))


def test_a_log_comes_back_as_it_was_written(emulated, traffic, fleet_file, tmp_path):
    _, _, log = traffic
    back = read(emulated, log, fleet_file, tmp_path)
    assert back.troubles == back.refusals == ()
    assert back.policy == "shortest_queue"
    for name in ("arrival", "ttft", "latency"):
        np.testing.assert_allclose(getattr(back, name), getattr(log, name), atol=1e-5)
    for name in ("choice", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(log, name))
    assert back.measured_qos.mean() == pytest.approx(log.measured_qos.mean())


def shifted(records, of, by):
    for record in of:
        for name in ("arrival_time", "first_token_time", "last_token_time", "end_time"):
            record[name] = record[name] and record[name] + by
    return records


def test_a_clock_that_jumps_back(emulated, traffic, fleet_file, tmp_path):
    back = read(emulated, traffic[2], fleet_file, tmp_path, lambda records: shifted(records, records[150:], -600.0))
    assert len(back.arrival) == 150
    assert "the clock goes back 1 times" in back.troubles[0]
    assert "a verdict needs 200" in back.refusals[0]


def test_interleaved_gateways(emulated, traffic, fleet_file, tmp_path):
    """Of two clocks, or of one: then more is in flight than the gateway knows of."""
    _, _, log = traffic
    back = read(emulated, log, fleet_file, tmp_path, lambda records: shifted(records, records[::2], 5000.0))
    assert "interleaved" in back.refusals[0]
    for other in (0, 1):

        def know(records, other=other):
            ends = [(record["arrival_time"], record["end_time"]) for record in records]
            for record in records:
                there = sum(begin < record["arrival_time"] < end for begin, end in ends)
                record["expected"] = {"running": [there // (1 + 3 * other), 0, 0], "waiting": [0, 0, 0]}
            return records

        back = read(emulated, log, fleet_file, tmp_path, know)
        assert any("several gateways" in line for line in back.refusals) == bool(other)


def test_ends_that_are_missing_and_servers_that_are_unknown(emulated, traffic, fleet_file, tmp_path):
    def change(records):
        done = [record for record in records if record["expert"]]
        for record in done[:5]:
            record["output_tokens"] = None
        for record in done[5:8]:
            record["expert"] = "gpt-9"
        return records

    back = read(emulated, traffic[2], fleet_file, tmp_path, change)
    assert len(back.arrival) == NUM_REQUESTS - 8
    assert any(line.startswith("5 requests without an end") for line in back.troubles)
    assert back.refusals[0].startswith("3 requests went to gpt-9, which the fleet does not name")


def test_a_day_without_load_is_left_out(emulated, traffic, fleet_file, tmp_path):
    half = NUM_REQUESTS // 2

    def change(records):
        later = [record for record in records if int(record["id"][1:]) >= half]
        return sorted(shifted(records, later, 86400.0), key=lambda record: record["end_time"])

    back = read(emulated, traffic[2], fleet_file, tmp_path, change)
    assert "no request came for 24.0 h" in back.troubles[0]
    assert back.refusals == ()
    assert np.diff(back.arrival).max() == pytest.approx(60.0)
    assert np.diff(back.wall).max() > 86000


def test_too_short_a_log(emulated, traffic, fleet_file, tmp_path):
    _, _, log = traffic
    back = read(emulated, log.part(slice(0, 120)), fleet_file, tmp_path)
    assert "the log has 120 requests, and a verdict needs 200" in back.refusals[0]
    with pytest.raises(UserError, match="has 20 requests of the fleet; the twin needs at least 30"):
        read(emulated, log.part(slice(0, 20)), fleet_file, tmp_path)


def test_a_table_with_the_chosen_server(emulated, traffic, fleet_file, tmp_path):
    _, _, log = traffic
    rows = ["arrival_time,first_token_time,last_token_time,prompt_tokens,output_tokens,expert"]
    for r in np.flatnonzero(log.answered):
        at = log.arrival[r]
        times = f"{at},{at + log.ttft[r]},{at + log.latency[r]}"
        rows.append(f"{times},{log.prompt_tokens[r]},{log.output_tokens[r]},{emulated.servers[log.choice[r]]}")
    path = tmp_path / "served.csv"
    path.write_text("\n".join(rows))
    back = read_recorded([path], read_fleet(fleet_file))
    assert back.policy is None
    assert (back.limits.normalised == 0.04).all()
    assert (back.quality == 0.5).all()
    np.testing.assert_array_equal(back.choice, log.choice[log.answered])

"""Serving logs are read whatever their shape, or named in one line."""

from __future__ import annotations

import codecs
import gzip
import json

import numpy as np
import pytest
from shapes import check_reads_every_shape, check_refuses_every_broken_file

from jaxroute.errors import UserError
from jaxroute.fitting import read_log

NAMES = ("arrival_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
ROWS = [(float(number), number + 0.5, number + 2.0, 10 + number, 5) for number in range(40)]


def table(separator=",", names=NAMES, extra=""):
    lines = [separator.join(names), *(separator.join(map(str, row)) + extra for row in ROWS)]
    return "\n".join(lines) + "\n"


def check(log):
    np.testing.assert_allclose(log.arrival_time, np.arange(40))
    np.testing.assert_allclose(log.ttft, 0.5)
    np.testing.assert_allclose(log.latency, 2.0)
    assert log.prompt_tokens.tolist() == list(range(10, 50))
    assert set(log.output_tokens.tolist()) == {5}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", table().encode()),
        ("log.CSV", table().encode()),
        ("log", table().encode()),
        ("log.tsv", table("\t").encode()),
        ("log.txt", table(";").encode()),
        ("log.csv.gz", gzip.compress(table().encode())),
        ("log", gzip.compress(table().encode())),
        ("bom.csv", codecs.BOM_UTF8 + table().encode()),
        ("utf16.csv", table().encode("utf-16")),
        ("spaces.csv", table(names=[f" {name.replace('_', ' ').title()} " for name in NAMES]).encode()),
        (
            "prompts.csv",
            table(names=(*NAMES, "prompt"), extra=',"' + "word, " * 30_000 + '"').encode(),
        ),
        (
            "engine.csv",
            table(names=("queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")).encode(),
        ),
        ("log.jsonl", "\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS).encode()),
        ("log.json", json.dumps([dict(zip(NAMES, row, strict=True)) for row in ROWS]).encode()),
    ],
)
def test_tables_of_every_dialect(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    check(read_log(path))


# --- vLLM's benchmark -------------------------------------------------------------------------------------------


def run(begin=0.0, number=40, **changes):
    return {
        "model_id": "a",
        "start_times": [begin + i for i in range(number)],
        "ttfts": [0.5] * number,
        "itls": [[0.5, 1.0]] * number,
        "input_lens": [10 + i for i in range(number)],
        "output_lens": [5] * number,
        "errors": [""] * number,
    } | changes


def written(tmp_path, text):
    path = tmp_path / "result"
    path.write_text(text)
    return path


@pytest.mark.parametrize("join", ["\n".join, lambda runs: json.dumps([json.loads(run) for run in runs]), "".join])
def test_runs_in_one_file_follow_each_other(tmp_path, join):
    """Each has a clock of its own, and the server is idle between them."""
    path = written(tmp_path, join([json.dumps(run(5000.0)), json.dumps(run(10.0))]))
    log = read_log(path)
    assert len(log.ttft) == 80
    np.testing.assert_allclose(log.ttft, 0.5)
    np.testing.assert_allclose(log.latency, 2.0)
    assert log.arrival_time[40] > log.last_token_time[:40].max()


def test_failed_requests_are_left_out(tmp_path):
    failed = run(number=6) | {
        "ttfts": [0.0, None, 0.0, 0.5, 0.5, 0.5],
        "itls": [[], [], None, [1.5], [1.5], [1.5]],
        "output_lens": [0, 0, 7, None, 5, 0],
        "errors": ["", "", "", "", "Traceback: timed out", ""],
    }
    both = {name: value + failed[name] if isinstance(value, list) else value for name, value in run().items()}
    check(read_log(written(tmp_path, json.dumps(both))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itls": [[0.5, None]] * 40}, r"request 0: itls has 'None', which is not a number"),
        ({"ttfts": [0.5] * 39 + [None]}, r"request 39: ttfts=None is not a number"),
        ({"start_times": [None] * 40}, r"request 0: start_times=None is not a number"),
        ({"input_lens": ["x"] * 40}, r"request 0: input_lens='x' is not a number"),
        ({"ttfts": None}, r"ttfts is 'None' and not a list; record it with vllm bench serve"),
        ({"ttfts": [0.5] * 39}, r"differ in length"),
    ],
)
def test_impossible_entries_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_log(written(tmp_path, json.dumps(run(**changes))))
    assert "\n" not in str(caught.value)


def test_runs_of_two_models_are_no_log_of_one_expert(tmp_path):
    with pytest.raises(UserError, match="runs of the models a, b; give one log per expert"):
        read_log(written(tmp_path, json.dumps(run()) + "\n" + json.dumps(run(model_id="b"))))


# --- other tools ------------------------------------------------------------------------------------------------


def test_aiperf_records(tmp_path):
    lines = []
    for arrival, first, last, prompt, output in ROWS:
        metrics = {
            "time_to_first_token": {"value": 1e3 * (first - arrival), "unit": "ms"},
            "request_latency": {"value": 1e3 * (last - arrival), "unit": "ms"},
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
        }
        start = int(1e9 * (arrival + 1000))
        lines.append(json.dumps({"metadata": {"request_start_ns": start}, "metrics": metrics, "error": None}))
    lines.append(json.dumps({"metadata": {"request_start_ns": 1}, "metrics": {}, "error": {"code": 500}}))
    check(read_log(written(tmp_path, "\n".join(lines))))
    del metrics["time_to_first_token"]
    lines[0] = json.dumps({"metadata": {"request_start_ns": 1}, "metrics": metrics})
    with pytest.raises(UserError, match=r":1: time_to_first_token .* is missing; run AIPerf with --streaming"):
        read_log(written(tmp_path, "\n".join(lines)))


def test_guidellm_reports(tmp_path):
    names = ("start_time", "first_token_time", "last_token_time", "prompt_tokens", "output_tokens")
    requests = [dict(zip(names, row, strict=True)) for row in ROWS]
    report = {
        "benchmarks": [{"requests": {"successful": part, "errored": [{}]}} for part in (requests[:9], requests[9:])]
    }
    check(read_log(written(tmp_path, json.dumps(report, indent=1))))
    del report["benchmarks"][1]["requests"]["successful"]
    with pytest.raises(UserError, match=r"benchmark 1: requests\.successful is missing"):
        read_log(written(tmp_path, json.dumps(report)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"request_throughput": 3.0, "mean_ttft_ms": 20.0}), "record it with vllm bench serve"),
        (json.dumps({"input_config": {}, "request_latency": {"avg": 3}}), r"AIPerf's summary; give the profile_export"),
        ("Metric,avg,min,max\nRequest Latency (ms),1,2,3\n\nMetric,Value\nRequest Count,3\n", "AIPerf's summary"),
        (json.dumps([{"seq_id": 0, "qsl_idx": 3, "data": "00"}]), "MLPerf LoadGen's list of answers"),
        (':::MLLOG {"key": "loadgen_version", "value": "5.0"}\n', "MLPerf LoadGen's log"),
        ("================\nMLPerf Results Summary\n", "summary for people"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n", "jaxroute trace fit"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 3}\n', "jaxroute trace fit"),
        ("batch,context,prompt,ms\n1,2,3,4\n", "give --profile"),
        ("a,b\n1,2\n", "is no serving log: it has the columns 'a,b'"),
        ("arrival_time,prompt_tokens,output_tokens\n1,2,3\n", "first_token_time, last_token_time is missing"),
        (",".join(NAMES) + "\n", "has 0 requests"),
        ("", "is empty"),
        ("[1, 2]", "is not a JSON object"),
        ('{"ttfts": [', "is not JSON"),
    ],
)
def test_what_is_no_log_is_named_in_one_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_log(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_every_shape_that_the_reader_of_tables_knows(tmp_path):
    check_reads_every_shape(tmp_path, [dict(zip(NAMES, row, strict=True)) for row in ROWS], read_log)


def test_every_broken_file(tmp_path):
    check_refuses_every_broken_file(tmp_path, [dict(zip(NAMES, row, strict=True)) for row in ROWS], read_log)

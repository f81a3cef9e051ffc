"""Results of other projects' evaluations as banks: lm-evaluation-harness, RouterBench, HELM."""

import gzip
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from shapes import json_lines

from jaxroute.banks.evaluations import read_evaluation
from jaxroute.banks.tables import read_table
from jaxroute.commands import bank as command_line
from jaxroute.errors import UserError


def sample(number, answer, score, old=False, **more):
    """A line of samples_<task>_<time>.jsonl as lm-evaluation-harness writes it, the old way and since 0.4.5."""
    prompt, settings = f"Question {number}", {"until": ["\n"], "do_sample": False}
    return {
        "doc_id": number,
        "doc": {"question": prompt, "answer": "#### 7"},
        "target": "7",
        "arguments": [[prompt, settings]] if old else {"gen_args_0": {"arg_0": prompt, "arg_1": settings}},
        "resps": [[answer]],
        "filtered_resps": ["7"],
        "doc_hash": "0",
        "exact_match": score,
        **({} if old else {"filter": "strict-match", "metrics": ["exact_match"]}),
        **more,
    }


def choice(number):
    """A sample of a task that compares likelihoods: nothing is generated."""
    return {
        "doc_id": number,
        "doc": {},
        "target": 1,
        "arguments": {
            "gen_args_0": {"arg_0": f"Question {number}", "arg_1": " no"},
            "gen_args_1": {"arg_0": f"Question {number}", "arg_1": " yes"},
        },
        "resps": [[["-3.1", "False"]], [["-1.2", "True"]]],
        "filtered_resps": [["-3.1", "False"], ["-1.2", "True"]],
        "filter": "none",
        "metrics": ["acc"],
        "acc": 1.0,
    }


@pytest.fixture
def harness(tmp_path):
    """Two models, two tasks."""
    for model, length in (("org__small", 40), ("org__large", 80)):
        folder = tmp_path / "results" / model
        folder.mkdir(parents=True)
        (folder / "results_2025-01-05T10-30-01.123456.json").write_text(json.dumps({"results": {}, "versions": {}}))
        for task, old in (("gsm8k", False), ("mine_2", True)):
            rows = [sample(f"{task} {number}", "x" * length, number % 2, old) for number in range(4)]
            name = f"samples_{task}_2025-01-05T10-30-01.123456.jsonl" if task == "gsm8k" else f"samples_{task}.jsonl"
            (folder / name).write_text(json_lines(rows))
    return tmp_path / "results"


def test_samples_of_the_harness_in_a_folder_per_model(harness, tmp_path, capsys):
    assert command_line.main(["build", str(harness), "--out", str(tmp_path / "bank")]) == 0
    out = capsys.readouterr().out
    assert "org__large, gsm8k: quality is exact_match, filter strict-match; output_tokens is estimated" in out
    table = read_table(tmp_path / "bank")
    assert table.llms == ["org__large", "org__small"]
    assert list(table.queries["prompt"]) == [f"Question {task} {n}" for task in ("gsm8k", "mine_2") for n in range(4)]
    assert list(table.queries["category"]) == ["gsm8k"] * 4 + ["mine_2"] * 4
    np.testing.assert_array_equal(table.quality, np.tile([0, 1], 4)[:, None].repeat(2, 1))
    np.testing.assert_array_equal(table.output_tokens, [[20, 10]] * 8)


def test_one_file_of_samples_is_one_model(harness):
    path = next((harness / "org__small").glob("samples_gsm8k*"))
    table, _ = read_evaluation(path)
    assert table.llms == ["org__small"]
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_evaluation(packed)[0].queries.equals(table.queries)


def test_of_several_filters_the_first_counts(harness):
    path = next((harness / "org__small").glob("samples_gsm8k*"))
    rows = [
        row
        for number in range(3)
        for row in (sample(number, "a", 0), sample(number, "a", 1, filter="flexible-extract"))
    ]
    path.write_text(json_lines(rows))
    table, notes = read_evaluation(path)
    assert not table.quality.any()
    assert len(table.quality) == 3
    assert "filter strict-match" in notes[0]


def test_answers_to_a_prompt_that_comes_again_are_averaged(harness):
    path = next((harness / "org__small").glob("samples_gsm8k*"))
    path.write_text(json_lines([sample(0, "x" * 8, 0), sample(0, "x" * 16, 1), sample(1, "x" * 4, 1)]))
    table, notes = read_evaluation(path)
    np.testing.assert_array_equal(table.quality, [[0.5], [1]])
    np.testing.assert_array_equal(table.output_tokens, [[3], [1]])
    assert "Averaged: 1 of 3 answers repeat a prompt and model." in notes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([choice(0)], r"samples_x\.jsonl:1: no text was generated here.*generate_until"),
        ([sample(0, "a", 1), sample(1, None, 1)], r"samples_x\.jsonl:2: no text was generated here"),
        ([sample(0, "a", 1), sample(1, "a", 1, arguments=[])], r"samples_x\.jsonl:2: no text was generated here"),
        ([sample(0, "a", 1), sample(1, "a", 3.5)], r"samples_x\.jsonl:2: quality 3\.5 is not from 0 to 1"),
        ([sample(0, "a", 1), sample(1, "a", None)], r"samples_x\.jsonl:2: quality None is not from 0 to 1"),
        ([{"doc_id": 0, "resps": [["a"]], "bleu": 31.0}], r"samples_x\.jsonl has none of the scores exact_match"),
        ([{"a": 1}], r"samples_x\.jsonl is no file of samples of lm-evaluation-harness"),
    ],
)
def test_samples_that_make_no_bank(tmp_path, rows, message):
    (tmp_path / "samples_x.jsonl").write_text(json_lines(rows))
    with pytest.raises(UserError, match=message):
        read_evaluation(tmp_path)


def test_a_folder_with_nothing_in_it(tmp_path):
    with pytest.raises(UserError, match=r"holds neither a bank \(queries\.parquet\) nor samples_"):
        read_evaluation(tmp_path)


def router_bench(**changes):
    return pd.DataFrame(
        {
            "sample_id": ["gsm.0", "gsm.1", "mbpp.0"],
            "prompt": ["['What is 2 + 3?']", "['What is 3 + 4?']", "['Write a\nfunction']"],
            "eval_name": ["gsm", "gsm", "mbpp"],
            "org/small": [0.0, 1.0, 0.25],
            "large": [1.0, 1.0, 0.0],
            "org/small|model_response": ["x" * 8, "x" * 16, "x" * 40],
            "large|model_response": ["x" * 80] * 3,
            "org/small|total_cost": [1e-5] * 3,
            "large|total_cost": [1e-3] * 3,
            "oracle_model_to_route_to": ["large", "org/small", "org/small"],
        }
    ).assign(**changes)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_router_bench(tmp_path, kind):
    path = tmp_path / f"routerbench_0shot.{kind}"
    getattr(router_bench(), f"to_{kind}")(path)
    table, notes = read_evaluation(path)
    assert table.llms == ["org/small", "large"]
    np.testing.assert_array_equal(table.quality, [[0, 1], [1, 1], [0.25, 0]])
    np.testing.assert_array_equal(table.output_tokens, [[2, 20], [4, 20], [10, 20]])
    assert list(table.queries["category"]) == ["gsm", "gsm", "mbpp"]
    assert "RouterBench: output_tokens is estimated from the text of the answers." in notes


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (router_bench().drop(columns="large"), r"has no column 'large', which RouterBench's tables have"),
        (router_bench(large=[1, "bad", 0]), r"rb\.csv:3: large 'bad' is not a number"),
        (router_bench(large=[1, 7, 0]), r"rb\.csv:3: large '7' is not from 0 to 1"),
    ],
)
def test_router_bench_with_mistakes(tmp_path, frame, message):
    frame.to_csv(tmp_path / "rb.csv", index=False)
    with pytest.raises(UserError, match=message):
        read_evaluation(tmp_path / "rb.csv")


class Harmful:
    """What must never be unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_unpickled(tmp_path, protocol):
    (tmp_path / "routerbench_0shot.pkl").write_bytes(pickle.dumps(Harmful(), protocol))
    with pytest.raises(UserError) as raised:
        read_evaluation(tmp_path / "routerbench_0shot.pkl")
    assert "is a Python pickle, which can run any code" in str(raised.value)


HELM_STATE = {
    "adapter_spec": {"method": "generation", "model": "org/small"},
    "request_states": [
        {
            "instance": {"id": "id0", "input": {"text": "What is 2 + 3?"}, "references": [], "split": "test"},
            "request": {"model": "org/small", "prompt": "What is 2 + 3?"},
            "result": {"success": True, "completions": [{"text": "5", "logprob": 0, "tokens": [{"text": "5"}]}]},
        }
    ],
}
HELM_STATS = [{"instance_id": "id0", "trial": 0, "stats": [{"name": {"name": "exact_match"}, "count": 1, "mean": 1.0}]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scenario_state.json", HELM_STATE, r"is HELM's scenario_state\.json, .* write a table with a row per request"),
        ("per_instance_stats.json", HELM_STATS, r"is HELM's per_instance_stats\.json, without prompts and answers"),
        (
            "results_2025-01-05T10-30-01.123456.json",
            {"results": {"gsm8k": {"exact_match,strict-match": 0.5}}, "configs": {}, "versions": {}},
            r"is the summary of lm-evaluation-harness, without the answers: run it with --log_samples",
        ),
        ("other.json", {"data": []}, r"has no column 'prompt'"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_files_that_hold_no_graded_answers_say_what_they_are(tmp_path, name, content, message, indent):
    (tmp_path / name).write_text(json.dumps(content, indent=indent))
    with pytest.raises(UserError, match=message) as raised:
        read_evaluation(tmp_path / name)
    assert "\n" not in str(raised.value)

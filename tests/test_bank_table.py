"""Banks from a user's own evaluation: reading and writing tables, predictions for them, graded quality, mistakes."""

import json
import logging
import shlex
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from shapes import check_reads_every_shape, check_refuses_every_broken_file, csv_text, json_lines
from test_bank import auc, log_lengths, r2, table_config, write_tables

from jaxroute.banks import measures
from jaxroute.banks.bank import BankConfig, build_bank
from jaxroute.banks.evaluations import read_evaluation
from jaxroute.banks.noise import NoiseConfig
from jaxroute.banks.tables import read_table, split_of_rows
from jaxroute.commands import bank as command_line
from jaxroute.config import load_config
from jaxroute.errors import UserError
from jaxroute.scenarios import build_env

LLMS = ["small-2b", "medium-7b", "large-27b"]
ROWS = 400


def run(capsys, *argv):
    """Exit code of the command line and what it printed on both streams."""
    code = command_line.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return code, out, err


def answers(rows=ROWS, llms=LLMS, graded=False):
    """A long table: prompts of different difficulty, of three categories, answered by LLMs of different ability."""
    rng = np.random.default_rng(1)
    difficulty = rng.standard_normal((rows, 1))
    margin = rng.standard_normal((rows, len(llms))) + np.linspace(-0.5, 0.5, len(llms)) - difficulty
    quality = np.round(1 / (1 + np.exp(-2 * margin)), 2) if graded else (margin > 0).astype(float)
    tokens = np.rint(np.exp(5 + 0.5 * difficulty + 0.3 * rng.standard_normal((rows, len(llms)))))
    return pd.DataFrame(
        [
            {
                "prompt": f'Question, {row}:\n"what" is {"x" * (row % 7)}?',
                "model": llm,
                "quality": quality[row, column],
                "output_tokens": int(tokens[row, column]),
                "category": ("gsm", "crux", "None")[row % 3],
                "prompt_tokens": 20 + row,
            }
            for row in range(rows)
            for column, llm in enumerate(llms)
        ]
    )


def write_long(table, path):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    else:
        table.to_parquet(path)
    return path


def wide(table, name):
    return table.pivot(index="prompt_tokens", columns="model", values=name)[LLMS].to_numpy()


SHORT = [
    {"prompt": f"p{number}", "model": "ab"[number % 2], "quality": number / 4, "output_tokens": 10 + number}
    for number in range(5)
]


def contents(path):
    table, _ = read_evaluation(path)
    return table.queries.to_dict("list"), table.quality, table.output_tokens, table.llms


def own(folder, **overrides):
    return table_config(**{"kind": "table", "folder": str(folder), **overrides})


def write_predictions(folder, quality, tokens, error=(0.5, 0.5, 0.5)):
    folder.mkdir(exist_ok=True)
    pd.DataFrame(quality, columns=LLMS).to_parquet(folder / "predicted_quality.parquet")
    pd.DataFrame(tokens, columns=LLMS).to_parquet(folder / "predicted_output_tokens.parquet")
    pd.DataFrame([error], columns=LLMS).to_parquet(folder / "log_length_error.parquet")


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# --- from an evaluation to a bank ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_bank(tmp_path, capsys, suffix):
    long = answers().sample(frac=1, random_state=0)  # rows in any order
    code, out, _ = run(capsys, "build", write_long(long, tmp_path / f"mine{suffix}"), "--out", tmp_path / "bank")
    assert code == 0
    assert "400 prompts x 3 LLMs, 0 cells missing.\nUse it with: " in out
    assert out.endswith(f" train bank=table bank.folder={tmp_path / 'bank'}\n")
    table = read_table(tmp_path / "bank")
    assert sorted(table.llms) == sorted(LLMS)
    order, columns = np.argsort(table.queries["prompt_tokens"].to_numpy()), [table.llms.index(llm) for llm in LLMS]
    np.testing.assert_array_equal(table.quality[order][:, columns], wide(long, "quality"))
    np.testing.assert_array_equal(table.output_tokens[order][:, columns], wide(long, "output_tokens"))
    assert set(table.queries["prompt"]) == set(long["prompt"])
    assert dict(table.queries.groupby("category").size()) == {"None": 133, "crux": 133, "gsm": 134}
    bank = build_bank(own(tmp_path / "bank"), ["b", "c", "a"])
    np.testing.assert_array_equal(bank.quality[order], wide(long, "quality")[:, [1, 2, 0]])
    np.testing.assert_array_equal(bank.prompt_tokens[order], np.arange(ROWS) + 20)


def test_what_it_prints_can_be_pasted_back(tmp_path, capsys):
    folder = tmp_path / "it's (mine), [of] {2025} #1 = ü"
    _, out, _ = run(capsys, "build", write_long(answers(rows=4), tmp_path / "mine.csv"), "--out", folder)
    config = load_config([word for word in shlex.split(out.partition("Use it with: ")[2]) if word.startswith("bank")])
    assert (config.bank.kind, config.bank.folder) == ("table", str(folder))


def test_absent_rows_and_empty_lengths_are_missing_cells(tmp_path, capsys, caplog):
    long = answers()
    long = long.astype({"output_tokens": object})
    long.loc[4, "output_tokens"] = None  # row 5: the second prompt, medium-7b
    path = write_long(long.drop(index=[0, 2]), tmp_path / "mine.csv")
    assert run(capsys, "build", path, "--out", tmp_path / "bank")[0] == 0
    table = read_table(tmp_path / "bank")
    assert np.isnan(table.quality).sum() == 2
    assert np.isnan(table.output_tokens).sum() == 3
    with caplog.at_level(logging.WARNING):
        assert len(build_bank(own(tmp_path / "bank"), ["a", "b"]).quality) == ROWS - 2
    assert "dropped 2 of 400 rows with a missing cell" in caplog.text


def test_prompt_tokens_are_estimated_and_it_says_so(tmp_path, capsys):
    long = answers(rows=120).drop(columns=["prompt_tokens", "category"]).assign(grader="me")
    code, out, _ = run(capsys, "build", write_long(long, tmp_path / "mine.csv"), "--out", tmp_path / "bank")
    assert code == 0
    assert "Ignored columns: grader." in out
    assert "prompt_tokens is estimated: characters / 4." in out
    queries = read_table(tmp_path / "bank").queries
    assert list(queries.columns) == ["prompt", "prompt_tokens"]
    np.testing.assert_allclose(queries["prompt_tokens"], queries["prompt"].str.len() / 4, atol=0.5)


def test_a_published_table_becomes_the_same_bank(tmp_path, capsys):
    write_tables(tmp_path / "zeroeval", missing=20)
    args = ("build", tmp_path / "zeroeval", "--out", tmp_path / "bank", "--models", "large-27b,small-2b")
    assert run(capsys, *args)[0] == 0
    assert read_table(tmp_path / "bank").llms == ["large-27b", "small-2b"]
    for split in ("train", "test"):
        published = build_bank(table_config(split=split), ["a", "c"], tmp_path)
        assert same(build_bank(own(tmp_path / "bank", split=split), ["a", "c"]), published)


def test_a_site_runs_on_it(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JAXROUTE_DATA", raising=False)
    path = write_long(answers(), tmp_path / "mine.jsonl")
    assert run(capsys, "build", path, "--out", tmp_path / "bank")[0] == 0
    site = load_config(["site=edge3"]).site
    stand_ins = ", ".join(f"{model}: {llm}" for model, llm in zip(site.models, LLMS, strict=True))
    options = ["site=edge3", "bank=table", f"bank.folder={tmp_path / 'bank'}", f"bank.models={{{stand_ins}}}"]
    config = load_config(options)
    env, params = build_env(config)
    assert env.num_experts == 3
    assert len(params.bank.quality) == split_of_rows(ROWS).sum()


def test_describe(tmp_path, capsys):
    long = pd.DataFrame(
        [
            *({"prompt": f"p{i}", "model": "A", "quality": i % 2, "category": f"c{i % 2}"} for i in range(120)),
            *({"prompt": f"p{i}", "model": "[b]", "quality": 0.25, "category": f"c{i % 2}"} for i in range(110)),
        ]
    ).assign(output_tokens=lambda rows: np.where(rows["model"] == "A", 10, 30), prompt_tokens=5)
    assert run(capsys, "build", write_long(long, tmp_path / "mine.csv"), "--out", tmp_path / "bank")[0] == 0
    code, out, _ = run(capsys, "describe", tmp_path / "bank")
    assert code == 0
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines()]
    assert ["A", "0", "10", "0.500", "0.000", "1.000"] in cells
    assert ["[b]", "10", "30", "0.250", "0.250", "0.250"] in cells
    assert "Missing: 10 of 240 cells" in out
    assert "Complete for these 2 LLMs: 110 of 120 prompts." in out
    assert "best single LLM A 0.500, oracle (the best LLM of each prompt) 0.625." in out


def test_describe_the_published(data_dir, capsys):
    pool = "Meta-Llama-3_1-8B-Instruct,mathstral-7B,Phi-3-mini-4k-instruct,Mistral-7B-Instruct-v0.2,"
    pool += "Qwen1.5-7B-Chat,Yi-6b-Chat,Mixtral-8x7B-Instruct-v0.1,c4ai-command-r-v01"
    _, out, _ = run(capsys, "describe", data_dir / "mmlu_pro", "--models", pool)
    assert "best single LLM Meta-Llama-3_1-8B-Instruct 0.442, oracle (the best LLM of each prompt) 0.778." in out
    assert {"prompt", "category", "id"} <= set(read_table(data_dir / "mmlu_pro").queries.columns)
    _, out, _ = run(capsys, "describe", data_dir / "zeroeval")
    assert (
        "Complete for these 57 LLMs: 0 of 2840 prompts; a site needs 100: choose fewer LLMs (--models) or add prompts."
        in out
    )
    assert {"prompt", "category", "id"} <= set(read_table(data_dir / "zeroeval").queries.columns)


def test_every_shape_of_an_evaluation(tmp_path):
    check_reads_every_shape(tmp_path, SHORT, contents)


def test_every_broken_evaluation(tmp_path):
    check_refuses_every_broken_file(tmp_path, SHORT, contents)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (True, 1), (False, 0), ("True", 1), ("False", 0), ("true", 1), (" FALSE ", 0), (1, 1), (0, 0), ("1", 1),
        ("1.0", 1),
        (".5", 0.5), ("1e-1", 0.1), ("5E-1", 0.5), ("75%", 0.75), ("100 %", 1), (Decimal("0.25"), 0.25),
        (np.float32(0.5), 0.5),
        ("yes", None), ("correct", None), ("150%", None), ("0,5", None), ("%", None), (None, None), ("", None),
        ("NaN", None),
        (float("nan"), None), ("null", None), ("None", None), (2, None), (-1, None), (10**400, None), ("1" * 400, None),
        ("inf", None), ([1], None), ({"score": 1}, None), (b"1", None), ("0x1", None), ("1\x00", None),
        ("\ud800", None),
    ],
)  # fmt: skip
def test_every_way_to_write_a_quality(tmp_path, cell, value):
    check_cell(tmp_path, "quality", cell, value)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (12, 12), ("12", 12), ("12.0", 12), (12.0, 12), ("1.2e1", 12), (Decimal("12"), 12), (np.int8(12), 12),
        (None, np.nan), ("", np.nan), ("nan", np.nan), ("None", np.nan), ("N/A", np.nan), (float("nan"), np.nan),
        ("1,234", None), ("12 tokens", None), (0, None), (-3, None), ("inf", None), (10**400, None), (True, None),
        ("true", None), ([12], None), ({}, None), (b"12", None), ("12%", None),
    ],
)  # fmt: skip
def test_every_way_to_write_a_length(tmp_path, cell, value):
    check_cell(tmp_path, "output_tokens", cell, value)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("None", "None"), ("nan", "nan"), ("true", "true"), (5, "5"), (2.5, "2.5"), ("ü\x00", "ü\x00"), (" a", " a"),
        (None, None), ("", None), (" \n", None), (float("nan"), None), ([{"role": "user"}], None), ({"a": 1}, None),
        (b"a", None), (True, "True"), ("\ud800", None), ("a\udc80" * 90, None),
    ],
)  # fmt: skip
def test_every_way_to_write_a_prompt(tmp_path, cell, value):
    check_cell(tmp_path, "prompt", cell, value)


def check_cell(folder, name, cell, value):
    """In every kind that can hold it, the cell has this value, or (value None) ends in one line that names the row."""
    rows = [{**row, name: cell} if number == 1 else row for number, row in enumerate(SHORT)]
    kinds = {"jsonl": (rows, 2), "parquet": (rows[1:2], 1)}  # a column of Parquet holds one type
    if isinstance(cell, str):
        kinds["csv"] = (rows, 3)
    written = 0
    for kind, (written_rows, place) in kinds.items():
        path = folder / f"mine.{kind}"
        try:
            if kind == "parquet":
                pd.DataFrame(written_rows).to_parquet(path)
            else:
                path.write_text((csv_text if kind == "csv" else json_lines)(written_rows))
        except (TypeError, ValueError, OverflowError, NotImplementedError):  # this kind cannot hold it
            continue
        written += 1
        if value is None:
            where = f"mine.parquet, row {place}" if kind == "parquet" else f"mine.{kind}:{place}"
            with pytest.raises(UserError, match=f"{where}: {name} ") as raised:
                read_evaluation(path)
            assert str(raised.value).isprintable()
        else:
            table, _ = read_evaluation(path)
            row = place - {"jsonl": 1, "parquet": 1, "csv": 2}[kind]
            column = table.queries["prompt"] if name == "prompt" else getattr(table, name)[:, table.llms.index("b")]
            np.testing.assert_equal(column[row], value)
    assert written


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("quality", [1, 0, None], "Float64"), ("quality", [True, False, True], "boolean"),
        ("quality", [1, 0, 1], "category"),
        ("quality", ["True", "False", "1"], "category"), ("quality", [1, 0, 1], "uint8"),
        ("output_tokens", [5, None, 7], "Int64"), ("output_tokens", [5, 6, 7], "category"),
        ("output_tokens", [5, 6, 7], "uint16"),
        ("model", ["a", "b", "a"], "category"), ("prompt", ["a", "b", "c"], "string"),
    ],
)  # fmt: skip
def test_types_of_parquet(tmp_path, name, values, dtype):
    frame = pd.DataFrame(SHORT[:3])
    frame[name] = pd.Series(values, dtype=dtype)
    frame.to_parquet(tmp_path / "mine.parquet")
    if name == "quality" and values[2] is None:
        with pytest.raises(UserError, match=r"mine\.parquet, row 3: quality None is not from 0 to 1"):
            read_evaluation(tmp_path / "mine.parquet")
    else:
        table, _ = read_evaluation(tmp_path / "mine.parquet")
        assert len(table.queries) == 3


# --- mistakes in an evaluation ---------------------------------------------------------------------------------


def changed(row, **cells):
    def change(table):
        table = table.astype(object)
        for name, value in cells.items():
            table.loc[row - 1, name] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(5, model="small-2b"), "mine.csv:10: prompt and model ('small-2b') are those of line 8; keep one"),
        (changed(5, quality=-0.5), "mine.csv:10: quality '-0.5' is not from 0 to 1: rescale it"),
        (changed(7, quality=100), "mine.csv:14: quality '100' is not from 0 to 1: rescale it"),
        (changed(5, quality="inf"), "mine.csv:10: quality 'inf' is not from 0 to 1"),
        (changed(5, quality=""), "mine.csv:10: quality '' is not from 0 to 1"),
        (changed(5, quality="good"), "mine.csv:10: quality 'good' is not a number"),
        (changed(6, output_tokens=0), "mine.csv:12: output_tokens '0' is not above 0"),
        (changed(6, output_tokens="inf"), "mine.csv:12: output_tokens 'inf' is not above 0"),
        (changed(6, prompt_tokens=-3), "mine.csv:12: prompt_tokens '-3' is not above 0"),
        (changed(5, model=" "), "mine.csv:10: model ' ' is empty: fill it in"),
        (changed(5, prompt=None), "mine.csv:10: prompt '' is empty: fill it in"),
        (changed(5, category="math"), "mine.csv:10: category 'math' where line 8 has 'crux' for the same prompt"),
        (lambda table: table.rename(columns={"model": "model_name"}), "no column 'model' (did you mean model_name?)"),
        (lambda table: table.head(0), "has no rows"),
    ],
)
def test_a_mistake_names_its_row_and_writes_nothing(tmp_path, capsys, change, message):
    path = write_long(change(answers(rows=4)), tmp_path / "mine.csv")
    code, out, err = run(capsys, "build", path, "--out", tmp_path / "bank")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.jsonl", '{"prompt": "a"}\n{"prompt": \n', "mine.jsonl:2: '{\"prompt\":' is not JSON"),
        ("mine.jsonl", '{"prompt": "a"}\n[1]\n', "mine.jsonl:2: '[1]' is not a JSON object"),
        ("mine.csv", "prompt,model,quality,output_tokens\na,b,1,2\na,b,1,2,c\n", "mine.csv:3: cannot read 'a,b,1,2,c'"),
        ("mine.csv", "", "mine.csv is empty: give a file with one row per answer"),
        ("mine.parquet", "prompt", "is not a readable Parquet file"),
        ("mine.xlsx", "PK\x03\x04", "mine.xlsx is a ZIP archive or a spreadsheet: unpack it, or save the sheet as CSV"),
        ("mine.csv", None, "does not exist or is not a file: check the path, and give a file with one row"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, _, err = run(capsys, "build", tmp_path / name, "--out", tmp_path / "bank")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "bank").exists()


def test_mistakes_on_the_command_line(tmp_path, capsys):
    path = write_long(answers(rows=4), tmp_path / "mine.csv")
    for argv, message in [
        (
            ["build", path, "--out", tmp_path / "b", "--models", "small,large-27b"],
            "no LLM 'small' (did you mean small-2b?)",
        ),
        (["build", path, "--out", tmp_path], f"{tmp_path} exists already: name another folder"),
        (["build", path, "--out", path / "b"], "cannot be written"),
        (["build", path], "the following arguments are required: --out"),
        (["describe", tmp_path], "queries.parquet does not exist"),
    ]:
        code, _, err = run(capsys, *argv)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_half_written(tmp_path, capsys, monkeypatch):
    path = write_long(answers(rows=4), tmp_path / "mine.csv")
    write = pd.DataFrame.to_parquet

    def disk_full(table, where, **options):
        if where.name == "output_tokens.parquet":
            raise OSError(28, "No space left on device")
        write(table, where, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", disk_full)
    code, _, err = run(capsys, "build", path, "--out", tmp_path / "bank")
    assert code == 2
    assert "cannot be written (No space left on device)" in err
    assert list(tmp_path.iterdir()) == [path]


# --- mistakes in a bank ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, capsys):
    assert run(capsys, "build", write_long(answers(), tmp_path / "mine.csv"), "--out", tmp_path / "bank")[0] == 0
    return tmp_path / "bank"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("quality", changed(3, **{"medium-7b": 1.5}), r"row 3, column 'medium-7b': 1\.5 should be from 0 to 1"),
        ("output_tokens", changed(3, **{"large-27b": -2}), r"row 3, column 'large-27b': -2 should be a number above 0"),
        ("quality", lambda table: table.assign(**{"small-2b": "x"}), r"column 'small-2b': not all cells are numbers"),
        ("quality", lambda table: table[:-1], r"quality\.parquet has 399 rows where queries\.parquet has 400"),
        ("output_tokens", lambda table: table[LLMS[:2]], r"output_tokens\.parquet has no column 'large-27b'"),
        ("quality", lambda table: table[LLMS[:2]], r"quality\.parquet has no column 'large-27b'"),
        ("queries", changed(2, prompt_tokens=0), r"row 2, column 'prompt_tokens': 0 should be a number above 0"),
    ],
)
def test_a_broken_bank(folder, name, change, message):
    path = folder / f"{name}.parquet"
    table = change(pd.read_parquet(path))
    table.astype({llm: float for llm in table.columns.intersection(LLMS) if table[llm][0] != "x"}).to_parquet(path)
    with pytest.raises(UserError, match=message):
        build_bank(own(folder), ["a"])


def test_settings_that_do_not_fit():
    with pytest.raises(UserError, match=r"bank\.folder is not set: set it to one that python -m jaxroute bank build"):
        build_bank(BankConfig(kind="table"), ["a"])
    with pytest.raises(UserError, match=r"bank\.folder does not fit bank\.kind='zeroeval': use bank\.kind=table"):
        BankConfig(kind="zeroeval", folder="x")
    with pytest.raises(UserError, match=r"bank\.predictions does not fit bank\.kind='embedded'"):
        BankConfig(predictions="x")


# --- predictions -----------------------------------------------------------------------------------------------


def test_the_router_sees_the_predictions_given(folder, tmp_path, caplog):
    rng = np.random.default_rng(0)
    quality, tokens = rng.random((ROWS, 3)), 1 + 500 * rng.random((ROWS, 3))
    quality[7, 0], tokens[9, 2] = np.nan, np.nan  # the router needs no prediction of medium-7b
    quality[11, 1] = np.nan
    write_predictions(tmp_path / "mine", quality, tokens, (0.5, 0.6, 0.7))
    with caplog.at_level(logging.WARNING):
        bank = build_bank(own(folder, predictions=str(tmp_path / "mine")), ["c", "a"])
    assert "dropped 2 of 400 rows without a prediction for a chosen LLM" in caplog.text
    kept = np.delete(np.arange(ROWS), [7, 9])
    np.testing.assert_array_equal(bank.prompt_tokens, kept + 20)
    np.testing.assert_array_equal(bank.predicted_quality, quality[kept][:, [2, 0]].astype(np.float32))
    np.testing.assert_allclose(bank.predicted_output_tokens, tokens[kept][:, [2, 0]], rtol=1e-5)
    np.testing.assert_allclose(bank.log_length_error, [0.7, 0.5])
    # The outcomes, and which rows are in which half, are as without predictions.
    test = build_bank(own(folder, predictions=str(tmp_path / "mine"), split="test"), ["a", "b", "c"])
    np.testing.assert_array_equal(
        test.prompt_tokens,
        np.flatnonzero(~split_of_rows(ROWS))[~np.isin(np.flatnonzero(~split_of_rows(ROWS)), [7, 9, 11])] + 20,
    )
    without = build_bank(own(folder), ["c", "a"])
    np.testing.assert_array_equal(bank.quality, np.asarray(without.quality)[kept])


def test_predictions_for_a_published_table(tmp_path):
    write_tables(tmp_path / "zeroeval")
    write_predictions(tmp_path / "mine", np.full((ROWS, 3), 0.25), np.full((ROWS, 3), 99.0))
    bank = build_bank(table_config(predictions=str(tmp_path / "mine")), ["a", "b"], tmp_path)
    assert set(np.unique(bank.predicted_quality)) == {0.25}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": np.full((399, 3), 0.5)}, r"predicted_quality\.parquet has 399 rows where the bank has 400"),
        ({"quality": np.full((ROWS, 3), 1.25)}, r"row 1, column 'small-2b': 1\.25 should be from 0 to 1"),
        ({"tokens": np.full((ROWS, 3), -1.0)}, r"predicted_output_tokens\.parquet, row 1, .*should be a number above"),
        ({"error": (0.5, 0.0, 0.5)}, r"log_length_error\.parquet, row 1, column 'medium-7b': 0 should be a number abo"),
        ({"quality": np.full((ROWS, 3), np.nan)}, r"0 rows complete for small-2b, medium-7b and predicted in .*mine;"),
    ],
)
def test_predictions_that_do_not_fit(folder, tmp_path, change, message):
    given = {"quality": np.full((ROWS, 3), 0.5), "tokens": np.full((ROWS, 3), 99.0), **change}
    write_predictions(tmp_path / "mine", **given)
    with pytest.raises(UserError, match=message):
        build_bank(own(folder, predictions=str(tmp_path / "mine")), ["a", "b"])


def test_predictions_of_other_llms(folder, tmp_path):
    write_predictions(tmp_path / "mine", np.full((ROWS, 3), 0.5), np.full((ROWS, 3), 99.0))
    path = tmp_path / "mine" / "predicted_quality.parquet"
    pd.read_parquet(path).rename(columns={"small-2b": "small-3b"}).to_parquet(path)
    with pytest.raises(UserError, match=r"predicted_quality\.parquet has no column 'small-2b' \(did you mean small-3b"):
        build_bank(own(folder, predictions=str(tmp_path / "mine")), ["a", "b"])
    with pytest.raises(UserError, match=r"predicted_quality\.parquet does not exist: set bank\.predictions"):
        build_bank(own(folder, predictions=str(tmp_path)), ["a", "b"])


# --- graded quality --------------------------------------------------------------------------------------------


def pairs_in_order(quality, score):
    """Share of pairs of different quality that the score orders correctly, by looking at every pair."""
    quality, score = np.ravel(quality), np.ravel(score)
    better = quality[:, None] > quality[None, :]
    return (score[:, None] > score[None, :])[better].mean()


@pytest.mark.parametrize("grades", [2, 3, 5, 300])
def test_auc_of_grades_counts_every_pair(grades):
    rng = np.random.default_rng(grades)
    quality = rng.integers(0, grades, (60, 5)) / grades
    score = quality + rng.standard_normal(quality.shape)
    assert measures.auc(quality, score) == pytest.approx(pairs_in_order(quality, score), abs=1e-12)
    if grades == 2:
        assert measures.auc(2 * quality, score) == pytest.approx(auc(2 * quality, score), abs=1e-12)


def test_predictions_of_graded_quality_are_as_good_as_configured(tmp_path, capsys):
    path = write_long(answers(rows=800, graded=True), tmp_path / "mine.parquet")
    assert run(capsys, "build", path, "--out", tmp_path / "bank")[0] == 0
    figures = NoiseConfig(quality_auc=0.75, quality_own_r2=0.05, length_r2=0.5, length_own_r2=0.1)
    bank = build_bank(own(tmp_path / "bank", noise=figures), ["a", "b", "c"])
    quality, predicted = np.asarray(bank.quality), np.asarray(bank.predicted_quality)
    assert len(np.unique(quality)) > 50
    assert pairs_in_order(quality, predicted) == pytest.approx(0.75, abs=0.01)
    assert r2(*log_lengths(bank)) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(predicted.mean(axis=0), quality.mean(axis=0), atol=0.01)
    for fifth in np.array_split(np.argsort(predicted, axis=None), 5):  # calibrated
        assert predicted.ravel()[fifth].mean() == pytest.approx(quality.ravel()[fifth].mean(), abs=0.05)
    assert 0 < predicted.min() < predicted.max() < 1

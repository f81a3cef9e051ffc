"""Recorded traces: what the reader returns for every format, the message for every kind of bad file, statistics."""

import gzip
import json
import sys
import time

import numpy as np
import pandas as pd
import pytest
from shapes import check_reads_every_shape, check_refuses_every_broken_file

from jaxroute.errors import UserError
from jaxroute.workloads.traces import FORMATS, fano_factor, gap_variation, read_trace, window_counts

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
TABLE = "arrival_time,prompt_tokens,output_tokens\n"


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(timestamp, prompt=10, output=5, ids=(0,)):
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": list(ids)}


# --- what is read ---------------------------------------------------------------------------------------------


def test_values_and_types(write):
    trace = read_trace(write(HEADER + ROWS))
    assert (trace.format, trace.failed) == ("Azure", 0)
    assert trace.arrival_time.dtype == np.float64
    np.testing.assert_allclose(trace.arrival_time, [0, 4.314579], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(trace.prompt_tokens, [374, 396])
    np.testing.assert_array_equal(trace.output_tokens, [44, 109])


def test_hundred_nanoseconds_survive_an_hour(write):
    rows = "2023-11-16 18:00:00.0000001,1,1\n2023-11-16 19:00:00.0000002,1,1\n"
    assert read_trace(write(HEADER + rows)).arrival_time[1] == pytest.approx(3600.0000001, abs=1e-9)


def test_times_of_2024_have_offsets_and_not_always_decimals(write):
    rows = "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n"
    np.testing.assert_allclose(read_trace(write(HEADER + rows)).arrival_time, [0, 0.99007], rtol=0, atol=1e-9)


def test_offsets_are_heeded(write):
    rows = "2024-05-10T02:00:00+02:00,1,2\n2024-05-10 00:00:01Z,1,2\n2024-05-09 19:30:02-0430,1,2\n"
    np.testing.assert_array_equal(read_trace(write(HEADER + rows)).arrival_time, [0, 1, 2])


def test_gzip_windows_line_ends_and_a_byte_order_mark(write):
    plain = read_trace(write(HEADER + ROWS))
    content = ("\ufeff" + HEADER + ROWS + "\n").replace("\n", "\r\n").encode()
    for other in (write(content), write(gzip.compress(content), "trace.csv.gz")):
        for a, b in zip(plain, read_trace(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_columns_in_any_order(write):
    trace = read_trace(write("id,GeneratedTokens,TIMESTAMP,ContextTokens\n9,44,2023-11-16 18:15:46,374\n"))
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (374, 44)


def test_requests_at_the_same_time_are_fine(write):
    row = "2023-11-16 18:15:46.6805900,374,44\n"
    np.testing.assert_array_equal(read_trace(write(HEADER + row + row)).arrival_time, [0, 0])


def test_burstgpt_leaves_failed_requests_out(write):
    rows = "19440110.0,,3,GPT-4,0,0,0,API log\n19440112.5,u,4,GPT-4,906,446,1352,Conversation log\n"
    rows += "19440113.0,,1,ChatGPT,7,0,7,API log\n19440115.0,u,2,ChatGPT,36,29,65,Conversation log\n"
    trace = read_trace(write(BURSTGPT + rows))
    assert (trace.format, trace.failed) == ("BurstGPT", 2)
    np.testing.assert_array_equal(trace.arrival_time, [0, 2.5])  # from the first one that succeeded
    np.testing.assert_array_equal(trace.prompt_tokens, [906, 36])
    older = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    assert read_trace(write(older)).output_tokens == [18]


def test_mooncake_counts_milliseconds(write):
    rows = (mooncake(27000, 6758, 500, range(14)), mooncake(27000), mooncake(29999))
    trace = read_trace(write(jsonl(*rows), "trace.jsonl"))
    assert trace.format == "Mooncake"
    np.testing.assert_array_equal(trace.arrival_time, [0, 0, 2.999])
    np.testing.assert_array_equal(trace.prompt_tokens, [6758, 10, 10])
    np.testing.assert_array_equal(trace.output_tokens, [500, 5, 5])


def test_a_table_may_start_at_any_time_and_be_parquet(write, tmp_path):
    epoch = 1.7e9
    times, tokens = epoch + np.array([0.25, 0.25, 3.5]), [0, 20, 30]
    text = TABLE + "".join(f"{time!r},{token},{token}\n" for time, token in zip(times.tolist(), tokens, strict=True))
    frame = pd.DataFrame({"arrival_time": times, "prompt_tokens": tokens, "output_tokens": tokens, "note": "x"})
    frame.to_parquet(tmp_path / "trace.parquet")
    for path in (write(text), tmp_path / "trace.parquet"):
        trace = read_trace(path)
        assert trace.format == "table"
        np.testing.assert_allclose(trace.arrival_time, [0, 0, 3.25], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(trace.prompt_tokens, tokens)
        np.testing.assert_array_equal(trace.output_tokens, tokens)


# --- what prompts have in common ------------------------------------------------------------------------------


def blocks(trace):
    return [trace.prefixes.blocks(request) for request in range(len(trace.prompt_tokens))]


def test_traces_without_ids_or_sessions_have_no_prefixes(write):
    assert read_trace(write(HEADER + ROWS)).prefixes is None
    # Nothing says whether BurstGPT's prompts contain what their sessions had before.
    assert read_trace(write(BURSTGPT + "5,a,1,ChatGPT,3,1,4,Conversation log\n")).prefixes is None
    row = {"timestamp": 0, "input_length": 5, "output_length": 1}
    assert read_trace(write(jsonl(row), "trace.jsonl")).prefixes is None


def test_ids_of_mooncakes_blocks_are_kept(write, tmp_path, monkeypatch):
    ids = [[0, 1, 2], [], [0, 3], [-7], [5, 2**63 - 1, 5, 6], [7]]
    rows = [mooncake(1000 * number, 512 * len(row), 5, row) for number, row in enumerate(ids)]
    path = write(jsonl(*rows), "trace.jsonl")
    assert blocks(read_trace(path)) == ids
    assert read_trace(path).prefixes.block_size == 512
    monkeypatch.setattr("jaxroute.workloads.traces._LISTED_ROWS", 2)
    assert blocks(read_trace(path)) == ids
    pd.DataFrame(rows).to_parquet(tmp_path / "trace.parquet")
    assert blocks(read_trace(tmp_path / "trace.parquet")) == ids


@pytest.mark.parametrize("name", ["session", "Conversation", "conversation id"])
def test_a_session_shares_what_it_had_before(write, name):
    rows = [
        (0, 20, 14, "a"),  # 34 tokens: blocks 0 to 2, the last of them not full
        (1, 16, 0, ""),  # no session: block 3
        (2, 50, 1, "a"),  # two whole blocks of the first turn, and two of its own
        (3, 16, 1, "b"),
        (4, 32, 0, "a"),  # all but the last token of its prompt may be shared: one block
        (5, 0, 1, "b"),
        (6, 40, 0, "a"),  # what the turn before had, not what the session had once
    ]
    text = f"arrival_time,prompt_tokens,output_tokens,{name}\n"
    trace = read_trace(write(text + "".join(",".join(map(str, row)) + "\n" for row in rows)))
    assert trace.prefixes.block_size == 16
    assert blocks(trace) == [[0, 1, 2], [3], [0, 1, 4, 5], [6, 7], [0, 8], [9], [0, 8, 10]]


def test_sessions_are_text_or_whole_numbers(write, tmp_path):
    row = {"arrival_time": 0, "prompt_tokens": 20, "output_tokens": 0}
    names = [5, "5", None, " ", 6, "a"]
    same = [[0, 1], [0, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert blocks(read_trace(write(jsonl(*(row | {"session": name} for name in names)), "trace.jsonl"))) == same
    pd.DataFrame([row | {"session": name} for name in (5, 5, None)]).to_parquet(tmp_path / "trace.parquet")
    assert blocks(read_trace(tmp_path / "trace.parquet")) == same[:3]
    for bad in (True, 0.5, [1], float("inf")):
        with pytest.raises(UserError, match=r"trace\.jsonl:2: session is '.*': it should be text or a whole number"):
            read_trace(write(jsonl(row | {"session": 1}, row | {"session": bad}), "trace.jsonl"))


def test_sessions_of_failed_requests_are_left_out(write):
    text = BURSTGPT.replace("Session ID", "session") + "5,a,1,GPT-4,20,0,20,API log\n6,a,1,GPT-4,20,12,32,API log\n"
    assert blocks(read_trace(write(text + "7,a,1,GPT-4,33,15,48,API log\n"))) == [[0, 1], [0, 1, 2]]


REQUESTS = [
    {"arrival_time": 0.25 * number, "prompt_tokens": 7 * number, "output_tokens": number + 1} for number in range(5)
]


def test_every_shape_of_a_trace(tmp_path):
    check_reads_every_shape(tmp_path, REQUESTS, read_trace)


def test_every_broken_trace(tmp_path):
    check_refuses_every_broken_file(tmp_path, REQUESTS, read_trace)


@pytest.mark.parametrize(
    ("columns", "rows", "name"),
    [
        (
            ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            [("2023-11-16 18:15:46", 5, 1), ("2023-11-16 18:15:48", 6, 2)],
            "Azure",
        ),
        (("Timestamp", "Request tokens", "Response tokens"), [(3, 5, 1), (5.0, 6, 2)], "BurstGPT"),
        (("timestamp", "input_length", "output_length"), [(3000, 5, 1), (5000, 6, 2)], "Mooncake"),
        (("arrival_time", "prompt_tokens", "output_tokens"), [(3, 5, 1), (5, 6, 2)], "table"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_every_format_in_every_kind_of_table(tmp_path, columns, rows, name, kind):
    path = tmp_path / f"trace.{kind}"
    frame = pd.DataFrame(rows, columns=columns)
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame.to_csv(path)
    else:
        path.write_text(jsonl(*frame.to_dict("records")))
    if (name, kind) == ("Mooncake", "csv"):  # where seconds and milliseconds look alike
        with pytest.raises(UserError, match="columns of no known format"):
            read_trace(path)
        return
    trace = read_trace(path)
    assert trace.format == name
    np.testing.assert_array_equal(trace.arrival_time, [0, 2])
    np.testing.assert_array_equal(trace.prompt_tokens, [5, 6])


@pytest.mark.parametrize("column", TABLE.strip().split(","))
@pytest.mark.parametrize(
    "cell", [True, None, "", "x", "1,5", "1\x00", [1], {"a": 1}, "nan", float("inf"), 10**400, "٣x"]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_cell_that_is_no_number_names_its_row(write, column, cell, kind):
    rows = [{"arrival_time": 1, "prompt_tokens": 1, "output_tokens": 1} for _ in range(3)]
    rows[1][column] = cell
    text = jsonl(*rows) if kind == "jsonl" else pd.DataFrame(rows).to_csv(index=False)
    with pytest.raises(UserError, match=rf"trace\.{kind}:{2 if kind == 'jsonl' else 3}: cannot read '") as raised:
        read_trace(write(text, f"trace.{kind}"))
    assert str(raised.value).isprintable()


def test_many_rows_are_as_few(write, monkeypatch):
    rows = "".join(f"{time / 4},{time},{2 * time}\n" for time in range(11))
    whole = read_trace(write(TABLE + rows))
    monkeypatch.setattr("jaxroute.tables._ROWS", 4)
    for a, b in zip(whole, read_trace(write(TABLE + rows)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=r"trace\.csv:10: time goes backwards in '1\.0,8,16'"):  # first of a chunk
        read_trace(write(TABLE + rows.replace("2.0,", "1.0,")))


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"trace\.csv is empty: give a file with the columns of one of Azure: TIMESTAMP, Context"),
        (HEADER, r"trace\.csv has no requests"),
        ("TIMESTAMP,Tokens\n", r"trace\.csv: columns of no known .* \(Azure lacks ContextTokens, GeneratedTokens\)"),
        ("1,2,3\n", r"trace\.csv: columns of no known format in '1,2,3'; rename them to those of one of Azure"),
        (HEADER + ROWS + "yesterday,1,2\n", r"trace\.csv:4: cannot read 'yesterday,1,2': .* a time like 2023-11-16"),
        (HEADER + "12345,1,2\n", r"trace\.csv:2: cannot read '12345,1,2'"),
        (HEADER + "2023-13-16 18:15:46,1,2\n", r"trace\.csv:2: cannot read"),
        (HEADER + "2023-11-16 18:15:46,many,2\n", r"trace\.csv:2: cannot read '2023-11-16 18:15:46,many,2'"),
        (HEADER + "2023-11-16 18:15:46,1.5,2\n", r"trace\.csv:2: cannot read .*whole numbers"),
        (HEADER + ROWS + "2023-11-16 18:15:51,1\n", r"trace\.csv:4: cannot read '2023-11-16 18:15:51,1'"),
        (HEADER + ROWS + "2023-11-16 18:15:51,1,-2\n", r"trace\.csv:4: negative number of tokens in"),
        (HEADER + ROWS + "2023-11-16 18:15:49,1,2\n", r"trace\.csv:4: time goes backwards .*the file by TIMESTAMP"),
        (HEADER + "\n" + ROWS + "2023-11-16 18:15:49,1,2\n", r"trace\.csv:5: time goes backwards"),
        (TABLE + "0,1,1\nnan,1,1\n", r"trace\.csv:3: cannot read 'nan,1,1': arrival_time, .* should be a time in s"),
        (TABLE + "inf,1,1\n", r"trace\.csv:2: cannot read"),
        (TABLE + "0,1,\n", r"trace\.csv:2: cannot read '0,1,'"),
        (TABLE + "0,1,inf\n", r"trace\.csv:2: cannot read '0,1,inf'"),
        (BURSTGPT + "5,,1,GPT-4,3,0,3,API log\n", r"trace\.csv holds failed requests only \(1\)"),
        (b"\x93NUMPY\x01", r"trace\.csv is a NumPy array: save a table"),
    ],
)
def test_bad_content(write, content, message):
    with pytest.raises(UserError, match=message) as raised:
        read_trace(write(content))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", r"trace\.jsonl is empty: give a file with the columns of one of"),
        (jsonl(mooncake(0)) + "{]\n", r"trace\.jsonl:2: '\{\]' is not JSON: write one object per line"),
        ("[1, 2]\n", r"trace\.jsonl:1: '\[1, 2\]' is not a JSON object"),
        (jsonl({"timestamp": 0}), r"trace\.jsonl: .* \(Mooncake lacks input_length, output_length\)"),
        (
            jsonl(mooncake(0)) + "\n" + jsonl({"timestamp": 1}),
            r"trace\.jsonl:3: cannot read '1,None,None': .* a time in ms",
        ),
        # Seconds, under the same keys: read as milliseconds they would be off by a thousand.
        (jsonl(mooncake(0), mooncake("1")), r"trace\.jsonl:2: cannot read '1,10,5'"),
        (jsonl(mooncake(0, prompt=None)), r"trace\.jsonl:1: cannot read '0,None,5'"),
        (jsonl(mooncake(0, prompt=[[1]])), r"trace\.jsonl:1: cannot read"),
        (jsonl(mooncake(0, output=10**400)), r"trace\.jsonl:1: cannot read .*\.\.\.'"),
        (jsonl(mooncake(0, output=-1)), r"trace\.jsonl:1: negative number of tokens in '0,10,-1'"),
        (jsonl(mooncake(0), mooncake(0, ids=[True])), r"jsonl:2: hash_ids is '\[True\]': it should be a list of whole"),
        (
            jsonl(mooncake(0, ids=[0.5])),
            r"jsonl:1: hash_ids is '\[0\.5\]': it should .* one per block of 512 tokens; cor",
        ),
        (jsonl(mooncake(0, ids=[2**63])), r"jsonl:1: hash_ids is '\[9223372036854775808\]': it should be a list"),
        (jsonl(mooncake(0) | {"hash_ids": 7}), r"jsonl:1: hash_ids is '7': it should be a list of whole numbers"),
        (jsonl(mooncake(0)) + jsonl({"timestamp": 0, "input_length": 1, "output_length": 1}), r"hash_ids is 'None'"),
        (jsonl(mooncake(0, ids=[])), r"jsonl:1: hash_ids has 0 ids, and 10 prompt tokens are 1 blocks of 512"),
        (jsonl(mooncake(0, 512), mooncake(0, 512, 5, [0, 1])), r"jsonl:2: hash_ids has 2 ids, and 512 prompt tokens"),
        (jsonl(mooncake(2), mooncake(1)), r"trace\.jsonl:2: time goes backwards in '1,10,5': sort the file by time"),
    ],
)
def test_bad_json(write, content, message):
    with pytest.raises(UserError, match=message) as raised:
        read_trace(write(content, "trace.jsonl"))
    assert "\n" not in str(raised.value)


def test_every_format_is_listed_where_none_fits(write):
    with pytest.raises(UserError) as raised:
        read_trace(write("a;b\n"))
    for format in FORMATS:
        assert f"{format.name}: {', '.join(format.columns)}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.csv.gz", (HEADER + ROWS).encode()),
        ("trace.csv.gz", gzip.compress((HEADER + ROWS).encode(), mtime=0)[:-9]),
        ("trace.csv.gz", gzip.compress((HEADER + ROWS).encode(), mtime=0)[:30] + b"damaged" * 9),
        ("trace.jsonl.gz", jsonl(mooncake(0)).encode()),
    ],
)
def test_not_a_complete_gzip_file(write, name, content):
    with pytest.raises(UserError, match=r"named \.gz and is not a complete gzip file .*rename it or fetch it again"):
        read_trace(write(content, name))


def test_bad_parquet(write, tmp_path, monkeypatch):
    frame = pd.DataFrame({"arrival_time": [0.0, 1.0], "prompt_tokens": [1, 1], "output_tokens": [2, -2]})
    path = tmp_path / "trace.parquet"
    frame.to_parquet(path)
    with pytest.raises(UserError, match=r"trace\.parquet, row 2: negative number of tokens in '1\.0,1,-2'"):
        read_trace(path)
    frame.assign(output_tokens=["few", "many"]).to_parquet(path)
    with pytest.raises(UserError, match=r"trace\.parquet, row 1: cannot read '0\.0,1,few'"):
        read_trace(path)
    frame.rename(columns={"arrival_time": "time"}).to_parquet(path)
    with pytest.raises(UserError, match=r"trace\.parquet: columns of no known .* \(table lacks arrival_time\)"):
        read_trace(path)
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable Parquet file"):
        read_trace(write("no", "broken.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pandas and pyarrow: install them with pip install 'jaxroute\[data\]'"):
        read_trace(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist or is not a file: check the path"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is not a file"):
        read_trace(tmp_path)


# --- statistics -----------------------------------------------------------------------------------------------


def test_a_worked_example():
    times = np.array([0.0, 0.5, 1.0, 2.5, 3.0, 7.0])
    counts, number = window_counts(times, 2.0)
    np.testing.assert_array_equal(counts, [3, 2])  # the window from 4 to 6 s is empty, that from 6 s not full
    assert number == 3
    # Mean 5/3; squares (4/3)^2 + (1/3)^2 + (5/3)^2 = 42/9, over 2.
    assert fano_factor(times, 2.0) == (pytest.approx(42 / 9 / 2 / (5 / 3)), 3)
    assert np.isnan(fano_factor(times, 4.0)[0])  # one window
    assert gap_variation(times) == pytest.approx(np.std([0.5, 0.5, 1.5, 0.5, 4.0]) / 1.4)


def test_a_sparse_trace_needs_no_memory_for_its_empty_windows():
    factor, number = fano_factor(np.array([0.0, 1.0, 1e12]), 1.0)
    assert number == 10**12
    assert factor == pytest.approx(1.0)


# --- published data -------------------------------------------------------------------------------------------


def test_azure_conversations(data_dir):
    start = time.process_time()
    trace = read_trace(data_dir / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert time.process_time() - start < 1
    times, prompt, output = trace.arrival_time, trace.prompt_tokens, trace.output_tokens
    assert len(times) == 19366
    assert times[-1] == pytest.approx(3502, abs=1)
    assert (len(times) - 1) / times[-1] == pytest.approx(5.53, abs=0.005)
    assert gap_variation(times) == pytest.approx(1.09, abs=0.005)
    assert prompt.mean() == pytest.approx(1155, abs=1)
    np.testing.assert_array_equal(np.percentile(prompt, (50, 95)), [1020, 4083])
    assert output.mean() == pytest.approx(211, abs=1)
    np.testing.assert_array_equal(np.percentile(output, (50, 95, 99)), [129, 451, 601])
    minutes, number = window_counts(times, 60.0)
    assert (number, minutes.min(), minutes.max()) == (58, 191, 507)
    assert fano_factor(times, 60.0)[0] == pytest.approx(16.4, abs=0.05)
    # The last, partial minute would pass for a slump: 37 requests in 22 s.
    partial = np.bincount((times / 60).astype(int))
    assert (len(partial), partial[-1]) == (59, 37)
    assert partial.var() / partial.mean() == pytest.approx(20.6, abs=0.05)

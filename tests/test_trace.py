"""Reader of recorded traces: what it returns, and the message for every kind of bad file."""

import gzip
import time

import numpy as np
import pytest

from jaxroute.errors import UserError
from jaxroute.workloads.trace import read_azure_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROWS = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def test_values_and_types(write):
    trace = read_azure_trace(write(HEADER + ROWS))
    assert trace.arrival_time.dtype == np.float64
    np.testing.assert_allclose(trace.arrival_time, [0, 4.314579], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(trace.prompt_tokens, [374, 396])
    np.testing.assert_array_equal(trace.output_tokens, [44, 109])


def test_hundred_nanoseconds_survive_an_hour(write):
    rows = "2023-11-16 18:00:00.0000001,1,1\n2023-11-16 19:00:00.0000002,1,1\n"
    assert read_azure_trace(write(HEADER + rows)).arrival_time[1] == pytest.approx(3600.0000001, abs=1e-9)


def test_gzip_windows_line_ends_and_a_byte_order_mark(write):
    plain = read_azure_trace(write(HEADER + ROWS))
    content = ("\ufeff" + HEADER + ROWS + "\n").replace("\n", "\r\n").encode()
    for other in (write(content), write(gzip.compress(content), "trace.csv.gz")):
        for a, b in zip(plain, read_azure_trace(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_columns_in_any_order(write):
    trace = read_azure_trace(write("id,GeneratedTokens,TIMESTAMP,ContextTokens\n9,44,2023-11-16 18:15:46,374\n"))
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (374, 44)


def test_requests_at_the_same_time_are_fine(write):
    row = "2023-11-16 18:15:46.6805900,374,44\n"
    np.testing.assert_array_equal(read_azure_trace(write(HEADER + row + row)).arrival_time, [0, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"trace\.csv is empty: give a CSV file with the columns TIMESTAMP"),
        (HEADER, r"trace\.csv has a header and no requests"),
        ("TIMESTAMP,Tokens\n", r"trace\.csv:1: no column ContextTokens, GeneratedTokens in the header"),
        ("1,2,3\n", r"no column TIMESTAMP, ContextTokens, GeneratedTokens in the header '1,2,3'"),
        (HEADER + ROWS + "yesterday,1,2\n", r"trace\.csv:4: cannot read 'yesterday,1,2': expected a time like"),
        (HEADER + "12345,1,2\n", r"trace\.csv:2: cannot read '12345,1,2'"),
        (HEADER + "2023-13-16 18:15:46,1,2\n", r"trace\.csv:2: cannot read"),
        (HEADER + "2023-11-16 18:15:46,many,2\n", r"trace\.csv:2: cannot read '2023-11-16 18:15:46,many,2'"),
        (HEADER + "2023-11-16 18:15:46,1.5,2\n", r"trace\.csv:2: cannot read .*whole numbers"),
        (HEADER + ROWS + "2023-11-16 18:15:51,1\n", r"trace\.csv:4: cannot read '2023-11-16 18:15:51,1'"),
        (HEADER + ROWS + "2023-11-16 18:15:51,1,-2\n", r"trace\.csv:4: negative number of tokens in"),
        (HEADER + ROWS + "2023-11-16 18:15:49,1,2\n", r"trace\.csv:4: time goes backwards .*sort the file"),
        (HEADER + "\n" + ROWS + "2023-11-16 18:15:49,1,2\n", r"trace\.csv:5: time goes backwards"),
        (gzip.compress(b"x", mtime=0), r"trace\.csv is not text: .*name it \.gz"),
    ],
)
def test_bad_content(write, content, message):
    with pytest.raises(UserError, match=message) as raised:
        read_azure_trace(write(content))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [(HEADER + ROWS).encode(), gzip.compress((HEADER + ROWS).encode(), mtime=0)[:-9]])
def test_not_a_complete_gzip_file(write, content):
    with pytest.raises(UserError, match=r"named \.gz and is not a complete gzip file .*rename it to \.csv"):
        read_azure_trace(write(content, "trace.csv.gz"))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist or is not a file: check the path"):
        read_azure_trace(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is not a file"):
        read_azure_trace(tmp_path)


def test_azure_conversations(data_dir):
    start = time.process_time()
    trace = read_azure_trace(data_dir / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert time.process_time() - start < 1
    assert len(trace.arrival_time) == 19366
    assert trace.arrival_time[-1] == pytest.approx(3502, abs=1)
    assert trace.prompt_tokens.mean() == pytest.approx(1155, abs=1)
    assert trace.output_tokens.mean() == pytest.approx(211, abs=1)

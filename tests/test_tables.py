"""The reader of tables: every shape of a file gives the same rows, what is no table is refused in one line."""

import csv
import tracemalloc

import pyarrow.parquet
import pytest
from shapes import check_reads_every_shape, check_refuses_every_broken_file, csv_text, json_lines

from jaxroute.banks.evaluations import read_evaluation
from jaxroute.errors import UserError
from jaxroute.files import complete_folder, shown, write_file
from jaxroute.fitting import Limits, fit_profile, read_log
from jaxroute.tables import open_table
from jaxroute.workloads import read_trace

ROWS = [{"first_name": 1.5, "b": 10 * number, "c": number % 3} for number in range(40)]


def read(path):
    with open_table(path, "numbers") as table:
        names = [table.find("first_name"), table.find("no", "b"), table.find("c")]
        if None in names:
            raise UserError(f"{path} lacks columns")
        rows = [(place, tuple(map(float, cells))) for place, cells in table.rows(names)]
        if not rows:
            raise UserError(f"{path} has no rows")
    return [cells for _, cells in rows]


# The table of each reader, with a number for {}.
READERS = {
    "log": (read_log, "queued_ts;first_token_ts;last_token_ts;input_toks;output_toks", "{};1;2;5;7"),
    "profile": (lambda path: fit_profile(path, Limits()), "batch;context;prompt;ms", "1;100;0;{}"),
    "trace": (read_trace, "arrival_time;prompt_tokens;output_tokens", "{};5;7"),
    "evaluation": (read_evaluation, "prompt;model;quality;output_tokens", "why?;a;{};7"),
}


@pytest.mark.parametrize("number", ["0,5", "-1.234,5", "1,234,567.8", ",5e-3"])
@pytest.mark.parametrize("reader", READERS)
def test_numbers_with_commas_get_advice(tmp_path, reader, number):
    read_table, header, row = READERS[reader]
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{row.format('0.5')}\n{row.format(number)}\n")
    with pytest.raises(UserError, match=r"t\.csv:3: .*write numbers with a decimal point and no commas, such as 0\.5$"):
        read_table(path)
    path.write_text(f"{header}\n{row.format('0.5')}\n{row.format('a,b')}\n")
    with pytest.raises(UserError, match=r"t\.csv:3: .*correct|number from 0 to 1"):
        read_table(path)


def test_every_shape(tmp_path):
    check_reads_every_shape(tmp_path, ROWS, read)


def test_every_broken_file(tmp_path):
    check_refuses_every_broken_file(tmp_path, ROWS, read)


def test_places_are_first_lines_and_rows(tmp_path):
    (tmp_path / "t.csv").write_text('\na,b\n"1\n2",x\n\n3,y\n')
    with open_table(tmp_path / "t.csv", "") as table:
        assert [(table.where(place).rpartition(":")[2], cells) for place, cells in table.rows(["b", "a"])] == [
            ("3", ("x", "1\n2")),
            ("6", ("y", "3")),
        ]
    (tmp_path / "t.json").write_text('[{"a": 1},\n {"a": 2}]')
    with open_table(tmp_path / "t.json", "") as table:
        assert [table.where(place) for place, _ in table.rows(["a"])] == [
            f"{tmp_path / 't.json'}, row 1",
            f"{tmp_path / 't.json'}, row 2",
        ]


def test_names_fit_in_spite_of_case_and_spaces_and_the_exact_one_first(tmp_path):
    (tmp_path / "t.csv").write_text("Prompt Tokens,time,TIME, Output-Tokens \n1,2,3,4\n")
    with open_table(tmp_path / "t.csv", "") as table:
        assert table.find("prompt_tokens") == "Prompt Tokens"
        assert table.find("TIME") == "TIME"
        assert table.find("nothing", "output_tokens") == "Output-Tokens"
        assert table.find("nothing") is None
        with pytest.raises(UserError, match="has the column 'Time' 2 times"):
            table.find("Time")


def test_keys_of_json_may_begin_later_and_be_absent(tmp_path):
    (tmp_path / "t.jsonl").write_text(json_lines([{"a": 1}, {"b": 2, "a": None}, {}]))
    with open_table(tmp_path / "t.jsonl", "") as table:
        assert table.names == ["a", "b"]
        assert [cells for _, cells in table.rows(["b", "a"])] == [(None, 1), (2, None), (None, None)]


def test_spaces_after_separators_belong_to_the_header_only_if_it_has_them(tmp_path):
    (tmp_path / "t.csv").write_text('a, b\n1, "x, y"\n')
    with open_table(tmp_path / "t.csv", "") as table:
        assert next(table.rows(["b"]))[1] == ("x, y",)
    (tmp_path / "t.csv").write_text("a,b\n1, x\n")
    with open_table(tmp_path / "t.csv", "") as table:
        assert next(table.rows(["b"]))[1] == (" x",)


def test_the_limit_on_cells_is_left_as_it_was(tmp_path):
    (tmp_path / "t.csv").write_text(csv_text([{"a": "x" * 200_000}] * 3))
    limit = csv.field_size_limit()
    with open_table(tmp_path / "t.csv", "") as table:
        for _ in table.chunks(["a"], size=1):
            assert csv.field_size_limit() == limit
    (tmp_path / "t.csv").write_text('a\n1\n"2\n')
    with open_table(tmp_path / "t.csv", "") as table, pytest.raises(UserError, match="a quote is not closed"):
        list(table.rows(["a"]))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_are_read_as_they_are_asked_for(tmp_path, kind):
    rows = [{"a": number, "note": "x" * 1000} for number in range(12_000)]
    (tmp_path / f"t.{kind}").write_text(csv_text(rows) if kind == "csv" else json_lines(rows))
    tracemalloc.start()
    with open_table(tmp_path / f"t.{kind}", "") as table:
        assert sum(int(cells[0]) for _, cells in table.rows(["a"])) == sum(range(12_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / f"t.{kind}").stat().st_size / 2


def test_text_of_parquet_that_is_no_unicode_names_its_row(tmp_path):
    damaged = pyarrow.array([b"a", b"b", b"\xff"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, damaged.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "t.parquet")
    with (
        open_table(tmp_path / "t.parquet", "") as table,
        pytest.raises(UserError, match=r"t\.parquet, row 3: a is not UTF-8 text"),
    ):
        list(table.chunks(["a"], size=2))


def test_unreadable(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("a\n1\n")
    monkeypatch.setattr(
        "pathlib.Path.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with (
        pytest.raises(UserError, match=r"t\.csv cannot be read \(Permission denied\): check its permissions"),
        open_table(tmp_path / "t.csv", ""),
    ):
        pass


# --- files ----------------------------------------------------------------------------------------------------


def test_a_file_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    path = write_file(tmp_path / "new" / "t.txt", "ü")
    assert path.read_bytes() == "ü".encode()
    assert write_file(path, b"\x00").read_bytes() == b"\x00"

    def disk_full(path, content):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", disk_full)
    with pytest.raises(UserError, match=r"t\.txt cannot be written \(No space left on device\): choose another place"):
        write_file(path, "other")
    assert [file.name for file in path.parent.iterdir()] == ["t.txt"]
    assert path.read_bytes() == b"\x00"


def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(UserError, match=r"exists already: choose another place, or remove it$"):
        complete_folder(tmp_path).__enter__()


def test_a_file_below_a_file(tmp_path):
    (tmp_path / "t").write_text("")
    for write in (lambda path: write_file(path, ""), lambda path: complete_folder(path).__enter__()):
        with pytest.raises(UserError, match=r"t/x cannot be written \("):
            write(tmp_path / "t" / "x")


def test_rows_are_shown_on_one_line_without_control_characters():
    assert shown(["a\n b", 1, None]) == "'a b,1,None'"
    assert shown("a\x00\x1b[31m\ud800") == r"'a\x00\x1b[31m\ud800'"
    assert shown("x" * 101) == "'" + "x" * 100 + "...'"

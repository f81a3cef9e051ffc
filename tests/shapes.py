"""Every shape of a file in which a table may come: whatever reads tables passes both checks, in one line each."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle

import numpy as np
import pandas as pd
import pytest

from jaxroute.errors import UserError

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")
LONG = "x" * 200_000  # csv's own limit is 131,072


def csv_text(rows, separator=",", newline="\n", **options):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=newline, **options)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return text.getvalue()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def shapes(rows):
    """Name and content of every file that holds these rows."""
    for separator, name, (ending, compress), encoding in itertools.product(
        ",;\t|", ("t.csv", "T.CSV", "t.tsv", "t.txt", "t"), COMPRESSIONS.items(), ENCODINGS
    ):
        yield f"{name}{ending}", compress(csv_text(rows, separator).encode(encoding))
    for (ending, compress), encoding in itertools.product(COMPRESSIONS.items(), ENCODINGS):
        for name in ("t.jsonl", "T.JSONL", "t.ndjson", "t.json", "t"):
            yield f"{name}{ending}", compress(json_lines(rows).encode(encoding))
        for name, text in (
            ("array.json", json.dumps(rows)),
            ("pretty.json", json.dumps(rows, indent=2)),
            ("one_after_the_other.json", "\n".join(json.dumps(row, indent=2) for row in rows)),
        ):
            yield f"{name}{ending}", compress(text.encode(encoding))
    for name in ("t.parquet", "T.PARQUET", "t"):
        yield name, parquet(pd.DataFrame(rows))
    yield "compressed_without_saying_so.csv", gzip.compress(csv_text(rows).encode())
    header, _, body = csv_text(rows).partition("\n")
    names = header.split(",")
    for what, text in {
        "windows": csv_text(rows, newline="\r\n"),
        "old_mac": csv_text(rows, newline="\r"),
        "blank_first_lines": f"\n  \n{header}\n{body}",
        "blank_last_lines": f"{header}\n{body}\n\n{',' * (len(names) - 1)}\n  \n",
        "no_newline_at_the_end": f"{header}\n{body}".rstrip("\n"),
        "quoted": csv_text(rows, quoting=csv.QUOTE_ALL),
        "spaces_around_names": f"{' , '.join(names)}\n{body}",
        "quotes_around_names": f"{','.join(map(repr, names))}\n{body}",
        "upper_case": f"{header.upper()}\n{body}",
        "spaces_within_names": f"{header.replace('_', ' ')}\n{body}",
        "separator_declared": "sep=;\n" + csv_text(rows, ";"),
        "separator_at_the_end": "".join(f"{line}\n" for line in [header + ",", *body.replace("\n", ",\n").split("\n")]),
        "index": csv_text([{"": number, **row} for number, row in enumerate(rows)]),
        "long_cells": csv_text([{"note": LONG, **row} for row in rows]),
        "lines_in_cells": csv_text([{"note": 'a\n"b",\r\nc', **row} for row in rows]),
        "columns_in_another_order": csv_text([dict(reversed(row.items())) for row in rows]),
    }.items():
        yield f"{what}.csv", text.encode()
    for what, text in {
        "blank_lines": "\n" + json_lines(rows).replace("\n", "\n \n"),
        "more_keys": json_lines([{"note": [{"a": None}], **row} for row in rows]),
        "line_separator_in_text": json_lines([{"note": "a\u2028b\x85", **row} for row in rows]),
    }.items():
        yield f"{what}.jsonl", text.encode()
    yield "own_index.parquet", parquet(pd.DataFrame(rows).set_index(pd.Index(range(7, 7 + len(rows)))))


def parquet(frame):
    content = io.BytesIO()
    frame.to_parquet(content)
    return content.getvalue()


def check_reads_every_shape(folder, rows, read):
    """What `read(path)` returns is the same for every shape of a file with these rows of numbers and one-line texts."""
    (folder / "plain.csv").write_text(csv_text(rows))
    expected = read(folder / "plain.csv")
    for name, content in shapes(rows):
        path = folder / name
        path.write_bytes(content)
        try:
            np.testing.assert_equal(read(path), expected)
        except Exception as error:
            raise AssertionError(f"{name} {content[:60]!r}: {error}") from error
        path.unlink()


def check_refuses_every_broken_file(folder, rows, read):
    """Every broken file ends `read(path)` with one line that names the file and, where there is one, the line."""
    plain = csv_text(rows)
    cells = plain.split("\n")
    packed = gzip.compress(plain.encode(), mtime=0)
    for name, content, message in (
        ("none.csv", None, "does not exist"),
        ("empty.csv", b"", "is empty"),
        ("blank.csv", b"\n \n\n", "is empty"),
        ("bom.csv", b"\xef\xbb\xbf", "is empty"),
        ("empty.csv.gz", gzip.compress(b""), "is empty"),
        ("header.csv", f"{cells[0]}\n".encode(), "has (no|0) "),
        ("short.csv", "\n".join([*cells[:2], cells[2].rpartition(",")[0], *cells[3:]]).encode(), r"short\.csv:3: "),
        ("long.csv", "\n".join([*cells[:2], f"{cells[2]},1", *cells[3:]]).encode(), r"long\.csv:3: "),
        ("quote.csv", "\n".join([*cells[:2], f'"{cells[2]}', *cells[3:]]).encode(), r"quote\.csv:\d+: .*quote"),
        ("latin.csv", plain.encode() + "Zürich\n".encode("latin-1"), rf"latin\.csv:{len(cells)}: .*not UTF-8"),
        ("latin.jsonl", json_lines(rows).encode() + b'{"a": "\xfc"}', rf"latin\.jsonl:{len(rows) + 1}: .*not UTF-8"),
        ("no_mark.csv", plain.encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("odd.csv", plain.encode("utf-16") + b"x", "UTF-16 text"),
        ("twice.csv", csv_text([{**row, f" {next(iter(row))}": 1} for row in rows]).encode(), "2 times"),
        ("cut.csv.gz", packed[:-9], r"cut\.csv\.gz .*not a complete gzip file"),
        ("cut.csv", packed[:-9], r"cut\.csv is not a complete gzip file"),
        ("cut.csv.xz", lzma.compress(plain.encode())[:-9], "not a complete xz file"),
        ("plain.csv.bz2", plain.encode(), "not a complete bzip2 file"),
        ("broken.jsonl", (json_lines(rows) + "{]\n").encode(), rf"broken\.jsonl:{len(rows) + 1}: '{{\]' is not JSON"),
        (
            "array.jsonl",
            (json_lines(rows) + "[1]\n").encode(),
            rf"array\.jsonl:{len(rows) + 1}: '\[1\]' is not a JSON",
        ),
        ("cut.json", json.dumps(rows, indent=1)[:-3].encode(), r"cut\.json:\d+: .* is not JSON"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
        ("no.parquet", b"no", "not a readable Parquet file"),
        ("cut.parquet", parquet(pd.DataFrame(rows))[:-9], "not a readable Parquet file"),
        ("t.parquet.gz", gzip.compress(parquet(pd.DataFrame(rows))), "compressed Parquet"),
        ("t.xlsx", b"PK\x03\x04" + bytes(40), "spreadsheet"),
        ("t.zip", b"PK\x03\x04" + bytes(40), "ZIP archive"),
        ("t.csv.zst", b"\x28\xb5\x2f\xfd" + bytes(40), "zstd"),
        ("t.pkl", pickle.dumps(rows), "pickle"),
        ("t.pkl.gz", gzip.compress(pickle.dumps(rows)), "pickle"),
        ("lfs.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ):
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            read(path)
        assert str(raised.value).startswith(str(path)), name
        assert str(raised.value).isprintable(), name
    with pytest.raises(UserError):
        read(folder)

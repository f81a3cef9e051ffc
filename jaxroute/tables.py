"""One reader of tables for traces, serving logs and answers: CSV in its dialects, JSON Lines, JSON and Parquet.

What a file is, its content says rather than its name: the format, the separator, the compression and the encoding.
Rows are read as they are asked for, so that a table may be larger than memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxroute.errors import UserError
from jaxroute.files import shown

_ROWS = 1 << 17  # of a chunk
_SAMPLE = 1000  # rows of JSON whose keys are the columns: a key may be absent from the first
_LONGEST_CELL = 2**31 - 1  # characters; csv would refuse prompts longer than 131,072
_HEAD = 1 << 12  # bytes that tell what a file is
_SEPARATORS = ",;\t|"

_OPENERS: dict[str, tuple[bytes, Callable[[Path, str], Any]]] = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\x00", lzma.open),
}
_COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
# The longer marks first: UTF-32's begins like UTF-16's.
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_REFUSED = {
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet: unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet or another Office file: save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it, or use gzip",
    b"\x89HDF": "is an HDF5 file: save the table as CSV or Parquet",
    b"ARROW1": "is an Arrow or Feather file: save the table as Parquet",
    b"\x93NUMPY": "is a NumPy array: save a table with named columns as CSV or Parquet",
    b"SQLite format 3": "is an SQLite database: save the table as CSV",
    b":::MLLOG": "is MLPerf LoadGen's log, without token counts: give a table with a row per request",
    b"version https://git-lfs": "is a Git LFS pointer, not the table: fetch it with git lfs pull",
}  # fmt: skip


class Chunk(NamedTuple):
    """Some rows of a table, in the order of the file."""

    places: list[int]
    """Where each row is; `TableReader.where` says it in words."""
    cells: list[tuple[Any, ...]]
    """Per row its cells in the order of the columns asked for: text in CSV, values in JSON and Parquet, None where
    JSON lacks the key or Parquet the value."""


class TableReader:
    """An open table, read once from its first row to its last.

    Attributes:
        path: the file.
        kind: "csv", "json" or "parquet".
        names: of the columns, without spaces and quotes around them; in JSON the keys of the first rows.
        counted: what a row's place counts, "line" or "row".

    """

    def __init__(
        self,
        path: Path,
        kind: str,
        names: Sequence[str],
        read: Callable[[Sequence[str], int], Iterator[Chunk]],
        counted: str = "line",
    ) -> None:
        self.path, self.kind, self.names = path, kind, list(names)
        self.counted, self._read = counted, read

    def find(self, *names: str) -> str | None:
        """Return the column that has one of these names, the first that is there, or None.

        Case, and spaces, hyphens and underscores between words, count only where two columns differ in nothing else.

        Raises:
            UserError: the name fits two columns alike.
        """
        for name in names:
            for same in (lambda text: text, _plain):
                found = [known for known in self.names if same(known) == same(name)]
                if len(found) > 1:
                    raise UserError(f"{self.path} has the column '{name}' {len(found)} times: keep one of them")
                if found:
                    return found[0]
        return None

    def chunks(self, names: Sequence[str], size: int = _ROWS) -> Iterator[Chunk]:
        """Read the columns with these names, as `names` or `find` give them; blank rows are left out.

        Args:
            names: columns of the table.
            size: the most rows of a chunk.

        Yields:
            The rows in their order.

        Raises:
            UserError: a row cannot be read, or has more or fewer cells than the header.
        """
        return self._read(names, size)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Read the columns with these names row by row: its place, and its cells in this order."""
        for places, cells in self.chunks(names):
            yield from zip(places, cells, strict=True)

    def where(self, place: int) -> str:
        """Say in words where a row is: `log.csv:12` for its first line, or `log.parquet, row 11`."""
        return f"{self.path}:{place}" if self.counted == "line" else f"{self.path}, row {place}"


@contextmanager
def open_table(path: str | Path, expected: str) -> Iterator[TableReader]:
    """Open a table whatever its format, its separator, its compression and its encoding.

    Args:
        path: CSV with commas, semicolons, tabs or bars; JSON Lines; JSON, an array of objects or one after the other;
            Parquet. All but Parquet may be compressed with gzip, bzip2 or xz. Text is UTF-8, or begins with a byte
            order mark.
        expected: what the file should hold, to complete "give a file with ...".

    Yields:
        The table.

    Raises:
        UserError: there is no such file, it is no table, or it is empty.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder and is not a file" if path.is_dir() else "does not exist or is not a file"
        raise UserError(f"{path} {what}: check the path, and give a file with {expected}")
    with _opening(path):
        with path.open("rb") as raw:
            head = raw.read(_HEAD)
        packed = next((name for name, (magic, _) in _OPENERS.items() if head.startswith(magic)), None)
        promised = _COMPRESSED.get(path.suffix.lower())
        if promised and promised != packed:
            raise UserError(
                f"{path} is named {path.suffix} and is not a complete {promised} file (it begins otherwise): "
                "rename it or fetch it again"
            )
        opener: Callable[[Path, str], Any] = _OPENERS[packed][1] if packed else open
        if packed:
            head = _checked_head(path, opener, packed)
    _refuse_what_is_no_table(path, head)
    suffix = Path(path.stem).suffix.lower() if promised else path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        if packed:
            raise UserError(f"{path} is a compressed Parquet file: decompress it, Parquet is compressed by itself")
        with _parquet_file(path) as file:
            yield _parquet_table(path, file)
        return
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and head.count(0) * 4 > len(head):
        raise UserError(f"{path} is not text, or UTF-16 without a byte order mark: save it as UTF-8")
    with _opening(path):
        stream = io.TextIOWrapper(opener(path, "rb"), encoding=encoding, newline="")
    with stream:
        yield _text_table(_Text(path, encoding, stream, lambda: opener(path, "rb")), suffix, expected)


# --- what a file is -----------------------------------------------------------------------------------------


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions")


def _checked_head(path: Path, opener: Callable[[Path, str], IO[bytes]], packed: str) -> bytes:
    """Decompress a file to its end, once, and return its beginning: damage in the middle would look like bad rows."""
    try:
        with opener(path, "rb") as content:
            head = content.read(_HEAD)
            while content.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path} is named {path.suffix} and is not a complete {packed} file ({error}): rename it or fetch it again"
            if path.suffix.lower() in _COMPRESSED
            else f"{path} is not a complete {packed} file ({error}): fetch it again"
        ) from error
    return head


def _refuse_what_is_no_table(path: Path, head: bytes) -> None:
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} {what}")
    # Two early protocols have no mark.
    if re.match(rb"\x80[\x02-\x05]", head) or {".pkl", ".pickle"} & set(map(str.lower, path.suffixes)):
        raise UserError(
            f"{path} is a Python pickle, which can run any code when it is read: save the table as CSV or Parquet"
        )


def _plain(name: str) -> str:
    """Reduce a column's name to what tells it from others."""
    return re.sub(r"[\s_-]+", "_", name.strip(" \t\r\n\"'")).casefold()


# --- text ---------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    """A text file that is being read."""

    path: Path
    encoding: str
    lines: IO[str]
    reopen: Callable[[], IO[bytes]]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Report what can go wrong in a line. Not a generator around the lines, which would cost a tenth more."""
        try:
            yield
        except UnicodeDecodeError as error:
            if self.encoding != "utf-8-sig":
                raise UserError(f"{self.path} is not sound {self.encoding.upper()} text: save it as UTF-8") from error
            # Text is decoded in blocks, so that the error does not know its line.
            with self.reopen() as raw:
                number, line = next((number, line) for number, line in enumerate(raw, 1) if not _is_utf8(line))
            raise UserError(
                f"{self.path}:{number}: {shown(line.decode(errors='replace'))} is not UTF-8 text: "
                "save the file as UTF-8"
            ) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text_table(text: _Text, suffix: str, expected: str) -> TableReader:
    with text.reading():
        # Blank lines above the table are no part of it.
        skipped, first = next(((number, line) for number, line in enumerate(text.lines) if line.strip()), (0, ""))
        if not first:
            raise UserError(f"{text.path} is empty: give a file with {expected}")
        is_json = first.lstrip()[0] in "{[" or suffix in (".json", ".jsonl", ".ndjson")
        return (_json_table if is_json else _csv_table)(text, first, skipped)


def _csv_table(text: _Text, first: str, skipped: int) -> TableReader:
    path, separators = text.path, _SEPARATORS
    if declared := re.fullmatch(r"sep=(.)\s*", first):  # as Excel writes it
        separators, skipped = declared[1], skipped + 1
        first = next(text.lines, "\n")
    with _long_cells():
        headers = {mark: next(csv.reader([first], delimiter=mark)) for mark in separators}
    separator, header = max(headers.items(), key=lambda item: len(item[1]))
    reader = csv.reader(
        itertools.chain([first], text.lines),
        delimiter=separator,
        skipinitialspace=any(cell.startswith(" ") for cell in header[1:]),
        strict=True,
    )

    @contextmanager
    def reading() -> Iterator[None]:
        try:
            with _long_cells(), text.reading():
                yield
        except csv.Error as error:
            reason = "a quote is not closed" if "end of data" in str(error) else str(error)
            raise UserError(
                f"{path}:{skipped + reader.line_num}: is no row of a CSV file ({reason}): correct or delete it"
            ) from error

    with reading():
        names = [name.strip(" \t\r\n'\"") for name in next(reader)]

    def read(chosen: Sequence[str], size: int) -> Iterator[Chunk]:
        width, columns = len(names), [names.index(name) for name in chosen]
        pick = itemgetter(*columns) if len(columns) > 1 else lambda row: tuple(row[column] for column in columns)
        more = True
        while more:
            places: list[int] = []
            cells: list[tuple[Any, ...]] = []
            more = False
            with reading():
                place = reader.line_num + skipped + 1
                for row in reader:
                    if len(row) != width and not _is_whole(row, width):
                        raise UserError(
                            f"{path}:{place}: cannot read {shown(row)}: it has {len(row)} cells where the header has "
                            f"{width}; correct or delete the row"
                        )
                    if len(row) >= width and any(row):
                        places.append(place)
                        cells.append(pick(row))
                        if len(cells) == size:
                            more = True
                            break
                    place = reader.line_num + skipped + 1
            if cells:
                yield Chunk(places, cells)

    return TableReader(path, "csv", names, read)


def _is_whole(row: list[str], width: int) -> bool:
    """Whether a row is blank, or has nothing in the cells beyond those of the header."""
    return not any(cell.strip() for cell in (row[width:] if len(row) > width else row))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let csv read cells of any length; its limit is the process's, so it is put back before others can meet it."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


# --- JSON ---------------------------------------------------------------------------------------------------


def _json_object(text: str, place: str) -> dict[str, Any]:
    """Read the object in a line of a JSON Lines file; `place` names the line in messages.

    Raises:
        UserError: it is something else.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {shown(text)} is not JSON: write one object per line") from error
    return _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{place}: {shown(json.dumps(row))} is not a JSON object: write one per line")
    return row


def _json_table(text: _Text, first: str, skipped: int) -> TableReader:
    try:
        value = json.loads(first)
        lined = not (isinstance(value, list) and all(isinstance(row, dict) for row in value))
    except (ValueError, RecursionError):
        lined = False
    objects = _json_lines(text, first, skipped) if lined else _json_values(text, first, skipped)
    sample = list(itertools.islice(objects, _SAMPLE))
    names = list(dict.fromkeys(key for _, row in sample for key in row))

    def read(chosen: Sequence[str], size: int) -> Iterator[Chunk]:
        rows = itertools.chain(sample, objects)
        while True:
            places: list[int] = []
            cells: list[tuple[Any, ...]] = []
            for place, row in itertools.islice(rows, size):
                places.append(place)
                cells.append(tuple(map(row.get, chosen)))
            if not cells:
                return
            yield Chunk(places, cells)

    return TableReader(text.path, "json", names, read, "line" if lined else "row")


def _json_lines(text: _Text, first: str, skipped: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with text.reading():
        for place, line in enumerate(itertools.chain([first], text.lines), skipped + 1):
            if not line.isspace():
                yield place, _json_object(line, f"{text.path}:{place}")


def _json_values(text: _Text, first: str, skipped: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects that stand in an array or one after the other, over as many lines as they like."""
    with text.reading():
        content = first + text.lines.read()
    decoder, number, position = json.JSONDecoder(), 0, _after_spaces(content, 0)
    while position < len(content):
        try:
            value, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            line = content.count("\n", 0, at)
            bad = shown(content.splitlines()[line]) if line < len(content.splitlines()) else "its end"
            raise UserError(
                f"{text.path}:{skipped + 1 + line}: {bad} is not JSON: write one object per line"
            ) from error
        for row in value if isinstance(value, list) else [value]:
            number += 1
            yield number, _object(row, f"{text.path}, row {number}")
        position = _after_spaces(content, position)


def _after_spaces(text: str, position: int) -> int:
    found = re.compile(r"\s*").match(text, position)
    assert found is not None
    return found.end()


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet_file(path: Path) -> Any:
    pandas_for(path)
    from pyarrow import parquet

    with reading_parquet(path):
        return parquet.ParquetFile(path)


def _parquet_table(path: Path, file: Any) -> TableReader:
    # pandas writes an index without a name under this one.
    names = [name for name in file.schema_arrow.names if not re.fullmatch(r"__index_level_\d+__", name)]

    def read(chosen: Sequence[str], size: int) -> Iterator[Chunk]:
        start = 1
        batches = file.iter_batches(batch_size=size, columns=list(dict.fromkeys(chosen)))
        while True:
            with reading_parquet(path):
                batch = next(batches, None)
                if batch is None:
                    return
                columns = [_parquet_values(path, name, batch.column(name), start) for name in chosen]
            if batch.num_rows:
                yield Chunk(list(range(start, start + batch.num_rows)), list(zip(*columns, strict=True)))
            start += batch.num_rows

    return TableReader(path, "parquet", names, read, "row")


def _parquet_values(path: Path, name: str, column: Any, start: int) -> list[Any]:
    """Values of some rows of a column, the first of which is row `start` of the table."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        for row, cell in enumerate(column, start):
            try:
                cell.as_py()
            except UnicodeDecodeError:
                raise UserError(f"{path}, row {row}: {name} is not UTF-8 text: correct or delete the row") from error
        raise  # unreachable: a column is its cells


def pandas_for(path: Path) -> Any:
    """Import pandas and pyarrow, with which it reads Parquet: only real tables need them.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        import pandas
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pandas and pyarrow: install them with pip install 'jaxroute[data]'"
        ) from error
    return pandas


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Report what keeps a Parquet file from being read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, NotImplementedError) as error:  # pyarrow's own derive from these
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason}): fetch it again") from error

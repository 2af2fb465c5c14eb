"""The rows of one file: `.jsonl`, `.ndjson` (also `.gz`), `.json`, `.csv`, `.parquet` and `.arrow`.

All but `.json` are streamed: memory holds one line, one CSV row, or one batch of Arrow rows. A bad row is handed on as
a DataError in its place, so that the reader goes on; a fault of the whole file is raised.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from schoolhouse.errors import DataError

Row = dict[str, Any] | DataError
LONGEST_LINE = 64 * 2**20
"""Bytes of the longest line of a `.jsonl` file, characters of the longest cell of a `.csv` file; a longer one is a bad
row, and is never held in memory as a whole."""


def kind(path: Path) -> str | None:
    """The suffix by which a file is read, None where it has no known one."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Every row of a file, with its line in a line-based file, else its position; `name` stands in errors."""
    if kind(path) in TABLES:
        arrow()  # what its import finds wrong is no fault of the file
    try:
        yield from READERS[kind(path)](path, name)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise DataError(
            f"the file cannot be read: {error}", required=f"a whole {kind(path)} file; texts in UTF-8", where=name,
            remedy="check that it was copied completely, its permissions, and its encoding",
        ) from None


def count(path: Path) -> int | None:
    """About how many rows a file has, where that is told without reading them; None elsewhere."""
    try:
        match kind(path):
            case ".jsonl" | ".ndjson":
                with path.open("rb") as file:
                    return sum(block.count(b"\n") for block in iter(functools.partial(file.read, 2**20), b""))
            case suffix if suffix in TABLES:
                return arrow().count(path)
    except (OSError, ValueError):
        return None  # whoever reads it will say what is wrong
    return None


def _jsonl(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """One object a line; a byte order mark, CRLF and blank lines are accepted."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, _row_of_line(line.rstrip(b"\r\n"), f"{name}:{number}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line; one that is too long comes with its beginning only."""
    while line := file.readline(LONGEST_LINE + 1):
        end = line
        while len(end) > LONGEST_LINE and not end.endswith(b"\n"):
            end = file.readline(LONGEST_LINE + 1)
        yield line


def _row_of_line(line: bytes, where: str) -> Row:
    """The object in a line, or what is wrong with it and at which character, counted from 1."""
    if len(line) > LONGEST_LINE:
        return _bad_line("the line is too long", where, required=f"at most {LONGEST_LINE // 2**20} MiB in a line")
    try:
        text = line.decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        return _bad_line(f"the byte {line[error.start]:#04x} is not UTF-8", f"{where}:{column}")
    except json.JSONDecodeError as error:
        return _bad_line(_reason(text, error), f"{where}:{error.colno}")
    except (ValueError, RecursionError) as error:  # a number of too many digits; nested too deeply
        return _bad_line(f"the JSON cannot be read: {error}", f"{where}:1")
    return value if isinstance(value, dict) else _bad_line(f"the line is no object: {text:.60}", f"{where}:1")


def _reason(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text):
        return f"the JSON ends too early: {error.msg}"
    if text[error.pos] == "\0":
        return "a NUL byte"
    return f"broken JSON: {error.msg} at {text[error.pos : error.pos + 20]!r}"


def _bad_line(found: str, where: str, required: str = "one JSON object in each line, in UTF-8") -> DataError:
    return DataError(found, required=required, where=where, remedy="mend or delete the line")


def _json(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """A list of objects, or an object that holds one list."""
    required, text = "a list of objects, or an object that holds one list of them", path.read_text("utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        raise DataError(
            _reason(text, error), required=required, where=f"{name}:{error.lineno}:{error.colno}",
            remedy="name the file .jsonl if each line is an object of its own" if lines else "mend the file",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the JSON cannot be read: {error}", required=required, where=name, remedy="mend the file",
        ) from None
    lists = [value] if isinstance(value, list) else []
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
    if len(lists) != 1:
        raise DataError(
            f"{len(lists)} lists of rows", required=required, where=name, remedy="keep one list, or use .jsonl",
        )
    for number, row in enumerate(lists[0], 1):
        yield number, row if isinstance(row, dict) else DataError(
            f"the row is no object: {row!r:.60}", required="an object", where=f"{name}:{number}",
            remedy="mend or delete the row",
        )


def _csv(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Comma-separated values under a header; cells may span lines, and stay text."""
    csv.field_size_limit(LONGEST_LINE)  # the csv module has no other way; its own limit is less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(
                f"a column stands twice in the header: {', '.join(header)}", required="each column once",
                where=f"{name}:1", remedy="rename or delete one of them",
            )
        number = 0
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                number, cells = number + 1, None
                yield number, _bad_cells(f"broken CSV: {error}", f"{name}:{begin}", header)
            if cells:  # a blank line has none
                number += 1
                yield number, _row_of_cells(cells, header, f"{name}:{begin}")


def _row_of_cells(cells: list[str], header: list[str], where: str) -> Row:
    if len(cells) != len(header):
        return _bad_cells(f"{len(cells)} cells", where, header)
    if any("\0" in cell for cell in cells):
        return _bad_cells("a NUL byte", where, header)
    return dict(zip(header, cells, strict=True))


def _bad_cells(found: str, where: str, header: list[str]) -> DataError:
    return DataError(
        found, required=f"{len(header)} cells, as in the header: {', '.join(header)}", where=where,
        remedy="mend the line; a cell with commas, quotes or line breaks stands in quotes",
    )


def arrow() -> ModuleType:
    """The reader of Arrow's tables; most runs need none of the 30 MiB that pyarrow takes."""
    from schoolhouse.data import arrow as tables

    return tables


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".jsonl.gz": _jsonl, ".ndjson.gz": _jsonl,
    ".json": _json, ".csv": _csv,
    ".parquet": lambda path, name: enumerate(arrow().of_parquet(path), 1),
    ".arrow": lambda path, name: enumerate(arrow().of_arrow(path), 1),
}
"""The reader of each suffix."""
TABLES = (".parquet", ".arrow")
"""Of what pyarrow reads."""

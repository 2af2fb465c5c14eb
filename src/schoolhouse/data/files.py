"""The rows of one file: `.jsonl`, `.ndjson` (also `.gz`), `.json`, `.csv`, `.tsv`, `.parquet` and `.arrow`.

All but `.json` are streamed: memory holds one line, one CSV row, or one batch of Arrow rows. A bad row is handed on as
a DataError in its place, so that the reader goes on; a fault of the whole file is raised.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gzip
import json
import re
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
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|([^\0]\0){2}|(\0[^\0]){2}", re.DOTALL)
"""How a text in UTF-16 begins, as PowerShell and spreadsheets write it: with a mark, or with every other byte zero."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def kind(path: Path) -> str | None:
    """The suffix by which a file is read, None where it has no known one."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Every row of a file, with its line in a line-based file, else its position; `name` stands in errors."""
    if kind(path) in TABLES:
        arrow()  # what its import finds wrong is no fault of the file
    try:
        if kind(path) not in TABLES:
            _refuse_utf16(path, name)
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


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _refuse_utf16(path: Path, name: str) -> None:
    with _opened(path) as file:
        if _UTF16.match(file.read(4)):
            packed = path.suffix.lower() == ".gz"
            raise DataError(
                "the file is UTF-16", required="text in UTF-8", where=name,
                remedy="unpack it and convert it with iconv -f UTF-16 -t UTF-8" if packed
                else f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new-{path.name}",
            )


def _jsonl(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """One object a line; a byte order mark, CRLF and blank lines are accepted."""
    with _opened(path) as file:
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
    """Values under a header, with commas between them, in a `.tsv` file tabs; cells may span lines, and stay text."""
    separator = "\t" if kind(path) == ".tsv" else ","
    csv.field_size_limit(LONGEST_LINE)  # the csv module has no other way; its own limit is less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        header = next(reader, [])
        _check_separator(header, separator, name)
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
                yield number, _bad_cells(f"broken CSV: {error}", f"{name}:{begin}", header, separator)
            if cells:  # a blank line has none
                number += 1
                yield number, _row_of_cells(cells, header, f"{name}:{begin}", separator)


def _check_separator(header: list[str], separator: str, name: str) -> None:
    """Refuse a header that is one column here, and several where another character stands between them."""
    other = next((one for one in _SEPARATORS if one != separator and one in header[0]), None) if header else None
    if len(header) == 1 and other is not None:
        tabs = "name the file .tsv, or " if other == "\t" else ""
        raise DataError(
            f"the header is one column, {header[0]!r:.60}: the file has {other!r} between its cells",
            required=f"{_SEPARATORS[separator]} between the cells", where=f"{name}:1",
            remedy=f"{tabs}write it again with commas, as .csv, e.g. by "
            f"pandas.read_csv({Path(name).name!r}, sep={other!r}).to_csv('new.csv', index=False)",
        )


def _row_of_cells(cells: list[str], header: list[str], where: str, separator: str) -> Row:
    if len(cells) != len(header):
        return _bad_cells(f"{len(cells)} cells", where, header, separator)
    if any("\0" in cell for cell in cells):
        return _bad_cells("a NUL byte", where, header, separator)
    return dict(zip(header, cells, strict=True))


def _bad_cells(found: str, where: str, header: list[str], separator: str) -> DataError:
    return DataError(
        found, required=f"{len(header)} cells, as in the header: {', '.join(header)}", where=where,
        remedy=f"mend the line; a cell with {_SEPARATORS[separator]}, quotes or line breaks stands in quotes",
    )


def arrow() -> ModuleType:
    """The reader of Arrow's tables; most runs need none of the 30 MiB that pyarrow takes."""
    from schoolhouse.data import arrow as tables

    return tables


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".jsonl.gz": _jsonl, ".ndjson.gz": _jsonl,
    ".json": _json, ".csv": _csv, ".tsv": _csv,
    ".parquet": lambda path, name: enumerate(arrow().of_parquet(path), 1),
    ".arrow": lambda path, name: enumerate(arrow().of_arrow(path), 1),
}
"""The reader of each suffix."""
TABLES = (".parquet", ".arrow")
"""Of what pyarrow reads."""

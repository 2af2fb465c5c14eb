"""Arrow tables, and files of them, to plain rows, undoing what Arrow does to conversations.

A struct column has one set of fields for all its rows: writing `{"a": 1}` and `{"b": 2}` gives every row both, and a
null in place of the one it did not have. Nobody can tell such a null from one that was meant. The rule here:

* in the objects of a list of messages (structs with `role` or `from`), a null field is read as absent, except content;
* in tool schemas and tool calls that are structs (lists of structs with `function` or `parameters`, and `tool_calls`
  inside messages), a null field is read as absent at any depth. Nulls in lists stay (`"enum": ["a", null]`);
* everywhere else nulls stay: other columns, strings that hold JSON, and Arrow's own JSON type, which is decoded.

So real nulls of schemas and arguments survive in JSON (strings or the JSON type), and foreign parameters never leak.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 256
"""Rows of a table in memory at a time."""
MARK = b"ARROW1"
"""What a file in Arrow's file format begins with."""

_Mend = Callable[[Any], Any]
_CONTENT = ("role", "from", "content", "value")
_CALLS = ("tool_calls", "function_call", "tools", "functions")


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Whatever Arrow finds wrong inside is a ValueError, as broken UTF-8, broken JSON and a field that is there twice
    are already; what the system finds is an OSError."""
    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `.parquet` file; raises OSError and ValueError."""
    # By default pyarrow reads ahead whole row groups, which may be the whole file; this way it holds pages.
    with faults(), pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
        for batch in file.iter_batches(BATCH):
            yield from rows(batch)


def of_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file in Arrow's file format, or its stream format, which the datasets library writes; mapped, not
    read as a whole. Raises OSError and ValueError."""
    with faults(), pa.memory_map(str(path)) as file:
        for batch in _batches(file):
            batch.validate(full=True)  # offsets of a damaged file would be followed out of the map
            for start in range(0, batch.num_rows, BATCH):
                yield from rows(batch.slice(start, BATCH))


def count(path: Path) -> int:
    """How many rows a `.parquet` or `.arrow` file has; raises OSError and ValueError."""
    with faults():
        if path.name.lower().endswith(".parquet"):
            return pq.read_metadata(path).num_rows
        with pa.memory_map(str(path)) as file:
            return sum(batch.num_rows for batch in _batches(file))


def _batches(file: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    whole = file.size() >= len(MARK) and file.read(len(MARK)) == MARK
    file.seek(0)
    if whole:
        reader = pa.ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def rows(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a table as dicts of plain Python values."""
    mends = {field.name: mend for field in table.schema if (mend := _mend(field.type)) is not None}
    for row in table.to_pylist():
        for name, mend in mends.items():
            row[name] = mend(row[name])
        yield row


def _mend(kind: pa.DataType, keep: tuple[str, ...] | None = None) -> _Mend | None:
    """What turns `to_pylist`'s values of a type into the row's; None where nothing is to do.

    `keep` is None outside messages and tools; inside, a struct keeps its nulls only under these names.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return _decoded if kind.extension_name == "arrow.json" else _mend(kind.storage_type, keep)
    if _is_list(kind):
        element = kind.value_type
        inner = _mend(element, _kept_in(element) if keep is None else keep)
        return None if inner is None else lambda values: values and [inner(value) for value in values]
    if pa.types.is_struct(kind):
        return _mend_struct(kind, keep)
    return _pairs_to_dict if pa.types.is_map(kind) else None


def _mend_struct(kind: pa.StructType, keep: tuple[str, ...] | None) -> _Mend | None:
    fields = {field.name: _mend(field.type, _kept_under(field.name, keep)) for field in kind}
    if keep is None and not any(fields.values()):
        return None

    def mend(value: dict[str, Any] | None) -> dict[str, Any] | None:
        return value and {
            name: inner(one) if (inner := fields[name]) else one
            for name, one in value.items()
            if one is not None or keep is None or name in keep
        }

    return mend


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _kept_in(element: pa.DataType) -> tuple[str, ...] | None:
    """The fields that may be null in the structs of a list: told by what the structs look like."""
    names = {field.name for field in element} if pa.types.is_struct(element) else set()
    if names & {"role", "from"}:
        return _CONTENT
    return () if names & {"function", "parameters"} else None


def _kept_under(name: str, keep: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What a field of a struct hands on: a message's calls drop every null, its other values (parts) keep theirs."""
    if keep == _CONTENT:
        return () if name in _CALLS else None
    return keep


def _pairs_to_dict(value: list[tuple[Any, Any]] | None) -> dict[Any, Any] | None:
    return None if value is None else dict(value)


def _decoded(value: str | None) -> Any:
    return None if value is None else json.loads(value)

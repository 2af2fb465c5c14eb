"""Arrow tables to plain rows, undoing what Arrow does to conversations.

A struct column has one set of fields for all its rows: writing `{"a": 1}` and `{"b": 2}` gives every row both, and a
null in place of the one it did not have. Nobody can tell such a null from one that was meant. The rule here:

* in the objects of a list of messages (structs with `role` or `from`), a null field is read as absent, except content;
* in tool schemas and tool calls that are structs (lists of structs with `function` or `parameters`, and `tool_calls`
  inside messages), a null field is read as absent at any depth. Nulls in lists stay (`"enum": ["a", null]`);
* everywhere else nulls stay: other columns, strings that hold JSON, and Arrow's own JSON type, which is decoded.

So real nulls of schemas and arguments survive in JSON (strings or the JSON type), and foreign parameters never leak.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

ERRORS = (pa.ArrowException, ValueError)
"""What reading damaged tables raises; a ValueError for broken UTF-8, broken JSON, and a field that is there twice."""

_Mend = Callable[[Any], Any]
_CONTENT = ("role", "from", "content", "value")
_CALLS = ("tool_calls", "function_call", "tools", "functions")


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

"""The page of all settings: of each its default, its values, what it does, and what other trainers call it."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schoolhouse import peers
from schoolhouse.config import Recipe
from schoolhouse.recipe import section_in

INTRODUCTION = """\
# Settings

Every setting of a recipe, as `schoolhouse schema --markdown` prints it. The last column is what verl, TRL,
LLaMA-Factory, axolotl and ms-swift call a thing, where they do; units may differ, and what is said here counts. A name
of theirs in a recipe is an error that says ours.
"""


def markdown() -> str:
    """The page, a table for each section."""
    alone = {name: field for name, field in Recipe.model_fields.items() if section_in(field.annotation) is None}
    tables = [_table(Recipe.__doc__, "", alone)]
    tables += [
        _table(field.description or "", f"{name}.", section_in(field.annotation).model_fields, f"## {name}\n\n")
        for name, field in Recipe.model_fields.items() if name not in alone
    ]
    return "\n".join([INTRODUCTION, *tables])


def _table(about: str, prefix: str, fields: dict[str, FieldInfo], title: str = "") -> str:
    rows = [f"| {' | '.join(row)} |\n" for row in _rows(prefix, fields)]
    said = f"{_line(about)}\n\n" if about else ""
    return f"{title}{said}| setting | default | what it does | elsewhere |\n|---|---|---|---|\n{''.join(rows)}"


def _rows(prefix: str, fields: dict[str, FieldInfo]) -> Iterator[tuple[str, ...]]:
    for name, field in fields.items():
        key, inner = prefix + name, section_in(field.annotation)
        words = ", ".join(f"`{word}`" for word in peers.WORDS.get(key, "").split())
        chosen = " or ".join(f"`{value}`" for value in _words(field.annotation))
        yield f"`{key}`", _default(field), _line(field.description or "") + (f" One of {chosen}." * bool(chosen)), words
        if inner is not None:  # a source: a mapping, or one of a list
            known = {each.description for each in fields.values()}
            new = {one: each for one, each in inner.model_fields.items() if each.description not in known}
            yield from _rows(f"{key}.", new)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return ""
    return f"`{json.dumps(value.model_dump() if isinstance(value, BaseModel) else value, default=list)}`"


def _line(text: str) -> str:
    """As the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _words(annotation: Any) -> list[str]:
    """The words that a setting may be, where it may be only some."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [word for part in get_args(annotation) for word in _words(part)]
    return []

"""What of an answer a rendered text has kept: a template that silently drops a part would teach another answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from schoolhouse.types import Message

THINKING = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"), ("<|channel|>analysis<|message|>", "<|end|>"),
)
"""How templates write the beginning and the end of a thinking block."""

_MARKS = re.compile("|".join(re.escape(mark) for pair in THINKING[:5] for mark in pair))
"""Marks of thinking that people write into a content; a template may write the same block in its own way."""


def missing(message: Message, text: str) -> str | None:
    """The first part of the answer that the text has not, in words; None where all is there. Blanks do not count."""
    if message.reasoning and not _has(text, message.reasoning):
        return f"the reasoning of this answer: {_short(message.reasoning)}"
    for piece in [message.text] if message.text in text else _MARKS.split(message.text):
        if not _has(text, piece):
            return f"text of this answer: {_short(piece)}"
    return _missing_call(message, text) if message.tool_calls else None


def _missing_call(message: Message, text: str) -> str | None:
    names = [call["function"]["name"] for call in message.tool_calls]
    for name in names:
        if text.count(name) < names.count(name):
            return f"a tool call of this answer: {name}"
    for call in message.tool_calls:
        for leaf in _leaves(_arguments(call)):
            if not _has(text, leaf):
                return f"an argument of this answer's call of {call['function']['name']}: {_short(leaf)}"
    return None


def _arguments(call: Mapping[str, Any]) -> Any:
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def _leaves(value: Any) -> Iterator[str]:
    """The names, texts and numbers in arguments; yes, no and null have as many spellings as there are templates."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _has(text: str, piece: str) -> bool:
    """Whether a piece stands in the text as it is, as JSON or Python spell it, or with other blanks."""
    if piece in text:
        return True
    spelled = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1], repr(piece)[1:-1])
    squeezed = _squeezed(text)
    return any(_squeezed(one) in squeezed for one in spelled)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text.strip()[:40])

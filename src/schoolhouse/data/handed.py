"""Messages as a serving engine hands them to a chat template: plain dicts, in the forms that the template can read.

Engines agree on the rest and templates do not, so a template is asked, once, with a few words (`ask`): whether it reads
a content that is a string, a content that is a list of parts, and a tool call's arguments as an object or as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schoolhouse.types import Message

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates look for a message's reasoning. vLLM fills the first two, transformers all."""

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str | None]
"""Messages and tools to the text of a template, None where it raises."""

_WORD = "whereabouts"
_TOOL = {"type": "function", "function": {
    "name": "lookup", "description": "Look a thing up.",
    "parameters": {"type": "object", "properties": {_WORD: {"type": "string", "description": "The thing."}}},
}}


class Written(dict):
    """A tool schema or arguments; it remembers its JSON, which a template writes again in each turn."""

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(self, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms a template can read, found out by asking it."""

    strings: bool = True
    """A content that is a string."""
    parts: bool = False
    """A content that is a list of parts."""
    json_arguments: bool = False
    """It writes the arguments of a tool call as they stand, so they must be JSON already, not an object."""


def ask(render: Render) -> Forms:
    """Find the forms that a template reads by rendering a word in each."""
    strings = _WORD in (render([{"role": "user", "content": _WORD}], None) or "")
    part = {"type": "text", "text": _WORD}
    written = render([{"role": "user", "content": [part]}], None) or ""
    parts = _WORD in written and str(part) not in written and json.dumps(part) not in written
    strings = strings or not parts
    return Forms(strings, parts, _wants_json(render, strings))


def _wants_json(render: Render, strings: bool) -> bool:
    """Whether arguments come out well as JSON but not as an object: as Python's own spelling, or not at all."""
    arguments = {_WORD: "a b"}
    as_object, as_json = (_called(render, strings, form) for form in (arguments, json.dumps(arguments)))
    return json.dumps(arguments) in as_json and (not as_object or str(arguments) in as_object)


def _called(render: Render, strings: bool, arguments: object) -> str:
    call = {"type": "function", "id": "call00000", "function": {"name": "lookup", "arguments": arguments}}
    question = _WORD if strings else [{"type": "text", "text": _WORD}]
    return render([
        {"role": "user", "content": question},
        {"role": "assistant", "content": "" if strings else [], "tool_calls": [call]},
    ], [_TOOL]) or ""


def to_dict(message: Message, forms: Forms) -> dict[str, Any]:
    """The message as an engine hands it to a template that reads these forms."""
    handed: dict[str, Any] = {"role": message.role, "content": _content(message, forms)}
    if message.reasoning is not None:
        handed |= dict.fromkeys(REASONING_KEYS, message.reasoning)
    if message.tool_calls:
        handed["tool_calls"] = [_call(call, forms) for call in message.tool_calls]
    if message.tool_call_id is not None:
        handed["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        handed["name"] = message.name
    return handed


def _content(message: Message, forms: Forms) -> str | list[dict[str, Any]]:
    """One text is a string; several are parts for a template that reads them, else lines, as vLLM joins them.

    Without content (OpenAI's null beside tool calls) it is the empty string: so vLLM and SGLang hand it over.
    """
    if forms.strings and len(message.parts) == 1 and message.parts[0].kind == "text":  # most are, told at once
        return message.parts[0].value
    texts = [part.value for part in message.parts if part.kind == "text"]
    plain = len(texts) == len(message.parts)
    if plain and forms.strings and (len(texts) < 2 or not forms.parts):
        return "\n".join(texts)
    return [{"type": part.kind, part.kind: part.value if part.kind == "text" else ""} for part in message.parts]


def _call(call: Mapping[str, Any], forms: Forms) -> dict[str, Any]:
    """A tool call with its arguments as an object, or as JSON for a template that would spoil an object."""
    arguments = call["function"].get("arguments")
    if forms.json_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not forms.json_arguments:
        arguments = _parsed(arguments)
    if isinstance(arguments, dict):
        arguments = Written(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _parsed(arguments: str) -> Any:
    """The object in a JSON string; {} in an empty one; a string that is no JSON stays as it is."""
    try:
        return json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return arguments


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """JSON as transformers renders it: no HTML escapes, keys in their own order."""
    if isinstance(value, Written) and (ensure_ascii, indent, separators, sort_keys) == (False, None, None, False):
        return value._json
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def roles(messages: Sequence[Message]) -> str:
    """The roles in order, for errors."""
    return ", ".join(message.role for message in messages)

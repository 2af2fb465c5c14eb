"""Read messages and tool schemas as people spell them: OpenAI's, ShareGPT's, and every peer's weight.

Texts, tool schemas and the arguments of tool calls are kept exactly as the data has them, key order and nulls
included. A null in place of an optional field says the same as leaving the field out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from schoolhouse.errors import DataError
from schoolhouse.types import Message, Part

_FUNCTION_CALL = "function_call"
"""The role of ShareGPT messages whose whole content is a tool call in JSON; they are read as assistant messages."""
_ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "ai"),
    "tool": ("tool", "function", "ipython", "observation", "tool_response", "tool_result"),
    _FUNCTION_CALL: (_FUNCTION_CALL, "tool_call"),
}
_ROLE_OF = {alias: role for role, aliases in _ROLES.items() for alias in aliases}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "loss", "loss_mask", "trainable", "loss_weight")
_FINER = ("train_detail", "loss_scale")
"""What peers say about parts of a message, and is not understood here."""
_PARTS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_CALL = 'an object such as {"type": "function", "function": {"name": "f", "arguments": {}}}'


def to_messages(value: object, where: str) -> tuple[Message, ...]:
    """The messages of a list of objects, or of a string that holds that list in JSON."""
    values = decoded(value, where)
    if not isinstance(values, (list, tuple)) or not values:
        raise DataError(
            f"no list of messages: {values!r:.60}", required="a list of at least one message", where=where,
            remedy="mend or delete the row",
        )
    return tuple(_message(one, f"{where}[{index}]") for index, one in enumerate(values))


def to_tools(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tool schemas of a list, or of a string that holds it in JSON; a bare function schema is wrapped."""
    values = decoded(value, where) if value else []
    if not isinstance(values, (list, tuple)):
        raise DataError(
            f"no list of tools: {values!r:.60}", required="a list of tool schemas, or its JSON", where=where,
            remedy="mend the row; a column that holds other things can be left out with data.messages",
        )
    return tuple(_tool(one, f"{where}[{index}]") for index, one in enumerate(values))


def text(value: object, where: str) -> str:
    """The value itself, if it is a text that UTF-8 can write."""
    if not isinstance(value, str):
        raise DataError(
            f"{value!r:.60} is no text", required="a string", where=where,
            remedy="mend the row; write an object as a JSON string",
        )
    if not value.isascii():
        _writable(value, value, where)
    return value


def decoded(value: object, where: str) -> object:
    """The value itself; a string is read as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"no valid JSON: {error}; it begins {value!r:.60}", required="a list or an object, or its JSON",
            where=where, remedy="mend the string in this place",
        ) from None


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{value!r:.60} is no message", required="an object with a role and a content", where=where,
            remedy="mend the row",
        )
    if len(value) == 2 and (plain := _plain(value)):
        return plain
    role = _role(value, where)
    content = _agreed(value, ("content", "value"), where)
    calls = _tool_calls(value, where)
    if role == _FUNCTION_CALL:
        role, calls, content = "assistant", (*calls, *_calls_of_content(content, where)), None
    reasoning = _agreed(value, _REASONING, where)
    message = Message(
        role=role,
        parts=_parts(content, f"{where}.{'value' if 'value' in value else 'content'}"),
        reasoning=None if reasoning is None else text(reasoning, f"{where} reasoning"),
        tool_calls=calls,
        tool_call_id=_optional_text(value, "tool_call_id", where),
        name=_optional_text(value, "name", where),
        weight=_weight(value, where),
    )
    _check_weight(message, value, where)
    _check_substance(message, content, where)
    return message


def _plain(value: Mapping[str, Any]) -> Message | None:
    """The message of a role and a text, as most are, told at once; None where there may be more to say."""
    role, content = value.get("role") or value.get("from"), value.get("content") or value.get("value")
    known = _ROLE_OF.get(role) if isinstance(role, str) else None
    if known in (None, _FUNCTION_CALL) or not isinstance(content, str) or not content.isascii():
        return None
    return Message(known, (Part("text", content),))


def _role(message: Mapping[str, Any], where: str) -> str:
    role = _agreed(message, ("role", "from"), where)
    known = _ROLE_OF.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise DataError(
            "the message has no role" if role is None else f"unknown role {role!r:.60}",
            required=f"one of {', '.join(_ROLE_OF)}", where=where,
            remedy="rename the role, or map rows with data.function",
        )
    return known


def _check_substance(message: Message, content: object, where: str) -> None:
    """Refuse a message without content or tool calls, and an answer that would teach silence."""
    if message.tool_calls and message.role != "assistant":
        raise DataError(
            f"tool calls in a {message.role} message", required="tool calls only where the role is assistant",
            where=where, remedy="mend the role, or remove the tool calls",
        )
    if content is None and not message.tool_calls:
        raise DataError(
            f"a {message.role} message with neither content nor tool calls", required="one of them",
            where=where, remedy="mend or delete the row",
        )
    silent = message.role == "assistant" and not (message.tool_calls or message.reasoning or any(
        part.kind != "text" or part.value for part in message.parts))
    if silent and message.weight != 0:
        raise DataError(
            "an empty assistant message", required="an answer to learn", where=where,
            remedy='delete the row, or give the message "weight": 0',
        )


def _parts(content: object, where: str) -> tuple[Part, ...]:
    """The pieces of a content: a string is one text, a list holds texts, images and videos."""
    if content is None:
        return ()
    if isinstance(content, (list, tuple)):
        return tuple(_part(one, f"{where}[{index}]") for index, one in enumerate(content))
    return (Part("text", text(content, where)),)


def _part(value: object, where: str) -> Part:
    if isinstance(value, str):
        return Part("text", text(value, where))
    spelling = value.get("type") if isinstance(value, dict) else None
    kind = _PARTS.get(spelling) if isinstance(spelling, str) else None
    if kind is None:
        raise DataError(
            f"{value!r:.60} is no part of a content", required=f"a string, or an object of type {', '.join(_PARTS)}",
            where=where, remedy="mend the row",
        )
    if kind == "text":
        return Part("text", text(value.get("text"), f"{where}.text"))
    places = (spelling, kind, "url", "path", "base64")
    place = next((place for place in places if value.get(place) is not None), None)
    return Part(kind, None if place is None else _media(value[place], place))


def _media(value: object, place: str) -> object:
    """What stands for an image: OpenAI's `{"url"}` unwrapped, bare base64 as the data URI that it belongs to."""
    if isinstance(value, dict) and "url" in value:
        return value["url"]
    return f"data:image/*;base64,{value}" if place == "base64" else value


def _tool_calls(message: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls under `tool_calls`, or the one under OpenAI's older `function_call`."""
    calls, older = message.get("tool_calls"), message.get("function_call")
    if not calls and not older:
        return ()
    calls = decoded(calls or [], f"{where}.tool_calls")
    if not isinstance(calls, (list, tuple)):
        raise DataError(
            f"tool_calls is {calls!r:.60}", required="a list of calls", where=where, remedy="mend the row",
        )
    if calls and older:
        raise DataError(
            "both tool_calls and function_call", required="one of them", where=where, remedy="delete one of them",
        )
    if older:
        return (_call(decoded(older, f"{where}.function_call"), f"{where}.function_call"),)
    return tuple(_call(one, f"{where}.tool_calls[{index}]") for index, one in enumerate(calls))


def _calls_of_content(content: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls of a function_call message: its content is one call or a list of them."""
    value = decoded(content, where)
    calls = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple(_call(one, where) for one in calls)


def _call(value: object, where: str) -> Mapping[str, Any]:
    """One tool call, untouched where it has OpenAI's form, else wrapped in it."""
    call = value if isinstance(value, dict) else {}
    function = call.get("function")
    if function is None:
        function = {key: one for key, one in call.items() if key not in ("id", "type", "function")}
        outer = {key: call[key] for key in ("id",) if call.get(key) is not None}
        call = {"type": "function", **outer, "function": function}
    _check_function(function, value, _CALL, where)
    if not isinstance(function.get("arguments"), (str, dict)):
        raise DataError(
            f"the arguments of the tool call are {function.get('arguments')!r:.60}", required="an object, or its JSON",
            where=where, remedy="mend the row; a call without arguments has {}",
        )
    if isinstance(function["arguments"], str) and function["arguments"].lstrip().startswith("{"):
        decoded(function["arguments"], f"{where}.arguments")  # else a broken object would be taught as a text
    return call


def _tool(value: object, where: str) -> Mapping[str, Any]:
    """One tool schema, untouched where it has OpenAI's form, else wrapped in it."""
    schema = decoded(value, where)
    tool = schema if isinstance(schema, dict) and "function" in schema else {"type": "function", "function": schema}
    required = 'an object such as {"type": "function", "function": {"name": "f", "parameters": {}}}'
    _check_function(tool["function"], value, required, where)
    return tool


def _check_function(function: object, value: object, required: str, where: str) -> None:
    """Refuse a function without a name, and one that JSON cannot write."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f"no function with a name: {value!r:.60}", required=required, where=where, remedy="mend the row",
        )
    try:
        written = json.dumps(function, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"not writable as JSON: {error}; in {function!r:.60}", required=required, where=where,
            remedy="keep schemas and arguments as JSON strings",
        ) from None
    _writable(written, function, where)


def _writable(written: str, value: object, where: str) -> None:
    """Refuse halves of surrogate pairs: no tokenizer can read them."""
    try:
        written.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a surrogate pair at character {error.start + 1} of {value!r:.60}",
            required="text that UTF-8 can write", where=where, remedy="mend the \\ud… escape in the row",
        ) from None


def _weight(message: Mapping[str, Any], where: str) -> float | None:
    """What the data says about learning a message: yes and no are 1 and 0, a number is how much."""
    given = {name: message[name] for name in _WEIGHTS if message.get(name) is not None}
    if not given:
        return None
    for name, value in given.items():
        if not _is_weight(value):
            raise DataError(
                f"{name} is {value!r:.60}", required="true, false, or a finite number of at least 0",
                where=where, remedy=f"mend {name}",
            )
    amounts = {float(value) for value in given.values() if not isinstance(value, bool)}
    verdicts = {bool(value) for value in given.values()}
    if len(amounts) > 1 or len(verdicts) > 1:
        raise DataError(
            f"contradictory weights: {given}", required="one weight for a message", where=where,
            remedy="keep one of them",
        )
    return amounts.pop() if amounts else float(verdicts.pop())


def _check_weight(message: Message, value: Mapping[str, Any], where: str) -> None:
    """Refuse what would be asked for and not be in force: learning a message that is shown, or parts of one."""
    finer = next((name for name in _FINER if value.get(name) not in (None, [], "")), None)
    if finer is not None:
        raise DataError(
            f"the message has a {finer}, and is learnt as a whole or not at all here", where=where,
            required=f"{', '.join(_WEIGHTS[:3])}: one weight for a message",
            remedy=f"remove {finer}, and give the message a weight of its own, with data.function",
        )
    if message.weight and message.role != "assistant":
        raise DataError(
            f"a {message.role} message with the weight {message.weight:g}", where=where,
            required="weights of assistant messages: what others say is shown, and never learnt",
            remedy="remove the weight or make it 0, with data.function where there are many",
        )


def _is_weight(value: object) -> bool:
    """Whether a value is yes, no, or a finite number of at least 0 that float32 can hold."""
    return isinstance(value, bool | int | float) and 0 <= value < 2.0**127


def _agreed(message: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value under whichever of the names is in use; several must say the same."""
    given = [name for name in names if message.get(name) is not None]
    if len(given) > 1 and any(message[name] != message[given[0]] for name in given):
        raise DataError(
            f"{' and '.join(given)} differ", required=f"one of {', '.join(names)}", where=where,
            remedy="keep one of them",
        )
    return message[given[0]] if given else None


def _optional_text(message: Mapping[str, Any], name: str, where: str) -> str | None:
    value = message.get(name)
    return None if value is None else text(value, f"{where}.{name}")

"""A row of any known form becomes a conversation: `to_conversation`, the first arrow of the straight line.

The forms, and the columns they are recognised by:

    messages            messages | conversation            role and content, as OpenAI writes them
    sharegpt            conversations                      from and value
    alpaca              instruction, output                texts
    prompt_completion   prompt, completion                 each a text, or a list of messages
    question_answer     question | query | prompt | instruction, with answer | response: the same

Each may stand beside a `system` (or `system_prompt`), a `tools` (or `functions`), and an `images` (or `image`) column;
questions and answers beside a `history` of earlier rounds, an `instruction` beside an `input`. Columns that would
change what is taught, and that nothing here reads, are refused (`unread`); all others are left out.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from schoolhouse.config import Rows
from schoolhouse.data import images, unread
from schoolhouse.data.messages import decoded, text, to_messages, to_tools
from schoolhouse.errors import OF_A_FUNCTION, ConfigError, DataError
from schoolhouse.types import Conversation, Message, Origin, Part

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_IMAGES = ("images", "image")
_TEXT = "text"
_TEMPLATE_KEYS = ("role", "content", "reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class _Fields:
    """A row seen through `data.columns`: the values of a form's fields, and where they stand."""

    row: Mapping[str, Any]
    columns: Mapping[str, str]
    origin: Origin

    def __getitem__(self, field: str) -> Any:
        """The field's value, None where the row has no such column; a column that was named must exist."""
        if field not in self.columns:
            return self.row.get(field)
        return _column(self.row, self.columns[field], self.where(field))

    def __contains__(self, field: str) -> bool:
        return field in self.columns or field in self.row

    def where(self, field: str) -> str:
        """The field's place, for errors."""
        return f"{self.origin} {self.columns.get(field, field)}"

    def text(self, field: str) -> str:
        """The field's value, which must be a text."""
        return text(self[field], self.where(field))

    def unread(self, form: _Form) -> dict[str, Any]:
        """The row's columns that the form does not read."""
        paths = [self.columns.get(field, field) for field in form.fields]
        read = {*paths, *(path.split(".")[0] for path in paths)}
        return {column: value for column, value in self.row.items() if column not in read}

    def first(self, names: tuple[str, ...]) -> str:
        """The name, of several for the same thing, that this row uses."""
        return next((name for name in names if name in self and self[name] is not None), names[0])


@dataclass(frozen=True, slots=True)
class _Form:
    """One form of rows: the fields it is recognised by, those it can have, and how they become messages."""

    name: str
    required: tuple[str, ...]
    read: Callable[[_Fields, _Form], tuple[Message, ...]]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """All the fields it can have."""
        return (*self.required, *self.optional, *_SYSTEM, *_TOOLS, *_IMAGES)

    def has(self, columns: Mapping[str, str]) -> bool:
        """Whether each of these is one of its fields."""
        return not columns or set(columns).issubset(self.fields)


def to_conversation(row: dict[str, Any], rows: Rows, origin: Origin) -> Conversation | None:
    """The conversation in a row, read as `rows` says or its columns show; None where the user's function drops it."""
    if rows.function is not None:
        result = _call(rows.function, row, origin)
        return None if result is None else _of_form(_Fields(result, {}, origin), None, rows)
    fields = _Fields(row, rows.columns or {}, origin)
    if rows.messages is None:
        return _of_form(fields, rows.format, rows)
    filled = [_filled(message, fields, f"data.messages[{index}]") for index, message in enumerate(rows.messages)]
    messages = to_messages(filled, f"{origin} data.messages")
    tools = to_tools(fields["tools"], fields.where("tools")) if "tools" in fields.columns else ()
    return _conversation(_seen(messages, fields, rows), tools, origin)


def _of_form(fields: _Fields, name: str | None, rows: Rows) -> Conversation:
    """The conversation of a row of the named form, or of the one its columns show."""
    form = _form(fields, name)
    unread.refuse(
        fields.unread(form), str(fields.origin), form=form.name, named=name is not None,
        selected=rows.function is not None,
    )
    messages = form.read(fields, form)
    if messages[-1].role != "assistant" and unread.is_preference(fields.row):
        raise unread.preference(fields.row, str(fields.origin))
    system, tools = fields.first(_SYSTEM), fields.first(_TOOLS)
    if fields[system]:
        messages = _with_system(fields.text(system), messages, fields.where(system))
    return _conversation(_seen(messages, fields, rows), to_tools(fields[tools], fields.where(tools)), fields.origin)


def _seen(messages: tuple[Message, ...], fields: _Fields, rows: Rows) -> tuple[Message, ...]:
    """The messages with the images of the row's column in their places; a row template must have written a place."""
    column = fields.first(_IMAGES)
    given = images.listed(fields[column])
    wanted = rows.messages is None or column in fields.columns or any(map(images.has_place, messages))
    return images.placed(messages, given if wanted else (), rows, fields.origin)


def _conversation(messages: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...], origin: Origin) -> Conversation:
    _check_answer(messages, str(origin))
    return Conversation(messages=messages, origin=origin, tools=tools)


def _check_answer(messages: tuple[Message, ...], where: str) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise DataError(
            f"no assistant message; the roles are {', '.join(message.role for message in messages)}",
            required="at least one answer to learn", where=where, remedy="mend or delete the row",
        )


def _with_system(system: str, messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Put the row's system prompt first; if the messages have one already, it must be the same."""
    first = messages[0]
    if first.role not in ("system", "developer"):
        return (_said("system", system), *messages)
    if first.text != system:
        raise DataError(
            f"two system prompts: {system!r:.40} and {first.text!r:.40}", required="one system prompt", where=where,
            remedy="delete one of them",
        )
    return messages


def _said(role: str, content: str) -> Message:
    return Message(role=role, parts=(Part("text", content),))


def _answered(answer: str, where: str) -> Message:
    """The assistant message of a text column, which must not be empty."""
    if not answer:
        raise DataError("the answer is empty", required="an answer to learn", where=where, remedy="delete the row")
    return _said("assistant", answer)


# The forms.


def _read_messages(fields: _Fields, form: _Form) -> tuple[Message, ...]:
    field = form.required[0]
    return to_messages(fields[field], fields.where(field))


def _read_alpaca(fields: _Fields, form: _Form) -> tuple[Message, ...]:
    """`history`, then the instruction with the input, if any, on the lines below it, then the output."""
    question, answer = form.required
    asked = fields.text(question)
    if fields["input"]:
        asked = f"{asked}\n{fields.text('input')}"
    return (*_history(fields), _said("user", asked), _answered(fields.text(answer), fields.where(answer)))


def _history(fields: _Fields) -> tuple[Message, ...]:
    """The messages of earlier rounds, a list of pairs of texts, as Alpaca and ms-swift write them."""
    where = fields.where("history")
    pairs = decoded(fields["history"] or (), where)
    listed = isinstance(pairs, (list, tuple))
    if not listed or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise DataError(
            f"{pairs!r:.60} is no history", required="a list of [question, answer]", where=where,
            remedy="mend the row; a column that holds other things can be left out with data.messages",
        )
    texts = [text(one, where) for pair in pairs for one in pair]
    return tuple(_answered(one, where) if index % 2 else _said("user", one) for index, one in enumerate(texts))


def _read_pair(fields: _Fields, form: _Form) -> tuple[Message, ...]:
    """`history`, then a question and its answer: texts, or lists of messages."""
    question, answer = form.required
    lists = [isinstance(fields[one], (list, tuple)) for one in form.required]
    if "input" in form.optional and (fields["input"] or not any(lists)):
        return _read_alpaca(fields, form)
    if not lists[0]:
        before = (_said("user", fields.text(question)),)
    else:
        before = tuple(_as_context(one) for one in to_messages(fields[question], fields.where(question)))
    before = (*_history(fields), *before)
    if not lists[1]:
        return (*before, _answered(fields.text(answer), fields.where(answer)))
    learnt = to_messages(fields[answer], fields.where(answer))
    _check_answer(learnt, fields.where(answer))
    return (*before, *learnt)


def _as_context(message: Message) -> Message:
    """A message of a prompt: its answers are not learnt unless they carry a weight themselves."""
    unmarked = message.role == "assistant" and message.weight is None
    return replace(message, weight=0.0) if unmarked else message


_FORMS = (
    _Form("messages", ("messages",), _read_messages),
    _Form("messages", ("conversation",), _read_messages),
    _Form("sharegpt", ("conversations",), _read_messages),
    _Form("alpaca", ("instruction", "output"), _read_alpaca, optional=("input", "history")),
    _Form("prompt_completion", ("prompt", "completion"), _read_pair, optional=("history",)),
    *(
        _Form("question_answer", pair, _read_pair, ("input", "history") if "instruction" in pair else ("history",))
        for pair in product(("question", "query", "prompt", "instruction"), ("answer", "response"))
    ),
)


# Which form a row has.


def _form(fields: _Fields, name: str | None) -> _Form:
    """The form that the row fits and that has every field `data.columns` names; two that fit are an error."""
    forms = [form for form in _FORMS if name in (None, form.name) and form.has(fields.columns)]
    if not forms:
        raise _unknown_columns(fields, name)
    columns = {*fields.row, *fields.columns}
    filled = {column for column in columns if column in fields.columns or fields.row[column] is not None}
    fits = _fitting(forms, filled) or _fitting(forms, columns)
    if not fits:
        raise _unrecognised(fields, name)
    if len(fits) > 1 and fits[0].name not in ("messages", "sharegpt"):
        raise DataError(
            f"the columns fit {' and '.join(_spelled(form) for form in fits)}", required="one form",
            where=str(fields.origin), remedy=f"name the columns, e.g. data.columns: {_example(fits[0])}",
        )
    return fits[0]


def _fitting(forms: Sequence[_Form], columns: set[str]) -> list[_Form]:
    return [form for form in forms if columns.issuperset(form.required)]


def _spelled(form: _Form) -> str:
    return f"{form.name} ({', '.join(form.required)})"


def _example(form: _Form) -> str:
    return "{" + ", ".join(f"{field}: {field}" for field in form.required) + "}"


def _unrecognised(fields: _Fields, name: str | None) -> DataError:
    if unread.is_preference(fields.row):
        return unread.preference(fields.row, str(fields.origin))
    known = {form.name: ", ".join(form.required) for form in reversed(_FORMS) if name in (None, form.name)}
    return DataError(
        f"the columns {_names(fields.row)} " + ("are of no known form" if name is None else f"do not fit {name}"),
        required=" or ".join(f"{form} ({columns})" for form, columns in reversed(known.items())),
        where=str(fields.origin),
        remedy="say where the fields stand with data.columns, or write the conversation with data.messages"
        + ("; a text as it is: model.chat_template=plain, and an assistant's {text}" if _TEXT in fields.row else ""),
    )


def _unknown_columns(fields: _Fields, name: str | None) -> ConfigError:
    known = {field for form in _FORMS if name in (None, form.name) for field in form.fields}
    strange = [field for field in fields.columns if field not in known]
    near = [match for field in strange for match in difflib.get_close_matches(field, known, n=1)]
    return ConfigError(
        f"data.columns names fields that {name or 'no single form'} {'does not have' if name else 'has'}: "
        f"{', '.join(fields.columns)}",
        required=f"fields of {name or 'one form'}: {', '.join(sorted(known))}", where="data.columns",
        remedy=f"did you mean {near[0]}?" if near else "mend the names, or write the conversation with data.messages",
    )


# Columns, row templates and functions.


def _column(row: Mapping[str, Any], path: str, where: str) -> Any:
    """The value at a column or at a dotted path into nested columns."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(
                f"there is no column {path!r}", where=where,
                required="a column of the row, or a dotted path: " + ", ".join(_paths(row)),
                remedy="mend the name; a brace that is meant as it is stands twice: {{ }}",
            )
        value = value[name]
    return value


def _paths(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The columns of a row, nested ones with dots."""
    return [
        path
        for name, value in row.items()
        for path in (_paths(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"])
    ]


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "(none)"


def _filled(template: Mapping[str, str], fields: _Fields, where: str) -> dict[str, str]:
    """A message of the row template, with the row's values in place of its `{column}`s."""
    unknown = [key for key in template if key not in _TEMPLATE_KEYS]
    if unknown or "role" not in template:
        raise ConfigError(
            f"unknown key {unknown[0]}" if unknown else "the message has no role", where=where,
            required=f"role, content and perhaps {', '.join(_TEMPLATE_KEYS[2:])}", remedy="mend data.messages",
        )

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[0] in ("{", "}"):
            raise ConfigError(
                f"a lone {match[0]}", required="{column}, or {{ and }} for braces as they are", where=where,
                remedy=f"write {match[0] * 2}",
            )
        return _inserted(match[1], fields)

    return {key: _PLACEHOLDER.sub(value, content) for key, content in template.items()}


def _inserted(path: str, fields: _Fields) -> str:
    """What stands in place of `{path}`: a text as it is, anything else as JSON; a null is an error."""
    where = f"{fields.origin} {{{path}}}"
    value = fields[path] if path in fields.columns else _column(fields.row, path, where)
    if value is None:
        raise DataError(
            f"column {path} is null", required="a value for the row template", where=where,
            remedy="mend or delete the row",
        )
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {path} cannot be written: {error}", required="text, or values that JSON knows", where=where,
            remedy="convert the column to text",
        ) from None


def _call(name: str, row: dict[str, Any], origin: Origin) -> Mapping[str, Any] | None:
    """What the user's `module:function` makes of a row."""
    function = _function(name)
    try:
        result = function(row)
    except OF_A_FUNCTION as error:
        raise DataError(
            f"{name} raised {type(error).__name__}: {error}", required="a function that reads every row",
            where=str(origin), remedy="mend the function; it may return None to drop a row",
        ) from error
    if result is not None and not isinstance(result, dict):
        raise DataError(
            f"{name} returned {result!r:.60}", required='a dict such as {"messages": […]}, or None to drop the row',
            where=str(origin), remedy="mend the function",
        )
    return result


def _function(name: str) -> Callable[[dict[str, Any]], object]:
    """The function that `module:function` names."""
    module, separator, attribute = name.partition(":")
    try:
        found = vars(importlib.import_module(module)).get(attribute) if separator and module else None
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be imported: {error}", required="module:function, importable from here",
            where="data.function", remedy="check the name; PYTHONPATH must hold the module's folder",
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{name} names no function", required="module:function, importable from here", where="data.function",
            remedy="check the name",
        )
    return found

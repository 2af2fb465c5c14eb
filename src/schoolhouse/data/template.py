"""A chat template: the Jinja program that turns messages into the text a model is served."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schoolhouse.errors import ConfigError, TemplateError
from schoolhouse.types import Message, Origin

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    ),
}
"""Templates for models that come without one, by the name a recipe gives in `model.chat_template`."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The names under which templates look for a message's reasoning; the first one a template mentions is used."""


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled chat template with the variables it is served with."""

    source: str
    variables: Mapping[str, Any]
    """Special tokens of the tokenizer (`bos_token`, …) and the recipe's `model.template_arguments`."""
    program: jinja2.Template
    reasoning_key: str

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], origin: Origin, *, to_answer: bool
    ) -> str:
        """The text served for these messages; with `to_answer`, up to where the assistant begins to write."""
        try:
            return self.program.render(
                messages=[self._served(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=to_answer,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise TemplateError(
                f"the chat template refuses this conversation: {type(error).__name__}: {error}",
                required=f"messages that the template can render; these have the roles {_roles(messages)}",
                where=str(origin),
                remedy="mend the row, or set model.chat_template to a template that serves such conversations",
            ) from None

    def _served(self, message: Message) -> dict[str, Any]:
        """The message as a serving engine hands it to a template."""
        plain = all(part.kind == "text" for part in message.parts)
        served: dict[str, Any] = {"role": message.role, "content": message.text if plain else _parts(message)}
        if message.reasoning is not None:
            served[self.reasoning_key] = message.reasoning
        if message.tool_calls:
            served["tool_calls"] = [_served_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            served["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            served["name"] = message.name
        return served


def compile_template(source: str, variables: Mapping[str, Any], today: datetime.date | None = None) -> Template:
    """Compile a template in Jinja's immutable sandbox, with the helpers that serving engines offer it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, loopcontrols]
    )
    day = today or datetime.date.today()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.combine(day, datetime.time()).strftime(form)
    try:
        program = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja: {error.message}", required="a Jinja chat template",
            where=f"model.chat_template, line {error.lineno}", remedy="mend the template",
        ) from None
    mentioned = [key for key in REASONING_KEYS if key in source]
    return Template(source, variables, program, mentioned[0] if mentioned else REASONING_KEYS[0])


def template_source(setting: str | None, own: str | Mapping[str, str] | None, model: str) -> str:
    """The template text of `model.chat_template` (a file or a built-in name), else the tokenizer's `own`."""
    if setting in BUILT_IN:
        return BUILT_IN[setting]
    if setting is not None:
        path = Path(setting)
        if not path.is_file():
            raise ConfigError(
                f"there is no chat template {setting}", required=f"a Jinja file, or one of {', '.join(BUILT_IN)}",
                where="model.chat_template", remedy="check the path",
            )
        return path.read_text(encoding="utf-8")
    if isinstance(own, Mapping):
        own = own.get("default")
    if not own:
        raise ConfigError(
            "the tokenizer comes without a chat template", required="a template to serve conversations with",
            where=model, remedy="set model.chat_template to a file, or to `plain` or `chatml`",
        )
    return own


class _GenerationMark(Extension):
    """`{% generation %}` marks what an assistant writes; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """JSON as transformers renders it: no HTML escapes, keys in their own order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.role for message in messages)


def _parts(message: Message) -> list[dict[str, Any]]:
    return [{"type": part.kind, part.kind: part.value} for part in message.parts]


def _served_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is how serving engines hand it to templates."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except json.JSONDecodeError:
            pass  # a template may still print it as it stands
    return {**call, "function": function}

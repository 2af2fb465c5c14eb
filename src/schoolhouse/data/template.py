"""A chat template: the Jinja program that turns messages into the text a model is served."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schoolhouse.data import bounds, handed, prefixes
from schoolhouse.errors import ConfigError, TemplateError
from schoolhouse.types import Conversation, Message, Origin

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

RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What the code of a template can raise."""

_METHODS = frozenset(dir(handed.Written))
"""The attributes of a dict."""
_LOOP = frozenset({"first", "last", "index", "index0", "length", "revindex", "revindex0", "previtem", "nextitem"})

Source = str | Mapping[str, str]
"""The text of a template, or several by name: `default`, and `tool_use` for conversations with tools."""


@dataclass(frozen=True, slots=True)
class Program:
    """One compiled template."""

    jinja: jinja2.Template
    forms: handed.Forms
    arguments: frozenset[str]
    """The variables it asks for beside the messages, e.g. `enable_thinking`."""
    marked: jinja2.Template | None
    """The same with marks behind its messages, for the fast path; None where there is none."""
    end: str | None
    """What it writes behind all messages if nobody is to answer, where that is always the same."""


@dataclass(frozen=True, slots=True)
class Template:
    """A model's chat template with the variables it is served with."""

    source: Source
    """As the tokenizer keeps it."""
    variables: Mapping[str, Any]
    """Special tokens of the tokenizer (`bos_token`, …) and the recipe's `model.template_arguments`."""
    default: Program
    tool_use: Program
    """Serves conversations with tools; most models have one template for both."""

    def script(self, conversation: Conversation) -> Script:
        """The conversation ready to be rendered, turn by turn."""
        program = self.tool_use if conversation.tools else self.default
        messages = tuple(handed.to_dict(message, program.forms) for message in conversation.messages)
        return Script(program, self.variables, conversation, messages, tuple(map(handed.Written, conversation.tools)))


@dataclass(frozen=True, slots=True)
class Script:
    """A conversation handed to its template."""

    program: Program
    variables: Mapping[str, Any]
    conversation: Conversation
    messages: tuple[dict[str, Any], ...]
    tools: tuple[handed.Written, ...]
    known: Mapping[bool, tuple[Mapping[int, str], str]] = field(default_factory=dict)
    """The fast path, by whether the assistant is to answer: texts by the number of messages, and what stands behind."""

    def at_once(self) -> Script:
        """The same script, with the texts of its prefixes that one or two renders of the whole give."""
        if self.program.marked is None:
            return self
        known, end = {}, self.program.end
        for to_answer in (True, False) if end is None else (True,):
            with contextlib.suppress(*RAISED), bounds.limited():  # where it raises, each prefix is rendered alone
                known[to_answer] = prefixes.rendered(self.program.marked, self.messages, self._given(to_answer))
        if known and end is not None:
            known[False] = known[True][0], end
        return Script(self.program, self.variables, self.conversation, self.messages, self.tools, known)

    def under(self, **variables: Any) -> Script:
        """The same script with other variables."""
        program = replace(self.program, end=None)
        return replace(self, program=program, variables={**self.variables, **variables}, known={})

    def having(self, index: int, message: Message) -> Script:
        """The same script with another message in one place."""
        told, handed_over = list(self.conversation.messages), list(self.messages)
        told[index], handed_over[index] = message, handed.to_dict(message, self.program.forms)
        conversation = replace(self.conversation, messages=tuple(told))
        return replace(self, conversation=conversation, messages=tuple(handed_over), known={})

    def prompt(self, count: int) -> str:
        """The text served for the first `count` messages, up to where the assistant begins to write."""
        return self._render(count, to_answer=True)

    def full(self, count: int) -> str:
        """The text served for the first `count` messages once the last of them has been written."""
        return self._render(count, to_answer=False)

    def _render(self, count: int, *, to_answer: bool) -> str:
        texts, end = self.known.get(to_answer, ({}, ""))
        if count in texts:
            return texts[count] + end
        try:
            with bounds.limited():
                text = self.program.jinja.render(messages=list(self.messages[:count]), **self._given(to_answer))
            return bounds.checked(text)
        except RAISED as error:
            bounds.refuse_escape(error)
            raise _raised(error, self.program, self.conversation.messages[:count], self.conversation.origin) from None


    def _given(self, to_answer: bool) -> dict[str, Any]:
        """What the template is given beside the messages."""
        given = {"tools": list(self.tools) or None, "documents": None, "add_generation_prompt": to_answer}
        return {**given, **self.variables}


def compile_template(source: Source, variables: Mapping[str, Any], today: datetime.date | None = None) -> Template:
    """Compile a template in Jinja's immutable sandbox, with the helpers that serving engines offer it.

    Of several named templates, `tool_use` serves conversations with tools and `default` all others, as in transformers.
    """
    named = {"default": source} if isinstance(source, str) else source
    environment = _environment(today or datetime.date.today())
    default = _program(environment, named["default"], variables)
    tool_use = _program(environment, named["tool_use"], variables) if "tool_use" in named else default
    return Template(source, variables, default, tool_use)


def template_source(setting: str | None, own: Source | None, model: str) -> Source:
    """The template of `model.chat_template`: a built-in, one of the tokenizer's `own` by name, a file; unset: `own`."""
    if setting in BUILT_IN:
        return BUILT_IN[setting]
    if isinstance(own, Mapping) and setting in own:
        return own[setting]
    if setting is not None:
        path = Path(setting)
        if not path.is_file():
            names = [*BUILT_IN, *(own if isinstance(own, Mapping) else ())]
            raise ConfigError(
                f"there is no chat template {setting}", required=f"a Jinja file, or one of {', '.join(names)}",
                where="model.chat_template", remedy="check the path",
            )
        return path.read_text(encoding="utf-8")
    if not own:
        raise ConfigError(
            "the tokenizer comes without a chat template", required="a template to serve conversations with",
            where=model, remedy="set model.chat_template to a file, or to `plain` or `chatml`",
        )
    if isinstance(own, Mapping) and "default" not in own:
        raise ConfigError(
            f"none of the tokenizer's chat templates is the default: {', '.join(own)}", required="the name of one",
            where=model, remedy=f"set model.chat_template: {next(iter(own))}",
        )
    return own


def _environment(today: datetime.date) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, loopcontrols])
    midnight = datetime.datetime.combine(today, datetime.time())
    environment.filters["tojson"] = handed.to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = midnight.strftime
    return environment


def _program(environment: jinja2.Environment, source: str, variables: Mapping[str, Any]) -> Program:
    try:
        program = environment.from_string(source)
        arguments = meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja: {error.message}", required="a Jinja chat template",
            where=f"model.chat_template, line {error.lineno}", remedy="mend the template",
        ) from None

    def written(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
        try:
            with bounds.limited():
                return program.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=False, **variables
                )
        except RAISED:
            return None

    marked = prefixes.marked(environment, source)
    return Program(
        program, handed.ask(written), frozenset(arguments), marked and marked.jinja, marked and _end(marked, variables)
    )


def _end(marked: prefixes.Marked, variables: Mapping[str, Any]) -> str | None:
    """What the template writes behind all messages if nobody is to answer."""
    if marked.end is None:
        return None
    try:
        with bounds.limited():
            return bounds.checked(marked.end.render(**{prefixes.TO_ANSWER: False, **variables}))
    except RAISED:
        return None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with a short way to what templates ask for most: `message.role`, `loop.first`."""

    intercepted_binops = frozenset({"*"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Only products come here."""
        return bounds.multiplied(left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in the sandbox: a dict has no attributes but its methods, and these of a loop are safe."""
        if isinstance(obj, dict) and attribute not in _METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if isinstance(obj, LoopContext) and attribute in _LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


class _GenerationMark(Extension):
    """`{% generation %}` marks what an assistant writes; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _raised(error: Exception, program: Program, messages: Sequence[Message], origin: Origin) -> TemplateError:
    words = " ".join(str(error).split())
    unset = sorted(name for name in program.arguments if f"'{name}'" in words)
    remedy = "mend the row, or set model.chat_template to a template that serves such conversations"
    if isinstance(error, jinja2.UndefinedError) and unset:
        remedy = f"set model.template_arguments: {{{unset[0]}: …}}, or set model.chat_template to another template"
    roles = handed.roles(messages)
    if not roles:
        remedy = "an answer that nothing stands before: give it weight 0 to have it as context, or delete it"
    return TemplateError(
        f"the chat template refuses this conversation: {type(error).__name__}: {words:.200}",
        required=f"messages that the template can render; these have the roles {roles or '(none)'}",
        where=str(origin), remedy=remedy,
    )

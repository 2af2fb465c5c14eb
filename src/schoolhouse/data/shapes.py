"""One render for all conversations of one shape: the fast path of a template, exact or not taken.

Most of what a template does is to write texts that it never looks at. So it is rendered with an opaque thing in the
place of each text, of which it can ask very little: to be written, joined to others, and a few questions that the
real text answers (does it begin with `<tool_response>`? does it have blanks at its ends?). Whatever else it asks raises,
and there is no fast path for that shape. What comes out is the text with holes, and it is right for every conversation
of the same shape (roles, keys, number of calls and tools) whose texts answer those questions in the same way: the
template could not have noticed a difference.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from schoolhouse.data import handed

KEPT = 50_000
"""Shapes remembered; past it all are forgotten, so that memory stays flat."""

_HOLE = re.compile("\ue000([0-9]+)\ue001")
_CONCRETE = ("role", "type")
"""What a template must see of a message as it is."""
_TESTS = {
    "string": True, "iterable": True, "sequence": True, "defined": True, "undefined": False, "none": False,
    "mapping": False, "number": False, "integer": False, "float": False, "boolean": False,
}
"""What is true of every text that is not empty."""
_METHODS = ("startswith", "endswith", "strip", "lstrip", "rstrip")

Question = tuple[int, str, tuple[str, ...], Any]
"""A text's number, the method of `str` that was called, with what, and the answer; None: the text itself."""


class UnknownError(Exception):
    """The template asked something that only the text itself can answer."""


class Opaque:
    """A text that is not empty, or several joined, which can be written but not read."""

    __slots__ = ("_asked", "_number", "_text", "written")

    def __init__(self, written: str, number: int = -1, text: str | None = None, asked: list[Question] | None = None):
        self.written, self._number, self._text, self._asked = written, number, text, asked

    def ask(self, method: str, *given: str) -> Any:
        """What the real text answers, kept in mind; a change of it is only known if it changes nothing."""
        if self._text is None or not all(isinstance(one, str) and "\ue000" not in one for one in given):
            raise UnknownError
        answer = getattr(self._text, method)(*given)
        if isinstance(answer, str) and answer != self._text:
            raise UnknownError
        self._asked.append((self._number, method, given, None if isinstance(answer, str) else answer))
        return self if isinstance(answer, str) else answer

    def __add__(self, other: object) -> Opaque:
        return Opaque(self.written + _written(other))

    def __radd__(self, other: object) -> Opaque:
        return Opaque(_written(other) + self.written)

    def __contains__(self, piece: str) -> bool:
        return self.ask("__contains__", piece)

    def __eq__(self, other: object) -> bool:
        return other is not None and self.ask("__eq__", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _refuse(self, *_: object) -> Any:
        raise UnknownError

    __hash__ = __str__ = __repr__ = __format__ = __bytes__ = __html__ = _refuse


class OpaqueJson:
    """An object that can be written as JSON, and nothing else."""

    __slots__ = ("written",)

    def __init__(self, written: str):
        self.written = written

    def _refuse(self, *_: object) -> Any:
        raise UnknownError

    __hash__ = __eq__ = __str__ = __repr__ = __format__ = __html__ = _refuse


def _written(value: object) -> str:
    if isinstance(value, Opaque):
        return value.written
    if type(value) is str:
        return value
    raise UnknownError


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered text with holes for the texts of a conversation."""

    literals: tuple[str, ...]
    numbers: tuple[int, ...]
    """The texts between the literals."""
    questions: tuple[Question, ...]

    def filled(self, texts: Sequence[str]) -> str | None:
        """The text of a conversation of this shape; None where its texts answer otherwise."""
        for number, method, given, answer in self.questions:
            text = texts[number]
            if getattr(text, method)(*given) != (text if answer is None else answer):
                return None
        whole = [""] * (2 * len(self.numbers) + 1)
        whole[::2] = self.literals
        whole[1::2] = [texts[number] for number in self.numbers]
        return "".join(whole)


@dataclass(frozen=True, slots=True)
class Reading:
    """A conversation taken apart: the shape of each message, and everything in it that is only written."""

    shapes: tuple[Any, ...]
    messages: tuple[dict[str, Any], ...]
    """With opaque texts."""
    tools: tuple[Any, ...]
    texts: tuple[str, ...]
    asked: list[Question]


def read(messages: Sequence[Mapping[str, Any]], tools: Sequence[handed.Written]) -> Reading:
    """Take a conversation apart."""
    texts: list[str] = []
    asked: list[Question] = []

    def opaque(value: Any, name: str) -> tuple[Any, Any]:
        """The shape of a value, and the value with its texts made opaque."""
        if isinstance(value, handed.Written) and value:
            texts.append(handed.to_json(value))
            return dict, OpaqueJson(f"\ue000{len(texts) - 1}\ue001")
        if isinstance(value, str) and value and name not in _CONCRETE:
            texts.append(value)
            number = len(texts) - 1
            return str, Opaque(f"\ue000{number}\ue001", number, value, asked)
        if isinstance(value, dict):
            pairs = {key: opaque(one, key) for key, one in value.items()}
            return tuple((key, shape) for key, (shape, _) in pairs.items()), {key: one for key, (_, one) in pairs.items()}
        if isinstance(value, list):
            both = [opaque(one, name) for one in value]
            return tuple(shape for shape, _ in both), [one for _, one in both]
        return (type(value), value), value

    offered = [opaque(tool, "tools") for tool in tools]
    said = [opaque(message, "messages") for message in messages]
    return Reading(
        (len(offered), *(shape for shape, _ in said)), tuple(one for _, one in said), tuple(one for _, one in offered),
        tuple(texts), asked,
    )


@dataclass(slots=True)
class Shapes:
    """The skeletons of one template."""

    program: jinja2.Template | None
    """Compiled by `compile_opaque`; None where there is no fast path at all."""
    variables: Mapping[str, Any]
    numbers: dict[Any, int] = field(default_factory=dict)
    """A short name for each shape of a message."""
    skeletons: dict[Any, Skeleton | None] = field(default_factory=dict)

    def key(self, reading: Reading) -> tuple[int, ...]:
        """The conversation's shape, short."""
        return tuple(self.numbers.setdefault(shape, len(self.numbers)) for shape in reading.shapes)

    def render(self, reading: Reading, key: tuple[int, ...], count: int, *, to_answer: bool) -> str | None:
        """The text for the first `count` messages; None where the template must be rendered with the texts."""
        place = (key[: count + 1], to_answer)
        if place not in self.skeletons:
            if len(self.skeletons) >= KEPT:
                self.skeletons.clear()
            self.skeletons[place] = self._skeleton(reading, count, to_answer)
        skeleton = self.skeletons[place]
        return None if skeleton is None else skeleton.filled(reading.texts)

    def _skeleton(self, reading: Reading, count: int, to_answer: bool) -> Skeleton | None:
        if self.program is None:
            return None
        reading.asked.clear()
        try:
            text = self.program.render(
                messages=list(reading.messages[:count]), tools=list(reading.tools) or None, documents=None,
                add_generation_prompt=to_answer, **self.variables,
            )
        except (UnknownError, jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            return None
        pieces = _HOLE.split(text)
        return Skeleton(tuple(pieces[::2]), tuple(map(int, pieces[1::2])), tuple(dict.fromkeys(reading.asked)))


def shapes(
    source: str, variables: Mapping[str, Any], environment: jinja2.sandbox.ImmutableSandboxedEnvironment
) -> Shapes:
    """The fast path of a template, in an environment of its own, which is changed here."""
    tree = environment.parse(source)
    buffers = next(tree.find_all((nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock, nodes.Include)), None)
    if buffers is not None or "\ue000" in source + repr(variables):
        return Shapes(None, variables)  # a text put together unseen could be asked what an opaque one would refuse
    environment.finalize = _finalized
    environment.tests = {name: _guarded(test, functools.partial(_tested, name)) for name, test in environment.tests.items()}
    environment.filters = {name: _guarded(one, _FILTERS.get(name, _refuse)) for name, one in environment.filters.items()}
    environment.filters[_JOINED] = _joined
    return Shapes(environment.from_string(_Joining().visit(tree)), variables)

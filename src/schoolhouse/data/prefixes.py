"""One render for all the prompts of a conversation, wherever that provably gives the same texts.

A chat template writes the messages one after another in a loop. Here it is rendered once on the whole conversation,
with a mark behind each message. What stands before the mark behind message i is what it writes of the first i messages
alone, if until then it has neither read a later message nor asked how many there are: the messages are handed over as
`Watched`, which notes how far they were read. What it writes behind the loop is the same for all prefixes, if the code
there depends on nothing that the messages decide; that is read off the template once. A prefix for which one of the
two does not hold is rendered by itself.

Whether the assistant is to answer (`add_generation_prompt`) is often asked behind the loop only. Then what stands there
for both cases is known, and one render gives the prompts and the full texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import jinja2
from jinja2 import nodes

MARK = "\ue000 behind a message \ue001"
"""Written behind each message, as one piece; one more of the data's own would be noticed by their number."""

TO_ANSWER = "add_generation_prompt"
"""The variable that asks for the text up to where the assistant begins to write."""

_HOLD, _RELEASE = "schoolhouse_hold", "schoolhouse_release"
"""Names of functions that only a marked template calls."""


class UnseenError(BaseException):
    """The template asked something about the conversation as a whole. Jinja's own tests swallow every Exception."""


@dataclass(slots=True)
class _Reading:
    """How far a template has read."""

    furthest: int = -1
    """The last message that was looked at, or looked for."""
    started: int = -1
    """The message at which the last loop began."""
    places: dict[int, int] = field(default_factory=dict)
    """Of each message that was read, by its identity."""
    held: int = -2
    """The message of which is asked whether it is the last; -2 where more has been read than it."""

    def hold(self, message: object) -> bool:
        """Called before a template asks of a message `loop.last or …`."""
        place = self.places.get(id(message), -2)
        self.furthest = max(self.furthest, place)
        self.held = place if self.furthest == place else -2
        return False

    def release(self) -> bool:
        """Called where the answer is yes because of the next message: without one it would be yes, too."""
        if self.furthest == self.held + 1:
            self.furthest = self.held
        return True


class Watched:
    """Messages that can be read from the front; anything that depends on where they end raises UnseenError."""

    __slots__ = ("_messages", "_reading", "_start")

    def __init__(self, messages: Sequence[Mapping[str, Any]], reading: _Reading, start: int = 0) -> None:
        self._messages, self._reading, self._start = messages, reading, start

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self._reading.started = self._start
        for place in range(len(self._messages) - self._start):
            yield self[place]

    def __getitem__(self, place: object) -> Any:
        if isinstance(place, slice) and place.stop is None and place.step is None and (place.start or 0) >= 0:
            return Watched(self._messages, self._reading, self._start + (place.start or 0))
        if type(place) is not int or place < 0:
            raise UnseenError
        place += self._start
        self._reading.furthest = max(self._reading.furthest, place)
        message = self._messages[place]
        self._reading.places[id(message)] = place
        return message

    def __bool__(self) -> bool:
        self._reading.furthest = max(self._reading.furthest, self._start)
        return self._start < len(self._messages)

    def _refuse(self, *_: object) -> Any:
        raise UnseenError

    __len__ = __eq__ = __ne__ = __contains__ = __add__ = __radd__ = __str__ = __repr__ = __hash__ = _refuse


@dataclass(frozen=True, slots=True)
class Marked:
    """A template with marks behind its messages."""

    jinja: jinja2.Template
    end: jinja2.Template | None
    """What it writes behind its messages, where that depends on nothing but its variables, and nothing before it asks
    whether the assistant is to answer."""


def marked(environment: jinja2.Environment, source: str) -> Marked | None:
    """The template with marks behind its messages; None where what it writes behind its loop depends on them."""
    tree = environment.parse(source)
    about, ends = _about_messages(tree), []
    if not _mark_last_loop(tree.body, [], about, ends):
        return None
    tree.set_environment(environment)
    end = nodes.Template(ends[0], lineno=1) if _is_same_for_all(tree, ends, about) else None
    if end is not None:
        end.set_environment(environment)
    return Marked(environment.from_string(tree), end and environment.from_string(end))


def _is_same_for_all(tree: nodes.Template, ends: Sequence[list[nodes.Node]], about: set[str]) -> bool:
    """Whether what stands behind the only marked loop reads nothing that differs between conversations."""
    if len(ends) > 1 or any(tree.find_all((nodes.Block, nodes.Import, nodes.FromImport, nodes.Include))):
        return False
    changed = about | {"tools", "documents"}
    for one in tree.find_all((nodes.Assign, nodes.With)):
        for target in [one.target] if isinstance(one, nodes.Assign) else one.targets:
            changed |= _target_names(target)
    read = [name.name for node in ends[0] for name in node.find_all(nodes.Name)]
    asked = [name.name for name in tree.find_all(nodes.Name)].count(TO_ANSWER)
    return not changed & {*read} and asked == read.count(TO_ANSWER)


def rendered(
    program: jinja2.Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> tuple[dict[int, str], str]:
    """What a marked template writes of the first 1, 2, … messages, so far as one render gives it, and what behind."""
    reading, written, marks = _Reading(), [""], []
    try:
        watched = {"messages": Watched(messages, reading), _HOLD: reading.hold, _RELEASE: reading.release}
        for text in program.generate(**watched, **variables):
            if text == MARK:
                marks.append(reading.furthest)
                written.append("")
            else:
                written[-1] += text
    except UnseenError:
        return {}, ""
    *pieces, tail = written
    first = len(messages) - len(pieces)
    if first != reading.started:  # messages passed over, or marks of the data's own
        return {}, ""
    furthest = enumerate(zip(accumulate(pieces), marks, strict=True), start=first)
    return {index + 1: head for index, (head, seen) in furthest if seen <= index}, tail


def _hold_at_last(body: Sequence[nodes.Node], message: str) -> None:
    """Have the question `loop.last or …`, which ends a group of messages, look at the next one only if that matters."""
    for one in body:
        if isinstance(one, nodes.If):
            for branch in [one.body, one.elif_, one.else_]:
                _hold_at_last(branch, message)
            test = one.test
            if isinstance(test, nodes.Or) and _is_last(test.left):
                hold = nodes.Call(nodes.Name(_HOLD, "load"), [nodes.Name(message, "load")], [], None, None)
                release = nodes.Call(nodes.Name(_RELEASE, "load"), [], [], None, None)
                one.test = nodes.Or(nodes.Or(hold, test.left), nodes.And(test.right, release))
                one.set_lineno(one.lineno)


def _is_last(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr) and node.attr == "last" and _target_names(node.node) == {"loop"}


def _about_messages(tree: nodes.Template) -> set[str]:
    """Names whose values the messages may decide: set from them, changed in a loop, or macros, which may read both.

    What `cycler` and `joiner` make counts how often it was asked.
    """
    about = {"messages", "loop", "cycler", "joiner", *(macro.name for macro in tree.find_all(nodes.Macro)),
             *(one.name for one in tree.find_all(nodes.NSRef))}
    for loop in tree.find_all(nodes.For):
        about |= {name.name for name in loop.target.find_all(nodes.Name)} | _target_names(loop.target)
    sets = list(tree.find_all(nodes.Assign))
    while new := {name for one in sets if _reads(one.node, about) for name in _target_names(one.target)} - about:
        about |= new
    return about | {name for block in tree.find_all(nodes.AssignBlock) for name in _target_names(block.target)}


def _target_names(target: nodes.Node) -> set[str]:
    names = {name.name for name in target.find_all(nodes.Name)}
    return names | {target.name} if isinstance(target, nodes.Name) else names


def _reads(node: nodes.Node, names: set[str]) -> bool:
    return bool(_target_names(node) & names)


def _mark_last_loop(
    body: list[nodes.Node], behind: list[nodes.Node], about: set[str], ends: list[list[nodes.Node]]
) -> bool:
    """Mark the last loop over the messages among the statements of a template, in each branch; whether there is one.

    `behind` is what follows the statements; a loop before something that the messages decide is not marked. `ends` is
    given what follows each marked loop.
    """
    for place in reversed(range(len(body))):
        node, rest = body[place], [*body[place + 1 :], *behind]
        if isinstance(node, nodes.For) and _reads(node.iter, about):
            if node.else_ or any(_reads(one, about) for one in rest):
                return False
            ends.append(rest)
            return _mark(node)
        if isinstance(node, nodes.If):
            branches = [node.body, *(one.body for one in node.elif_), node.else_]
            if any([_mark_last_loop(branch, rest, about, ends) for branch in branches]):
                return True
    return False


def _mark(loop: nodes.For) -> bool:
    if isinstance(loop.target, nodes.Name):
        _hold_at_last(loop.body, loop.target.name)
    loop.body.append(nodes.Output([nodes.TemplateData(MARK)]).set_lineno(loop.lineno))
    return True

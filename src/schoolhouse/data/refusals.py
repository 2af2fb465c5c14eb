"""Why an answer cannot be taught as it is served: what was asked beside what would be taught, and a way out that works.

A remedy is tried on the very answer before it is named; only another template, the last resort, is named untried.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from schoolhouse.data.template import Script
from schoolhouse.data.tokens import Stops
from schoolhouse.errors import TemplateError
from schoolhouse.types import Message

Kind = Literal["opened", "closed", "dropped", "differs", "cut", "unstopped"]

_FOUND = {
    "opened": "the generation prompt opens a thinking block that this answer does not have",
    "closed": "the generation prompt closes the thinking block that this answer fills",
    "dropped": "the template drops {what}",
    "differs": "the template writes this answer differently from how it asks for it",
    "cut": "the stop token {stop} stands before the end of the answer and cuts off {what}",
    "unstopped": "the answer has no stop token: the template ends it with {what}",
}
_REQUIRED = {
    "opened": "an answer that thinks, or a prompt that does not ask for it",
    "closed": "a prompt that leaves the thinking to the answer",
    "dropped": "all of the answer in the text",
    "differs": "a full text that begins with its own prompt",
    "cut": "one stop token, after the answer",
    "unstopped": "one of {stop} after each answer, or the model never stops",
}
_LAST_RESORT = {
    "opened": "a template whose prompt does not open one",
    "closed": "a template whose prompt does not close it",
    "dropped": "a template that writes it",
    "differs": "a template that does so (often called a training template)",
    "cut": "a template that ends turns with another token (and name that in model.stop_tokens)",
    "unstopped": "a template that ends answers with a token of this tokenizer, e.g. `plain`",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one answer between the two texts that its template writes."""

    kind: Kind
    script: Script
    index: int
    """Of the answer in its conversation, from 0."""
    prompt: str
    full: str
    what: str = ""
    """What is dropped, cut off, or written in place of a stop token."""

    @property
    def message(self) -> Message:
        """The answer."""
        return self.script.conversation.messages[self.index]


Works = Callable[[Script], bool]
"""Whether the answer can be taught under another script."""


def refusal(fault: Fault, stops: Stops, works: Works) -> TemplateError:
    """The error in six lines; two of them show the texts where they part."""
    what, stop = fault.what, ", ".join(stops.texts)
    ending = None
    if fault.kind == "unstopped":
        ending = _ending(fault, stops)
        what = _ended(fault, ending)
    elif fault.kind == "cut":
        stop = next(text for text in stops.texts if text in fault.full[len(fault.prompt):])
    place = parting(fault.prompt, fault.full)
    return TemplateError(
        _FOUND[fault.kind].format(what=what, stop=stop),
        required=f"{_REQUIRED[fault.kind].format(stop=stop)}\n    asked:  {_around(fault.prompt, place)}\n"
        f"    taught: {_around(fault.full, place)}",
        where=f"{fault.script.conversation.origin} message {fault.index + 1}",
        remedy=_remedy(fault, stops, ending, works),
    )


def _remedy(fault: Fault, stops: Stops, ending: str | None, works: Works) -> str:
    if ending is not None:
        return f"set model.stop_tokens: {json.dumps([ending, *stops.texts], ensure_ascii=False)}"
    for setting, script in _switches(fault.script):
        if works(script):
            return f"set model.template_arguments: {setting}"
    data, script = _other_data(fault)
    another = f"set model.chat_template to {_LAST_RESORT[fault.kind]}"
    return f"{another}, or {data}" if works(script) else another


def _switches(script: Script) -> Iterator[tuple[str, Script]]:
    """The template's own switches for thinking, each as a setting and the script under it."""
    for name in sorted(name for name in script.program.arguments if "think" in name):
        for value in (True, False):
            yield f"{{{name}: {json.dumps(value)}}}", script.under(**{name: value})


def _other_data(fault: Fault) -> tuple[str, Script]:
    """The answer without its reasoning, or with some."""
    if fault.message.reasoning:
        silent = replace(fault.message, reasoning=None)
        return "take the reasoning out of the rows", fault.script.having(fault.index, silent)
    thoughtful = replace(fault.message, reasoning="Let me think.")
    return "give the answers `reasoning_content`", fault.script.having(fault.index, thoughtful)


def _ending(fault: Fault, stops: Stops) -> str | None:
    """The added token of the tokenizer with which the template ends the answer, as far as texts can tell.

    Where a template writes the next turn's header as well, prompts end like the full text, from the ending on; else it
    is the token with which the text ends, or the first behind the answer.
    """
    if not stops.known:
        return None
    token = re.compile("|".join(map(re.escape, sorted(stops.known, key=len, reverse=True))))
    tail = _tail(fault)
    found = token.findall(tail)
    header = token.findall(tail[len(tail) - parting(tail[::-1], fault.prompt[::-1]):])
    last = [found[-1]] if found and tail.rstrip().endswith(found[-1]) else []
    return next(iter([*header, *last, *found]), None)


def _ended(fault: Fault, ending: str | None) -> str:
    if ending is not None:
        return repr(ending)
    tail = _tail(fault).strip()
    return f"{tail[:40]!r}, which is no token of this tokenizer" if tail else "nothing"


def _tail(fault: Fault) -> str:
    """What the template writes behind the end of the answer's text; all it writes where the text is not found."""
    written = fault.full[parting(fault.prompt, fault.full):]
    end = fault.message.text.strip()[-40:]
    place = written.rfind(end) if end else -1
    return written[place + len(end):] if place >= 0 else written


def parting(left: str, right: str) -> int:
    """The first place where two texts differ."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _around(text: str, place: int) -> str:
    """A short piece of text on both sides of a place, printable; dots where it goes on."""
    start, end = max(0, place - 30), place + 40
    return f"{'…' if start else ''}{text[start:end]!r}{'…' if end < len(text) else ''}"

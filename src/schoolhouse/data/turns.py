"""From a conversation to its supervised turns: what is shown, and what is to be written, as served.

For each assistant message that is taught, `prompt` is the template's render of the messages before it with the
generation prompt, `full` its render through it, and the completion is what `full` adds, cut after the first stop
token. Where `full` does not begin with `prompt`, training on it would teach what is never served: refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from schoolhouse.data.template import Template
from schoolhouse.errors import TemplateError
from schoolhouse.types import Conversation, Message, Origin, Turn

Supervise = Literal["every", "last", "marked"]

EMPTY_THINKING = re.compile(r"(<(?P<tag>[\w:]*think\w*)>\s*</(?P=tag)>|\[THINK\]\s*\[/THINK\])\s*\Z")
"""A closed, empty thinking block at the end of a generation prompt."""
OPEN_THINKING = re.compile(r"(<[\w:]*think\w*>|\[THINK\])\s*\Z")
"""A thinking block that a generation prompt opens and leaves open."""


def to_turns(
    conversation: Conversation, template: Template, stops: Sequence[str], supervise: Supervise
) -> tuple[Turn, ...]:
    """The supervised turns of a conversation in order; raises TemplateError where served and taught would differ."""
    return tuple(
        _turn(conversation, index, weight, template, stops)
        for index, weight in taught(conversation.messages, supervise)
    )


def taught(messages: Sequence[Message], supervise: Supervise) -> list[tuple[int, float]]:
    """Index and weight (> 0) of each assistant message that is learnt."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if supervise == "last":
        answers = answers[-1:]
    default = 0.0 if supervise == "marked" else 1.0
    weights = [default if messages[index].weight is None else messages[index].weight for index in answers]
    return [(index, weight) for index, weight in zip(answers, weights, strict=True) if weight > 0]


def _turn(
    conversation: Conversation, index: int, weight: float, template: Template, stops: Sequence[str]
) -> Turn:
    messages, tools, origin = conversation.messages, conversation.tools, conversation.origin
    prompt = template.render(messages[:index], tools, origin, to_answer=True)
    full = template.render(messages[: index + 1], tools, origin, to_answer=False)
    shown = _shown(prompt, full)
    if shown is None:
        raise _contradiction(prompt, full, messages[index], index, origin)
    completion = _through_stop(full[len(shown):], stops)
    if completion is None:
        raise _unstopped(full[len(shown):], stops, index, origin)
    reasoning = (messages[index].reasoning or "").strip()
    if reasoning and reasoning not in completion:
        raise _dropped_reasoning(completion, reasoning, index, origin)
    return Turn(prompt, completion, weight, prefilled=shown != prompt)


def _shown(prompt: str, full: str) -> str | None:
    """The part of the prompt that the full render repeats, or None where the two contradict each other."""
    if full.startswith(prompt):
        return prompt
    empty = EMPTY_THINKING.search(prompt)
    if empty and full.startswith(prompt[: empty.start()]):
        return prompt[: empty.start()]
    return None


def _through_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text through its first stop token, or None where it has none."""
    ends = [(place, place + len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else None


def _contradiction(prompt: str, full: str, message: Message, index: int, origin: Origin) -> TemplateError:
    start = _parting(prompt, full)
    if OPEN_THINKING.search(prompt) and not message.reasoning:
        found = "the generation prompt opens a thinking block that this answer does not have"
        remedy = "give the rows `reasoning_content`, or set model.template_arguments (often enable_thinking: false)"
    else:
        found = "the template writes this turn differently from how it asks for it"
        remedy = "set model.chat_template to a template whose full text begins with its own prompt"
    return TemplateError(
        found,
        required=f"text that begins with the prompt\n    asked:  …{_around(prompt, start)}\n"
        f"    taught: …{_around(full, start)}",
        where=f"{origin} message {index + 1}",
        remedy=remedy,
    )


def _unstopped(completion: str, stops: Sequence[str], index: int, origin: Origin) -> TemplateError:
    return TemplateError(
        f"the answer has no stop token: it ends in {completion[-40:]!r}",
        required=f"one of {', '.join(stops) or '(no stop token is known)'} after each answer, or the model never stops",
        where=f"{origin} message {index + 1}",
        remedy="set model.stop_tokens to the token that ends the template's turns",
    )


def _dropped_reasoning(completion: str, reasoning: str, index: int, origin: Origin) -> TemplateError:
    return TemplateError(
        "the template drops the reasoning that this answer has",
        required=f"the reasoning in the text\n    data:   {reasoning[:60]!r}\n    taught: {completion[:60]!r}",
        where=f"{origin} message {index + 1}",
        remedy="set model.chat_template or model.template_arguments so that it is kept, or take it out of the rows",
    )


def _parting(left: str, right: str) -> int:
    """The first place where two texts differ."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _around(text: str, place: int) -> str:
    """A short piece of text on both sides of a place, printable."""
    return repr(text[max(0, place - 30) : place + 40])

"""From a conversation to its supervised turns: what is shown, and what is to be written, as served.

For each assistant message that is taught, `prompt` is the template's render of the messages before it with the
generation prompt, `full` its render through it, and the completion is what `full` adds, cut after the first stop
token. Where that would not teach the answer after what is served, the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from schoolhouse.data import kept, refusals
from schoolhouse.data.refusals import Fault
from schoolhouse.data.template import Script, Template
from schoolhouse.data.tokens import Stops
from schoolhouse.errors import TemplateError
from schoolhouse.types import Conversation, Message, Part, Turn

Supervise = Literal["every", "last", "marked"]

PROBE = "a word that stands in no row"
"""What a message is made to say, to see whether a template shows it."""
_PAIRS = [(re.escape(begin), re.escape(end)) for begin, end in kept.THINKING]
_MARKS = tuple(mark for pair in kept.THINKING for mark in pair)
_EMPTY_BLOCK = re.compile("(" + "|".join(rf"{begin}\s*{end}" for begin, end in _PAIRS) + r")\s*\Z")
"""A thinking block at the end of a generation prompt, closed and empty."""
_OPEN_BLOCK = re.compile("(" + "|".join(begin for begin, _ in _PAIRS) + r")\s*\Z")
"""A thinking block that a generation prompt opens and leaves open."""


def to_turns(
    conversation: Conversation, template: Template, stops: Stops, supervise: Supervise
) -> tuple[Turn, ...]:
    """The supervised turns of a conversation in order; raises TemplateError where served and taught would differ."""
    script, learnt = template.script(conversation), taught(conversation.messages, supervise)
    script = script.at_once() if len(learnt) > 1 or script.program.end is not None else script
    written = tuple(_turn(script, index, weight, stops) for index, weight in learnt)
    if learnt:
        _refuse_unshown(script, {index: turn.prompt for (index, _), turn in zip(learnt, written, strict=True)})
    return written


def _refuse_unshown(script: Script, prompts: dict[int, str]) -> None:
    """Raise TemplateError for tools, or a message before the last of the taught answers with these `prompts`, of which
    the template writes nothing even for the answer that follows at once: context that the row has and nobody sees."""
    messages, origin, last = script.conversation.messages, str(script.conversation.origin), max(prompts)
    answers = [index for index, message in enumerate(messages[: last + 1]) if message.role == "assistant"]
    names = [tool["function"]["name"] for tool in script.conversation.tools]
    if names and not any(name in prompts[last] for name in names):
        raise TemplateError(
            f"the chat template writes nothing of the row's tools ({names[0]:.40}, …)", where=origin,
            required="a template that shows them", remedy="set model.chat_template to one that does, or leave the "
            "column out with data.messages",
        )
    for place, message in enumerate(messages[:last]):
        if message.role == "assistant" or _stands_in(message, prompts[last]):
            continue
        following = next(index for index in answers if index > place)
        if not _is_shown(script, place, following):
            raise TemplateError(
                f"the chat template writes nothing of message {place + 1}, of the role {message.role}", where=origin,
                required="roles that the template shows",
                remedy="give it another role, such as system or user, with data.messages or data.function, or set "
                "model.chat_template to one that shows it",
            )


def _stands_in(message: Message, prompt: str) -> bool:
    return all(part.value.strip() in prompt for part in message.parts if part.kind == "text")


def _is_shown(script: Script, place: int, answer: int) -> bool:
    """Whether what a message says stands before an answer; where it does not as it is, whether another word would. A
    prompt that the template refuses, and nobody asked for, shows nothing of this."""
    message = script.conversation.messages[place]
    probe = replace(message, parts=tuple(Part("text", PROBE) if one.kind == "text" else one for one in message.parts))
    try:
        return _stands_in(message, script.prompt(answer)) or PROBE in script.having(place, probe).prompt(answer)
    except TemplateError:
        return True


def taught(messages: Sequence[Message], supervise: Supervise) -> list[tuple[int, float]]:
    """Index and weight (> 0) of each assistant message that is learnt."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if supervise == "last":
        answers = answers[-1:]
    default = 0.0 if supervise == "marked" else 1.0
    weights = [default if messages[index].weight is None else messages[index].weight for index in answers]
    return [(index, weight) for index, weight in zip(answers, weights, strict=True) if weight > 0]


def _turn(script: Script, index: int, weight: float, stops: Stops) -> Turn:
    answer = _answer(script, index, stops.texts)
    if isinstance(answer, Fault):
        raise refusals.refusal(answer, stops, lambda other: _teachable(other, index, stops.texts))
    prompt, completion, prefilled = answer
    return Turn(prompt, completion, weight, prefilled)


def _teachable(script: Script, index: int, stops: Sequence[str]) -> bool:
    try:
        return not isinstance(_answer(script, index, stops), Fault)
    except TemplateError:
        return False


def _answer(script: Script, index: int, stops: Sequence[str]) -> tuple[str, str, bool] | Fault:
    """Prompt, completion, and whether the prompt was prefilled; or what is wrong with it."""
    message, prompt, full = script.conversation.messages[index], script.prompt(index), script.full(index + 1)
    shown = _shown(prompt, full)
    if shown is None:
        return _contradiction(script, index, prompt, full)
    written = full[len(shown):]
    completion = _through_stop(written, stops)
    if completion is None or kept.missing(message, completion) is not None:  # else nothing is missing in `written`
        lost = kept.missing(message, written)
        if lost is not None:
            return Fault("dropped", script, index, prompt, full, lost)
        if completion is None:
            return Fault("unstopped", script, index, prompt, full)
        return Fault("cut", script, index, prompt, full, kept.missing(message, completion))
    astray = _thinks_astray(prompt, completion)
    if astray is not None:
        return Fault(astray, script, index, prompt, full)
    return prompt, completion, shown != prompt


def _shown(prompt: str, full: str) -> str | None:
    """The part of the prompt that the full render repeats, or None where the two contradict each other."""
    if full.startswith(prompt):
        return prompt
    empty = _at_end(_EMPTY_BLOCK, prompt)
    if empty and full.startswith(prompt[: empty.start()]):
        return prompt[: empty.start()]
    return None


def _through_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text through its first stop token, the longest of those at one place; None where it has none."""
    ends = [(place, -len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    if not ends:
        return None
    place, length = min(ends)
    return text[: place - length]


def _contradiction(script: Script, index: int, prompt: str, full: str) -> Fault:
    """The reason why the full render does not begin with the prompt."""
    message = script.conversation.messages[index]
    if _at_end(_OPEN_BLOCK, prompt) and not _thinks(message):
        return Fault("opened", script, index, prompt, full)
    lost = kept.missing(message, full[refusals.parting(prompt, full):])
    if lost is not None:
        return Fault("dropped", script, index, prompt, full, lost)
    return Fault("differs", script, index, prompt, full)


def _thinks_astray(prompt: str, completion: str) -> Literal["opened", "closed"] | None:
    """Whether the answer closes at once the thinking that its prompt opened, or opens what its prompt has closed."""
    opened = _at_end(_OPEN_BLOCK, prompt)
    if opened:
        thought, end, _ = completion.partition(dict(kept.THINKING)[opened[1]])
        return None if end and thought.strip() else "opened"
    again = completion.lstrip().startswith(_MARKS[::2])
    return "closed" if again and _at_end(_EMPTY_BLOCK, prompt) else None


def _at_end(block: re.Pattern[str], prompt: str) -> re.Match[str] | None:
    """The block at the end of a prompt; only its last line or so is searched."""
    if not prompt[-80:].rstrip().endswith(_MARKS):  # most prompts, told at once
        return None
    return block.search(prompt, max(0, len(prompt) - 80))


def _thinks(message: Message) -> bool:
    return bool((message.reasoning or "").strip()) or any(end in message.text for _, end in kept.THINKING)

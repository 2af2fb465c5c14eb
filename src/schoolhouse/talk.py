"""Talking to a student, and two students side by side."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from schoolhouse import evaluate
from schoolhouse.config import Exam, Rows
from schoolhouse.data import images
from schoolhouse.data.messages import to_messages, to_tools
from schoolhouse.data.served import Served
from schoolhouse.errors import DataError, SafetyError
from schoolhouse.model.load import Student
from schoolhouse.types import Conversation, ImageSource, Message, Origin, Part

SHOW = "/image"
"""What a line begins with that shows an image."""
_SHOWN = re.compile(SHOW + r'\s+("(?P<quoted>[^"]+)"|(?P<plain>\S+))\s*(?P<text>.*)', re.DOTALL)
Result = tuple[str, dict[str, Any], Sequence[dict[str, Any]]]
"""A student's name, its score, and its answers."""


def chat(student: Student, served: Served) -> None:
    """Read a message, write the answer, and keep the conversation, until the end of input or an empty line."""
    console, messages = Console(highlight=False), []
    console.print("[dim]an empty line ends the conversation[/dim]")
    if served.sight is not None:
        console.print(f"[dim]{SHOW} PATH shows an image; what follows it on the line is asked about it[/dim]")
    while said := _ask(console):
        messages.append(Message("user", tuple(_parts(said))))
        try:
            answer = reply(student, served, messages)
        except (DataError, SafetyError) as error:  # an image that is not there must not end the conversation
            console.print(str(error), markup=False, style="red")
            messages.pop()
            continue
        messages.append(Message("assistant", (Part("text", answer),)))
        console.print(answer, markup=False, style="green")


def answer_lines(student: Student, served: Served) -> None:
    """For programs: a conversation in a line of JSON, `{"messages": [...]}` as in a row of data, is answered by a line
    `{"answer": ...}`, or `{"error": ...}`, until the end of input."""
    for number, line in enumerate(sys.stdin, 1):
        try:
            asked = _conversation(line, Origin("standard input", number))
            found = {"answer": reply(student, served, asked.messages, tools=asked.tools)}
        except (DataError, SafetyError) as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)


def _conversation(line: str, origin: Origin) -> Conversation:
    """What is asked, before its answer; images are read from below the working directory alone."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{origin} is no object", required='{"messages": [...]}', where=str(origin), remedy="mend it")
    said = to_messages(row.get("messages"), f"{origin} messages")
    shown = images.placed(said, images.listed(row.get("images")), Rows(image_root="."), origin)
    return Conversation(shown, origin, to_tools(row.get("tools"), f"{origin} tools"))


def reply(
    student: Student, served: Served, messages: Sequence[Message], settings: Exam | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The student's answer to a conversation."""
    asked = Conversation(tuple(messages), Origin("chat", 1), tuple(tools))
    prompt, images = served.seen_prompt(asked, len(messages))
    ids = served.tokenize([prompt])
    return evaluate.generate(student, served, ids, settings or Exam(), seed=0, seen=[images])[0].text


def _parts(said: str) -> Iterator[Part]:
    """What was typed as parts of a message: after `/image PATH` comes the text about it."""
    shown = _SHOWN.fullmatch(said)
    if shown is None:
        yield Part("text", said)
        return
    place = Path(shown["quoted"] or shown["plain"]).expanduser()
    yield Part("image", ImageSource(place.name, str(place.parent), Rows().image_pixels))
    yield from [Part("text", shown["text"])] if shown["text"] else []


def print_comparison(first: Result, second: Result) -> None:
    """The questions on which two students differ, then both scores."""
    table = Table("question", first[0], second[0], show_lines=True)
    console = Console(highlight=False)
    for one, other in zip(first[2], second[2], strict=True):
        if one["correct"] != other["correct"]:
            asked = one["question"][-1]["content"] if one["question"] else ""
            table.add_row(_plain(asked), _marked(one), _marked(other))
    console.print(table if table.row_count else "no verdict differs: the same questions are answered rightly by both")
    for name, score, _ in (first, second):
        console.print(f"{name}: {score['correct']} of {score['count']} ({score['score']:.1%})", markup=False)


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _marked(sample: dict[str, Any]) -> str:
    return f"[{'green' if sample['correct'] else 'red'}]{_plain(sample['answer'])}[/]"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")

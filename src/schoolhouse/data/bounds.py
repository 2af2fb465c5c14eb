"""How long a chat template may run, and how much it may write: it is a stranger's program, with loops of its own.

Jinja's sandbox keeps a template away from the machine, and not from its time: two nested loops of a hundred thousand
turns each are allowed there. What breaks a limit is no matter of the row, so it is refused for safety (exit code 8).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError

from schoolhouse.errors import SafetyError

SECONDS = 1.0
"""Processor time of one render; the longest real conversations take hundredths."""
_NEVER = 1e8
"""Seconds of a timer that waits to be wound up."""
CHARACTERS = 1 << 26
"""The longest text: as many as a line of data may have bytes."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, a second of this process's processor time is the limit; raises SafetyError.

    By a timer's signal, which reaches the main thread alone: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        with many(), limited():
            yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)  # again: Python drops an error raised in a destructor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, _NEVER)


@contextlib.contextmanager
def many() -> Iterator[None]:
    """Inside, each `limited` only winds the timer up: its signal has its handler already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _over)
    signal.setitimer(signal.ITIMER_VIRTUAL, _NEVER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _over(_: int, __: FrameType | None) -> None:
    raise refused(f"has not finished after {SECONDS:g} s of processor time", f"at most {SECONDS:g} s for a render")


def checked(text: str) -> str:
    """The text, if it is no longer than a template may write."""
    if len(text) > CHARACTERS:
        raise refused(f"wrote {len(text):,} characters", f"at most {CHARACTERS:,}")
    return text


def multiplied(left: Any, right: Any) -> Any:
    """A product inside a template: `'x' * 10 ** 12` is refused before it takes the memory."""
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(count, int) and len(text) * count > CHARACTERS:
            raise refused(f"repeats a text {count:,} times", f"at most {CHARACTERS:,} characters")
    return left * right


def refuse_escape(error: Exception) -> None:
    """Raises SafetyError where the sandbox has refused a way out of it: Python's own attributes begin with `_`.

    Other things that it refuses, such as a list's `pop`, are mistakes.
    """
    if isinstance(error, SecurityError) and "attribute '_" in str(error):
        raise refused(f"reaches for what the sandbox forbids: {error}", "a template that reads the messages") from None


def refused(found: str, required: str) -> SafetyError:
    """The error of a template that does what none needs to do."""
    return SafetyError(
        f"the chat template {found}", required=required, where="model.chat_template, or the tokenizer's own template",
        remedy="do not use this model's template: look at it, and set model.chat_template to one that you trust",
    )

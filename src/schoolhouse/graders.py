"""Graders: is an answer right? Each takes the answer and the reference and says what it compared."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from schoolhouse.errors import OF_A_FUNCTION, ConfigError

FINAL = re.compile(r"(-?)[^\d\-.\n]{0,3}(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A number, a currency sign before it allowed, its sign before or after that."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one answer."""

    correct: bool
    extracted: str | None
    """What of the answer was compared with the reference; None where nothing was found."""


Grader = Callable[[str, str], Grade]


def grader(name: str) -> Grader:
    """`gsm8k`, `exact`, `contains`, or `module:function(answer, reference)` returning a bool."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise ConfigError(
            f"there is no grader {name!r}", required=f"one of {', '.join(_BUILT_IN)}, or module:function",
            where="exam.grader", remedy="choose one of them",
        )
    try:
        own = importlib.import_module(module).__dict__[function]
        if not callable(own):
            raise TypeError(f"{function} is not a function")
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the grader {name} cannot be imported: {error}", required="`module:function` that Python can import",
            where="exam.grader", remedy="check its name; put its directory on PYTHONPATH",
        ) from None

    def grade(answer: str, reference: str) -> Grade:
        try:
            return Grade(bool(own(answer, reference)), answer)
        except OF_A_FUNCTION as error:
            raise ConfigError(
                f"{name} raised {type(error).__name__}: {error}", remedy="mend the grader",
                required="a grader that judges every answer, also an empty one",
                where=f"the answer {answer!r:.200} to {reference!r:.80}",
            ) from error

    return grade


def gsm8k(answer: str, reference: str) -> Grade:
    """The number after the last `####`, thousands separators and units ignored (Cobbe et al., 2021)."""
    found, wanted = _final_number(answer), _final_number(reference)
    return Grade(found is not None and found == wanted, None if found is None else f"{found.normalize():f}")


def exact(answer: str, reference: str) -> Grade:
    """The whole answer, white space at both ends ignored."""
    return Grade(answer.strip() == reference.strip(), answer.strip())


def contains(answer: str, reference: str) -> Grade:
    """The reference stands somewhere in the answer."""
    return Grade(reference.strip() in answer, answer.strip())


def unanswerable(name: str, reference: str) -> str:
    """Why no answer can be right by this grader; empty where one can."""
    return 'holds no number behind "####"' if name == "gsm8k" and _final_number(reference) is None else ""


_BUILT_IN: dict[str, Grader] = {"gsm8k": gsm8k, "exact": exact, "contains": contains}


def _final_number(text: str) -> Decimal | None:
    _, mark, final = text.rpartition("####")
    found = FINAL.match(final.strip()) if mark else None
    if found is None:
        return None
    before, after, digits = found.groups()
    number = Decimal(digits.replace(",", ""))
    return -number if before or after else number

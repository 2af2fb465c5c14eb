"""Graders: is an answer right? Each takes the answer and the reference and says what it compared."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from schoolhouse.errors import ConfigError

FINAL = re.compile(r"####\s*[^\d\-.\n]{0,3}(-?[\d,]*\.?\d+)")
"""The number after `####`, a currency sign before it allowed."""


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
    except (ImportError, KeyError) as error:
        raise ConfigError(
            f"the grader {name} cannot be imported: {error}", required="`module:function` that Python can import",
            where="exam.grader", remedy="check its name; put its directory on PYTHONPATH",
        ) from None
    return lambda answer, reference: Grade(bool(own(answer, reference)), answer)


def gsm8k(answer: str, reference: str) -> Grade:
    """The number after the last `####`, thousands separators and units ignored (Cobbe et al., 2021)."""
    found, wanted = _final_number(answer), _final_number(reference)
    return Grade(found is not None and found == wanted, None if found is None else f"{found:f}")


def exact(answer: str, reference: str) -> Grade:
    """The whole answer, white space at both ends ignored."""
    return Grade(answer.strip() == reference.strip(), answer.strip())


def contains(answer: str, reference: str) -> Grade:
    """The reference stands somewhere in the answer."""
    return Grade(reference.strip() in answer, answer.strip())


_BUILT_IN: dict[str, Grader] = {"gsm8k": gsm8k, "exact": exact, "contains": contains}


def _final_number(text: str) -> Decimal | None:
    numbers = FINAL.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")).normalize() if numbers else None
    except InvalidOperation:
        return None

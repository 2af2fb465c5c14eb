"""Figures and settings in words: the few ways in which a report writes a number, a time, a share or a setting."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

NOTHING = "–"
"""What stands where a figure is not known."""


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if isinstance(value, int | float) and math.isfinite(value) else NOTHING


def figure(value: float) -> str:
    """A measured number with four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else NOTHING


def plural(number: float, noun: str) -> str:
    """A count with its noun."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(time: Any) -> str:
    """A point in time, to the second: seconds since 1970 in UTC, or ISO text as it stands."""
    if isinstance(time, int | float) and math.isfinite(time):
        return f"{datetime.datetime.fromtimestamp(time, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    if time is None:
        return NOTHING
    try:
        return f"{datetime.datetime.fromisoformat(str(time)):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return str(time)


def value(setting: Any) -> str:
    """A setting or a derived value on one line; a source that is only a path is that path."""
    brief = _brief(setting)
    if brief is None:
        return "unset"
    if isinstance(brief, bool):
        return "yes" if brief else "no"
    if isinstance(brief, str):
        return brief
    if isinstance(brief, int):
        return count(brief)
    return json.dumps(brief, ensure_ascii=False)


def _brief(setting: Any) -> Any:
    """The setting without what is unset; lists and mappings that hold one plain thing are that thing."""
    if isinstance(setting, Mapping):
        inner = {key: _brief(one) for key, one in setting.items() if one is not None}
        return inner["path"] if list(inner) == ["path"] else inner
    if isinstance(setting, list | tuple):
        inner = [_brief(one) for one in setting]
        return inner[0] if len(inner) == 1 else inner
    return setting


def at(recipe: Any, key: str) -> Any:
    """The value of a dotted key; None where it is missing."""
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, Mapping) else None
    return recipe


def wilson(correct: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): right also near 0 and 1 and for few questions."""
    z = 1.959963984540054
    share = correct / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return max(0.0, middle - half), min(1.0, middle + half)

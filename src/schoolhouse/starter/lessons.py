"""Lessons that are made, not downloaded: rows from a seed, the same on every machine.

Only the standard library is used, so a lesson can be listed, hashed and read without torch.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from schoolhouse.errors import DataError
from schoolhouse.starter import arithmetic, recall, sights, words

_LESSONS: Mapping[str, ModuleType] = {"arithmetic": arithmetic, "recall": recall, "sights": sights}
"""Each lesson is a module with `rows(split)`."""

NAMES = tuple(_LESSONS)
"""The lessons there are."""

SPLITS = tuple(words.SHARES)
"""The parts of a lesson; no problem stands in two of them."""


def rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Make the rows of a split, none twice; raises DataError for a lesson or a split that there is not."""
    _require(name, split)
    made: Callable[[str], Iterator[dict[str, Any]]] = _LESSONS[name].rows
    return made(split)


def fingerprint(name: str, split: str) -> str:
    """The sha256 of all that decides the rows: the lesson's file, the words shared by lessons, and the split."""
    _require(name, split)
    files = (Path(str(module.__file__)).read_bytes() for module in (words, _LESSONS[name]))
    return hashlib.sha256(b"".join(files) + f"\n{name}:{split}".encode()).hexdigest()


def _require(name: str, split: str) -> None:
    for kind, given, known in (("lesson", name, NAMES), ("split", split, SPLITS)):
        if given not in known:
            near = difflib.get_close_matches(given, known, n=1, cutoff=0.5) or known[:1]
            raise DataError(
                f"there is no starter {kind} `{given}`",
                required=f"one of: {', '.join(known)}",
                where=f"starter/{name}:{split}",
                remedy=f"did you mean `{near[0]}`?",
            )

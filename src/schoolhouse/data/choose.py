"""Which rows of the sources a store holds: mixed in proportions, limited, and some held out for validation.

A row is drawn by its place and the seed, and held out by what it says and the seed. So nothing depends on the number of
processes, and equal conversations, wherever they stand, are all taught or all held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np

from schoolhouse.config import Recipe, Source
from schoolhouse.data import pictures
from schoolhouse.errors import DataError
from schoolhouse.types import Conversation, Part

DRAWS = 2**63
"""First of the random streams for drawing rows, one for each source; the plan's streams for its epochs begin at 0."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows of one store: of which sources, and which of them."""

    sources: tuple[Source, ...]
    seed: int = 0
    limit: int | None = None
    """The most rows of all sources together."""
    held_out: float = 0.0
    """The share of the rows that is held out for validation."""
    side: Literal["train", "validation"] = "train"

    @property
    def draws(self) -> bool:
        """Whether some rows of the sources are left where they are."""
        return self.limit is not None or self.sources[0].proportion is not None

    def holds(self, conversation: Conversation) -> bool:
        """Whether this choice has the conversation; the other side has it if not."""
        return not self.held_out or is_held_out(conversation, self.held_out, self.seed) == (self.side == "validation")


def choices(recipe: Recipe) -> dict[str, Choice]:
    """What is taught (`train`) and what is held out for `validation`, where there is any."""
    data, share = recipe.data, recipe.data.validation
    if isinstance(share, float):
        train = Choice(data.train, recipe.seed, data.limit, share)
        return {"train": train, "validation": Choice(data.train, recipe.seed, data.limit, share, "validation")}
    found = {"train": Choice(data.train, recipe.seed, data.limit)}
    return found if share is None else {**found, "validation": Choice(share, recipe.seed)}


def drawn(choice: Choice, counts: Sequence[int]) -> Iterator[np.ndarray]:
    """For each source of `counts` rows: bool[rows], which of them are drawn."""
    for number, (source, count, quota) in enumerate(zip(choice.sources, counts, quotas(choice, counts), strict=True)):
        if not quota:
            raise DataError(
                f"none of its {count} rows is drawn", required="a proportion, or a limit, that leaves it some",
                where=source.path, remedy="raise its proportion or data.limit, or delete the source",
            )
        key = np.array([choice.seed, DRAWS + number], dtype=np.uint64)  # as a list it would become float
        keys = np.random.Philox(key=key).random_raw(count)
        chosen = np.zeros(count, dtype=bool)
        chosen[np.argsort(keys, kind="stable")[:quota]] = True
        yield chosen


def quotas(choice: Choice, counts: Sequence[int]) -> list[int]:
    """How many rows of each source are drawn: in their proportions, as many as there are without taking one twice."""
    shares = [Fraction(count if source.proportion is None else source.proportion)
              for source, count in zip(choice.sources, counts, strict=True)]
    rows = min(count * sum(shares) / share for count, share in zip(counts, shares, strict=True))
    rows = rows if choice.limit is None else min(rows, choice.limit)
    ends = accumulate(shares, initial=Fraction(0))  # rounded at their ends, the parts add up
    return [end - start for start, end in pairwise(int(rows * end / sum(shares)) for end in ends)]


def is_held_out(conversation: Conversation, share: float, seed: int) -> bool:
    """Whether a conversation is held out: a number drawn from its content and the seed lies below `share`."""
    said = [(one.role, tuple(map(_content, one.parts)), one.reasoning, one.tool_calls, one.tool_call_id, one.name)
            for one in conversation.messages]
    content = repr((said, conversation.tools)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big") < share * 2**64


def _content(part: Part) -> Part:
    """The part with an image by what it holds, where its `repr` would tell the address of an object instead."""
    if part.kind == "text":
        return part
    return replace(part, value=replace(part.value, value=pictures.content(part.value.value)))

"""What the lessons share: people and things to speak of, and draws that are the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

Choice = TypeVar("Choice")

SHARES = {"train": range(30), "validation": range(30, 31), "exam": range(31, 32)}
"""Which thirty-seconds of all that can be asked belong to a split."""

PEOPLE = {
    "she": "Mia Ana Zoe Lin Aisha Priya Emma Nora Ruth Keiko Fatima Sofia Grace Ivy Maria Lucy Amara Helen Chloe Yara",
    "he": "Ben Omar Tom Raj Leo Kofi Max Ivan Noah Diego Hugo Sam Ken Ali Felix Jack Paul Tariq Oscar Jin",
}
"""Names by pronoun."""
THINGS = (
    "apple pear plum lemon melon carrot egg cake bun muffin book card coin stamp shell bead button sticker ball kite "
    "doll pencil marker crayon badge ticket rose tulip candle cup plate mug brick tile pin rock poster puzzle flag key"
)
"""Things that can be counted; their plural ends in s."""


def seeded(*words: str) -> Random:
    """Random numbers that depend on nothing but the words."""
    return Random(int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:8]))


def draw(random: Random, low: int, high: int) -> int:
    """A whole number; only `Random.random` is used, whose results Python promises never to change."""
    return low + int(random.random() * (high - low + 1))


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    """One of the choices."""
    return choices[int(random.random() * len(choices))]


def part_of_all(text: str) -> int:
    """The thirty-second that a text belongs to, by its hash: what puts a problem into one split only."""
    return hashlib.sha256(text.encode()).digest()[0] % 32

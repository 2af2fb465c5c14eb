"""The lesson of seeing: small drawings of coloured shapes and digits, with questions, and captions.

A picture of 48 x 48 pixels has nine places; one to three of them hold a thing: a shape or a digit, in a colour, not
always in the middle of its place. Which things stand where decides the split, so that no picture, and no arrangement
of the exam, is ever trained. Everything is drawn here, by the standard library, into PNG files of 200 bytes.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from schoolhouse.starter import words

_SIZES = {"train": 50000, "validation": 256, "exam": 256}

SIDE = 48
"""Pixels of a picture's side."""
_CELL = SIDE // 3

_COLOURS = {
    "red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 200, 30),
    "black": (20, 20, 20),
}
_PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
_SHAPES = {
    "square": lambda x, y: max(abs(x), abs(y)) <= 4,
    "circle": lambda x, y: x * x + y * y <= 26,
    "triangle": lambda x, y: -5 <= y <= 4 and 2 * abs(x) <= y + 5,
    "cross": lambda x, y: min(abs(x), abs(y)) <= 1 and max(abs(x), abs(y)) <= 5,
}
"""Whether a pixel, counted from the middle of the shape, belongs to it."""
_FONT = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7), "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 2, 2), "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7),
}
"""Rows of three pixels, from the top; each is drawn three pixels wide and high."""
_Kind = Callable[[Random, list["_Thing"]], tuple[str, str] | None]
_NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True, slots=True)
class _Thing:
    """One thing in a picture."""

    place: int
    name: str
    """A shape's name, or a digit."""
    colour: str

    @property
    def words(self) -> str:
        return f"{self.colour} {self.name}"


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Make the rows of a split, `{"image": {"bytes", "path"}, "question", "answer"}` each."""
    random, made = words.seeded("sights", split), 0
    while made < _SIZES[split]:
        things = _arrange(random)
        if words.part_of_all(";".join(f"{one.place} {one.words}" for one in things)) not in words.SHARES[split]:
            continue
        asked = _ask(random, things, _TAUGHT if split == "train" else _KINDS)
        if asked is not None:
            question, answer = asked
            yield {"image": {"bytes": _draw(random, things), "path": None}, "question": question, "answer": answer}
            made += 1


def _arrange(random: Random) -> list[_Thing]:
    """One to three things in different places."""
    free, things = list(range(9)), []
    for _ in range(words.draw(random, 1, 3)):
        place = free.pop(int(random.random() * len(free)))
        name = words.pick(random, tuple(_SHAPES)) if random.random() < 0.7 else words.pick(random, tuple(_FONT))
        things.append(_Thing(place, name, words.pick(random, tuple(_COLOURS))))
    return sorted(things, key=lambda thing: thing.place)


# Questions.


def _ask(random: Random, things: list[_Thing], kinds: Sequence[_Kind]) -> tuple[str, str] | None:
    """A question about the picture with its only answer; None where this picture has none of the kind drawn."""
    return words.pick(random, kinds)(random, things)


def _colour(random: Random, things: list[_Thing]) -> tuple[str, str] | None:
    one = words.pick(random, things)
    if [thing.name for thing in things].count(one.name) > 1:
        return None
    return f"What colour is the {one.name}?", one.colour


def _where(random: Random, things: list[_Thing]) -> tuple[str, str] | None:
    one = words.pick(random, things)
    if [thing.words for thing in things].count(one.words) > 1:
        return None
    return f"Where is the {one.words}?", _PLACES[one.place]


def _what(random: Random, things: list[_Thing]) -> tuple[str, str] | None:
    one = words.pick(random, things)
    return f"What is at the {_PLACES[one.place]}?", f"a {one.words}"


def _count(random: Random, things: list[_Thing]) -> tuple[str, str] | None:
    name = words.pick(random, things).name if random.random() < 0.8 else words.pick(random, tuple(_SHAPES))
    if name in _FONT:
        return "How many things are there?", _NUMBERS[len(things)]
    return f"How many {name}s are there?".replace("crosss", "crosses"), _NUMBERS[
        sum(thing.name == name for thing in things)
    ]


def _digit(random: Random, things: list[_Thing]) -> tuple[str, str] | None:
    digits = [thing for thing in things if thing.name in _FONT]
    return ("Which digit is there?", digits[0].name) if len(digits) == 1 else None


def _caption(random: Random, things: list[_Thing]) -> tuple[str, str]:
    return "Describe the picture.", ", ".join(f"{_PLACES[thing.place]}: {thing.words}" for thing in things)


_KINDS = (_caption, _where, _colour, _what, _count, _digit)
"""The kinds of questions."""
_TAUGHT = (*_KINDS, _caption, _caption, _where, _where, _colour, _count)
"""Training has more captions, which say most about a picture, and more of what has to be looked for in it."""


# Pictures.


@functools.cache
def _pixels(name: str) -> tuple[tuple[int, int], ...]:
    """The pixels of a thing, counted from its middle."""
    reach = range(-7, 8)
    if name in _SHAPES:
        return tuple((x, y) for y in reach for x in reach if _SHAPES[name](x, y))
    lit = [(column, row) for row, bits in enumerate(_FONT[name]) for column in range(3) if bits >> (2 - column) & 1]
    return tuple((3 * x - 4 + i, 3 * y - 7 + j) for x, y in lit for i in range(3) for j in range(3))


def _draw(random: Random, things: list[_Thing]) -> bytes:
    """The picture as a PNG: a pale ground, each thing up to a pixel or two beside the middle of its place."""
    shade = words.draw(random, 225, 255)
    image = bytearray([shade] * (SIDE * SIDE * 3))
    for thing in things:
        middle_x = thing.place % 3 * _CELL + _CELL // 2 + words.draw(random, -2, 2)
        reach = 0 if thing.name in _FONT else 2
        middle_y = thing.place // 3 * _CELL + _CELL // 2 + words.draw(random, -reach, reach)
        colour = bytes(_COLOURS[thing.colour])
        for x, y in _pixels(thing.name):
            start = 3 * ((middle_y + y) * SIDE + middle_x + x)
            image[start : start + 3] = colour
    lines = b"".join(b"\0" + image[3 * SIDE * row : 3 * SIDE * (row + 1)] for row in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, content)
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

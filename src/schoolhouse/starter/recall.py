"""Long conversations to be remembered: facts are told early, other talk follows, and much later they are asked for.

The user tells who he is, what he has, what he needs and his number, in any order. The answers to be graded are those
that need a fact told several turns before; in the exam only they carry the weight 1. What is told together in one
conversation of a split is never told together in another split.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from schoolhouse.starter.words import PEOPLE, SHARES, THINGS, draw, part_of_all, pick, seeded

_SIZES = {"train": 12_000, "validation": 64, "exam": 64}

_ASIDES = {"train": (0, 6), "validation": (3, 6), "exam": (3, 6)}
"""Turns of other talk between the facts and the questions; training has easy conversations too."""

_PEOPLE = tuple(name for names in PEOPLE.values() for name in names.split())
_BOXES = ("boxes", "bags", "jars", "trays", "crates", "baskets", "shelves", "drawers", "packs")
_VALUES = {
    "name": _PEOPLE, "things": tuple(f"{thing}s" for thing in THINGS.split()), "boxes": _BOXES,
    "number": tuple("23456789"),
}
"""What can be told, by the kind of fact."""
_SAID = {
    "name": (("I am {}.", "My name is {}."), ("Who am I?", "What is my name?"), "You are {}."),
    "things": (("I have {}.", "I bought {}."), ("What do I have?", "What was it that I have?"), "You have {}."),
    "boxes": (("I need {}.", "Now I need {}."), ("What do I need?", "What was it that I need?"), "You need {}."),
    "number": (("My number is {}.", "I have the number {}."), ("What is my number?", "And my number?"),
               "Your number is {}."),
}
"""How a fact is told, how it is asked for, and the answer: also what is answered when it is told."""
_OTHER_TALK = (
    ("How are you?", "I am well."), ("Thank you.", "Yes."), ("Is it late?", "No."), ("Are they red?", "They are blue."),
    ("Is it far?", "Not in a bus."), ("Tell me more.", "A day has many hours."), ("Is that so?", "Yes."),
)


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Make the conversations of a split, `{"messages"}` each; the answers of the exam carry the weight 0 or 1."""
    random, seen = seeded("recall", split), set()
    while len(seen) < _SIZES[split]:
        facts = {kind: pick(random, values) for kind, values in _VALUES.items()}
        told = " ".join(facts.values())
        if part_of_all(told) in SHARES[split] and told not in seen:
            seen.add(told)
            messages = [message for turn in _turns(random, facts, _ASIDES[split]) for message in turn]
            yield {"messages": messages if split == "exam" else [_unmarked(message) for message in messages]}


def _turns(
    random: Random, facts: dict[str, str], asides: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every fact told, other talk, then every fact asked for in another order."""
    for kind in _shuffled(random, list(facts)):
        tell, _, answer = _SAID[kind]
        yield _turn(pick(random, tell).format(facts[kind]), answer.format(facts[kind]), weight=0)
    for _ in range(draw(random, *asides)):
        yield _turn(*pick(random, _OTHER_TALK), weight=0)
    for kind in _shuffled(random, list(facts)):
        _, ask, answer = _SAID[kind]
        yield _turn(pick(random, ask), answer.format(facts[kind]), weight=1)


def _turn(said: str, answer: str, *, weight: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"role": "user", "content": said}, {"role": "assistant", "content": answer, "weight": weight}


def _shuffled(random: Random, kinds: list[str]) -> list[str]:
    order = []
    while kinds:
        order.append(kinds.pop(draw(random, 0, len(kinds) - 1)))
    return order


def _unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its weight: in training every answer is learnt."""
    return {"role": message["role"], "content": message["content"]}

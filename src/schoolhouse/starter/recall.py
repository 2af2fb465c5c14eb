"""Long conversations to be remembered: facts are told early, other talk follows, and much later they are asked for.

A fact is who has what, such as `Mia has plums`. The answers to be graded are those that need a fact
told several turns before; in the exam only they carry the weight 1. No fact of a split occurs in another split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from schoolhouse.starter.words import PEOPLE, SHARES, THINGS, draw, part_of_all, pick, seeded

_SIZES = {"train": 24_000, "validation": 64, "exam": 64}

_FACTS = {"train": (1, 4), "validation": (2, 4), "exam": (2, 4)}
"""The smallest and largest number of facts in a conversation. Training begins with what is easy."""
_ASIDES = {"train": (0, 4), "validation": (2, 4), "exam": (2, 4)}
"""Turns of other talk between the last fact and the first question."""
_TELL = ("{A} has {things}.", "Remember, {A} has {things}.", "I see that {A} has {things}.")
_ASK = ("What does {A} have?", "What was it that {A} has?", "And {A}?")
_FACT = "{A} has {things}."
_ASIDES_SAID = (
    ("How are you?", "I am well."), ("Thank you.", "Yes."), ("Is it late?", "No."), ("Say {things}.", "{things}."),
    ("{A} is here.", "Hello, {A}."), ("Is {A} here?", "{A} is here."), ("Are {things} red?", "No."),
)


@dataclass(frozen=True, slots=True)
class _Fact:
    """Who has what."""

    person: str
    things: str

    @property
    def words(self) -> dict[str, Any]:
        """The fact as the words of a format string."""
        return {"A": self.person, "things": self.things}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Make the conversations of a split, `{"messages"}` each; the answers of the exam carry the weight 0 or 1."""
    random, seen = seeded("recall", split), set()
    while len(seen) < _SIZES[split]:
        facts = _facts(random, split)
        if facts not in seen:
            seen.add(facts)
            messages = [message for turn in _turns(random, facts, _ASIDES[split]) for message in turn]
            yield {"messages": messages if split == "exam" else [_unmarked(message) for message in messages]}


def _facts(random: Random, split: str) -> tuple[_Fact, ...]:
    """Facts of different people about different things, all of this split's share."""
    facts: list[_Fact] = []
    people = [name for names in PEOPLE.values() for name in names.split()]
    wanted = draw(random, *_FACTS[split])
    while len(facts) < wanted:
        fact = _Fact(pick(random, people), f"{pick(random, THINGS.split())}s")
        new = all(fact.person != other.person and fact.things != other.things for other in facts)
        if new and part_of_all(_FACT.format_map(fact.words)) in SHARES[split]:
            facts.append(fact)
    return tuple(facts)


def _turns(
    random: Random, facts: tuple[_Fact, ...], asides: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every fact told, other talk, then each fact asked for in another order."""
    for fact in facts:
        yield _turn(pick(random, _TELL), _FACT, fact, weight=0)
    for _ in range(draw(random, *asides)):
        said, answer = pick(random, _ASIDES_SAID)
        yield _turn(said, answer, _stranger(random, facts), weight=0)
    for fact in _shuffled(random, facts):
        yield _turn(pick(random, _ASK), _FACT, fact, weight=1)


def _stranger(random: Random, facts: tuple[_Fact, ...]) -> _Fact:
    """What other talk is about: nobody and nothing that is to be remembered."""
    people = [name for names in PEOPLE.values() for name in names.split()]
    others = [name for name in people if name not in {fact.person for fact in facts}]
    things = [f"{thing}s" for thing in THINGS.split() if f"{thing}s" not in {fact.things for fact in facts}]
    return _Fact(pick(random, others), pick(random, things))


def _shuffled(random: Random, facts: tuple[_Fact, ...]) -> list[_Fact]:
    left, order = list(facts), []
    while left:
        order.append(left.pop(draw(random, 0, len(left) - 1)))
    return order


def _turn(said: str, answer: str, fact: _Fact, *, weight: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"role": "user", "content": said.format_map(fact.words)},
        {"role": "assistant", "content": answer.format_map(fact.words), "weight": weight},
    )


def _unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """The message without its weight: in training every answer is learnt."""
    return {"role": message["role"], "content": message["content"]}

"""The lesson of remembering: what is told together in the exam never is in training, and is asked for much later."""

import hashlib
import json
import re

import pytest

from schoolhouse.starter import lessons
from schoolhouse.starter.words import PEOPLE, THINGS

ANSWER = re.compile(r"You (?:are (?P<name>[A-Z]\w+)|have (?P<things>\w+)|need (?P<boxes>\w+))\.|"
                    r"Your number is (?P<number>\d)\.")

GOLDEN = {
    "train": "cb1d6c27ac42943d8817c9f9230dc56693a3fe6ccdd4cf08287fc3e8731e86b1",
    "validation": "06b014803655ae1b4702bcf698552a43a811a6d44b55cb7989846526d6a9b97c",
    "exam": "5e41b88e650be43aa0e41201e88d2b4f55aa5c477450ffb1053c6454cfda49a8",
}
"""sha256 of the first hundred rows as JSON lines: a change here changes every store and exam made of them."""


@pytest.fixture(scope="module")
def rows():
    return {split: list(lessons.rows("recall", split)) for split in lessons.SPLITS}


def turns(row):
    """Pairs of what the user says and the assistant's message."""
    messages = row["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2)
    return [(asked["content"], answer) for asked, answer in zip(messages[::2], messages[1::2], strict=True)]


def facts(row):
    """For each kind of fact its value, and the turns at which it is told and asked for."""
    found = {}
    for number, (_, answer) in enumerate(turns(row)):
        said = ANSWER.fullmatch(answer["content"])
        if said:
            kind, value = next((kind, value) for kind, value in said.groupdict().items() if value)
            found.setdefault(kind, []).append((value, number))
    assert all(len(places) == 2 and places[0][0] == places[1][0] for places in found.values()), row
    return {kind: (told[0], told[1], asked[1]) for kind, (told, asked) in found.items()}


def test_the_rows_never_change(rows):
    def digest(split):
        return hashlib.sha256("\n".join(map(json.dumps, rows[split][:100])).encode()).hexdigest()

    assert {split: digest(split) for split in lessons.SPLITS} == GOLDEN


def test_sizes_and_no_facts_twice(rows):
    assert {split: len(rows[split]) for split in rows} == {"train": 12_000, "validation": 64, "exam": 64}
    every = [tuple(sorted((kind, one[0]) for kind, one in facts(row).items())) for split in rows for row in rows[split]]
    assert len(every) == len(set(every)), "no conversation of any split tells what another one tells"


def test_the_hash_and_not_the_draw_parts_the_splits(rows):
    """Twice as many rows would still have nothing in common: a combination belongs to one split by its own words."""
    from schoolhouse.starter.words import SHARES, part_of_all

    for split in lessons.SPLITS:
        for row in rows[split]:
            values = {kind: one[0] for kind, one in facts(row).items()}
            told = " ".join(values[kind] for kind in ("name", "things", "boxes", "number"))
            assert part_of_all(told) in SHARES[split]


def test_every_value_occurs_in_training(rows):
    """What is new in the exam is the combination, not a word that was never seen."""
    seen = {kind: {facts(row)[kind][0] for row in rows["train"]} for kind in ("name", "things", "boxes", "number")}
    assert seen["name"] == {name for names in PEOPLE.values() for name in names.split()}
    assert seen["things"] == {f"{thing}s" for thing in THINGS.split()}
    assert len(seen["number"]) == 8 and len(seen["boxes"]) == 9


def test_a_question_gives_nothing_away(rows):
    for row in (row for split in rows for row in rows[split]):
        said = turns(row)
        for value, told, asked in facts(row).values():
            assert value in said[told][0] and value not in said[asked][0]


def test_the_exam_asks_several_turns_later(rows):
    """At least three turns of other talk lie between the last fact and the first question."""
    for split in ("validation", "exam"):
        distances = [asked - told for row in rows[split] for _, told, asked in facts(row).values()]
        assert min(distances) >= 4 and sum(distances) / len(distances) > 7


def test_other_talk_gives_nothing_away(rows):
    for row in (row for split in rows for row in rows[split]):
        found = facts(row).values()
        places = {place for _, told, asked in found for place in (told, asked)}
        values = {value for value, _, _ in found}
        for number, (said, answer) in enumerate(turns(row)):
            if number not in places:
                assert not values & set(re.findall(r"\w+", f"{said} {answer['content']}")), row


def test_only_recalled_answers_of_the_exam_are_graded(rows):
    for row in rows["exam"]:
        graded = [number for number, (_, answer) in enumerate(turns(row)) if answer["weight"] == 1]
        assert sorted(graded) == sorted(asked for _, _, asked in facts(row).values())
        assert {answer["weight"] for _, answer in turns(row)} == {0, 1}
    others = (one for split in ("train", "validation") for row in rows[split] for one in row["messages"])
    assert not any("weight" in one for one in others)


def test_no_scaffolding_is_left_in_the_text(rows):
    text = "\n".join(one["content"] for split in rows for row in rows[split] for one in row["messages"])
    assert not re.search(r"[\[\](){}|_]|  | [.,?]", text)

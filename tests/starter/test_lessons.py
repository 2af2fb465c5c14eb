"""The lessons: the same rows everywhere, right arithmetic, and an exam of calculations that training never shows."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from schoolhouse.errors import DataError
from schoolhouse.starter import arithmetic, lessons
from schoolhouse.starter.words import PEOPLE, THINGS

MARK = re.compile(r"(\d+)([-+*/])(\d+) = \$?<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
IN_WORDS = {2: ("twice", "double", "half", "share", "$2"), 7: ("week",)}
"""Numbers a question gives in words, and the words."""

GOLDEN = {
    "train": "997fda152e603a19ef6503dc1c6734b3292365975f0d40fd1eb80d1e3c2ffba7",
    "validation": "39cf497fb828a2ca8fe7f3451e3aa4e872ba92181031c9056f2cbbe933daa76e",
    "exam": "7d42ca0165182317a41831205d3e93f535f43fddff459ca26750364fc2468747",
}
"""sha256 of the first hundred rows as JSON lines: a change here changes every store, student and exam made of them."""


@pytest.fixture(scope="module")
def rows():
    return {split: list(lessons.rows("arithmetic", split)) for split in lessons.SPLITS}


def steps(row):
    """The calculations of an answer, read from its marks: [(left, operator, right, result)]."""
    return [(int(a), op, int(b), int(c)) for _, _, _, a, op, b, c, _ in MARK.findall(row["answer"])]


def calculation(row):
    """What makes two problems the same: operators and numbers; the sides of a sum or product may change places."""
    return tuple((op, *(sorted((a, b)) if op in "+*" else (a, b))) for a, op, b, _ in steps(row))


def test_the_rows_never_change(rows):
    def digest(split):
        return hashlib.sha256("\n".join(map(json.dumps, rows[split][:100])).encode()).hexdigest()

    assert {split: digest(split) for split in lessons.SPLITS} == GOLDEN


def test_another_process_makes_the_same_rows_without_torch(rows):
    code = """
import hashlib, sys
from schoolhouse.starter import lessons
print(hashlib.sha256(repr(list(lessons.rows("arithmetic", "train"))).encode()).hexdigest())
print(lessons.fingerprint("arithmetic", "train"))
print([name for name in ("torch", "numpy", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True, text=True, check=True,
    )
    here = hashlib.sha256(repr(rows["train"]).encode()).hexdigest()
    assert done.stdout.split("\n")[:3] == [here, lessons.fingerprint("arithmetic", "train"), "[]"]


def test_sizes_and_no_question_twice(rows):
    assert {split: len(rows[split]) for split in rows} == {"train": 24_000, "validation": 256, "exam": 256}
    questions = [row["question"] for split in rows for row in rows[split]]
    assert len(questions) == len(set(questions))


def test_no_calculation_of_a_split_occurs_in_another(rows):
    train, validation, exam = ({calculation(row) for row in rows[split]} for split in lessons.SPLITS)
    assert not train & exam
    assert not train & validation
    assert not validation & exam
    assert len(exam) == len(validation) == 256, "no calculation is asked twice"


def test_every_calculation_is_right(rows):
    work = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for row in (row for split in rows for row in rows[split]):
        *lines, last = row["answer"].split("\n")
        found = [MARK.search(line).groups() for line in lines]  # one calculation on each line
        for a, op, b, *inside, c, shown in found:
            assert [a, op, b] == inside and c == shown, row
            assert (int(c) * int(b) == int(a)) if op == "/" else (work[op](int(a), int(b)) == int(c)), row
        assert row["answer"].count("<<") == len(lines), row
        assert last == f"#### {found[-1][-1]}", row


def test_every_number_used_is_given_or_worked_out_before(rows):
    for row in (row for split in rows for row in rows[split]):
        known = {int(number) for number in re.findall(r"\d+", row["question"])}
        asked = row["question"].lower()
        known |= {number for number, words in IN_WORDS.items() if any(word in asked for word in words)}
        for left, _, right, result in steps(row):
            assert {left, right} <= known, row
            known.add(result)


def test_results_stay_in_the_range_of_the_lesson(rows):
    results = [step[3] for split in rows for row in rows[split] for step in steps(row)]
    assert min(results) >= 2
    assert max(results) <= arithmetic._LARGEST


@pytest.mark.parametrize("split", lessons.SPLITS)
def test_the_lesson_is_not_trivial(rows, split):
    worked = [steps(row) for row in rows[split]]
    lengths = [len(calculations) for calculations in worked]
    assert {length for length in lengths} == {1, 2, 3}
    assert all(lengths.count(length) / len(lengths) > 0.07 for length in (1, 2, 3))
    operators = [op for calculations in worked for _, op, _, _ in calculations]
    assert all(operators.count(op) / len(operators) > 0.05 for op in "+-*/")


def test_the_wording_varies(rows):
    things, people = set(THINGS.split()), set(" ".join(PEOPLE.values()).split())

    def pattern(text):
        words = re.findall(r"[A-Za-z]+|\d+|\S", text)
        kinds = {**dict.fromkeys(people, "NAME"), **{f"{thing}s": "THINGS" for thing in things}}
        return " ".join("N" if word.isdigit() else kinds.get(word, word) for word in words)

    questions = [row["question"] for row in rows["train"]]
    assert len({pattern(question) for question in questions}) > 80
    words = set(re.findall(r"[A-Za-z]+", " ".join(questions)))
    assert people <= words
    assert {f"{thing}s" for thing in things} <= words


def test_no_scaffolding_is_left_in_the_text(rows):
    text = "\n".join(row["question"] + row["answer"] for split in rows for row in rows[split])
    assert not re.search(r"[\[\](){}|]", text)
    assert not re.search(r"  | [.,?]|\ba [aeiou]", text)


def test_fingerprints_tell_splits_apart():
    fingerprints = {lessons.fingerprint("arithmetic", split) for split in lessons.SPLITS}
    assert len(fingerprints) == 3
    assert all(re.fullmatch(r"[0-9a-f]{64}", fingerprint) for fingerprint in fingerprints)


@pytest.mark.parametrize(
    ("name", "split", "meant"), [("arithmetics", "train", "arithmetic"), ("arithmetic", "exams", "exam")]
)
def test_a_wrong_name_is_answered_with_the_nearest(name, split, meant):
    for ask in (lessons.fingerprint, lambda *words: next(lessons.rows(*words))):
        with pytest.raises(DataError, match=f"did you mean `{meant}`") as caught:
            ask(name, split)
        assert caught.value.exit_code == 3
        assert caught.value.where == f"starter/{name}:{split}"

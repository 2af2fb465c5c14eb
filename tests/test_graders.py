"""Graders: the conventions of GSM8K's own answers, and nothing counted right that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse import graders
from schoolhouse.errors import ConfigError

RIGHT = [
    ("#### 72", "#### 72"), ("48/2 = <<48/2=24>>24\n#### 72", "So it is\n#### 72"), ("####72", "#### 72"),
    ("#### 72.00", "#### 72"), ("#### 72.0", "#### 72"), ("#### 072", "#### 72"), ("#### 72.", "#### 72"),
    ("#### 1,234", "#### 1234"), ("#### 1234", "#### 1,234"), ("#### 1,234,567.50", "#### 1234567.5"),
    ("#### $18", "#### 18"), ("#### $ 18", "#### 18"), ("#### €18", "#### 18"), ("#### 18$", "#### 18"),
    ("#### 18 dollars", "#### 18"), ("#### 5 km/h", "#### 5"), ("#### 20%", "#### 20"), ("#### -3", "#### -3"),
    ("#### -$3", "#### -3"), ("#### $-3", "#### -3"), ("#### .5", "#### 0.5"), ("#### 0.50", "#### .5"),
    ("#### -0", "#### 0"), ("#### 1000", "#### 1000.0"), ("#### 4 and then #### 5", "#### 5"),
    ("####\n72", "#### 72"), ("#### **72**", "#### 72"), ("#### 72<|im_end|>", "#### 72"), (" #### 72 \n\n", "#### 72"),
    ("#### 0.1", "#### 0.10"), ("#### 100000000000000000001", "#### 100,000,000,000,000,000,001"),
]
WRONG = [
    ("72", "#### 72"), ("", "#### 72"), ("#### ", "#### 72"), ("#### none", "#### 72"), ("### 72", "#### 72"),
    ("#### 73", "#### 72"), ("#### 7", "#### 72"), ("#### 720", "#### 72"), ("#### 72.5", "#### 72"),
    ("#### 3", "#### -3"), ("#### -3", "#### 3"), ("#### 5 #### 4", "#### 5"), ("#### 0.72", "#### 72"),
    ("#### 1.234", "#### 1234"), ("#### 100000000000000000000", "#### 100000000000000000001"),
    ("#### the answer is not 72", "#### 72"), ("72 ####", "#### 72"), ("#### 5 #### none", "#### 5"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_gsm8k_right(answer: str, reference: str) -> None:
    """Separators, currency, units, trailing zeros and the sign before the currency are ways to write a number."""
    assert graders.gsm8k(answer, reference).correct


@pytest.mark.parametrize(("answer", "reference"), WRONG)
def test_gsm8k_wrong(answer: str, reference: str) -> None:
    """No answer, another number, another sign, or one that only begins alike."""
    assert not graders.gsm8k(answer, reference).correct


def test_gsm8k_shows_what_it_compared() -> None:
    assert graders.gsm8k("#### $1,250.00", "#### 1").extracted == "1250"
    assert graders.gsm8k("#### 1000000", "#### 1").extracted == "1000000", "no exponent for a reader"
    assert graders.gsm8k("no number", "#### 1").extracted is None


def test_no_answer_equals_no_reference() -> None:
    """Two missing numbers are not the same number."""
    assert not graders.gsm8k("nothing", "nothing").correct


@settings(max_examples=200, deadline=None)
@given(st.integers(-10**30, 10**30), st.integers(-10**30, 10**30), st.integers(0, 3), st.text(max_size=20))
def test_gsm8k_compares_values(number: int, other: int, zeros: int, before: str) -> None:
    """However a whole number is written, it equals itself and no other."""
    shown = f"{before}\n#### {number:,}" + ("." + "0" * zeros if zeros else "")
    assert graders.gsm8k(shown, f"#### {number}").correct
    assert graders.gsm8k(shown, f"#### {other}").correct == (number == other)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_a_grader(answer: str, reference: str) -> None:
    """A student may write anything after the mark."""
    for text in (answer, f"#### {answer}", f"####{answer}#### ,.-$1,,2..3"):
        for grade in (graders.gsm8k, graders.exact, graders.contains):
            assert isinstance(grade(text, reference).correct, bool)


def test_real_references_grade_themselves_correct(shared: Path) -> None:
    """Every reference of the real test set is right for itself and, with another number, wrong."""
    lines = (shared / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    for answer in answers:
        assert graders.gsm8k(answer, answer).correct, answer
        assert graders.gsm8k(f"I think #### ${answer.split('####')[1].strip()}.00 in all.", answer).correct, answer
        assert not graders.gsm8k(answer + "1", answer).correct, answer
        assert not graders.gsm8k(answer.split("####")[0], answer).correct, answer


def test_exact_and_contains() -> None:
    assert graders.exact(" Paris\n", "Paris").correct and not graders.exact("in Paris", "Paris").correct
    assert graders.contains("in Paris.", " Paris ").correct and not graders.contains("Rome", "Paris").correct


def test_own_grader(own_module: Callable[[str, str], str]) -> None:
    """`module:function` is imported and its truth taken; what it compared is the whole answer."""
    name = own_module("my_own_grader", "def lenient(answer, reference):\n    return reference[0] in answer\n")
    grade = graders.grader(f"{name}:lenient")
    assert grade("xyz", "yes") == graders.Grade(True, "xyz") and not grade("x", "yes").correct


@pytest.mark.parametrize("raised", ["assert answer", "answer[9]", "int(answer)", "raise RuntimeError"])
def test_an_own_grader_that_fails_names_the_answer(raised: str, own_module: Callable[[str, str], str]) -> None:
    name = own_module("my_failing_grader", f"def grade(answer, reference):\n    {raised}\n")
    with pytest.raises(ConfigError, match="raised") as caught:
        graders.grader(f"{name}:grade")("", "seven")
    assert caught.value.where == "the answer '' to 'seven'"


@pytest.mark.parametrize("name", [
    "gsm9k", "no_such_module:grade", "json:no_such_function", "json:", ":f", "a.b:c", "os:sep",
])
def test_a_grader_that_is_not_there(name: str) -> None:
    """Said when the recipe is read into a run, not after the answers are written."""
    with pytest.raises(ConfigError, match="grader") as caught:
        graders.grader(name)
    assert caught.value.where == "exam.grader"


def test_built_in_graders_by_name() -> None:
    assert [graders.grader(name) for name in ("gsm8k", "exact", "contains")] == [
        graders.gsm8k, graders.exact, graders.contains
    ]

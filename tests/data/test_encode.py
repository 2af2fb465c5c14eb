"""From turns to examples: merged exactly, shifted once, and cut only between turns."""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse.data import encode, turns
from schoolhouse.data.template import compile_template
from schoolhouse.data.tokens import Stops
from schoolhouse.data.words import packed
from schoolhouse.errors import DataError, TemplateError
from schoolhouse.types import UNSUPERVISED, Conversation, Example, Origin, Turn

ORIGIN = Origin("rows.jsonl", 3)
VOCABULARY: list[str] = ["</s>", "<end>", "ab", "a", "[u]", "\n\n"]
STOP_IDS = (0, 1)


def ids_of(text: str) -> list[int]:
    """A tokenizer in which letters join across places (`ab`, two line breaks), so that splits do occur."""
    pieces = re.findall("|".join(map(re.escape, VOCABULARY)) + "|.", text, re.DOTALL)
    return [VOCABULARY.index(piece) if piece in VOCABULARY else 1000 + ord(piece) for piece in pieces]


def encoded(taught: list[Turn]) -> list[encode.Ids]:
    return [(packed(ids_of(turn.prompt)), packed(ids_of(turn.completion))) for turn in taught]


def examples(taught: list[Turn], **how) -> tuple[tuple[Example, ...], int]:
    how = {"max_tokens": 10_000, "too_long": "error", **how}
    return encode.to_examples(taught, encoded(taught), STOP_IDS, ORIGIN, **how)[:2]


def learnt(found: tuple[Example, ...]) -> list[tuple[list[int], list[int], set[float]]]:
    """Ids before, targets and their weights of each supervised turn: the slow definition, read off the examples."""
    spans = []
    for example in found:
        ids = [*example.input_ids.tolist(), int(example.labels[-1])]
        start = None
        for place in range(1, len(ids)):
            if example.labels[place - 1] != UNSUPERVISED:
                start = place if start is None else start
                if ids[place] in STOP_IDS:
                    weights = set(example.weights[start - 1 : place].tolist())
                    spans.append((ids[:start], ids[start : place + 1], weights))
                    start = None
        assert start is None
    return spans


def test_one_turn() -> None:
    [example], cut = examples([Turn("[u]q[a]", "z</s>", 0.5)])
    letters = {letter: 1000 + ord(letter) for letter in "q[]z"}
    assert example.input_ids.tolist() == [4, letters["q"], letters["["], 3, letters["]"], letters["z"]]
    assert example.labels.tolist() == [UNSUPERVISED] * 4 + [letters["z"], 0]
    assert example.weights.tolist() == [0, 0, 0, 0, 0.5, 0.5] and cut == 0
    assert (example.input_ids.dtype, example.labels.dtype, example.weights.dtype) == (np.int32, np.int32, np.float32)


def test_a_turn_goes_on_where_its_tokens_do() -> None:
    first, second = Turn("q", "a</s>", 1.0), Turn("qa</s>r", "c</s>", 1.0)
    assert len(examples([first, second])[0]) == 1
    assert len(examples([first, Turn("Qa</s>r", "c</s>", 1.0)])[0]) == 2


def test_texts_that_go_on_may_not_in_tokens() -> None:
    """`a` and `b` are written one after the other, but served as the one token `ab`: two examples, both as served."""
    first, second = Turn("qa", "b</s>", 1.0), Turn("qab</s>r", "c</s>", 1.0)
    found, _ = examples([first, second])
    assert len(found) == 2 and learnt(found) == [(ids_of("qa"), ids_of("b</s>"), {1.0}),
                                                 (ids_of("qab</s>r"), ids_of("c</s>"), {1.0})]


def test_a_merged_turn_keeps_the_weights_before_it() -> None:
    found, _ = examples([Turn("q", "x</s>", 0.25), Turn("qx</s>r", "y</s>", 2.0)])
    assert [weights for *_, weights in learnt(found)] == [{0.25}, {2.0}]


@pytest.mark.parametrize("completion", ["no stop", "a</s>b</s>", "a</s> "])
def test_a_stop_token_is_the_last_target_and_the_only_one(completion: str) -> None:
    with pytest.raises(TemplateError, match="stop token is not one token"):
        examples([Turn("q", completion, 1.0)])


@given(small.conversations(), st.sampled_from(small.TEACHABLE[:5]))
@settings(deadline=None)
def test_examples_hold_each_turn_as_served(conversation: Conversation, source: str) -> None:
    """Random conversations through small templates: contexts, targets, weights, shift, against the slow definition."""
    taught = turns.to_turns(conversation, compile_template(source, {}), Stops(STOP_IDS, small.STOPS), "every")
    found, cut = examples(list(taught))
    assert cut == 0
    assert learnt(found) == [(ids_of(turn.prompt), ids_of(turn.completion), {turn.weight}) for turn in taught]
    for example in found:
        assert np.array_equal(example.labels == UNSUPERVISED, example.weights == 0)
        shifted = np.where(example.weights[:-1] != 0, example.input_ids[1:], UNSUPERVISED)
        assert np.array_equal(example.labels[:-1], shifted)
    assert sum(example.supervised for example in found) == sum(len(ids_of(turn.completion)) for turn in taught)


@given(small.conversations(), st.sampled_from(small.TEACHABLE[:5]), st.integers(1, 60))
@settings(deadline=None)
def test_cutting_leaves_whole_turns(conversation: Conversation, source: str, max_tokens: int) -> None:
    """`turns` keeps exactly the turns that fit, each with its stop token; what is kept and cut adds up."""
    taught = turns.to_turns(conversation, compile_template(source, {}), Stops(STOP_IDS, small.STOPS), "every")
    whole = learnt(examples(list(taught))[0])
    found, cut = examples(list(taught), max_tokens=max_tokens, too_long="turns")
    kept = learnt(found)
    assert kept == [span for span in whole if len(span[0] + span[1]) - 1 <= max_tokens]
    assert len(kept) + cut == len(whole)
    assert all(len(example.input_ids) <= max_tokens and example.labels[-1] in STOP_IDS for example in found)


@given(small.conversations(), st.sampled_from(small.TEACHABLE[:5]), st.integers(1, 60))
@settings(deadline=None)
def test_dropping_and_refusing_take_whole_rows(conversation: Conversation, source: str, max_tokens: int) -> None:
    taught = list(turns.to_turns(conversation, compile_template(source, {}), Stops(STOP_IDS, small.STOPS), "every"))
    whole, _ = examples(taught)
    fits = all(len(example.input_ids) <= max_tokens for example in whole)
    dropped, cut = examples(taught, max_tokens=max_tokens, too_long="drop")
    assert cut == 0 and len(dropped) == (len(whole) if fits else 0)
    if fits:
        assert len(examples(taught, max_tokens=max_tokens)[0]) == len(whole)
    else:
        with pytest.raises(DataError, match="tokens, more than") as caught:
            examples(taught, max_tokens=max_tokens)
        assert str(ORIGIN) in str(caught.value) and "data.too_long" in caught.value.remedy


def test_a_cut_ends_at_the_last_turn_that_fits() -> None:
    texts = list(accumulate(["q", "x</s>r", "y</s>s"]))
    taught = [Turn(prompt, f"{letter}</s>", 1.0) for prompt, letter in zip(texts, "xyz", strict=True)]
    for max_tokens, expected in ((2, 1), (4, 1), (5, 2), (7, 2), (8, 3)):
        found, cut = examples(taught, max_tokens=max_tokens, too_long="turns")
        assert (len(learnt(found)), cut) == (expected, 3 - expected)
    assert examples(taught, max_tokens=1, too_long="turns") == ((), 3)

"""Nothing that changes what is taught vanishes from a row: it is read, or refused with a remedy that works."""

import json

import pytest
from test_formats import ORIGIN, TALK, fault, said

from schoolhouse.config import Rows
from schoolhouse.data.formats import to_conversation

SAID = [("user", "hi"), ("assistant", "yes")]
EARLIER = [("user", "q0"), ("assistant", "r0")]
PAIRS = [("instruction", "output"), ("prompt", "completion"), ("query", "response"), ("question", "answer"),
         ("instruction", "response"), ("instruction", "answer"), ("prompt", "response")]
ROWS = [*(dict(zip(pair, ("hi", "yes"), strict=True)) for pair in PAIRS), {"messages": TALK}, {"conversations": TALK}]


@pytest.fixture
def mine(own_module):
    return own_module(
        "my_choice",
        "def good(row): return row if row['label'] else None\n"
        "def same(row): return row\n"
        "def weighted(row): return {'messages': [{'role': 'user', 'content': row['question']},\n"
        "    {'role': 'assistant', 'content': row['answer'], 'weight': row['weight']}]}\n"
        "def joined(row): return {'messages': [*row['conversations'], row['chosen']]}\n",
    )


# History and input.


@pytest.mark.parametrize("pair", PAIRS)
def test_every_question_has_its_history(pair):
    row = dict(zip(pair, ("hi", "yes"), strict=True))
    for history in ([["q0", "r0"]], [("q0", "r0")], '[["q0", "r0"]]'):
        assert said({**row, "history": history}) == [*EARLIER, *SAID]
    found = to_conversation({**row, "history": [["q0", "r0"]], "system": "brief"}, Rows(), ORIGIN)
    assert [message.weight for message in found.messages] == [None] * 5 and found.messages[0].role == "system"
    for nothing in (None, [], "", "[]"):
        assert said({**row, "history": nothing}) == SAID
    for wrong in ("fever since May", [["q0"]], [{"role": "user"}], [["q0", 7]], [["q0", ""]]):
        assert fault({**row, "history": wrong}).where == f"{ORIGIN} history"
    assert said({**row, "history": "fever since May"}, messages=TALK) == SAID


@pytest.mark.parametrize("pair", PAIRS)
def test_an_input_is_joined_to_an_instruction_and_refused_elsewhere(pair):
    row = {**dict(zip(pair, ("hi", "yes"), strict=True)), "input": "1 2"}
    if pair[0] == "instruction":
        assert said(row) == said({"instruction": "hi", "input": "1 2", "output": "yes"})
        assert said(row) == [("user", "hi\n1 2"), ("assistant", "yes")]
    else:
        error = fault(row)
        form = "prompt_completion" if "completion" in pair else "question_answer"
        assert "`input`" in error.found and f"data.format: {form}" in error.remedy
        assert said(row, format=form) == said({**row, "input": ""}) == said({**row, "input": None}) == SAID
        template = [{"role": "user", "content": f"{{{pair[0]}}} {{input}}"}, TALK[1]]
        assert said(row, messages=template) == [("user", "hi 1 2"), ("assistant", "yes")]


def test_a_context_is_refused_in_every_form_of_questions_unless_it_is_read():
    for pair in PAIRS:
        assert "`context`" in fault({**dict(zip(pair, ("hi", "yes"), strict=True)), "context": "see"}).found
    assert said({"context": "hi", "answer": "yes"}, columns={"question": "context", "answer": "answer"}) == SAID
    row = {"context": {"question": "hi"}, "answer": "yes"}
    assert said(row, columns={"question": "context.question", "answer": "answer"}) == SAID
    assert said({"messages": TALK, "context": "see", "input": "x"}) == SAID


def test_an_instruction_may_still_be_a_list_of_messages():
    row = {"instruction": TALK[:1], "response": TALK[1:], "history": [["q0", "r0"]]}
    assert said(row) == [*EARLIER, *SAID]
    assert fault({**row, "input": "1 2"}).where == f"{ORIGIN} instruction"


# Videos and sounds.


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", ["videos", "video", "audios", "audio"])
def test_a_row_that_shows_a_video_or_a_sound_is_refused(row, column):
    kind = column.rstrip("s")
    for value in (["a.mp4"], "a.mp4", {"bytes": b"RIFF", "path": None}, [None, "b"]):
        error = fault({**row, column: value})
        assert f"shows {kind} (`{column}`)" in error.found and ("frames" in error.remedy) == (kind == "video")
    for nothing in (None, [], "", {"bytes": None, "path": None}, [None]):
        assert said({**row, column: nothing}) == SAID
    assert said({**row, column: "a.mp4"}, messages=TALK) == SAID


def test_the_result_of_a_function_is_held_to_the_same(mine):
    same = f"{mine}:same"
    assert "video" in fault({"messages": TALK, "videos": ["a.mp4"]}, function=same).found
    assert "weight" in fault({"messages": TALK, "weight": 0.5}, function=same).found


# Preference data.


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_answer_is_refused_whether_good_or_bad(row, label, mine):
    error = fault({**row, "label": label})
    assert "preference data" in error.found and "data.function" in error.remedy
    function = f"{mine}:good"
    found = to_conversation({**row, "label": label}, Rows(function=function), ORIGIN)
    assert [(one.role, one.text) for one in found.messages] == SAID if label else found is None
    for other in ("True", 1, None, "neutral"):  # no verdict on the answer
        assert said({**row, "label": other}) == SAID


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"question": "hi", "chosen": "yes", "rejected": "no"},
        {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
        {"prompt": "hi", "chosen": TALK, "rejected": TALK},
        {"chosen": TALK, "rejected": TALK, "score_chosen": 8.5},
        {"chosen": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "rejected": TALK},
    ],
)
def test_preference_data_is_called_so_and_its_remedy_works(row):
    error = fault(row)
    assert "preference data" in error.found
    setting, teaches, _ = error.remedy.partition(" teaches")
    pairs = setting.removeprefix("data.columns: {").removesuffix("}").split(", ")
    assert teaches and said(row, columns=dict(pair.split(": ") for pair in pairs)) == SAID


def test_preference_data_that_only_a_function_can_join(mine):
    shown = {"conversations": [{"from": "human", "value": "hi"}]}
    row = {**shown, "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    many = {**row, "conversations": [*TALK, *shown["conversations"]]}  # earlier answers would be taught, the chosen not
    for one in (row, many):
        error = fault(one)
        assert "preference data" in error.found and "data.function" in error.remedy
    assert said(row, function=f"{mine}:joined") == SAID
    assert "data.function" in fault({"chosen": "Human: hi", "rejected": "Human: hi"}).remedy


def test_messages_that_hold_the_chosen_answer_are_taught():
    assert said({"prompt": "hi", "messages": TALK, "chosen": TALK, "rejected": TALK}) == SAID
    assert "do not fit" in fault({"a": 1, "chosen": None, "rejected": None}, format="alpaca").found


# Weights.


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", ["weight", "sample_weight", "loss_weight"])
def test_a_weight_beside_the_messages_is_refused_unless_it_is_one(row, column):
    for weight in (0.5, 0, 2, 0.0, False, "0.5", float("nan")):
        error = fault({**row, column: weight})
        assert column in error.found and "data.function" in error.remedy
        assert said({**row, column: weight}, messages=TALK) == SAID
    for weight in (1, 1.0, True, None, "1", "heavy", 10**400):
        assert said({**row, column: weight}) == SAID


def test_the_remedy_for_a_weight_works(mine):
    row = {"question": "hi", "answer": "yes", "weight": 0.5}
    assert to_conversation(row, Rows(function=f"{mine}:weighted"), ORIGIN).messages[1].weight == 0.5


@pytest.mark.parametrize(
    "detail", [{"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, {"loss_scale": 0.0}])
def test_weights_of_parts_of_a_message_are_refused(detail):
    row = {"messages": [TALK[0], {**TALK[1], **detail}]}
    error = fault(row)
    assert next(iter(detail)) in error.found and error.where == f"{ORIGIN} messages[1]"
    assert said({"messages": json.dumps([TALK[0], {**TALK[1], "train_detail": [], "loss_scale": None}])}) == SAID


@pytest.mark.parametrize("role", ["system", "user", "developer", "tool"])
@pytest.mark.parametrize("weight", [{"weight": 1}, {"train": True}, {"loss": 0.5}, {"loss_mask": 1}])
def test_what_is_shown_cannot_be_learnt(role, weight):
    error = fault({"messages": [{"role": role, "content": "x", **weight}, *TALK]})
    assert f"a {role} message with the weight" in error.found and error.where == f"{ORIGIN} messages[0]"
    for nothing in (0, False, None):
        messages = [{"role": role, "content": "x", **dict.fromkeys(weight, nothing)}, *TALK]
        assert said({"messages": messages}) == [(role, "x"), *SAID]

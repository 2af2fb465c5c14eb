"""Rows of every form become the same conversation; what cannot is an error with its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse.config import Rows
from schoolhouse.data import sources
from schoolhouse.data.formats import to_conversation
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import Conversation, Message, Origin, Part

SHARED = Path(__file__).parents[2].parent / "shared"
ORIGIN = Origin("rows.jsonl", 12)
WEIGHTS = ("weight", "train", "loss", "loss_mask", "trainable", "loss_weight")
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]

texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = texts.filter(bool)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
functions = st.builds(
    lambda name, extra: {"description": None, "name": name} | {f"x{key}": value for key, value in extra.items()},
    answers, st.dictionaries(texts, json_values, max_size=4),
)


def conversation(row, **rows):
    return to_conversation(row, Rows(**rows), ORIGIN)


def said(row, **rows):
    """Role and text of each message."""
    return [(message.role, message.text) for message in conversation(row, **rows).messages]


def fault(row, **rows):
    with pytest.raises(DataError) as caught:
        conversation(row, **rows)
    error = caught.value
    assert error.found and error.required and error.remedy
    assert error.where.startswith(str(ORIGIN))
    return error


def with_answer(**fields):
    return {"messages": [TALK[0], {**TALK[1], **fields}]}


# Every form.


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversation": TALK, "messages": None},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"conversations": TALK},
        {"messages": json.dumps(TALK)},
        {"conversations": json.dumps([{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yes"}])},
        {"instruction": "hi", "input": "", "output": "yes", "history": None, "text": "whole"},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": "hi", "completion": TALK[1:]},
        {"question": "hi", "answer": "yes", "id": 3},
        {"prompt": "hi", "response": "yes"},
        {"instruction": "hi", "response": "yes", "context": ""},
        {"query": "hi", "answer": "yes"},
        {"prompt": TALK[:1], "messages": TALK},
    ],
)
def test_every_form_is_recognised(row):
    question, answer = Message("user", (Part("text", "hi"),)), Message("assistant", (Part("text", "yes"),))
    assert conversation(row) == Conversation((question, answer), ORIGIN)


def test_alpaca_joins_instruction_and_input_after_the_history():
    row = {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "hello"]], "system": "be brief"}
    assert said(row) == [
        ("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "add\n1 2"), ("assistant", "3"),
    ]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_comes_first_and_once(column):
    row = {"messages": TALK, column: "be brief"}
    assert said(row)[0] == ("system", "be brief")
    same = {"messages": [{"role": "system", "content": "be brief"}, *TALK], column: "be brief"}
    assert said(same) == said(row)
    assert "two system prompts" in fault({**same, column: "be long"}).found
    assert said({"messages": TALK, column: ""}) == said({"messages": TALK, column: None}) == said({"messages": TALK})


def test_answers_inside_a_prompt_are_context():
    shown = [*TALK, {"role": "user", "content": "sure?"}]
    messages = conversation({"prompt": shown, "completion": TALK[1:]}).messages
    assert [message.weight for message in messages] == [None, 0.0, None, None]
    shown[1] = {**shown[1], "weight": 0.5}
    assert conversation({"prompt": shown, "completion": "yes"}).messages[1].weight == 0.5
    assert "no assistant" in fault({"prompt": TALK, "completion": TALK[:1]}).found


def test_columns_reach_into_nested_values():
    row = {"prompt": TALK[:1], "extra_info": {"question": "hi", "answer": "yes"}, "a.b": "hi"}
    columns = {"question": "extra_info.question", "answer": "extra_info.answer"}
    assert said(row, columns=columns) == [("user", "hi"), ("assistant", "yes")]
    assert said(row, columns={**columns, "question": "a.b"}, format="question_answer")[0] == ("user", "hi")
    error = fault(row, columns={**columns, "answer": "extra_info.anwser"})
    assert "extra_info.answer" in error.required and "extra_info.anwser" in error.found
    assert said({"dialog": TALK}, columns={"messages": "dialog"}) == said({"messages": TALK})


def test_columns_that_no_form_has_are_a_mistake_of_the_recipe():
    with pytest.raises(ConfigError) as caught:
        conversation({"a": "hi"}, columns={"qestion": "a"})
    assert "question" in caught.value.remedy
    with pytest.raises(ConfigError):
        conversation({"a": "hi"}, columns={"question": "a", "messages": "a"})


def test_what_cannot_be_recognised_is_never_guessed():
    assert "a, b" in fault({"a": 1, "b": 2}).found
    assert "fit" in fault({"question": "a", "prompt": "b", "answer": "c"}).found
    assert "fit" in fault({"prompt": "a", "completion": "b", "response": "c"}).found
    assert "context" in fault({"instruction": "a", "context": "b", "response": "c"}).found
    assert said({"question": "a", "context": "b", "answer": "c"}, format="question_answer")
    assert "do not fit alpaca" in fault({"question": "a", "answer": "c"}, format="alpaca").found
    assert "None" in fault({"question": "a", "answer": None}).found
    assert "empty" in fault({"question": "a", "answer": ""}).found


# Row templates and functions.


@given(value=texts)
def test_a_row_template_inserts_values_as_they_are(value):
    template = [
        {"role": "system", "content": "{{literal}} {{}}"},
        {"role": "user", "content": "{q}, {a.b}! {q}"},
        {"role": "assistant", "content": "<{q}>"},
    ]
    row = {"q": value, "a": {"b": [1, None, "é"]}}
    assert said(row, messages=template) == [
        ("system", "{literal} {}"), ("user", f'{value}, [1, null, "é"]! {value}'), ("assistant", f"<{value}>"),
    ]


def test_a_row_template_evaluates_nothing():
    def template(content):
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]

    for name in ("q.__class__", "q[0]", "q!r", "q:>9", "", "0"):
        error = fault({"q": "hi", "extra": {"deep": 1}}, messages=template("{" + name + "}"))
        assert "q, extra.deep" in error.required
    assert "null" in fault({"q": None}, messages=template("{q}")).found
    for broken in ("{q", "q}", "{q}}", "{ {q} }"):
        with pytest.raises(ConfigError):
            conversation({"q": "hi"}, messages=template(broken))
    with pytest.raises(ConfigError):
        conversation({"q": "hi"}, messages=[{"role": "user", "contents": "{q}"}])


def test_a_row_template_sees_mapped_columns_and_tools():
    template = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "yes"}]
    row = {"extra": {"q": "hi"}, "t": [{"name": "f"}], "tools": "not a list"}
    found = conversation(row, messages=template, columns={"question": "extra.q", "tools": "t"})
    assert found.messages[0].text == "hi" and found.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.fixture
def module(own_module):
    return own_module(
        "my_rows",
        "def messages(row):\n"
        "    return {'messages': [{'role': 'user', 'content': row['q']}, {'role': 'model', 'content': 'yes'}]}\n"
        "def pair(row): return {'question': row['q'], 'answer': 'yes'}\n"
        "def drop(row): return None\n"
        "def wrong(row): return [row]\n"
        "def sure(row): assert row['q'] == 'ho'\n"
        "def failing(row): raise RuntimeError('no')\n",
    )


def test_a_function_of_the_users(module):
    for name in ("messages", "pair"):
        assert said({"q": "hi"}, function=f"{module}:{name}") == [("user", "hi"), ("assistant", "yes")]
    assert conversation({"q": "hi"}, function=f"{module}:drop") is None
    assert "KeyError" in fault({}, function=f"{module}:pair").found
    assert "AssertionError" in fault({"q": "hi"}, function=f"{module}:sure").found
    assert "RuntimeError: no" in fault({"q": "hi"}, function=f"{module}:failing").found
    assert "returned" in fault({}, function=f"{module}:wrong").found
    for name in (f"{module}:missing", "no_such_module:f", module, ":f"):
        with pytest.raises(ConfigError):
            conversation({}, function=name)


# Messages.


@st.composite
def conversations(draw):
    """A conversation twice: as OpenAI and as ShareGPT spell it."""
    one, two = [], []
    for question, answer in draw(st.lists(st.tuples(texts, answers), min_size=1, max_size=4)):
        one += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        two += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if draw(st.booleans()):
            call = {"name": draw(answers), "arguments": draw(st.dictionaries(texts, json_values, max_size=3))}
            result = draw(texts)
            one += [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
                    {"role": "tool", "content": result}]
            two += [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": result}]
    return one, two


@given(conversations())
def test_openai_and_sharegpt_spell_the_same_conversation(pair):
    one, two = pair
    found = conversation({"messages": one})
    assert found == conversation({"conversations": two}) == conversation({"messages": json.dumps(one)})
    back = [
        {"role": message.role, "content": message.text if message.parts else None}
        | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {})
        for message in found.messages
    ]
    assert back == one


@given(st.lists(functions, min_size=1, max_size=3), st.booleans())
def test_tools_and_arguments_stay_exact_to_the_byte(schemas, as_text):
    tools = [{"type": "function", "function": schema} for schema in schemas]
    call = {"id": "1", "function": {"arguments": schemas[0], "name": "f"}, "type": "function"}
    row = json.loads(json.dumps({**with_answer(tool_calls=[call]), "tools": json.dumps(tools) if as_text else tools}))
    found = conversation(row)
    assert json.dumps(found.tools) == json.dumps(tools)
    assert json.dumps(found.messages[1].tool_calls) == json.dumps([call])
    assert json.dumps(conversation({**row, "tools": schemas}).tools) == json.dumps(tools)
    assert json.dumps(conversation({**row, "tools": [json.dumps(one) for one in schemas]}).tools) == json.dumps(tools)


@pytest.mark.parametrize("arguments", ['{"a":  1}', "not even JSON", {"a": None}, {}])
def test_arguments_stay_as_the_data_has_them(arguments):
    calls = [{"function": {"name": "f", "arguments": arguments}}, {"name": "g", "arguments": arguments, "id": "2"}]
    first, second = conversation(with_answer(content=None, tool_calls=calls)).messages[1].tool_calls
    assert first == calls[0]
    assert second == {"type": "function", "id": "2", "function": {"name": "g", "arguments": arguments}}
    older = with_answer(content=None, function_call={"name": "f", "arguments": arguments})
    assert conversation(older).messages[1].tool_calls[0]["function"]["arguments"] == arguments


def test_a_function_call_message_can_hold_several_calls():
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{}"}]
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(calls)}]}
    message = conversation(row).messages[1]
    assert message.role == "assistant" and message.parts == ()
    assert [call["function"] for call in message.tool_calls] == calls


@pytest.mark.parametrize("spelling", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_every_spelling(spelling):
    assert conversation(with_answer(**{spelling: " so "})).messages[1].reasoning == " so "
    assert conversation(with_answer(**{spelling: None})).messages[1].reasoning is None
    assert "differ" in fault(with_answer(reasoning_content="a", thinking="b")).found


def test_parts_images_and_names():
    content = [
        "see", {"type": "text", "text": " this"}, {"type": "image", "image": "a.png"}, {"type": "image"},
        {"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "video", "video": ["c.png", "d.png"]},
    ]
    result = {"role": "tool", "content": "1", "tool_call_id": "7", "name": "f"}
    first, _, last = conversation(
        {"messages": [{"role": "user", "content": content}, TALK[1], result], "image": "x.png"}
    ).messages
    assert [part.value if part.kind == "text" else part.value.value for part in first.parts] == [
        "see", " this", "a.png", "x.png", "b.png", "c.png", "d.png",
    ]
    assert (last.tool_call_id, last.name) == ("7", "f")


@given(spelling=st.sampled_from(WEIGHTS), value=st.booleans() | st.floats(0, 1e30) | st.integers(0, 10**30))
def test_a_weight_in_every_spelling(spelling, value):
    assert conversation(with_answer(**{spelling: value})).messages[1].weight == float(value)
    assert conversation(with_answer(**{spelling: None})).messages[1].weight is None


@given(spelling=st.sampled_from(WEIGHTS), value=st.floats(max_value=-1e-9) | st.sampled_from(
    [float("nan"), float("inf"), -1, 10**400, "1", "true", [1], {}]))
def test_a_wrong_weight_is_refused(spelling, value):
    assert spelling in fault(with_answer(**{spelling: value})).found


@given(st.dictionaries(st.sampled_from(WEIGHTS), st.booleans() | st.floats(0, 4) | st.integers(0, 2), min_size=2))
def test_weights_agree_or_are_refused(given_weights):
    numbers = {float(value) for value in given_weights.values() if not isinstance(value, bool)}
    if len(numbers) > 1 or len({bool(value) for value in given_weights.values()}) > 1:
        assert "contradictory" in fault(with_answer(**given_weights)).found
    else:
        expected = numbers.pop() if numbers else float(next(iter(given_weights.values())))
        assert conversation(with_answer(**given_weights)).messages[1].weight == expected


def test_roles_are_mapped_from_their_aliases():
    expected = {
        "system": "system", "developer": "developer", "human": "user", "User": "user", "model": "assistant",
        "chatgpt": "assistant", "bot": "assistant", "GPT": "assistant", "ipython": "tool", "function": "tool",
    }
    row = {"messages": [{"role": name, "content": "x"} for name in expected]}
    assert [message.role for message in conversation(row).messages] == list(expected.values())


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ('[{"role": ', "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        ([TALK[0]], ""),
        ([*TALK, "x"], "messages[2]"),
        ([*TALK, {"content": "x"}], "messages[2]"),
        ([*TALK, {"role": "critic", "content": "x"}], "messages[2]"),
        ([*TALK, {"role": 1, "content": "x"}], "messages[2]"),
        ([*TALK, {"role": "user", "from": "gpt", "content": "x"}], "messages[2]"),
        ([*TALK, {"role": "user"}], "messages[2]"),
        ([*TALK, {"role": "assistant", "content": None, "tool_calls": []}], "messages[2]"),
        ([*TALK, {"role": "assistant", "content": ""}], "messages[2]"),
        ([*TALK, {"role": "user", "content": 7}], "messages[2].content"),
        ([*TALK, {"from": "human", "value": 7}], "messages[2].value"),
        ([*TALK, {"role": "user", "content": ["a", 7]}], "messages[2].content[1]"),
        ([*TALK, {"role": "user", "content": [{"type": "audio"}]}], "messages[2].content[0]"),
        ([*TALK, {"role": "user", "content": [{"type": "text"}]}], "messages[2].content[0].text"),
        ([*TALK, {"role": "user", "content": "x", "name": 3}], "messages[2].name"),
        ([*TALK, {"role": "user", "content": "half \ud83d"}], "messages[2].content"),
        ([*TALK, {"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}], "messages[2]"),
        ([*TALK, {"role": "assistant", "tool_calls": 5}], "messages[2]"),
        ([*TALK, {"role": "assistant", "tool_calls": [5]}], "messages[2].tool_calls[0]"),
        ([*TALK, {"role": "assistant", "tool_calls": [{"name": "", "arguments": {}}]}], "messages[2].tool_calls[0]"),
        ([*TALK, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "messages[2].tool_calls[0]"),
        ([*TALK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "messages[2].tool_calls[0]"),
        ([*TALK, {"role": "gpt", "tool_calls": [{"name": "f", "arguments": {"a": b""}}]}], "messages[2].tool_calls[0]"),
        ([*TALK, {"role": "function_call", "content": "f(x)"}], "messages[2]"),
        ([*TALK, {"role": "function_call", "content": "[]"}], "messages[2]"),
    ],
)
def test_a_bad_message_is_refused_with_its_place(messages, place):
    assert fault({"messages": messages}).where == f"{ORIGIN} {place}".strip()


def test_an_empty_answer_may_stand_as_context():
    assert conversation({"messages": [*TALK, {"role": "assistant", "content": "", "weight": 0}]}).messages[2].text == ""


@pytest.mark.parametrize("tools", ["{}", "[", 5, [5], ["f"], [{"function": {}}], [{"parameters": {}}]])
def test_a_bad_tool_is_refused_with_its_place(tools):
    assert fault({"messages": TALK, "tools": tools}).where.startswith(f"{ORIGIN} tools")


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools):
    assert conversation({"messages": TALK, "tools": tools}).tools == ()


KEYS = [
    "messages", "conversations", "conversation", "tools", "system", "prompt", "completion", "question", "answer",
    "instruction", "input", "output", "history", "role", "from", "content", "value", "tool_calls", "function_call",
    "function", "name", "arguments", "type", "text", "image", "weight", "loss", "thinking", "tool_call_id",
]
words = st.sampled_from(["user", "gpt", "tool", "function_call", "text", "image", "[]", "{}", '[{"name": "f"}]', ""])
wild = st.recursive(
    st.none() | st.booleans() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), wild, max_size=4) | st.builds(
    lambda messages, tools: {"messages": messages, "tools": tools},
    st.lists(st.dictionaries(st.sampled_from(KEYS), wild, min_size=2), min_size=1), wild))
def test_any_row_becomes_a_conversation_or_a_data_error(row):
    before = repr(row)
    try:
        assert any(message.role == "assistant" for message in conversation(row).messages)
    except DataError as error:
        assert error.where.startswith(str(ORIGIN))
    assert repr(row) == before


# Real data.


def shared(count, *names):
    """A real file and its number of rows; the folder beside the repository is not there on every machine."""
    path = SHARED.joinpath(*names)
    absent = pytest.mark.skipif(not path.exists(), reason=f"there is no {path}")
    return pytest.param(str(path), count, marks=absent, id=path.name)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        shared(7473, "gsm8k", "train.jsonl"),
        shared(1319, "gsm8k", "test.jsonl"),
        shared(128, "conversations", "tinker_conversations.jsonl"),
        shared(91, "conversations", "identity", "identity.json"),
        shared(150, "conversations", "kdconv", "kdconv_film_test.messages.jsonl"),
        shared(150, "conversations", "kdconv", "kdconv_music_test.messages.jsonl"),
        shared(150, "conversations", "kdconv", "kdconv_travel_test.messages.jsonl"),
        shared(300, "conversations", "sgd", "sgd_test.messages.jsonl"),
        shared(1173, "conversations", "sgd", "sgd_train.messages.jsonl"),
        shared(300, "conversations", "glaive", "glaive_toolcall_en_demo.json"),
        shared(300, "conversations", "glaive", "glaive_toolcall_zh_demo.json"),
    ],
)
def test_every_real_row_converts_and_its_tools_are_exact(path, count):
    read = list(sources.read(sources.Source(path=path)))
    assert len(read) == count
    for origin, row in read:
        found = to_conversation(row, Rows(), origin)
        listed = row.get("messages") or row.get("conversations")
        assert len(found.messages) == (len(listed) if listed else 2)
        assert json.dumps(found.tools) == json.dumps(_wrapped(row.get("tools") or []))
        for message, raw in zip(found.messages, listed or [], strict=bool(listed)):
            _check_same(message, raw)


def _wrapped(tools):
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _check_same(message, raw):
    """A message against the raw one, spelled out once more."""
    if raw.get("from") == "function_call":
        assert [call["function"] for call in message.tool_calls] == [json.loads(raw["value"])]
    else:
        assert message.text == raw.get("content", raw.get("value"))
        assert json.dumps(message.tool_calls) == json.dumps(raw.get("tool_calls", []))

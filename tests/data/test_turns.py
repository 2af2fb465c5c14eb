"""What is shown and what is written, turn by turn, and every reason for refusing an answer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse.config import Rows
from schoolhouse.data import formats, turns
from schoolhouse.data.template import compile_template
from schoolhouse.data.tokens import Stops
from schoolhouse.errors import TemplateError
from schoolhouse.types import Conversation, Message, Origin, Part, Turn

STOPS = Stops((0, 1), small.STOPS, ("<eot>", "<eot_2>"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2, "now": True}}}


def message(role: str, text: str = "", **more) -> Message:
    return Message(role, (Part("text", text),) if text else (), **more)


def talk(*messages: Message) -> Conversation:
    return Conversation(messages, Origin("rows.jsonl", 7))


def asked(answer: str = "", **more) -> Conversation:
    """One question with its answer."""
    return talk(message("user", "Q?"), message("assistant", answer, **more))


def taught(source: str, conversation: Conversation, supervise: turns.Supervise = "every", **variables) -> list[Turn]:
    return list(turns.to_turns(conversation, compile_template(source, variables), STOPS, supervise))


def refused(source: str, conversation: Conversation) -> TemplateError:
    """The refusal, which shows both texts in six lines at most."""
    with pytest.raises(TemplateError) as caught:
        taught(source, conversation)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and lines[3].startswith("    asked:  ") and lines[4].startswith("    taught: ")
    assert caught.value.where.startswith("rows.jsonl:7 message ") and "set model." in caught.value.remedy
    return caught.value


# What is taught.


def test_prompt_and_completion() -> None:
    both = talk(message("user", "A"), message("assistant", "B"), message("user", "C"), message("assistant", "D"))
    assert taught(small.PLAIN, both) == [Turn("[u]A[a]", "B</s>", 1.0), Turn("[u]A[a]B</s>[u]C[a]", "D</s>", 1.0)]


def test_a_prompt_may_not_ask_for_the_answer() -> None:
    assert taught(small.HEADLESS, asked("B")) == [Turn("[u]Q?</s>", "[a]B</s>", 1.0)]


def test_an_empty_thinking_block_is_served_and_not_repeated() -> None:
    assert taught(small.PREFILLED, asked("B")) == [Turn("[u]Q?</s>[a]<think>\n\n</think>\n\n", "B</s>", 1.0, True)]


def test_thinking_that_the_prompt_opens() -> None:
    source = small.body("[{{ m.role[0] }}]{{ '<think>' ~ m.thinking ~ '</think>' if m.thinking }}{{ m.content }}</s>",
                        "[a]<think>")
    assert taught(source, asked("B", reasoning="Hm")) == [Turn("[u]Q?</s>[a]<think>", "Hm</think>B</s>", 1.0)]


def test_what_follows_the_stop_token_is_not_taught() -> None:
    assert taught(small.body("[{{ m.role[0] }}]{{ m.content }}</s>\n\n[next]"), asked("B"))[0].completion == "B</s>"


def test_the_longest_stop_token_at_a_place_ends_the_answer() -> None:
    stops = Stops((0, 1), ("<e>", "<e>\n"))
    template = compile_template(small.body("[{{ m.role[0] }}]{{ m.content }}<e>\n"), {})
    assert turns.to_turns(asked("B"), template, stops, "every")[0].completion == "B<e>\n"


def test_an_answer_may_come_first() -> None:
    assert taught(small.PLAIN, talk(message("assistant", "B"))) == [Turn("[a]", "B</s>", 1.0)]


@pytest.mark.parametrize(("supervise", "weights", "expected"), [
    ("every", (None, None, None), [(1, 1.0), (3, 1.0), (5, 1.0)]), ("every", (0.0, 0.5, None), [(3, 0.5), (5, 1.0)]),
    ("last", (None, None, None), [(5, 1.0)]), ("last", (1.0, 1.0, 0.0), []), ("last", (None, None, 2.0), [(5, 2.0)]),
    ("marked", (None, None, None), []), ("marked", (1.0, None, 0.0), [(1, 1.0)]),
])
def test_which_answers_are_learnt(supervise, weights, expected) -> None:
    messages = [part for weight in weights for part in (message("user", "q"), message("assistant", "a", weight=weight))]
    assert turns.taught(messages, supervise) == expected


@given(small.conversations(), st.sampled_from(small.TEACHABLE), st.sampled_from(["every", "last", "marked"]))
@settings(deadline=None)
def test_turns_are_what_the_template_writes(conversation: Conversation, source: str, supervise) -> None:
    """For random conversations: the prompt is the render before the answer, the completion ends with the first stop."""
    conversation = replace(conversation, messages=tuple(
        replace(one, reasoning="why" if source == small.FORGETFUL and one.role == "assistant" else None)
        for one in conversation.messages
    ))
    script = compile_template(source, {}).script(conversation)
    learnt = turns.taught(conversation.messages, supervise)
    for turn, (index, weight) in zip(taught(source, conversation, supervise), learnt, strict=True):
        full = script.full(index + 1)
        assert turn.prompt == script.prompt(index) and turn.weight == weight
        assert turn.prefilled == (source == small.PREFILLED)
        assert full.endswith(turn.completion) and (turn.prefilled or full == turn.prompt + turn.completion)
        ends = [place for stop in small.STOPS for place in [turn.completion.find(stop)] if place >= 0]
        assert turn.completion[min(ends):] in small.STOPS


# What is refused.


def test_a_template_that_contradicts_its_prompt() -> None:
    error = refused(small.SYSTEM_LAST, talk(message("system", "S"), *asked("B").messages))
    assert "differently from how it asks" in error.found and "model.chat_template" in error.remedy
    assert "asked:  'S[u]Q?</s>[a]'" in str(error) and "taught: '[u]Q?</s>S[a]B</s>'" in str(error)


def test_thinking_that_the_data_does_not_have() -> None:
    source = small.body(
        "[{{ m.role[0] }}]{% if m.role == 'assistant' and thinking is not false %}<think>{{ m.thinking }}</think>"
        "{% endif %}{{ m.content }}</s>", "[a]{{ '<think>' if thinking is not false }}",
    )
    error = refused(source, asked("B"))
    assert "opens a thinking block that this answer does not have" in error.found
    assert error.remedy == "set model.template_arguments: {thinking: false}"
    assert taught(source, asked("B"), thinking=False)[0].completion == "B</s>"
    assert taught(source, asked("B", reasoning="Hm"))[0].completion == "Hm</think>B</s>"


def test_reasoning_is_named_as_a_way_out_where_it_is_one() -> None:
    source = small.body("[{{ m.role[0] }}]{{ '<think>' ~ m.thinking ~ '</think>' if m.thinking }}{{ m.content }}</s>",
                        "[a]<think>")
    assert "or give the answers `reasoning_content`" in refused(source, asked("B")).remedy
    deaf = small.body("[{{ m.role[0] }}]{{ m.content }}</s>", "[a]<think>")
    assert "reasoning_content" not in refused(deaf, asked("B")).remedy


def test_thinking_that_is_opened_and_never_closed() -> None:
    error = refused(small.body("[{{ m.role[0] }}]{{ '<think>' if m.role != 'user' }}{{ m.content }}</s>", "[a]<think>"),
                    asked("B"))
    assert "opens a thinking block" in error.found


def test_thinking_that_the_prompt_has_closed() -> None:
    source = small.body(
        "[{{ m.role[0] }}]{{ '<think>' ~ m.thinking ~ '</think>' if m.thinking }}{{ m.content }}</s>",
        "[a]{{ '<think></think>' if not enable_thinking }}",
    )
    error = refused(source, asked("B", reasoning="Hm"))
    assert "closes the thinking block that this answer fills" in error.found
    assert error.remedy == "set model.template_arguments: {enable_thinking: true}"
    assert taught(source, asked("B", reasoning="Hm"), enable_thinking=True)[0].completion == "<think>Hm</think>B</s>"


@pytest.mark.parametrize(("source", "answer", "words"), [
    (small.PLAIN, {"reasoning": "Hm"}, "drops the reasoning of this answer: 'Hm'"),
    (small.body("[{{ m.role[0] }}]{{ m.content if m.role == 'user' }}</s>"), {}, "drops text of this answer: 'B'"),
    (small.body("[{{ m.role[0] }}]{{ m.content.split('</think>')[-1] }}</s>"), {"answer": "<think>x</think>B"},
     "drops text of this answer: 'x'"),
    (small.PLAIN, {"tool_calls": (CALL,)}, "drops a tool call of this answer: weather"),
    (small.body("[{{ m.role[0] }}]{{ m.content }}{{ m.tool_calls and m.tool_calls[0].function.name }}</s>"),
     {"tool_calls": (CALL,)}, "drops an argument of this answer's call of weather: 'city'"),
    (small.body("[{{ m.role[0] }}]{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}</s>"),
     {"tool_calls": (CALL, CALL)}, "drops a tool call of this answer: weather"),
])
def test_a_template_that_drops_a_part_of_the_answer(source, answer, words) -> None:
    assert words in refused(source, asked(**{"answer": "B", **answer})).found


def test_a_part_may_be_written_in_the_templates_own_way() -> None:
    """Other blanks, JSON's and Python's escapes, and one's own spelling of yes, no and thinking."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"text": 'a "b"\n', "list": [1.5, None, False]}}}
    source = small.body(
        "[{{ m.role[0] }}]{{ m.content | trim | replace('<think>', '<r>') | replace('</think>', '</r>') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}="
        "{{ v | tojson }}{% endfor %}{% endfor %}</s>"
    )
    assert taught(source, asked("<think> x </think>\n B ", tool_calls=(call,)))


def test_a_stop_token_inside_the_answer() -> None:
    error = refused(small.PLAIN, asked("before</s>after"))
    assert "the stop token </s> stands before the end" in error.found and "cuts off text" in error.found


@pytest.mark.parametrize(("end", "found", "remedy"), [
    ("<eot>\n", "'<eot>'", 'set model.stop_tokens: ["<eot>", "</s>", "<end>"]'),
    ("<eot_2>", "'<eot_2>'", 'set model.stop_tokens: ["<eot_2>", "</s>", "<end>"]'),
    ("<|im_end|>", "'<|im_end|>', which is no token of this tokenizer", "model.chat_template"),
    ("", "nothing", "model.chat_template"),
])
def test_a_template_that_ends_answers_with_no_stop_token(end, found, remedy) -> None:
    error = refused(small.body("[{{ m.role[0] }}]{{ m.content }}" + end), asked("B"))
    assert error.found == f"the answer has no stop token: the template ends it with {found}"
    assert remedy in error.remedy


def test_a_template_that_raises() -> None:
    alternate = small.body("{{ raise_exception('Roles\nmust alternate') if m.role == 'system' }}[{{ m.role[0] }}]</s>")
    with pytest.raises(TemplateError, match="refuses this conversation: TemplateError: Roles must alternate") as caught:
        taught(alternate, talk(message("system", "S"), *asked("B").messages))
    assert "system, user" in caught.value.required and "model.chat_template" in caught.value.remedy
    with pytest.raises(TemplateError, match="'today' is undefined") as caught:
        taught(small.body("{{ today.date }}"), asked("B"))
    assert "set model.template_arguments: {today: …}" in caught.value.remedy
    assert len(str(caught.value).splitlines()) <= 6


def test_the_message_is_named() -> None:
    error = refused(small.PLAIN, talk(*asked("fine").messages, message("user", "Q"), message("assistant", "a</s>b")))
    assert re.fullmatch(r"rows\.jsonl:7 message 4", error.where)


DROPS = (
    "{% for m in messages if m.role in ('system', 'user', 'assistant') %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template as many are: a role that it does not know, and tools, are left out without a word."""


@pytest.mark.parametrize(("row", "says"), [
    ({"messages": [{"role": "developer", "content": "In French."}, {"role": "user", "content": "Hi"},
                   {"role": "assistant", "content": "Salut"}]}, "message 1, of the role developer"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                   {"role": "tool", "content": "3 degrees"}, {"role": "assistant", "content": "Cold."}]},
     "message 3, of the role tool"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
      "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}, "the row's tools"),
    ({"messages": [{"role": "system", "content": " "}, {"role": "user", "content": " Hi\n"},
                   {"role": "assistant", "content": "Yes?"}]}, None),
])
def test_context_that_a_template_leaves_out_is_refused(row: dict[str, Any], says: str | None) -> None:
    """It would be taught, and served, as if it had never been said; blanks around a text may go."""
    compiled = compile_template(DROPS, {})
    talk = formats.to_conversation(row, Rows(), Origin("rows.jsonl", 1))
    stops = Stops((7,), ("<|end|>",))
    if says is None:
        assert len(turns.to_turns(talk, compiled, stops, "every")) == 1
        return
    with pytest.raises(TemplateError, match=says):
        turns.to_turns(talk, compiled, stops, "every")


def test_a_context_that_is_written_otherwise_is_shown() -> None:
    """Upper case, JSON, lists: what is looked for is whether it matters, not how it is written."""
    compiled = compile_template(DROPS.replace("m.content | trim", "m.content | tojson | trim"), {})
    row = {"messages": [{"role": "user", "content": 'Say "Hi"\n'}, {"role": "assistant", "content": "Hi"}]}
    talk = formats.to_conversation(row, Rows(), Origin("rows.jsonl", 1))
    assert "Say" in turns.to_turns(talk, compiled, Stops((7,), ("<|end|>",)), "every")[0].prompt


def test_a_prompt_that_nobody_asks_for_may_be_refused() -> None:
    """An earlier answer that is not taught needs no prompt; what stands before it is shown later."""
    picky = (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('none') }}{% endif %}"
    )
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello!"},
                        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}
    talk = formats.to_conversation(row, Rows(), Origin("rows.jsonl", 1))
    compiled = compile_template(picky + DROPS, {})
    assert len(turns.to_turns(talk, compiled, Stops((7,), ("<|end|>",)), "last")) == 1

"""The fast path: every text that one render gives is the text that the template writes of that prefix alone."""

from __future__ import annotations

import itertools

import inventory
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from test_conversations import rows_of

from schoolhouse.config import Rows
from schoolhouse.data import formats, prefixes
from schoolhouse.data.template import Script, Template, compile_template
from schoolhouse.errors import TemplateError
from schoolhouse.types import Conversation, Message, Origin, Part

SHARED = inventory.ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real templates of ../shared")


def compared(template: Template, conversation: Conversation) -> tuple[int, int]:
    """How many prefixes of a conversation one render gives, each compared with the definition, and of how many."""
    script = template.script(conversation)
    known = {(count, to_answer): text + end for to_answer, (texts, end) in script.at_once().known.items()
             for count, text in texts.items()}
    for (count, to_answer), text in known.items():
        assert text == alone(script, count, to_answer), (count, to_answer)
    return len(known), 2 * len(conversation.messages)


def alone(script: Script, count: int, to_answer: bool) -> str | None:
    try:
        return script.prompt(count) if to_answer else script.full(count)
    except TemplateError:
        return None


@needs_shared
def test_equal_to_the_definition_in_every_template() -> None:
    """All real templates with all kinds of conversation, thinking switched both ways; and it is worth its while."""
    fast = every = 0
    for case, kind in itertools.product(inventory.cases(SHARED), inventory.KINDS):
        known = "enable_thinking" in inventory.compiled(case).default.arguments
        for arguments in ((), (("enable_thinking", True),), (("enable_thinking", False),)) if known else ((),):
            found, whole = compared(inventory.compiled(case, arguments), inventory.conversation(kind))
            fast, every = fast + found, every + whole
    assert fast > 0.5 * every


@needs_shared
def test_equal_to_the_definition_in_real_conversations() -> None:
    """Rows of the real conversations (tools, calls, results) through every template."""
    rows = [row for source in ("sgd/sgd_test.messages.jsonl", "glaive/glaive_toolcall_en_demo.json",
                               "kdconv/kdconv_film_test.messages.jsonl") for row in rows_of(SHARED, source)[:2]]
    talks = [formats.to_conversation(row, Rows(), Origin("rows", 1)) for row in rows]
    found = [compared(inventory.compiled(case), talk) for case in inventory.cases(SHARED) for talk in talks]
    assert sum(fast for fast, _ in found) > 0.5 * sum(every for _, every in found)


def test_qwens_templates_are_rendered_once(shared) -> None:
    """Qwen2.5 writes all prompts at once; Qwen3 looks at the end first, so nothing is taken for granted there."""
    talk = inventory.conversation("plain")
    cases = {case.name: case for case in inventory.cases(shared)}
    assert compared(inventory.compiled(cases["trl/qwen2_5.jinja"]), talk) == (12, 12)
    assert compared(inventory.compiled(cases["trl/qwen3.jinja"]), talk) == (0, 12)


# Templates that look further than they seem to.

BODY = "[{{ m.role[0] }}]{{ m.content }}</s>"
PLAIN = "{% for m in messages %}" + BODY + "{% endfor %}"
SNEAKY = {
    "the length, before": "{{ messages | length }}" + PLAIN,
    "the length, behind": PLAIN + "{{ messages | length }}",
    "the last message, before": "{{ messages[-1].content }}" + PLAIN,
    "the last message, behind": PLAIN + "{{ messages[-1].role }}",
    "a later message": "{{ messages[2].content if messages[2] }}" + PLAIN,
    "a message that is not there": "{{ 'x' if messages[3] is defined }}" + PLAIN,
    "the end of the loop": PLAIN.replace("</s>", "{{ '</s>' if loop.last }}"),
    "the next message": PLAIN.replace("</s>", "{{ loop.nextitem.role }}</s>"),
    "the length of the loop": PLAIN.replace("</s>", "{{ loop.length }}</s>"),
    "how many are left": PLAIN.replace("</s>", "{{ loop.revindex }}</s>"),
    "a filter over all": "{{ messages | map(attribute='role') | join }}" + PLAIN,
    "a test that swallows errors": "{{ messages is sequence }}" + PLAIN,
    "an alias": "{% set all = messages %}" + PLAIN + "{{ all[-1].role }}",
    "an alias of an alias": "{% set a = messages %}{% set b = a[1:] %}" + PLAIN + "{{ b | length }}",
    "a part": "{% for m in messages[1:] %}" + BODY + "{% endfor %}",
    "a part to the end": "{% for m in messages[:-1] %}" + BODY + "{% endfor %}",
    "backwards": "{% for m in messages[::-1] %}" + BODY + "{% endfor %}",
    "a namespace": "{% set n = namespace(x=0) %}" + PLAIN.replace("</s>", "{% set n.x = n.x + 1 %}</s>") + "{{ n.x }}",
    "a macro": "{% macro end() %}{{ messages[-1].role }}{% endmacro %}" + PLAIN + "{{ end() }}",
    "messages passed over": PLAIN.replace("[{{", "{% if m.role == 'system' %}{% continue %}{% endif %}[{{"),
    "a loop that ends early": PLAIN.replace("</s>", "</s>{% if loop.index == 3 %}{% break %}{% endif %}"),
    "a loop with a condition": "{% for m in messages if m.role != 'user' %}" + BODY + "{% endfor %}",
    "an empty loop": "{% for m in messages[1:] %}" + BODY + "{% else %}none{% endfor %}",
    "two loops": PLAIN + "|" + PLAIN,
    "a loop in a loop": PLAIN.replace("[{{", "{% for k in messages %}{{ k.role[0] }}{% endfor %}[{{"),
    "branches": "{% if messages[0].role == 'user' %}U" + PLAIN + "{% else %}" + PLAIN + "{{ messages[-1] }}{% endif %}",
    "a captured loop": "{% set text %}" + PLAIN + "{% endset %}{{ text | upper }}",
    "the end of a group": PLAIN.replace(
        "</s>", "{% if loop.last or messages[loop.index0 + 1].role != 'user' %}</s>{% endif %}"),
    "the end of another group": PLAIN.replace(
        "</s>", "{% if loop.last or messages[loop.index0 + 1].role == 'user' %}</s>{% else %},{% endif %}"),
    "the end of a group, and more": PLAIN.replace(
        "</s>", "{% if loop.last or messages[loop.index0 + 2].role == 'user' %}</s>{% endif %}"),
    "the end of a group by a filter": PLAIN.replace(
        "</s>", "{% if loop.last or messages[loop.index0:] | length > 2 %}</s>{% endif %}"),
    "not the end of a group": PLAIN.replace(
        "</s>", "{% if not loop.last or messages[loop.index0 - 1].role == 'user' %}</s>{% endif %}"),
    "a group before the messages": (
        "{% for m in messages %}{% if loop.last or messages[loop.index0 + 1].role == 'user' %},{% endif %}{% endfor %}"
        + PLAIN),
    "the end of another loop": PLAIN.replace(
        "[{{", "{% for k in 'abcdef' %}{% if loop.last or messages[loop.index0 + 1].content %}{{ k }}{% endif %}"
        "{% endfor %}[{{"),
    "the end of a group, from another loop": (
        "{% for m in messages[1:] %}{% for k in messages[3:] %}{% endfor %}" + BODY +
        "{% if loop.last or messages[loop.index0 + 3].role == 'user' %},{% endif %}{% endfor %}"),
    "the end of a group, of another message": (
        "{% for m in messages %}{% set m = messages[loop.index0 - 1] if loop.index0 else m %}" + BODY +
        "{% if loop.last or messages[loop.index0 + 1].role == 'user' %},{% endif %}{% endfor %}"),
    "what a call has made": "{% set c = cycler('a', 'b', 'c') %}" + PLAIN.replace(
        "[{{", "{{ c.next() }}[{{") + "{{ c.current }}",
    "what a call in a question has made": "{% set c = cycler(1, 0, 1) %}" + PLAIN.replace(
        "</s>", "{% if loop.last or c.next() %}</s>{% endif %}") + "{{ c.current }}",
    "what a question has changed": PLAIN.replace(
        "</s>", "{% if loop.last or loop.changed(messages[loop.index0 + 1].role) %}</s>{% endif %}"),
    "the whole as text": "{{ messages }}" + PLAIN,
    "the whole compared": "{{ messages == [] }}" + PLAIN,
    "membership": "{{ messages[0] in messages }}" + PLAIN,
    "truth": "{{ 'some' if messages else 'none' }}" + PLAIN,
    "truth of a part": "{{ 'more' if messages[2:] else 'two' }}" + PLAIN,
    "the first": "{{ (messages | first).role }}" + PLAIN,
    "raises at the end": PLAIN + "{{ raise_exception('x') if messages | length > 3 }}",
    "raises for a later message": PLAIN.replace("</s>", "{{ raise_exception('x') if loop.index == 3 }}</s>"),
    "a variable of the loop, behind": "{% set m = 'x' %}" + PLAIN + "{{ m }}",
    "a mark in the text": PLAIN.replace("</s>", "{{ '" + prefixes.MARK + "' }}</s>"),
    "the loop's own prompt": PLAIN + "{% if add_generation_prompt %}[a]{% endif %}",
}


@pytest.mark.parametrize("name", SNEAKY)
def test_templates_that_look_further_than_they_seem_to(name: str) -> None:
    talk = Conversation(tuple(
        Message(role, (Part("text", f"{role} {number}"),))
        for number, role in enumerate(("system", "user", "assistant", "user", "assistant"))
    ), Origin("rows.jsonl", 1))
    compared(compile_template(SNEAKY[name], {}), talk)


def test_what_is_plain_is_rendered_at_once() -> None:
    """Else every comparison above could be one of nothing."""
    rounds = ("user", "assistant") * 3
    talk = Conversation(tuple(Message(role, (Part("text", role),)) for role in rounds), Origin("rows.jsonl", 1))
    found = {name: compared(compile_template(source, {}), talk)[0] for name, source in SNEAKY.items()}
    assert all(found[name] == 12 for name in ("the loop's own prompt", "the first", "truth"))
    assert not any(found[name] for name in ("the length, before", "the last message, behind", "a namespace", "a macro"))
    assert found["a part"] == 10 and found["a later message"] == 8
    assert found["the end of a group"] == 8 and found["the end of another group"] == 6


LOOKS = st.sampled_from([
    "", "{{ loop.index }}", "{{ loop.last }}", "{{ loop.first }}", "{{ loop.nextitem.role }}", "{{ messages[0].role }}",
    "{% if m.role == 'user' and not loop.last and messages[loop.index0 + 1].content == 'a' %}T{% endif %}",
    "{% if loop.last or messages[loop.index0 + 1].role != 'user' %}E{% endif %}",
    "{% if loop.last or messages[loop.index0 + 1].content == 'a' %}E{% elif loop.last or messages[0] %}F{% endif %}",
    "{% if m.role == 'user' and loop.index0 %}x{% elif loop.last or messages[loop.index0 + 2].role %}G{% endif %}",
    "{% for k in 'ab' %}{% if loop.last or messages[loop.index0 + 1].role == 'user' %}{{ k }}{% endif %}{% endfor %}",
    "{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}P{% endif %}", "{{ loop.previtem.role }}",
    "{% if loop.index == 2 %}{% continue %}{% endif %}", "{% if loop.index == 4 %}{% break %}{% endif %}",
    "{% set n.x = n.x + 1 %}{{ n.x }}", "{{ messages[1].role }}", "{{ messages | length }}",
    "{{ messages[2:] | length }}",
])
AROUND = st.sampled_from([
    "", "{{ messages[0].content }}", "{{ messages[-1].role }}", "{{ n.x }}", "{{ '[a]' if add_generation_prompt }}",
    "{{ messages[1].role if messages[1] }}", "{{ tools }}", "{{ kept[0].role }}", "{% set n.x = 7 %}",
])


OVER = st.sampled_from(["messages", "kept", "messages[1:]"])


@given(small.conversations(), AROUND, LOOKS, LOOKS, AROUND, OVER)
def test_random_templates(conversation: Conversation, before, first, second, behind, over) -> None:
    """Whatever a template looks at, and wherever."""
    loop = "{% for m in " + over + " %}" + first + BODY + second + "{% endfor %}"
    source = "{% set n = namespace(x=0) %}{% set kept = messages %}" + before + loop + behind
    compared(compile_template(source, {"tools": "t"}), conversation)


# Whether the assistant is to answer.

ENDS = {
    "always the same": (PLAIN + "{% if add_generation_prompt %}[a]{% else %}.{% endif %}", "."),
    "not asked": (PLAIN + "!", "!"),
    "a variable": (PLAIN + "{% if add_generation_prompt %}[a]{% elif thinking %}t{% endif %}", "t"),
    "asked in the loop": (PLAIN.replace("</s>", "{{ '</s>' if add_generation_prompt }}"), None),
    "asked before": ("{% set ask = add_generation_prompt %}" + PLAIN + "{% if ask %}[a]{% endif %}", None),
    "set before": ("{% set n = 'x' if tools else 'y' %}" + PLAIN + "{{ n }}", None),
    "the tools": (PLAIN + "{% if tools and add_generation_prompt %}[t]{% endif %}", None),
    "two loops": ("{% if tools %}" + PLAIN + "a{% else %}" + PLAIN + "b{% endif %}", None),
    "raises": (PLAIN + "{{ raise_exception('x') if not add_generation_prompt }}", None),
    "with": ("{% with n = tools %}{% endwith %}" + PLAIN + "{{ n }}", None),
    "a filter": (PLAIN + "{{ messages | length if add_generation_prompt }}", None),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_stands_behind_all_messages(name: str) -> None:
    """It is known without a render exactly where it can be no other."""
    source, end = ENDS[name]
    template = compile_template(source, {"thinking": True})
    assert template.default.end == end
    talk = inventory.conversation("plain")
    compared(template, talk)
    assert template.script(talk).under(thinking=False).at_once().program.end is None

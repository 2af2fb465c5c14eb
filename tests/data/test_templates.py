"""Every real chat template, with every kind of conversation, in three real tokenizers: a verdict, and what it promises.

What is promised is checked against transformers' own rendering and tokenization, turn by turn.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from pathlib import Path

import inventory
import jinja2
import pytest
from inventory import KINDS, TOKENIZERS, Case
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schoolhouse.config import Rows
from schoolhouse.data import formats, served, template, tokens
from schoolhouse.errors import ConfigError, SafetyError, TemplateError
from schoolhouse.types import Conversation, EncodedRow, Origin

SHARED = inventory.ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real templates of ../shared")
ORIGIN = Origin("rows.jsonl", 7)


@pytest.fixture(scope="module")
def loaded() -> dict[str, PreTrainedTokenizerBase]:
    return {name: inventory.tokenizer(SHARED, name) for name in TOKENIZERS}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return inventory.cases(SHARED)


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerBase:
    """A tokenizer without tokens, so that its `apply_chat_template` knows only the variables it is given."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def talk(*messages: dict, tools: list | None = None) -> Conversation:
    return formats.to_conversation({"messages": list(messages), "tools": tools}, Rows(), ORIGIN)


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


# All templates.


@needs_shared
def test_verdicts_are_those_of_the_golden_table(loaded) -> None:
    """No skip-list: 204 templates with six kinds of conversation. `inventory.py --write` renews the table."""
    golden = json.loads(inventory.GOLDEN.read_text(encoding="utf-8"))
    assert inventory.verdicts(SHARED, loaded) == golden
    assert set(golden) == {case.name for case in inventory.cases(SHARED)}


def test_the_page_prints_the_golden_table() -> None:
    page = inventory.DOCS.read_text(encoding="utf-8")
    assert page == inventory.documented(page, json.loads(inventory.GOLDEN.read_text(encoding="utf-8")))


@needs_shared
@pytest.mark.parametrize("name", TOKENIZERS)
def test_supervised_exactly_as_served(name, loaded, cases, oracle) -> None:
    """Before a target: the ids of the prompt as transformers renders it. The targets: its answer through the stop."""
    tokenizer, turns = loaded[name], 0
    for case, kind in itertools.product(cases, KINDS):
        row = inventory.encoded(inventory.served(case, tokenizer), inventory.conversation(kind))
        if isinstance(row, EncodedRow):
            turns += check_row(row, case, tokenizer, oracle)
    assert turns > 1000


def check_row(row: EncodedRow, case: Case, tokenizer: PreTrainedTokenizerBase, oracle) -> int:
    """Compare each supervised turn of a row with what transformers renders and tokenizes; returns their number."""
    script = inventory.compiled(case).script(row.conversation)
    answers = [index for index, one in enumerate(row.conversation.messages) if one.role == "assistant"]
    stops = [tokenizer.convert_tokens_to_ids(stop) for stop in case.stops]
    taught = [span for example in row.examples for span in inventory.spans(example, stops)]
    assert len(taught) == len(answers) == len(row.turns)
    for index, (before, targets), turn in zip(answers, taught, row.turns, strict=True):
        prompt = rendered(oracle, case, script, index, answer=True)
        full = rendered(oracle, case, script, index + 1, answer=False)
        assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"], (case.name, index)
        assert text_of(tokenizer, before + targets) == text_of(tokenizer, before) + written(tokenizer, turn.completion)
        assert turn.completion.endswith(case.stops) and (prompt + turn.completion in full or turn.prefilled)
        assert full.partition(turn.completion)[1] and targets[-1] in stops and not set(targets[:-1]) & set(stops)
    return len(answers)


def rendered(oracle, case: Case, script: template.Script, count: int, *, answer: bool) -> str:
    """What transformers renders for the first messages."""
    return oracle.apply_chat_template(
        list(script.messages[:count]), tools=list(script.conversation.tools) or None, chat_template=case.source,
        tokenize=False, add_generation_prompt=answer, **case.variables,
    )


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def written(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text as the tokenizer can write it: composed, and with blanks in place of SentencePiece's mark for them."""
    composed = "NFC" in str(tokenizer.backend_tokenizer.normalizer)
    text = unicodedata.normalize("NFC", text) if composed else text
    return text.replace("▁", " ") if "Metaspace" in str(tokenizer.backend_tokenizer.pre_tokenizer) else text


@needs_shared
def test_rendering_is_that_of_transformers(cases, oracle) -> None:
    """Byte by byte, or both raise: every template, kind and prefix, with and without the generation prompt."""
    raised = 0
    for case, kind in itertools.product(cases, KINDS):
        script = inventory.compiled(case).script(inventory.conversation(kind))
        for count, answer in itertools.product(range(1, len(script.messages) + 1), (True, False)):
            try:
                ours = script.prompt(count) if answer else script.full(count)
            except TemplateError:
                raised += 1
                with pytest.raises(Exception):  # noqa: B017 - whatever a template raises
                    rendered(oracle, case, script, count, answer=answer)
                continue
            assert ours == rendered(oracle, case, script, count, answer=answer), (case.name, kind, count, answer)
    assert raised > 50


@needs_shared
def test_every_refusal_shows_both_texts_and_a_setting(cases, loaded) -> None:
    """Six lines at most; a template argument that is named makes the answer teachable."""
    tokenizer, cured = loaded[TOKENIZERS[0]], 0
    for case, kind in itertools.product(cases, KINDS):
        error = inventory.encoded(inventory.served(case, tokenizer), inventory.conversation(kind))
        if isinstance(error, EncodedRow):
            continue
        lines = str(error).splitlines()
        assert len(lines) <= 6 and f"{kind}.jsonl:1" in lines[1], error
        assert any(f"model.{key}" in error.remedy for key in ("chat_template", "template_arguments", "stop")), error
        if not re.search("refuses this conversation|writes nothing of", error.found):
            assert lines[3].startswith("    asked:  ") and lines[4].startswith("    taught: "), error
        cured += check_cure(error, case, kind, tokenizer)
    assert cured > 20


def check_cure(error: TemplateError, case: Case, kind: str, tokenizer) -> bool:
    """Where an error names a template argument with its value, the message it complains of is taught under it."""
    setting = error.remedy.removeprefix("set model.template_arguments: {").rstrip("}")
    name, _, value = setting.partition(": ")
    if value not in ("true", "false"):
        return False
    model = inventory.served(case, tokenizer, **{name: value == "true"})
    place = int(error.where.rpartition(" ")[2])
    again = inventory.encoded(model, inventory.conversation(kind))
    assert isinstance(again, EncodedRow) or int(again.where.rpartition(" ")[2]) > place, error
    return True


@needs_shared
def test_a_stop_token_that_is_missing_is_named(cases, loaded) -> None:
    """With only an unused end token, each template that ends its turns with a token is refused, and names it."""
    tokenizer, named = loaded[TOKENIZERS[0]], 0
    for case in cases:
        right = inventory.served(case, tokenizer)
        if not isinstance(inventory.encoded(right, inventory.conversation("plain")), EncodedRow):
            continue
        known = (*right.stops.known, *right.stops.texts)
        wrong = served.Served(tokenizer, right.template, tokens.Stops((151646,), ("<|object_ref_start|>",), known))
        error = inventory.encoded(wrong, inventory.conversation("plain"))
        assert isinstance(error, TemplateError) and "has no stop token" in error.found, case.name
        setting = json.loads(error.remedy.removeprefix("set model.stop_tokens: "))
        assert setting[0] in case.stops and setting[1:] == ["<|object_ref_start|>"], (case.name, setting)
        named += 1
    assert named > 100


# Several templates by name, template files, variables.

DEFAULT = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '</s>' }}{% endfor %}"
WITH_TOOLS = "{{ tools | length }}" + DEFAULT
QUESTION = (user("q"), assistant("a"))


def test_tool_use_serves_conversations_with_tools() -> None:
    made = template.compile_template({"default": DEFAULT, "tool_use": WITH_TOOLS, "rag": "x"}, {})
    assert made.script(talk(*QUESTION)).full(2) == "user:q</s>assistant:a</s>"
    assert made.script(talk(*QUESTION, tools=inventory.TOOLS)).full(2) == "2user:q</s>assistant:a</s>"


def test_one_template_serves_both() -> None:
    made = template.compile_template({"default": DEFAULT}, {})
    assert made.script(talk(*QUESTION, tools=inventory.TOOLS)).full(2) == "user:q</s>assistant:a</s>"


@pytest.mark.parametrize("form", ["list", "files"])
@needs_shared
def test_named_templates_come_from_the_tokenizers_files(tmp_path: Path, form: str) -> None:
    """The list of names and texts in tokenizer_config.json, and transformers' own layout of files."""
    loaded = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    named = {"default": DEFAULT, "tool_use": WITH_TOOLS}
    loaded.chat_template = named if form == "files" else None
    loaded.save_pretrained(tmp_path)
    if form == "list":
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = tokens.load_tokenizer(tmp_path)
    source = template.template_source(None, tokens.own_template(tmp_path, again), "m")
    assert source == named
    assert template.template_source("tool_use", source, "m") == WITH_TOOLS


def test_a_template_may_stand_in_a_processors_file(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert tokens.own_template(tmp_path, bare) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT}))
    assert tokens.own_template(tmp_path, bare) == DEFAULT


def test_template_files_and_built_in_templates(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(DEFAULT, encoding="utf-8")
    assert template.template_source(str(path), "own", "m") == DEFAULT
    assert template.template_source("chatml", "own", "m") == template.BUILT_IN["chatml"]
    assert template.template_source(None, "own", "m") == "own"


@pytest.mark.parametrize(("setting", "own", "words"), [
    ("gone.jinja", {"default": "x", "rag": "y"}, "one of chatml, plain, default, rag"),
    (None, None, "without a chat template"), (None, {"rag": "x"}, "set model.chat_template: rag"),
])
def test_a_template_that_is_not_there(setting, own, words) -> None:
    with pytest.raises(ConfigError) as caught:
        template.template_source(setting, own, "m")
    assert words in str(caught.value)


def test_a_template_that_is_not_jinja() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja") as caught:
        template.compile_template("{% for %}", {})
    assert "line 1" in caught.value.where


@needs_shared
@pytest.mark.parametrize("thinking", [True, False])
def test_template_arguments_reach_the_template(cases, loaded, oracle, thinking: bool) -> None:
    """`enable_thinking` both ways, in every template that knows it: prompts are transformers', verdicts differ."""
    tokenizer, seen = loaded[TOKENIZERS[0]], set()
    for case in cases:
        if "enable_thinking" not in inventory.compiled(case).default.arguments:
            continue
        for kind in KINDS:
            row = inventory.encoded(inventory.served(case, tokenizer, enable_thinking=thinking),
                                    inventory.conversation(kind))
            seen.add(inventory.verdict(row))
            for turn in row.turns if isinstance(row, EncodedRow) else ():
                assert oracle.apply_chat_template(
                    [{"role": "user", "content": "?"}], chat_template=case.source, tokenize=False,
                    add_generation_prompt=True, enable_thinking=thinking, **case.variables,
                )[-12:] == turn.prompt[-12:] or kind == "tools", (case.name, kind)
    assert seen >= ({"one", "split"} if thinking else {"one", "split", "prefilled"})


# How messages are handed over.


def handed(source: str, *messages: dict, **more) -> list[dict]:
    return list(template.compile_template(source, {}).script(talk(*messages, **more)).messages)


PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
BOTH = ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}")


def test_content_is_a_string_unless_the_template_reads_only_parts() -> None:
    """SmolVLM's template drops a string without a word; it gets the list that a serving engine gives it."""
    assert handed(DEFAULT, *QUESTION)[0]["content"] == "q"
    assert handed(BOTH, *QUESTION)[0]["content"] == "q"
    assert handed(PARTS, *QUESTION)[0]["content"] == [{"type": "text", "text": "q"}]


def test_several_texts_are_lines_or_parts() -> None:
    two = user([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}])
    assert handed(DEFAULT, two, assistant("a"))[0]["content"] == "x\ny"
    assert handed(BOTH, two, assistant("a"))[0]["content"] == [{"type": "text", "text": part} for part in "xy"]


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}WRITTEN{% endfor %}{% endfor %}"
OBJECTS = CALLS.replace("WRITTEN", "{{ c.function.arguments | tojson }}")
TEXTS = CALLS.replace("WRITTEN", "{{ c.function.arguments }}")
JOINED = CALLS.replace("WRITTEN", "{{ 'x' + c.function.arguments }}")


@pytest.mark.parametrize("data", [{"b": 1, "a": None}, '{"b": 1, "a": null}'])
@pytest.mark.parametrize(("source", "written"), [
    (OBJECTS, 'f{"b": 1, "a": null}'), (TEXTS, 'f{"b": 1, "a": null}'), (JOINED, 'fx{"b": 1, "a": null}'),
])
def test_arguments_are_never_encoded_twice(data, source, written) -> None:
    """As an object or as a string in the data: the template writes the same JSON, key order and nulls kept."""
    call = {"type": "function", "function": {"name": "f", "arguments": data}}
    made = template.compile_template(source, {}).script(talk(user("q"), assistant(None, tool_calls=[call])))
    assert made.full(2) == written


def test_arguments_in_a_string_stay_as_they_are_where_the_template_writes_them() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    made = template.compile_template(TEXTS, {}).script(talk(user("q"), assistant(None, tool_calls=[call])))
    assert made.full(2) == 'f{"a":1}'


@pytest.mark.parametrize(("data", "given"), [("", {}), ("[1", "[1"), ("{}", {})])
def test_arguments_that_are_no_object(data, given) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": data}}
    [_, answer] = handed(OBJECTS, user("q"), assistant(None, tool_calls=[call]))
    assert answer["tool_calls"][0]["function"]["arguments"] == given


def test_content_beside_tool_calls_is_an_empty_string() -> None:
    """OpenAI's null, a missing content and an empty one are the same answer, as in vLLM and SGLang."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for content in ({"content": None}, {}, {"content": ""}):
        answer = {"role": "assistant", "tool_calls": call, **content}
        assert handed(DEFAULT, user("q"), answer)[1]["content"] == ""


def test_reasoning_stands_under_every_name() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        [_, answer] = handed(DEFAULT, user("q"), assistant("a", **{key: "r"}))
        assert {answer[name] for name in ("reasoning_content", "reasoning", "thinking")} == {"r"}
    assert "reasoning" not in handed(DEFAULT, *QUESTION)[1]


@pytest.mark.parametrize("reach", [
    "messages.__class__", "messages[0].__class__", "messages[0].__class__.__mro__",
    "messages[0].pop('role')", "messages[0].update(x=1)", "loop.__class__.__mro__", "loop._iterable.__class__.__mro__",
    "messages[0].items() | list", "messages[0].get('role')", "messages[0].none", "messages[0].none.none", "loop.last",
    "loop.nothing", "loop.nothing.nothing", "loop.cycle('a', 'b')", "tools[0].type", "tools[0]._json", "tools[0]",
])
def test_the_short_way_to_keys_is_the_sandboxes(reach: str) -> None:
    """Whatever a template reaches for, it gets what Jinja's immutable sandbox gives, or is refused as there."""
    source = "{% for m in messages %}{{ " + reach + " }}{% endfor %}"
    script = template.compile_template(source, {}).script(talk(*QUESTION, tools=inventory.TOOLS))
    given = {"messages": list(script.messages), "tools": inventory.TOOLS}
    try:
        expected = ImmutableSandboxedEnvironment().from_string(source).render(**given)
    except jinja2.TemplateError as error:
        with pytest.raises(SafetyError if "attribute '_" in str(error) else TemplateError):
            script.full(2)
    else:
        assert re.sub(r" at 0x\w+", "", script.full(2)) == re.sub(r" at 0x\w+", "", expected)

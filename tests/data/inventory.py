"""What the template tests range over: every real chat template of ../shared, kinds of conversation, real tokenizers.

`python tests/data/inventory.py --write` renews `verdicts.json` and the tables in `docs/templates.md`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from schoolhouse.config import Rows
from schoolhouse.data import formats, tokens
from schoolhouse.data.served import Rules, Served
from schoolhouse.data.template import Template, compile_template
from schoolhouse.errors import DataError
from schoolhouse.types import Conversation, EncodedRow, Example, Origin

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("verdicts.json")
DOCS = ROOT / "docs" / "templates.md"
TOKENIZERS = ("qwen2.5-instruct", "deepseek-coder-instruct", "llama2")
"""Byte-level with normalization, byte-level with added tokens of both kinds, SentencePiece's kind."""

FAMILIES = (
    ("<|start_of_role|>", None, "<|end_of_text|>", ()),
    ("<|header_start|>", "<|begin_of_text|>", "<|eot|>", ("<|eom|>",)),
    ("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", ("<|eom_id|>",)),
    ("<|turn>", "<bos>", "<turn|>", ("<|tool_response>",)),
    ("<start_of_turn>", "<bos>", "<eos>", ("<end_of_turn>",)),
    ("<|START_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    ("<|im_middle|>", None, "<|im_end|>", ()),
    ("<|im_sep|>", None, "<|im_end|>", ()),
    ("<end_of_utterance>", None, "<end_of_utterance>", ()),
    ("<|im_start|>", "<|startoftext|>", "<|im_end|>", ("<|endoftext|>",)),
    ("<|return|>", "<|startoftext|>", "<|return|>", ("<|call|>",)),
    ("<|EOT|>", "<｜begin▁of▁sentence｜>", "<|EOT|>", ()),
    ("<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ()),
    ("<|turn_end|>", None, "<|turn_end|>", ()),
    ("<|end_of_turn|>", "<s>", "<|end_of_turn|>", ()),
    ("GPT4 Correct", "<s>", "<|end_of_turn|>", ()),
    ("<|observation|>", None, "<|endoftext|>", ("<|user|>", "<|observation|>")),
    ("[gMASK]", None, "<|endoftext|>", ("<|user|>", "<|observation|>")),
    ("<|end|>", "<s>", "<|endoftext|>", ("<|end|>",)),
    ("message_sep", "<s>", "<|message_sep|>", ()),
    ("<function_call>", None, "<|endoftext|>", ()),
    ("Falcon", None, "<|endoftext|>", ()),
)
"""Beginning of text, end token, and further stop tokens of the model whose template has these words, as its own
`generation_config.json` says; all others have Llama 2's `<s>` and `</s>`."""

TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": f"The {name} of a city, where “known”.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "Its name, é ü 城"},
            "days": {"type": "integer", "description": "How many"},
        }},
    }}
    for name in ("weather", "forecast")
]


def said(*texts: str) -> list[dict[str, Any]]:
    """Turns of user and assistant."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def _called() -> list[dict[str, Any]]:
    first = {"id": "call00001", "type": "function",
             "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
    second = {"id": "call00002", "type": "function",
              "function": {"name": "forecast", "arguments": '{"city": "São Paulo"}'}}
    question, answer, thanks, farewell = said("Rome and Oslo?", "Rome 21, Oslo 3.", "Thanks", "You are welcome.")
    return [
        question, {"role": "assistant", "content": None, "tool_calls": [first, second]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 21}'},
        {"role": "tool", "tool_call_id": "call00002", "name": "forecast", "content": '{"celsius": 3}'},
        answer, thanks, farewell,
    ]


def _reasoned() -> list[dict[str, Any]]:
    first, second, third, fourth = said("2 + 3?", "It is 5.", "Times 4?", "That is 20.")
    return [first, {**second, "reasoning_content": "Two and three make five."},
            third, {**fourth, "reasoning_content": "Five times four."}]


KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {"messages": said("Who wrote Faust?", "Goethe.", "When?", "In 1808.", "And part two?", "In 1832.")},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *said("Who?", "Goethe.", "When?", "In 1808.")]},
    "tools": {"messages": _called(), "tools": TOOLS},
    "reasoning": {"messages": _reasoned()},
    "unicode": {"messages": said(
        "\n  Grüße, 你好 e\u0301 👩‍👩‍👧\u200b \n", " \n Řeka, ňáš ﬁ ½\n\n", "\t¿Qué?  ", "  ありがとう…\n",
    )},
    "inline": {"messages": said("2 + 3?", "<think>\nTwo, three.\n</think>\n\nFive.", "Again?", "<think>Hm</think>5")},
}
"""Rows as data has them: three plain turns; a system prompt; two calls at once with results; reasoning in each turn;
unicode with blanks around it; thinking written into the content."""


@dataclass(frozen=True)
class Case:
    """One template with the tokens of its model."""

    name: str
    source: str
    bos: str | None
    eos: str | None
    stops: tuple[str, ...]

    @property
    def variables(self) -> dict[str, str]:
        return {name: text for name, text in (("bos_token", self.bos), ("eos_token", self.eos)) if text is not None}


def cases(shared: Path) -> list[Case]:
    """Every template: files, fields of configurations, and test vectors."""
    root = shared / "chat_templates"
    return [_case(name, source, config) for name, source, config in sorted(_sources(root), key=lambda one: one[0])]


def _sources(root: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name and text of each template, with what its model's configuration says of tokens."""
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.suffix in (".jinja", ".jinja2"):
            config = path.with_name("tokenizer_config.json")
            yield name, path.read_text(encoding="utf-8"), json.loads(config.read_text()) if config.is_file() else {}
        elif path.suffix == ".json":
            yield from _fields(name, json.loads(path.read_text(encoding="utf-8")), root)


def _fields(name: str, config: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for case in config.get("cases", []):
        yield f"{name} {case['name']}", case["template_str"], {key: case[key] for key in case if case[key] != ""}
    field = config.get("chat_template")
    if isinstance(field, str) and field.endswith(".jinja"):  # as that repository's README says to read its files
        text = (root / "chujiezheng" / Path(field).name).read_text(encoding="utf-8")
        yield name, text.replace("    ", "").replace("\n", ""), {}
    elif isinstance(field, str):
        yield name, field, config
    for named in field if isinstance(field, list) else []:
        yield f"{name} {named['name']}", named["template"], config


def _case(name: str, source: str, config: Mapping[str, Any]) -> Case:
    default = ("", "<s>", "</s>", ())
    _, bos, eos, further = next((family for family in FAMILIES if family[0] in source), default)
    bos, eos = (_text(config[key]) if key in config else own for key, own in (("bos_token", bos), ("eos_token", eos)))
    return Case(name, source, bos, eos, tuple(dict.fromkeys(stop for stop in (eos, *further) if stop)))


def _text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def tokenizer(shared: Path, name: str) -> PreTrainedTokenizerBase:
    """A real tokenizer, with the special tokens that the templates need and it has not."""
    loaded = AutoTokenizer.from_pretrained(shared / "tokenizers" / name, local_files_only=True)
    known = loaded.added_tokens_encoder
    needed = {token for case in cases(shared) for token in (case.bos, *case.stops, *_specials(case.source)) if token}
    new = sorted(needed - set(known))
    loaded.add_special_tokens(
        {"extra_special_tokens": [AddedToken(token, normalized=False, special=True) for token in new]},
        replace_extra_special_tokens=False,
    )
    return loaded


def _specials(source: str) -> set[str]:
    """What looks like a special token in a template's text."""
    return set(re.findall(r"<\|[\w/]+\|>|<｜[^｜\s]+｜>|<\|turn>|<turn\|>|<(?:start|end)_of_\w+>", source))


@functools.cache
def compiled(case: Case, arguments: tuple[tuple[str, Any], ...] = ()) -> Template:
    return compile_template(case.source, case.variables | dict(arguments))


def served(case: Case, loaded: PreTrainedTokenizerBase, **arguments: Any) -> Served:
    """The case's model: its template with a tokenizer, and the stop tokens of its generation configuration."""
    ids = tuple(loaded.convert_tokens_to_ids(list(case.stops)))
    known = tuple(token.content for token in loaded.added_tokens_decoder.values() if token.content not in case.stops)
    return Served(loaded, compiled(case, tuple(arguments.items())), tokens.Stops(ids, case.stops, known))


def conversation(kind: str) -> Conversation:
    return formats.to_conversation(json.loads(json.dumps(KINDS[kind])), Rows(), Origin(f"{kind}.jsonl", 1))


def encoded(model: Served, talk: Conversation) -> EncodedRow | DataError:
    """The row all the way, or why it is refused."""
    try:
        turns = model.to_turns(talk, "every")
    except DataError as error:
        return error
    return next(model.to_rows([(talk, turns)], Rules("every", 100_000, "error")))


def spans(example: Example, stops: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids before, and targets of, each supervised turn of an example; a turn ends with a stop token."""
    ids = [*example.input_ids.tolist(), int(example.labels[-1])]
    supervised = [False, *(example.weights != 0).tolist()]
    assert ((example.labels != -100) == (example.weights != 0)).all()
    start = None
    for place, token in enumerate(ids):
        start = place if supervised[place] and start is None else start
        if start is not None and token in stops:
            yield ids[:start], ids[start : place + 1]
            start = None
    assert start is None


REASONS = {
    "the chat template refuses this conversation": "raises",
    "the generation prompt opens a thinking block": "opens thinking",
    "the generation prompt closes the thinking block": "closes thinking",
    "the template drops the reasoning": "drops reasoning",
    "the template drops text": "drops text",
    "the chat template writes nothing of the row's tools": "shows no tools",
    "the chat template writes nothing of message": "shows not every role",
    "the template drops a tool call": "drops tool calls",
    "the template drops an argument": "drops tool calls",
    "the template writes this answer differently": "contradicts its prompt",
    "the stop token ": "stops early",
    "the answer has no stop token": "writes no stop token",
}
"""How each refusal begins, and its short name in the tables."""


def verdict(row: EncodedRow | DataError) -> str:
    """`one`, `split`, `prefilled`, or `refused: why`."""
    if isinstance(row, EncodedRow):
        return row.verdict
    return "refused: " + next(short for begin, short in REASONS.items() if row.found.startswith(begin))


def verdicts(shared: Path, loaded: Mapping[str, PreTrainedTokenizerBase]) -> dict[str, dict[str, str]]:
    """The verdict on each template with each kind of conversation; one for each tokenizer where they differ."""
    talks = {kind: conversation(kind) for kind in KINDS}
    return {case.name: {kind: _agreed(case, talk, loaded) for kind, talk in talks.items()} for case in cases(shared)}


def _agreed(case: Case, talk: Conversation, loaded: Mapping[str, PreTrainedTokenizerBase]) -> str:
    found = [verdict(encoded(served(case, one), talk)) for one in loaded.values()]
    return found[0] if len(set(found)) == 1 else ", ".join(found)


def tables(golden: Mapping[str, Mapping[str, str]]) -> str:
    """The golden table as Markdown: how many of each verdict, why refused, and template by template."""
    counts = {kind: Counter(row[kind].partition(":")[0] for row in golden.values()) for kind in KINDS}
    why = {kind: Counter(row[kind].partition(": ")[2] for row in golden.values()) for kind in KINDS}
    order = ("one", "split", "prefilled", "refused")
    several = sorted({one for found in counts.values() for one in found} - set(order))
    reasons = sorted({reason for found in why.values() for reason in found if reason})
    lines = [*_table(("verdict", *KINDS), [
        (name, *(counts[kind][name] for kind in KINDS)) for name in (*order, *several)
    ]), "", *_table(("refused because it", *KINDS), [
        (reason, *(why[kind][reason] for kind in KINDS)) for reason in reasons
    ]), "", *_table(("template", *KINDS), [
        (f"`{name}`", *(row[kind].removeprefix("refused: ") for kind in KINDS)) for name, row in golden.items()
    ])]
    return "\n".join(lines)


def _table(head: tuple[object, ...], rows: list[tuple[object, ...]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows)]


BEGIN, END = "<!-- the golden table: written by tests/data/inventory.py -->", "<!-- end of the golden table -->"


def documented(text: str, golden: Mapping[str, Mapping[str, str]]) -> str:
    """The page with its tables renewed."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(golden)}\n\n{END}{rest.partition(END)[2]}"


def write() -> None:
    """Renew the golden table and the page that prints it."""
    shared = ROOT.parent / "shared"
    golden = verdicts(shared, {name: tokenizer(shared, name) for name in TOKENIZERS})
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), golden), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()

"""Real conversations through real tokenizers: the store holds what a second, simple implementation computes."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import independent
import inventory
import pytest
from transformers import AutoTokenizer

from schoolhouse.config import Data, Source
from schoolhouse.data import prepare, served
from schoolhouse.data.choose import Choice
from schoolhouse.data.store import Store
from schoolhouse.errors import TemplateError

MODELS = ("qwen2.5-instruct", "qwen3", "deepseek-coder-instruct")
RULES = served.Rules("every", 1_000_000, "error")
SOURCES = (
    "sgd/sgd_train.messages.jsonl", "sgd/sgd_test.messages.jsonl", "glaive/glaive_toolcall_en_demo.json",
    "glaive/glaive_toolcall_zh_demo.json", "kdconv/kdconv_film_test.messages.jsonl",
    "kdconv/kdconv_music_test.messages.jsonl", "kdconv/kdconv_travel_test.messages.jsonl", "identity/identity.json",
)
Row = dict[str, Any]


def rows_of(shared: Path, source: str) -> list[Row]:
    text = (shared / "conversations" / source).read_text(encoding="utf-8")
    return json.loads(text) if source.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def calls_tools(row: Row) -> bool:
    messages = row.get("messages") or row.get("conversations") or []
    return any(message.get("tool_calls") or message.get("from") == "function_call" for message in messages)


def offers_tools(row: Row) -> bool:
    tools = row.get("tools") or []
    return bool(json.loads(tools) if isinstance(tools, str) else tools)


def prepared(shared: Path, model: str, rows: list[Row], place: Path) -> Store:
    """The rows from a file through the whole preparation, in a cache of their own."""
    (place / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    source = Source(path=str(place / "rows.jsonl"))
    data = Data(train=(source,), workers=1, cache=str(place / "cache"))
    serving = served.Serving(shared / "tokenizers" / model, None, "{}", (), datetime.date(2026, 1, 1))
    return prepare.prepare(data, Choice((source,)), serving, RULES)


def check(shared: Path, model: str, rows: list[Row], place: Path) -> Store:
    """The ledger adds up, each stop token is a target, and each turn is that of the second implementation."""
    store = prepared(shared, model, rows, place)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / model)
    ledger, stop = store.ledger, tokenizer.eos_token
    assert ledger.rows == ledger.kept == len(rows) and not ledger.dropped
    assert ledger.turns == ledger.stopped_turns and ledger.examples == len(store)
    assert ledger.supervised_tokens == store.supervised_tokens.sum() and ledger.tokens == store.lengths.sum()
    ours = taught(store, tokenizer.eos_token_id)
    for number, row in enumerate(rows, start=1):
        theirs = list(independent.supervised(row, tokenizer, tokenizer.chat_template, [stop]))
        assert ours.pop(number) == theirs, f"row {number}"
    assert not ours
    return store


def taught(store: Store, stop: int) -> dict[int, list[tuple[list[int], list[int]]]]:
    """What stands before each supervised turn, and its targets, by row."""
    found = defaultdict(list)
    for example in (store[index] for index in range(len(store))):
        found[example.origin.row] += inventory.spans(example, [stop])
    return found


def some(shared: Path, model: str, every: int = 1) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Of each source: the rows that the model's template can write, and those it cannot, because they have tools."""
    for source in SOURCES:
        rows = rows_of(shared, source)[::every]
        without_tools = model.startswith("deepseek")
        refused = [row for row in rows if calls_tools(row) or offers_tools(row)] if without_tools else []
        yield source, [row for row in rows if row not in refused], refused


@pytest.mark.parametrize("model", MODELS)
def test_a_second_implementation_agrees(shared: Path, tmp_path: Path, model: str) -> None:
    check(shared, model, [row for _, kept, _ in some(shared, model, 40) for row in kept], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_second_implementation_agrees_on_all(shared: Path, tmp_path: Path, model: str) -> None:
    """Every row of every real conversation file."""
    for number, (source, kept, refused) in enumerate(some(shared, model)):
        place = tmp_path / str(number)
        place.mkdir()
        if kept:
            store = check(shared, model, kept, place)
            print(f"\n{model} {source}: {store.ledger}, refused for their tools: {len(refused)}")


def test_a_template_without_tools_refuses_rows_with_tool_calls(shared: Path, tmp_path: Path) -> None:
    """DeepSeek-Coder's template writes no calls: every such row is refused, with the reason and the number of them,
    and so is one whose tools are only on offer."""
    every = [row for _, _, rows in some(shared, MODELS[2], 40) for row in rows]
    refused = [row for row in every if calls_tools(row)]
    on_offer = [row for row in every if not calls_tools(row)]
    with pytest.raises(TemplateError, match="writes nothing of the row's tools"):
        prepared(shared, MODELS[2], on_offer, tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(TemplateError, match=f"drops a tool call.*{len(refused)} of {len(refused)} rows are bad"):
        prepared(shared, MODELS[2], refused, tmp_path)
    assert len(refused) > 20


def test_verdicts_of_real_conversations(shared: Path, tmp_path: Path) -> None:
    """Qwen2.5 appends; Qwen3 rewrites history (it drops the empty thinking of earlier turns), so each turn is split."""
    rows = rows_of(shared, "kdconv/kdconv_film_test.messages.jsonl")[:5]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert prepared(shared, "qwen2.5-instruct", rows, tmp_path / "a").ledger.verdicts == {"one": 5}
    assert prepared(shared, "qwen3", rows, tmp_path / "b").ledger.verdicts == {"split": 5}

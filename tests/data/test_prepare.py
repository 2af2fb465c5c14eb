"""Random rows through the whole preparation: the ledger adds up, what is shown is trained, nothing is cut amiss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schoolhouse import overview, places
from schoolhouse.config import Recipe
from schoolhouse.data import choose, loader, prepare, served
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError

END = "<|im_end|>"
TEMPLATES = {
    name: source.replace("</s>", END).replace("<end>", "<|endoftext|>")
    for name, source in (("plain", small.PLAIN), ("trimmed", small.TRIMMED), ("prefilled", small.PREFILLED),
                         ("another end", small.ANOTHER_END), ("headless", small.HEADLESS))
}
words = st.sampled_from(["a", "b c", "12", "\n", "é", "好", " so ", "long " * 9])
texts = st.lists(words, min_size=1, max_size=4).map("".join).filter(str.strip)
weights = st.sampled_from([{}, {}, {"weight": 0.5}, {"weight": 0}, {"train": True}, {"loss_weight": 2.0}])


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """A conversation, or at times something that is none."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(["broken", '{"messages": []}', '{"messages": 5}', "[]"]))
    rounds = draw(st.lists(st.tuples(texts, texts, weights), min_size=1, max_size=4))
    return {"messages": [
        message for question, answer, weight in rounds
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer, **weight})
    ]}


choices = st.fixed_dictionaries({
    "supervise": st.sampled_from(["every", "last", "marked"]), "too_long": st.sampled_from(["error", "drop", "turns"]),
    "max_tokens": st.sampled_from([12, 30, 60, 500]), "on_error": st.sampled_from(["stop", "skip:30%", "skip:100%"]),
    "validation": st.sampled_from([None, 0.3]), "limit": st.sampled_from([None, 5]),
})


@pytest.fixture(scope="module", autouse=True)
def student(cache: Path) -> Path:
    return places.model_directory("starter/qwen3")


@settings(max_examples=60)
@given(st.lists(rows(), min_size=1, max_size=12), choices, st.sampled_from(sorted(TEMPLATES)))
def test_random_rows(drawn: list[Any], how: dict[str, Any], template: str) -> None:
    """Whatever comes in, and whatever is asked for: a refusal with its reason, or an account of every row."""
    with tempfile.TemporaryDirectory() as place:
        recipe = written(Path(place), drawn, how, TEMPLATES[template])
        serving = served.serving(recipe.model, places.model_directory("starter/qwen3"))
        stores = {}
        for side, choice in choose.choices(recipe).items():
            told: list[tuple[int, int | None]] = []
            try:
                stores[side] = prepare.prepare(
                    recipe.data, choice, serving, served.rules(recipe), lambda *now, told=told: told.append(now))
            except DataError as error:
                check_refusal(error, recipe, drawn)
            else:
                rows = stores[side].ledger.rows
                assert not told or told[-1] == (rows, rows if side == "train" else told[-1][1])
        for store in stores.values():
            check_ledger(store, min(len(drawn), recipe.data.limit or len(drawn)))
            check_examples(store, served.load(serving).stops.ids, recipe)
        if "train" in stores:
            check_shown(stores["train"], recipe, served.load(serving))
        if len(stores) == 2:
            assert stores["train"].ledger.dropped["held out for validation"] == stores["validation"].ledger.rows


def written(place: Path, drawn: list[Any], how: dict[str, Any], template: str) -> Recipe:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in drawn]
    (place / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (place / "mine.jinja").write_text(template, encoding="utf-8")
    data = {"train": str(place / "rows.jsonl"), "workers": 1, "cache": str(place / "cache"),
            **{name: value for name, value in how.items() if value is not None}}
    model = {"path": "starter/qwen3", "chat_template": str(place / "mine.jinja"),
             "stop_tokens": [END, "<|endoftext|>"]}
    return Recipe.model_validate({"model": model, "data": data, "seed": 3})


def check_refusal(error: DataError, recipe: Recipe, drawn: list[Any]) -> None:
    """Only rows that are bad, too long, or not to be learnt may stop a preparation."""
    nothing = "none is left to learn" in error.found or "no row is held out" in error.found
    allowed = recipe.data.bad_share
    assert nothing or allowed < 1, error
    assert error.where and error.remedy
    if not any(isinstance(row, str) for row in drawn) and recipe.data.too_long != "error":
        assert nothing, error


def check_ledger(store: Store, rows_drawn: int) -> None:
    """Rows in are rows kept and rows dropped; each dropped one is listed; what is counted is what is stored."""
    ledger = store.ledger
    listed = [json.loads(line) for line in (store.directory / "dropped.jsonl").read_text("utf-8").splitlines()]
    bad = (store.directory / "bad.jsonl").read_text("utf-8").splitlines()
    kept = {store[index].origin.row for index in range(len(store))}
    assert ledger.rows == ledger.kept + sum(ledger.dropped.values()) == sum(ledger.by_source.values()) <= rows_drawn
    assert len(listed) == sum(ledger.dropped.values()) and len(kept) == ledger.kept
    assert not kept & {one["row"] for one in listed}
    assert len(bad) == sum(count for reason, count in ledger.dropped.items() if reason.startswith("bad"))
    assert (ledger.examples, ledger.tokens) == (len(store), int(store.lengths.sum()))
    assert ledger.supervised_tokens == int(np.count_nonzero(store.arrays["weights"]))
    assert ledger.turns == ledger.stopped_turns


def check_examples(store: Store, stops: tuple[int, ...], recipe: Recipe) -> None:
    """No example is longer than allowed, or ends in the middle of a completion; each turn ends with its stop token."""
    for example in (store[index] for index in range(len(store))):
        assert len(example.input_ids) <= recipe.max_tokens and example.supervised
        assert example.labels[-1] in stops, "a cut through a completion would end elsewhere"
        learnt = example.weights != 0
        assert (example.labels[learnt] >= 0).all() and (example.labels[~learnt] == -100).all()
        for start, end in turns_of(example.weights):
            inside = np.isin(example.labels[start:end], stops)
            assert inside[-1] and len(set(example.weights[start:end].tolist())) == 1


def turns_of(weights: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where each supervised stretch begins and ends; between two there is always some context."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def check_shown(store: Store, recipe: Recipe, model: served.Served) -> None:
    """Every number that `show --json` prints is the one that the loader hands to the student, for all rows."""
    shown = list(overview.shown_rows(recipe, model, served.rules(recipe)))
    plan = Plan(store.lengths, store.supervised, store.supervised_tokens, 4, 500, seed=1)
    delivered = {}
    for step in loader.steps(store, plan, 1, plan.steps_per_epoch, torch.device("cpu")):
        for micro in step.micro_batches:
            bounds = zip(micro.pack, micro.boundaries[:-1], micro.boundaries[1:], strict=True)
            delivered |= {index: {
                "ids": micro.input_ids[0, start:end].tolist(), "labels": micro.labels[0, start:end].tolist(),
                "weights": micro.weights[0, start:end].tolist(), "positions": micro.positions[0, start:end].tolist(),
            } for index, start, end in bounds}
    assert len(delivered) == len(store) == len(shown)
    for index, one in enumerate(shown):
        assert {name: one[name] for name in delivered[index]} == delivered[index]
        assert (one["source"], one["row"]) == (store[index].origin.source, store[index].origin.row)
        whole = "".join(piece["text"] for piece in one["pieces"] if piece["weight"])
        assert "\ufffd" in whole or whole.endswith((END, "<|endoftext|>"))

"""The store: what goes in comes out, in order, row by row; made once, found again, and never half of it."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schoolhouse import places
from schoolhouse.config import Model, Recipe
from schoolhouse.data import choose, loader, prepare, served, store
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError, SchoolhouseError
from schoolhouse.types import UNSUPERVISED, Example, Ledger, Origin, PlannedStep

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Each example writes the same directory anew."""
SOURCES = ("a.jsonl", "b.jsonl")
LEDGER = Ledger(3, {"one": 2}, {"longer": 1}, 0, 2, 2, 2, 9, 4, {"a.jsonl": 3})


@st.composite
def some_examples(draw: st.DrawFn) -> Example:
    length = draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length + 1, max_size=length + 1))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 0.25, 3.0]), min_size=length, max_size=length))
    tokens, weight = np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32)
    labels = np.where(weight != 0, tokens[1:], UNSUPERVISED).astype(np.int32)
    return Example(tokens[:-1], labels, weight, Origin(draw(st.sampled_from(SOURCES)), draw(st.integers(1, 10**12))))


def write(directory: Path, groups: Sequence[Sequence[Example]]) -> Store:
    writer = store.Writer(directory)
    for group in groups:
        writer.append(store.to_arrays(group, SOURCES))
    writer.close("print", LEDGER, SOURCES)
    return store.open_store(directory)


def equal(one: Example, other: Example) -> bool:
    arrays = (("input_ids", np.int32), ("labels", np.int32), ("weights", np.float32))
    values = [(vars_of(one)[name], vars_of(other)[name], kind) for name, kind in arrays]
    return one.origin == other.origin and all(
        left.dtype == right.dtype == kind and left.tolist() == right.tolist() for left, right, kind in values
    )


def vars_of(one: Example) -> dict[str, np.ndarray]:
    return {"input_ids": one.input_ids, "labels": one.labels, "weights": one.weights}


@QUICK
@given(st.lists(st.lists(some_examples(), max_size=4), max_size=4))
def test_what_is_written_is_read(tmp_path: Path, groups: list[list[Example]]) -> None:
    """Tokens, labels, weights and origins to the bit, in order, however they came; also none at all."""
    examples, kept = [one for group in groups for one in group], write(tmp_path, groups)
    assert len(kept) == len(examples)
    assert all(equal(kept[index], one) for index, one in enumerate(examples))
    assert kept.lengths.tolist() == [len(one.input_ids) for one in examples]
    assert kept.supervised.tolist() == [float(one.weights.sum(dtype=np.float64)) for one in examples]
    assert kept.supervised_tokens.tolist() == [one.supervised for one in examples]
    assert (kept.ledger, kept.source_names) == (LEDGER, SOURCES)
    assert kept.fingerprint == write(tmp_path, [[one] for one in examples]).fingerprint, "not how they came"
    if examples:
        other = dataclasses.replace(examples[-1], weights=examples[-1].weights + 1)
        assert kept.fingerprint != write(tmp_path, [[*examples[:-1], other]]).fingerprint


@QUICK
@given(st.lists(some_examples(), min_size=1, max_size=8), st.data())
def test_a_micro_batch_is_its_examples_end_to_end(tmp_path: Path, examples: list[Example], data: st.DataObject) -> None:
    """What the loader lays together is what the store holds: no shift, no padding, positions from 0 for each."""
    kept = write(tmp_path, [examples])
    pack = data.draw(st.permutations(range(len(examples))))[: data.draw(st.integers(1, len(examples)))]
    micro = loader.micro_batch(kept, pack)
    for index, start, end in zip(pack, micro.boundaries[:-1], micro.boundaries[1:], strict=True):
        one = examples[index]
        assert micro.input_ids[0, start:end].tolist() == one.input_ids.tolist()
        assert micro.labels[0, start:end].tolist() == one.labels.tolist()
        assert micro.weights[0, start:end].tolist() == one.weights.tolist()
        assert micro.positions[0, start:end].tolist() == list(range(end - start))
    assert micro.targets.tolist() == micro.weights[0].nonzero().flatten().tolist()
    assert micro.boundaries[-1] == micro.input_ids.shape[1] and micro.pack == tuple(pack)
    assert micro.supervised == float(micro.weights.double().sum())


def test_the_ranks_of_a_step_share_its_packs(tmp_path: Path) -> None:
    """Two ranks together compute what one computes, each pack once, and all know the same N."""
    generator = np.random.default_rng(0)
    examples = [a_row(int(length), number, generator) for number, length in enumerate(generator.integers(2, 20, 40), 1)]
    kept = write(tmp_path, [examples])
    plan = Plan(kept.lengths, kept.supervised, kept.supervised_tokens, 16, 64, seed=3, ranks=2)
    ranks = [list(loader.steps(kept, plan, 1, 3, torch.device("cpu"), rank=rank, ranks=2)) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert len(one.micro_batches) == len(other.micro_batches)
        packs = [micro.pack for step in (one, other) for micro in step.micro_batches]
        assert sorted(packs) == sorted(plan.step(one.index).packs)
        assert sum(micro.supervised for step in (one, other) for micro in step.micro_batches) == one.supervised


def test_a_long_run_keeps_no_step(tmp_path: Path) -> None:
    """Steps that are done are forgotten, but for the 57 that `itertools.tee` lets go at once."""
    generator = np.random.default_rng(0)
    kept = write(tmp_path, [[a_row(5, number, generator) for number in range(1, 41)]])
    plan = Plan(kept.lengths, kept.supervised, kept.supervised_tokens, 8, 64, seed=3)
    done = loader.steps(kept, plan, 1, 1000, torch.device("cpu"))
    assert [next(done).index for _ in range(500)][-1] == 500
    gc.collect()
    assert sum(isinstance(one, PlannedStep) for one in gc.get_objects()) < 100


def test_the_next_step_is_made_while_one_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one thread, one step ahead; what goes wrong there is raised where the step was asked for, and the thread ends.
    """
    generator = np.random.default_rng(0)
    kept = write(tmp_path, [[a_row(5, number, generator) for number in range(1, 41)]])
    plan = Plan(kept.lengths, kept.supervised, kept.supervised_tokens, 8, 64, seed=3)
    planned, asked, makers, before = plan.step, [], set(), threading.active_count()

    def step(index: int) -> PlannedStep:
        asked.append(index)
        makers.add(threading.current_thread())
        if index == 4:
            raise ValueError("the fourth")
        return planned(index)

    monkeypatch.setattr(Plan, "step", lambda _, index: step(index))
    coming = loader.steps(kept, plan, 1, 9, torch.device("cpu"))
    assert next(coming).index == 1
    while len(asked) < 2:  # until it is there
        time.sleep(0.001)
    time.sleep(0.05)
    assert asked == [1, 2] and len(makers) == 1 and threading.main_thread() not in makers
    assert [next(coming).index for _ in range(2)] == [2, 3]
    with pytest.raises(ValueError, match="the fourth"):
        next(coming)
    assert threading.active_count() == before
    abandoned = loader.steps(kept, plan, 1, 3, torch.device("cpu"))
    next(abandoned)
    abandoned.close()
    assert threading.active_count() == before


def a_row(length: int, row: int, generator: np.random.Generator) -> Example:
    tokens = generator.integers(0, 9, length + 1).astype(np.int32)
    return Example(tokens[:-1], tokens[1:], np.ones(length, dtype=np.float32), Origin(SOURCES[0], row))


@pytest.mark.parametrize("name", sorted(store.ARRAYS))
def test_a_cut_file_is_noticed(tmp_path: Path, name: str) -> None:
    """A file that a full disk or a lost cache cut short must not become shorter examples."""
    write(tmp_path, [[a_row(5, 1, np.random.default_rng(0)), a_row(6, 2, np.random.default_rng(1))]])
    path = tmp_path / f"{name}.bin"
    path.write_bytes(path.read_bytes()[: -store.ARRAYS[name]().itemsize])
    with pytest.raises((SchoolhouseError, AssertionError)):
        store.open_store(tmp_path)


def test_the_store_is_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    """Every process reads the same pages; none can change what the others train."""
    kept = write(tmp_path, [[a_row(5, 1, np.random.default_rng(0))]])
    assert isinstance(kept.arrays["input_ids"].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        kept[0].input_ids[0] = 7


# Preparing: rows in are examples out, made once for the same content.


@pytest.fixture(scope="module")
def serving(cache: Path) -> served.Serving:
    return served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3"))


def recipe_of(path: Path, cache: Path, **data: object) -> Recipe:
    settings = {"train": str(path), "cache": str(cache), "workers": 1, **data}
    return Recipe.model_validate({"model": "starter/qwen3", "data": settings})


def question(number: int) -> dict[str, str]:
    return {"question": f"What is {number} + 1?", "answer": f"{number}+1 = {number + 1}\n#### {number + 1}"}


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(recipe: Recipe, serving: served.Serving) -> Store:
    return prepare.prepare(recipe.data, choose.choices(recipe)["train"], serving, served.rules(recipe))


def test_worker_processes_change_nothing(
    tmp_path: Path, serving: served.Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same store to the byte with one process and with two, chunk after chunk in the order of the rows."""
    monkeypatch.setattr(prepare, "SMALL", 8)
    monkeypatch.setattr(prepare, "CHUNK", 4)
    path = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(60)])
    stores = [prepared(recipe_of(path, tmp_path / f"cache{workers}", workers=workers), serving) for workers in (1, 2)]
    for name in store.ARRAYS:
        one, two = ((kept.directory / f"{name}.bin").read_bytes() for kept in stores)
        assert one == two, name
    assert [kept[7].origin for kept in stores] == [Origin(str(path), 8)] * 2
    assert stores[0].ledger == stores[1].ledger and stores[0].ledger.rows == 60


def test_every_row_is_accounted_for(tmp_path: Path, serving: served.Serving) -> None:
    """Kept, or dropped with its reason and its line in a file; nothing in between."""
    rows = [question(number) for number in range(6)]
    rows[2]["answer"] = "long " * 300
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, too_long="drop", max_tokens=200)
    kept = prepared(recipe, serving)
    assert (kept.ledger.rows, kept.ledger.kept, len(kept)) == (6, 5, 5)
    assert kept.ledger.dropped == {"longer than data.max_tokens": 1}
    dropped = [json.loads(line) for line in (kept.directory / "dropped.jsonl").read_text().splitlines()]
    assert [(one["row"], one["reason"]) for one in dropped] == [(3, "longer than data.max_tokens")]
    assert [kept[index].origin.row for index in range(5)] == [1, 2, 4, 5, 6]
    assert kept.ledger.tokens == int(kept.lengths.sum())
    assert kept.ledger.supervised_tokens == int(kept.supervised_tokens.sum())


def test_a_store_is_made_once_for_the_same_content(
    tmp_path: Path, serving: served.Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(5)])
    first = prepared(recipe_of(path, tmp_path), serving)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_build", lambda *_: pytest.fail("prepared a second time"))
        assert prepared(recipe_of(path, tmp_path), serving).directory == first.directory
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda library: f"{library} of another day")
        again = prepared(recipe_of(path, tmp_path), serving)
    assert again.directory != first.directory, "libraries that make tokens changed, and might make others"
    assert again.fingerprint == first.fingerprint, "they made the same: a run goes on with them"
    write_rows(path, [question(number) for number in range(1, 6)])
    assert prepared(recipe_of(path, tmp_path), serving).fingerprint != first.fingerprint


@pytest.mark.parametrize("changed", [
    {"data": {"supervise": "last"}}, {"data": {"max_tokens": 77}}, {"data": {"too_long": "drop"}},
    {"data": {"messages": [{"role": "user", "content": "{question}!"}, {"role": "assistant", "content": "{answer}"}]}},
    {"model": {"path": "starter/qwen3", "chat_template": "chatml"}},
    {"model": {"path": "starter/qwen3", "template_arguments": {"enable_thinking": True}}},
    {"model": {"path": "starter/qwen3", "stop_tokens": ["<|endoftext|>"]}},
])
def test_whatever_decides_the_tokens_decides_the_fingerprint(tmp_path: Path, changed: dict[str, dict]) -> None:
    """A setting that makes other tokens can never find the old ones in the cache."""
    path = write_rows(tmp_path / "rows.jsonl", [question(number) for number in range(3)])
    prints = {fingerprint(path, {}), fingerprint(path, changed), fingerprint(path, {"data": {"workers": 2}})}
    assert len(prints) == 2, "the setting must count, and the number of workers must not"


def fingerprint(path: Path, changed: dict[str, dict]) -> str:
    settings = {"model": "starter/qwen3", **changed, "data": {"train": str(path), **changed.get("data", {})}}
    recipe = Recipe.model_validate(settings)
    serving = served.serving(recipe.model, places.model_directory("starter/qwen3"))
    return prepare._fingerprint(recipe.data, choose.choices(recipe)["train"], serving, served.rules(recipe))


def test_bad_rows_are_named_and_nothing_is_kept(tmp_path: Path, serving: served.Serving) -> None:
    """The first in full, the next by place, all counted; no store is left that a second start would find."""
    rows: list[dict[str, object]] = [question(number) for number in range(9)]
    for line in (1, 4, 8):
        rows[line] = {"question": "no answer"}
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            prepared(recipe, serving)
        assert "rows.jsonl:2" in caught.value.where and "3 of 9 rows" in str(caught.value)
        assert "rows.jsonl:5" in str(caught.value) and "rows.jsonl:9" in str(caught.value)
    assert [path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir()] == []


def test_what_a_killed_preparation_left_is_not_used(tmp_path: Path, serving: served.Serving) -> None:
    """A directory becomes a store by its renaming: a half-written one has another name, and is cleared away."""
    recipe = recipe_of(write_rows(tmp_path / "rows.jsonl", [question(1)]), tmp_path)
    place = prepared(recipe, serving).directory
    left = place.with_name(f".tmp-{place.name}-killed")
    place.rename(left)
    (left / "input_ids.bin").write_bytes(b"half")
    assert prepared(recipe, serving)[0].input_ids.size > 4
    assert not left.exists()


def test_an_edited_template_makes_new_data_in_the_same_process(tmp_path: Path, serving: served.Serving) -> None:
    """A notebook prepares, edits the file, prepares again: new store, and the new template's tokens in it."""
    path, template = write_rows(tmp_path / "rows.jsonl", [question(1)]), tmp_path / "mine.jinja"
    model, texts = {"path": "starter/qwen3", "chat_template": str(template)}, []
    for word in ("one", "other"):
        template.write_text("{% for m in messages %}" + word + "{{ m.content }}<|im_end|>{% endfor %}")
        recipe = Recipe.model_validate({"model": model, "data": {"train": str(path), "cache": str(tmp_path)}})
        mine = served.serving(recipe.model, serving.directory)
        store = prepared(recipe, mine)
        texts.append(served.load(mine).tokenizer.decode(store[0].input_ids))
    assert texts[0].startswith("oneWhat") and texts[1].startswith("otherWhat")


@pytest.mark.parametrize("changed", ["tokenizer.json", "generation_config.json", "config.json", "function"])
def test_an_edited_file_makes_new_data(
    tmp_path: Path, serving: served.Serving, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """The tokenizer, the stop tokens, the number of embeddings, the user's own function."""
    monkeypatch.syspath_prepend(str(tmp_path))
    student = Path(shutil.copytree(serving.directory, tmp_path / "student"))
    (tmp_path / "mine_of_rows.py").write_text("def read(row):\n    return row\n")
    path = write_rows(tmp_path / "rows.jsonl", [question(1)])
    recipe = recipe_of(path, tmp_path, function="mine_of_rows:read")
    mine = served.serving(recipe.model, student)

    def found() -> str:
        return prepare._fingerprint(recipe.data, choose.choices(recipe)["train"], mine, served.rules(recipe))

    first = found()
    assert found() == first
    if changed == "function":
        (tmp_path / "mine_of_rows.py").write_text("def read(row):\n    return dict(row)\n")
    else:
        content = json.loads((student / changed).read_text(encoding="utf-8"))
        (student / changed).write_text(json.dumps({**content, "vocab_size": 7, "more": 1}), encoding="utf-8")
    assert found() != first
    monkeypatch.setattr(prepare, "VERSION", 99)
    assert found() != first

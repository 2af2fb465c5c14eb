"""Which rows are taught: mixtures, limits and held-out rows depend on the seed and on nothing else."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from schoolhouse import places
from schoolhouse.config import Recipe, Source
from schoolhouse.data import choose, prepare, served
from schoolhouse.data.choose import Choice
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError
from schoolhouse.types import Conversation, ImageSource, Message, Origin, Part


def of(*proportions: float | None, **more: Any) -> Choice:
    sources = tuple(Source(path=f"{number}", proportion=one) for number, one in enumerate(proportions))
    return Choice(sources, **more)


# How many rows of each source.


@pytest.mark.parametrize(("proportions", "counts", "limit", "expected"), [
    ((0.5, 0.5), (10, 1000), None, [10, 10]), ((None, None), (10, 30), None, [10, 30]),
    ((3, 1), (90, 90), None, [90, 30]),
    ((1, 9), (100, 90), None, [10, 90]), ((None, None), (10, 30), 8, [2, 6]), ((3, 1), (90, 90), 40, [30, 10]),
    ((3, 1), (90, 90), 1000, [90, 30]), ((None,), (7,), 3, [3]), ((1e-3, 1), (5, 2000), None, [2, 2000]),
])
def test_rows_of_a_mixture(proportions, counts, limit, expected) -> None:
    assert choose.quotas(of(*proportions, limit=limit), counts) == expected


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 10**7)), min_size=1, max_size=6), st.integers(1, 10**8))
def test_mixtures_are_as_large_as_they_can_be(sources: list[tuple[float, int]], limit: int) -> None:
    """No row twice, proportions kept to a row, and one source (or the limit) used up."""
    shares, counts = [share for share, _ in sources], [count for _, count in sources]
    found = choose.quotas(of(*shares, limit=limit), counts)
    assert all(0 <= quota <= count for quota, count in zip(found, counts, strict=True)) and sum(found) <= limit
    exact = [sum(found) * share / sum(shares) for share in shares]
    assert all(abs(quota - wanted) < 2 for quota, wanted in zip(found, exact, strict=True))
    used_up = any(quota + 1 >= count for quota, count in zip(found, counts, strict=True))
    assert used_up or sum(found) == limit


def test_draws_are_the_seeds() -> None:
    """The same rows every time, other rows with another seed and in another source, in every part of the file alike."""
    def rows(seed: int) -> list[list[int]]:
        return [np.flatnonzero(one).tolist() for one in choose.drawn(of(1, 1, limit=2000, seed=seed), [4000, 4000])]

    first, second = rows(7)
    assert rows(7) == [first, second] and len(first) == len(second) == 1000
    assert first != second and rows(8)[0] != first
    assert all(180 < sum(start <= row < start + 800 for row in first) < 220 + 40 for start in range(0, 4000, 800))


def test_a_source_that_gets_no_row_is_an_error() -> None:
    with pytest.raises(DataError, match="none of its 5 rows is drawn"):
        list(choose.drawn(of(1, 1e-9), [5, 5]))


# Through the whole preparation.


@pytest.fixture(scope="module")
def serving(cache: Path) -> served.Serving:
    from schoolhouse.config import Model

    return served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3"))


def rows_file(path: Path, count: int, start: int = 0, **more: object) -> str:
    rows = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}", **more}
            for number in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(cache: Path, train: object, seed: int = 0, **data: object) -> Recipe:
    settings = {"train": train, "cache": str(cache), "workers": 1, **data}
    return Recipe.model_validate({"model": "starter/qwen3", "data": settings, "seed": seed})


def stores(one: Recipe, serving: served.Serving) -> dict[str, Store]:
    rules = served.rules(one)
    return {name: prepare.prepare(one.data, choice, serving, rules) for name, choice in choose.choices(one).items()}


def rows(store: Store) -> list[tuple[str, int]]:
    return [(Path(store[index].origin.source).name, store[index].origin.row) for index in range(len(store))]


def texts(store: Store) -> set[tuple[int, ...]]:
    return {tuple(store[index].input_ids.tolist()) for index in range(len(store))}


def test_a_mixture_is_counted_by_source(tmp_path: Path, serving: served.Serving) -> None:
    """Three of one to one of the other; the rows left behind are counted, in no other ledger line."""
    sources = [{"path": rows_file(tmp_path / "a.jsonl", 90), "proportion": 3.0},
               {"path": rows_file(tmp_path / "b.jsonl", 80, start=500), "proportion": 1.0}]
    one = recipe(tmp_path, sources, seed=3)
    store = stores(one, serving)["train"]
    ledger = store.ledger
    assert [Path(name).name for name in ledger.by_source] == ["a.jsonl", "b.jsonl"]
    assert list(ledger.by_source.values()) == [90, 30] and list(ledger.not_drawn.values()) == [50]
    assert ledger.rows == ledger.kept == len(store) == 120
    assert Counter(name for name, _ in rows(store)) == {"a.jsonl": 90, "b.jsonl": 30}
    assert rows(stores(one, serving)["train"]) == rows(store)
    assert rows(stores(recipe(tmp_path, sources, seed=4), serving)["train"]) != rows(store)


def test_a_limit_draws_from_all_sources(tmp_path: Path, serving: served.Serving) -> None:
    sources = [rows_file(tmp_path / "a.jsonl", 30), rows_file(tmp_path / "b.jsonl", 10, start=500)]
    ledger = stores(recipe(tmp_path, sources, limit=8), serving)["train"].ledger
    assert list(ledger.by_source.values()) == [6, 2] and ledger.rows == ledger.kept == 8


def test_every_row_is_on_one_side(tmp_path: Path, serving: served.Serving) -> None:
    """Held out and taught rows are all rows, none twice; how many processes prepare them changes nothing."""
    path = rows_file(tmp_path / "a.jsonl", 400)
    one = stores(recipe(tmp_path / "one", path, validation=0.25), serving)
    train, held = rows(one["train"]), rows(one["validation"])
    assert sorted([*train, *held]) == [("a.jsonl", row) for row in range(1, 401)]
    assert 70 < len(held) < 130, "a quarter of 400, five standard deviations (8.7) at most"
    assert one["train"].ledger.dropped == {"held out for validation": len(held)}
    assert one["train"].ledger.rows == 400 and one["validation"].ledger.rows == len(held)
    other = stores(recipe(tmp_path, path, seed=1, validation=0.25), serving)
    assert rows(other["validation"]) != held


def test_equal_rows_are_on_the_same_side(tmp_path: Path, serving: served.Serving) -> None:
    """A conversation that stands again, in another file, with other columns or another id, is never on both sides."""
    sources = [rows_file(tmp_path / "a.jsonl", 150), rows_file(tmp_path / "b.jsonl", 150, id="x"),
               rows_file(tmp_path / "c.jsonl", 150, start=100)]
    one = stores(recipe(tmp_path, sources, validation=0.3), serving)
    assert not texts(one["train"]) & texts(one["validation"])
    assert len(texts(one["train"]) | texts(one["validation"])) == 250


def test_a_smaller_share_holds_out_a_part_of_the_same_rows(tmp_path: Path, serving: served.Serving) -> None:
    path = rows_file(tmp_path / "a.jsonl", 200)
    large, small = (stores(recipe(tmp_path, path, validation=share), serving)["validation"] for share in (0.3, 0.1))
    assert set(rows(small)) < set(rows(large))


def test_limit_and_mixture_come_before_the_split(tmp_path: Path, serving: served.Serving) -> None:
    one = stores(recipe(tmp_path, rows_file(tmp_path / "a.jsonl", 300), limit=100, validation=0.2), serving)
    assert one["train"].ledger.rows == 100 and sum(one["train"].ledger.not_drawn.values()) == 200
    assert len(one["train"]) + len(one["validation"]) == 100


def test_bad_rows_are_counted_once(tmp_path: Path, serving: served.Serving) -> None:
    path = Path(rows_file(tmp_path / "a.jsonl", 100))
    path.write_text(path.read_text() + "broken\n" + '{"question": "no answer"}\n')
    one = stores(recipe(tmp_path, str(path), validation=0.3, on_error="skip:5%"), serving)
    assert one["train"].ledger.dropped["bad: unreadable"] == 2
    assert one["validation"].ledger.dropped == {}
    assert one["train"].ledger.kept + one["validation"].ledger.kept == 100


@pytest.mark.parametrize("changed", [
    {"limit": 5}, {"validation": 0.5}, {"on_error": "skip:1%"}, {"train": [{"path": "PATH", "proportion": 2.0}]},
])
def test_what_chooses_rows_is_part_of_the_fingerprint(tmp_path: Path, serving: served.Serving, changed: dict) -> None:
    """And the seed is, where it draws; where it does not, another seed finds the same store."""
    path = rows_file(tmp_path / "a.jsonl", 20)
    changed = json.loads(json.dumps(changed).replace("PATH", path))

    def fingerprint(seed: int, **data: object) -> str:
        one = recipe(tmp_path, data.pop("train", path), seed, **data)
        return prepare._fingerprint(one.data, choose.choices(one)["train"], serving, served.rules(one))

    plain = fingerprint(0)
    assert fingerprint(1) == plain != fingerprint(0, **changed)
    assert (fingerprint(1, **changed) != fingerprint(0, **changed)) == ("on_error" not in changed)


def test_images_are_held_out_by_what_they_show() -> None:
    """A function's image is another object each time that rows are read, and the same row: on one side, not on both."""
    def row(shade: int, wrap: Callable[[Any], Any]) -> Conversation:
        image = Image.new("RGB", (2, 3), (shade, 0, 0))
        parts = (Part("image", ImageSource(wrap(image), None, 10**6)), Part("text", "What is it?"))
        return Conversation((Message("user", parts),), Origin("rows", 1))

    def encoded(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    ways = (lambda image: image, lambda image: {"bytes": memoryview(encoded(image)), "path": None})
    for wrap in ways:
        draws = [[choose.is_held_out(row(shade, wrap), 0.5, 1) for shade in range(200)] for _ in range(3)]
        assert draws[0] == draws[1] == draws[2] and 60 < sum(draws[0]) < 140

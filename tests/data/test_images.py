"""Images in rows: every way to give one, where it stands, what does not add up, and what preparation keeps of it."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from schoolhouse import cli, places
from schoolhouse.config import Data, Model, Rows
from schoolhouse.data import ahead, choose, formats, prepare, served, store
from schoolhouse.data.served import Rules, Served
from schoolhouse.errors import DataError
from schoolhouse.types import Origin

PNG = io.BytesIO()
Image.new("RGB", (48, 48), (200, 30, 30)).save(PNG, "PNG")
RED = PNG.getvalue()
URI = "data:image/png;base64," + base64.b64encode(RED).decode()
SIGN = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"


@pytest.fixture(scope="module")
def model() -> Served:
    settings = Model(path="starter/qwen3-vl")
    return served.load(served.serving(settings, places.model_directory(settings.path)))


def prompt(model: Served, row: dict[str, Any], **rows: Any) -> str:
    """The first prompt of a row, as it is served."""
    encoded = model.encode(row, Rows(**rows), Origin("rows.jsonl", 3), Rules("every", 500, "error"))
    (example, *_) = encoded.examples
    tokens = int((example.input_ids == model.sight.token).sum())
    assert tokens == sum(picture.tokens for picture in example.vision) and tokens % 9 == 0
    return encoded.turns[0].prompt


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "red"}]}


@pytest.mark.parametrize("row", [
    {"question": "hue?", "answer": "red", "image": RED}, {"question": "hue?", "answer": "red", "images": [RED]},
    {"question": "hue?", "answer": "red", "image": {"bytes": RED, "path": None}},
    {"question": "<image>hue?", "answer": "red", "image": RED},
    asked({"type": "image_url", "image_url": {"url": URI}}, {"type": "text", "text": "hue?"}),
    asked({"type": "image_url", "image_url": URI}, "hue?"), asked({"type": "image", "image": URI}, "hue?"),
    asked({"type": "image", "base64": base64.b64encode(RED).decode()}, "hue?"),
    {**asked({"type": "image"}, "hue?"), "images": [RED]}, {**asked({"type": "text", "text": "hue?"}), "image": RED},
    {"conversations": [{"from": "human", "value": "<image>hue?"}, {"from": "gpt", "value": "red"}], "image": RED},
    asked({"type": "video", "video": [URI]}, "hue?"),
])
def test_every_spelling_is_the_same_prompt(model: Served, row: dict[str, Any]) -> None:
    assert prompt(model, row) == f"<|im_start|>user\n{SIGN}hue?<|im_end|>\n<|im_start|>assistant\n"


def test_a_path_and_mapped_columns(model: Served, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    row = {"picture": "a.png", "title": "red"}
    found = prompt(
        model, row, columns={"image": "picture"}, image_root=str(tmp_path),
        messages=[{"role": "user", "content": "See <image>."}, {"role": "assistant", "content": "{title}"}],
    )
    assert f"See {SIGN}." in found


def test_many_images_in_many_turns(model: Served) -> None:
    """Each turn's example holds the images shown up to it; text-only rows hold none."""
    row = {"images": [RED] * 3, "messages": [
        {"role": "user", "content": "<image> and <image>"}, {"role": "assistant", "content": "same"},
        {"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "same"},
    ]}
    encoded = model.encode(row, Rows(), Origin("rows.jsonl", 1), Rules("every", 500, "error"))
    assert [len(turn.images) for turn in encoded.turns] == [2, 3] and len(encoded.examples[0].vision) == 3
    cut = model.encode(row, Rows(), Origin("rows.jsonl", 1), Rules("every", 40, "turns"))
    (example,) = cut.examples
    assert cut.cut_turns == 1 and len(example.vision) == 2, "the image is cut with its turn"
    assert int((example.input_ids == model.sight.token).sum()) == 18
    plain = {"question": "2+2?", "answer": "4"}
    text = model.encode(plain, Rows(), Origin("rows.jsonl", 1), Rules("every", 500, "error"))
    assert text.examples[0].vision == ()


@pytest.mark.parametrize(("row", "found"), [
    ({"question": "<image> <image>", "answer": "red", "image": RED}, "2 places for 1 images"),
    ({**asked({"type": "image"}, {"type": "image"}), "images": [RED]}, "2 places for 1 images"),
    (asked({"type": "image"}, "hue?"), "1 places for 0 images"),
    ({"question": "what is <|image_pad|>?", "answer": "red"}, "1 places for 0 images"),
    ({"question": "what is it?", "answer": "<|image_pad|>"}, "the answer holds the token of an image"),
    ({"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [
        {"type": "image", "image": URI}]}]}, "an image in an assistant message"),
    (asked({"type": "video", "video": "clip.mp4"}, "hue?"), "no list of frames"),
    ({"question": "hue?", "answer": "red", "image": RED[:60]}, "truncated"),
])
def test_what_does_not_add_up_names_the_row(model: Served, row: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        prompt(model, row)
    assert "rows.jsonl:3" in caught.value.where


def test_a_model_that_sees_nothing_refuses_images() -> None:
    blind = served.load(served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3")))
    with pytest.raises(DataError, match="the model sees none"):
        prompt(blind, {"question": "hue?", "answer": "red", "image": RED})


def test_a_family_that_is_not_known_is_refused_by_name() -> None:
    blind = served.load(served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3")))
    other = replace(blind, family="paligemma")
    with pytest.raises(DataError, match="paligemma") as caught:
        prompt(other, {"question": "hue?", "answer": "red", "image": RED})
    assert "qwen3_vl" in caught.value.required and "gemma3" in caught.value.required


def test_a_row_without_images_is_read_as_before() -> None:
    """`<image>` in a text is text where the row has no column of images."""
    row = {"question": "What does <image> mean in XML?", "answer": "a tag"}
    (question, _) = formats.to_conversation(row, Rows(), Origin("x", 1)).messages
    assert question.text == row["question"] and [part.kind for part in question.parts] == ["text"]


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_a_place_without_an_image_is_no_text_for_a_model_that_sees(mark: str, model: Served) -> None:
    """It would be taught to answer blindly; in an answer, and for a model that sees nothing, it is text."""
    for more in ({}, {"images": []}, {"images": None}):
        with pytest.raises(DataError, match="no image for it"):
            prompt(model, {"question": f"{mark}hue?", "answer": "red", **more})
    assert "hue?" in prompt(model, {"question": "hue?", "answer": f"the tag {mark}"})
    code = f"{mark}hue?{mark.replace('<', '</')}"
    assert code in prompt(model, {"question": code, "answer": "red"}), "HTML, not a place"
    blind = served.load(served.serving(Model(path="starter/qwen3"), places.model_directory("starter/qwen3")))
    said = formats.to_conversation({"question": f"{mark}hue?", "answer": "red"}, Rows(), Origin("x", 1))
    assert mark in blind.seen_prompt(said, 1)[0]


def prepared(model: Served, rows: list[dict[str, Any]], place: Path, **data: Any) -> store.Store:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Data(train=str(path), cache=str(place / "cache"), **data)
    serving = served.serving(Model(path="starter/qwen3-vl"), places.model_directory("starter/qwen3-vl"))
    return prepare.prepare(settings, choose.Choice(settings.train, 0), serving, Rules("every", 500, "error"))


def test_the_store_keeps_references_once(model: Served, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    rows = [{"question": f"hue {number}?", "answer": "red", "image": "a.png" if number % 2 else URI}
            for number in range(20)]
    kept = prepared(model, rows, tmp_path)
    assert len(kept.arrays["picture_ends"]) == 2 and len(kept.arrays["shown"]) == 20
    assert kept.patches.tolist() == [36] * 20
    assert len(kept.arrays["picture_bytes"]) == len(RED) + len(str(tmp_path / "a.png"))
    first, second = (ahead.of_pack(kept, [number], model.sight) for number in (0, 1))
    assert first.equal(second) and first.shape == (36, 384)


def test_patches_of_an_example_are_summed_and_its_largest_image_is_found(model: Served, tmp_path: Path) -> None:
    """Of rows with none, one and several images, in any order, from the grids of each."""
    random = np.random.default_rng(0)
    for number in range(4):
        Image.new("RGB", (60 + 90 * number, 200 - 30 * number)).save(tmp_path / f"{number}.png")
    shown = [[f"{one}.png" for one in random.integers(0, 4, random.integers(0, 4))] for _ in range(40)]
    rows = [{"question": f"what? {'<image>' * len(names)}", "answer": "red", "images": names} for names in shown]
    kept = prepared(model, rows, tmp_path)
    grids = [[math.prod(grid) for grid in kept.grids(one)] for one in range(len(kept))]
    assert len({len(one) for one in grids}) == 4 and len({size for one in grids for size in one}) == 4
    assert kept.patches.tolist() == [sum(one) for one in grids]
    assert kept.largest_image.tolist() == [max(one, default=0) for one in grids]


def test_an_image_that_changed_or_went_stops_training_with_its_row(model: Served, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    kept = prepared(model, [{"question": "hue?", "answer": "red", "image": "a.png"}], tmp_path)
    (tmp_path / "a.png").write_bytes(RED + b"\0")
    with pytest.raises(DataError, match="is not the one that was prepared") as caught:
        ahead.of_pack(kept, [0], model.sight)
    assert caught.value.where.endswith("rows.jsonl:1")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="is gone"):
        ahead.of_pack(kept, [0], model.sight)


@pytest.mark.parametrize("size", [(48, 48), (17, 300), (300, 17), (5, 5), (90, 64), (1000, 700)])
def test_tokens_follow_from_the_size_alone(model: Served, size: tuple[int, int]) -> None:
    """The processor's own output has as many patches as were promised from height and width."""
    made = model.sight.processor(images=[Image.fromarray(np.zeros((*size, 3), dtype=np.uint8))], return_tensors="np")
    assert tuple(made["image_grid_thw"][0].tolist()) == model.sight.eyes.grid(size)


def test_a_limit_of_tokens_shrinks_images() -> None:
    settings = Model(path="starter/qwen3-vl", image_tokens=16)
    seeing = served.load(served.serving(settings, places.model_directory(settings.path))).sight
    for size in ((48, 48), (480, 300), (1000, 700)):
        _, rows, columns = seeing.eyes.grid(size)
        assert rows * columns // 4 <= 16


def test_a_thousand_rows_of_which_one_in_a_hundred_is_bad(tmp_path: Path) -> None:
    """F15 and F19 together: the run finishes, and the ledger names each bad row and no other."""
    generator = np.random.default_rng(0)
    rows, bad = [], []
    for number in range(1000):
        width, height = (int(side) for side in generator.integers(8, 70, 2))
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (number % 256, 9, 9)).save(buffer, "PNG")
        (tmp_path / f"{number}.png").write_bytes(buffer.getvalue())
        rows.append({"question": f"What is {number}?", "answer": str(number), "image": f"{number}.png"})
        if number % 10 == 3:
            del rows[-1]["image"]
        elif number % 100 == 57:
            bad.append(number + 1)
            kind = number // 100 % 3
            (tmp_path / f"{number}.png").write_bytes([b"", buffer.getvalue()[:-9], b"<svg/>"][kind])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "model": "starter/qwen3-vl", "data": {"train": str(tmp_path / "rows.jsonl"), "on_error": "skip:2%"},
        "train": {"steps": 2}, "batch": {"examples": 16, "tokens": 2048}, "directory": str(tmp_path / "run"),
    }), encoding="utf-8")
    cli.main(["run", str(recipe)])
    ledger = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))["train"]
    assert (ledger["rows"], ledger["kept"]) == (1000, 990) and ledger["dropped"] == {"bad: unreadable": 10}
    lines = (tmp_path / "run" / "bad.jsonl").read_text(encoding="utf-8").splitlines()
    named = [json.loads(line)["row"] for line in lines]
    assert named == bad

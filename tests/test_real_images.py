"""Real pictures with the real Qwen3-VL tokenizer and template: NLVR sentences, emoji names; pixels reach the answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from schoolhouse import cli


def miniature(shared: Path, place: Path) -> Path:
    """A small Qwen3-VL with the real tokenizer, template and image processor settings, random weights."""
    from transformers import AutoTokenizer, GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen3-vl")
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                                "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16,
            "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            "initializer_range": 0.06,
        },
        tie_word_embeddings=True, **{name: tokenizer.convert_tokens_to_ids(text) for name, text in names.items()},
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, size={"shortest_edge": 4096, "longest_edge": 16777216},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(place)
    return place


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained(recipe: dict[str, Any], place: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of a finished run, and its measurements."""
    place.mkdir()
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    cli.main(["run", str(path), f"directory={place / 'run'}"])
    lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return place / "run", [json.loads(line) for line in lines]


def nlvr(shared: Path) -> list[dict[str, str]]:
    lines = (shared / "images" / "nlvr" / "nlvr_dev_400.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"image": one["image"], "question": f"True or false? {one['sentence']}", "answer": one["label"]}
            for one in rows]


def emoji(shared: Path) -> list[dict[str, str]]:
    lines = (shared / "images" / "emoji" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"image": one["image"], "question": "What is this?", "answer": one["caption"]} for one in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nlvr", "emoji"])
def test_every_row_of_real_pictures_is_trained_on(name: str, shared: Path, tmp_path: Path) -> None:
    """All rows accounted for, 50 steps, the validation loss falls, and the report shows the pictures."""
    rows = {"nlvr": nlvr, "emoji": emoji}[name](shared)
    directory, measured = trained({
        "model": str(miniature(shared, tmp_path / "model")),
        "data": {"train": write(tmp_path / "train.jsonl", rows), "image_root": str(shared / "images" / name),
                 "validation": write(tmp_path / "held.jsonl", rows[::8])},
        "train": {"steps": 50}, "batch": {"examples": 16, "tokens": 2048}, "optim": {"learning_rate": 3e-3},
        "validation": {"every": 25},
    }, tmp_path / "one")
    ledger = json.loads((directory / "data.json").read_text(encoding="utf-8"))["train"]
    assert ledger["rows"] == ledger["kept"] == ledger["examples"] == len(rows)
    losses = [one["loss"] for one in measured if one["kind"] == "eval"]
    print(f"{name}: validation loss {losses}")
    assert len(losses) == 3 and losses[2] < losses[1] < 0.85 * losses[0]
    assert "data:image/png;base64," in (directory / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_emoji_names_are_read_from_the_pixels(shared: Path, tmp_path: Path) -> None:
    """200 pictures are named by heart, at least 95 % exactly; with shuffled pictures the names go with the pictures."""
    rows = random.Random(0).sample(emoji(shared), 200)
    others = [one["image"] for one in rows[1:] + rows[:1]]
    shuffled = [{**one, "image": image} for one, image in zip(rows, others, strict=True)]
    root = str(shared / "images" / "emoji")
    recipe = {
        "model": str(miniature(shared, tmp_path / "model")),
        "data": {"train": write(tmp_path / "train.jsonl", rows), "image_root": root},
        "exam": {"data": write(tmp_path / "exam.jsonl", rows), "grader": "exact", "max_new_tokens": 24,
                 "examples": 100},
        "train": {"steps": 400}, "batch": {"examples": 40, "tokens": 4096}, "optim": {"learning_rate": 2e-3},
    }
    directory, measured = trained(recipe, tmp_path / "one")
    scores = [one["score"] for one in measured if one["kind"] == "eval"]
    print("emoji, before and after:", scores)
    assert scores[0] <= 0.01 and scores[-1] >= 0.95
    changed = {**recipe, "exam": {**recipe["exam"], "data": write(tmp_path / "shuffled.jsonl", shuffled)}}
    (tmp_path / "shuffled.yaml").write_text(json.dumps(changed), encoding="utf-8")
    from schoolhouse import evaluate, graders
    from schoolhouse import recipe as recipes
    from schoolhouse import trained as opening

    read = recipes.read(tmp_path / "shuffled.yaml", [])
    student, served = opening.open_student(str(directory))
    score, _ = evaluate.exam(
        student, served, evaluate.questions(read, served), graders.grader("exact"), read.exam, seed=0
    )
    print("emoji, shuffled pictures:", score["score"])
    assert score["score"] <= 0.05

"""A run of a Gemma 3 that sees, from the command line: squares of one size, whose tokens see one another.

What is exported is opened by plain transformers alone, with Gemma's own processor.
"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_run import program
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from schoolhouse import cli, places
from schoolhouse.config import Model
from schoolhouse.data import served
from schoolhouse.errors import ConfigError
from schoolhouse.starter import lessons

TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
STEPS, QUESTIONS = 40, 5
SIGN = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature in the hub's layout: images of 48 x 48 pixels become 16 tokens."""
    place = tmp_path_factory.mktemp("gemma3")
    plain = AutoTokenizer.from_pretrained(places.model_directory("starter/qwen3"))
    plain.add_tokens(list(TOKENS.values()), special_tokens=True)
    template = plain.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", TOKENS["boi_token"])
    assert TOKENS["boi_token"] in template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token, pad_token=plain.pad_token,
        chat_template=template, extra_special_tokens=TOKENS,
    )
    tokenizer.save_pretrained(place)
    ids = dict(zip(TOKENS, tokenizer.convert_tokens_to_ids(list(TOKENS.values())), strict=True))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    configuration = AutoConfig.for_model(
        "gemma3", mm_tokens_per_image=16, image_token_id=ids["image_token"], boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"], tie_word_embeddings=True, **ends,
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
            "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], **ends,
        },
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "patch_size": 6, "image_size": 48, "vision_use_head": False},
    )
    AutoModelForImageTextToText.from_config(configuration, dtype=torch.float32).save_pretrained(place)
    Gemma3ImageProcessorPil(size={"height": 48, "width": 48}, do_pan_and_scan=False).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def page(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen drawings, every third row without one; and an exam."""
    place = tmp_path_factory.mktemp("gemma3-run")
    lines = []
    for number, row in enumerate(itertools.islice(lessons.rows("sights", "train"), 24)):
        (place / f"{number}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({**row, "image": None if number % 3 == 1 else f"{number}.png"}) + "\n")
    (place / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "recipe.yaml").write_text(json.dumps({
        "model": str(model), "data": {"train": str(place / "rows.jsonl")}, "train": {"steps": STEPS},
        "batch": {"examples": 8, "tokens": 400}, "optim": {"name": "muon", "learning_rate": 1e-2},
        "exam": {"data": {"path": "starter/sights:exam", "limit": QUESTIONS}, "max_new_tokens": 8, "grader": "exact"},
    }), encoding="utf-8")
    return place / "recipe.yaml"


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(page: Path) -> Path:
    cli.main(["run", str(page), f"directory={page.parent / 'run'}"])
    return page.parent / "run"


def test_it_learns(run: Path) -> None:
    losses = [one["loss"] for one in records(run, "metrics.jsonl") if one["kind"] == "step"]
    assert len(losses) == STEPS and losses[-1] < 0.7 * losses[0]


def test_two_processes_share_its_images(run: Path, page: Path) -> None:
    """Ulysses and cut weights: the losses of one process, to what float32 sums in another order differ by."""
    wanted = [one["loss"] for one in records(run, "metrics.jsonl") if one["kind"] == "step"][:3]
    for name, layout in (("ulysses", "parallel.ulysses=2"), ("shard", "parallel.ulysses=1")):
        other = page.parent / name
        program("run", page, f"directory={other}", "train.steps=3", "exam.data=null", "exam.every=0", layout,
                "optim.warmup=0.0", "--nproc", "2")
        found = [one["loss"] for one in records(other, "metrics.jsonl") if one["kind"] == "step"]
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)


def test_the_export_sees_in_plain_transformers(run: Path, tmp_path: Path) -> None:
    """Gemma's own processor writes the places of an image; its model writes the exam's answers, letter by letter."""
    out = tmp_path / "export"
    cli.main(["export", str(run), "--out", str(out)])
    tokenizer = AutoTokenizer.from_pretrained(out)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil.from_pretrained(out), tokenizer, tokenizer.chat_template, image_seq_length=16)
    student = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    samples = [one for one in records(run, "samples.jsonl") if one["step"] == STEPS]
    assert len({one["answer"] for one in samples}) > 1, "answers that would not differ"
    for row, sample in zip(lessons.rows("sights", "exam"), samples, strict=False):
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            add_generation_prompt=True, tokenize=False,
        )
        given = processor(images=[[picture]], text=[text], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written = student.generate(**given, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(written[0, given["input_ids"].shape[1]:], skip_special_tokens=True)
        assert answer == sample["answer"]


def test_what_is_shown_is_what_gemmas_processor_writes(model: Path) -> None:
    """The turn's text has the places of each image, between the tokens of its beginning and its end."""
    known = served.load(served.serving(Model(path=str(model)), model))
    row = next(iter(lessons.rows("sights", "exam")))
    from schoolhouse.config import Rows
    from schoolhouse.types import Origin

    encoded = known.encode(row, Rows(), Origin("rows.jsonl", 1), served.Rules("every", 500, "error"))
    assert f"user\n{SIGN}" in encoded.turns[0].prompt
    (example,) = encoded.examples
    assert int((example.input_ids == known.sight.token).sum()) == example.vision[0].tokens == 16


@pytest.mark.parametrize(("change", "tokens", "said"), [
    ({"do_pan_and_scan": True}, None, "cuts wide images into several"), ({}, 9, "every image of this model has 16"),
])
def test_what_cannot_be_is_refused(change: dict, tokens: int | None, said: str, model: Path, tmp_path: Path) -> None:
    for one in model.iterdir():
        (tmp_path / one.name).symlink_to(one)
    settings = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        served.load(served.serving(Model(path=str(tmp_path), image_tokens=tokens), tmp_path))

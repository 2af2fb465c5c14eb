"""What both sides of a comparison are given: a model with random weights, its tokenizer, rows, and our recipe."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-3
SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768, "tie_word_embeddings": True, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 4_096, "intermediate_size": 12_288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3-vl-2b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 2_048, "intermediate_size": 6_144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262_144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1_024, "intermediate_size": 4_096, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 2_048, "num_position_embeddings": 2_304, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "small-vl": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4_096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [8, 4, 4],
                                "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 16,
            "out_hidden_size": 128, "num_position_embeddings": 256, "deepstack_visual_indexes": [0],
        },
    },
}
"""Configurations of Qwen's models of these names; `small` is made of --vocabulary, --hidden and --layers."""
SEE = {name for name, settings in SIZES.items() if "vision_config" in settings}
IMAGE = "<|image_pad|>"
Row = Mapping[str, str]


def write(options: argparse.Namespace, work: Path) -> None:
    """The model and its tokenizer as a Hugging Face directory, the rows for either side, and our recipe."""
    from transformers import AutoTokenizer

    cut = cut_tokenizer(options)
    write_model(options, cut, work / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")  # cuts words by the model's type, like all who load it
    rows = list(itertools.islice(long_rows(options, tokenizer), options.steps * options.examples))
    pictures = processor(options) if options.size in SEE else None
    encoded = [encode(tokenizer, row, pictures, options.rows) for row in rows]
    if pictures is not None:
        pictures.save_pretrained(work / "model")
    write_lines(work / "rows.jsonl", rows)
    write_lines(work / "tokens.jsonl", encoded)
    (work / "recipe.yaml").write_text(recipe(options, work))
    facts = {
        "rows": len(rows), "tokens": sum(len(row["input_ids"]) for row in encoded),
        "supervised_tokens": sum(label != -100 for row in encoded for label in row["labels"]),
    }
    (work / "facts.json").write_text(json.dumps(facts))


def read_rows(path: Path | None) -> Iterator[Row]:
    """Rows of question and answer, and the place of an image where a row has one."""
    from schoolhouse.starter import lessons

    if path is None:
        yield from lessons.rows("arithmetic", "train")
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "image" not in row:
            yield {"question": row["question"], "answer": row["answer"]}
            continue
        asked = f"True or false? {row['sentence']}" if "sentence" in row else "What is this?"
        yield {"image": row["image"], "question": row.get("question", asked),
               "answer": next(row[name] for name in ("answer", "caption", "label") if name in row)}


def long_rows(options: argparse.Namespace, tokenizer: Any) -> Iterator[Row]:
    """The rows, again and again; with --length, so many in one that it has nearly as many tokens."""
    rows = itertools.cycle(list(read_rows(options.rows)))
    if options.length is None:
        yield from rows
        return
    row = next(rows)
    while True:
        first, parts, tokens = row, [row["answer"]], len(encode(tokenizer, row)["input_ids"])
        while True:
            row = next(rows)
            text = f"\n\n{row['question']}\n{row['answer']}"
            tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if tokens > options.length:
                break
            parts.append(text)
        yield {"question": first["question"], "answer": "".join(parts)}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cut_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer; for a small model one with more than `--vocabulary` entries is trained anew on the rows."""
    from transformers import AutoTokenizer

    from schoolhouse import places

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or places.model_directory("starter/qwen3"))
    if options.size != "small" or len(tokenizer) <= options.vocabulary:
        return tokenizer
    texts = (f"{row['question']}\n{row['answer']}" for row in read_rows(options.rows))
    return tokenizer.train_new_from_iterator(texts, options.vocabulary - len(tokenizer.get_added_vocab()))


def processor(options: argparse.Namespace) -> Any:
    """Qwen3-VL's processor of images, which enlarges them to `--pixels` at least."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, size={"shortest_edge": options.pixels, "longest_edge": 16 * options.pixels},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )


def settings(options: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The model's configuration. A small one has heads of 64, half as many for keys and values, tied embeddings."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if options.size == "small":
        heads = max(2, options.hidden // 64)
        return {
            "model_type": "qwen2", "vocab_size": options.vocabulary, "hidden_size": options.hidden,
            "intermediate_size": 4 * options.hidden, "num_hidden_layers": options.layers, "num_attention_heads": heads,
            "num_key_value_heads": heads // 2, "tie_word_embeddings": True,
            "max_position_embeddings": max(32_768, options.length or 0), **ends,
        }
    found = SIZES[options.size]
    if options.size in SEE:
        names = {"image_token_id": IMAGE, "video_token_id": "<|video_pad|>",
                 "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
        return {**found, **{name: tokenizer.convert_tokens_to_ids(text) for name, text in names.items()}}
    return {**found, **ends, "max_position_embeddings": max(found["max_position_embeddings"], options.length or 0)}


def write_model(options: argparse.Namespace, tokenizer: Any, place: Path) -> None:
    """Random weights: a small model's in float32, others in bfloat16, drawn on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(0)
    family = AutoModelForImageTextToText if options.size in SEE else AutoModelForCausalLM
    with torch.device(options.device):
        model = family.from_config(
            AutoConfig.for_model(**settings(options, tokenizer)),
            dtype=torch.float32 if options.size == "small" else torch.bfloat16,
        )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def encode(tokenizer: Any, row: Row, pictures: Any = None, source: Path | None = None) -> dict[str, Any]:
    """What a peer is given: the row as plain transformers encodes it, its answer and stop token supervised.

    TRL's own preparation would also supervise the newline that Qwen's template writes behind the stop token.
    """
    asked: Any = row["question"]
    if pictures is not None:
        asked = [{"type": "image"}, {"type": "text", "text": asked}]
    messages = [{"role": "user", "content": asked}]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    more = {}
    if pictures is not None:
        image = str(source.parent / row["image"])
        grid = pixels(pictures, image)["image_grid_thw"]
        shown = shown.replace(IMAGE, IMAGE * (int(grid.prod()) // pictures.merge_size**2))
        more = {"image": image}
    prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, **more}


def pixels(pictures: Any, image: str) -> Mapping[str, Any]:
    """An image's patches and their grid."""
    from PIL import Image

    with Image.open(image) as file:
        return pictures(images=[file.convert("RGB")], return_tensors="pt")


def recipe(options: argparse.Namespace, work: Path) -> str:
    """Our recipe: one pass over the rows at a constant learning rate, with nothing else to do."""
    page = {
        "model": {"path": str(work / "model"), "precision": options.precision,
                  "activation_checkpointing": options.recompute},
        "data": {"train": str(work / "rows.jsonl"), "format": "question_answer", "cache": str(work / "cache")},
        "batch": {"examples": options.examples, "tokens": options.tokens},
        "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.01,
                  "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "clip": 1.0},
        "device": options.device,
    }
    if options.size in SEE:
        page["data"]["image_root"] = str(options.rows.resolve().parent)
    if options.lora:
        page["lora"] = {"rank": options.lora, "alpha": 2 * options.lora, "targets": "all-linear"}
    return json.dumps(page, indent=1)  # JSON is YAML

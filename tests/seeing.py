"""Miniatures that see, examples with images, and the oracle: transformers' own forward, one example at a time."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from plain_sft import as_written
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from schoolhouse.data import loader, store, vision
from schoolhouse.data.eyes import Grids, Squares
from schoolhouse.data.vision import Sight
from schoolhouse.model import attention, elementwise, sight
from schoolhouse.model.load import Student
from schoolhouse.types import UNSUPERVISED, Example, Ledger, Origin, Picture, PlannedStep, Step

IMAGE = 90
"""The id of the visual token; 91 to 93 are the others'."""
PATCH = 4
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
MIXED = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
TOWER = {"depth": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": PATCH,
         "out_hidden_size": 32}
QWEN3_TOWER = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
QWEN35_TOWER = {**TOWER, "num_position_embeddings": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rope_parameters": {**MIXED, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
SETTINGS = {
    "qwen3_vl": {"text_config": {**TEXT, "rope_parameters": {**MIXED, "mrope_interleaved": True}},
                 "vision_config": QWEN3_TOWER, **TOKENS},
    "qwen3_vl_moe": {"text_config": {**TEXT, **EXPERTS, "rope_parameters": {**MIXED, "mrope_interleaved": True}},
                     "vision_config": QWEN3_TOWER, **TOKENS},
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": MIXED}, **TOKENS,
                   "vision_config": {**TOWER, "window_size": 16, "fullatt_block_indexes": [1]}},
    "qwen2_vl": {"text_config": {**TEXT, "rope_parameters": MIXED}, **TOKENS, "vision_config": {
        "depth": 3, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": PATCH}},
    "qwen3_5": {"text_config": {**TEXT, **DELTA}, "vision_config": QWEN35_TOWER, **TOKENS},
    "qwen3_5_moe": {"text_config": {**TEXT, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
                    "vision_config": QWEN35_TOWER, **TOKENS},
    "gemma3": {"text_config": {**TEXT, "sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": [
                   "sliding_attention", "full_attention", "sliding_attention"]},
               "vision_config": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
                                 "num_attention_heads": 2, "patch_size": PATCH, "image_size": 16,
                                 "vision_use_head": False},
               "mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 92, "eoi_token_index": 93},
}


def student(family: str = "qwen3_vl", tied: bool = True, seed: int = 1, lighter: bool = True) -> Student:
    """A miniature of a family in float64 with weights large enough that every term of the gradient counts."""
    attention.register()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **copy.deepcopy(SETTINGS[family]), tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, experts_implementation="eager").train()
    sight.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if lighter:
        elementwise.lighten(model)
    return Student(model)


def eyes(family: str = "qwen3_vl") -> Sight:
    """How the miniature sees: one token for 8 x 8 pixels, of Gemma's squares of 16 x 16."""
    if family == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        squares = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
        return Sight(family, vision.FAMILIES[family], Squares(squares, PATCH, 4), IMAGE)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )
    return Sight(family, vision.FAMILIES[family], Grids(processor), IMAGE)


def picture(seeing: Sight, height: int, width: int, generator: np.random.Generator) -> Picture:
    """An image of random pixels, held by its row."""
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    grid = seeing.eyes.grid((height, width))
    encoded = buffer.getvalue()
    return Picture("", encoded, hashlib.sha256(encoded).digest(), (height, width), grid, seeing.eyes.tokens(grid))


def example(seeing: Sight, images: int, generator: np.random.Generator) -> Example:
    """Text with some images in it, tokens supervised anywhere but on visual places."""
    pieces, shown = [], []
    for _ in range(images):
        one = picture(seeing, *(int(side) for side in generator.integers(6, 34, 2)), generator)
        pieces += [generator.integers(3, 90, int(generator.integers(1, 6))), np.full(one.tokens, IMAGE)]
        shown.append(one)
    tokens = np.concatenate([*pieces, generator.integers(3, 90, int(generator.integers(4, 12)))]).astype(np.int32)
    chosen = (generator.random(len(tokens) - 1) < 0.6) & (tokens[1:] != IMAGE)
    chosen[-1] = True
    weights = np.where(chosen, generator.uniform(0.1, 2.0, len(chosen)), 0).astype(np.float32)
    labels = np.where(chosen, tokens[1:], UNSUPERVISED).astype(np.int32)
    return Example(tokens[:-1], labels, weights, Origin("test", 1), tuple(shown))


def examples(seeing: Sight, images: Sequence[int], seed: int = 0) -> list[Example]:
    """One example for each number of images."""
    generator = np.random.default_rng(seed)
    return [example(seeing, number, generator) for number in images]


def stored(rows: Sequence[Example], directory: Path) -> store.Store:
    """The examples as a store on the disk, as preparation writes it."""
    writer = store.Writer(directory)
    writer.append(store.to_arrays(rows, ["test"]), [one for row in rows for one in row.vision])
    writer.close("", Ledger(len(rows), {"one": len(rows)}, {}, 0, len(rows), len(rows), len(rows), 0, 0), ["test"])
    return store.open_store(directory)


def planned(kept: store.Store, packs: Sequence[Sequence[int]]) -> PlannedStep:
    """One step of these packs, with N as the plan computes it."""
    return PlannedStep(
        1, 0, tuple(map(tuple, packs)), int(kept.lengths.sum()), int(kept.supervised_tokens.sum()),
        float(kept.supervised.sum()),
    )


def step(
    kept: store.Store, packs: Sequence[Sequence[int]], seeing: Sight, rank: int = 0, ranks: int = 1,
    share: tuple[int, int] = (0, 1),
) -> Step:
    """The micro-batches of a data rank."""
    mine, cpu = packs[rank::ranks], torch.device("cpu")
    seen = loader.pixels(kept, mine, seeing, len(kept), cpu, share)
    return Step(
        planned(kept, packs), [loader.micro_batch(kept, pack, seeing, next(seen), share[1]) for pack in mine]
    )


def plain_gradient(
    model: PreTrainedModel, rows: Sequence[Example], seeing: Sight,
    added: Callable[[int, torch.Tensor], torch.Tensor] = lambda index, embedded: embedded,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step by transformers alone: its processor, its positions, its masks, its attention.

    `added` is what becomes of the embeddings of each example's tokens.
    """
    model = as_written(model)
    model.set_attn_implementation("eager")
    model.zero_grad()
    supervised = sum(float(row.weights.sum(dtype="float64")) for row in rows)
    total = 0.0
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids[None].astype("int64"))
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out, one=index: added(one, out))
        logits = model(input_ids=ids, use_cache=False, **given(row, ids, seeing)).logits[0]
        hook.remove()
        labels = torch.tensor(row.labels.astype("int64"))
        nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=UNSUPERVISED)
        loss = (nll * torch.tensor(row.weights, dtype=nll.dtype)).sum() / supervised
        loss.backward()
        total += loss.item()
    return total, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def given(row: Example, ids: torch.Tensor, seeing: Sight) -> dict[str, torch.Tensor]:
    """What transformers' own processor hands to its model for the images of a row."""
    if not row.vision:
        return {}
    images = [Image.open(io.BytesIO(one.content)).convert("RGB") for one in row.vision]
    made = seeing.processor(images=images, return_tensors="pt")
    if seeing.name == "gemma3":
        return {"pixel_values": made["pixel_values"], "token_type_ids": (ids == IMAGE).int()}
    return {**made, "mm_token_type_ids": (ids == IMAGE).int()}

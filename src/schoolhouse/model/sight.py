"""Models that see: how they are loaded and called, and which of their parts learn. What they make of images is in
`features`; a family needs nothing here as long as its model has `get_image_features`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from schoolhouse.data import vision as sights
from schoolhouse.data.vision import PLACED_BY_GRID
from schoolhouse.errors import ConfigError
from schoolhouse.model import attention, features
from schoolhouse.parallel.ulysses import Exchange
from schoolhouse.types import Vision

TOGETHER = ("gemma3",)
"""Model types whose visual tokens of one image see one another in both directions."""
PARTS = {
    "vision": (
        "model.visual.", "model.vision_tower.", "model.vision_model.", "vision_model.", "model.audio_tower.",
    ),
    "projector": (
        "model.visual.merger.", "model.visual.deepstack_merger_list.", "model.multi_modal_projector.",
        "model.connector.", "model.projector.", "model.aligner.", "model.embed_vision.", "model.embed_audio.",
    ),
    "language": ("model.language_model.", "model.text_model.", "lm_head."),
}
"""The parameters of each part, by how their names begin; a projector inside the vision tower is no part of it."""


def sees(model: PreTrainedModel) -> bool:
    """Whether the model has a vision tower."""
    return "vision_config" in model.config.to_dict()


def loader(directory: Path) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """transformers' class that loads the model of a directory with all that it has; of a family whose sight is not
    known here, too, which learns from texts alone."""
    kind = sights.model_type(directory)
    alone = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForCausalLM if alone and not sights.sees(directory) else AutoModelForImageTextToText


def attentions(directory: Path, name: str) -> str | dict[str, str]:
    """The attention that each part of a directory's model is loaded with: of a vision tower, PyTorch's own."""
    return _of_parts(name) if sights.has_tower(directory) else name


def _of_parts(name: str) -> dict[str, str]:
    """`name` for language models; towers that hear know transformers' written out attention alone."""
    return {"": name, "text_config": name, "vision_config": "sdpa", "audio_config": "eager"}


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set one of transformers' attentions for the language model, and PyTorch's for towers."""
    model.set_attn_implementation(_of_parts(name) if sees(model) else name)


def attend(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the language model. A vision tower's is not causal: our own where images stand behind one
    another, else PyTorch's."""
    set_attention(model, name)
    if model.config.model_type in PLACED_BY_GRID:  # transformers' setter would look for a kernel of that name
        model.model.visual.config._attn_implementation = attention.IMAGES


def prepare(model: PreTrainedModel) -> None:
    """Let the language model of a model that sees take images, and both its parts have our attention."""
    attend(model, attention.NAME)
    if model.config.model_type in sights.FAMILIES:
        features.prepare(model)


def inputs(
    model: PreTrainedModel, vision: Vision | None, ids: torch.Tensor, exchange: Exchange | None
) -> dict[str, Any]:
    """The images of a micro-batch as an argument of the model's forward; `ids` [1, S] of the whole sequence are in host
    memory."""
    if vision is None:
        return {}
    places = (ids[0] == model.config.image_token_id).nonzero().flatten()
    return {features.SHOWN: features.Shown(vision, places, exchange)}


def together(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of ids [1, S] are visual, bool[S], where those of an image see one another in both directions."""
    return ids[0] == model.config.image_token_id if model.config.model_type in TOGETHER else None


def own_inputs(model: PreTrainedModel, vision: Vision, visual: torch.Tensor) -> dict[str, torch.Tensor]:
    """The images as plain transformers is given them, with the visual places bool[1, S] that its processor marks."""
    pixels = {"pixel_values": vision.pixels}
    if model.config.model_type not in PLACED_BY_GRID:
        return {**pixels, "token_type_ids": visual.int()}
    grid = vision.grid.to(vision.pixels.device)
    return {**pixels, "image_grid_thw": grid, "mm_token_type_ids": visual.int()}


def freeze(model: PreTrainedModel, parts: tuple[str, ...]) -> None:
    """Take parts of a model that sees out of training; a part that is not there is an error, and so are all three."""
    for part in parts:
        names = [name for name, _ in model.named_parameters() if part_of(name) == part]
        if not names:
            raise ConfigError(
                f"{type(model).__name__} has no {part} to freeze", required="parts that the model has",
                where="model.freeze", remedy="remove it",
            )
        for name, parameter in model.named_parameters():
            if part_of(name) == part:
                parameter.requires_grad_(False)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "nothing is left to train", required="a part that is not frozen", where="model.freeze",
            remedy="remove one of the parts",
        )


def refuse_unseen(model: PreTrainedModel, *, shown: bool) -> None:
    """Raise ConfigError where what sees is trained and no training row shows an image: no gradient would reach it."""
    if shown or not sees(model):
        return
    parts = {part_of(name) or name for name, one in model.named_parameters() if one.requires_grad} - {"language"}
    if not parts:
        return
    known = sorted(parts & {"vision", "projector"})
    first = min(parts - {*known}, default="")
    raise ConfigError(
        f"no training row has an image, and what sees in {type(model).__name__} is trained "
        f"({', '.join([*known, *([first] if first else [])])}): no gradient would reach it",
        required="images, or what sees frozen", where="model.freeze",
        remedy="train adapters of its language model alone: lora.targets" if first else
        f"set model.freeze=[{','.join(known)}]",
    )


def part_of(name: str) -> str | None:
    """The part of a model that sees to which a parameter belongs."""
    found = [
        (len(beginning), part) for part, beginnings in PARTS.items() for beginning in beginnings
        if name.startswith(beginning)
    ]
    return max(found)[1] if found else None

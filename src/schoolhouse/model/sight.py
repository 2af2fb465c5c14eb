"""Models that see: how they are loaded and called, and the vision tower that runs in every micro-batch.

transformers' own forward encodes the images, puts their features into the places of their tokens (Qwen3-VL also adds
DeepStack features in its first layers), and runs the language model with our packed attention; a family needs nothing
here as long as its forward takes `pixel_values`. A micro-batch without images shows the tower one blank patch and adds
its features with weight 0: so every process runs the same modules in the same order (sharded parameters are gathered
by all or none), and each parameter has a gradient, of zeros, whichever process computes it.

With Ulysses each process of a group encodes its share of the images, balanced by their patches; features are exchanged,
all of them are put into the embeddings of the whole sequence here (as the model's own forward does it, without pixels),
and the language model goes on with a part of these. Backward brings the gradients of all parts back to whoever encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from schoolhouse.data import vision as sights
from schoolhouse.errors import ConfigError
from schoolhouse.model import attention
from schoolhouse.parallel.ulysses import Exchange
from schoolhouse.types import Vision

PLACED_BY_GRID = tuple(name for name, family in sights.FAMILIES.items() if family.placed_by_grid)
"""Model types whose vision tower takes the grid of patches beside the pixels."""
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
BLANK = "blank"
"""The argument that carries the blank image through the model's forward to its language model."""
SHARED = "shared"
"""The argument that carries the images of a Ulysses group through the model's forward to its language model."""
PART = "part"
"""The argument that carries the start and the length of this process's part of the sequence."""


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
    """Let the language model of a model that sees take the blank image and a part of the embeddings, and both parts
    have our attention."""
    attend(model, attention.NAME)
    if model.config.model_type in sights.FAMILIES:
        model.model.language_model.register_forward_pre_hook(_Before(model.model), with_kwargs=True)


@dataclass(frozen=True, slots=True)
class Shared:
    """The images of a micro-batch whose encoding is divided among the processes of a Ulysses group."""

    vision: Vision
    places: torch.Tensor
    """bool[1, S]: the tokens of the whole sequence that are visual."""
    exchange: Exchange


class _Before:
    """Before the language model: a blank image's features are added with weight 0, shared images' features are put
    into their places, and a part of all is taken."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        blank, shared = kwargs.pop(BLANK, None), kwargs.pop(SHARED, None)
        if blank is not None:
            seen = self._owner.get_image_features(**blank, return_dict=True)
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + 0 * sum(one.sum() for one in _features(seen))
        if shared is not None:
            kwargs |= _placed(kwargs["inputs_embeds"], shared, _gathered(self._owner, shared))
        part = kwargs.pop(PART, None)
        return args, kwargs if part is None else {**kwargs, **_taken(kwargs, *part)}


def _features(seen: Any) -> list[torch.Tensor]:
    """[tokens, D] of a vision tower's output, and as much for each layer that DeepStack features are added in."""
    every = [seen.pooler_output, *seen.get("deepstack_features", ())]
    return [torch.cat(one) if isinstance(one, tuple | list) else one for one in every]


def _gathered(owner: nn.Module, shared: Shared) -> list[torch.Tensor]:
    """The features of all images in the order of their tokens; this process encodes its share."""
    vision, exchange = shared.vision, shared.exchange
    own = vision.shares[exchange.peers.rank()]
    seen = [one.flatten(0, -2) for one in _features(owner.get_image_features(**_own(owner, vision, own)))]
    patches = vision.grid.prod(1)
    tokens = (patches * shared.places.sum() // patches.sum()).tolist()
    sizes = [sum(tokens[image] for image in images) for images in vision.shares]
    came = [image for images in vision.shares for image in images]
    rows = exchange.gather(torch.cat(seen, 1)[: sizes[exchange.peers.rank()]], sizes)
    pieces = dict(zip(came, rows.split([tokens[image] for image in came]), strict=True))
    return list(torch.cat([pieces[image] for image in range(len(came))]).chunk(len(seen), 1))


def _own(owner: nn.Module, vision: Vision, own: Sequence[int]) -> dict[str, Any]:
    """The images that this process encodes. With none it runs its tower too: on a blank, whose features go nowhere."""
    pixels, grid = vision.pixels, vision.grid[list(own)]
    by_grid = owner.config.model_type in PLACED_BY_GRID
    if not own:
        merged = owner.visual.spatial_merge_size if by_grid else 1
        pixels, grid = pixels.new_zeros(merged**2, *pixels.shape[1:]), grid.new_tensor([[1, merged, merged]])
    return {"pixel_values": pixels, "return_dict": True, **({"image_grid_thw": grid} if by_grid else {})}


def _placed(embeddings: torch.Tensor, shared: Shared, features: list[torch.Tensor]) -> dict[str, Any]:
    """What the language model is given with features in their places."""
    first, *deep = (one.to(embeddings.dtype) for one in features)
    found: dict[str, Any] = {"inputs_embeds": embeddings.masked_scatter(shared.places.unsqueeze(-1), first)}
    return {**found, "visual_pos_masks": shared.places, "deepstack_visual_embeds": deep} if deep else found


def _taken(kwargs: dict[str, Any], start: int, length: int) -> dict[str, Any]:
    """The part of what the language model is given; DeepStack features are those of the part's visual places."""
    end, visual, deep = start + length, kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    found = {"inputs_embeds": kwargs["inputs_embeds"][:, start:end],
             "position_ids": kwargs["position_ids"][..., start:end]}
    if visual is not None:
        first, last = (int(visual[:, :place].sum()) for place in (start, end))
        found["visual_pos_masks"] = visual[:, start:end]
        found["deepstack_visual_embeds"] = [features[first:last] for features in deep]
    return found


def inputs(
    model: PreTrainedModel, vision: Vision | None, ids: torch.Tensor | None = None, exchange: Exchange | None = None
) -> dict[str, Any]:
    """The images of a micro-batch as arguments of the model's forward; shared ones with the tokens and the exchange."""
    if vision is None:
        return {}
    if vision.shares is not None:
        return {SHARED: Shared(vision, ids == model.config.image_token_id, exchange), PART: vision.part}
    given: dict[str, Any] = {"pixel_values": vision.pixels}
    if model.config.model_type in PLACED_BY_GRID:
        given["image_grid_thw"] = vision.grid
    given = given if vision.real else {BLANK: given}
    return given if vision.part is None else {**given, PART: vision.part}


def together(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of ids [1, S] are visual, bool[S], where those of an image see one another in both directions."""
    return ids[0] == model.config.image_token_id if model.config.model_type in TOGETHER else None


def own_inputs(model: PreTrainedModel, vision: Vision, visual: torch.Tensor) -> dict[str, torch.Tensor]:
    """The images as plain transformers is given them, with the visual places bool[1, S] that its processor marks."""
    mark = "mm_token_type_ids" if model.config.model_type in PLACED_BY_GRID else "token_type_ids"
    return {**inputs(model, vision), mark: visual.int()}


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

"""From images to the embeddings of their tokens: the vision tower, which runs in every micro-batch.

The tower encodes the images, their features are put into the places of their tokens (Qwen3-VL also adds DeepStack
features in its first layers), and the language model goes on with our packed attention. Sizes and places of images are
known in host memory before their pixels are anywhere, and whatever follows from them is worked out there: transformers'
own forward would look for it on the device, and wait. A micro-batch without images shows the tower one blank patch and
adds its features with weight 0: so every process runs the same modules in the same order (sharded parameters are
gathered by all or none), and each parameter has a gradient, of zeros, whichever process computes it.

With Ulysses each process of a group encodes its share of the images, balanced by their patches; features are exchanged,
all of them are put into the embeddings of the whole sequence, and the language model goes on with a part of these.
Backward brings the gradients of all parts back to whoever encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import vision_utils

from schoolhouse import crossing
from schoolhouse.data.vision import PLACED_BY_GRID
from schoolhouse.parallel.ulysses import Exchange
from schoolhouse.types import Vision

SHOWN = "shown"
"""The argument that carries the images through a model's forward to its language model."""
WINDOWED = ("qwen2_5_vl",)
"""Model types whose vision tower attends within windows in most of its layers."""
INTERPOLATED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Model types whose vision tower draws its table of positions out to the grid of an image."""
DEEP = ("qwen3_vl", "qwen3_vl_moe")
"""Model types whose first layers have features added to them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The images of a micro-batch and where they go."""

    vision: Vision
    places: Tensor
    """i64[V]: the tokens of the whole sequence that are visual, in host memory."""
    exchange: Exchange | None
    """The way to the processes that encode the other images; None where one encodes all."""


def prepare(model: nn.Module) -> None:
    """Let the language model of a model that sees take images that are `Shown`."""
    inner = model.model
    inner.language_model.register_forward_pre_hook(_Before(inner), with_kwargs=True)
    if inner.config.model_type in DEEP:
        inner.language_model._deepstack_process = _Added(inner.language_model._deepstack_process)


class _Before:
    """Before the language model: a blank image's features are added with weight 0, real ones are put into their places,
    and a part of all is taken."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        shown: Shown | None = kwargs.pop(SHOWN, None)
        if shown is None:
            return args, kwargs
        embeddings = kwargs["inputs_embeds"]
        places = crossing.sent(shown.places, embeddings.device)
        if shown.vision.real:
            first, *deep = (one.to(embeddings.dtype) for one in _features(self._owner, shown))
            embeddings = embeddings.index_copy(1, places, first.unsqueeze(0))
        else:
            blank = _encoded(self._owner, shown.vision.pixels, shown.vision.grid)
            embeddings, deep = embeddings + 0 * sum(one.sum() for one in blank), []
        if shown.vision.part is not None:
            start, length = shown.vision.part
            first, last = torch.searchsorted(shown.places, torch.tensor([start, start + length])).tolist()
            embeddings, deep = embeddings[:, start : start + length], [features[first:last] for features in deep]
            kwargs["position_ids"] = kwargs["position_ids"][..., start : start + length]
            places = places[first:last] - start
        kwargs["inputs_embeds"] = embeddings
        if deep:
            kwargs |= {"visual_pos_masks": places, "deepstack_visual_embeds": deep}
        return args, kwargs


@dataclass(frozen=True, slots=True)
class _Added:
    """DeepStack's features added to the states of their tokens; transformers gives a mask of these, we their places."""

    plain: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, states: Tensor, places: Tensor, features: Tensor) -> Tensor:
        if places.dtype == torch.bool:
            return self.plain(states, places, features)
        return states.index_add(1, places, features.to(states.dtype).unsqueeze(0))


def _features(owner: nn.Module, shown: Shown) -> list[Tensor]:
    """[V, D] of all images in the order of their tokens, and as much for each layer that DeepStack adds to; where
    several processes encode, this one encodes its share."""
    vision, exchange = shown.vision, shown.exchange
    if vision.shares is None:
        return _encoded(owner, vision.pixels, vision.grid)
    own = vision.shares[exchange.peers.rank()]
    seen = _encoded(owner, *_share(owner, vision, own))
    patches = vision.grid.prod(1)
    tokens = (patches * len(shown.places) // patches.sum()).tolist()
    sizes = [sum(tokens[image] for image in images) for images in vision.shares]
    came = [image for images in vision.shares for image in images]
    rows = exchange.gather(torch.cat(seen, 1)[: sizes[exchange.peers.rank()]], sizes)
    pieces = dict(zip(came, rows.split([tokens[image] for image in came]), strict=True))
    return list(torch.cat([pieces[image] for image in range(len(came))]).chunk(len(seen), 1))


def _share(owner: nn.Module, vision: Vision, own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pixels and grids of the images that this process encodes. With none it runs its tower too: on a blank, whose
    features go nowhere."""
    if own:
        return vision.pixels, vision.grid[list(own)]
    merged = owner.visual.spatial_merge_size if owner.config.model_type in PLACED_BY_GRID else 1
    pixels = vision.pixels.new_zeros(merged**2, *vision.pixels.shape[1:])
    return pixels, vision.grid.new_tensor([[1, merged, merged]])


def _encoded(owner: nn.Module, pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """[V, D] of images by the model's vision tower, and as much for each layer that DeepStack adds to."""
    told = _told(owner, grid, pixels.device) if owner.config.model_type in PLACED_BY_GRID else {}
    seen = owner.get_image_features(pixels, **told, return_dict=True)
    every = [seen.pooler_output, *seen.get("deepstack_features", ())]
    return [torch.cat(one) if isinstance(one, tuple | list) else one.flatten(0, -2) for one in every]


def _told(owner: nn.Module, grid: Tensor, device: torch.device) -> dict[str, Any]:
    """What the tower of a model would work out from the sizes i64[I, 3] of images, by transformers' own arithmetic.

    Where images end stays in host memory, where our attention reads it; how long the longest is nobody reads: a number
    that changed would have compiled blocks compiled anew.
    """
    tower, kind = owner.visual, owner.config.model_type
    ends = vision_utils.get_vision_cu_seqlens(grid)
    told = {"position_ids": vision_utils.get_vision_position_ids(grid, tower.spatial_merge_size)}
    if kind in INTERPOLATED:
        told["interp_indices"], told["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
            tower.spatial_merge_size,
        )
    ending = {"cu_seqlens": ends, "max_seqlen": 0}
    if kind in WINDOWED:
        told["window_index"], windows = vision_utils.get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        ending |= {"cu_window_seqlens": windows, "max_window_seqlen": 0}
    return {"image_grid_thw": grid, **ending, **{name: crossing.sent(one, device) for name, one in told.items()}}

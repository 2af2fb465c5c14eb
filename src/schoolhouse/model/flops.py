"""The floating-point operations of a step: what its mathematics needs, not what was spent on it.

    a matrix [out, in], for each token:  2 out in in forward, 2 out in for the gradient of its input (not in a vision
                                         tower that is frozen), 2 out in for its own gradient where it is trained
    the head, the last feed-forward:     the same, for each supervised token only (`last_block`)
    attention of a layer:                2 H (K + K') for each pair of a query and a key it sees; twice that backward

(Kaplan et al., 2020, arXiv:2001.08361, with attention by the true lengths of examples.) Adapters are matrices of their
own; of a mixture's experts those that a token chooses count. Not counted: what activation checkpointing computes again,
what is no matrix product, what recurrent layers do with their states, and attention inside a vision tower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from schoolhouse.model import families, last_block, sight, varlen

EXPERTS = "experts"
"""The module below which each token uses a few matrices of many; shared experts have another name."""
LINEAR, HYBRID = "linear_attention", "hybrid"
"""transformers' names for layers that attend by a recurrent state alone, and for those that also attend."""
SIDE = {"cpu": 1536}
"""Rows and columns of the matrices by which a processor's rate is measured; 8,192 on an accelerator."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one training step, by what they grow with."""

    token: float
    """For each token of the language model."""
    target: float
    """For each supervised token."""
    patch: float
    """For each patch of an image."""
    pair: float
    """For each pair of a query and a key of one layer, all heads."""
    windows: tuple[int | None, ...]
    """Of each layer with attention: the tokens a query sees, itself included; None for all before it."""

    def of_step(self, lengths: np.ndarray, targets: int, patches: int = 0) -> float:
        """Operations of a step over examples of so many tokens i64[examples], forward and backward."""
        pairs = sum(float(_pairs(lengths, window).sum()) for window in self.windows)
        return float(lengths.sum()) * self.token + targets * self.target + patches * self.patch + pairs * self.pair


def work(model: PreTrainedModel) -> Work:
    """What a step of a model costs, by its modules and its configuration."""
    settings = families.settings_of(model.config)
    head = model.get_output_embeddings()
    last = last_block.feed_forward(model)
    only_targets = {head} if last is None else {head, *last.modules()}
    parts: dict[str, list[tuple[str, nn.Module]]] = {"token": [], "target": [], "patch": []}
    for name, module in model.named_modules():
        sees = name.startswith(sight.PARTS["vision"])
        parts["target" if module in only_targets else "patch" if sees else "token"].append((name, module))
    tower = [one for _, module in parts["patch"] for one in module.parameters(recurse=False)]
    heads = varlen.heads_of(settings)
    kinds = [] if heads is None else _windows(settings, model.config.get_text_config())
    return Work(
        token=_passes(parts["token"], settings, reached=True),
        target=_passes(parts["target"], settings, reached=True),
        patch=_passes(parts["patch"], settings, reached=any(one.requires_grad for one in tower)),
        pair=0.0 if heads is None else 3 * 2 * heads.queries * (heads.size + heads.values),
        windows=tuple(kinds),
    )


def rate(device: torch.device, precision: str) -> float:
    """The matrix products that a device does, in operations a second: the best of five large ones, measured."""
    side = SIDE.get(device.type, 8192)
    ones = torch.ones(side, side, device=device, dtype=getattr(torch, precision))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        F.linear(ones, ones)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _passes(modules: Sequence[tuple[str, nn.Module]], settings: Mapping[str, Any], *, reached: bool) -> float:
    """Operations of the matrices of one part for each token (or patch); whether a gradient comes to its inputs."""
    matrices = (found for name, module in modules for found in _matrices(name, module, settings))
    return sum(2 * size * (1 + reached + trained) for size, trained in matrices)


def _matrices(name: str, module: nn.Module, settings: Mapping[str, Any]) -> Iterator[tuple[float, bool]]:
    """The multiplications of a module's own matrices for one token, and whether they are trained."""
    share = 1.0
    if EXPERTS in name.split("."):
        counted = settings.get("num_experts") or settings.get("n_routed_experts") or settings.get("num_local_experts")
        share = settings["num_experts_per_tok"] / counted
    if isinstance(module, nn.Linear):
        yield share * module.in_features * module.out_features, module.weight.requires_grad
    elif isinstance(module, nn.Conv2d | nn.Conv3d | Conv1D):  # patches side by side: every pixel is met once
        yield float(module.weight.numel()), module.weight.requires_grad
    else:
        for one in module.parameters(recurse=False):
            if one.ndim == 3 and EXPERTS in name.split("."):
                yield share * one.shape.numel(), one.requires_grad


def _windows(settings: Mapping[str, Any], text: PretrainedConfig) -> Iterator[int | None]:
    """Of each layer with attention, among others that have none: the tokens a query sees."""
    window = settings.get("sliding_window")
    try:
        kinds = text.layer_types  # some configurations make them of settings of their own
    except AttributeError:
        kinds = None
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    attending = (kind for kind in kinds if kind == HYBRID or (kind.endswith("attention") and kind != LINEAR))
    return (window if kind == "sliding_attention" else None for kind in attending)


def _pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of a query and a key it sees, in each of causal sequences of i64 lengths."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return seen * (seen + 1) / 2 + (lengths - seen) * seen

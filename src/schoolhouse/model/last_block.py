"""The last block's feed-forward part, computed for supervised tokens alone.

Behind the last attention every token goes its own way, and only those with a target reach the loss. What the others
would be there is not computed; they stay what they were before it. Loss and gradient are the same numbers: of four
blocks with half of the tokens supervised a tenth is saved, of 24 a sixtieth.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from schoolhouse.parallel import fsdp

NAMES = ("mlp", "feed_forward")
EXPERTS = "experts"
"""The module below which each token uses a few matrices of many; shared experts have another name."""


class _FeedForward:
    """The forward of such a part: states [1, S, D] to [1, S, D], zeros but at `targets` where there are any."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.targets: torch.Tensor | None = None
        """i64[M]: places of the sequence that have a target; None: all are computed."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return self._forward(states)
        found = self._forward(states.index_select(1, self.targets))
        return torch.zeros_like(states).index_copy(1, self.targets, found)


class _Block:
    """The forward of the block it stands in, which may be told `targets`."""

    def __init__(self, forward: Any, part: _FeedForward) -> None:
        self._forward, self._part = forward, part

    def __call__(self, *args: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self._part.targets = targets
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._part.targets = None


def only_targets(model: PreTrainedModel) -> None:
    """Let the forward of `model` be told `targets`, i64[M]: the places of its one sequence that the loss will look at.

    All is computed as before where it is not told, and in a model that has no such part or chooses experts in it.
    """
    part = feed_forward(model)
    if part is None or isinstance(part.forward, _FeedForward):
        return
    block = _last(model)
    part.forward = _FeedForward(part.forward)
    block.forward = _Block(block.forward, part.forward)


def feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """The part of the last block that may be computed for targets alone; None where there is none."""
    parts = (part for name, part in _last(model).named_children() if name in NAMES)
    part = next(parts, None)
    if part is None or len(inspect.signature(part.forward).parameters) != 1:
        return None
    return None if any(EXPERTS in name.split(".") for name, _ in part.named_modules()) else part


def _last(model: PreTrainedModel) -> nn.Module:
    """The last block of the language model; an empty module where there are no blocks."""
    return (fsdp.blocks(model.get_decoder()) or [nn.Module()])[-1]

"""The last block's feed-forward part, computed for supervised tokens alone.

In the decoders of `KNOWN`, every token goes its own way behind the last attention, and only those with a target reach
the loss. What becomes of the others there is of use to nobody, and is not computed. Loss and gradient are the same: of
four blocks with half of the tokens supervised a tenth is saved, of 24 a sixtieth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

KNOWN = frozenset((
    "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3",
    "qwen3_5_text", "qwen3_vl_text", "seed_oss",
))
"""transformers' model types of which this was shown; of others it would have to be, since some run their blocks more
than once, or mix tokens behind the last."""


class _FeedForward:
    """The forward of such a part, states [1, S, D] to [1, S, D]: anything but at `targets`, where there are any."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self.targets: torch.Tensor | None = None
        """i64[M]: places of the sequence that have a target; None: all are computed."""

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return self._forward(states)
        found = self._forward(states.index_select(1, self.targets))
        return states.detach().index_copy(1, self.targets, found)  # a norm may divide by them: no zeros


class _Block:
    """The forward of the block around it, which may be told `targets`."""

    def __init__(self, forward: Any, part: _FeedForward) -> None:
        self._forward, self._part = forward, part

    def __call__(self, *args: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
        self._part.targets = targets
        try:
            return self._forward(*args, targets=targets, **kwargs)
        finally:
            self._part.targets = None


def only_targets(model: PreTrainedModel) -> bool:
    """Let the forward of `model` be told `targets`, i64[M]: the places of its one sequence that the loss will look at.

    Whether it may be: one that is not known may not. Where it is not told, all is computed as before.
    """
    part = feed_forward(model)
    if part is not None and not isinstance(part.forward, _FeedForward):
        block = model.get_decoder().layers[-1]
        part.forward = _FeedForward(part.forward)
        block.forward = _Block(block.forward, part.forward)
    return part is not None


def feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """The part of the last block that may be computed for targets alone; None in a model that is not known."""
    decoder = model.get_decoder()
    known = decoder.config.model_type in KNOWN and type(decoder).__module__.startswith("transformers.")
    return decoder.layers[-1].mlp if known else None

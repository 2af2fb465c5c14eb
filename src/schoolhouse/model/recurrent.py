"""Layers that carry a state along the sequence: convolutions, state spaces, delta rules. Each example has its own.

Such a layer (Mamba: Gu and Dao, 2023, arXiv:2312.00752; Gated DeltaNet: Yang et al., 2024, arXiv:2412.06464) does not
call attention, so nothing tells it where an example ends. Its input is laid in the groups of `layouts`, examples of
about one length side by side, and the state of each begins with nothing. It looks back alone, so padding behind an
example is seen by nobody. With Ulysses every process is given the whole sequence, and keeps its own part of the result.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schoolhouse.model.layouts import Layout, from_groups, to_groups


class _Apart:
    """The forward of such a layer, states [1, S, D] to [1, S, D], which may be told the layout of a micro-batch."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Tensor:
        if layout is None:
            return self._forward(hidden_states, *args, **kwargs)
        states, exchange = hidden_states.squeeze(0), layout.exchange
        if exchange is None:
            return _each(self._forward, states, layout).unsqueeze(0)
        own = len(states)
        whole = _each(self._forward, exchange.gather(states, [own] * exchange.degree), layout)
        return whole.narrow(0, own * exchange.peers.rank(), own).unsqueeze(0)


def keep_apart(model: PreTrainedModel) -> None:
    """Have each recurrent layer of a model compute the examples of a micro-batch apart, where it is told their layout.

    One is known by a convolution of its own along the sequence. What is not known here, and what its block tells
    nothing, is found by the proof (`isolation`).
    """
    for layer in layers(model):
        if not isinstance(layer.forward, _Apart):
            layer.forward = _Apart(layer.forward)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The recurrent layers of a model's decoder."""
    every = model.get_decoder().modules()
    return [one for one in every if any(isinstance(child, nn.Conv1d) for child in one.children())]


def describe(model: PreTrainedModel) -> str:
    """How many of them a model has, for the table of what is in force; empty for none."""
    number = len(layers(model))
    return f"; {number} layers carry a state along the sequence, each example its own" if number else ""


def passed_by(model: PreTrainedModel) -> set[str]:
    """The names of matrices in recurrent layers that fused kernels are given as they are (Mamba's `out_proj`): what
    stands beside them would be left out wherever such kernels run."""
    own = {layer: set(re.findall(r"self\.(\w+)\.weight", inspect.getsource(type(layer)))) for layer in layers(model)}
    return {
        f"{name}.{child}" for name, layer in model.named_modules() for child in own.get(layer, ())
        if isinstance(layer.get_submodule(child), nn.Linear)
    }


def _each(forward: Callable[..., Tensor], states: Tensor, layout: Layout) -> Tensor:
    """[S, D] of all examples, computed in groups [E, T, D]."""
    groups = to_groups(states, layout.queries).split(
        [group.examples * len(group.queries) for group in layout.groups])
    found = [
        forward(places.unflatten(0, (group.examples, -1))).flatten(0, 1)
        for group, places in zip(layout.groups, groups, strict=True)
    ]
    return from_groups(torch.cat(found), layout.queries)

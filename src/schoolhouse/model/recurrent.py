"""Layers that carry a state along the sequence: convolutions, state spaces, delta rules. Each example has its own.

Such a layer (Mamba: Gu and Dao, 2023, arXiv:2312.00752; Gated DeltaNet: Yang et al., 2024, arXiv:2412.06464) does not
call attention, so nothing tells it where an example ends. Its input is laid in the groups of `layouts`, examples of
about one length side by side, and the state of each begins with nothing. It looks back alone, so padding behind an
example is seen by nobody. With Ulysses every process is given the whole sequence, and keeps its own part of the result.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schoolhouse.model import chunks, stand_ins
from schoolhouse.model.layouts import Layout, from_groups, to_groups

KERNELS = ("causal_conv1d", *(package for package, _ in stand_ins.RULES.values()))
"""Packages whose kernels transformers takes on CUDA where they are installed."""
CHUNK = "chunk_size"
"""Mamba's name for the tokens that it computes at once, to a multiple of which it fills up a sequence."""


def keep_apart(model: PreTrainedModel) -> None:
    """Have each recurrent layer of a model compute the examples of a micro-batch apart, where it is told their layout.

    One is known by a convolution of its own along the sequence. What is not known here, and what its block tells
    nothing, is found by the proof (`isolation`).
    """
    for layer in layers(model):
        if type(layer).__module__ != __name__:
            layer.__class__ = _apart(type(layer))


@functools.cache
def _apart(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of such a layer whose forward, states [1, S, D] to [1, S, D], may be told the layout of a micro-batch."""

    @torch.compiler.disable
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        states, exchange = hidden_states.squeeze(0), layout.exchange
        if exchange is None:
            return _each(self, kind, states, layout).unsqueeze(0)
        own = len(states)
        whole = _each(self, kind, exchange.gather(states, [own] * exchange.degree), layout)
        return whole.narrow(0, own * exchange.peers.rank(), own).unsqueeze(0)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


def _each(layer: nn.Module, kind: type[nn.Module], states: Tensor, layout: Layout) -> Tensor:
    """[S, D] of all examples, computed in groups [E, T, D] by the forward of a kind of layer."""
    groups = to_groups(states, layout.queries).split([one.examples * len(one.queries) for one in layout.groups])
    found = []
    for group, places in zip(layout.groups, groups, strict=True):
        with _chunks_of(layer, len(group.queries)), stand_ins.taken(kind):
            found.append(kind.forward(layer, places.unflatten(0, (group.examples, -1))).flatten(0, 1))
    return from_groups(torch.cat(found), layout.queries)


@contextlib.contextmanager
def _chunks_of(layer: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, a layer of Mamba's kind takes no larger chunks than its sequences are long."""
    own = vars(layer).get(CHUNK)
    if own is not None:
        layer.chunk_size = chunks.chunk_of(tokens, own)
    try:
        yield
    finally:
        if own is not None:
            layer.chunk_size = own


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The recurrent layers of a model's decoder."""
    every = model.get_decoder().modules()
    return [one for one in every if any(isinstance(child, nn.Conv1d) for child in one.children())]


def describe(model: PreTrainedModel, place: torch.device) -> str:
    """How many of them a model has and what computes them, for the table of what is in force; empty for none."""
    number = len(layers(model))
    if not number:
        return ""
    kernels = [name for name in KERNELS if place.type == "cuda" and importlib.util.find_spec(name)]
    by = f"with what transformers takes of {', '.join(kernels)}" if kernels else "by plain PyTorch"
    return f"; {number} of its layers carry a state along the sequence, each example its own, {by}"


def passed_by(model: PreTrainedModel) -> set[str]:
    """The names of matrices in recurrent layers that fused kernels are given as they are (Mamba's `out_proj`): what
    stands beside them would be left out wherever such kernels run."""
    with_state = set(layers(model))
    return {
        f"{name}.{child}" for name, layer in model.named_modules() if layer in with_state
        for child, one in layer.named_children() if isinstance(one, nn.Linear) and child in _read_by(type(layer))
    }


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The parts of a kind of layer whose weights its own code reads, and that of the kinds it is made of."""
    found: set[str] = set()
    for one in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):  # made while running: what it was made of has its code
            found.update(re.findall(r"self\.(\w+)\.weight", inspect.getsource(one)))
    return frozenset(found)

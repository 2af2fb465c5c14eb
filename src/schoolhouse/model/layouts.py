"""How the examples of a micro-batch are laid side by side for attention: built once, used by every layer.

Examples of about the same length make a group, padded on the right to its longest. Under a causal rule a real query
never reaches the padding behind it, so a group needs no mask. Where most of an example is computed in another
(`Shared`), its group has the queries that are left, which look at all of its keys.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schoolhouse import crossing
from schoolhouse.model import varlen
from schoolhouse.model.varlen import Ends, Kernels
from schoolhouse.parallel.ulysses import Exchange
from schoolhouse.types import Shared

PADDING = 0.2
"""The share of a group's queries by which those of the shortest example may fall behind those of the longest."""
PART = 0.4
"""The share of an example's tokens above which all of them ask, also those that are computed in another: a group
without a mask is faster than one that computes a little less."""
NONE = Kernels()


@dataclass(frozen=True, slots=True)
class Way:
    """The way of S tokens to P places in groups, and back."""

    there: Tensor
    """i64[P]: the token that stands in each place of the groups, laid end to end; padding repeats one."""
    back: Tensor
    """i64[S]: each token's own place."""
    copies: Tensor | None = None
    """i64[C]: the other places where a token stands that is computed in another example; None where there are none."""
    copied: Tensor | None = None
    """i64[C]: the tokens there."""


@dataclass(frozen=True, slots=True)
class Group:
    """E examples of about one length side by side."""

    examples: int
    queries: range
    """The places in an example whose tokens ask; keys are all up to the last of them."""
    together: Tensor | None = None
    """bool[E, 1, T, T]: pairs of tokens that see one another beside what is causal; None for none."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a micro-batch of S tokens that are computed is cut into groups."""

    groups: tuple[Group, ...]
    queries: Way
    keys: Way
    """The same as that of queries where nothing is shared."""
    exchange: Exchange | None = None
    """The way to the processes that hold the other parts of the sequence; None where it is whole here."""
    ends: Ends | None = None
    """The same for kernels that need no groups; None where there are none to trust."""
    spread: Way | None = None
    """Of keys to all examples end to end, for these kernels; None where nothing is shared."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """On a processor, of a window: what is added to scores of the last queries and keys before any place; parts of it
    serve every layer, which keeps none of its own for backward."""


def to_groups(states: Tensor, way: Way) -> Tensor:
    """States [S, …] of the sequence as [P, …] of the groups."""
    return _ToGroups.apply(states, way)


def from_groups(states: Tensor, way: Way) -> Tensor:
    """States [P, …] of the groups as [S, …] of the sequence; what padding and copies computed is dropped."""
    return _FromGroups.apply(states, way)


class _ToGroups(torch.autograd.Function):
    """Padding has no gradient, so backward picks each token's own, and adds to it, in float32 at least, those of its
    copies."""

    @staticmethod
    def forward(ctx, states: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return states.index_select(0, way.there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        own, way = grad.index_select(0, ctx.way.back), ctx.way
        if way.copies is None:
            return own, None
        total = own.to(torch.promote_types(own.dtype, torch.float32))
        copies = grad.index_select(0, way.copies).to(total.dtype)
        if grad.device.type == "cpu":
            total.index_add_(0, way.copied, copies)
        else:  # by sorting, which always adds in the same order
            total.index_put_((way.copied,), copies, accumulate=True)
        return total.to(own.dtype), None


class _FromGroups(torch.autograd.Function):
    """Backward gives padding and copies zeros."""

    @staticmethod
    def forward(ctx, states: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return states.index_select(0, way.back)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        above = grad.new_zeros(len(ctx.way.there), *grad.shape[1:])
        return above.index_copy_(0, ctx.way.back, grad), None


def layout(
    boundaries: Sequence[int], device: torch.device, exchange: Exchange | None = None,
    visual: Tensor | None = None, padding: float = PADDING, kernels: Kernels = NONE, shared: Shared | None = None,
) -> Layout:
    """Group the examples between `boundaries` (E + 1 offsets of all tokens) by length, with so much padding.

    Runs of `visual` tokens (bool[S], in host memory) within an example see one another in both directions, as images
    do in Gemma 3.
    """
    assert visual is None or shared is None, "what sees shares nothing"
    begins = [0] * (len(boundaries) - 1) if shared is None else shared.begins
    members = _members(boundaries, begins, padding)
    runs = None if visual is None else _runs(visual, boundaries)
    tokens = torch.arange(boundaries[-1])
    own = torch.cat([part[begin:] for part, begin in zip(tokens.tensor_split(boundaries[1:-1]), begins, strict=True)])
    computed = torch.zeros(boundaries[-1], dtype=torch.bool).index_fill_(0, own, True)
    way = functools.partial(_way, computed=computed, number=len(own), shared=shared, device=device)
    groups, queries, keys = [], [], []
    for spans, begin, length in members:
        places = spans[:, :1] + torch.arange(length)
        real = places < spans[:, 1:]
        places = torch.minimum(places, spans[:, 1:] - 1)
        together = None if runs is None else _together(runs[places].where(real, 0), device)
        groups.append(Group(len(spans), range(begin, length), together))
        queries.append((places[:, begin:].flatten(), real[:, begin:].flatten()))
        keys.append((places.flatten(), real.flatten()))
    asked = way(*map(torch.cat, zip(*queries, strict=True)), copied=False)
    seen = asked if shared is None else way(*map(torch.cat, zip(*keys, strict=True)), copied=True)
    ends, spread = None, None
    if kernels.trusted:
        ends = varlen.ends(boundaries, device, runs, kernels.trusted, None if shared is None else begins)
        spread = None if shared is None else way(tokens, tokens >= 0, copied=True)
    return Layout(tuple(groups), asked, seen, exchange, ends, spread)


def _members(
    boundaries: Sequence[int], begins: Sequence[int], padding: float
) -> list[tuple[Tensor, int, int]]:
    """Of each group: start and end of its examples i64[E, 2], the first place that asks, and its longest's tokens."""
    spans = []
    for (start, end), begin in zip(itertools.pairwise(boundaries), begins, strict=True):
        spans.append((begin if end - start - begin <= PART * (end - start) else 0, start - end, start, end))
    groups: list[list[tuple[int, int, int, int]]] = []
    for one in sorted(spans):
        begin, longest = groups[-1][0][:2] if groups else (-1, 0)
        if one[0] == begin and -one[1] - begin >= (1 - padding) * (-longest - begin):
            groups[-1].append(one)
        else:
            groups.append([one])
    return [(torch.tensor([one[2:] for one in group]), group[0][0], -group[0][1]) for group in groups]


def _way(
    places: Tensor, real: Tensor, *, copied: bool, computed: Tensor, number: int, shared: Shared | None,
    device: torch.device,
) -> Way:
    """To `places` i64[P] of all tokens, those that are not `real` being padding; a `number` of them is `computed`.
    Unless `copied`, copies are left out: no gradient comes to them."""
    there = places if shared is None else shared.places[places]
    mine = real & computed[places]
    back = torch.empty(number, dtype=torch.int64)
    back[there[mine]] = mine.nonzero().flatten()
    copies = (real & ~mine).nonzero().flatten() if copied else None
    found = (there, back, *(() if copies is None else (copies, there[copies])))
    return Way(*(crossing.sent(one, device) for one in found))


def _runs(visual: Tensor, boundaries: Sequence[int]) -> Tensor:
    """i64[S]: the number of the run of visual tokens, counted from 1, that a token belongs to; 0 for text."""
    begins = visual.clone()
    begins[1:] &= ~visual[:-1]
    begins[list(boundaries[:-1])] = visual[list(boundaries[:-1])]
    return begins.cumsum(0) * visual


def _together(runs: Tensor, device: torch.device) -> Tensor | None:
    """bool[E, 1, T, T]: the pairs of the same run, of runs [E, T]; None where there is none."""
    same = (runs.unsqueeze(2) == runs.unsqueeze(1)) & (runs > 0).unsqueeze(2)
    return crossing.sent(same.unsqueeze(1), device) if runs.any() else None

"""Packed attention: each example of a micro-batch attends to itself alone, and no S x S mask is ever built.

Examples of about the same length are laid side by side, padded on the right to the longest of their group: under a
causal rule a real query never reaches the padding behind it, so the group needs no mask. What the padding computes
is dropped. transformers calls `packed_attention` by the name `NAME` and hands our `layout` argument through. Images see
in both directions: `image_attention`, by the name `IMAGES`, lays those of one size side by side. On a CUDA device
`varlen` has kernels that need no groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from schoolhouse.model import attended, products, varlen
from schoolhouse.model.varlen import Ends, Kernels, Rule
from schoolhouse.parallel.ulysses import Exchange

NAME = "schoolhouse"
IMAGES = "schoolhouse_flash_images"
"""Of vision towers; transformers hands all images of a call at once only to names that hold "flash"."""
PADDING = 0.2
"""The share of a group's longest example by which the shortest may fall behind it."""

ROWS = 512
"""Queries that are looked at together, at least, where a window is much shorter than an example."""
NONE = Kernels()
SCORES = 1 << 26
"""The most scores that are written out at once."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a micro-batch of S tokens is cut into groups of P tokens in all; built once, used by every layer."""

    groups: tuple[tuple[int, int], ...]
    """(E, T) of each group: its examples, and its longest one's tokens."""
    there: torch.Tensor
    """i64[P]: the place in the sequence of each token of the groups, laid end to end; padding repeats a token."""
    back: torch.Tensor
    """i64[S]: the place among the groups of each token of the sequence."""
    padding: torch.Tensor
    """i64[P - S]: the places among the groups that are padding."""
    together: tuple[torch.Tensor | None, ...]
    """bool[E, 1, T, T] of each group: pairs of tokens that see one another beside what is causal; None for none."""
    exchange: Exchange | None = None
    """The way to the processes that hold the other parts of the sequence; None where it is whole here."""
    ends: Ends | None = None
    """The same for kernels that need no groups; None where there are none to trust."""


def register() -> None:
    """Make both attentions known to transformers under their names."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(IMAGES, image_attention)


def layout(
    boundaries: Sequence[int], device: torch.device, exchange: Exchange | None = None,
    visual: torch.Tensor | None = None, padding: float = PADDING, kernels: Kernels = NONE,
) -> Layout:
    """Group the examples between `boundaries` (E + 1 offsets of the whole sequence) by length, with so much padding.

    Runs of `visual` tokens (bool[S]) within an example see one another in both directions, as images do in Gemma 3.
    """
    groups: list[list[tuple[int, int]]] = []
    for start, end in sorted(itertools.pairwise(boundaries), key=lambda span: span[0] - span[1]):
        if groups and end - start >= (1 - padding) * (groups[-1][0][1] - groups[-1][0][0]):
            groups[-1].append((start, end))
        else:
            groups.append([(start, end)])
    there, real, together = [], [], []
    runs = None if visual is None else _runs(visual.cpu(), boundaries)
    for members in groups:
        spans = torch.tensor(members)
        places = spans[:, :1] + torch.arange(members[0][1] - members[0][0])
        there.append(torch.minimum(places, spans[:, 1:] - 1).flatten())
        real.append((places < spans[:, 1:]).flatten())
        together.append(None if runs is None else _together(runs[there[-1]].where(real[-1], 0).view_as(places), device))
    there, real = torch.cat(there), torch.cat(real)
    back = torch.empty(boundaries[-1], dtype=torch.int64)
    back[there[real]] = real.nonzero().flatten()
    shapes = tuple((len(members), members[0][1] - members[0][0]) for members in groups)
    behind = (~real).nonzero().flatten()
    ends = varlen.ends(boundaries, device, runs, kernels.trusted) if kernels.trusted else None
    return Layout(shapes, there.to(device), back.to(device), behind.to(device), tuple(together), exchange, ends)


def _runs(visual: torch.Tensor, boundaries: Sequence[int]) -> torch.Tensor:
    """i64[S]: the number of the run of visual tokens, counted from 1, that a token belongs to; 0 for text."""
    begins = visual.clone()
    begins[1:] &= ~visual[:-1]
    begins[list(boundaries[:-1])] = visual[list(boundaries[:-1])]
    return begins.cumsum(0) * visual


def _together(runs: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """bool[E, 1, T, T]: the pairs of the same run, of runs [E, T]; None where there is none."""
    same = (runs.unsqueeze(2) == runs.unsqueeze(1)) & (runs > 0).unsqueeze(2)
    return same.unsqueeze(1).to(device) if runs.any() else None


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example: query [1, H, S, K], key and value [1, H', S, K'] to [1, S, H, K'].

    `sliding_window` counts the tokens a query reaches, itself included; `softcap` bounds scores (Gemma 2); `s_aux`
    holds a sink for each head (GPT-OSS). Grouped heads are those of `query` in runs of H / H'.
    """
    assert attention_mask is None and query.shape[0] == 1, "packed attention takes one sequence and its layout"
    states = [one[0].transpose(0, 1) for one in (query, key, value)]
    if layout.exchange is not None:
        states = layout.exchange.to_heads(*states)
        s_aux = None if s_aux is None else layout.exchange.own_heads(s_aux)
    attended = _attend(*states, layout, Rule(True, sliding_window, softcap, s_aux, scaling, dropout))
    if layout.exchange is not None:
        attended = layout.exchange.to_sequence(attended)
    return attended.unsqueeze(0), None


@torch.compiler.disable
def image_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, cu_seq_lens_q: torch.Tensor, scaling: float | None = None,
    dropout: float = 0.0, **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in both directions within each image between the offsets `cu_seq_lens_q` (or each window of one):
    query, key and value [1, H, P, K] of P patches to [1, P, H, K]."""
    assert attention_mask is None and query.shape[0] == 1, "images stand behind one another"
    states = [one[0].transpose(0, 1) for one in (query, key, value)]
    alike = _alike(tuple(cu_seq_lens_q.tolist()), query.device)
    return _attend(*states, alike, Rule(causal=False, scaling=scaling, dropout=dropout)).unsqueeze(0), None


@functools.lru_cache(maxsize=4)
def _alike(offsets: tuple[int, ...], device: torch.device) -> Layout:
    """Images in groups of one size: the same for every layer of a tower. Qwen2.5-VL's windows may be empty."""
    return layout(sorted(set(offsets)), device, padding=0.0)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, rule: Rule) -> torch.Tensor:
    """Attention of the whole sequence: query [S, H, K], key and value [S, H', K'] to [S, H, K']."""
    kernel = varlen.kernel(query, rule, layout.ends)
    if kernel is not None:
        return varlen.attend(kernel, query, key, value, layout.ends, rule)
    parts = [_ToGroups.apply(one, layout).split([e * t for e, t in layout.groups]) for one in (query, key, value)]
    outputs = []
    for (examples, length), together, *group in zip(layout.groups, layout.together, *parts, strict=True):
        states = (one.unflatten(0, (examples, length)).transpose(1, 2) for one in group)
        outputs.append(_of_group(*states, together, rule).transpose(1, 2).flatten(0, 1))
    return _FromGroups.apply(torch.cat(outputs), layout)


def _of_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, together: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """Attention of examples of one length [E, H, T, K], so many queries at a time that memory grows with T, not T x T
    (but for pairs of `together`, which are marked one by one).

    Behind a window, keys that none of these queries reaches are not looked at.
    """
    examples, heads, length, _ = query.shape
    window = rule.window if rule.window is not None and rule.window < length else None
    if window is None and not rule.written_out and (together is None or not rule.causal):
        return _looked_up(query, key, value, None, rule)
    rows = length if window is None or length <= 2 * max(window, ROWS) else max(window, ROWS)
    attend = _masked
    if rule.written_out:
        reach = length if window is None or together is not None else min(length, rows + window - 1)
        rows = min(rows, max(1, SCORES // (examples * heads * reach)))
        if rows < length and torch.is_grad_enabled():  # one part's scores at a time, in backward too
            attend = functools.partial(checkpoint, _masked, use_reentrant=False)
    outputs = []
    for first in range(0, length, rows):
        queries = range(first, min(first + rows, length))
        keys = range(max(0, first - window + 1) if window else 0, queries.stop if together is None else length)
        part = query[:, :, first : queries.stop], key[:, :, keys.start : keys.stop], value[:, :, keys.start : keys.stop]
        outputs.append(attend(*part, queries, keys, window, together, rule))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: range, keys: range, window: int | None,
    together: torch.Tensor | None, rule: Rule,
) -> torch.Tensor:
    """Attention of these queries to these keys, each to those it sees."""
    mask = _mask(queries, keys, window, together, query.device)
    return (_written_out if rule.written_out else _looked_up)(query, key, value, mask, rule)


def _looked_up(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """Attention by PyTorch's own function, which keeps the scores to itself."""
    with attended.kernel(rule.dropout):
        return products.attend(
            query, key, value, mask, dropout_p=rule.dropout, scale=rule.scaling,
            is_causal=rule.causal and mask is None, enable_gqa=query.shape[1] != key.shape[1],
        )


class _ToGroups(torch.autograd.Function):
    """States [S, H, K] of the sequence as [P, H, K] of the groups; padding has no gradient, so backward only picks."""

    @staticmethod
    def forward(ctx, states, layout):
        ctx.layout = layout
        return states.index_select(0, layout.there)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.layout.back), None


class _FromGroups(torch.autograd.Function):
    """States [P, H, K] of the groups as [S, H, K] of the sequence; what padding computed is dropped."""

    @staticmethod
    def forward(ctx, states, layout):
        ctx.layout = layout
        return states.index_select(0, layout.back)

    @staticmethod
    def backward(ctx, grad):
        picked = grad.index_select(0, ctx.layout.there)
        return picked.index_fill_(0, ctx.layout.padding, 0), None


def _mask(
    queries: range, keys: range, window: int | None, together: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Which of these keys each of these queries sees, [Q, K] or [E, 1, Q, K].

    What a window leaves out stays out, also of an image that is longer than it.
    """
    places = (torch.arange(one.start, one.stop, device=device) for one in (queries, keys))
    distance = next(places).unsqueeze(1) - next(places)
    seen = distance >= 0
    if together is not None:
        seen = seen | together[:, :, queries.start : queries.stop, keys.start : keys.stop]
    return seen if window is None else seen & (distance < window)


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Attention with its scores written out, for what PyTorch's function does not know."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    keys = scores.shape[-1]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    shares = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(shares[..., :keys], rule.dropout) @ value

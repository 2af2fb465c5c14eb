"""Packed attention: each example of a micro-batch attends to itself alone, and no S x S mask is ever built.

Examples of about the same length are laid side by side, padded on the right to the longest of their group: under a
causal rule a real query never reaches the padding behind it, so the group needs no mask. What the padding computes
is dropped. transformers calls `packed_attention` by the name `NAME` and hands our `layout` argument through.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "schoolhouse"
PADDING = 0.2
"""The share of a group's longest example by which the shortest may fall behind it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Examples of one micro-batch that are attended to in one call."""

    index: torch.Tensor
    """i64[E, T]: the place in the sequence of each example's tokens; padding repeats the last one."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a micro-batch is cut into groups; built once, used by every layer."""

    groups: tuple[Group, ...]
    back: torch.Tensor
    """i64[S]: where each token of the sequence stands among the groups' tokens, laid end to end."""


def register() -> None:
    """Make `packed_attention` known to transformers under `NAME`."""
    AttentionInterface.register(NAME, packed_attention)


def layout(boundaries: Sequence[int], device: torch.device) -> Layout:
    """Group the examples between `boundaries` (E + 1 offsets) by length."""
    spans = sorted(itertools.pairwise(boundaries), key=lambda span: span[0] - span[1])
    groups: list[list[tuple[int, int]]] = []
    for start, end in spans:
        if groups and end - start >= (1 - PADDING) * (groups[-1][0][1] - groups[-1][0][0]):
            groups[-1].append((start, end))
        else:
            groups.append([(start, end)])
    back = torch.empty(boundaries[-1], dtype=torch.int64)
    before, made = 0, []
    for members in groups:
        longest = members[0][1] - members[0][0]
        starts = torch.tensor([start for start, _ in members]).unsqueeze(1)
        lasts = torch.tensor([end - 1 for _, end in members]).unsqueeze(1)
        made.append(Group(torch.minimum(starts + torch.arange(longest), lasts).to(device)))
        for row, (start, end) in enumerate(members):
            first = before + row * longest
            back[start:end] = torch.arange(first, first + end - start)
        before += len(members) * longest
    return Layout(tuple(made), back.to(device))


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
    outputs = []
    for group in layout.groups:
        queries, keys, values = (_take(states, group.index) for states in (query, key, value))
        mask = _window(group.index.shape[1], sliding_window, query.device)
        if softcap is None and s_aux is None:
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
        else:
            attended = _explicit(queries, keys, values, mask, scaling, dropout, softcap, s_aux)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.back).unsqueeze(0), None


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """States [1, H, S, K] of a group's examples as [E, H, T, K]."""
    taken = states[0].transpose(0, 1).index_select(0, index.flatten())
    return taken.unflatten(0, index.shape).transpose(1, 2)


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask [T, T] of a sliding window, or None where plain causality says the same."""
    if sliding_window is None or sliding_window >= length:
        return None
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (distance >= 0) & (distance < sliding_window)


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None,
    dropout: float, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with its scores written out, for what PyTorch's function does not know."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() if mask is None else mask
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    shares = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(shares[..., :length], dropout) @ value

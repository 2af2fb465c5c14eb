"""Packed attention: each example of a micro-batch attends to itself alone, and no S x S mask is ever built.

Examples of about the same length are laid side by side (`layouts`); what the padding of their groups computes is
dropped. transformers calls `packed_attention` by the name `NAME` and hands our `layout` argument through. Images see
in both directions: `image_attention`, by the name `IMAGES`, lays those of one size side by side. On a CUDA device
`varlen` has kernels that need no groups.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from schoolhouse.model import attended, layouts, products, varlen
from schoolhouse.model.layouts import Group, Layout, from_groups, to_groups
from schoolhouse.model.varlen import Rule

NAME = "schoolhouse"
IMAGES = "schoolhouse_flash_images"
"""Of vision towers; transformers hands all images of a call at once only to names that hold "flash"."""
ROWS = 512
"""Queries that are looked at together, at least, where a mask is needed that grows with their number."""
SCORES = 1 << 26
"""The most scores that are written out at once."""

Masks = dict[int | None, torch.Tensor]
"""Of `Layout.masks`."""


def register() -> None:
    """Make both attentions known to transformers under their names."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(IMAGES, image_attention)


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
    states = [one.squeeze(0).transpose(0, 1) for one in (query, key, value)]  # `one[0]` would be copied in backward
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
    """Attention in both directions within each image between the offsets `cu_seq_lens_q` (or each window of one), which
    are in host memory (`features`): query, key and value [1, H, P, K] of P patches to [1, P, H, K]."""
    assert attention_mask is None and query.shape[0] == 1, "images stand behind one another"
    states = [one.squeeze(0).transpose(0, 1) for one in (query, key, value)]
    alike = _alike(tuple(cu_seq_lens_q.tolist()), query.device)
    return _attend(*states, alike, Rule(causal=False, scaling=scaling, dropout=dropout)).unsqueeze(0), None


@functools.lru_cache(maxsize=4)
def _alike(offsets: tuple[int, ...], device: torch.device) -> Layout:
    """Images in groups of one size: the same for every layer of a tower. Qwen2.5-VL's windows may be empty."""
    return layouts.layout(sorted(set(offsets)), device, padding=0.0)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, rule: Rule) -> torch.Tensor:
    """Attention of the whole sequence: query [S, H, K], key and value [S, H', K'] to [S, H, K']."""
    kernel = varlen.kernel(query, rule, layout.ends)
    if kernel is not None:
        if layout.spread is not None:
            key, value = (to_groups(one, layout.spread) for one in (key, value))
        return varlen.attend(kernel, query, key, value, layout.ends, rule)
    asked = [group.examples * len(group.queries) for group in layout.groups]
    seen = [group.examples * group.queries.stop for group in layout.groups]
    queries = to_groups(query, layout.queries).split(asked)
    keys, values = (to_groups(one, layout.keys).split(seen) for one in (key, value))
    outputs = []
    for group, *parts in zip(layout.groups, queries, keys, values, strict=True):
        states = (one.unflatten(0, (group.examples, -1)).transpose(1, 2) for one in parts)
        outputs.append(_of_group(*states, group, rule, layout.masks).transpose(1, 2).flatten(0, 1))
    return from_groups(torch.cat(outputs), layout.queries)


def _of_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, rule: Rule, masks: Masks
) -> torch.Tensor:
    """Attention of a group, queries [E, H, Q, K] to keys [E, H', T, K], so many queries at a time that memory grows
    with T, not Q x T (but for pairs that are together, which are marked one by one, and marks of rests of examples on
    an accelerator without kernels of any length).

    Behind a window, keys that none of these queries reaches are not looked at.
    """
    asked, together = group.queries, group.together
    window = rule.window if rule.window is not None and rule.window < asked.stop else None
    if not asked.start and window is None and not rule.written_out and (together is None or not rule.causal):
        return _looked_up(query, key, value, None, rule)
    rows, attend = len(asked), _masked
    if asked.start or (window is not None and rows > 2 * max(window, ROWS)):
        rows = min(rows, max(window or 0, ROWS))
    if rule.written_out:
        reach = asked.stop if window is None or together is not None else min(asked.stop, rows + window - 1)
        rows = min(rows, max(1, SCORES // (query.shape[0] * query.shape[1] * reach)))
        if rows < len(asked) and torch.is_grad_enabled():  # one part's scores at a time, in backward too
            attend = functools.partial(checkpoint, _masked, use_reentrant=False)
    outputs = []
    for first in range(asked.start, asked.stop, rows):
        queries = range(first, min(first + rows, asked.stop))
        keys = range(max(0, first - window + 1) if window else 0, queries.stop if together is None else asked.stop)
        part = query[:, :, first - asked.start : queries.stop - asked.start]
        states = (one[:, :, keys.start : keys.stop] for one in (key, value))
        outputs.append(attend(part, *states, queries, keys, window, together, rule, masks))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: range, keys: range, window: int | None,
    together: torch.Tensor | None, rule: Rule, masks: Masks,
) -> torch.Tensor:
    """Attention of these queries to these keys, each to those it sees."""
    if rule.written_out:
        return _written_out(query, key, value, _mask(queries, keys, window, together, query.device), rule)
    if together is None and query.device.type == "cpu":
        return _looked_up(query, key, value, _added(queries, keys, window, query, masks), rule)
    return _looked_up(query, key, value, _mask(queries, keys, window, together, query.device), rule)


def _added(queries: range, keys: range, window: int | None, query: torch.Tensor, masks: Masks) -> torch.Tensor:
    """What is added to the scores of these queries and keys, [Q, K]: 0, or minus infinity for what is not seen. The
    last of both is the same token, so that it is a corner of what was made for more of them."""
    asked, seen = len(queries), len(keys)
    found = masks.get(window)
    if found is None or found.shape[0] < asked or found.shape[1] < seen:
        most = (max(asked, 0 if found is None else len(found)), max(seen, 0 if found is None else found.shape[1]))
        mask = _mask(range(most[1] - most[0], most[1]), range(most[1]), window, None, query.device)
        accurate = torch.promote_types(query.dtype, torch.float32)
        found = masks[window] = torch.zeros(most, dtype=accurate).masked_fill_(~mask, -torch.inf)
    return found[len(found) - asked :, found.shape[1] - seen :]


def _looked_up(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rule: Rule
) -> torch.Tensor:
    """Attention by PyTorch's own function, which keeps the scores to itself."""
    causal, grouped = rule.causal and mask is None, query.shape[1] != key.shape[1]
    if grouped and not _serves_groups(query, key, value, mask, rule.dropout, causal):
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        grouped = False
    with attended.kernel(rule.dropout):
        return products.attend(
            query, key, value, mask, dropout_p=rule.dropout, scale=rule.scaling, is_causal=causal, enable_gqa=grouped
        )


def _serves_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float, causal: bool
) -> bool:
    """Whether a fused kernel takes several heads of queries for one of keys. On CUDA only FlashAttention does, which
    knows neither float32 nor masks; PyTorch would hold all scores instead, without a word."""
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    return can_use_flash_attention(SDPAParams(query, key, value, mask, dropout, causal, True))


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

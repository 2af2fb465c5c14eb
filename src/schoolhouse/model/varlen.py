"""Attention on a CUDA device in bfloat16, by kernels that take examples of any length end to end: nothing is padded.

FlashAttention (Dao, 2024, arXiv:2307.08691) by `torch.nn.attention.varlen` where a layer's rule is causal, with a
window or not, or where images see in both directions; FlexAttention (Dong et al., 2024, arXiv:2412.05496) where scores
are soft-capped, heads have sinks, or the tokens of an image see one another. A kernel is in force where it has shown,
on the device and before it is used, that its result and gradients are those of attention written out; else the groups
of `attention` are.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

BLOCK = 128
"""Queries and keys of a block of FlexAttention's mask."""
CLOSE = 0.05
"""The error of a kernel's results, as a share of the largest, above which it is not trusted: one rounding gives
1.4 %; a key too many in a window, which is the smallest fault there is, gave 9 % of the query's gradient."""
TRIALS = ((0, 70, 200), (0, 61, 301), (0, 1, 130, 435))
"""Examples that a kernel is tried with, of several lengths, since what is compiled for one may fail for the next."""

Kernel = Literal["varlen", "flex"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How the queries of a layer look at keys."""

    causal: bool = True
    window: int | None = None
    """The tokens a query reaches, itself included; None for all before it."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """[H]: a score for each head that takes its share and gives nothing."""
    scaling: float | None = None
    dropout: float = 0.0

    @property
    def written_out(self) -> bool:
        """Whether the scores themselves are needed, which PyTorch's own function keeps to itself."""
        return self.softcap is not None or self.sinks is not None


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the examples of a sequence of S tokens end, as kernels want to know it."""

    offsets: Tensor
    """i32[E + 1] on the device."""
    longest: int
    """Tokens of the longest example."""
    boundaries: tuple[int, ...]
    """The same offsets."""
    runs: Tensor | None = None
    """i64[S] on the CPU: the run of visual tokens that see one another each token belongs to, from 1; 0 for text."""
    masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """FlexAttention's masks that were made so far, by window."""


def ends(boundaries: Sequence[int], device: torch.device, runs: Tensor | None = None) -> Ends:
    """The ends of the examples between `boundaries` (E + 1 offsets), on a device."""
    longest = max(end - start for start, end in itertools.pairwise(boundaries))
    offsets = torch.tensor(boundaries, dtype=torch.int32).to(device, non_blocking=True)
    return Ends(offsets, longest, tuple(boundaries), runs)


def kernel(query: Tensor, value: Tensor, rule: Rule, ends: Ends | None) -> Kernel | None:
    """The kernel that computes this attention; None where the groups do. Query [S, H, K], value [S, H', K']."""
    if ends is None or query.dtype != torch.bfloat16 or rule.dropout:
        return None
    sizes = query.shape[-1], value.shape[-1]
    chosen: Kernel = "flex" if rule.written_out or (rule.causal and ends.runs is not None) else "varlen"
    if chosen == "varlen" and (sizes[0] != sizes[1] or sizes[0] % 8 or sizes[0] > 256):
        return None
    return None if untrusted(chosen, query.device) else chosen


def attend(chosen: Kernel, query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """Attention within each example: query [S, H, K], key [S, H', K], value [S, H', K'] to [S, H, K']."""
    return (_by_varlen if chosen == "varlen" else _by_flex)(query, key, value, ends, rule)


def describe(place: torch.device, precision: str, written_out: bool) -> str:
    """How a model attends on a device, for the table of what is in force."""
    if place.type != "cuda" or precision != "bfloat16":
        return "in groups of like length"
    chosen: Kernel = "flex" if written_out else "varlen"
    name = {"varlen": "FlashAttention of any length", "flex": "FlexAttention"}[chosen]
    why = untrusted(chosen, place)
    return f"in groups of like length ({name} does not serve here: {why:.120})" if why else f"by {name}"


@functools.lru_cache(maxsize=16)
def untrusted(chosen: Kernel, place: torch.device) -> str:
    """Why a kernel cannot be used on a device; empty where its results and gradients are right."""
    rule = Rule(window=50)
    if chosen == "flex":
        rule = Rule(window=50, softcap=20.0, sinks=torch.linspace(-1, 1, 4, device=place))
    errors = []
    try:
        for boundaries in TRIALS:
            found, wanted = _trial(chosen, rule, boundaries, place)
            errors += [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if all(error < CLOSE for error in errors):  # NaN is not
        return ""
    return f"its results are off by {max(errors):.0%}"


def _trial(
    chosen: Kernel, rule: Rule, boundaries: tuple[int, ...], place: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """A kernel's result and gradients for examples between `boundaries`, and those of attention written out."""
    both, tokens = [], boundaries[-1]
    waves = torch.arange(tokens * 4 * 64, device=place, dtype=torch.float32).view(tokens, 4, 64)
    drawn = ((0.37, 4), (0.91, 2), (1.73, 2), (0.59, 4))
    states = [waves.mul(step).sin()[:, :heads].bfloat16() for step, heads in drawn]
    for way in (attend, _written_out):
        leaves = [one.detach().requires_grad_() for one in states[:3]]
        with torch.enable_grad():
            out = way(chosen, *leaves, ends(boundaries, place), rule)
        both.append([out.detach(), *torch.autograd.grad(out, leaves, states[3].to(out.dtype))])
    return both[0], [one.float() for one in both[1]]


def _written_out(_: Kernel, query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """What `attend` computes, from all S x S scores."""
    query, key, value = (one.float().transpose(0, 1) for one in (query, key, value))
    repeats = len(query) // len(key)
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    places = torch.arange(scores.shape[-1], device=scores.device)
    seen = _sight(ends, rule.window, scores.device)(0, 0, places[:, None], places[None])
    scores = scores.masked_fill(~seen, -math.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(-1, 1, 1).expand(*scores.shape[:2], 1)], -1)
    return (scores.softmax(-1)[..., : len(places)] @ value).transpose(0, 1)


# --- the kernels ------------------------------------------------------------------------------------------------------


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """FlashAttention; a layer whose window holds every example has none."""
    window = (-1, -1)
    if rule.causal:
        window = (-1 if rule.window is None or rule.window >= ends.longest else rule.window - 1, 0)
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), ends.offsets, ends.offsets, ends.longest,
        ends.longest, scale=rule.scaling, window_size=window, **_grouped(query.shape[1] != key.shape[1]),
    )


def _grouped(heads_differ: bool) -> dict[str, bool]:
    """What newer releases of PyTorch want to be told about grouped heads; the kernel always knew them."""
    return {"enable_gqa": heads_differ} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _by_flex(query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """FlexAttention. A sink takes its share of the softmax: sigmoid(log-sum-exp - sink) of the result is left."""
    window = None if rule.window is None or rule.window >= ends.longest else rule.window
    if window not in ends.masks:
        ends.masks[window] = _blocks(ends, window, query.device)
    states = [one.transpose(0, 1).unsqueeze(0) for one in (query, key, value)]
    attended = _flex(query.device.type)(
        *states, score_mod=None if rule.softcap is None else _cap(rule.softcap), block_mask=ends.masks[window],
        scale=rule.scaling, enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True),
    )
    out, total = attended[0], attended[1].lse
    if rule.sinks is not None:
        out = out * torch.sigmoid(total - rule.sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
    return out.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=2)
def _flex(kind: str) -> Callable:
    """FlexAttention, compiled where it is a kernel."""
    return torch.compile(flex_attention) if kind == "cuda" else flex_attention


@functools.lru_cache(maxsize=8)
def _cap(softcap: float) -> Callable:
    """Scores as soft-capping leaves them; the same function for the same number, so that it is compiled once."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _sight(ends: Ends, window: int | None, place: torch.device) -> Callable:
    """Whether a query sees a key, by their places in the sequence."""
    lengths = torch.tensor(ends.boundaries).diff()
    starts = torch.tensor(ends.boundaries[:-1]).repeat_interleave(lengths).to(place)
    runs = None if ends.runs is None else ends.runs.to(place)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (key >= starts[query])
        if runs is not None:
            seen = seen | ((runs[query] == runs[key]) & (runs[query] > 0))
        return seen if window is None else seen & (query - key < window)

    return sees


def _blocks(ends: Ends, window: int | None, place: torch.device) -> BlockMask:
    """The mask of a sequence: which blocks of keys each block of queries looks at, and which of them it sees whole."""
    tokens = ends.boundaries[-1]
    starts = np.repeat(ends.boundaries[:-1], np.diff(ends.boundaries))
    last = np.arange(tokens)
    if ends.runs is not None:
        runs = ends.runs.numpy()
        of_run = np.zeros(runs.max() + 1, np.int64)
        np.maximum.at(of_run, runs, np.arange(tokens))
        last = np.where(runs > 0, of_run[runs], last)
    first_query = np.arange(0, tokens, BLOCK)
    last_query = np.minimum(first_query + BLOCK, tokens) - 1
    reach = 0 if window is None else window - 1
    lowest = starts[first_query] if window is None else np.maximum(starts[first_query], first_query - reach)
    highest = np.maximum.reduceat(last, first_query)
    key = first_query[None]
    looked_at = (key + BLOCK > lowest[:, None]) & (key <= highest[:, None])
    whole = (last_query[None] <= first_query[:, None]) & (key >= starts[last_query][:, None])
    if window is not None:
        whole &= last_query[:, None] - key <= reach
    parts = (*_listed(looked_at & ~whole, place), *_listed(looked_at & whole, place))
    return BlockMask.from_kv_blocks(
        *parts, BLOCK_SIZE=BLOCK, mask_mod=_sight(ends, window, place), seq_lengths=(tokens, tokens)
    )


def _listed(chosen: np.ndarray, place: torch.device) -> tuple[Tensor, Tensor]:
    """Of bool[blocks of queries, blocks of keys]: how many are chosen i32[1, 1, Q], and which first i32[1, 1, Q, K]."""
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(1, dtype=np.int32)
    return torch.from_numpy(counts)[None, None].to(place), torch.from_numpy(order)[None, None].to(place)

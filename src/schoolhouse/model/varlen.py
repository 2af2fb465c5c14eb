"""Attention on a CUDA device in bfloat16, by kernels that take examples of any length end to end: nothing is padded.

FlashAttention (Dao, 2024, arXiv:2307.08691) by `torch.nn.attention.varlen` for causal layers, with a window or not;
FlexAttention (Dong et al., 2024, arXiv:2412.05496), where gradients are wanted, for scores that are soft-capped, heads
with sinks, and tokens of an image that see one another. A kernel is in force where it has shown, on the device, with
the model's own heads and before the first step, that its result and gradients are those of attention written out; else
the groups of `attention` are.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from schoolhouse import crossing
from schoolhouse.model import attended, families
from schoolhouse.parallel.mesh import Mesh

BLOCK = 128
"""Queries and keys of a block of FlexAttention's mask."""
CLOSE = 0.05
"""The error of a kernel's results, as a share of the largest, above which it is not trusted: one rounding gives
1.4 %; a key too many in a window, which is the smallest fault there is, gave 9 % of the query's gradient."""
TRIALS = ((0, 70, 200), (0, 61, 301), (0, 1, 130, 835))
"""Examples that a kernel is tried with, of several lengths, since what is compiled for one may fail for the next: some
end within a block, one holds whole ones."""
RESTS = ((0, 30), (61, 0), (0, 120, 0))
"""The first tokens of each of these examples that ask nothing, as if they were computed in another."""
SCALES = (0.7, 1.0, 1.3)
"""What the scores of each of these examples are multiplied with, over the square root of a head's size: PyTorch
compiles FlexAttention anew for the second number, as an argument, and keeps this for all others."""
GROUPS = "in groups of like length"

Kernel = Literal["varlen", "flex"]
NAMES: Mapping[Kernel, str] = {"varlen": "FlashAttention of any length", "flex": "FlexAttention"}


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
class Kernels:
    """The kernels that may serve a model."""

    trusted: frozenset[Kernel] = frozenset()
    said: str = GROUPS
    """How the model attends, and why not otherwise: for the table of what is in force."""
    whole: str = ""
    """Why they have to be given each example whole; empty where not."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a layer, as one process has them."""

    queries: int
    keys: int
    size: int
    """Of a query and a key."""
    values: int
    """Of a value."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the examples of a sequence of S tokens end, as kernels want to know it."""

    offsets: Tensor
    """i32[E + 1] on the device: of the keys of each example."""
    longest: int
    """Tokens of the longest example."""
    boundaries: tuple[int, ...]
    """The same offsets."""
    asking: Tensor
    """i32[E + 1] on the device: of the tokens of each example that ask, its last ones."""
    most_asking: int
    """Their number in the example that has most."""
    runs: Tensor | None = None
    """i64[S] on the CPU: the run of visual tokens that see one another each token belongs to, from 1; 0 for text."""
    trusted: frozenset[Kernel] = frozenset()
    masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """FlexAttention's masks that were made so far, by window."""


def ends(
    boundaries: Sequence[int], device: torch.device, runs: Tensor | None = None,
    trusted: frozenset[Kernel] = frozenset(), begins: Sequence[int] | None = None,
) -> Ends:
    """The ends of the examples between `boundaries` (E + 1 offsets), on a device; the first `begins` tokens of each ask
    nothing, where that is given."""
    lengths = np.diff(boundaries)
    offsets = crossing.sent(torch.tensor(boundaries, dtype=torch.int32), device)
    asking, asked = offsets, lengths
    if begins is not None:
        asked = lengths - np.asarray(begins)
        asking = crossing.sent(torch.from_numpy(np.append(0, asked.cumsum()).astype(np.int32)), device)
    return Ends(offsets, int(lengths.max()), tuple(boundaries), asking, int(asked.max()), runs, trusted)


def kernel(query: Tensor, rule: Rule, ends: Ends | None) -> Kernel | None:
    """The kernel that computes this causal attention of query [S, H, K]; None where the groups do."""
    if ends is None or query.dtype != torch.bfloat16 or rule.dropout:
        return None
    chosen: Kernel = "flex" if rule.written_out or ends.runs is not None else "varlen"
    if chosen == "flex" and (not torch.is_grad_enabled() or len(query) < BLOCK):
        return None  # each would be compiled once more, and PyTorch compiles a function eight times
    return chosen if chosen in ends.trusted else None


def attend(chosen: Kernel, query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """Causal attention within each example: query [Q, H, K], key [S, H', K], value [S, H', K'] to [Q, H, K']."""
    return (_by_varlen if chosen == "varlen" else _by_flex)(query, key, value, ends, rule)


# --- which are trusted ------------------------------------------------------------------------------------------------


def kernels(model: PreTrainedModel, place: torch.device, precision: str, mesh: Mesh, together: bool) -> Kernels:
    """The kernels that serve a model on a device: all processes of the mesh must find them right. `together` says that
    tokens of an image see one another."""
    if place.type != "cuda" or precision != "bfloat16":
        return Kernels()
    settings = families.settings_of(model.config)
    heads, softcap = heads_of(settings, mesh.ulysses), settings.get(families.ATTENTION_SOFTCAP)
    if heads is None:
        return Kernels()
    unfit = _unfit(heads, settings)
    if unfit:
        return Kernels(said=f"{GROUPS} ({unfit})")
    sinks = settings["model_type"] in families.SINKS
    wanted: list[Kernel] = ["flex"] if softcap or sinks else ["varlen", "flex"] if together else ["varlen"]
    found, said, whole = set(), [], "FlexAttention takes each example whole" if "flex" in wanted else ""
    for one in wanted:
        tried = functools.partial(fault, one, heads, softcap if one == "flex" else None, sinks, together, place)
        why = tried()
        if mesh.any(bool(why)):
            said.append(f"{GROUPS} ({NAMES[one]} does not serve here: {(why or 'on another process'):.120})")
        else:
            found.add(one)
            said.append(f"by {NAMES[one]}{' where a pack has images' if len(wanted) > 1 and one == 'flex' else ''}")
            if one == "varlen" and mesh.any(bool(why := tried(rests=True))):
                whole = f"{NAMES[one]} does not serve the rest of an example here: {(why or 'on another process'):.120}"
    return Kernels(frozenset(found), ", ".join(said), whole if found else "")


def heads_of(settings: Mapping[str, Any], ulysses: int = 1) -> Heads | None:
    """The heads by a model's configuration, of which Ulysses gives each of so many processes a part; None of one that
    does not attend (Mamba 2)."""
    queries = settings.get("num_attention_heads")
    if not queries:
        return None
    size = settings.get("head_dim") or settings["hidden_size"] // queries
    if "qk_nope_head_dim" in settings:
        size = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
    keys = settings.get("num_key_value_heads") or queries
    return Heads(queries // ulysses, max(1, keys // ulysses), size, settings.get("v_head_dim") or size)


def _unfit(heads: Heads, settings: Mapping[str, Any]) -> str:
    """Why no kernel serves such heads; empty where one may."""
    if settings.get("attention_dropout"):
        return "attention has dropout"
    if heads.size != heads.values or heads.size % 8 or not 16 <= heads.size <= 256:
        return f"heads of {heads.size} and {heads.values}"
    return ""


@functools.lru_cache(maxsize=16)
def fault(
    chosen: Kernel, heads: Heads, softcap: float | None, sinks: bool, together: bool, place: torch.device,
    rests: bool = False,
) -> str:
    """What is wrong with a kernel for such heads on a device, given whole examples or `rests` of them; empty where its
    results and gradients are right."""
    errors = []
    try:
        trials = zip(TRIALS, RESTS, SCALES, strict=True)
        for (boundaries, begins, scale), window in itertools.product(trials, (None, 50)):
            rule = Rule(
                window=window, softcap=softcap, scaling=scale * heads.size**-0.5,
                sinks=torch.linspace(-1, 1, heads.queries, device=place) if sinks and chosen == "flex" else None,
            )
            seen = _seen(boundaries, place, together and chosen == "flex", begins if rests else None)
            found, wanted = _trial(chosen, rule, heads, seen, place)
            errors += [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, ImportError, OSError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if all(error < CLOSE for error in errors):  # NaN is not
        return ""
    return f"its results are off by {max(errors):.0%}"


def _seen(
    boundaries: tuple[int, ...], place: torch.device, together: bool, begins: tuple[int, ...] | None
) -> Ends:
    """The examples of a trial; with an image in the last one."""
    runs = torch.zeros(boundaries[-1], dtype=torch.int64)
    runs[boundaries[-2] + 5 : boundaries[-2] + 75] = 1
    return ends(boundaries, place, runs if together else None, begins=begins)


def _trial(
    chosen: Kernel, rule: Rule, heads: Heads, ends: Ends, place: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """A kernel's result and gradients for some examples, and those of attention written out."""
    both, tokens, own = [], ends.boundaries[-1], _asking(ends)
    waves = torch.arange(tokens * heads.queries * heads.size, device=place, dtype=torch.float32)
    drawn = ((0.37, heads.queries), (0.91, heads.keys), (1.73, heads.keys), (0.59, heads.queries))
    waves = waves.view(tokens, heads.queries, heads.size)
    states = [waves.mul(step).sin()[:, :number].bfloat16() for step, number in drawn]
    for way in (attend, _written_out):
        leaves = [one.detach().requires_grad_() for one in (states[0][own], *states[1:3])]
        with torch.enable_grad():
            out = way(chosen, *leaves, ends, rule)
        both.append([out.detach(), *torch.autograd.grad(out, leaves, states[3][own].to(out.dtype))])
    return both[0], [one.float() for one in both[1]]


def _asking(ends: Ends) -> Tensor:
    """i64[Q]: the tokens that ask, among all S."""
    counts = ends.asking.diff().tolist()
    return torch.cat([torch.arange(end - count, end) for end, count in zip(ends.boundaries[1:], counts, strict=True)])


def _written_out(_: Kernel, query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """What `attend` computes, from all Q x S scores."""
    query, key, value = (one.float().transpose(0, 1) for one in (query, key, value))
    repeats = len(query) // len(key)
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = query @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    places = torch.arange(scores.shape[-1], device=scores.device)
    seen = _sight(ends, rule.window, scores.device)(0, 0, _asking(ends).to(scores.device)[:, None], places[None])
    scores = scores.masked_fill(~seen, -math.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(-1, 1, 1).expand(*scores.shape[:2], 1)], -1)
    return (scores.softmax(-1)[..., : len(places)] @ value).transpose(0, 1)


# --- the kernels ------------------------------------------------------------------------------------------------------


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, ends: Ends, rule: Rule) -> Tensor:
    """FlashAttention; a layer whose window holds every example has none. Of fewer queries than keys, the last query
    stands at the last key."""
    window = (-1 if rule.window is None or rule.window >= ends.longest else rule.window - 1, 0)
    with attended.kernel():
        return varlen_attn(
            query.contiguous(), key.contiguous(), value.contiguous(), ends.asking, ends.offsets, ends.most_asking,
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
    found = _flex(query.device.type)(
        *states, score_mod=None if rule.softcap is None else _cap(rule.softcap, query.device),
        block_mask=ends.masks[window], scale=rule.scaling, enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    out, total = found[0], found[1].lse
    if rule.sinks is not None:
        out = out * torch.sigmoid(total - rule.sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
    return out.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=2)
def _flex(kind: str) -> Callable:
    """FlexAttention, compiled where it is a kernel; as a whole or not at all, since what PyTorch leaves uncompiled
    makes all S x S scores."""
    return torch.compile(flex_attention, fullgraph=True) if kind == "cuda" else flex_attention


@functools.lru_cache(maxsize=8)
def _cap(softcap: float, place: torch.device) -> Callable:
    """Scores as soft-capping leaves them. The number is a tensor: a float that is not the one compiled first is traced
    as a symbol, which FlexAttention's operator does not know."""
    limit = torch.tensor(softcap, device=place)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return capped


def _sight(ends: Ends, window: int | None, place: torch.device) -> Callable:
    """Whether a query sees a key, by their places in the sequence. All that varies is in tensors, so that one compiled
    function serves every pack and layer."""
    lengths, tokens = torch.tensor(ends.boundaries).diff(), ends.boundaries[-1]
    starts = crossing.sent(torch.tensor(ends.boundaries[:-1]).repeat_interleave(lengths), place)
    runs = crossing.sent(torch.zeros(tokens, dtype=torch.int64) if ends.runs is None else ends.runs, place)
    reach = crossing.sent(torch.tensor(tokens if window is None else window), place)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (query >= key) & (key >= starts[query])
        image = (runs[query] == runs[key]) & (runs[query] > 0)
        return (own | image) & (query - key < reach)

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
    counted, listed = (crossing.sent(torch.from_numpy(one)[None, None], place) for one in (counts, order))
    return counted, listed

"""The gated delta rule (Yang et al., 2024, arXiv:2412.06464) by chunks, in plain PyTorch, in time linear in the length.

    S <- exp(g) S + beta k (v - exp(g) S^T k)^T        out = S^T q / sqrt(K)

transformers' own writes results chunk by chunk into one tensor and reads its operands in the same way, so that its
backward fills a whole tensor for each chunk. Here chunks are taken apart once, and what does not need the state of the
one before is one product for all of them. It stands in for transformers' where no kernel does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from schoolhouse.model.chunks import backwards, chunk_of, cut, left

SMALL = 1e-6
"""What is added to the square of a length by which a vector is divided."""
MARGIN = 0.02
"""A decay is nothing below so much of its format's precision: 2e-9 in float32, beside the 1 of a token itself. What
fades further ends, product by product, below the least number that a processor computes with at its speed."""


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: None = None, **_: object,
) -> tuple[Tensor, None]:
    """Query and key [E, T, H', K], value [E, T, H, V], logarithms of decay `g` and `beta` [E, T, H], to [E, T, H, V],
    from no state; computed in float32, `chunk_size` tokens at a time or fewer. The second is the last state, which
    nobody asks for in training."""
    assert initial_state is None and cu_seqlens is None and not output_final_state, "an example begins with nothing"
    examples, tokens, heads = value.shape[:3]
    repeats, chunk_size = heads // key.shape[2], chunk_of(tokens, chunk_size)
    query, key = (one.repeat_interleave(repeats, 2) if repeats > 1 else one for one in (query, key))
    q, k, v = (_chunks(one, chunk_size) for one in (query, key, value))
    decay, share = (_chunks(one.unsqueeze(-1), chunk_size) for one in (g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (one * torch.rsqrt((one * one).sum(-1, keepdim=True) + SMALL) for one in (q, k))
    q, decay = q * q.shape[-1] ** -0.5, decay.cumsum(2)
    nothing = _least(decay.dtype)
    between = left(backwards(decay - decay.mT), nothing)
    corrections = (k * share) @ k.mT * between
    within = q @ k.mT * between
    if len(q) == 1:
        out = within @ _Solved.apply(corrections, v * share, v.shape[-1])
    else:
        before = left(decay, nothing)
        sides = torch.cat([v * share, k * share * before], -1)
        new, read = _Solved.apply(corrections, sides, v.shape[-1]).split([v.shape[-1], k.shape[-1]], -1)
        out = _scanned(within, q * before, k * left(decay[:, :, -1:] - decay, nothing), before[:, :, -1:], new, read)
    out = out.unflatten(1, (examples, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return out[:, :tokens].to(query.dtype), None


def _chunks(states: Tensor, size: int) -> Tensor:
    """[E, T, H, K] as chunks [C, E x H, size, K] in float32."""
    return cut(states.to(torch.float32), size).flatten(1, 2)


def _least(dtype: torch.dtype) -> float:
    """What is nothing beside 1."""
    return torch.finfo(dtype).eps * MARGIN


class _Solved(torch.autograd.Function):
    """Each token's own change, where what the tokens before it in its chunk changed is taken away: X of
    (1 + strictly lower triangle of `corrections`) X = sides, of which the columns from `decaying` on decay."""

    @staticmethod
    def forward(ctx, corrections: Tensor, sides: Tensor, decaying: int) -> Tensor:
        found = torch.linalg.solve_triangular(corrections, sides, upper=False, unitriangular=True)
        fading = found[..., decaying:]
        if fading.numel():
            fading.copy_(F.hardshrink(fading, _least(found.dtype)))
        ctx.save_for_backward(corrections, found)
        return found

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, Tensor, None]:
        corrections, found = ctx.saved_tensors
        sides = torch.linalg.solve_triangular(corrections.mT, above, upper=True, unitriangular=True)
        return (sides @ found.mT).tril_(-1).neg_(), sides, None


def _scanned(within: Tensor, queries: Tensor, keys: Tensor, fades: Tensor, new: Tensor, read: Tensor) -> Tensor:
    """The results [C, B, size, V] of all chunks, one state [B, K, V] after another."""
    written, states, state = [], [], None
    parts = zip(keys.mT.unbind(0), fades.unbind(0), new.unbind(0), read.unbind(0), strict=True)
    for one, (key, fade, values, reads) in enumerate(parts, 1):
        if state is not None:
            states.append(state)
            values = torch.baddbmm(values, reads, state, alpha=-1)
        written.append(values)
        if one < len(new):
            state = key @ values if state is None else torch.baddbmm(state * fade, key, values)
    out = within @ torch.stack(written)
    return torch.cat([out[:1], out[1:] + queries[1:] @ torch.stack(states)])

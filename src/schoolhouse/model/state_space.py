"""Mamba 2's scan (Dao and Gu, 2024, arXiv:2405.21060) by chunks, in plain PyTorch, in time linear in the length.

    S <- exp(dt A) S + dt B x^T        out = S^T C + D x

transformers' own sums the states of all pairs of chunks, of which there are quadratically many, and keeps several
matrices of all pairs of tokens of its large chunks for each head. Here one state follows another, chunks are small, and
what heads of a group have in common is multiplied once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from schoolhouse.model.chunks import backwards, chunk_of, cut, left

MOST = {"cpu": 64}
MOST_ELSEWHERE = 128
"""The most tokens of a chunk: with more, pairs of them cost more than the states of fewer chunks save. One state
follows another, so that an accelerator, which begins each operation anew, is given fewer (not measured)."""


def chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf), return_final_states: bool = False, z: None = None,
    seq_idx: None = None, cu_seqlens: None = None, **_: object,
) -> Tensor:
    """States [E, T, H, P], their steps `dt` [E, T, H], decays `A` [H], what is written, `B`, and read, `C`, by groups
    of heads [E, T, G, N], and what passes by, `D` [H], to f32[E, T, H, P], from no state."""
    assert initial_states is z is seq_idx is cu_seqlens is None and not return_final_states, "examples are apart"
    tokens, heads, width = hidden_states.shape[1:]
    groups, size = B.shape[2], chunk_of(tokens, min(MOST.get(dt.device.type, MOST_ELSEWHERE), chunk_size))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt, states = dt.clamp(*dt_limit).float(), hidden_states.float()
    values = cut(states * dt.unsqueeze(-1), size).unflatten(2, (groups, -1))
    keys, queries = (cut(one.float(), size) for one in (B, C))
    # sums of logarithms over a chunk are long, and what matters is how little two of them differ
    decay = cut((dt * A.float()).double().unsqueeze(-1), size).squeeze(-1).unflatten(2, (groups, -1)).cumsum(-1)
    between = _left(backwards(decay.unsqueeze(-1) - decay.unsqueeze(-2)))
    out = ((queries @ keys.mT).unsqueeze(3) * between) @ values
    if len(values) > 1:
        over = _left(decay[:-1, ..., -1:] - decay[:-1]).unsqueeze(-1)
        added = keys[:-1].mT @ (values[:-1] * over).transpose(3, 4).flatten(4)
        fades = _left(decay[:-1, ..., -1]).repeat_interleave(width, -1).unsqueeze(-2)
        read = (queries[1:] @ _carried(added, fades)).unflatten(-1, (-1, width)).transpose(3, 4)
        out = torch.cat([out[:1], torch.addcmul(out[1:], read, _left(decay[1:]).unsqueeze(-1))])
    out = out.permute(1, 0, 4, 2, 3, 5).reshape(len(states), -1, heads, width)[:, :tokens].contiguous()
    return out if D is None else torch.addcmul(out, states, D.unsqueeze(-1).float())


def _left(sums: Tensor) -> Tensor:
    """What decay leaves, by sums of its logarithms; some of what is written is far larger than what is beside it."""
    logarithms = sums.float()
    return left(logarithms, torch.finfo(logarithms.dtype).eps ** 2)


def _carried(added: Tensor, fades: Tensor) -> Tensor:
    """The states [C, …] behind each chunk, of what each adds, and what is left behind it of the one before."""
    first, *others = added.unbind(0)
    states = [first]
    for one, fade in zip(others, fades.unbind(0)[1:], strict=True):
        states.append(torch.addcmul(one, states[-1], fade))
    return torch.stack(states)

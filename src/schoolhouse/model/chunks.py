"""What rules that carry a state along a sequence have in common where they are computed a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 16
"""The fewest tokens of a chunk: Mamba's kernels take powers of two from here."""


def chunk_of(tokens: int, most: int) -> int:
    """How many tokens to compute at once, of so many and no more than `most`: a power of two where that is less, since
    many short examples would be filled up to `most` each."""
    return min(most, max(LEAST, 1 << (tokens - 1).bit_length()))


def cut(states: Tensor, size: int) -> Tensor:
    """[E, T, H, K] as chunks [C, E, H, size, K], the last one filled up with zeros."""
    filled = F.pad(states, (0, 0, 0, 0, 0, -states.shape[1] % size))
    return filled.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def backwards(logarithms: Tensor) -> Tensor:
    """Of what fades between two tokens of a chunk [..., size, size], that from those that are not behind it."""
    size = logarithms.shape[-1]
    behind = torch.ones(size, size, dtype=torch.bool, device=logarithms.device).triu(1)
    return logarithms.masked_fill(behind, -torch.inf)


def left(logarithms: Tensor, least: float) -> Tensor:
    """What decay leaves; nothing below the least, since what fades further and further ends in numbers with which a
    processor computes many times slower."""
    return logarithms.masked_fill(logarithms < math.log(least), -torch.inf).exp()

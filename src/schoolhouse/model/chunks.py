"""What rules that carry a state along a sequence have in common where they are computed a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 16
"""The fewest tokens of a chunk: Mamba's kernels take powers of two from here."""


def chunk_of(tokens: int, most: int) -> int:
    """How many tokens to compute at once, of so many and no more than `most`: a power of two where that is less, since
    many short examples would be filled up to `most` each."""
    return min(most, max(LEAST, 1 << (tokens - 1).bit_length()))


def left(logarithms: Tensor, least: float) -> Tensor:
    """What decay leaves; nothing below the least, since what fades further and further ends in numbers with which a
    processor computes many times slower."""
    return logarithms.masked_fill(logarithms < math.log(least), -torch.inf).exp()

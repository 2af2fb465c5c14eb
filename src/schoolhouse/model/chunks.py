"""What rules that carry a state along a sequence have in common where they are computed a chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 16
"""The fewest tokens of a chunk: Mamba's kernels take powers of two from here."""
MARGIN = 0.02
"""A decay is nothing below so much of its format's precision: 2e-9 in float32, beside the 1 of a token itself. What
fades further ends, product by product, below the least number that a processor computes with at its speed, and is then
many times slower."""


def chunk_of(tokens: int, most: int) -> int:
    """How many tokens to compute at once, of so many and no more than `most`: a power of two where that is less, since
    many short examples would be filled up to `most` each."""
    return min(most, max(LEAST, 1 << (tokens - 1).bit_length()))


def least(dtype: torch.dtype) -> float:
    """What is nothing beside 1."""
    return torch.finfo(dtype).eps * MARGIN


def left(logarithms: Tensor) -> Tensor:
    """What decay leaves."""
    return logarithms.masked_fill(logarithms < math.log(least(logarithms.dtype)), -torch.inf).exp()

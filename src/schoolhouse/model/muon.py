"""Muon: the momentum of a matrix is replaced by the nearest matrix whose directions are all of one length.

Jordan et al., 2024, kellerjordan.github.io/posts/muon; the length is AdamW's usual step, 0.2 by value (Liu et al.,
2025, arXiv:2502.16982). The same update as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, which cannot take
matrices that are cut over processes.

Of cut matrices every process keeps its rows of weights and momentum. They are taken in rounds of as many matrices as
there are processes, those of one size together: each process is handed one whole matrix, and hands its rows of the
result back to all. So every matrix is computed once, and a process holds one whole matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that brings singular values between about 0.7 and 1.2, from 0 fastest (Jordan et al.)."""
ITERATIONS = 5
SMALLEST = 1e-7
"""The least norm that a matrix is divided by."""
STEP = 0.2
"""The root mean square of AdamW's update, to which the update of a matrix is scaled."""


class Muon(torch.optim.Optimizer):
    """torch's optimizer of that name, with Nesterov's momentum, for matrices that may be cut over processes."""

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient: on every process the same ones."""
        moved = [(one, group) for group in self.param_groups for one in group["params"] if one.grad is not None]
        moved.sort(key=lambda pair: -pair[0].numel())  # the matrices of a round then cost about the same
        at_once = dist.get_world_size() if any(isinstance(one, DTensor) for one, _ in moved) else 1
        for start in range(0, len(moved), at_once):
            members = moved[start : start + at_once]
            updates = [self._momentum(one, group["momentum"]) for one, group in members]
            for (one, group), update in zip(members, _all([one for one, _ in members], updates), strict=True):
                own, rate = _own(one), group["lr"]
                own.mul_(1 - rate * group["weight_decay"])
                own.add_(update.to(own.device), alpha=-rate * STEP * math.sqrt(max(one.shape)))

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """This process's rows of the gradient, moved towards the mean of those before, of which it becomes a part."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        own, mean = _own(matrix.grad), _own(state["momentum_buffer"])
        return own.lerp(mean.lerp_(own, 1 - momentum), momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """[A, B]: about U V^T where the matrix is U S V^T, by five Newton-Schulz steps.

    In bfloat16 on an accelerator, as Jordan et al. do; on a CPU, where that is slower, in the matrix's own numbers.
    """
    a, b, c = COEFFICIENTS
    numbers = _numbers(matrix, matrix.device)
    found = numbers.mT if matrix.shape[0] > matrix.shape[1] else numbers
    found = found / found.norm().clamp(min=SMALLEST)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = torch.addmm(found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if matrix.shape[0] > matrix.shape[1] else found


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _numbers(tensor: Tensor, place: torch.device) -> Tensor:
    """A tensor on `place` in the number format that is computed with there."""
    return tensor.to(place) if place.type == "cpu" else tensor.to(place, torch.bfloat16)


def _all(matrices: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each update; of cut matrices, at most one a process, this process's rows of the result."""
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [orthogonal(one) for one in updates]
    place, parts = torch.device(first.device_mesh.device_type), first.device_mesh.shape[-1]
    rank, world = dist.get_rank(), dist.get_world_size()
    own = [_numbers(one, place) for one in updates]
    height, width = matrices[rank].shape if rank < len(matrices) else (0, 0)
    rows = _rows(height, parts)
    near = [other // parts == rank // parts for other in range(world)]  # replicas hold the same rows: one set is enough
    there = [one if is_near else one[:0] for one, is_near in zip(own, near, strict=False)]
    whole = _exchanged(there, [rows[other % parts] * width * near[other] for other in range(world)])
    result = orthogonal(whole.view(height, width)).split(rows) if height else [whole] * parts
    back = _exchanged(result * (world // parts), [one.numel() for one in own])
    return [part.view(one.shape) for part, one in zip(back.split([one.numel() for one in own]), own, strict=True)]


def _exchanged(given: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The values that come when each process sends its `given[rank]` to `rank`; `sizes` of them come from each."""
    none = [0] * dist.get_world_size()
    sent = [one.numel() for one in given]
    values = torch.cat([one.flatten() for one in given])
    found = values.new_empty(sum(sizes))
    dist.all_to_all_single(found, values, [*sizes, *none[len(sizes) :]], [*sent, *none[len(sent) :]])
    return found


def _rows(total: int, parts: int) -> list[int]:
    """How many of `total` rows each part holds, as FSDP2 cuts them: equally many, the last parts fewer or none."""
    size = -(-total // parts)
    return [max(0, min(size, total - part * size)) for part in range(parts)]

"""Muon: the momentum of a matrix is replaced by the nearest matrix whose directions are all of one length.

Jordan et al., 2024, kellerjordan.github.io/posts/muon; the length is AdamW's usual step, 0.2 by value (Liu et al.,
2025, arXiv:2502.16982). The same update as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, which cannot take
matrices that are cut over processes.

Of cut matrices every process keeps its rows of weights and momentum. They are taken in rounds, the largest first: each
process is handed some whole matrices, as much to compute as any other, and hands back everybody's rows of the results.
So every matrix is computed once, in few exchanges, and a process holds whole what fits a round. Those of one shape are
computed together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from schoolhouse.parallel.fsdp import own_part
from schoolhouse.shares import share_out

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that brings singular values between about 0.7 and 1.2, from 0 fastest (Jordan et al.)."""
ITERATIONS = 5
SMALLEST = 1e-7
"""The least norm that a matrix is divided by."""
STEP = 0.2
"""The root mean square of AdamW's update, to which the update of a matrix is scaled."""
ROUND = 1 << 24
"""Numbers of the whole matrices that a process holds in a round; one matrix may have more."""


class Muon(torch.optim.Optimizer):
    """torch's optimizer of that name, with Nesterov's momentum, for matrices that may be cut over processes."""

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient: on every process the same ones."""
        moved = [(one, group) for group in self.param_groups for one in group["params"] if one.grad is not None]
        moved.sort(key=lambda pair: (-pair[0].numel(), tuple(pair[0].shape)))
        for members in _rounds(moved):
            updates = [self._momentum(one, group["momentum"]) for one, group in members]
            for (one, group), update in zip(members, _all([one for one, _ in members], updates), strict=True):
                own, rate = own_part(one), group["lr"]
                own.mul_(1 - rate * group["weight_decay"])
                own.add_(update.to(own.device), alpha=-rate * STEP * math.sqrt(max(one.shape)))

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """This process's rows of the gradient, moved towards the mean of those before, of which it becomes a part."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        own, mean = own_part(matrix.grad), own_part(state["momentum_buffer"])
        return own.lerp(mean.lerp_(own, 1 - momentum), momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """[M, A, B]: of each matrix about U V^T where it is U S V^T, by five Newton-Schulz steps.

    In bfloat16 on an accelerator, as Jordan et al. do; on a CPU, where that is slower, in the matrices' own numbers.
    """
    a, b, c = COEFFICIENTS
    numbers = _numbers(matrices, matrices.device)
    found = numbers.mT if matrices.shape[1] > matrices.shape[2] else numbers
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if matrices.shape[1] > matrices.shape[2] else found


def _rounds(moved: Sequence[tuple[Tensor, dict]]) -> Iterator[Sequence[tuple[Tensor, dict]]]:
    """The matrices of each round: as many as fit, and of cut ones at least one for each process."""
    world = dist.get_world_size() if any(isinstance(one, DTensor) for one, _ in moved) else 1
    start, held = 0, 0
    for place, (one, _) in enumerate(moved):
        if place - start >= world and held + one.numel() > world * ROUND:
            yield moved[start:place]
            start, held = place, 0
        held += one.numel()
    if moved:
        yield moved[start:]


def _each(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each matrix, those of one shape that follow one another together."""
    alike = (list(some) for _, some in groupby(matrices, lambda one: one.shape))
    return [one for some in alike for one in orthogonal(torch.stack(some))]


def _numbers(tensor: Tensor, place: torch.device) -> Tensor:
    """A tensor on `place` in the number format that is computed with there."""
    return tensor.to(place) if place.type == "cpu" else tensor.to(place, torch.bfloat16)


def _all(matrices: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each update; of cut matrices, this process's rows of the results."""
    first = matrices[0]
    if not isinstance(first, DTensor):
        return _each(updates)
    place, parts = torch.device(first.device_mesh.device_type), first.device_mesh.shape[-1]
    rank, everyone = dist.get_rank(), range(dist.get_world_size())
    own = [_numbers(one, place) for one in updates]
    rows = [_rows(one.shape[0], parts) for one in matrices]
    taken = share_out([one.numel() * min(one.shape) for one in matrices], len(everyone))
    mine = [matrices[index] for index in taken[rank]]
    near = [other // parts == rank // parts for other in everyone]  # replicas hold the same rows: one set is enough
    came = _exchanged(
        [[own[index] for index in taken[other]] if near[other] else [] for other in everyone],
        [[rows[index][other % parts] * matrices[index].shape[1] for index in taken[rank]] if near[other] else []
         for other in everyone], own[0],
    )
    whole = [torch.cat(pieces).view(one.shape) for one, *pieces in zip(mine, *filter(None, came), strict=True)]
    results = [one.split(rows[index]) for index, one in zip(taken[rank], _each(whole), strict=True)]
    back = _exchanged(
        [[one[other % parts] for one in results] for other in everyone],
        [[own[index].numel() for index in taken[other]] for other in everyone], own[0],
    )
    found = dict(zip(chain(*taken), chain(*back), strict=True))
    return [found[index].view(one.shape) for index, one in enumerate(own)]


def _exchanged(given: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], like: Tensor) -> list[list[Tensor]]:
    """The tensors that come, flat and of `sizes`, from each process when each sends `given[rank]` to `rank`."""
    values = torch.cat([like.new_empty(0), *(one.flatten() for some in given for one in some)])
    sent, expected = [sum(one.numel() for one in some) for some in given], [sum(some) for some in sizes]
    found = values.new_empty(sum(expected))
    dist.all_to_all_single(found, values, expected, sent)
    return [list(part.split(some)) if some else [] for part, some in zip(found.split(expected), sizes, strict=True)]


def _rows(total: int, parts: int) -> list[int]:
    """How many of `total` rows each part holds, as FSDP2 cuts them: equally many, the last parts fewer or none."""
    size = -(-total // parts)
    return [max(0, min(size, total - part * size)) for part in range(parts)]

"""Weights cut over processes (FSDP2; Zhao et al., 2023, arXiv:2304.11277), gradients added by SUM."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def expect(student: nn.Module, *, last: bool) -> None:
    """Say whether the next backward is the step's last: only then is the gradient added over the replicas."""
    if isinstance(student, FSDPModule):
        student.set_requires_all_reduce(last)

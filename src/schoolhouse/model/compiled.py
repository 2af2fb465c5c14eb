"""Blocks compiled by torch.compile (Ansel et al., 2024): element-wise operations fused, for any length of a sequence.

Compiled is what a block computes where gradients are wanted; proofs, validation and written answers run as they did.
Attention is left out, since its groups are others in each micro-batch, and everything between two blocks is. What
PyTorch compiled for one block serves all that are built alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from schoolhouse.errors import ConfigError
from schoolhouse.parallel import fsdp


def compile_blocks(model: nn.Module, place: torch.device, backend: str = "inductor") -> int:
    """Have every block of `model` compiled when it is first trained; how many there are.

    Raises ConfigError where nothing would be compiled, or this machine cannot.
    """
    blocks = fsdp.blocks(model)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no blocks to compile", required="a model of layers in a list",
            where="model.compile", remedy="set model.compile=false",
        )
    _try(place)
    for block in blocks:
        block.forward = _where_trained(block.forward, backend)
    return len(blocks)


def _where_trained(forward: Callable, backend: str) -> Callable:
    """A block's forward, compiled for where gradients are computed."""
    fast = torch.compile(forward, dynamic=True, backend=backend)

    @functools.wraps(forward)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either


def _try(place: torch.device) -> None:
    """Compile a small function; raises ConfigError where that cannot be done."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(lambda one: (one * torch.sigmoid(one)).sum(), dynamic=True)(torch.ones(8, 4, device=place))
    except (TorchDynamoException, RuntimeError, OSError) as error:
        told = " ".join(str(error).partition("Set TORCHDYNAMO")[0].split())
        raise ConfigError(
            f"torch.compile does not work here: {told:.200}",
            required="a C++ compiler (CPU) or Triton (GPU) that PyTorch finds", where="model.compile",
            remedy="install one, e.g. g++, or set model.compile=false",
        ) from None

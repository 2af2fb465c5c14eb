"""AdamW whose moments are kept in 8 bits (Dettmers et al., 2021, arXiv:2110.02861), by torchao, as an extra.

Tensors of at least 4,096 values in whole blocks of 256 have a byte for each moment and a float32 scale for each block,
2.03 bytes a weight for both moments instead of 8; smaller ones stay in float32. torchao compiles the update, which
needs a C++ compiler on a CPU and Triton on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schoolhouse.errors import ConfigError

BLOCK, SMALLEST = 256, 4096
"""Values that share a scale, and of the smallest tensor that is narrowed."""
PAIRS = {"exp_avg": True, "exp_avg_sq": False}
"""The moments that are kept in 8 bits, and whether they have a sign."""


def bytes_of(count: int) -> float:
    """Memory of one moment of a tensor of so many values."""
    return count * (1 + 4 / BLOCK) if count >= SMALLEST and count % BLOCK == 0 else 4.0 * count


def adamw(groups: list[dict], **settings: Any) -> torch.optim.Optimizer:
    """torchao's optimizer; raises ConfigError where it is not there, cannot compile, or would narrow nothing."""
    if find_spec("torchao") is None:
        raise ConfigError(
            "optim.name=adamw8bit, and torchao is not installed", required="the extra `schoolhouse[adamw8bit]`",
            where="optim.name", remedy="pip install 'schoolhouse[adamw8bit]', or set optim.name=adamw",
        )
    tensors = [one for group in groups for one in group["params"]]
    if any(isinstance(one, DTensor) for one in tensors):
        raise ConfigError(
            "optim.name=adamw8bit with weights that are cut over processes", required="one process: blocks of 256 "
            "values would be cut in another way by another number of processes", where="optim.name",
            remedy="set optim.name=adamw, or train with one process",
        )
    from torchao.optim import AdamW8bit

    made = AdamW8bit(groups, **settings)
    if not any(isinstance(made._new_buffer(one, signed=True), _state()) for one in tensors):
        raise ConfigError(
            "optim.name=adamw8bit would narrow no tensor", required="a tensor of 4,096 values in blocks of 256",
            where="optim.name", remedy="set optim.name=adamw: these tensors are too small to save memory",
        )
    return made


def step(optimizer: torch.optim.Optimizer) -> None:
    """One update; raises ConfigError where it cannot be compiled on this machine."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        optimizer.step()
    except TorchDynamoException as error:
        raise ConfigError(
            f"torchao's update does not compile here: {str(error).splitlines()[0]:.160}",
            required="a C++ compiler (CPU) or Triton (GPU) that torch.compile finds", where="optim.name=adamw8bit",
            remedy="install one (g++), or set optim.name=adamw",
        ) from None


def apart(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's state of a parameter as plain tensors by name: bytes and scales where it is kept in 8 bits."""
    for name, value in state.items():
        if type(value) in (Tensor, torch.nn.Parameter, DTensor):
            yield name, value
        else:
            yield f"{name}_codes", value.codes
            yield f"{name}_scale", value.scale


def together(name: str, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 8-bit moments of the parameter `name` from plain tensors by `moment.parameter`; empty where it has none."""
    found = {}
    for moment, signed in PAIRS.items():
        codes = moments.get(f"{moment}_codes.{name}")
        if codes is not None:
            zeros = _state().zeros(codes.shape, signed, device=codes.device, dtype=torch.float32)
            zeros.codes.copy_(codes)
            zeros.scale.copy_(moments[f"{moment}_scale.{name}"])
            found[moment] = zeros
    return found


def _state() -> type[Tensor]:
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit

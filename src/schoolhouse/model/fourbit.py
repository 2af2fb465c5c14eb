"""QLoRA (Dettmers et al., 2023, arXiv:2305.14314): frozen matrices beside adapters in 4 bits (NF4), by torchao.

A block of 64 weights keeps 16 levels and one scale, and scales are kept in 8 bits: 0.52 bytes a weight. Matrix products
run in the model's precision on weights that are widened when they are needed.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from schoolhouse.errors import ConfigError
from schoolhouse.model import lora

BLOCK, SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own."""
BYTES = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * SCALES)
"""Of a weight: its level, and its part of the scales."""


def narrow(model: PreTrainedModel, place: torch.device) -> int:
    """Put the frozen matrices beside the adapters into 4 bits, one at a time on `place`; how many. Raises ConfigError
    where torchao is missing or a matrix cannot be cut into blocks."""
    refuse(model)
    beside = [one for one in lora.adapted(model) if not one.embedding]
    for one in beside:
        layer = model.get_submodule(one.module).get_base_layer()
        layer.weight = nn.Parameter(_four_bits(layer.weight.detach().to(place), one.tensor), requires_grad=False)
    return len(beside)


def refuse(model: PreTrainedModel) -> None:
    """Raise ConfigError where torchao is missing, or has no 4-bit format for what the adapters stand beside."""
    if find_spec("torchao") is None:
        raise ConfigError(
            "lora.base=nf4, and torchao is not installed", required="the extra `schoolhouse[qlora]`",
            where="lora.base", remedy="pip install 'schoolhouse[qlora]', or leave lora.base out",
        )
    if any(one.ndim == 3 and ".experts." in name for name, one in model.named_parameters()):
        raise ConfigError(
            "lora.base=nf4 for a mixture whose experts are stacked", where="lora.base",
            required="linear layers: torchao's 4-bit format has no stacks of matrices", remedy="leave lora.base out",
        )


def rounded(weight: Tensor) -> Tensor:
    """A matrix as its 4 bits say it, in float32."""
    return _four_bits(weight, "").to(torch.float32)


@torch.no_grad()
def round_base(model: PreTrainedModel) -> None:
    """Give the matrices beside the adapters the values that their 4 bits have, in their own format."""
    for one in lora.adapted(model):
        if not one.embedding:
            weight = model.get_submodule(one.module).get_base_layer().weight
            weight.copy_(rounded(weight))


def describe(model: nn.Module) -> str:
    """What is kept in 4 bits, for the table of what is in force; empty where nothing is."""
    narrow = matrices(model)
    if not narrow:
        return ""
    held, whole = (size / 2**20 for size in (sum(map(bytes_of, narrow)), 4 * sum(one.numel() for one in narrow)))
    return f"; {len(narrow)} of them in 4 bits (NF4), whole in each process: {held:.1f} MiB for {whole:.1f}"


def matrices(model: nn.Module) -> set[nn.Parameter]:
    """The frozen matrices that are kept in 4 bits."""
    return {one for one in model.parameters() if is_narrow(one) and not one.requires_grad}


def bytes_of(weight: Tensor) -> int:
    """Memory of a matrix in 4 bits, scales included."""
    names, _ = weight.__tensor_flatten__()
    return sum(vars(weight)[name].nbytes for name in names)


def is_narrow(weight: Tensor) -> bool:
    """Whether a parameter is kept in another format than torch's own; a part of one that is cut is not."""
    return type(weight.data) not in (Tensor, DTensor)


def _four_bits(weight: Tensor, name: str) -> Tensor:
    from torchao.quantization import to_nf4

    blocks, left = divmod(weight.numel(), BLOCK)
    if left:
        raise ConfigError(
            f"{name} has {weight.numel()} weights, which are no whole blocks of {BLOCK}", where="lora.base",
            required=f"matrices of a multiple of {BLOCK} weights", remedy="leave lora.base out",
        )
    # in float32 whatever it is stored in, so that files in bfloat16 and their float32 copies have the same 4 bits
    return to_nf4(weight.float().contiguous(), BLOCK, math.gcd(blocks, SCALES))

"""Matrix products of the blocks in float8 (Micikevicius et al., 2022, arXiv:2209.05433), by torchao, as an extra on
CUDA: in force, or refused.

Every row of an operand has a scale of its own, and a weight's gradient, which sums over the rows of all examples, stays
a product of bfloat16: so examples of a pack stay independent of one another. Products are float8 where gradients are
wanted; proofs, validation and written answers multiply as they did. Weights, their masters and gradients keep their
formats.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib.util import find_spec

import torch
from torch import nn

from schoolhouse.errors import ConfigError
from schoolhouse.model.blocks import where_trained
from schoolhouse.parallel import fsdp

CAPABILITY = (8, 9)
"""The first compute capability of CUDA with products of float8."""
ALIGNED = 16
"""Rows and columns of a matrix must be a multiple of this."""
ROUTERS = ("gate", "router")
"""Names of layers that choose experts: rounded so, they would choose others than where the model is used."""
CLOSE = 0.1
"""The error of a float8 product that is right, as a share of the largest: its 3 bits round a number by up to 6 %."""


def narrow(model: nn.Module, place: torch.device, emulate: bool = False) -> int:
    """Let the linear layers of the blocks of `model` multiply in float8 where they are trained on `place`; how many.

    `emulate` computes what float8 would give in wider numbers, on any device. Raises ConfigError where nothing would
    be in float8, or a trial fails.
    """
    if not emulate:
        _refuse(place)
    from torchao.float8 import convert_to_float8_training

    before = [one for block in fsdp.blocks(model) for name, one in block.named_modules() if _fits(one, name)]
    if not before:
        raise _refusal(f"no linear layer in the blocks of {type(model).__name__} has sides of multiples of {ALIGNED}")
    _try(place, emulate)
    for block in fsdp.blocks(model):
        convert_to_float8_training(block, module_filter_fn=_fits, config=_how(emulate))
        for layer in block.modules():
            if _is_float8(layer):
                layer.forward = where_trained(layer.forward, functools.partial(nn.Linear.forward, layer))
    return len(before)


def _fits(module: nn.Module, name: str) -> bool:
    if type(module) is not nn.Linear or name.rpartition(".")[2] in ROUTERS:
        return False
    return not module.in_features % ALIGNED and not module.out_features % ALIGNED


def _is_float8(module: nn.Module) -> bool:
    from torchao.float8.float8_linear import Float8Linear

    return isinstance(module, Float8Linear)


def _how(emulate: bool):
    """torchao's recipe of a scale for every row and weights' gradients in the higher precision."""
    from torchao.float8 import Float8LinearConfig

    return dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)


def _refuse(place: torch.device) -> None:
    """Raise ConfigError where a device has no float8, or torchao is not there."""
    if place.type != "cuda":
        raise _refusal(f"the device is {place}")
    able = torch.cuda.get_device_capability(place)
    if able < CAPABILITY:
        raise _refusal(f"the device's compute capability is {able[0]}.{able[1]}")
    if find_spec("torchao") is None:
        raise _refusal("torchao is not installed")


def _refusal(found: str) -> ConfigError:
    return ConfigError(
        f"model.float8 is set, and {found}",
        required="a CUDA device of compute capability 8.9 (Ada, Hopper) and the extra `schoolhouse[float8]`",
        where="model.float8", remedy="pip install 'schoolhouse[float8]' on such a machine, or set model.float8=false",
    )


def _try(place: torch.device, emulate: bool) -> None:
    """Multiply once, forward and backward, a number of tokens that is no multiple of 16; raises ConfigError where that
    fails or gives something else than bfloat16 does."""
    from torchao.float8.float8_linear import Float8Linear

    waves = torch.arange(37 * 64, device=place, dtype=torch.float32).view(37, 64)
    plain = nn.Linear(64, 32, bias=False, device=place, dtype=torch.bfloat16)
    results = []
    try:
        for layer in (plain, Float8Linear.from_float(plain, _how(emulate))):
            states = waves.mul(0.37).sin().bfloat16().requires_grad_()
            with torch.enable_grad():
                out = layer(states)
                results.append([out, *torch.autograd.grad(out, [states, layer.weight], out.detach())])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _refusal(f"a trial failed: {' '.join(str(error).split())[:200]}") from None
    worst = max(float((one - other).abs().max() / one.abs().max()) for one, other in zip(*results, strict=True))
    if not worst < CLOSE:
        raise _refusal(f"a trial's results are off by {worst:.0%}")

"""LoRA's adapters in fewer passes over what is as wide as a layer.

    y = W x + b + B (scale A x)

PEFT makes B A x, multiplies it by the scale and adds it: three passes over matrices as wide as the result, and one more
in backward. Here the scale meets what is as narrow as the rank, and the product with B is added where W x + b stands;
in backward so is the product with A. A result is rounded once less than PEFT's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schoolhouse.model import products


def is_plain(kind: type[nn.Module]) -> bool:
    """Whether a class is PEFT's adapted linear layer; nothing loads PEFT where there are no adapters."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and kind is peft.Linear


def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of such a layer, on states [..., I]; by PEFT's own where it does more than stands above, or in other formats."""
    name = _alone(self)
    if name is None or x.ndim < 2 or args or kwargs:
        return type(self).__base__.forward(self, x, *args, **kwargs)
    base, first, second = self.base_layer, self.lora_A[name], self.lora_B[name]
    numbers = {one.dtype for one in (x, base.weight, first.weight, second.weight)}
    learns = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    plain = type(base) is nn.Linear and first.bias is None and second.bias is None
    if learns or not plain or len(numbers) > 1 or products.widens(x):
        return type(self).__base__.forward(self, x)
    dropout = self.lora_dropout[name]
    met = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
    return _Adapted.apply(x, met, base.weight, base.bias, first.weight, second.weight, self.scaling[name])


def _alone(layer: nn.Module) -> str | None:
    """The name of the one adapter in force; None where there are more or none, or it is another kind than LoRA."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    return name if name in layer.lora_A and name not in layer.lora_variant else None


class _Adapted(torch.autograd.Function):
    """states [..., I] @ weight^T [I, O] + bias [O] + scale met [..., I] @ first^T [I, R] @ second^T [R, O]; the frozen
    weight may be in 4 bits. Without `met` the factors meet the states themselves."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, met: Tensor | None, weight: Tensor, bias: Tensor | None, first: Tensor,
        second: Tensor, scale: float,
    ) -> Tensor:
        met = states if met is None else met
        low = F.linear(met, first).mul_(scale).flatten(0, -2)
        result = F.linear(states, weight, bias)
        wide = result.view(-1, len(second))
        torch.addmm(wide, low, second.T, out=wide)
        ctx.save_for_backward(met, weight, first, second, low)
        ctx.scale, ctx.one = scale, met is states
        return result

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        met, weight, first, second, low = ctx.saved_tensors
        rows, needed = above.flatten(0, -2), ctx.needs_input_grad
        of_low = (rows @ second).mul_(ctx.scale)
        of_states = rows @ weight.to(rows.dtype) if needed[0] else None  # `to` widens 4 bits
        of_met = None
        if ctx.one and needed[0]:
            torch.addmm(of_states, of_low, first, out=of_states)
        elif needed[1]:
            of_met = (of_low @ first).view_as(met)
        of_first = of_low.T @ met.flatten(0, -2) if needed[4] else None
        of_second = rows.T @ low if needed[5] else None
        return None if of_states is None else of_states.view_as(met), of_met, None, None, of_first, of_second, None

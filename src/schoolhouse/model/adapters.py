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
from torch.autograd.function import once_differentiable

PEFT = "peft.tuners.lora.layer"
"""Nothing loads PEFT where there are no adapters."""


def suits(layer: nn.Module) -> bool:
    """Whether a part of a model is PEFT's adapted linear layer, and does no more than stands above."""
    if PEFT not in sys.modules or type(layer) is not sys.modules[PEFT].Linear or layer.lora_variant:
        return False
    return _only_multiply(layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values())


def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of such a layer, on states [..., I]; by PEFT's own where it does more by now, or in several formats."""
    name = None if args or kwargs else _alone(self)
    if name is None or not _agree(self, name, x):
        return sys.modules[PEFT].Linear.forward(self, x, *args, **kwargs)
    base, dropout = self.base_layer, self.lora_dropout[name]
    met = dropout(x) if dropout.training and not isinstance(dropout, nn.Identity) else None
    first, second = self.lora_A[name].weight, self.lora_B[name].weight
    return _Adapted.apply(x, met, base.weight, base.bias, first, second, self.scaling[name])


def _alone(layer: nn.Module) -> str | None:
    """The name of the one adapter in force; None where there are more or none, or it is another kind than LoRA."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    return name if name in layer.lora_A and name not in layer.lora_variant else None


def _agree(layer: nn.Module, name: str, states: Tensor) -> bool:
    """Whether states and the layer's matrices are of one format, the factors alone may learn, and nobody listens."""
    base, first, second = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if not _only_multiply(base, first, second):
        return False
    frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
    met = [one for one in (*frozen, first.weight, second.weight) if type(one.data) is Tensor]  # 4 bits are widened
    return states.ndim > 1 and all(one.dtype == states.dtype for one in met) \
        and not any(one.requires_grad for one in frozen) and not torch.is_autocast_enabled(states.device.type)


def _only_multiply(base: nn.Module, *factors: nn.Module) -> bool:
    """Whether all are plain, and the factors add nothing."""
    return all(map(_is_plain, (base, *factors))) and all(one.bias is None for one in factors)


def _is_plain(one: nn.Module) -> bool:
    """A linear layer that only multiplies, whose matrix may be used without it."""
    return type(one) is nn.Linear and "forward" not in vars(one) and not one._forward_hooks \
        and not one._forward_pre_hooks and not one._backward_hooks and not one._backward_pre_hooks


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
        result = F.linear(states.flatten(0, -2), weight, bias)
        torch.addmm(result, low, second.T, out=result)
        ctx.save_for_backward(met, weight, first, second, low)
        ctx.scale, ctx.one = scale, met is states
        return torch.ops.aten._unsafe_view(result, (*states.shape[:-1], len(second)))  # no view: it may be changed

    @staticmethod
    @once_differentiable
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

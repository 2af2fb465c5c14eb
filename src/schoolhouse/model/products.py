"""Matrix products and attention of bfloat16 where a processor does them faster in float32.

The product of two bfloat16 numbers is exact in float32, and both ways sum in float32: computed from wider copies, a
result is rounded once, at its end, as the processor's own bfloat16 product is. What linear layers keep for backward
stays narrow; PyTorch's attention keeps what it was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = torch.bfloat16
SHORT, IN_TILES = 512, 2048
"""Tokens up to which attention is faster in float32 on a processor that multiplies bfloat16, and on one that does it in
tiles (AMX)."""


def wide_is_faster(place: torch.device) -> bool:
    """Whether bfloat16 products of a device take longer than float32's."""
    return place.type == "cpu" and multiplies_float32_faster(torch.cpu.get_capabilities())


def multiplies_float32_faster(able: Mapping[str, Any]) -> bool:
    """The same of a processor, by `torch.cpu.get_capabilities()`; never of one that is not x86.

    Without AVX512-BF16 or AMX the products are emulated. Intel's processors with the first alone were measured at 0.55
    of their float32 rate; AMD's take half as many instructions as for float32.
    """
    if able["architecture"] != "x86_64" or able["amx_bf16"]:
        return False
    return not able["avx512_bf16"] or "Intel" in able["cpu_name"]


def fastest(place: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, linear layers and PyTorch's attention multiply in the faster of both number formats."""
    return Wide() if widened(place, precision) else contextlib.nullcontext()


def again(place: torch.device, precision: str) -> tuple[contextlib.AbstractContextManager[Any], ...]:
    """Around a block's forward and its repetition in backward, where modes of PyTorch are out of force."""
    return contextlib.nullcontext(), fastest(place, precision)


def describe(place: torch.device, precision: str) -> str:
    """The number formats of a run, for the table of what is in force."""
    if precision == "float32":
        return precision
    way = "; products of it by way of float32, which is faster here" if widened(place, precision) else ""
    return f"{precision}, masters and moments float32{way}"


def widened(place: torch.device, precision: str) -> bool:
    """Whether a run of this precision multiplies by way of float32."""
    return precision == "bfloat16" and wide_is_faster(place)


class Wide(TorchFunctionMode):
    """Linear layers and PyTorch's attention in bfloat16, by way of float32."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `function`, or what computes the same from wider copies."""
        if function is F.linear:
            function = _linear
        elif function is F.scaled_dot_product_attention:
            function = _attention
        return function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (_Linear.apply if input.dtype == NARROW else F.linear)(input, weight, bias)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest, **named) -> Tensor:
    if query.dtype != NARROW:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **named)
    mask = attn_mask.float() if attn_mask is not None and attn_mask.dtype == NARROW else attn_mask
    states = (one.float() for one in (query, key, value))
    return F.scaled_dot_product_attention(*states, mask, *rest, **named).to(NARROW)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """PyTorch's attention of query [E, H, T, K] in the faster of both number formats."""
    wider = query.dtype == NARROW and attends_wider(query.device, query.shape[2])
    return (_attention if wider else F.scaled_dot_product_attention)(query, key, value, mask, **how)


def attends_wider(place: torch.device, length: int) -> bool:
    """Whether attention of bfloat16 over so many tokens takes longer on a device than float32's.

    PyTorch's attention on a processor multiplies block by block, which pays in bfloat16 where blocks are large. On an
    AMD EPYC with AVX512-BF16, 200 tokens took 7.6 ms in bfloat16 and 6.1 ms in float32, 1,000 tokens 116 and 126 ms.
    And a kernel is made for each length that is met first: on an Intel Xeon with AMX lengths about 400 took 9.8 and
    3.7 ms, about 1,500 48 and 26, about 3,000 90 and 91, forward and backward of four heads.
    """
    if place.type != "cpu":
        return False
    able = torch.cpu.get_capabilities()
    short = able["architecture"] == "x86_64" and length <= (IN_TILES if able["amx_bf16"] else SHORT)
    return short or multiplies_float32_faster(able)


class _Linear(torch.autograd.Function):
    """states [..., I] @ weight [O, I]^T + bias [O]; all of them, and their gradients, in bfloat16."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)  # `to`, because `float` does not widen a matrix in 4 bits
        return F.linear(states.float(), weight.to(torch.float32), None if bias is None else bias.float()).to(NARROW)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (states, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        wide = above.flatten(0, -2).float()
        of_states = (wide @ weight.to(torch.float32)).to(NARROW).view_as(states) if needed[0] else None
        of_weight = (wide.T @ states.flatten(0, -2).float()).to(NARROW) if needed[1] else None
        return of_states, of_weight, wide.sum(0).to(NARROW) if needed[2] else None

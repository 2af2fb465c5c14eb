"""What stands between matrix products, in fewer passes and with less kept: norms, rotary positions, gates.

Forward gives transformers' own results, bit by bit. Backward of a norm is one formula instead of the chain of its
operations (as in Liger; Hsu et al., 2024, arXiv:2410.10989), summed in float32; a rotation's turns back. A gated layer
keeps what its gate and its other half were, and computes their activation and product again when backward asks: of the
four matrices that transformers keeps there, as wide as anything in a model, two remain.

A module is known by its code, not by its name: that of Llama's or Gemma's, instruction for instruction. Any other stays
as it is.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama

ROTATION = "apply_rotary_pos_emb"
"""What transformers calls the function that turns queries and keys."""


_whole: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether gated layers keep all that transformers keeps."""


def lighten(model: nn.Module) -> int:
    """Exchange the forward of every part of `model` that is known; how many there are."""
    found = 0
    for module in model.modules():
        forward = _forward(module)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            found += 1
    return found


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of `model` compute as transformers wrote them; not so a last feed-forward part that is told
    its targets (`last_block`), whose results are the same bits."""
    lighter = {module: vars(module).pop("forward") for module in model.modules() if _is_lighter(module)}
    try:
        yield
    finally:
        for module, forward in lighter.items():
            module.forward = forward


def lighter(model: nn.Module) -> list[str]:
    """Which kinds of parts of `model` have another forward than transformers'."""
    kinds = {_norm: "norms", _norm_of_gemma: "norms", _gated: "gates"}
    found = (module.forward.__func__ for module in model.modules() if _is_lighter(module))
    return sorted({kinds.get(forward, "rotations") for forward in found})


def _is_lighter(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    own = forward.__func__ if isinstance(forward, types.MethodType) else None
    turning = isinstance(own, types.FunctionType) and own.__globals__.get(ROTATION) is _turned
    return turning or own in (_norm, _norm_of_gemma, _gated)


def computed_again(forward: Callable) -> Callable:
    """A forward that is computed once more in backward, as a whole: gated layers inside leave that to it."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        before = _whole.set(True)
        try:
            return forward(*args, **kwargs)
        finally:
            _whole.reset(before)

    return whole


def _forward(module: nn.Module) -> Callable | None:
    """The lighter forward of a module; None where its own stays, as in one that was given another already."""
    own = type(module).forward
    if "forward" in vars(module) or not isinstance(own, types.FunctionType):
        return None
    if _same(own, llama.LlamaRMSNorm.forward):
        return _norm
    if _same(own, GemmaRMSNorm.forward) and _same(type(module)._norm, GemmaRMSNorm._norm):
        return _norm_of_gemma
    if _same(own, llama.LlamaMLP.forward):
        return _gated
    return _turning(own)


def _same(one: Callable, other: Callable) -> bool:
    """Whether two functions do the same, by their instructions, names and constants; what they say of it aside."""
    (code, *rest), (wanted, *others) = (
        (each.__code__, each.__doc__, each.__defaults__, each.__kwdefaults__) for each in (one, other))
    constants = [tuple(value for value in each.co_consts if value != said and value is not None)
                 for each, said in ((code, rest[0]), (wanted, others[0]))]
    return (code.co_code, code.co_names, *rest[1:]) == (wanted.co_code, wanted.co_names, *others[1:]) \
        and constants[0] == constants[1]


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return _Norm.apply(hidden_states, self.weight, self.variance_epsilon, False)


def _norm_of_gemma(self: nn.Module, x: Tensor) -> Tensor:
    return _Norm.apply(x, self.weight, self.eps, True)


class _Norm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467): states [..., D] over the root of their mean square, times
    weight [D], or 1 + weight where it is `centred` (Gemma, which rounds once, at the end)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float, centred: bool) -> Tensor:
        wide = states.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, weight, scale)
        ctx.centred = centred
        normed = wide * scale
        if centred:
            return normed.mul_(1.0 + weight.float()).to(states.dtype)
        normed = normed.to(states.dtype)
        return normed.mul_(weight) if weight.dtype == normed.dtype else weight * normed

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, weight, scale = ctx.saved_tensors
        number = torch.promote_types(above.dtype, scale.dtype)
        above, wide, scale, factor = (one.to(number) for one in (above, states, scale, weight))
        if ctx.centred:
            factor = 1.0 + factor
        products, of_states, of_weight = above * wide, None, None
        if ctx.needs_input_grad[1]:
            of_weight = torch.mv(products.reshape(-1, len(weight)).T, scale.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            along = (products @ factor).unsqueeze(-1).mul_(scale).mul_(scale).div_(-len(weight))
            of_states = torch.mul(above, factor, out=products).addcmul_(wide, along).mul_(scale).to(states.dtype)
        return of_states, of_weight, None, None


@functools.cache
def _turning(forward: Callable) -> Callable | None:
    """An attention's forward that turns queries and keys by `_turned`; None where it does so by another function than
    Llama's, or by none. What renames arguments of former versions around it is left out."""
    while (within := vars(forward).get("__wrapped__")) is not None:
        if forward.__globals__["__name__"] != "transformers.utils.deprecation":
            return None
        forward = within
    names = forward.__globals__
    own = names.get(ROTATION) if ROTATION in forward.__code__.co_names else None
    if not isinstance(own, types.FunctionType) or not _same(own, llama.apply_rotary_pos_emb) \
            or not _same(own.__globals__["rotate_half"], llama.rotate_half):
        return None
    made = types.FunctionType(
        forward.__code__, {**names, ROTATION: _turned}, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, S, K], turned by the angles [B, S, K] of their positions."""
    angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if {q.dtype, k.dtype, sin.dtype} != {cos.dtype} or cos.shape[-1] != q.shape[-1]:
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return _Turn.apply(q, *angles), _Turn.apply(k, *angles)


class _Turn(torch.autograd.Function):
    """Rotary positions (Su et al., 2021, arXiv:2104.09864) of states [B, H, S, K], whose halves are turned against each
    other. Angles have no gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, last), (cos, other_cos), (sin, other_sin) = (one.chunk(2, -1) for one in (states, cos, sin))
        turned = torch.empty_like(states)
        halves = turned.chunk(2, -1)
        torch.mul(first, cos, out=halves[0]).sub_(last * sin)
        torch.mul(last, other_cos, out=halves[1]).add_(first * other_sin)
        return turned

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (first, last), (cos, other_cos), (sin, other_sin) = (one.chunk(2, -1) for one in (above, *ctx.saved_tensors))
        turned = torch.empty_like(above)
        halves = turned.chunk(2, -1)
        torch.mul(first, cos, out=halves[0]).add_(last * other_sin)
        torch.mul(last, other_cos, out=halves[1]).sub_(first * sin)
        return turned, None, None


def _gated(self: nn.Module, x: Tensor) -> Tensor:
    gate, other = self.gate_proj(x), self.up_proj(x)
    if _whole.get() or not torch.is_grad_enabled():
        return self.down_proj(self.act_fn(gate) * other)
    again = _Again(self.act_fn, gate.detach(), other.detach())
    active = self.act_fn(gate)
    with again.instead_of(active, again.active):
        product = active * other
    del active
    with again.instead_of(product, again.product):
        return self.down_proj(product)


class _Again:
    """The activation of a gate and its product with the other half, made again of both when backward asks for them."""

    def __init__(self, act: Callable[[Tensor], Tensor], gate: Tensor, other: Tensor) -> None:
        self._act, self._gate, self._other = act, gate, other
        self._made: Tensor | None = None

    def instead_of(self, tensor: Tensor, make: Callable[[], Tensor]) -> saved_tensors_hooks:
        """Inside, what is saved for backward of `tensor`, which lives as long, is the way to make it."""
        storage, size = tensor.untyped_storage()._cdata, tensor.numel()  # not itself, which hooks would keep

        def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
            same = saved.untyped_storage()._cdata == storage and saved.numel() == size
            return (saved.shape, saved.stride()) if same else saved

        def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
            return kept if isinstance(kept, Tensor) else make().as_strided(*kept)

        return saved_tensors_hooks(pack, unpack)

    def active(self) -> Tensor:
        """The activation; handed out once where the product, of which backward asks first, has made it."""
        made, self._made = self._made, None
        return self._act(self._gate) if made is None else made

    def product(self) -> Tensor:
        self._made = self._act(self._gate)
        return self._made * self._other

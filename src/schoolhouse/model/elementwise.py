"""What stands between matrix products, in fewer passes and with less kept: norms, rotary positions, gates, adapters;
and patches of images, which are such a product themselves.

Forward gives transformers' own results, bit by bit, but for adapters (`adapters`) and patches. Backward of a norm is
one formula instead of the chain of its operations (as in Liger; Hsu et al., 2024, arXiv:2410.10989), summed in float32;
a rotation's turns back. A gated layer keeps what its gate and its other half were, and computes their activation and
product again when backward asks: of the four matrices that transformers keeps there, as wide as anything in a model,
two remain. A convolution that steps by its own size meets each value once: libraries for convolutions are several times
slower at that than those for products.

A module is known by its code, not by its name: that of Llama's or Gemma's, instruction for instruction. Any other stays
as it is.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2CLS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama

from schoolhouse.model import adapters

ROTATION = "apply_rotary_pos_emb"
"""What transformers calls the function that turns queries and keys; in vision towers with an end."""
OF_IMAGES = f"{ROTATION}_vision"
ACTIVATIONS = frozenset(one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values())
"""Classes of activations that give the same whenever they are asked."""

_whole: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether gated layers keep all that transformers keeps."""


def lighten(model: nn.Module, *, blocks: bool = True, adapted: bool = True) -> int:
    """Exchange the forward of every part of `model` that is known, of its `blocks` and of `adapted` layers, and of
    patches; how many there are.

    A part's class becomes one made of it, so that nothing refers to the part that it would not outlive.
    """
    found = 0
    for module in model.modules():
        if _takes_patches(module):
            forward = _patches
        elif adapted and adapters.suits(module):
            forward = adapters.forward
        else:
            forward = _forward(module) if blocks else None
        if forward is not None:
            module.__class__ = _made(type(module), forward)
            found += 1
    return found


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of `model` compute as transformers wrote them; not so a last feed-forward part that is told
    its targets (`last_block`), whose results are the same bits."""
    classes = {module: type(module) for module in model.modules() if _is_lighter(module)}
    for module, made in classes.items():
        module.__class__ = made.__base__
    try:
        with whole_convolutions():
            yield
    finally:
        for module, made in classes.items():
            module.__class__ = made


@contextlib.contextmanager
def whole_convolutions() -> Iterator[None]:
    """Inside, cuDNN convolves float32 as products are multiplied; by itself it rounds to TF32's ten bits."""
    narrow = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = narrow


def lighter(model: nn.Module) -> list[str]:
    """Which kinds of parts of `model` have another forward than transformers'."""
    kinds = {
        _norm: "norms", _norm_of_gemma: "norms", _gated: "gates", _patches: "patches", adapters.forward: "adapters",
    }
    found = (type(module).forward for module in model.modules() if _is_lighter(module))
    return sorted({kinds.get(forward, "rotations") for forward in found})


def computed_again(forward: Callable) -> Callable:
    """A forward that is computed once more in backward, as a whole: gated layers inside leave that to it."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        before = _whole.set(True)
        try:
            return forward(*args, **kwargs)
        finally:
            _whole.reset(before)

    return whole


def _is_lighter(module: nn.Module) -> bool:
    return type(module).__module__ == __name__


@functools.cache
def _made(kind: type[nn.Module], forward: Callable) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


def _forward(module: nn.Module) -> Callable | None:
    """The lighter forward of a module; None where its own stays, as in one that was given another already."""
    kind = type(module)
    if "forward" in vars(module) or _is_lighter(module) or not isinstance(kind.forward, types.FunctionType):
        return None
    if _same(kind.forward, llama.LlamaRMSNorm.forward):
        return _norm if module.weight.ndim == 1 else None
    if _same(kind.forward, GemmaRMSNorm.forward) and _same(kind._norm, GemmaRMSNorm._norm):
        return _norm_of_gemma if module.weight.ndim == 1 else None
    if _same(kind.forward, llama.LlamaMLP.forward):
        return _gated if type(module.act_fn) in ACTIVATIONS else None
    return _turning(kind.forward)


def _same(one: Callable, other: Callable) -> bool:
    """Whether two functions do the same, by their instructions, names and constants; what they say of it aside."""

    def parts(each: Callable) -> tuple:
        code = each.__code__
        constants = code.co_consts if each.__doc__ is None else (None, *code.co_consts[1:])
        return code.co_code, code.co_names, constants, each.__defaults__, each.__kwdefaults__

    return parts(one) == parts(other)


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
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, weight, scale = ctx.saved_tensors
        number = torch.promote_types(above.dtype, scale.dtype)
        above, wide, scale, factor = (one.to(number) for one in (above, states, scale, weight))
        if ctx.centred:
            factor = 1.0 + factor
        products, of_states, of_weight = above * wide, None, None
        if ctx.needs_input_grad[1]:
            of_weight = _over_rows(products, scale, quick=products.device.type == "cpu").to(weight.dtype)
        if ctx.needs_input_grad[0]:
            along = (products @ factor).unsqueeze(-1).mul_(scale).mul_(scale).div_(-len(weight))
            of_states = torch.mul(above, factor, out=products).addcmul_(wide, along).mul_(scale).to(states.dtype)
        return of_states, of_weight, None, None


def _over_rows(products: Tensor, scale: Tensor, *, quick: bool) -> Tensor:
    """The sum [D] over all rows of products [..., D] times their scales [..., 1]; `quick`: as a product with a vector,
    in a third of the time on a processor. A GPU's libraries may take the columns one by one there, of millions of rows
    (norms of queries)."""
    if quick:
        return torch.mv(products.reshape(-1, products.shape[-1]).T, scale.flatten())
    return (products * scale).flatten(0, -2).sum(0)


@functools.cache
def _turning(forward: Callable) -> Callable | None:
    """An attention's forward that turns queries and keys by `_turned`, or `_turned_in_images`; None where it does so by
    another function than Llama's or Qwen2-VL's, or by none. What stands around it, as what renames arguments of former
    versions, stays."""
    inner = vars(forward).get("__wrapped__")
    if inner is not None:
        made = _turning(inner)
        held = [] if made is None else [cell.cell_contents is inner for cell in forward.__closure__ or ()]
        if not any(held):
            return None
        cells = zip(held, forward.__closure__, strict=True)
        closure = tuple(types.CellType(made) if own else cell for own, cell in cells)
        return functools.update_wrapper(_copied(forward, forward.__globals__, closure), made)
    names, called = forward.__globals__, {ROTATION, OF_IMAGES} & {*forward.__code__.co_names}
    if len(called) != 1:
        return None
    (name,) = called
    own, (known, ours) = names.get(name), _known_turn(name)
    if not isinstance(own, types.FunctionType) or not _same(own, known) \
            or not _same(own.__globals__["rotate_half"], llama.rotate_half):
        return None
    return _copied(forward, {**names, name: ours}, forward.__closure__)


def _known_turn(name: str) -> tuple[Callable, Callable]:
    """transformers' function of this name that is known here, and ours."""
    if name == ROTATION:
        return llama.apply_rotary_pos_emb, _turned
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen  # where a model sees

    return qwen.apply_rotary_pos_emb_vision, _turned_in_images


def _copied(forward: Callable, names: dict[str, Any], closure: tuple | None) -> Callable:
    """The function again, with other global names and another closure."""
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, S, K], turned by the angles [B, S, K] of their positions; by transformers' own function
    where results are of another shape or format than they, or angles have a gradient."""
    angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    alike = {q.dtype, k.dtype, sin.dtype} == {cos.dtype} and not cos.requires_grad and not sin.requires_grad
    if not alike or any(torch.broadcast_shapes(one.shape, *(each.shape for each in angles)) != one.shape
                        or one.shape[-1] != each.shape[-1] for one in (q, k) for each in angles):
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    return _Turn.apply(q, *angles), _Turn.apply(k, *angles)


def _turned_in_images(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [P, H, K], turned in float32 by the angles [P, K] of their patches; by transformers' own
    function where angles have a gradient."""
    if cos.requires_grad or sin.requires_grad:
        return _known_turn(OF_IMAGES)[0](q, k, cos, sin)
    angles = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    turned = (_Turn.apply(one.float(), *angles).to(one.dtype) for one in (q, k))
    return next(turned), next(turned)


class _Turn(torch.autograd.Function):
    """Rotary positions (Su et al., 2021, arXiv:2104.09864) of states [..., K], whose halves are turned against each
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


def _takes_patches(module: nn.Module) -> bool:
    """Whether a module is a convolution that steps by its own size, of more than one value a channel."""
    if type(module) not in (nn.Conv2d, nn.Conv3d) or "forward" in vars(module) or math.prod(module.kernel_size) == 1:
        return False
    return module.stride == module.kernel_size and module.groups == 1 and {*module.dilation} == {1} \
        and (module.padding == "valid" or {*module.padding} == {0})


def _patches(self: nn.Conv2d | nn.Conv3d, input: Tensor) -> Tensor:  # by the name that transformers calls it with
    """Images [B, C, …] to the features [B, D, …] of their patches; what is left over beside them is not looked at."""
    size, dims = self.kernel_size, len(self.kernel_size)
    if input.ndim != dims + 2 or any(have < side for have, side in zip(input.shape[2:], size, strict=True)):
        return type(self).__base__.forward(self, input)
    for dim, side in enumerate(size, 2):
        input = input.narrow(dim, 0, input.shape[dim] // side * side)
    cut = input
    for dim, side in zip(range(2, 2 * dims + 2, 2), size, strict=True):
        cut = cut.unflatten(dim, (-1, side))
    cut = cut.permute(0, *range(2, 2 * dims + 2, 2), 1, *range(3, 2 * dims + 3, 2)).flatten(dims + 1)
    return nn.functional.linear(cut, self.weight.flatten(1), self.bias).movedim(-1, 1)


def _gated(self: nn.Module, x: Tensor) -> Tensor:
    gate, other = self.gate_proj(x), self.up_proj(x)
    if _whole.get() or not (gate.requires_grad and other.requires_grad):
        return self.down_proj(self.act_fn(gate) * other)
    again = _Again(self.act_fn, gate.detach(), other.detach())
    active = self.act_fn(gate)
    if again.changed:  # by an activation that takes the gate's place
        return self.down_proj(active * other)
    with again.instead_of(active, again.active):
        product = active * other
    del active
    with again.instead_of(product, again.product):
        return self.down_proj(product)


class _Again:
    """The activation of a gate and its product with the other half, made again of both when backward asks for them."""

    def __init__(self, act: Callable[[Tensor], Tensor], gate: Tensor, other: Tensor) -> None:
        self._act, self._gate, self._other = act, gate, other
        self._versions = gate._version, other._version
        self._made: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether gate or other half are not what they were: then neither is what would be made of them."""
        return (self._gate._version, self._other._version) != self._versions

    def instead_of(self, tensor: Tensor, make: Callable[[], Tensor]) -> saved_tensors_hooks:
        """Inside, in which `tensor` lives, what is saved of it for backward is the way to make it; all else is saved
        as autograd saves it, and may not be changed either."""
        own = _identity(tensor)  # not itself, which hooks would keep

        def pack(saved: Tensor) -> tuple[Tensor | None, Any]:
            if _identity(saved) == own:
                return None, (saved.shape, saved.stride())
            return (saved if saved.is_leaf else saved.detach()), saved._version  # not in a circle with what made it

        def unpack(kept: tuple[Tensor | None, Any]) -> Tensor:
            saved, known = kept
            if self.changed if saved is None else saved._version != known:
                raise RuntimeError("a tensor that backward needs was changed in place after forward")
            return make().as_strided(*known) if saved is None else saved

        return saved_tensors_hooks(pack, unpack)

    def active(self) -> Tensor:
        """The activation; the one that the product was made of, of which backward asks first, where there is one."""
        made, self._made = self._made, None
        return self._act(self._gate) if made is None else made

    def product(self) -> Tensor:
        """The product of activation and other half."""
        self._made = self._act(self._gate)
        return self._made * self._other


def _identity(tensor: Tensor) -> tuple:
    """What tells a tensor, or a view of all of it, from others that are there at the same time, or were before it was
    changed in place."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version

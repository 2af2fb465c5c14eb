"""What may be done to the blocks of a model: compiled, and computed again in backward instead of kept.

Compiled (torch.compile; Ansel et al., 2024) is what a block computes where gradients are wanted; proofs, validation and
written answers run as they did. Attention is left out, since its groups are others in each micro-batch, and so is
everything between two blocks. What was compiled for one block and one length serves all.

Computed again (Chen et al., 2016, arXiv:1604.06174) is all of a block, or, `selective`, all but its matrix products and
attention (Korthikanti et al., 2022, arXiv:2205.05198). A block's hooks, which gather its weights, run once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from schoolhouse.config import Model
from schoolhouse.errors import ConfigError
from schoolhouse.model import products
from schoolhouse.parallel import fsdp

Again = bool | Literal["selective"]

_ATEN = torch.ops.aten
_DEAR = [one.default for one in (
    _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN._grouped_mm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu, _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_efficient_attention, _ATEN._scaled_dot_product_cudnn_attention,
)]
"""PyTorch's operations whose results `selective` keeps: matrix products and attention."""


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
        block.forward = _where_trained(torch.compile(block.forward, dynamic=True, backend=backend), block.forward)
    return len(blocks)


def compute_again(
    model: nn.Module, precision: str = "float32", place: torch.device | None = None, *, selective: bool = False
) -> None:
    """Keep only the input of each block in forward, and where `selective` its dear results; backward computes the rest
    again, as on `place`, where it will."""
    contexts = functools.partial(_contexts, place or next(model.parameters()).device, precision, selective)
    for block in fsdp.blocks(model):
        kept = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
        block.forward = _where_trained(kept, block.forward)


def describe(settings: Model) -> str:
    """What is done to a model's blocks by these settings, each of which is in force or was refused."""
    again = {True: "computed again in backward", "selective": "computed again but for products and attention"}
    done = {
        "with Liger's kernels": settings.liger, "compiled where they are trained": settings.compile,
        again.get(settings.activation_checkpointing): settings.activation_checkpointing,
    }
    return ", ".join(what for what, wanted in done.items() if wanted) or "as transformers has them"


def _where_trained(forward: Callable, otherwise: Callable) -> Callable:
    """The one way where gradients are computed, else the other."""

    @functools.wraps(otherwise)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (forward if torch.is_grad_enabled() else otherwise)(*args, **kwargs)

    return either


def _contexts(place: torch.device, precision: str, selective: bool) -> tuple[contextlib.AbstractContextManager, ...]:
    """Around a block's forward, and around its repetition."""
    first, again = products.again(place, precision)
    if not selective:
        return first, again
    keep, use = create_selective_checkpoint_contexts(_DEAR)
    return _both(first, keep), _both(again, use)


@contextlib.contextmanager
def _both(outer: contextlib.AbstractContextManager, inner: contextlib.AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


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

"""What may be done to the blocks of a model: compiled, and computed again in backward instead of kept.

Compiled (torch.compile; Ansel et al., 2024) is what a block computes where gradients are wanted; proofs, validation and
written answers run as they did. Attention is left out, since its groups are others in each micro-batch, and so is
everything between two blocks. What was compiled for one block and one length serves all blocks that are built alike;
a part that PyTorch would have to compile more than eight times runs as it did.

Computed again (Chen et al., 2016, arXiv:1604.06174) is all of a block but its hooks, which gather its weights: they run
once. Where wanted, results of attention are kept (`attended`), or inputs of blocks lie in host memory (`offload`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schoolhouse.config import Model
from schoolhouse.errors import ConfigError
from schoolhouse.model import attended, elementwise, lora, products
from schoolhouse.model.offload import Offload
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
    if any(one.stack for one in lora.adapted(model)):
        raise ConfigError(
            "adapters of experts are not compiled: PEFT makes new modules of them in every forward",
            required="adapters of other layers", where="model.compile",
            remedy="set model.compile=false, or lora.experts=false",
        )
    _try(place, backend)
    for block in blocks:
        block.forward = where_trained(torch.compile(block.forward, dynamic=True, backend=backend), block.forward)
    return len(blocks)


def compute_again(
    model: nn.Module, precision: str = "float32", place: torch.device | None = None, *,
    keep_attention: bool = False, offload: Offload | None = None,
) -> None:
    """Keep only the input of each block in forward; backward computes the rest again, as on `place`, where it will.

    With `keep_attention` results of attention are kept, too; with `offload` inputs of blocks go to host memory.
    """
    contexts = functools.partial(products.again, place or next(model.parameters()).device, precision)
    for block in fsdp.blocks(model):
        kept = functools.partial(_computed_twice, block.forward, contexts, attended.twice if keep_attention else None)
        block.forward = where_trained(kept if offload is None else offload.around(kept), block.forward)


def _computed_twice(
    forward: Callable, contexts: Callable, twice: Callable[[Callable], Callable] | None, *args: Any, **kwargs: Any
) -> Any:
    once = forward if twice is None else twice(forward)
    return checkpoint(elementwise.computed_again(once), *args, use_reentrant=False, context_fn=contexts, **kwargs)


def describe(model: nn.Module, settings: Model) -> str:
    """What is done to a model's blocks by these settings, each of which is in force or was refused, and of itself."""
    lighter = elementwise.lighter(model)
    done = {
        f"{', '.join(lighter)} in fewer passes": bool(lighter),
        "with Liger's kernels": settings.liger, "multiplied in float8 where they are trained": settings.float8,
        "compiled where they are trained": settings.compile,
        "computed again in backward": settings.activation_checkpointing is True,
        "computed again in backward but for attention": settings.activation_checkpointing == "selective",
        "their inputs in host memory meanwhile": settings.activation_offload,
    }
    return ", ".join(what for what, wanted in done.items() if wanted) or "as transformers has them"


def where_trained(forward: Callable, otherwise: Callable) -> Callable:
    """The one way where gradients are computed, else the other."""

    @functools.wraps(otherwise)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (forward if torch.is_grad_enabled() else otherwise)(*args, **kwargs)

    return either


def _try(place: torch.device, backend: str) -> None:
    """Compile a small function; raises ConfigError where that cannot be done."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        trial = torch.compile(lambda one: (one * torch.sigmoid(one)).sum(), dynamic=True, backend=backend)
        trial(torch.ones(8, 4, device=place))
    except (TorchDynamoException, RuntimeError, OSError) as error:
        told = " ".join(str(error).partition("Set TORCHDYNAMO")[0].split())
        raise ConfigError(
            f"torch.compile does not work here: {told:.200}",
            required="a C++ compiler (CPU) or Triton (GPU) that PyTorch finds", where="model.compile",
            remedy="install one, e.g. g++, or set model.compile=false",
        ) from None

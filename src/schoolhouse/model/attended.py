"""Results of attention that blocks keep in forward, for a backward that computes everything else of them again.

The time of attention grows with the square of an example's length, its result with the length alone. Kept is what a
kernel of PyTorch returns: the result and one number for each query and head (selective activation checkpointing of
`torch.utils.checkpoint`). Nothing but the call of a kernel is looked at: other products may be kept by PyTorch too, but
models change some of them in place, and backward would then be given the changed ones. FlexAttention, and scores that
are written out, are computed again.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

KERNELS = frozenset((
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "torch_attn::_varlen_attn",
))

Around = Callable[[], contextlib.AbstractContextManager[Any]]

_around: ContextVar[Around] = ContextVar("around")


def kernel(dropout: float = 0.0) -> contextlib.AbstractContextManager[Any]:
    """Around the call of a kernel: its result is kept, or is the one that was kept, where a block wants that.

    One with `dropout` draws random numbers, and has to draw them again: else all that is drawn after it were others.
    """
    return contextlib.nullcontext() if dropout else _around.get(contextlib.nullcontext)()


def twice(forward: Callable) -> Callable:
    """A forward of a block, to be called now and once more in backward: then kernels compute nothing."""
    results: deque[contextlib.AbstractContextManager[Any]] = deque()
    ways = iter((functools.partial(_keep, results),))

    def either(*args: Any, **kwargs: Any) -> Any:
        before = _around.set(next(ways, functools.partial(_next, results)))
        try:
            return forward(*args, **kwargs)
        finally:
            _around.reset(before)

    return either


def _keep(results: deque[contextlib.AbstractContextManager[Any]]) -> contextlib.AbstractContextManager[Any]:
    once, again = create_selective_checkpoint_contexts(_policy)
    results.append(again)
    return once


def _next(results: deque[contextlib.AbstractContextManager[Any]]) -> contextlib.AbstractContextManager[Any]:
    if not results:
        raise RuntimeError("results of attention that were kept can be had once: this block is computed a third time")
    return results.popleft()


def _policy(_: object, operation: Any, *__: object, **___: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in KERNELS else CheckpointPolicy.PREFER_RECOMPUTE

"""The heaviest micro-batch goes forward, backward and through an update before the first step, and is undone.

A run that would not fit ends in its first minute with a number to set, and not in the night at its longest example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from schoolhouse.data import loader
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import MemoryFault
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Drawn
from schoolhouse.optim import Optimizer
from schoolhouse.parallel import fsdp

CPU_SAYS = "can't allocate memory"
"""What torch says on a CPU, where it has no exception of its own."""


def refuse_too_large(student: Student, optimizer: Optimizer, store: Store, plan: Plan, sight: Sight | None) -> None:
    """Raises MemoryFault where the heaviest pack does not fit. Before a checkpoint is loaded: moments are dropped."""
    try:
        _try(student, optimizer, store, heaviest(plan, plan.tokens), sight)
    except _DoesNotFit as error:
        longest = int(plan.lengths.max())
        fits = _what_fits(student, optimizer, store, plan, sight) if student.mesh.world == 1 else None
        raise MemoryFault(
            f"a micro-batch of {plan.tokens} tokens does not fit: {error}",
            required=f"memory for forward, backward and update; the longest example has {longest} tokens",
            where="batch.tokens, rehearsed before the first step",
            remedy=f"set batch.tokens={fits}, which fits and gives the same result" if fits else
            "lower batch.tokens, shorten the examples (data.max_tokens), or set model.activation_checkpointing=true",
        ) from None


def heaviest(plan: Plan, tokens: int) -> tuple[int, ...]:
    """The heaviest pack that a step can hold: the longest example, then each next longest that finds room."""
    pack: list[int] = []
    for index in np.argsort(-plan.lengths, kind="stable"):
        if len(pack) == plan.examples:
            break
        if plan.lengths[index] <= tokens:
            pack.append(int(index))
            tokens -= int(plan.lengths[index])
    return tuple(pack)


class _DoesNotFit(Exception):
    """The allocator refused."""


def _try(student: Student, optimizer: Optimizer, store: Store, pack: Sequence[int], sight: Sight | None) -> None:
    """One update with the learning rate 0, which moves no weight; its moments are dropped."""
    with _refused_memory():
        try:
            seen = next(iter(loader.pixels(store, iter([pack]), sight, len(pack), student.device)))
            micro = loader.micro_batch(store, pack, student.device, sight, seen)
            fsdp.expect(student, last=True)
            (student.loss(micro, Drawn(0, 0)).nll / micro.supervised).backward()
            optimizer.clip()
            optimizer.step(0.0)
        finally:
            optimizer.begin_again()


def _what_fits(
    student: Student, optimizer: Optimizer, store: Store, plan: Plan, sight: Sight | None
) -> int | None:
    """The largest half, quarter, … of `batch.tokens` that fits and holds the longest example."""
    tokens = plan.tokens // 2
    while tokens >= plan.lengths.max():
        _free()
        with contextlib.suppress(_DoesNotFit):
            _try(student, optimizer, store, heaviest(plan, tokens), sight)
            return tokens
        tokens //= 2
    return None


@contextlib.contextmanager
def _refused_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _DoesNotFit(str(error).splitlines()[0][:160]) from None
    except RuntimeError as error:
        if CPU_SAYS not in str(error):
            raise
        raise _DoesNotFit(str(error).splitlines()[0][-160:]) from None


def _free() -> None:
    """Give cached memory back to an accelerator, so that a smaller try meets no splinters of the larger one."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()

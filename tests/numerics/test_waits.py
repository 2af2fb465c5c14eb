"""A step on an accelerator: nothing waits for it before its numbers are read, and nothing is where it should not be.

The device `meta` stands in for one: its tensors are elsewhere than host memory, have shapes and no values, and whatever
asks them for one is seen. What is in host memory computes as ever.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import seeing
import test_families as families
import torch
from test_invariance import PACKS, a_step, examples
from test_shared_prefixes import branches, whole
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schoolhouse import crossing, optim, outcome, train
from schoolhouse.config import Lora, Optim
from schoolhouse.data import vision
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Teaching
from schoolhouse.model.varlen import Kernels
from schoolhouse.starter import miniatures
from schoolhouse.types import Step

aten = torch.ops.aten
FAR = torch.device("meta")
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
         aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_consecutive.default)
"""Operations whose result, or its shape, a program cannot have before the device has the values."""
BY_PLACES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations that look for the places of a mask, unless one number is put there."""
GROUPS_OF_QUERIES = ("deepseek_v2", "deepseek_v3", "gemma2", "gpt_oss")
"""Families that FlashAttention does not serve."""


class Device(TorchDispatchMode):
    """Notes what waits for the device, and what mixes its tensors with those of host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = {one.device.type for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.ndim}
        self.calls[call.name()] += "meta" in places
        if "meta" in places and call in READS:  # which meta refuses, or knows no shape for
            self.waits.append(call.name())
        if call in BY_PLACES and (call is aten.index.Tensor or args[2].numel() > 1):
            masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
            self.waits += [call.name() for one in masks if one.is_meta]
        if call is aten._to_copy.default:
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            self._note_copy(source, target, not kwargs.get("non_blocking"))
            if (source, target) == ("meta", "cpu"):
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif call is aten.copy_.default:
            self._note_copy(args[1].device.type, args[0].device.type, not (args[2:] or kwargs.get("non_blocking")))
        elif len(places) > 1:
            self.mixed.append(call.name())
        return call(*args, **kwargs)

    def _note_copy(self, source: str, target: str, waits: bool) -> None:
        if source != target and waits:
            self.waits.append(f"{source} to {target}")


@pytest.fixture(autouse=True)
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch asks of an accelerator, of the one that is none."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(crossing, "QUEUES", ("meta",))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())


class Event:
    """One of a device that has nothing to do."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self) -> None: ...


def away(family: str, settings: Lora | None = None, trusted: tuple[str, ...] = (), **changes: object) -> Student:
    one = families.student(family, settings, **changes)
    if family in families.MIXTURES:
        one.model.set_experts_implementation("grouped_mm")
    return sent(one, trusted)


def sent(one: Student, trusted: tuple[str, ...] = ()) -> Student:
    one.model.float().to(FAR)
    one.model.tie_weights()
    one.kernels = Kernels(frozenset(trusted))
    return one


def computed(one: Student, step: Step) -> Device:
    """A step as the loop computes it, up to its numbers."""
    optimizer = optim.Optimizer(one.model, Optim(), "bfloat16")
    one.add_in_place(optimizer.total)
    with Device() as seen:
        sums = train.gradient(one, step, seed=0)
        found = outcome.Outcome(step, sums, optimizer.clip(), 1e-3, 0.0)
        optimizer.step(1e-3, found.finite)
    assert seen.calls["aten::_fused_adamw_"] and all(master.grad is None for master in optimizer.masters.values())
    return seen


def check(seen: Device) -> None:
    assert seen.waits == [] and seen.mixed == []


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_no_architecture_makes_the_program_wait(family: str, way: str) -> None:
    rows = examples("fractional", number=8, seed=3)
    kernel = () if family in GROUPS_OF_QUERIES else ("varlen",)
    one = away(family, families.adapters(family) if way == "lora" else None, kernel)
    seen = computed(one, a_step(rows, PACKS["planned"](rows)))
    check(seen)
    assert bool(kernel) == any("varlen" in name for name in seen.calls)


@pytest.mark.parametrize("trusted", [("varlen",), ()], ids=["kernel", "groups"])
def test_nor_what_examples_begin_with_alike(trusted: tuple[str, ...]) -> None:
    rows = branches()
    check(computed(away("qwen3", trusted=trusted), a_step(rows, whole(rows))))


@pytest.mark.parametrize("teaching", [
    Teaching(smoothing=0.1), Teaching(noise=5.0), Teaching(balance=0.01),
], ids=["smoothing", "noise", "balance"])
def test_nor_what_a_step_adds(teaching: Teaching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", lambda _: torch.default_generator)  # there is none on this device
    rows = examples("fractional", number=8, seed=3)
    one = away("qwen3_moe", trusted=("varlen",))
    one.teaching = teaching
    check(computed(one, a_step(rows, PACKS["planned"](rows))))


@pytest.mark.parametrize("images", [[0, 1, 3, 2], [0, 0, 0, 0]], ids=["images", "text"])
@pytest.mark.parametrize("family", vision.FAMILIES)
def test_no_sight_makes_the_program_wait(family: str, images: list[int], tmp_path: Path) -> None:
    one, eyes = seeing.student(family), seeing.eyes(family)
    if "moe" in family:
        one.model.set_experts_implementation("grouped_mm")
    kept = seeing.stored(seeing.examples(eyes, images, seed=3), tmp_path)
    check(computed(sent(one, ("varlen",)), seeing.step(kept, [[0, 1], [2], [3]], eyes)))


def test_what_waits_is_seen() -> None:
    """Each way to wait that there is, and a tensor in the wrong place."""
    far, near = torch.empty(3, device=FAR), torch.ones(3)
    with Device() as seen:
        near.to(FAR)
        far.cpu()
        torch.empty_like(far).copy_(near)
        with pytest.raises(RuntimeError):
            far.repeat_interleave(torch.empty(3, dtype=torch.int64, device=FAR))
        with pytest.raises(RuntimeError, match="item"):
            float(far[0])
        far[far > 0] = torch.empty(2, device=FAR)
        with pytest.raises(NotImplementedError):
            far[far > 0]
        assert len(seen.waits) == 6 and seen.mixed == []
        near.to(FAR, non_blocking=True)
        far[far > 0] = 1.0
        far.index_select(0, torch.tensor([0]))
    assert len(seen.waits) == 6 and seen.mixed == ["aten::index_select"]

"""Micro-batches that are filled up to a few sizes: the same loss and gradient, and no other size anywhere."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from test_families import adapters, student
from test_invariance import PACKS, a_step, check_equal, example, examples
from test_shared_prefixes import branches, whole

from schoolhouse import train
from schoolhouse.model import products, sizes
from schoolhouse.model.flops import Work
from schoolhouse.model.teaching import Teaching
from schoolhouse.starter import miniatures

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_every_architecture(family: str, way: str) -> None:
    """To 1e-9 in float64, with examples that begin alike, and without."""
    for rows, packs in ((branches(), whole(branches())), (examples("fractional", number=8, seed=3), None)):
        one = student(family, adapters(family) if way == "lora" else None)
        one.multiple = 16
        check_equal(one, rows, packs or PACKS["planned"](rows))


def test_nothing_supervised_and_nothing_but() -> None:
    """A pack without targets has none; where no token is left to add, the targets stay as many as they are."""
    generator = np.random.default_rng(5)
    rows = [example(9, generator, "none"), *examples("whole", seed=6)]
    one = student("qwen3")
    one.multiple = 8
    check_equal(one, rows, [[0], list(range(1, len(rows)))])
    every = [example(15, np.random.default_rng(number), "whole") for number in range(2)]
    for row in every:
        row.weights[:], row.labels[:] = 1.0, np.roll(row.input_ids, -1)
    check_equal(one, every, [[0, 1]])


@pytest.mark.parametrize("added", [Teaching(0.1, 5.0, 0.3), Teaching(balance=0.2)], ids=["all", "balance"])
def test_what_a_step_adds_is_the_same(added: Teaching) -> None:
    """Noise and the balance of experts are those of the examples; what fills up has none."""
    found = []
    for multiple in (1, 16):
        one, rows = student("qwen3_moe"), examples("whole", number=8, seed=4)
        one.teaching, one.multiple = added, multiple
        loss, correct, _ = train.compute_gradient(one, a_step(rows, PACKS["planned"](rows)), seed=0)
        found.append((loss, correct, torch.cat([each.grad.flatten() for each in one.model.parameters()])))
    (loss, correct, gradient), (other_loss, other_correct, other) = found
    assert other_loss == pytest.approx(loss, rel=1e-12) and other_correct == correct
    assert float((other - gradient).norm()) < 1e-9 * float(gradient.norm())


def test_all_sizes_are_multiples() -> None:
    """Of tokens in blocks, of rows in the last block's feed-forward part and at the head; loss and counts are told of
    true targets alone."""
    one, rows, met = student("qwen3"), examples("whole", number=9, seed=7), set()
    one.multiple = 32
    for block in one.model.get_decoder().layers:
        block.mlp.register_forward_pre_hook(lambda _, given: met.add(given[0].shape[1]))
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given: met.add(given[0].shape[1]))
    step = a_step(rows, PACKS["planned"](rows))
    train.compute_gradient(one, step, seed=0)
    assert met and all(size % 32 == 0 for size in met)
    micro = step.micro_batches[0]
    assert one.loss(micro).tokens == len(micro.targets) and float(one.loss(micro).supervised) == micro.supervised


def test_who_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models, where a processor multiplies bfloat16 itself."""
    small, large = (Work(token=one, target=0, patch=0, pair=0, windows=()) for one in (2e7, 3e9))
    monkeypatch.setattr(products, "wide_is_faster", lambda place: False)
    assert sizes.multiple(small, CPU, "bfloat16") == sizes.EACH
    assert sizes.multiple(large, CPU, "bfloat16") == sizes.multiple(small, CPU, "float32") == 1
    assert sizes.multiple(small, types.SimpleNamespace(type="cuda"), "bfloat16") == 1
    monkeypatch.setattr(products, "wide_is_faster", lambda place: True)
    assert sizes.multiple(small, CPU, "bfloat16") == 1

"""Every architecture on two processes that share each sequence, full and with adapters, against the plain loop.

Run by `test_architectures_on_layouts.py`: all cases in one pair of processes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import group
import torch
from matrix import rows, step_of
from plain_sft import plain_gradient
from taught import taught_gradient
from test_families import adapters, student
from test_invariance import a_store
from torch.distributed.tensor import DTensor
from true_float64 import TrueFloat64

from schoolhouse import train
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Teaching
from schoolhouse.parallel import fsdp
from schoolhouse.starter import miniatures

LAYOUT = (1, 1, 2)


PLAIN = Teaching()
TAUGHT = {"qwen3_moe": Teaching(0.1, 5.0, 0.3), "gemma2": Teaching(0.1, 5.0)}
"""With smoothed labels, noise and the balance of experts."""


def compare(family: str, way: str, added: Teaching = PLAIN) -> float:
    """The largest difference of loss and gradients from the plain loop, relative to the longest gradient."""
    one, mesh = student(family, adapters(family) if way == "lora" else None), group.mesh(LAYOUT)
    taught = rows("branches" if added == PLAIN else "uneven")
    with TrueFloat64():
        wanted_loss, wanted = (
            plain_gradient(one.model, taught) if added == PLAIN
            else taught_gradient(one.model, taught, added, seed=0, step=1)
        )
        placed = Student(one.model, mesh)
        placed.teaching = added
        fsdp.shard(placed, mesh, torch.float64, offload=False)
        loss, *_ = train.compute_gradient(placed, step_of(a_store(taught), mesh, "uneven", 200), seed=0)
    assert placed.exchange.calls >= 4 * len(one.work.windows) > 0  # to heads and back, both directions
    found = {name: each.grad for name, each in placed.model.named_parameters() if each.requires_grad}
    assert all("lora_" in name for name in found) == (way == "lora")
    worst, longest = abs(loss - wanted_loss) / wanted_loss, max(float(each.norm()) for each in wanted.values())
    for name, gradient in found.items():
        assert isinstance(gradient, DTensor), name
        target = wanted.get(name, torch.zeros(gradient.shape, dtype=torch.float64))
        worst = max(worst, float((gradient.full_tensor() - target).norm()) / longest)
    assert wanted.keys() <= found.keys()
    return worst


CASES: dict[str, Callable[[], float]] = {
    f"{family}, {way}": functools.partial(compare, family, way)
    for family in miniatures.ARCHITECTURES for way in ("full", "lora")
}
CASES |= {f"{family}, taught": functools.partial(compare, family, "full", added) for family, added in TAUGHT.items()}

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    group.main(CASES)

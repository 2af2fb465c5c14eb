"""Muon on cut weights: the weights after some steps, on every layout, against one process.

Run by `test_muon_on_layouts.py`, in groups of processes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext

import group
import torch
from matrix import made_student, rows, step_of
from test_invariance import a_store
from torch.distributed.tensor import DTensor
from true_float64 import TrueFloat64

from schoolhouse import train
from schoolhouse.config import Optim
from schoolhouse.model import muon
from schoolhouse.model.load import Student
from schoolhouse.optim import Optimizer
from schoolhouse.parallel import fsdp
from schoolhouse.parallel.mesh import ALONE, Mesh

SETTINGS = Optim(name="muon", learning_rate=1e-2, weight_decay=0.1)
STEPS = 3


def learnt(made: str, narrow: bool, mesh: Mesh) -> tuple[Student, Optimizer]:
    """A student after `STEPS` steps over the same rows."""
    one = Student(made_student(made, narrow).model, mesh)
    if mesh.world > 1:
        fsdp.shard(one, mesh, torch.float32 if narrow else torch.float64, offload=False)
    optimizer = Optimizer(one.model, SETTINGS, "float32")
    stored = a_store(rows("uneven"))
    for step in range(STEPS):
        train.compute_gradient(one, step_of(stored, mesh, "uneven"), seed=step)
        optimizer.clip()
        optimizer.step(SETTINGS.learning_rate)
    return one, optimizer


def compare(made: str, layout: group.Layout, narrow: bool = False) -> float:
    """The largest difference of a weight or a momentum from one process's, relative to the way that it went."""
    with nullcontext() if narrow else TrueFloat64():
        start = dict(made_student(made, narrow).model.named_parameters())
        wanted, alone = learnt(made, narrow, ALONE)
        found, cut = learnt(made, narrow, group.mesh(layout))
    assert cut.matrices == alone.matrices and cut.matrices
    worst = 0.0
    for name, parameter in found.model.named_parameters():
        assert isinstance(parameter, DTensor), name
        target = wanted.model.get_parameter(name).detach()
        way = float((target - start[name].detach()).norm())
        worst = max(worst, float((parameter.detach().full_tensor() - target).norm()) / max(way, 1e-12))
    momenta, targets = (dict(one.moments()) for one in (cut, alone))
    assert momenta.keys() == targets.keys()
    for name in sorted(alone.matrices):  # full_tensor is a collective: the same order everywhere
        key = f"momentum_buffer.{name}"
        difference = momenta[key].full_tensor() - targets[key]
        worst = max(worst, float(difference.norm()) / max(float(targets[key].norm()), 1e-12))
    return worst


def computed_once(layout: group.Layout) -> int:
    """Matrices that all processes together made orthogonal in one step, less the student's own number of them."""
    one = made_student("tied", True)
    mesh, counted = group.mesh(layout), []
    placed = Student(one.model, mesh)
    fsdp.shard(placed, mesh, torch.float32, offload=False)
    optimizer = Optimizer(placed.model, SETTINGS, "float32")
    train.compute_gradient(placed, step_of(a_store(rows("uneven")), mesh, "uneven"), seed=0)
    original = muon.orthogonal
    muon.orthogonal = lambda matrices: counted.extend(matrices) or original(matrices)
    try:
        optimizer.step(1e-2)
    finally:
        muon.orthogonal = original
    return int(mesh.sum(torch.tensor(float(len(counted))))) - len(optimizer.matrices)


def named(world: int) -> dict[str, Callable[[], float]]:
    """Every case for `world` processes, by name."""
    layouts = {2: ((1, 2, 1), (2, 1, 1), (1, 1, 2)), 4: ((2, 2, 1), (2, 1, 2), (1, 4, 1))}[world]
    cases = {}
    for layout in layouts:
        shown = "x".join(map(str, layout))
        cases[f"tied, {shown}"] = functools.partial(compare, "tied", layout)
        cases[f"tied, {shown}, float32"] = functools.partial(compare, "tied", layout, narrow=True)
        cases[f"computed once, {shown}"] = functools.partial(computed_once, layout)
    cases["three heads of keys"] = functools.partial(compare, "three heads of keys", layouts[0])
    return cases


if __name__ == "__main__":
    group.main(named(int(os.environ["WORLD_SIZE"])))

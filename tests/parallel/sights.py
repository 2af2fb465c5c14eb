"""The cases of models that see: a layout's loss and gradients against transformers alone, in one process each.

Run by `test_sights_on_layouts.py`, in groups of processes. Of two data ranks one has no image.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import group
import taught
import torch
from seeing import examples, eyes, plain_gradient, step, stored, student
from torch.distributed.tensor import DTensor
from true_float64 import TrueFloat64

from schoolhouse import train
from schoolhouse.data import pictures
from schoolhouse.model import sight
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Teaching
from schoolhouse.parallel import fsdp

IMAGES = {"mixed": [0, 1, 0, 3, 2, 0], "one rank blind": [2, 0, 1, 0, 3, 0], "text": [0] * 6}
PACKS = {"mixed": [[0, 1], [2, 3], [4, 5], []], "one rank blind": [[0, 2], [1, 5], [4], [3]],
         "text": [[0, 1, 2], [3, 4, 5]]}


def compare(
    family: str, kind: str, layout: group.Layout, frozen: tuple[str, ...] = (), alpha: float = 0.0
) -> float:
    """The largest difference of loss and gradients from the oracle, relative to the longest gradient."""
    one, seeing, mesh = student(family), eyes(family), group.mesh(layout)
    rows = examples(seeing, IMAGES[kind], seed=7)
    with TrueFloat64(), tempfile.TemporaryDirectory() as place:
        wanted_loss, wanted = plain_gradient(one.model, rows, seeing, functools.partial(noisy, alpha))
        sight.freeze(one.model, frozen)
        placed = Student(one.model, mesh)
        placed.teaching = Teaching(noise=alpha)
        fsdp.shard(placed, mesh, torch.float64, offload=False)
        mine = step(stored(rows, Path(place)), PACKS[kind], seeing, mesh.data_rank, mesh.data_ranks, mesh.seat)
        loss, *_ = train.compute_gradient(placed, mine, seed=0)
    worst = abs(loss - wanted_loss) / abs(wanted_loss)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, parameter in placed.model.named_parameters():
        if sight.part_of(name) in frozen:
            assert parameter.grad is None, name
            continue
        assert isinstance(parameter.grad, DTensor), name
        found = parameter.grad.full_tensor()
        target = wanted.get(name, torch.zeros_like(found))
        worst = max(worst, float((found - target).norm()) / largest)
    return worst


def noisy(alpha: float, index: int, embedded: torch.Tensor) -> torch.Tensor:
    """An example's embeddings with NEFTune's noise of the first step; features take the places of images afterwards."""
    return embedded + taught.noise(0, 1, index, *embedded.shape[1:], alpha).to(embedded.dtype)


def encoded(layout: group.Layout) -> list[int]:
    """Patches that all vision towers were shown in a step, those of the rows, and the most that one process had more
    than another; images that all processes decoded, and those of the rows."""
    one, seeing, mesh = student(), eyes(), group.mesh(layout)
    rows = examples(seeing, IMAGES["mixed"], seed=7)
    placed, seen = Student(one.model, mesh), []
    placed.model.model.visual.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(args[0])),
                                                        with_kwargs=True)
    fsdp.shard(placed, mesh, torch.float64, offload=False)
    decodes = mock.patch.object(pictures, "decode", wraps=pictures.decode)
    with TrueFloat64(), tempfile.TemporaryDirectory() as place, decodes as decode:
        mine = step(stored(rows, Path(place)), [[0, 1, 2, 3, 4, 5]], seeing, mesh.data_rank, mesh.data_ranks, mesh.seat)
        train.compute_gradient(placed, mine, seed=0)
    every = mesh.gather(sum(seen))
    wanted = sum(height * width for row in rows for _, height, width in [image.grid for image in row.vision])
    images = sum(len(row.vision) for row in rows)
    return [sum(every), wanted, max(every) - min(every), sum(mesh.gather(decode.call_count)), images]


def named(world: int) -> dict[str, Callable[[], float | list[int]]]:
    """Every case for `world` processes, by name."""
    if world == 4:
        layouts = [(1, 2, 2), (2, 1, 2), (1, 1, 4)]
        chosen = [("qwen3_vl", "one rank blind", one) for one in layouts]
    else:
        chosen = [
            ("qwen3_vl", "one rank blind", (1, 2, 1)), ("qwen3_vl", "one rank blind", (2, 1, 1)),
            ("qwen3_vl", "mixed", (1, 1, 2)), ("qwen3_vl", "text", (1, 1, 2)), ("qwen3_vl", "text", (1, 2, 1)),
            ("qwen3_vl_moe", "mixed", (1, 1, 2)), ("qwen2_5_vl", "mixed", (1, 1, 2)),
            ("qwen2_vl", "mixed", (1, 1, 2)), ("qwen3_5", "mixed", (1, 1, 2)), ("qwen3_5_moe", "mixed", (1, 1, 2)),
            ("gemma3", "mixed", (1, 1, 2)), ("gemma3", "one rank blind", (1, 2, 1)), ("gemma3", "text", (1, 1, 2)),
        ]
    cases = {f"{family}, {kind}, {'x'.join(map(str, layout))}": functools.partial(compare, family, kind, layout)
             for family, kind, layout in chosen}
    if world == 2:
        for layout, kind in (((1, 2, 1), "one rank blind"), ((1, 1, 2), "mixed")):
            for frozen in (("vision",), ("language",)):
                name = f"frozen {frozen[0]}, {'x'.join(map(str, layout))}"
                cases[name] = functools.partial(compare, "qwen3_vl", kind, layout, frozen)
        for family in ("qwen3_vl", "gemma3"):
            cases[f"{family}, noise, 1x1x2"] = functools.partial(compare, family, "mixed", (1, 1, 2), alpha=5.0)
    return {**cases, "encoded": functools.partial(encoded, (1, 1, world))}


if __name__ == "__main__":
    group.main(named(int(os.environ["WORLD_SIZE"])))

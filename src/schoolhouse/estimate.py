"""What a run will hold in memory, from the headers of the model's files, before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from schoolhouse.config import Recipe

GIB = 2**30


def memory(recipe: Recipe, directory: Path) -> dict[str, float] | None:
    """GiB of weights, gradients and moments, of all processes together; None where no weights are at hand.

    Exact for all weights but frozen parts, which are counted as trained; of adapters, those beside every matrix. What a
    micro-batch needs beside it depends on its length and is not foreseen: it is rehearsed before the first step.
    """
    shapes = dict(_shapes(directory))
    if not shapes:
        return None
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and any(map(str.isdigit, name))}
    every, inner = _count(shapes.values()), _count(matrices.values())
    small = 2 if recipe.model.precision == "bfloat16" else 4
    held, trained = 0.0, every
    if recipe.lora is not None:
        held = every * (0.56 if recipe.lora.base == "nf4" else small)  # 4 bits, and a scale for every 64 of them
        trained = recipe.lora.rank * sum(shape[0] + math.prod(shape[1:]) for shape in matrices.values())
    elif small == 2:
        held = 2.0 * every  # the copies that the matrix products read
    moment = 1 if recipe.optim.name == "adamw8bit" else 4
    moments = trained * 2 * moment - (inner * moment if recipe.optim.name == "muon" else 0)
    parts = {"weights": held + 4 * trained, "gradients": 4.0 * trained, "moments": float(moments)}
    return {"parameters": every, **{name: size / GIB for name, size in parts.items()},
            "total": sum(parts.values()) / GIB}


def told(found: dict[str, float] | None) -> str:
    """The same as a line for people."""
    if found is None:
        return "memory: unknown, the model's weights are not at hand"
    return (
        f"memory: {found['total']:.2f} GiB (weights {found['weights']:.2f}, gradients {found['gradients']:.2f}, "
        f"moments {found['moments']:.2f}), shared out where weights are cut; and a micro-batch on each process"
    )


def _count(shapes: Iterable[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes in the headers of safetensors files: eight bytes of length, then JSON."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")

"""Whether the storage has room for what a run will keep there, asked before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from schoolhouse import checkpoint
from schoolhouse.config import Recipe
from schoolhouse.errors import CheckpointError
from schoolhouse.optim import Optimizer
from schoolhouse.parallel.mesh import Mesh

MARGIN = 64 << 20
"""Bytes left for metrics, samples and the report."""


def refuse_too_little(recipe: Recipe, parent: Path, optimizer: Optimizer, steps: int, mesh: Mesh) -> None:
    """Raises CheckpointError, on every rank, where the checkpoints that this run will keep at once have no room."""
    each, left = optimizer.saved_bytes(), mesh.share(_room(parent) if mesh.is_first else None)
    together = at_once(recipe, steps)
    need = each * max(1, together - left["there"]) + MARGIN
    if need > left["free"]:
        raise CheckpointError(
            f"there is no room for the checkpoints: {_gib(need)} GiB are needed, {_gib(left['free'])} GiB are free",
            required=f"room for {together} checkpoints of {_gib(each)} GiB ({left['there']} are there already), "
            "one of them being written, and 64 MiB",
            where=str(parent), remedy="make room, lower checkpoint.keep, or set directory=… to another disk",
        )


def at_once(recipe: Recipe, steps: int) -> int:
    """Checkpoints on the disk at the same time, at most: those kept, the best one, and the one being written."""
    saves = -(-steps // recipe.checkpoint.every)
    return min(recipe.checkpoint.keep + 1, saves) + (recipe.exam.data is not None and saves > 1)


def _room(parent: Path) -> dict[str, int]:
    return {"free": shutil.disk_usage(parent.parent).free, "there": len(checkpoint.steps_in(parent))}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"

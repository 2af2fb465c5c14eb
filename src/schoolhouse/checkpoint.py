"""Checkpoints: whole, verified and inert. Staged, hashed, synced, renamed; safetensors and JSON, never a pickle.

    checkpoints/step-00000123/
        weights-00000.safetensors     the trained weights (float32), the pieces of rank 0; -00001 of rank 1
        optimizer-00000.safetensors   their moments
        index.json                    each tensor's shape and where its pieces lie
        state.json                    the step, the data's position and fingerprint, the exam's score
        recipe.yaml
        manifest.json                 bytes and SHA-256 of every other file, and of itself

This file reads; `saving` writes. Any number of processes reads what any number has written.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from schoolhouse.errors import CheckpointError

PREFIX = "step-"
STAGING = ".tmp-"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
INDEX, STATE, RECIPE, MANIFEST = "index.json", "state.json", "recipe.yaml", "manifest.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that one process holds."""

    tensor: Tensor
    offset: tuple[int, ...]
    """Where it begins in the whole, one number a dimension."""
    shape: tuple[int, ...]
    """Of the whole."""


def piece(tensor: Tensor, rank: int = 0) -> Piece | None:
    """What rank `rank` writes of a tensor: its shard of a sharded one, and rank 0 all of one that every rank holds.

    None where another rank writes the same values, or where this one's share is empty.
    """
    if not isinstance(tensor, DTensor):
        return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape)) if rank == 0 else None
    mesh, placements = tensor.device_mesh, tensor.placements
    copies = [place for axis, place in enumerate(mesh.get_coordinate()) if placements[axis].is_replicate()]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if any(copies) or (math.prod(shape) == 0 and tensor.numel() > 0):
        return None
    return Piece(tensor.to_local(), tuple(offset), tuple(tensor.shape))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its manifest."""

    path: Path
    state: Mapping[str, Any]
    index: Mapping[str, Mapping[str, Any]]
    """By kind and name: `{"shape", "dtype", "pieces": [{"file", "offset", "shape"}]}`."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of `WEIGHTS` or `OPTIMIZER`, put together from their pieces."""
        return {name: self.read(kind, name) for name in self.index[kind]}

    def like(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """The part of a saved tensor that this process holds of `tensor`: its shard of a sharded one, else all."""
        if not isinstance(tensor, DTensor):
            return self.read(kind, name)
        return self.read(kind, name, *compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )[::-1])

    def read(
        self, kind: str, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The block of a tensor that begins at `offset` and has `shape` (unset: all), from the pieces that meet it."""
        entry = self.index[kind][name]
        shape = list(entry["shape"] if shape is None else shape)
        offset = [0] * len(shape) if offset is None else list(offset)
        block = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
        filled = 0
        for part in entry["pieces"]:
            common = [
                (max(start, begin), min(start + size, begin + length))
                for start, size, begin, length in zip(offset, shape, part["offset"], part["shape"], strict=True)
            ]
            if any(end <= begin for begin, end in common):
                continue
            with safetensors.safe_open(self.path / part["file"], "pt") as file:
                whole = file.get_slice(name)
                found = whole[_places(common, part["offset"])] if common else file.get_tensor(name)
            block[_places(common, offset)] = found
            filled += found.numel()
        if filled != block.numel():
            raise _damaged(self.path, INDEX, f"has pieces for {filled} of {block.numel()} values of {name}")
        return block


def _places(common: Sequence[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin - start, end - start) for (begin, end), start in zip(common, origin, strict=True))


def opened(path: Path) -> Checkpoint:
    """A checkpoint that another process has verified."""
    state, index = (json.loads((path / name).read_bytes()) for name in (STATE, INDEX))
    return Checkpoint(path, state, index)


def verify(path: Path) -> Checkpoint:
    """Compare every byte of a checkpoint with its manifest; raises CheckpointError naming the first difference."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != digest(files):
            raise _damaged(path, MANIFEST, "was changed")
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                raise _damaged(path, name, f"has {(path / name).stat().st_size} bytes, not {entry['bytes']}")
            if sha256(path / name) != entry["sha256"]:
                raise _damaged(path, name, "sha256 mismatch")
        return opened(path)
    except FileNotFoundError as error:
        raise _damaged(path, Path(error.filename).name, "is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, MANIFEST, f"cannot be read ({type(error).__name__})") from None


def newest(parent: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint that verifies, and why newer ones did not."""
    rejected = []
    for path in reversed(steps_in(parent)):
        try:
            return verify(path), rejected
        except CheckpointError as error:
            rejected.append(error)
    return None, rejected


def steps_in(parent: Path) -> list[Path]:
    """The directories of checkpoints, oldest first; whether they are whole is not looked at."""
    found = [path for path in parent.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))


def prune(parent: Path, keep: int, best: int | None) -> list[int]:
    """Remove all but the newest `keep` checkpoints and the one of step `best`; the steps removed."""
    removed = []
    for path in steps_in(parent)[:-keep]:
        if step_of(path) != best:
            remove(path)
            removed.append(step_of(path))
    return removed


def remove(path: Path) -> None:
    """Rename first, so that a kill in between leaves rubbish and not half a checkpoint."""
    doomed = path.with_name(f"{STAGING}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the name is gone; `clear_staging` removes what a file system held back


def clear_staging(parent: Path) -> None:
    """Remove what killed writers left. Before the first save, by rank 0 alone: the run's lock keeps others away."""
    for left in parent.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(files: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's own list."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, file: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path.name} rejected: {file} {how}", required="the bytes that were written",
        where=str(path / file), remedy="an earlier checkpoint is used where there is one; delete the damaged one",
    )

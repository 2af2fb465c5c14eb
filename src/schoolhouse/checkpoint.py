"""Checkpoints: whole, verified and inert. Staged, hashed, synced, renamed; safetensors and JSON, never a pickle.

    checkpoints/step-00000123/
        weights-00000.safetensors     the trained weights (float32), this rank's pieces
        optimizer-00000.safetensors   their moments
        index.json                    each tensor's shape and where its pieces lie
        state.json                    the step, the data's position and fingerprint, the exam's score
        recipe.yaml
        manifest.json                 bytes and SHA-256 of every other file, and of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from schoolhouse.errors import CheckpointError

PREFIX = "step-"
STAGING = ".tmp-"
WEIGHTS, OPTIMIZER = "weights", "optimizer"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its manifest."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of `WEIGHTS` or `OPTIMIZER`, put together from their pieces."""
        index = json.loads((self.path / "index.json").read_text(encoding="utf-8"))[kind]
        return {name: self._assemble(name, entry) for name, entry in index.items()}

    def _assemble(self, name: str, entry: Mapping[str, Any]) -> Tensor:
        whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for piece in entry["pieces"]:
            with safetensors.safe_open(self.path / piece["file"], "pt") as file:
                part = file.get_tensor(name)
            place = tuple(slice(start, start + size) for start, size in zip(piece["offset"], part.shape, strict=True))
            whole[place] = part
        return whole


def save(
    parent: Path, step: int, tensors: Mapping[str, Iterable[tuple[str, Tensor]]], state: Mapping[str, Any], recipe: str
) -> Path:
    """Write `parent/step-…` so that it exists whole or not at all; raises CheckpointError where storage fails."""
    name = f"{PREFIX}{step:08d}"
    staging = parent / f"{STAGING}{name}-{os.getpid()}"
    try:
        parent.mkdir(exist_ok=True)  # and not its parents: a run directory that vanished must not come back half
        clear_staging(parent)
        staging.mkdir()
        _write(staging, tensors, {**state, "step": step}, recipe)
        _sync_all(staging)
        final = parent / name
        if final.exists():
            _remove(final)
        staging.rename(final)
        _sync(parent)
        for later in steps_in(parent):  # refused ones that the run went back behind, and now writes anew
            if _step(later) > step:
                _remove(later)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(parent).free if parent.is_dir() else 0
        raise CheckpointError(
            f"the checkpoint of step {step} was not written: {error}",
            required=f"space for the weights and twice as much for their moments; {free / 2**30:.2f} GiB are free",
            where=str(parent), remedy="make room and run the same command again; earlier checkpoints are untouched",
        ) from error
    return final


def verify(path: Path) -> Checkpoint:
    """Compare every byte of a checkpoint with its manifest; raises CheckpointError naming the first difference."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _digest(files):
            raise _damaged(path, "manifest.json", "was changed")
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                raise _damaged(path, name, f"has {(path / name).stat().st_size} bytes, not {entry['bytes']}")
            if _sha256(path / name) != entry["sha256"]:
                raise _damaged(path, name, "sha256 mismatch")
        return Checkpoint(path, json.loads((path / "state.json").read_bytes()))
    except FileNotFoundError as error:
        raise _damaged(path, Path(error.filename).name, "is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "manifest.json", f"cannot be read ({type(error).__name__})") from None


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
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def prune(parent: Path, keep: int, best: int | None) -> list[int]:
    """Remove all but the newest `keep` checkpoints and the one of step `best`; the steps removed."""
    removed = []
    for path in steps_in(parent)[:-keep]:
        step = _step(path)
        if step != best:
            _remove(path)
            removed.append(step)
    return removed


def clear_staging(parent: Path) -> None:
    """Remove what killed writers left; the run's lock guarantees that none is at work."""
    for left in parent.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _write(
    staging: Path, kinds: Mapping[str, Iterable[tuple[str, Tensor]]], state: Mapping[str, Any], recipe: str
) -> None:
    index: dict[str, dict[str, Any]] = {}
    for kind, pairs in kinds.items():
        tensors = {name: value.detach().to("cpu").contiguous() for name, value in pairs}
        file = f"{kind}-00000.safetensors"
        save_file(tensors, staging / file)
        index[kind] = {
            name: {
                "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."),
                "pieces": [{"file": file, "offset": [0] * value.ndim}],
            }
            for name, value in tensors.items()
        }
    (staging / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (staging / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (staging / "recipe.yaml").write_text(recipe, encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(staging.iterdir())
    }
    manifest = {"files": files, "sha256": _digest(files)}
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _remove(path: Path) -> None:
    """Rename first, so that a kill in between leaves rubbish and not half a checkpoint."""
    doomed = path.with_name(f"{STAGING}removed-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync_all(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, file: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path.name} rejected: {file} {how}", required="the bytes that were written",
        where=str(path / file), remedy="an earlier checkpoint is used where there is one; delete the damaged one",
    )

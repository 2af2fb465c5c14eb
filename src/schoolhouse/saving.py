"""Writing checkpoints while training goes on: copied to host memory, then written by a thread.

Each rank writes the pieces it holds into one staging directory on storage that all ranks share, and lays a note beside
them; rank 0 waits for every note, writes index and manifest, and renames. So there is no collective in a thread, and a
checkpoint has its name only when every byte of every rank is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from schoolhouse import checkpoint
from schoolhouse.checkpoint import INDEX, MANIFEST, PREFIX, RECIPE, STAGING, STATE, Piece
from schoolhouse.errors import CheckpointError

PATIENCE = 1800.0
"""Seconds that one process waits for another's pieces: longer than any disk takes, shorter than for ever."""
PAUSE = 0.01
"""Seconds between two looks at what the others have written."""

Kinds = Mapping[str, Mapping[str, Piece]]
"""By kind (`weights`, `optimizer`) and name, what this rank writes."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a run's checkpoints are written, and by whom."""

    parent: Path
    rank: int = 0
    ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what belongs to all of them."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on the disk."""

    step: int
    removed: list[int]
    """Steps whose checkpoints are no longer kept."""
    seconds: float
    """How long the disk took."""
    bytes: int
    """Of this rank's tensors."""


class Saver:
    """Saves a run's state without stopping it; one save at a time, and no failure goes unsaid."""

    def __init__(self, storage: Storage, keep: int) -> None:
        self.storage = storage
        self._keep = keep
        self._host: dict[tuple[str, str], Tensor] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None

    def save(
        self, step: int, kinds: Mapping[str, Iterable[tuple[str, Tensor]]], state: Mapping[str, Any], recipe: str,
        best: int | None = None, *, still: bool = False,
    ) -> None:
        """Copy the state and begin to write it; an earlier save must have been finished, for its bytes are reused.

        `best` is the step whose checkpoint is kept beside the newest. A state that stands `still` until `finish()` is
        written from where it is in host memory, which saves a copy of all weights and moments at the end of a run.
        """
        assert self._writing is None, "finish() first"
        sources: set[torch.device] = set()
        held = {kind: dict(self._copied(kind, pairs, still, sources)) for kind, pairs in kinds.items()}
        for device in sources:  # copies from an accelerator run beside the program until they are waited for
            torch.accelerator.synchronize(device)
        self._writing = self._writer.submit(self._write, step, held, state, recipe, best)

    def finished(self) -> Saved | None:
        """A save that ended since the last call; raises its CheckpointError where it failed. Never waits."""
        return self.finish() if self._writing is not None and self._writing.done() else None

    def finish(self) -> Saved | None:
        """Wait for the save under way, if there is one; raises its CheckpointError where it failed."""
        writing, self._writing = self._writing, None
        return writing.result() if writing is not None else None

    def _copied(
        self, kind: str, pairs: Iterable[tuple[str, Tensor]], still: bool, sources: set[torch.device]
    ) -> Iterator[tuple[str, Piece]]:
        """This rank's pieces in host memory, which is taken once and used for every save. Accelerators that they come
        from are added to `sources`: their copies are under way."""
        for name, tensor in pairs:
            held = checkpoint.piece(tensor.detach(), self.storage.rank)
            if held is None:
                continue
            if still and held.tensor.device.type == "cpu":
                yield name, Piece(held.tensor.contiguous(), held.offset, held.shape)
                continue
            if (kind, name) not in self._host:
                self._host[kind, name] = torch.empty(
                    held.tensor.shape, dtype=held.tensor.dtype, pin_memory=held.tensor.is_cuda
                )
            host = self._host[kind, name].copy_(held.tensor, non_blocking=True)
            if held.tensor.device.type != "cpu":
                sources.add(held.tensor.device)
            yield name, Piece(host, held.offset, held.shape)

    def _write(
        self, step: int, kinds: Kinds, state: Mapping[str, Any], recipe: str, best: int | None
    ) -> Saved:
        began = time.perf_counter()
        write(self.storage, step, kinds, state, recipe)
        removed = checkpoint.prune(self.storage.parent, self._keep, best) if self.storage.leads else []
        size = sum(one.tensor.nbytes for named in kinds.values() for one in named.values())
        return Saved(step, removed, time.perf_counter() - began, size)


def write(storage: Storage, step: int, kinds: Kinds, state: Mapping[str, Any], recipe: str) -> Path:
    """Write `step-…` so that it exists whole or not at all; every rank calls it. Raises CheckpointError."""
    final = storage.parent / f"{PREFIX}{step:08d}"
    staging = storage.parent / f"{STAGING}{final.name}"
    try:
        storage.parent.mkdir(exist_ok=True)  # not its parents: a run directory that vanished stays away
        staging.mkdir(exist_ok=True)
        part = _write_pieces(staging, kinds, storage.rank)
        if storage.leads:
            parts = [part, *(_note(staging, rank) for rank in range(1, storage.ranks))]
            _complete(staging, parts, {**state, "step": step}, recipe)
            _give_name(staging, final)
        else:
            _lay_note(staging, storage.rank, part)
            _wait_for_name(staging, final)
    except (OSError, SafetensorError, _PeerError) as error:
        _give_up(staging, storage, error)
        raise _unwritten(storage, step, kinds, error) from error
    return final


class _PeerError(Exception):
    """Another rank could not write its pieces."""


def _write_pieces(staging: Path, kinds: Kinds, rank: int) -> dict[str, Any]:
    """This rank's files, on the disk; their entries for the index and the manifest."""
    index: dict[str, dict[str, Any]] = {}
    files = []
    for kind, named in kinds.items():
        files.append(staging / f"{kind}-{rank:05d}.safetensors")
        save_file({name: one.tensor for name, one in named.items()}, files[-1])
        index[kind] = {name: _entry(one, files[-1].name) for name, one in named.items()}
    return {"index": index, "files": _sealed(files)}


def _entry(one: Piece, file: str) -> dict[str, Any]:
    place = {"file": file, "offset": list(one.offset), "shape": list(one.tensor.shape)}
    return {"shape": list(one.shape), "dtype": str(one.tensor.dtype).removeprefix("torch."), "pieces": [place]}


def _sealed(files: Iterable[Path]) -> dict[str, Any]:
    """Bytes and SHA-256 of files that are on the disk now; they are hashed while the disk works."""
    with ThreadPoolExecutor(1) as disk:
        synced = [(path, disk.submit(_sync, path)) for path in files]
        found = {path.name: {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)} for path, _ in synced}
        for _, one in synced:
            one.result()
    return found


def _complete(staging: Path, parts: Iterable[Mapping[str, Any]], state: Mapping[str, Any], recipe: str) -> None:
    """What belongs to all ranks: the index, the state, the recipe and the manifest, on the disk."""
    index: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for kind, named in part["index"].items():
            known = index.setdefault(kind, {})
            for name, entry in named.items():
                known.setdefault(name, {**entry, "pieces": []})["pieces"].extend(entry["pieces"])
    texts = {INDEX: json.dumps(index), STATE: json.dumps(state, indent=1), RECIPE: recipe}
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
    files = dict(sorted({**files, **_sealed(staging / name for name in texts)}.items()))
    manifest = {"files": files, "sha256": checkpoint.digest(files)}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(staging / MANIFEST)
    _sync(staging)


def _give_name(staging: Path, final: Path) -> None:
    """From now on it is a checkpoint; later ones were refused by the run that went back behind them."""
    if final.exists():
        checkpoint.remove(final)
    staging.rename(final)
    _sync(final.parent)
    for later in checkpoint.steps_in(final.parent):
        if checkpoint.step_of(later) > checkpoint.step_of(final):
            checkpoint.remove(later)


def _lay_note(staging: Path, rank: int, content: Mapping[str, Any]) -> None:
    """Tell rank 0 what was written, in one instant."""
    half = staging / f".{_note_name(rank)}"
    half.write_text(json.dumps(content), encoding="utf-8")
    half.rename(staging / _note_name(rank))


def _note(staging: Path, rank: int) -> dict[str, Any]:
    """What another rank has written, once it has; its note is no part of the checkpoint."""
    path = staging / _note_name(rank)
    _wait(path.exists, f"rank {rank} has written nothing; is {staging.parent} on storage that all machines share?")
    content = json.loads(path.read_bytes())
    path.unlink()
    if "failed" in content:
        raise _PeerError(f"rank {rank}: {content['failed']}")
    return content


def _note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _wait_for_name(staging: Path, final: Path) -> None:
    """Until rank 0 has renamed the directory, or given up and removed it."""
    _wait(lambda: not staging.exists(), "rank 0 has not finished the checkpoint")
    if not final.exists():
        raise _PeerError("another rank could not write its part")


def _wait(ready: Any, otherwise: str) -> None:
    limit = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > limit:
            raise _PeerError(f"{otherwise} (waited {PATIENCE:.0f} s)")
        time.sleep(PAUSE)


def _give_up(staging: Path, storage: Storage, error: Exception) -> None:
    """Free what was taken, and tell the other ranks: rank 0 by removing the directory, another by its note."""
    if storage.leads:
        shutil.rmtree(staging, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for path in staging.glob(f"*-{storage.rank:05d}.safetensors"):
            path.unlink()
        _lay_note(staging, storage.rank, {"failed": str(error)})


def _unwritten(storage: Storage, step: int, kinds: Kinds, error: Exception) -> CheckpointError:
    need = sum(one.tensor.nbytes for named in kinds.values() for one in named.values()) * storage.ranks
    free = shutil.disk_usage(storage.parent).free if storage.parent.is_dir() else 0
    return CheckpointError(
        f"the checkpoint of step {step} was not written: {error}",
        required=f"about {need / 2**30:.2f} GiB for it; {free / 2**30:.2f} GiB are free",
        where=str(storage.parent), remedy="make room and run the same command again; earlier checkpoints are untouched",
    )


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

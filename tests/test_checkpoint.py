"""Checkpoints: what is saved is read back to the bit, and what was touched since is refused by name."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schoolhouse import checkpoint, saving
from schoolhouse.checkpoint import OPTIMIZER, WEIGHTS, Checkpoint
from schoolhouse.errors import CheckpointError
from schoolhouse.saving import Saver, Storage

FLIPS = 200
STATE = {"position": {"epoch": 1, "step": 3}, "best": None, "data": "print", "steps": 9}
TENSORS = {"weights-00000.safetensors", "optimizer-00000.safetensors"}
FILES = {*TENSORS, "index.json", "manifest.json", "recipe.yaml", "state.json"}


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    """Every kind of tensor that a run saves, not all of them contiguous, some with values that JSON would lose."""
    draw = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, float("inf"), 1e-45, 3.4e38, 1 / 3])
    weights = {
        "layers.0.weight": torch.randn(5, 3, generator=draw), "scalar": torch.tensor(7.0), "odd": odd,
        "turned": torch.randn(4, 6, generator=draw).T, "narrow": torch.randn(3, generator=draw).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=draw)), "empty": torch.zeros(0, 4),
    }
    moments = {"step.scalar": torch.tensor(3.0), "exp_avg.layers.0.weight": torch.randn(5, 3, generator=draw)}
    return {WEIGHTS: weights, OPTIMIZER: moments}


def save(parent: Path, step: int = 3, **state: Any) -> Path:
    saver = Saver(Storage(parent), keep=99)
    kinds = {kind: iter(named.items()) for kind, named in tensors(step).items()}
    saver.save(step, kinds, {**STATE, **state}, "model: é\n")
    saver.finish()
    return parent / f"step-{step:08d}"


def same(found: Checkpoint, step: int) -> bool:
    """Every tensor of a checkpoint, its type and its bits, and nothing else."""
    for kind, wanted in tensors(step).items():
        read = found.tensors(kind)
        if read.keys() != wanted.keys():
            return False
        for name, one in wanted.items():
            if read[name].dtype != one.dtype or not torch.equal(read[name], one.detach()):
                return False
    return True


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def whole(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints" / pristine.name))


def test_round_trip(whole: Path) -> None:
    found = checkpoint.verify(whole)
    assert (found.step, found.path, found.state) == (3, whole, {**STATE, "step": 3})
    assert same(found, 3)
    assert (whole / "recipe.yaml").read_text(encoding="utf-8") == "model: é\n"
    assert {path.name for path in whole.iterdir()} == FILES


def test_only_tensors_and_json(whole: Path) -> None:
    """Inert: no file that Python would execute to read, nor one that pickle wrote."""
    for path in whole.iterdir():
        assert path.suffix in (".safetensors", ".json", ".yaml") and path.read_bytes()[:2] != b"\x80\x04"


# Damage.


def places(whole: Path) -> list[tuple[str, int]]:
    """Places in every file: the first and the last byte of each, and others by chance."""
    draw, sizes = random.Random(0), {path.name: path.stat().st_size for path in sorted(whole.iterdir())}
    ends = [(name, place) for name, size in sizes.items() for place in (0, size - 1)]
    names = [draw.choice(sorted(sizes)) for _ in range(FLIPS - len(ends))]
    return ends + [(name, draw.randrange(sizes[name])) for name in names]


@pytest.mark.parametrize("number", range(FLIPS))
def test_every_flipped_bit_is_found(whole: Path, number: int) -> None:
    """One bit of one byte, anywhere, also in the manifest: refused, with the file's name and the way out."""
    name, place = places(whole)[number]
    content = bytearray((whole / name).read_bytes())
    content[place] ^= 1 << (number % 8)
    (whole / name).write_bytes(content)
    refused(whole, name)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0], ids=["empty", "half", "less one byte"])
def test_every_cut_is_found(whole: Path, name: str, kept: float) -> None:
    content = (whole / name).read_bytes()
    (whole / name).write_bytes(content[: min(int(len(content) * kept), len(content) - 1)])
    refused(whole, name)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"\n ")])
def test_missing_and_longer_files_are_found(whole: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(whole / name)
    if name == "manifest.json" and (whole / name).exists():
        checkpoint.verify(whole)  # white space behind the manifest changes nothing that it says
    else:
        refused(whole, name)


def refused(whole: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(whole)
    assert caught.value.exit_code == 6
    assert f"checkpoint {whole.name} rejected: {name}" in caught.value.found
    assert caught.value.remedy and caught.value.required and str(whole) in caught.value.where
    found, rejected = checkpoint.newest(whole.parent)
    assert found is None and [fault.found for fault in rejected] == [caught.value.found]


@pytest.mark.parametrize("manifest", [
    "", "[]", "{}", "null", '{"files": [], "sha256": ""}', '{"files": {"a": 3}}', "\xff",
])
def test_a_manifest_of_another_form_is_refused(whole: Path, manifest: str) -> None:
    (whole / "manifest.json").write_text(manifest, encoding="latin-1")
    refused(whole, "manifest.json")


def test_an_exchanged_file_is_found(whole: Path, tmp_path: Path) -> None:
    """Whole files of another checkpoint do not make this one."""
    other = save(tmp_path / "other", 5)
    for name in (*sorted(TENSORS), "state.json"):
        kept = (whole / name).read_bytes()
        shutil.copyfile(other / name, whole / name)
        refused(whole, name)
        (whole / name).write_bytes(kept)
    assert same(checkpoint.verify(whole), 3)


# Newest, prune, staging.


def test_newest_falls_back_to_the_one_that_verifies(tmp_path: Path) -> None:
    for step in (2, 9, 10, 30):
        save(tmp_path, step)
    for step in (30, 10):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    found, rejected = checkpoint.newest(tmp_path)
    assert found.step == 9 and same(found, 9)
    assert [fault.found.split()[1] for fault in rejected] == ["step-00000030", "step-00000010"]


def test_newest_of_nothing(tmp_path: Path) -> None:
    """No directory, no checkpoint, other things in it: a run that begins."""
    assert checkpoint.newest(tmp_path / "none") == (None, [])
    for name in ("step-x", "step-", "other", ".tmp-step-00000003-77"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.newest(tmp_path) == (None, [])


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    assert checkpoint.prune(tmp_path, 2, best=4) == [2, 6]
    assert steps(tmp_path) == [4, 8, 10]
    assert checkpoint.prune(tmp_path, 2, best=4) == []
    assert checkpoint.prune(tmp_path, 1, best=None) == [4, 8]
    assert steps(tmp_path) == [10] and list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_never_removes_the_last_whole_one(tmp_path: Path, keep: int) -> None:
    """A resumed run stands before checkpoints that were refused: those must not crowd out the ones it writes."""
    for step in (6, 8, 10):
        save(tmp_path, step)
    for step in (8, 10):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    save(tmp_path, 7)
    checkpoint.prune(tmp_path, keep, best=None)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 7


def steps(parent: Path) -> list[int]:
    return [checkpoint.verify(path).step for path in checkpoint.steps_in(parent)]


def test_left_overs_of_a_kill_are_ignored_and_cleared(tmp_path: Path) -> None:
    """Killed while staging and while removing: both are rubbish under another name."""
    save(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".tmp-removed-step-00000002")
    staged = tmp_path / ".tmp-step-00000004"
    staged.mkdir()
    (staged / "weights-00000.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == (None, [])
    checkpoint.clear_staging(tmp_path)
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    checkpoint.clear_staging(tmp_path / "none")


def test_a_step_is_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    """A run that fell back comes to the same step again."""
    (save(tmp_path, 4) / "state.json").write_text("{}")
    assert same(checkpoint.verify(save(tmp_path, 4)), 4)
    assert steps(tmp_path) == [4]


# A failing disk.


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def break_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(saving, "save_file", full)


def break_second_write(patch: pytest.MonkeyPatch) -> None:
    """The weights fit, the moments do not."""
    plain = saving.save_file
    patch.setattr(saving, "save_file", lambda named, path: full() if OPTIMIZER in str(path) else plain(named, path))


def break_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", full)


def break_last_sync(patch: pytest.MonkeyPatch) -> None:
    """The checkpoint is in its place when the directory above it cannot be written through."""
    plain = saving._sync
    patch.setattr(saving, "_sync", lambda path: full() if path.name == "checkpoints" else plain(path))


def break_rename(patch: pytest.MonkeyPatch) -> None:
    plain = Path.rename
    patch.setattr(Path, "rename", lambda path, to: full() if path.name.startswith(".tmp-step") else plain(path, to))


def break_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "write_text", full)


@pytest.mark.parametrize("broken", [
    break_write, break_second_write, break_sync, break_last_sync, break_rename, break_text,
])
def test_a_failing_disk_leaves_earlier_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """An error of four parts with exit code 6, no staging left, what was there is whole, and the next save works."""
    parent = tmp_path / "checkpoints"
    save(parent, 2)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(CheckpointError) as caught:
            save(parent, 4)
    error = caught.value
    assert error.exit_code == 6 and "step 4" in error.found and "No space left" in error.found
    assert "GiB are free" in error.required and error.where == str(parent) and "make room" in error.remedy
    assert list(parent.glob(".tmp-*")) == []
    found, rejected = checkpoint.newest(parent)
    assert found is not None and found.step in (2, 4) and rejected == []
    assert same(checkpoint.verify(parent / "step-00000002"), 2)
    save(parent, 4)
    assert steps(parent) == [2, 4]


def test_a_real_limit_of_the_disk_is_the_same_error(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow: what safetensors raises then is no OSError, and is the same to a user."""
    code = (
        "import resource, sys, torch; from pathlib import Path; from schoolhouse import checkpoint, saving\n"
        "parent = Path(sys.argv[1]); saver = saving.Saver(saving.Storage(parent), 2)\n"
        "saver.save(2, {'weights': [('a', torch.ones(10))]}, {}, ''); saver.finish()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "saver.save(4, {'weights': [('b', torch.ones(100_000))]}, {}, '')\n"
        "try: saver.finish()\n"
        "except checkpoint.CheckpointError as error: print(error.exit_code, error.found)\n"
        "print([path.name for path in parent.iterdir()], checkpoint.newest(parent)[0].step)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 the checkpoint of step 4 was not written")
    assert done.stdout.splitlines()[1] == "['step-00000002'] 2"


def test_everything_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and its directory are synced before the rename, the parent after it: what a lost power cannot undo."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename
    named = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(Path(named(handle)).readlink().name), sync(handle)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append("rename"), rename(path, to))[1])
    save(tmp_path / "checkpoints")
    turn = done.index("rename")
    assert set(done[:turn]) >= FILES and done[turn - 1].startswith(".tmp-step-00000003")
    assert done[turn:] == ["rename", "checkpoints"]


def test_the_manifest_lists_every_file(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert set(manifest["files"]) == FILES - {"manifest.json"}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: (whole / name).stat().st_size for name in manifest["files"]
    }

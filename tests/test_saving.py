"""Saving by many ranks and in the background: any block is read back to the bit, and no failure goes unsaid."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from schoolhouse import checkpoint, saving
from schoolhouse.checkpoint import OPTIMIZER, WEIGHTS, Piece
from schoolhouse.errors import CheckpointError
from schoolhouse.saving import Saver, Storage


def together(parent: Path, held: list[dict[str, Piece]], step: int = 5) -> list[Future[Path]]:
    """All ranks write one checkpoint, each in a thread as if in a process of its own."""
    ranks = len(held)
    with ThreadPoolExecutor(ranks) as pool:
        return [
            pool.submit(saving.write, Storage(parent, rank, ranks), step, {WEIGHTS: mine, OPTIMIZER: {}}, {}, "")
            for rank, mine in enumerate(held)
        ]


def rows_of(whole: Tensor, cuts: list[int], rank: int) -> Piece:
    begin, end = cuts[rank], cuts[rank + 1]
    return Piece(whole[begin:end].contiguous(), (begin, *[0] * (whole.ndim - 1)), tuple(whole.shape))


# Many ranks.


@profile(max_examples=25)
@given(st.data())
def test_any_block_is_read_from_what_any_ranks_wrote(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random cuts over 1 to 4 ranks, some with nothing; random blocks of two dimensions: equal to the whole's."""
    ranks = data.draw(st.integers(1, 4))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    cuts = [0, *sorted(data.draw(st.integers(0, rows)) for _ in range(ranks - 1)), rows]
    held = [{"matrix": rows_of(whole, cuts, rank)} if cuts[rank] < cuts[rank + 1] else {} for rank in range(ranks)]
    held[0]["step"] = Piece(torch.tensor(7.0), (), ())
    parent = tmp_path_factory.mktemp("many") / "checkpoints"
    written = [one.result() for one in together(parent, held)]
    assert set(written) == {parent / "step-00000005"} and [path.name for path in parent.iterdir()] == ["step-00000005"]
    found = checkpoint.verify(written[0])
    assert found == checkpoint.opened(written[0])
    assert torch.equal(found.tensors(WEIGHTS)["matrix"], whole) and found.read(WEIGHTS, "step") == 7
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    high, wide = data.draw(st.integers(0, rows - top)), data.draw(st.integers(0, columns - left))
    block = found.read(WEIGHTS, "matrix", (top, left), (high, wide))
    assert torch.equal(block, whole[top : top + high, left : left + wide])
    names = {path.name for path in written[0].glob("*.safetensors")}
    assert names == {f"{kind}-{rank:05d}.safetensors" for kind in (WEIGHTS, OPTIMIZER) for rank in range(ranks)}


def test_a_rank_opens_only_the_files_that_it_needs(tmp_path: Path) -> None:
    whole = torch.arange(8.0).reshape(4, 2)
    held = [{"matrix": rows_of(whole, [0, 2, 4], rank)} for rank in range(2)]
    path = together(tmp_path / "checkpoints", held)[0].result()
    found = checkpoint.verify(path)
    (path / "weights-00001.safetensors").unlink()
    assert torch.equal(found.read(WEIGHTS, "matrix", (1, 0), (1, 2)), whole[1:2])


def test_a_hole_between_the_pieces_is_refused(tmp_path: Path) -> None:
    """Every byte is as written, and still a row is nobody's: never filled with what the memory held."""
    whole = torch.arange(8.0).reshape(4, 2)
    found = checkpoint.verify(together(tmp_path / "c", [{"matrix": rows_of(whole, [0, 3, 4], 0)}])[0].result())
    with pytest.raises(CheckpointError, match="pieces for 6 of 8 values of matrix"):
        found.read(WEIGHTS, "matrix")


def test_sharded_and_replicated_tensors_are_written_once(tmp_path: Path) -> None:
    """A mesh of 2 copies x 2 shards: of 4 ranks each shard has one writer, and each rank reads back its own part."""
    wholes = {"matrix": torch.randn(5, 3), "one row": torch.randn(1, 3), "plain": torch.randn(4)}
    held: list[dict[str, Piece]] = []
    for rank in range(4):
        with_rank(rank, lambda rank=rank: held.append({
            name: one for name, tensor in sharded(wholes).items() if (one := checkpoint.piece(tensor, rank))
        }))
    writers = {name: [rank for rank, mine in enumerate(held) if name in mine] for name in wholes}
    assert writers == {"matrix": [0, 1], "one row": [0], "plain": [0]}
    found = checkpoint.verify(together(tmp_path / "checkpoints", held)[0].result())
    assert all(torch.equal(found.read(WEIGHTS, name), whole) for name, whole in wholes.items())
    for rank in range(4):
        with_rank(rank, lambda: [
            check_own(found.like(WEIGHTS, name, tensor), tensor) for name, tensor in sharded(wholes).items()
        ])


def check_own(read: Tensor, tensor: Tensor) -> None:
    assert torch.equal(read, tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def sharded(wholes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first two over a mesh, as FSDP2 holds them; no process talks to another here, so shards are cut by hand."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {
        name: whole if name == "plain"
        else distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)
        for name, whole in wholes.items()
    }


def with_rank(rank: int, act: Callable[[], object]) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        act()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_when_one_rank_cannot_write_all_ranks_hear_of_it(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's error names the rank that failed; nothing is left; the checkpoint before is whole."""
    whole, parent = torch.arange(6.0).reshape(6, 1), tmp_path / "checkpoints"
    held = [{"matrix": rows_of(whole, [0, 2, 4, 6], rank)} for rank in range(3)]
    together(parent, held, 3)
    plain = saving.save_file

    def fill(named: dict[str, Tensor], path: Path) -> None:
        if f"-{broken:05d}" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(named, path)

    monkeypatch.setattr(saving, "save_file", fill)
    monkeypatch.setattr(saving, "PATIENCE", 5.0)
    faults = [one.exception() for one in together(parent, held)]
    assert [type(fault) for fault in faults] == [CheckpointError] * 3
    assert "No space left" in str(faults[0]) and (broken == 0 or f"rank {broken}" in str(faults[0]))
    found, rejected = checkpoint.newest(parent)
    assert found is not None and found.step == 3 and rejected == []


# In the background.


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(Storage(tmp_path / "checkpoints"), keep=2)


def begin(saver: Saver, step: int, tensor: Tensor) -> None:
    saver.save(step, {WEIGHTS: [("one", tensor)], OPTIMIZER: []}, {}, "")


def test_what_is_saved_is_the_state_at_the_call(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on into the same memory before a byte is written; the checkpoint has the values of its step."""
    go, plain = threading.Event(), saving.write
    monkeypatch.setattr(saving, "write", lambda *told: (go.wait(10), plain(*told)))
    tensor = torch.zeros(3)
    for step in (1, 2, 3):
        tensor.fill_(step)
        begin(saver, step, tensor)
        assert saver.finished() is None, "it is still being written, and nobody waits"
        tensor.fill_(-1)
        go.set()
        assert saver.finish().step == step and saver.finish() is None
        go.clear()
        found = checkpoint.verify(saver.storage.parent / f"step-{step:08d}")
        assert found.read(WEIGHTS, "one").tolist() == [step] * 3
    assert [path.name[-1] for path in checkpoint.steps_in(saver.storage.parent)] == ["2", "3"]


def test_a_failure_in_the_background_is_raised_once_seen(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    begin(saver, 1, torch.zeros(1))
    limit = time.monotonic() + 10
    with pytest.raises(CheckpointError, match="Input/output error"):
        while time.monotonic() < limit:
            saver.finished()
    assert saver.finished() is None and list(saver.storage.parent.iterdir()) == []


def test_host_memory_is_taken_once(saver: Saver) -> None:
    """The second copy goes where the first went: no page of new memory, so a stall is no more than the copying."""
    tensor = torch.zeros(1000)
    begin(saver, 1, tensor)
    saver.finish()
    before = {name: host.data_ptr() for name, host in saver._host.items()}
    begin(saver, 2, tensor)
    saver.finish()
    assert {name: host.data_ptr() for name, host in saver._host.items()} == before

"""Where a process stands: the environments of torchrun, SLURM and Kubernetes; layouts that cannot be."""

from __future__ import annotations

import re

import pytest
import torch

from schoolhouse.config import Parallel
from schoolhouse.errors import MeshError
from schoolhouse.parallel import mesh, ulysses
from schoolhouse.parallel.place import Degrees, Place, degrees, first_host, machines, place

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "8",
         "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-10]"}


@pytest.mark.parametrize(("environment", "wanted"), [
    ({}, Place()),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     Place(3, 4, 1, "a:1")),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},  # a pod of a PyTorchJob
     Place(1, 2, 0, "job-master-0:23456")),
    (SLURM, Place(5, 8, 1, "gpu07:23456")),
    ({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "77"}, Place(5, 8, 1, "head:77")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place()),  # the batch script itself, outside srun
    ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "MASTER_ADDR": "head", "MASTER_PORT": "9"}, Place(2, 4, 0, "head:9")),
    ({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}, Place(0, 2, 0, "localhost:29500")),  # torchrun inside a SLURM job
])
def test_place(environment: dict[str, str], wanted: Place) -> None:
    assert place(environment) == wanted


@pytest.mark.parametrize("environment", [
    {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2",
                                                                         "MASTER_PORT": "y"},
])
def test_a_broken_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(MeshError):
        place(environment)


@pytest.mark.parametrize(("nodes", "first"), [
    ("a", "a"), ("a,b", "a"), ("n[3,5-7]", "n3"), ("n[03-07].cluster,m1", "n03.cluster"), ("x-[1-2]", "x-1"),
])
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(("world", "settings", "wanted"), [
    (1, {}, (1, 1, 1)), (8, {}, (1, 8, 1)), (8, {"ulysses": 2}, (1, 4, 2)),
    (8, {"replicate": 2, "ulysses": 2}, (2, 2, 2)), (4, {"replicate": 4, "shard": 1}, (4, 1, 1)),
])
def test_degrees(world: int, settings: dict[str, int], wanted: tuple[int, int, int]) -> None:
    assert degrees(Parallel(**settings), world) == Degrees(*wanted)


@pytest.mark.parametrize(("world", "settings"), [
    (1, {"ulysses": 2}), (4, {"ulysses": 3}), (4, {"shard": 2}), (2, {"replicate": 4}), (1, {"offload": True}),
])
def test_a_layout_that_cannot_be_is_refused(world: int, settings: dict[str, int]) -> None:
    with pytest.raises(MeshError) as caught:
        degrees(Parallel(**settings), world)
    assert caught.value.exit_code == 2
    told = re.search(r"--nproc (\d+)", caught.value.remedy)
    if told and not settings.get("offload"):
        assert degrees(Parallel(**settings), int(told[1])), "what it says would work"


def test_heads_that_cannot_be_divided_are_refused_with_the_nearest_degree() -> None:
    ulysses.refuse_heads(14, 7)
    with pytest.raises(MeshError, match="14 attention heads") as caught:
        ulysses.refuse_heads(14, 4)
    assert "parallel.ulysses=2" in caught.value.remedy


@pytest.mark.parametrize(("heads", "degree", "times"), [
    (8, 2, 1), (2, 4, 2), (1, 4, 4), (6, 4, 2), (3, 2, 2), (4, 4, 1),
])
def test_key_heads_are_repeated_exactly_as_far_as_needed(heads: int, degree: int, times: int) -> None:
    assert ulysses.repeats(heads, degree) == times
    assert heads * times % degree == 0 and all(heads * fewer % degree for fewer in range(1, times))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind: str) -> None:
    ulysses.refuse_rope({"rope_parameters": {"rope_type": "yarn"}}, 2)
    with pytest.raises(MeshError):
        ulysses.refuse_rope({"rope_parameters": {"rope_type": kind}}, 2)


@pytest.mark.parametrize(("named", "wanted"), [(None, 1), ("1", 1), ("4", 4), ("2:8", 2)])
def test_machines_are_counted_as_torchrun_counts_them(named: str | None, wanted: int) -> None:
    assert machines({} if named is None else {"PET_NNODES": named}) == wanted


@pytest.mark.parametrize("named", ["", "two", "0", "-1", ":3"])
def test_a_number_of_machines_that_is_none_is_refused(named: str) -> None:
    with pytest.raises(MeshError, match="PET_NNODES"):
        machines({"PET_NNODES": named})


def test_an_accelerator_that_is_named_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process with device=cuda:1: what waits for "the device", or launches on it, means this one."""
    current = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    for name in ("cpu", "cuda:1"):
        mesh.connect(Parallel(), torch.device(name))
    assert current == [1]

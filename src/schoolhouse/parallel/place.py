"""Which process this is among how many, as `torchrun`, SLURM or Kubernetes say it; and how they are laid out.

No torch here: a layout that cannot be is refused before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from schoolhouse.config import Parallel
from schoolhouse.errors import MeshError

LOWEST_PORT, PORTS = 20_000, 20_000
"""Ports from which a SLURM job takes one by its number, so that two jobs of a machine differ."""


@dataclass(frozen=True, slots=True)
class Place:
    """One process among `world`; `local` counts those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    address: str | None = None
    """`host:port` where rank 0 listens; None for one process alone."""


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many processes stand along each axis; their product is the number of processes."""

    replicate: int = 1
    shard: int = 1
    ulysses: int = 1

    def __str__(self) -> str:
        return f"replicate {self.replicate} × shard {self.shard} × ulysses {self.ulysses}"


def place(environment: Mapping[str, str]) -> Place:
    """Where this process stands; alone where the environment names no others.

    `RANK` and `WORLD_SIZE` are set by torchrun and by Kubernetes' PyTorchJob, `SLURM_…` by srun.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        host, port = environment.get("MASTER_ADDR", "localhost"), environment.get("MASTER_PORT", "29500")
    elif _tasks(environment) is not None:
        names = ("SLURM_PROCID", _tasks(environment), "SLURM_LOCALID")
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
        host = environment.get("MASTER_ADDR") or first_host(nodes)
        job = int(environment.get("SLURM_JOB_ID", "0"))
        port = environment.get("MASTER_PORT") or str(LOWEST_PORT + job % PORTS)
    else:
        return Place()
    try:
        rank, world, local = (int(environment.get(name, "0")) for name in names)
        found = Place(rank, world, local, f"{host}:{int(port)}")
    except ValueError:
        shown = " ".join(f"{name}={environment.get(name)}" for name in names)
        raise MeshError(
            f"the environment's {shown} MASTER_PORT={port} are not all numbers", required="whole numbers",
            where="environment variables", remedy="start with `run --nproc N`, torchrun or srun, which set them",
        ) from None
    if not 0 <= rank < world:
        raise MeshError(
            f"the environment says process {rank} of {world}", required="a rank below the number of processes",
            where="environment variables", remedy="start with `run --nproc N`, torchrun or srun, which set them",
        )
    return found if world > 1 else Place()


def machines(environment: Mapping[str, str]) -> int:
    """How many machines `run --nproc` is started on: torchrun's `PET_NNODES`, the least where it names a range."""
    named = environment.get("PET_NNODES", "1").split(":")[0]
    if not named.isdecimal() or int(named) < 1:
        raise MeshError(
            f"the environment's PET_NNODES={named} is no number of machines", required="a whole number, at least 1",
            where="environment variables", remedy="set PET_NNODES to the number of machines, or unset it",
        )
    return int(named)


def _tasks(environment: Mapping[str, str]) -> str | None:
    """The variable that holds the number of tasks, inside `srun`; a batch script itself is one process alone."""
    if "SLURM_PROCID" not in environment:
        return None
    if "SLURM_STEP_NUM_TASKS" in environment:
        return "SLURM_STEP_NUM_TASKS"
    return "SLURM_NTASKS" if "SLURM_NTASKS" in environment and "MASTER_ADDR" in environment else None


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: `node[07-09,12],other` begins with `node07`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def degrees(settings: Parallel, world: int) -> Degrees:
    """The layout of `world` processes; raises MeshError where the axes do not multiply to them."""
    fixed = settings.replicate * settings.ulysses
    shard = world // fixed if settings.shard == -1 else settings.shard
    if shard < 1 or fixed * shard != world:
        count = fixed if settings.shard == -1 else fixed * settings.shard
        start = f"a multiple of {count} processes, e.g." if settings.shard == -1 else f"{count} processes:"
        asked = f"replicate {settings.replicate} × shard {settings.shard} × ulysses {settings.ulysses}"
        raise MeshError(
            f"{world} process(es) cannot be laid out as {asked}",
            required="axes whose product is the number of processes (shard -1 takes the rest)",
            where="parallel.replicate, parallel.shard, parallel.ulysses",
            remedy=f"start {start} --nproc {count}, or change the axes",
        )
    if settings.offload and world == 1:
        raise MeshError(
            "parallel.offload=true does nothing for one process", required="two processes at least",
            where="parallel.offload", remedy="start with --nproc, or set parallel.offload=false",
        )
    return Degrees(settings.replicate, shard, settings.ulysses)

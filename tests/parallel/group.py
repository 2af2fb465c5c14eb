"""Several processes joined by gloo, which run the cases of a module and say what came out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from schoolhouse.parallel import fsdp
from schoolhouse.parallel import mesh as meshes
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.parallel.place import Degrees, place

HERE = Path(__file__).parent
SECONDS = 900
Layout = tuple[int, int, int]
"""Replicate, shard, ulysses."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(script: str, world: int, names: Sequence[str] = (), seconds: float = SECONDS) -> dict[str, Any]:
    """Run the cases `names` of a script in `world` processes; what each case returned in rank 0."""
    port = str(free_port())
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "numerics"), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world),
                   "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *names]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        said = [one.communicate(timeout=seconds) for one in started]
    finally:
        for one in started:
            one.kill()
    faults = [f"rank {rank}:\n{err[-1500:]}" for rank, (one, (_, err)) in enumerate(zip(started, said, strict=True))
              if one.returncode]
    assert not faults, "\n".join(faults)
    return dict(json.loads(line) for line in said[0][0].splitlines() if line.startswith("["))


def main(cases: dict[str, Callable[[], Any]]) -> None:
    """Join, run the cases named on the command line (all of them without), and print each one's value.

    Blocks of miniatures are groups of their own, as those of real models are.
    """
    fsdp.SMALL = 0
    meshes.join(place(os.environ), torch.device("cpu"))
    for name in sys.argv[1:] or cases:
        print(json.dumps([name, cases[name]()]), flush=True)
    dist.destroy_process_group()


def mesh(layout: Layout) -> Mesh:
    """The mesh of a layout among the processes of this group."""
    return meshes.arrange(place(os.environ), Degrees(*layout), torch.device("cpu"))

"""The mesh: this process among all, and the few things all of them decide together.

Axes: `replicate x shard x ulysses`, the last one fastest. The ranks of a Ulysses group share every micro-batch, each
with a part of its tokens; the data ranks, replicate x shard of them, take different micro-batches. Parameters are cut
over shard x ulysses and held `replicate` times. Nothing in the loss knows any of this.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from schoolhouse.config import Parallel
from schoolhouse.parallel.place import Degrees, Place, degrees, place

PATIENCE = datetime.timedelta(hours=24)
"""How long a collective may wait. A hang is found by `parallel.hang_timeout`, not by this."""


class Pulse:
    """When all processes last took part in something."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def beat(self) -> None:
        """Now."""
        self._last = time.monotonic()

    def age(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._last


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process among all; without arguments, one process alone."""

    place: Place = field(default_factory=Place)
    degrees: Degrees = field(default_factory=Degrees)
    parameters: DeviceMesh | None = None
    """[replicate, shard x ulysses]: the mesh of `fully_shard`."""
    sequence: DeviceMesh | None = None
    """[data, ulysses]: the ranks that share a micro-batch lie along its last axis."""

    device: torch.device | None = None
    """Where this process computes; None for one process, whose model says so itself."""
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def rank(self) -> int:
        """This process, counted from 0."""
        return self.place.rank

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.place.world

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run directory and the screen."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """The number of micro-batches computed at the same time."""
        return self.degrees.replicate * self.degrees.shard

    @property
    def data_rank(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.degrees.ulysses

    @property
    def ulysses(self) -> int:
        """The number of processes that share a micro-batch."""
        return self.degrees.ulysses

    @property
    def ulysses_rank(self) -> int:
        """Which part of its tokens is this process's."""
        return self.rank % self.degrees.ulysses

    @property
    def seat(self) -> tuple[int, int]:
        """This process among those that share a micro-batch, and how many these are."""
        return self.ulysses_rank, self.ulysses

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all of them get the same answer."""
        return bool(self.sum(torch.tensor(float(flag)))) if self.world > 1 else flag

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, on the device of `values`; float64 in, float64 out."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        self.pulse.beat()
        return total

    def share(self, value: Any) -> Any:
        """What rank 0 says (anything JSON can hold), in every process."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        size = int(self.sum(torch.tensor(len(text))))
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.is_first:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return json.loads(bytes(buffer.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """What every process says (anything JSON can hold), in the order of their ranks, in every process."""
        if self.world == 1:
            return [value]
        text = json.dumps(value).encode()
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(text)
        sizes = self.sum(sizes)
        everything = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
        start = int(sizes[: self.rank].sum())
        everything[start : start + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = self.sum(everything).split(sizes.tolist())
        return [json.loads(bytes(part.tolist())) for part in parts]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.sum(torch.zeros(()))


ALONE = Mesh()
"""One process."""


def connect(settings: Parallel, device: torch.device) -> Mesh:
    """Join the other processes that the environment names, each on its device.

    Raises MeshError where the layout does not fit them.
    """
    here = place(os.environ)
    layout = degrees(settings, here.world)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if here.world == 1:
        return Mesh(here, layout)
    join(here, device)
    return arrange(here, layout, device)


def arrange(here: Place, layout: Degrees, device: torch.device) -> Mesh:
    """The mesh of a layout, among processes that have joined."""
    shape = (layout.replicate, layout.shard * layout.ulysses)
    parameters = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    sequence = init_device_mesh(
        device.type, (layout.replicate * layout.shard, layout.ulysses), mesh_dim_names=("data", "ulysses")
    )
    return Mesh(here, layout, parameters, sequence, device)


def join(here: Place, device: torch.device) -> None:
    """Start the process group: gloo for what lies in host memory, the accelerator's own library beside it."""
    own = dist.get_default_backend_for_device(device)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{own}"
    url = "env://" if "TORCHELASTIC_RUN_ID" in os.environ else f"tcp://{here.address}"
    store, rank, world = next(dist.rendezvous(url, here.rank, here.world, timeout=PATIENCE))
    # workers that were started again may find the same store: the addresses of the dead must not be met
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=world, timeout=PATIENCE
    )


def leave(mesh: Mesh) -> None:
    """Take this process out of the group, after all work is done."""
    if mesh.world > 1:
        dist.destroy_process_group()

"""What a layout costs: bytes sent by a step, bytes kept for backward, and how long a conversation fits.

Run by `test_costs.py`, in groups of processes.
"""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

import group
import numpy as np
import torch
from matrix import step_of
from test_invariance import a_store, example, student
from torch.utils._python_dispatch import TorchDispatchMode

from schoolhouse import train
from schoolhouse.config import Lora
from schoolhouse.model import lora
from schoolhouse.model.load import Student
from schoolhouse.parallel import fsdp
from schoolhouse.types import Example

SENT = {"alltoall_base_": 1, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
"""Collectives by torch's names, and which of their two buffers is the one that all processes' parts lie in."""
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}


class Traffic(TorchDispatchMode):
    """Bytes that leave this process, by collective: of a buffer for P processes, (P - 1) / P."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.bytes = world, Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function._schema.name.removeprefix("c10d::")
        if name in SENT:
            buffer = args[SENT[name]]
            self.bytes[name] += buffer.nbytes * (self.world - 1) // self.world
        return function(*args, **(kwargs or {}))


def placed(layout: group.Layout, **changes: Any) -> Student:
    """A student in float32, cut over a layout."""
    mesh = group.mesh(layout)
    one = Student(student("qwen3", tied=False, **{**WIDTH, **changes}).model.float(), mesh)
    fsdp.shard(one, mesh, torch.float32, offload=False)
    return one


def conversation(tokens: int) -> list[Example]:
    return [example(tokens, np.random.default_rng(3), "whole")]


def learn(one: Student, rows: list[Example]) -> None:
    """The gradient of one step over the same conversation for every data rank."""
    copies = rows * one.mesh.data_ranks
    train.compute_gradient(one, step_of(a_store(copies), one.mesh, "uneven", len(rows[0].input_ids)), seed=0)


def traffic(layout: group.Layout, tokens: int) -> dict[str, int]:
    """Bytes sent by one process in a step of one micro-batch."""
    one = placed(layout)
    learn(one, conversation(tokens))  # the first step also makes what later ones find
    with Traffic(int(os.environ["WORLD_SIZE"])) as counted:
        learn(one, conversation(tokens))
    return {**counted.bytes, "parameters": sum(p.numel() for p in one.parameters()),
            "blocks": sum(p.numel() for block in fsdp.blocks(one) for p in block.parameters())}


def kept(layout: group.Layout, tokens: int) -> int:
    """Bytes that a forward keeps for its backward, weights aside."""
    one, storages = placed(layout), {}
    learn(one, conversation(16))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        learn(one, conversation(tokens))
    return sum(storages.values())


def formats(layout: group.Layout) -> list[list[str]]:
    """Number formats of what a student with adapters holds of its weights in bfloat16: frozen ones, and trained ones
    after a step."""
    one = Student(student("qwen3", tied=False, **WIDTH).model.float(), group.mesh(layout))
    lora.inject(one.model, Lora(rank=2))
    fsdp.shard(one, one.mesh, torch.bfloat16, offload=False)
    learn(one, conversation(64))
    assert all(value.grad is not None for value in one.parameters() if value.requires_grad)
    return [sorted({str(fsdp.own_part(value).dtype) for value in one.parameters() if value.requires_grad == trained})
            for trained in (False, True)]


def fits(layout: group.Layout, tokens: int, megabytes: int) -> bool:
    """Whether a conversation trains when this process may take so much more memory."""
    one = placed(layout)
    learn(one, conversation(64))
    with open("/proc/self/status", encoding="utf-8") as file:  # noqa: PTH123
        taken = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + megabytes * 2**20, limits[1]))
    try:
        learn(one, conversation(tokens))
        return True
    except RuntimeError as error:
        assert "memory" in str(error), error
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


CASES: dict[str, Callable[[], Any]] = {
    "traffic 1x1x2": lambda: traffic((1, 1, 2), 64), "traffic 1x2x1": lambda: traffic((1, 2, 1), 64),
    "formats 1x2x1": lambda: formats((1, 2, 1)),
    "traffic 1x1x4": lambda: traffic((1, 1, 4), 64),
    "kept 2x1x1": lambda: kept((2, 1, 1), 2048), "kept 1x1x2": lambda: kept((1, 1, 2), 2048),
    "fits 4x1x1 one": lambda: fits((4, 1, 1), 2000, 64), "fits 4x1x1 four": lambda: fits((4, 1, 1), 8000, 64),
    "fits 1x1x4 four": lambda: fits((1, 1, 4), 8000, 64),
}

if __name__ == "__main__":
    group.main(CASES)

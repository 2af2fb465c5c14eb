"""The cases of the invariance matrix: loss and every gradient of a layout against the plain loop, in one process each.

Run by `test_invariance_of_layouts.py`, in groups of processes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import group
import numpy as np
import torch
import torch.distributed as dist
from plain_sft import plain_gradient
from test_invariance import a_store, example, examples, student
from test_shared_prefixes import branches
from torch.distributed.tensor import DTensor
from true_float64 import TrueFloat64

from schoolhouse import places, train
from schoolhouse.config import Lora, Model
from schoolhouse.data import loader
from schoolhouse.data.packs import partition
from schoolhouse.data.store import Store
from schoolhouse.model import blocks, fourbit, load
from schoolhouse.model.load import Student
from schoolhouse.parallel import fsdp
from schoolhouse.parallel.mesh import ALONE, Mesh
from schoolhouse.types import Example, PlannedStep, Step

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 4,
}
EXPERTS = ("mixture", "latent", "sinks")
STUDENTS: dict[str, Callable[[], Student]] = {
    "tied": lambda: student("qwen3"),
    "untied": lambda: student("qwen2", tied=False),
    "multi-query": lambda: student("qwen3", num_key_value_heads=1),
    "three heads of keys": lambda: student("qwen3", num_attention_heads=12, num_key_value_heads=6),
    "sliding window": lambda: student("mistral"),
    "soft caps": lambda: student("gemma2"),
    "sinks": lambda: student("gpt_oss", tied=False, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "mixture": lambda: student("qwen3_moe", tied=False, **MOE),
    "latent": lambda: student("deepseek_v3", tied=False, **MLA),
}


def made_student(made: str, narrow: bool) -> Student:
    """A student in float64, or in float32; PyTorch's grouped product of experts has no float64."""
    one = STUDENTS[made]()
    if made in EXPERTS and not narrow:
        one.model.set_experts_implementation("eager")
    return Student(one.model.float() if narrow else one.model.double())


def rows(kind: str) -> list[Example]:
    """`uneven`: lengths from 1 to 90; `silent`: a data rank's examples have no target; `few`: fewer than ranks;
    `branches`: they begin alike."""
    generator = np.random.default_rng(11)
    if kind == "branches":
        return branches()
    if kind == "few":
        return examples("fractional", number=1, seed=12)
    lengths = [1, 90, 3, 41, 17, 2, 30, 8, 8, 25]
    made = [example(length, generator, "fractional") for length in lengths]
    return [*made, *(example(60, generator, "none") for _ in range(6))] if kind == "silent" else made


def step_of(stored: Store, mesh: Mesh, kind: str, tokens: int = 100) -> Step:
    """This rank's part of one step over all rows of a store; of `silent` rows all that teach go to data rank 0."""
    packs = partition(stored.lengths, tokens, mesh.data_ranks)
    if kind == "silent":
        spoken, silent = ([int(one) for one in np.flatnonzero(chosen)] for chosen in
                          (stored.supervised > 0, stored.supervised == 0))
        packs = [spoken if mesh.data_ranks > 1 else spoken + silent]
        packs += [silent[rank :: mesh.data_ranks - 1] for rank in range(mesh.data_ranks - 1)]
    planned = PlannedStep(
        1, 0, tuple(map(tuple, packs)), int(stored.lengths.sum()), int(stored.supervised_tokens.sum()),
        float(stored.supervised.sum()),
    )
    mine = packs[mesh.data_rank :: mesh.data_ranks]
    return Step(planned, [loader.micro_batch(stored, pack) for pack in mine])


@functools.cache
def wanted_of(made: str, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain loop."""
    with TrueFloat64():
        return plain_gradient(made_student(made, False).model, rows(kind))


def compare(
    made: str, kind: str, layout: group.Layout, narrow: bool = False, again: bool = False, small: int = 0,
    multiple: int = 1,
) -> float:
    """The largest difference of loss and gradients from the plain loop, relative to the longest gradient.

    `narrow` computes the layout's side in float32, `again` with activation checkpointing of all but attention; blocks
    of fewer than `small` weights are one group with the rest; micro-batches are filled up to a `multiple`.
    """
    one, taught, mesh = made_student(made, narrow), rows(kind), group.mesh(layout)
    wanted_loss, wanted = wanted_of(made, kind)
    if again:
        blocks.compute_again(one.model, keep_attention=True)
    placed = Student(one.model, mesh)
    placed.multiple = multiple
    with mock.patch.object(fsdp, "SMALL", small):
        fsdp.shard(placed, mesh, torch.float32 if narrow else torch.float64, offload=False)
    assert (len(fsdp.groups(placed)) == 1) == bool(small)
    with nullcontext() if narrow else TrueFloat64():
        loss, *_ = train.compute_gradient(placed, step_of(a_store(taught), mesh, kind), seed=0)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    worst = abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-6)
    found = {name: parameter.grad for name, parameter in placed.model.named_parameters()}
    for name, gradient in wanted.items():
        assert isinstance(found[name], DTensor), name
        whole = found[name].full_tensor()
        worst = max(worst, float((whole.double() - gradient).norm()) / max(largest, 1e-3))
    missing = [name for name, grad in found.items() if grad is not None and name not in wanted]
    assert all(not found[name].full_tensor().any() for name in missing), missing
    assert placed.exchange is None or placed.exchange.calls
    return worst


def four_bits(layout: group.Layout, base: Path) -> float:
    """QLoRA, each block a group of its own and recomputed: the largest difference of loss and adapters' gradients from
    those of one process, in float32, relative to the longest gradient."""
    mesh, found = group.mesh(layout), []
    settings = Model(path=str(base), activation_checkpointing=True)
    for here in (ALONE, mesh):
        torch.manual_seed(0)
        model = load.load(base, settings, torch.device("cpu"), Lora(rank=4, alpha=8.0, base="nf4")).model
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
        placed, kept = Student(model, here), fourbit.matrices(model)
        if here.world > 1:
            fsdp.shard(placed, mesh, torch.float32, offload=False, kept=kept)
            assert len(fsdp.groups(placed)) == 5 and fourbit.matrices(model) == kept
        loss, *_ = train.compute_gradient(placed, step_of(a_store(rows("uneven")), here, "uneven"), seed=0)
        trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in trained.items()}
        found.append((loss, whole))
    (wanted_loss, wanted), (loss, gradients) = found
    assert wanted.keys() == gradients.keys()
    largest = max(float(one.norm()) for one in wanted.values())
    apart = max(float((gradients[name] - one).norm()) for name, one in wanted.items())
    return max(abs(loss - wanted_loss) / abs(wanted_loss), apart / largest)


def layouts(world: int) -> list[group.Layout]:
    """All ways to put `world` processes on three axes."""
    return [axes for axes in itertools.product(range(1, world + 1), repeat=3) if np.prod(axes) == world]


def named(world: int) -> dict[str, Callable[[], float]]:
    """Every case of the matrix for `world` processes, by name."""
    cases, base = {}, places.model_directory("starter/qwen3")  # transformers writes a model on rank 0 only, once joined
    for layout, made, kind in itertools.product(layouts(world), STUDENTS, ("uneven", "silent", "few", "branches")):
        name = f"{made}, {kind}, {'x'.join(map(str, layout))}"
        cases[name] = functools.partial(compare, made, kind, layout)
        if kind == "uneven":
            cases[f"{name}, float32"] = functools.partial(compare, made, kind, layout, narrow=True)
    for layout in layouts(world):
        name = f"tied, uneven, {'x'.join(map(str, layout))}, float32 recomputed"
        cases[name] = functools.partial(compare, "tied", "uneven", layout, narrow=True, again=True)
        name = f"tied, uneven, {'x'.join(map(str, layout))}, blocks together"
        cases[name] = functools.partial(compare, "tied", "uneven", layout, small=1 << 20)
        name = f"tied, branches, {'x'.join(map(str, layout))}, filled up"
        cases[name] = functools.partial(compare, "tied", "branches", layout, multiple=8)
        if find_spec("torchao"):
            name = f"4 bits, {'x'.join(map(str, layout))}, float32 recomputed"
            cases[name] = functools.partial(four_bits, layout, base)
    return cases


if __name__ == "__main__":
    import os

    group.main(named(int(os.environ["WORLD_SIZE"])))
    assert not dist.is_initialized()

"""What a run holds in memory, part by part: foreseen before anything is loaded, counted in tensors, and resident.

    python benchmarks/memory.py examples/sft/gsm8k/starter.yaml [key=value …]

The heaviest micro-batch that the recipe can meet goes forward, backward and through an update, as in the rehearsal of a
run. `foreseen` is what `schoolhouse check` says, and for activations what the same forward saves on the device `meta`,
where tensors have shapes and no memory. `tensors` are bytes of storages, each once. `resident` is how much the process
grew, by Linux, after free memory was given back; pages of mapped files count when they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from schoolhouse import estimate, fitting, loss, memory, overview, places
from schoolhouse import recipe as recipes
from schoolhouse.data import loader, served
from schoolhouse.data import plan as plans
from schoolhouse.model import attention, blocks, elementwise, load, lora, sight
from schoolhouse.model.load import Student
from schoolhouse.model.shared_prefixes import unfolded
from schoolhouse.model.teaching import Drawn
from schoolhouse.optim import Optimizer
from schoolhouse.screen import Screen
from schoolhouse.types import MicroBatch, Vision

CPU = torch.device("cpu")
MIB = 2**20


def main() -> None:
    """Foresee, load, train one micro-batch, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="key=value, put over the recipe's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(Path(options.recipe), options.settings)
    print(f"{found['tokens']:,} tokens, {found['targets']:,} supervised, in one micro-batch; MiB")
    print(f"{'':<34}{'foreseen':>10}{'tensors':>10}{'resident':>10}")
    for name, row in found["parts"].items():
        print(f"{name:<34}" + "".join(f"{'-' if one is None else f'{one / MIB:,.1f}':>10}" for one in row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def measure(path: Path, settings: list[str]) -> dict[str, Any]:
    """Bytes of each part: foreseen, counted, resident."""
    recipe = recipes.read(path, settings)
    directory = places.directory_of(recipe.model)
    serving = served.serving(recipe.model, directory, datetime.date.today())
    store, _ = overview.stores(recipe, serving, Screen())
    seeing = served.load(serving).sight
    plan = plans.plan(store, recipe, shares=seeing is None)
    pack = fitting.heaviest_packs(plan, store.largest_image)[0]
    seen = next(iter(loader.pixels(store, iter([pack]), seeing, len(pack), CPU)))
    micro = unfolded(loader.micro_batch(store, pack, seeing, seen))
    foreseen = estimate.memory(recipe, load.skeleton(directory, recipe.lora, recipe.model.freeze))
    attention.register()
    ahead = _saved_on_meta(recipe, directory, micro)

    program, _ = _look()
    student = load.load(directory, recipe.model, CPU, recipe.lora)
    optimizer = Optimizer(student.model, recipe.optim, recipe.model.precision)
    held = _bytes([*student.model.parameters(), *optimizer.masters.values()])
    loaded, _ = _look()
    with _counted(student.model) as saved:
        out = student.loss(micro, Drawn(0, 0)).nll / micro.supervised
    kept, (forward, most) = sum(saved.values()), _look()
    out.backward()
    del out
    backward, peak = _look()
    gradients = _bytes(one.grad for one in optimizer.masters.values() if one.grad is not None)
    optimizer.clip()
    optimizer.step(0.0)
    moments, (updated, last) = optimizer.saved_bytes() - _bytes(optimizer.masters.values()), _look()
    gib = {name: int(foreseen[name] * 2**30) for name in ("weights", "gradients", "moments")}
    return {
        "tokens": micro.input_ids.shape[1], "targets": len(micro.targets), "parts": {
            "program, rows and tokenizer": (None, None, program),
            "weights, masters": (gib["weights"], held, loaded - program),
            "kept by forward for backward": (ahead, kept, forward - loaded),
            "passing in forward (a chunk's logits)": (4 * _chunk(student, micro), None, most - forward),
            "gradients": (gib["gradients"], gradients, backward - loaded),
            "moments": (gib["moments"], moments, updated - backward),
            "peak": (None, None, max(most, peak, last)),
        },
    }


def _saved_on_meta(recipe: Any, directory: Path, micro: MicroBatch) -> int:
    """Bytes that the same forward keeps, by shapes alone."""
    number = getattr(torch, recipe.model.precision)
    with torch.device("meta"):
        configuration = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = sight.loader(directory).from_config(
            configuration, dtype=number, attn_implementation=sight.attentions(directory, attention.NAME))
    if sight.sees(model):
        sight.prepare(model)
    sight.freeze(model, recipe.model.freeze)
    if recipe.lora is not None:
        lora.inject(model, recipe.lora)
    if not recipe.model.compile and not recipe.model.liger:
        elementwise.lighten(model)
    if recipe.model.activation_checkpointing:
        selective = recipe.model.activation_checkpointing == "selective"
        blocks.compute_again(model.train(), recipe.model.precision, keep_attention=selective)
    with _counted(model) as saved:
        Student(model.train()).loss(_without_memory(micro), Drawn(0, 0))
        return sum(saved.values())


def _without_memory(value: Any) -> Any:
    """A micro-batch and its images as shapes."""
    tensors = {one.name: found for one in dataclasses.fields(value)
               if isinstance(found := getattr(value, one.name), torch.Tensor | Vision)}
    return dataclasses.replace(value, **{
        name: _without_memory(found) if isinstance(found, Vision) else found.to("meta")
        for name, found in tensors.items()
    })


@contextlib.contextmanager
def _counted(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd saves inside, by storage, those of weights aside; they are held till then."""
    weights = {one.untyped_storage()._cdata for one in model.parameters()}
    saved: dict[int, int] = {}
    held: list[torch.UntypedStorage] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    def noted(pack: Callable, unpack: Callable) -> saved_tensors_hooks:
        """Hooks of ours, which are asked instead of these."""
        def both(tensor: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
            saved, how = pack(tensor)
            return saved if saved is None else note(saved), how

        return saved_tensors_hooks(both, unpack)

    with saved_tensors_hooks(note, lambda tensor: tensor), patch.object(elementwise, "saved_tensors_hooks", noted):
        yield saved
    held.clear()


def _chunk(student: Student, micro: MicroBatch) -> int:
    """Logits that the loss has at a time."""
    rows = min(len(micro.targets), loss.chunk_rows(student.vocabulary, student.device))
    return rows * student.vocabulary


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages of tensors, each once."""
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())


def _look() -> tuple[int, int]:
    """Bytes resident now, after what is free was given back, and at most since the last look."""
    most = memory.peak(CPU)
    ctypes.CDLL(None).malloc_trim(0)
    return memory.begin_peak(CPU), most


if __name__ == "__main__":
    main()

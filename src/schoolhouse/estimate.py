"""What a run will hold in memory, from names and shapes alone, before anything is loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from schoolhouse import optim
from schoolhouse.config import Recipe
from schoolhouse.model import eightbit, fourbit, lora

GIB = 2**30


def memory(recipe: Recipe, model: PreTrainedModel) -> dict[str, float]:
    """GiB of weights, gradients and moments of one process that trains `model`, given without its weights.

    What a micro-batch needs beside it depends on its length and is not foreseen: it is rehearsed before the first step.
    """
    every = dict(model.named_parameters())
    trained = {name: one.numel() for name, one in every.items() if one.requires_grad}
    held = {name: _bytes_held(recipe, name in trained) * one.numel() for name, one in every.items()}
    if recipe.lora is not None and recipe.lora.base == "nf4":
        narrow = [one.module for one in lora.adapted(model) if not one.embedding]
        weights = {module: model.get_submodule(module).get_base_layer().weight.numel() for module in narrow}
        held |= {f"{module}.base_layer.weight": fourbit.BYTES * count for module, count in weights.items()}
    alone = optim.hidden_matrices(model) & trained.keys() if recipe.optim.name == "muon" else set()
    moment = eightbit.bytes_of if recipe.optim.name == "adamw8bit" else lambda count: 4 * count
    parts = {
        "weights": sum(held.values()), "gradients": 4 * sum(trained.values()),
        "moments": sum(moment(count) * (1 if name in alone else 2) for name, count in trained.items()),
    }
    return {"parameters": sum(one.numel() for one in every.values()),
            **{name: size / GIB for name, size in parts.items()}, "total": sum(parts.values()) / GIB}


def _bytes_held(recipe: Recipe, trained: bool) -> int:
    """Bytes of a weight: of a trained one, its master, and the copy that matrix products read in bfloat16."""
    narrow = recipe.model.precision == "bfloat16"
    return (6 if narrow else 4) if trained else (2 if narrow else 4)


def told(found: dict[str, float]) -> str:
    """The same as a line for people."""
    return (
        f"memory: {found['total']:.2f} GiB (weights {found['weights']:.2f}, gradients {found['gradients']:.2f}, "
        f"moments {found['moments']:.2f}) on one process, less on each of several; and a micro-batch on each"
    )

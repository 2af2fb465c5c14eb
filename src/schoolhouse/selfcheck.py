"""The user's own first rows and model, on the layout asked for, against transformers' own plain forward.

One optimizer step over the first examples is computed twice: as a run computes it (packed, our attention, our loss,
the layout of the recipe), and as plainly as it can be written (one example at a time, the model's own forward with
its eager attention, `F.cross_entropy` on all logits, one division). Loss and gradients must agree, by these measures:

    float32    loss 1e-5, a gradient 1e-4 of its own length. Sums of float32 in another order differ by 1e-7 to 1e-5
               through some dozens of layers; a lost token, a wrong factor or a leak between examples by 1e-3 and more.
    bfloat16   2e-2 more than twice what plain transformers itself is away from float32 in that precision, because
               how far 8 bits of precision carry depends on the model.

The layout is always checked in float32, a recipe in bfloat16 in both. Dropout is off. A group of parameters whose
gradient is shorter than a thousandth of the longest (a bias that the softmax ignores) is measured by that thousandth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from schoolhouse import places, train
from schoolhouse.config import Recipe
from schoolhouse.data import ahead, loader, prepare, served
from schoolhouse.data import plan as plans
from schoolhouse.data.choose import Choice
from schoolhouse.data.served import Serving
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import ModelError
from schoolhouse.model import elementwise, fourbit, load, sight, spread
from schoolhouse.model.teaching import Teaching
from schoolhouse.optim import Optimizer
from schoolhouse.parallel import fsdp
from schoolhouse.parallel.mesh import ALONE, Mesh
from schoolhouse.types import MicroBatch, PlannedStep, Step

LOSS, GRADIENT = 1e-5, 1e-4
"""Relative differences that float32 may show."""
MORE = 2e-2
"""What bfloat16 may show beyond twice plain transformers' own difference."""
FLOOR = 1e-3
"""Gradients shorter than this share of the longest are measured by it."""
WIDTH = 110
"""Columns of the printed table, wide enough for a parameter's name."""
NOTHING = 1e-6
"""A loss or a gradient of this size is none."""

STIRRED = 0.02
"""The size of what adapters are moved by."""

Gradients = Mapping[str, Tensor]
Group = tuple[float, float]
"""Length of a plain gradient, and of the difference from it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison."""

    precision: str
    what: str
    """`loss`, or the parameters of all layers that share a name."""
    plain: float
    """The loss, or the length of the gradient, by plain transformers in float32."""
    difference: float
    """Relative."""
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed; a difference that is no number is not."""
        return self.difference <= self.allowed


def selfcheck(recipe: Recipe, rows: int, mesh: Mesh = ALONE) -> list[Line]:
    """Compare the first `rows` rows' step with plain transformers, in float32 and in the recipe's precision.

    All processes of the mesh compute their part of the step; the first one computes the plain side alone and needs
    room for a whole model in float32 with its gradients. The lines are the same in every process. Products of float8
    are left out: they round by far more than the two ways may differ.
    """
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"float8": False})})
    directory = places.directory_of(recipe.model)
    serving = served.serving(recipe.model, directory)
    store, seeing = _first_rows(recipe, serving, rows), served.load(serving).sight
    lines: list[Line] = []
    for precision in dict.fromkeys(("float32", recipe.model.precision)):
        found = as_a_run_does(recipe, directory, store, precision, mesh, seeing)
        if mesh.is_first:
            wanted = plainly(recipe, directory, store, seeing, precision, torch.float32)
            own = None
            if precision != "float32":
                own = compare(wanted, plainly(recipe, directory, store, seeing, precision, torch.bfloat16))
            lines += judge(precision, compare(wanted, found), own)
    return [Line(**line) for line in mesh.share([dataclasses.asdict(line) for line in lines])]


def refuse(lines: Sequence[Line], where: str) -> None:
    """Raise ModelError (exit code 2: this program does not train this model exactly) where something differs."""
    wrong = [line for line in lines if not line.agrees]
    if wrong:
        worst = max(wrong, key=lambda line: line.difference / line.allowed)
        raise ModelError(
            f"{len(wrong)} of {len(lines)} comparisons with plain transformers differ, most of all {worst.what} "
            f"in {worst.precision}: {worst.difference:.1e}",
            required=f"at most {worst.allowed:.0e}", where=where,
            remedy="do not train this model on this layout; report its architecture with this table",
        )


def print_lines(lines: Sequence[Line]) -> None:
    """The table of all comparisons on standard output."""
    table = Table("precision", "what", "plain transformers", "difference", "allowed", "", box=None)
    for line in lines:
        mark = "[green]agrees[/green]" if line.agrees else "[bold red]differs[/bold red]"
        table.add_row(
            line.precision, line.what, f"{line.plain:.6g}", f"{line.difference:.1e}", f"{line.allowed:.0e}", mark
        )
    Console(highlight=False, width=WIDTH).print(table)


def _first_rows(recipe: Recipe, serving: Serving, rows: int) -> Store:
    """The examples of the first rows of the first source."""
    first = recipe.data.train[0]
    source = first.model_copy(update={"limit": min(rows, first.limit or rows), "proportion": None})
    return prepare.prepare(recipe.data, Choice((source,)), serving, served.rules(recipe))


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move the adapters' second factors, the same way on every layout: they begin as zeros, and while they are zeros
    the first factors have no gradient to compare."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * STIRRED
            held = whole if not isinstance(parameter, DTensor) else _part(whole, parameter)
            fsdp.own_part(parameter).add_(held.to(parameter.device))


def _part(whole: Tensor, like: DTensor) -> Tensor:
    """What this process holds of a tensor that is cut as `like` is."""
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


# ---- the two ways --------------------------------------------------------------------------------------------------


def as_a_run_does(
    recipe: Recipe, directory: Path, store: Store, precision: str, mesh: Mesh, seeing: Sight | None
) -> tuple[float, Gradients]:
    """Loss and whole gradients by the code that trains, on the layout of the recipe; gradients in the first process."""
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": precision})})
    torch.manual_seed(recipe.seed)
    student, _ = spread.proved(directory, recipe, load.device(recipe.device, mesh.place.local), mesh, seeing)
    stir(student.model)
    optimizer = Optimizer(student.model, recipe.optim, precision if mesh.world == 1 else "float32")
    student.add_in_place(optimizer.total)
    student.eval()
    student.teaching = Teaching()  # the plain loss: the other way knows no noise, smoothing or balance
    packs = plans.whole(store, recipe.micro_batch, mesh.data_ranks, shares=not student.apart)
    planned = PlannedStep(
        1, 0, tuple(map(tuple, packs)), int(store.lengths.sum()), int(store.supervised_tokens.sum()),
        float(store.supervised.sum()),
    )
    mine = packs[mesh.data_rank :: mesh.data_ranks]
    step = Step(planned, [_micro_batch(store, pack, seeing, mesh) for pack in mine])
    loss, *_ = train.compute_gradient(student, step, recipe.seed)
    gradients = {name: one.grad for name, one in optimizer.masters.items() if one.grad is not None}
    whole = ((name, one.full_tensor() if isinstance(one, DTensor) else one) for name, one in gradients.items())
    return loss, {name: one.cpu() for name, one in whole if mesh.is_first}


def _micro_batch(store: Store, pack: Sequence[int], seeing: Sight | None, mesh: Mesh = ALONE) -> MicroBatch:
    seen = ahead.of_pack(store, pack, seeing, mesh.seat) if seeing else None
    return loader.micro_batch(store, pack, seeing, seen, mesh.ulysses)


def plainly(
    recipe: Recipe, directory: Path, store: Store, seeing: Sight | None, precision: str, arithmetic: torch.dtype
) -> tuple[float, Gradients]:
    """Loss and gradients as plainly as they can be written, from the same weights, computed in `arithmetic`."""
    torch.manual_seed(recipe.seed)
    plain = recipe.model.model_copy(update={"compile": False, "liger": False})
    model = load.load(directory, plain, load.device(recipe.device), recipe.lora, lighter=False).model
    stir(model)
    model.set_attn_implementation("eager")
    model.eval()
    if precision != "float32":
        _round(model)
    model.to(arithmetic)
    supervised, total = float(store.supervised.sum()), 0.0
    for index in range(len(store)):
        example = store[index]
        vision = loader.placed(_micro_batch(store, [index], seeing), model.device).vision
        ids, labels = (
            torch.from_numpy(part.astype("int64")).to(model.device) for part in (example.input_ids, example.labels)
        )
        seen = {} if vision is None or not vision.real else sight.own_inputs(model, vision, ids[None] == seeing.token)
        with elementwise.whole_convolutions():
            logits = model(input_ids=ids.unsqueeze(0), use_cache=False, **seen).logits[0]
            nll = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)
            loss = (nll * torch.tensor(example.weights, device=nll.device)).sum() / supervised
            loss.backward()
        total += loss.item()
    return total, {name: one.grad.float().cpu() for name, one in model.named_parameters() if one.grad is not None}


def _round(model: nn.Module) -> None:
    """The weights of float32 rounded to bfloat16: what both ways begin with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if fourbit.is_narrow(parameter):
                continue
            parameter.copy_(parameter.to(torch.bfloat16))


# ---- the verdict ---------------------------------------------------------------------------------------------------


def compare(wanted: tuple[float, Gradients], found: tuple[float, Gradients]) -> dict[str, Group]:
    """Plain length and difference of the loss and of each group of gradients; what is missing counts as zero."""
    (loss, plain), (other_loss, other) = wanted, found
    groups: dict[str, list[Group]] = {}
    for name in {**plain, **other}:
        lengths = list(_lengths(plain.get(name), other.get(name)))
        groups.setdefault(group_of(name), []).append((lengths[0], lengths[1]))
    together = {
        name: (_length(one for one, _ in parts), _length(one for _, one in parts)) for name, parts in groups.items()
    }
    return {"loss": (abs(loss), abs(loss - other_loss)), **together}


def judge(
    precision: str, found: Mapping[str, Group], own: Mapping[str, Group] | None = None
) -> Iterator[Line]:
    """A line for every comparison; `own` is how far plain transformers itself is from float32 in this precision."""
    shortest = FLOOR * max((length for name, (length, _) in found.items() if name != "loss"), default=0.0)
    for name, (length, difference) in found.items():
        against = max(length, NOTHING if name == "loss" else shortest, NOTHING)
        allowed = LOSS if name == "loss" else GRADIENT
        if own is not None:
            allowed = MORE + 2 * own[name][1] / against
        yield Line(precision, name, length, difference / against, allowed)


def group_of(name: str) -> str:
    """The parameter's name with `*` for every number of a layer or an expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removeprefix("model."))


def _lengths(plain: Tensor | None, other: Tensor | None) -> Iterator[float]:
    one = torch.zeros_like(other) if plain is None else plain.double()
    yield float(one.norm())
    yield float((one - (0 if other is None else other.to(one.device).double())).norm())


def _length(parts: Iterable[float]) -> float:
    """The length of a vector made of parts of these lengths."""
    return sum(part * part for part in parts) ** 0.5

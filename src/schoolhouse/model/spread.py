"""A student on its place in the mesh: proved while its weights lie in their files, then cut, then proved again."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from transformers import AutoConfig

from schoolhouse import inert, places
from schoolhouse.config import Recipe
from schoolhouse.data.vision import Sight
from schoolhouse.errors import MeshError
from schoolhouse.model import families, fourbit, isolation, load, sight, sizes, stacked, teaching, varlen
from schoolhouse.model.isolation import Proof
from schoolhouse.model.load import Student
from schoolhouse.model.varlen import Kernels
from schoolhouse.parallel import fsdp, ulysses
from schoolhouse.parallel.mesh import Mesh

NUMBERS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The number formats of safetensors in which weights may stay in their files."""
AGREEMENT = {"float32": 2e-5, "bfloat16": 3e-2}
"""How far the loss of a layout may be from that of one process in float32: sums in another order differ by 1e-6, and
8 bits of precision by about 1e-3."""


def proved(
    directory: Path, recipe: Recipe, place: torch.device, mesh: Mesh, seeing: Sight | None
) -> tuple[Student, Proof]:
    """The recipe's student on this process's place, and its proof; raises ModelError or MeshError where it fails.

    No process ever holds a whole model of many processes: rank 0 proves it block by block, and cutting does the same.
    Matrices in 4 bits are the exception: they are not cut, and every process has all of them. One process proves block
    by block, too, what it will not hold in float32.
    """
    precision = getattr(torch, recipe.model.precision)
    start = places.adapter_directory(recipe.lora.start) if recipe.lora is not None and recipe.lora.start else None
    if mesh.world == 1 and (recipe.lora is None or precision == torch.float32):
        student = load.load(directory, recipe.model, place, recipe.lora, start=start)
        _outfit(student, recipe, place)
        return student, isolation.prove(student, seeing)
    _refuse(directory, mesh)
    number = stored(directory)
    source = directory if mesh.world == 1 else stacked.directory_of(directory, number)
    whole = load.load(source, recipe.model, torch.device("cpu"), recipe.lora, number=number, computes_on=place,
                      start=start)
    kept = fourbit.matrices(whole.model)
    found = None
    if mesh.is_first:
        with fsdp.streamed(whole.model, place, kept):
            found = isolation.prove(whole, seeing)
    proof = Proof(*mesh.share([found.loss, found.difference] if found else None))
    student = Student(whole.model, mesh)
    _outfit(student, recipe, place)
    if mesh.world == 1:
        fsdp.bring(student, place, precision, kept)
        return student, proof
    fsdp.shard(student, mesh, precision, offload=recipe.parallel.offload, kept=kept)
    _check_layout(student, proof, seeing, AGREEMENT[recipe.model.precision])
    return student, proof


def _outfit(student: Student, recipe: Recipe, place: torch.device) -> None:
    """What the student is taught with, by its recipe and the device that computes."""
    student.teaching = teaching.teaching(recipe.train, student.model)
    student.kernels = _kernels(student, place, recipe)
    student.multiple = sizes.multiple(student.work, place, recipe.model.precision)


def _kernels(student: Student, place: torch.device, recipe: Recipe) -> Kernels:
    together = student.model.config.model_type in sight.TOGETHER
    return varlen.kernels(student.model, place, recipe.model.precision, student.mesh, together)


def stored(directory: Path) -> torch.dtype:
    """The number format of a model's files where all weights have the same one, else float32."""
    found = set()
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return NUMBERS.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _refuse(directory: Path, mesh: Mesh) -> None:
    """Raise MeshError for a Ulysses degree that cannot work, before any weight is read."""
    with inert.code_refused(directory):
        configuration = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=inert.allowed())
    settings = families.settings_of(configuration)
    if mesh.ulysses > 1:
        ulysses.refuse_heads(settings.get("num_attention_heads") or 1, mesh.ulysses)
        ulysses.refuse_rope(settings, mesh.ulysses)


def _check_layout(student: Student, proof: Proof, seeing: Sight | None, agreement: float) -> None:
    """The loss by this layout must be that of one process, and every axis must have reached the model."""
    loss = isolation.packed_loss(student, seeing)
    difference = abs(loss - proof.loss) / max(abs(proof.loss), 1e-6)
    exchange = student.exchange
    reached = bool(fsdp.blocks(student.model)) and (exchange is None or exchange.calls > 0)
    if not reached or not difference < agreement:
        raise MeshError(
            f"the layout {student.mesh.degrees} is not in force: its loss is {loss:.6f}, that of one process "
            f"{proof.loss:.6f}, with {0 if exchange is None else exchange.calls} exchanges of attention",
            required="the same loss on every layout, and blocks and attention layers that are reached by it",
            where=type(student.model).__name__, remedy="choose another layout, or report the architecture",
        )


def in_force(student: Student) -> str:
    """The layout as it was found in force."""
    mesh = student.mesh
    if mesh.world == 1:
        return "one process"
    parts, count = mesh.degrees.shard * mesh.ulysses, len(fsdp.groups(student))
    shared = "" if student.exchange is None else f", {student.exchange.calls // 2} attention layers exchange heads"
    return f"{mesh.world} processes: {mesh.degrees}; weights in {parts} parts, gathered in {count} groups{shared}"

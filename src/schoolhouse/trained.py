"""Open what was trained: a run's checkpoint, or any model directory, as a student that answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from schoolhouse import card, checkpoint, evaluate, inert, optim, overview, places, proof
from schoolhouse import export as exporting
from schoolhouse.checkpoint import Checkpoint
from schoolhouse.config import Lora, Model, Recipe
from schoolhouse.data import served
from schoolhouse.data.served import Served
from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.export import Trained
from schoolhouse.model import adapter_files, load, products
from schoolhouse.model.load import Student
from schoolhouse.report import read

PROVED_PROMPTS = 4
"""Prompts on which an exported model is compared."""
UNTRAINED = {
    "liger": False, "float8": False, "compile": False, "activation_checkpointing": False, "activation_offload": False,
}
"""Settings of a run that serve its training alone: a device that answers may lack what they need."""


def open_student(target: str, recipe: Recipe | None = None) -> tuple[Student, Served]:
    """A run directory's best checkpoint, in the precision of its run, or a model by hub id, directory or starter
    name, or a directory of adapters beside their base, with the settings of a model in `recipe` where one is given: its
    template, its stop tokens, its precision. Each computes on the device of `recipe`, if given."""
    directory = Path(target)
    if is_run(directory):
        own = _recipe(directory)
        settings = own.model
        student, model = _open_model(settings, (recipe or own).device, own.lora)
        exporting.put_weights(student.model, chosen(directory).tensors(checkpoint.WEIGHTS))
    else:
        device, adapters, start = "auto" if recipe is None else recipe.device, None, None
        settings = Model(path=target) if recipe is None else _of_another(target, recipe.model)
        if (directory / adapter_files.SETTINGS).is_file() and not (directory / "config.json").is_file():
            start, (adapters, base) = directory, adapter_files.made_by(directory)
            settings = _beside(directory, base) if recipe is None else _of_another(base.path, recipe.model)
        student, model = _open_model(settings, device, adapters, start)
    if settings.precision == "bfloat16":
        optim.narrow(student.model)
    return student, model


def _beside(directory: Path, base: Model) -> Model:
    """The base of adapters, served as they were trained where their directory has the template."""
    template = directory / "chat_template.jinja"
    return base.model_copy(update={"chat_template": str(template)}) if template.is_file() else base


def is_run(directory: Path) -> bool:
    """Whether `schoolhouse run` wrote this directory."""
    return (directory / "run.json").is_file()


def _of_another(target: str, settings: Model) -> Model:
    """The settings of a recipe's model for another one, without what is of the recipe's alone; its own as they are."""
    if target == settings.path or (Path(target).exists() and Path(target).resolve() == Path(settings.path).resolve()):
        return settings
    stops = tuple(one for one in settings.stop_tokens if one not in settings.new_tokens)
    return settings.model_copy(
        update={"path": target, "revision": None, "new_tokens": (), "stop_tokens": stops, "freeze": ()}
    )


@contextlib.contextmanager
def opened(target: str, recipe: Recipe | None = None) -> Iterator[tuple[Student, Served]]:
    """The same, answering inside as in the exams of its run: in the faster number format of its device."""
    student, model = open_student(target, recipe)
    precision = "bfloat16" if student.model.dtype == torch.bfloat16 else "float32"
    with products.fastest(student.device, precision):
        yield student, model


def export_run(directory: Path, out: str | None, step: int | None, merge: bool = False) -> tuple[Path, str]:
    """Export a run's checkpoint, proved on prompts of its own exam or training rows; where it is, and which step it
    is, with the proof.

    A run with adapters is exported as a PEFT adapter, or with `merge` as a whole model.
    """
    recipe, found = _recipe(directory), chosen(directory, step)
    if merge and recipe.lora is None:
        raise ConfigError(
            "the run has no adapters to merge: the whole model was trained", required="a run with a section `lora`",
            where="command line: --merge", remedy="leave --merge out",
        )
    base = places.directory_of(recipe.model)
    model = served.load(served.serving(recipe.model, base))
    place = Path(out) if out else directory / ("merged" if merge else "export")
    trained = Trained(found.tensors(checkpoint.WEIGHTS), recipe.lora, recipe.model.freeze)
    staging = exporting.staged(place)
    public = _of_the_hub(recipe)
    name = recipe.model.path if public else str(base.resolve())
    form: card.Form = "whole" if recipe.lora is None else "merged" if merge else "adapter"
    if form == "adapter":
        exporting.write_adapter(base, name, recipe.model.revision, trained, model, staging)
    else:
        exporting.write_model(base, trained, model, staging)
    proved = proof.prove(base, trained, model, _prompts(recipe, model), staging)
    card.write(
        staging, place, read.read(directory), recipe, found.step, form, base=name, public=public,
        sees=model.sight is not None, proof=proved,
    )
    shown = f"step {found.step}, {proved}"
    exporting.publish(staging, place, shown)
    return place, shown


def _of_the_hub(recipe: Recipe) -> bool:
    """Whether the base of an adapter is a model that others can fetch as it is."""
    local = recipe.model.path.startswith("starter/") or Path(recipe.model.path).is_dir()
    return not local and not recipe.model.new_tokens


def chosen(directory: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step; unset: the best one (`checkpoint.best`), else the newest that verifies."""
    parent = directory / "checkpoints"
    found, rejected = checkpoint.newest(parent)
    if step is None and found is not None:
        step = found.state["best"]["step"] if found.state["best"] else found.step
    steps = [checkpoint.step_of(path) for path in checkpoint.steps_in(parent)]
    if step is not None and steps and step not in steps:
        raise CheckpointError(
            f"{directory} holds no checkpoint of step {step}", required="a step that was kept", where=str(parent),
            remedy=f"there are {', '.join(map(str, steps))}; checkpoint.keep says how many stay",
        )
    if step is not None:
        return checkpoint.verify(parent / f"{checkpoint.PREFIX}{step:08d}")
    if rejected:
        raise rejected[0]
    raise CheckpointError(
        f"{directory} holds no checkpoint yet", required="a run that has saved one", where=str(parent),
        remedy="let it train until its first checkpoint (checkpoint.every)",
    )


def _open_model(
    settings: Model, device: str, adapters: Lora | None = None, start: Path | None = None
) -> tuple[Student, Served]:
    directory, place = places.directory_of(settings), load.device(device)
    student = load.load(directory, settings.model_copy(update=UNTRAINED), place, adapters=adapters, start=start)
    return student, served.load(served.serving(settings, directory))


def _recipe(directory: Path) -> Recipe:
    if not is_run(directory):
        raise CheckpointError(
            f"{directory} is no run directory", required="a directory that `schoolhouse run` wrote",
            where=str(directory), remedy="check the path",
        )
    info: dict[str, Any] = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(info["recipe"])
    inert.refuse_other_code(info, places.directory_of(recipe.model), directory)
    return recipe


def _prompts(recipe: Recipe, model: Served) -> list[proof.Prompt]:
    asked = evaluate.questions(recipe, model, graded=False)[:PROVED_PROMPTS]
    if asked:
        return [(question.prompt, question.images) for question in asked]
    rows = overview.encoded_rows(recipe, model, served.rules(recipe), 0, PROVED_PROMPTS)
    return [(row.turns[0].prompt, row.turns[0].images) for row in rows]

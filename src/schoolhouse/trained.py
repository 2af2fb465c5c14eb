"""Open what was trained: a run's checkpoint, or any model directory, as a student that answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from schoolhouse import checkpoint, evaluate, overview, places
from schoolhouse import export as exporting
from schoolhouse.checkpoint import Checkpoint
from schoolhouse.config import Model, Recipe
from schoolhouse.data import served
from schoolhouse.data.served import Served
from schoolhouse.errors import CheckpointError
from schoolhouse.model import load
from schoolhouse.model.load import Student

PROVED_PROMPTS = 4
"""Prompts on which an exported model is compared."""


def open_student(target: str) -> tuple[Student, Served]:
    """A run directory's best checkpoint, or a model by hub id, directory or starter name."""
    directory = Path(target)
    if not (directory / "run.json").is_file():
        return _open_model(Model(path=target), load.device("auto"))
    recipe = _recipe(directory)
    student, model = _open_model(recipe.model, load.device(recipe.device))
    exporting.put_weights(student.model, chosen(directory).tensors(checkpoint.WEIGHTS))
    return student, model


def export_run(directory: Path, out: str | None, step: int | None) -> Path:
    """Export a run's checkpoint, compared on prompts of its own exam or training rows."""
    recipe, found = _recipe(directory), chosen(directory, step)
    base = places.model_directory(recipe.model.path, recipe.model.revision)
    model = served.load(served.serving(recipe.model, base))
    place = Path(out) if out else directory / "export"
    prompts = _prompts(recipe, model)
    return exporting.export(base, found.tensors(checkpoint.WEIGHTS), model, prompts, place)


def chosen(directory: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step; unset: the one with the best exam, else the newest that verifies."""
    parent = directory / "checkpoints"
    found, rejected = checkpoint.newest(parent)
    if step is None and found is not None:
        step = found.state["best"]["step"] if found.state["best"] else found.step
    if step is not None:
        return checkpoint.verify(parent / f"{checkpoint.PREFIX}{step:08d}")
    if rejected:
        raise rejected[0]
    raise CheckpointError(
        f"{directory} holds no checkpoint yet", required="a run that has saved one", where=str(parent),
        remedy="let it train until its first checkpoint (checkpoint.every)",
    )


def _open_model(settings: Model, place: torch.device) -> tuple[Student, Served]:
    directory = places.model_directory(settings.path, settings.revision)
    return load.load(directory, settings, place), served.load(served.serving(settings, directory))


def _recipe(directory: Path) -> Recipe:
    path = directory / "run.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no run directory", required="a directory that `schoolhouse run` wrote",
            where=str(directory), remedy="check the path",
        )
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Recipe.model_validate(info["recipe"])


def _prompts(recipe: Recipe, model: Served) -> list[str]:
    asked = [question.prompt for question in evaluate.questions(recipe, model)[:PROVED_PROMPTS]]
    if asked:
        return asked
    rows = overview.shown_rows(recipe, model, served.rules(recipe))
    return [example["turns"][0]["prompt"] for example in itertools.islice(rows, PROVED_PROMPTS)]

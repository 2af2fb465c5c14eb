"""A step that gave no finite numbers, computed again from the checkpoint before it; the run itself is not touched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schoolhouse import checkpoint, optim
from schoolhouse import recipe as recipes
from schoolhouse import run as runs
from schoolhouse.data import loader
from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.model import load, products
from schoolhouse.parallel.mesh import ALONE
from schoolhouse.run import Run
from schoolhouse.screen import Screen
from schoolhouse.train import compute_gradient
from schoolhouse.types import Step

ONE_PROCESS = ("parallel.replicate=1", "parallel.shard=-1", "parallel.ulysses=1")


def replay(directory: Path) -> Iterator[str]:
    """What the step gave then and gives now, and which of its packs are to blame, line by line.

    In one process, whatever number the run had. Raises CheckpointError where the step comes out finite.
    """
    bad = _bad_step(directory)
    with tempfile.TemporaryDirectory(prefix="schoolhouse-replay-") as place:
        _copy(directory, Path(place), bad["step"])
        page = directory / "resolved.yaml"
        recipe = recipes.read(page, [f"directory={json.dumps(place)}", *ONE_PROCESS])
        with products.fastest(load.device(recipe.device), recipe.model.precision):
            run = runs.begin(recipe, page, Screen(), ALONE)
            with contextlib.closing(run.record):
                yield from _again(run, bad)


def _bad_step(directory: Path) -> dict[str, Any]:
    path = directory / "bad_step.json"
    if not path.is_file():
        raise ConfigError(
            f"{directory} has no step to replay", required="bad_step.json, written where a step is not finite",
            where=str(path), remedy="name the directory of a run that ended with exit code 4, or skipped a step",
        )
    return json.loads(path.read_bytes())


def _copy(directory: Path, place: Path, step: int) -> None:
    """What a run goes on from: its description, and the newest whole checkpoint before the step."""
    shutil.copy(directory / "run.json", place)
    for path in reversed(checkpoint.steps_in(directory / "checkpoints")):
        if checkpoint.step_of(path) >= step:
            continue
        with contextlib.suppress(CheckpointError):
            checkpoint.verify(path)
            shutil.copytree(path, place / "checkpoints" / path.name)
            return


def _again(run: Run, bad: dict[str, Any]) -> Iterator[str]:
    """The steps from the checkpoint up to the bad one."""
    last = None
    for step in loader.steps(
        run.store, run.plan, run.done + 1, bad["step"], run.student.device, sight=run.served.sight
    ):
        loss, *_ = compute_gradient(run.student, step, run.recipe.seed)
        norm = float(run.optimizer.clip())
        last = step
        if step.index < bad["step"] and math.isfinite(loss) and math.isfinite(norm):
            run.optimizer.step(optim.learning_rate(run.recipe.optim, step.index, run.steps))
        run.optimizer.forget()
    if math.isfinite(loss) and math.isfinite(norm):
        raise CheckpointError(
            f"step {bad['step']} gives the loss {loss} and a gradient of norm {norm}: finite, and not reproduced",
            required=f"the loss {bad['loss']} and a gradient of norm {bad['grad_norm']}",
            where="the program, the machine or its memory", remedy="run the same command again; suspect the machine",
        )
    yield f"then: loss {bad['loss']}, gradient norm {bad['grad_norm']}"
    yield f"now:  loss {loss}, gradient norm {norm} (reproduced)"
    yield from _blame(run, last)


def _blame(run: Run, step: Step) -> Iterator[str]:
    """Each pack alone: its loss, the norm of its gradient, its rows."""
    for micro in (one for one in step.micro_batches if one.pack):
        planned = dataclasses.replace(
            step.planned, packs=(micro.pack,), supervised=micro.supervised, supervised_tokens=len(micro.targets)
        )
        alone = dataclasses.replace(step, planned=planned, micro_batches=(micro,))
        loss, *_ = compute_gradient(run.student, alone, run.recipe.seed)
        norm = float(run.optimizer.clip())
        run.optimizer.forget()
        told = "finite" if math.isfinite(loss) and math.isfinite(norm) else "NOT FINITE"
        rows = ", ".join(str(run.store.origin(index)) for index in micro.pack[:8])
        yield f"{told}: loss {loss}, gradient norm {norm}: {rows}{' …' if len(micro.pack) > 8 else ''}"

"""One run: everything a recipe names, made real, and what is written about it while it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import schoolhouse
from schoolhouse import checkpoint, evaluate, fitting, graders, inert, optim, overview, places, room, saving
from schoolhouse import recipe as recipes
from schoolhouse.checkpoint import Checkpoint
from schoolhouse.config import Recipe
from schoolhouse.data import account, served, tokens
from schoolhouse.data import plan as plans
from schoolhouse.data.plan import Plan
from schoolhouse.data.served import Served
from schoolhouse.data.store import Store
from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.model import blocks, families, flops, fourbit, load, lora, products, recurrent, sight, spread
from schoolhouse.model.load import Student
from schoolhouse.optim import Optimizer
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.record import METRICS, SAMPLES, Record
from schoolhouse.saving import Saver
from schoolhouse.screen import Screen
from schoolhouse.types import PlannedStep

SHOWN_ROWS = 4
"""Training rows whose tokens the report shows."""
HARMLESS = (
    "directory", "checkpoint.", "validation.", "device", "data.workers", "data.cache", "parallel.", "track.",
    "train.patience",
)
"""Settings that may change between a stop and its continuation: they decide nothing about the weights."""
CHANGEABLE = ("optim.", "train.", "batch.", "exam.")
"""Settings that decide the weights, and may be changed within a run where --allow-change names them."""


@dataclass(slots=True)
class Run:
    """A run between two steps. `done` steps are behind it."""

    recipe: Recipe
    record: Record
    screen: Screen
    student: Student
    served: Served
    optimizer: Optimizer
    store: Store
    validation: Store | None
    questions: Sequence[evaluate.Question]
    plan: Plan
    steps: int
    saver: Saver
    rate: float
    """Floating-point operations a second that all processes do in large matrix products, as measured at the start."""
    done: int = 0
    best: dict[str, Any] | None = None
    """`{"step", "score", "by", "waited"}` of the best step so far, by what the recipe lets choose, and how many
    measurements in a row have been no better since."""
    info: dict[str, Any] = field(default_factory=dict)
    """The content of `run.json`."""
    skipped: int = 0
    """Steps whose update was left out, because loss or gradient was no number."""
    stalled: float = 0.0
    """Seconds that the save after the last step held training up."""
    began: float = field(default_factory=time.monotonic)

    def work_of(self, planned: PlannedStep) -> float:
        """Floating-point operations that a step needs over all processes, if every token is computed."""
        chosen = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in planned.packs])
        patches = int(self.store.patches[chosen].sum())
        return self.student.work.of_step(self.store.lengths[chosen], planned.supervised_tokens, patches)

    def note_step(self, record: dict[str, Any]) -> None:
        """A step is done."""
        self.done = record["step"]
        self.record.append(METRICS, {**record, "save_stall_seconds": self.stalled})
        self.stalled = 0.0

    def note_skipped(self, step: int, loss: float, norm: float) -> None:
        """A step is done whose update was left out; its numbers are text, for JSON has no such numbers."""
        self.done, self.skipped, self.stalled = step, self.skipped + 1, 0.0
        told = {"kind": "skipped", "step": step, "loss": str(loss), "grad_norm": str(norm), "skipped": self.skipped}
        self.record.append(METRICS, told)
        self.record.event("step skipped", **told)
        self.screen.say(f"step {step} skipped: loss {loss}, gradient norm {norm} ({self.skipped} so far)")

    def look(self, step: int) -> None:
        """Validation and exam where they are due after `step`; where that ends the run, what was not due, too."""
        measures = [(self._validate, self.recipe.validation.every)] if self.validation is not None else []
        measures += [(self._examine, self.recipe.exam.every)] if self.questions else []
        due = [measure for measure, every in measures if _due(step, every, self.steps)]
        for measure in due:
            measure(step)
        for measure, _ in measures if step and self.over else ():
            if measure not in due:
                measure(step)

    def _validate(self, step: int) -> None:
        measured = evaluate.validation(self.student, self.validation, self.plan.tokens, self.served.sight)
        self.record.append(METRICS, {"kind": "eval", "step": step, "name": "validation", **measured})
        self.screen.say(f"validation after step {step}: loss {measured['loss']:.4f}")
        self._compare(step, "validation", -measured["loss"])

    def _examine(self, step: int) -> None:
        self.optimizer.forget()  # what is kept for the next gradient
        settings = self.recipe.exam
        score, samples = evaluate.exam(
            self.student, self.served, self.questions, graders.grader(settings.grader), settings, self.recipe.seed
        )
        self.record.append(SAMPLES, *({"step": step, **sample} for sample in samples))
        self.record.append(METRICS, {"kind": "eval", "step": step, "name": "exam", **score})
        self._compare(step, "exam", score["score"])
        self.screen.say(f"exam after step {step}: {score['correct']} of {score['count']} ({score['score']:.1%})")

    @property
    def judge(self) -> str:
        """What lets the recipe choose the best step."""
        return self.recipe.checkpoint.best or "exam"

    def _compare(self, step: int, by: str, score: float) -> None:
        """Whether this step is the best, by what the recipe lets choose; of equals the later, which learnt more."""
        score = score if math.isfinite(score) else -math.inf
        if not step or by != self.judge or (self.best is None and score == -math.inf):
            return
        best = self.best or {"step": step, "score": -math.inf, "by": by}
        waited = 0 if score > best["score"] else best.get("waited", 0) + 1
        if score >= best["score"]:
            best = {"step": step, "score": score, "by": by}
        self.best = {**best, "waited": waited}

    @property
    def over(self) -> bool:
        """Whether all steps are done, or nothing has become better for as long as the recipe waits."""
        patience = self.recipe.train.patience
        early = patience is not None and self.best is not None and self.best.get("waited", 0) >= patience
        return early or self.done == self.steps

    def rests_after(self, step: int) -> bool:
        """Whether something is measured or saved after a step, or it is the last."""
        settings = self.recipe
        every = (settings.validation.every, settings.exam.every, settings.checkpoint.every)
        return any(_due(step, one, self.steps) for one in every)

    def save_is_due(self, step: int, *, asked: bool) -> bool:
        """Regularly, at the end, when stopped, and when this step is the best."""
        best = self.best is not None and self.best["step"] == step
        return asked or best or self.over or step % self.recipe.checkpoint.every == 0

    def save(self, step: int, *, still: bool = False) -> None:
        """Begin to write a checkpoint, once the one before it is on the disk; `still`: nothing is trained meanwhile."""
        began = time.perf_counter()
        self.finish_save()
        state = {
            "position": dataclasses.asdict(self.plan.position(step)), "steps": self.steps, "best": self.best,
            "data": self.store.fingerprint, "skipped": self.skipped,
        }
        tensors = {checkpoint.WEIGHTS: self.optimizer.weights(), checkpoint.OPTIMIZER: self.optimizer.moments()}
        best = None if self.best is None else self.best["step"]
        self.saver.save(step, tensors, state, recipes.dump(self.recipe), best, still=still)
        self.stalled = time.perf_counter() - began

    def look_at_save(self) -> None:
        """Note a checkpoint that was written meanwhile; raises CheckpointError where that failed."""
        self._note_saved(self.saver.finished())

    def finish_save(self) -> None:
        """Wait until the last checkpoint is on the disk; raises CheckpointError where that failed."""
        self._note_saved(self.saver.finish())

    def _note_saved(self, saved: saving.Saved | None) -> None:
        if saved is not None:
            self.record.event("checkpoint saved", **dataclasses.asdict(saved))

    def finish(self, status: str) -> None:
        """Note how the run ended; what is being written is waited for."""
        with contextlib.suppress(CheckpointError):  # of an error that is on its way already
            self.finish_save()
        seconds = self.info.get("seconds", 0.0) + time.monotonic() - self.began
        if status == "done" and self.done < self.steps:
            told = f"stopped early after step {self.done}: nothing better by the {self.judge} since step "
            self.record.event(f"{told}{self.best['step']}", step=self.done)
            self.screen.say(f"{told}{self.best['step']}")
        self.info = {**self.info, "status": status, "seconds": seconds}
        self.record.write("run.json", self.info)
        self.record.event(status, step=self.done)


@dataclass(frozen=True, slots=True)
class Return:
    """How a run may be continued."""

    allowed: Sequence[str] = ()
    """Settings that may differ from those it began with, by their dotted names."""
    strict: bool = False
    """Whether a damaged checkpoint is an error, instead of a reason to use an earlier one."""


def begin(recipe: Recipe, path: Path, screen: Screen, mesh: Mesh, back: Return = Return()) -> Run:
    """Make everything the recipe names, and go back to the newest checkpoint where there is one."""
    _refuse_what_cannot_change(recipe, back.allowed)
    record = Record(recipes.directory(recipe, path), writes=mesh.is_first)
    previous = mesh.share(record.read("run.json"))
    for change in _changes(recipe, previous, record.directory, back.allowed):
        screen.say(f"changed: {change}")
        record.event("setting changed", change=change)
    directory = places.directory_of(recipe.model)
    inert.refuse_other_code(previous, directory, record.directory)
    today = datetime.date.fromisoformat(previous["date"]) if previous else datetime.date.today()
    serving, rules = served.serving(recipe.model, directory, today), served.rules(recipe)
    store, validation = overview.stores(recipe, serving, screen)
    model = served.load(serving)
    torch.manual_seed(recipe.seed)
    device = load.device(recipe.device, mesh.place.local)
    with fitting.loading():
        student, proof = spread.proved(directory, recipe, device, mesh, model.sight)
        # a student that is cut has float32 masters by itself, and gathers them in the precision of its matrix products
        optimizer = Optimizer(student.model, recipe.optim, recipe.model.precision if mesh.world == 1 else "float32")
    families.refuse_length(student.model, int(store.lengths.max()))
    sight.refuse_unseen(student.model, shown=store.shows)
    student.add_in_place(optimizer.total)
    plan = plans.plan(store, recipe, _packs_at_once(previous, mesh), shares=not student.apart)
    steps = recipe.train.steps or recipe.train.epochs * plan.steps_per_epoch
    room.refuse_too_little(recipe, record.directory / "checkpoints", optimizer, steps, mesh)
    rehearsal = fitting.Rehearsal(student, optimizer, store, model.sight)
    plan = _fitted(recipe, plan, rehearsal, previous)
    saver = Saver(saving.Storage(record.directory / "checkpoints", mesh.rank, mesh.world), recipe.checkpoint.keep)
    run = Run(
        recipe, record, screen, student, model, optimizer, store, validation,
        evaluate.questions(recipe, model, graded=not previous),
        plan, steps, saver, flops.rate(student.device, recipe.model.precision) * mesh.world,
    )
    run.info = _info(run, path, today, proof.difference, inert.code(directory))
    run.info["seconds"] = previous.get("seconds", 0.0)
    found = _newest(run, back.strict)
    _describe(run, recipe, rules)
    fitting.refuse_too_large(rehearsal, plan)
    optimizer.sums.stay = plan.several(mesh.data_ranks) and student.device.type == "cpu"
    _resume(run, found)
    return run


def _fitted(recipe: Recipe, plan: Plan, rehearsal: fitting.Rehearsal, previous: dict[str, Any]) -> Plan:
    """With batch.tokens=auto, the plan with as large micro-batches as fit; a run goes on with those it began with."""
    if recipe.batch.tokens != "auto":
        return plan
    if "micro_batch" in previous.get("derived", {}):
        return dataclasses.replace(plan, tokens=previous["derived"]["micro_batch"])
    return fitting.largest_that_fits(rehearsal, plan)


def _packs_at_once(previous: dict[str, Any], mesh: Mesh) -> int:
    """The data ranks with which the run began, where its packs can be shared out evenly among those of today.

    Packs decide which random numbers meet which example: while they stay, dropout does too.
    """
    began = previous.get("derived", {}).get("packs_at_once", mesh.data_ranks)
    return began if began % mesh.data_ranks == 0 else mesh.data_ranks


def _newest(run: Run, strict: bool) -> Checkpoint | None:
    """The newest checkpoint that verifies, if it is of the same data. Rank 0 looks at every byte, for all ranks."""
    parent, mesh = run.saver.storage.parent, run.student.mesh
    found = None
    if mesh.is_first:
        checkpoint.clear_staging(parent)
        found, rejected = checkpoint.newest(parent)
        if strict and rejected:
            raise CheckpointError(
                rejected[0].found, required="the bytes that were written: --strict-resume", where=rejected[0].where,
                remedy="leave --strict-resume out to continue from "
                f"{found.path.name if found else 'the beginning'}, or put the file back",
            )
        for fault in rejected:
            run.screen.say(f"{fault.found}; using {found.path.name if found else 'no checkpoint'}")
            run.record.event(fault.found)
    name = mesh.share(found.path.name if found else None)  # and nobody saves before the staging of others is cleared
    if name is not None and found is None:
        found = checkpoint.opened(parent / name)
    if found is not None and found.state["data"] != run.store.fingerprint:
        raise ConfigError(
            "the data or the tokenizer changed since this run began", required="the rows and tokenizer it began with",
            where=str(run.record.directory), remedy="put them back, or start anew with another directory=…",
        )
    return found


def _resume(run: Run, found: Checkpoint | None) -> None:
    """Continue from a checkpoint; without one, begin."""
    if found is None:
        run.record.rewind(-1)
        run.record.event("started", steps=run.steps)
        return
    masters, moments = run.optimizer.masters, found.index[checkpoint.OPTIMIZER]
    run.optimizer.load(
        {name: found.like(checkpoint.WEIGHTS, name, master) for name, master in masters.items()},
        {key: found.like(checkpoint.OPTIMIZER, key, masters[name] if entry["shape"] else torch.empty(()))
         for key, entry in moments.items() for name in [key.partition(".")[2]]},
    )
    run.record.rewind(found.step)
    run.done, run.skipped, best = found.step, found.state.get("skipped", 0), found.state["best"]
    run.best = best if best and best.get("by", "exam") == run.judge else None  # another judge begins anew
    run.record.event(f"resumed from step {found.step}", step=found.step)
    run.screen.say(f"resumed from step {found.step} (verified)")


def _describe(run: Run, recipe: Recipe, rules: served.Rules) -> None:
    """Write what is known before the first step, and say it."""
    run.record.write("run.json", run.info)
    run.record.write_text("resolved.yaml", recipes.dump(recipe))
    run.record.write("data.json", {
        "train": overview.ledger(run.store, shares=run.plan.shares),
        "validation": overview.ledger(run.validation, shares=run.plan.shares) if run.validation else None,
    })
    for name in (account.DROPPED, account.BAD):
        run.record.write_text(name, (run.store.directory / name).read_text(encoding="utf-8"))
    shown = itertools.islice(overview.shown_rows(recipe, run.served, rules), SHOWN_ROWS)
    run.record.write_text("examples.jsonl", "")
    run.record.append("examples.jsonl", *shown)
    run.screen.table("in force", [(row["what"], row["value"]) for row in run.info["in_force"]])


def _info(
    run: Run, path: Path, today: datetime.date, difference: float, code: Mapping[str, str]
) -> dict[str, Any]:
    model, plan, recipe = run.student.model, run.plan, run.recipe
    parameters = sum(one.numel() for one in model.parameters())
    trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    derived = {
        "steps_total": run.steps, "steps_per_epoch": plan.steps_per_epoch,
        "warmup_steps": optim.warmup_steps(recipe.optim, run.steps), "parameters": parameters, "trainable": trainable,
        "packs_at_once": plan.ranks, "micro_batch": plan.tokens, "longest_example": int(run.store.lengths.max()),
        "exam_questions": len(run.questions), "matrix_products_tflops": run.rate / 1e12,
    }
    in_force = {
        "student": f"{type(model).__name__}, {parameters / 1e6:,.2f} M parameters, "
        f"{trainable / parameters:.2%} trained",
        "way": lora.describe(model, recipe.lora) + fourbit.describe(model) if recipe.lora else "full fine-tuning",
        "precision": products.describe(run.student.device, recipe.model.precision),
        "blocks": blocks.describe(model, recipe.model),
        "objective": run.student.teaching.describe(),
        "optimizer": run.optimizer.describe(),
        "learning rate": optim.told(recipe.optim, run.steps, adapters=recipe.lora is not None),
        "attention": f"packed and isolated, {run.student.kernels.said}"
        f"{recurrent.describe(model, run.student.device)}; equal to "
        f"{type(model).__name__}'s own to {difference:.0e}",
        "shared prefixes": f"computed apart: {run.student.apart}" if run.student.apart else
        "what several examples of a micro-batch begin with is computed once",
        "data": f"{run.store.ledger.rows:,} rows, {len(run.store):,} examples, "
        f"{run.store.ledger.supervised_tokens:,} of {run.store.ledger.tokens:,} tokens supervised",
        "tokenizer": tokens.describe(run.served.tokenizer),
        "stop tokens": f"{', '.join(run.served.stops.texts)}: a target in "
        f"{run.store.ledger.stopped_turns:,} of {run.store.ledger.turns:,} turns",
        "steps": f"{run.steps:,} of {recipe.batch.examples} examples, {plan.steps_per_epoch:,} an epoch; "
        f"micro-batches of at most {plan.tokens:,} tokens"
        + (f", filled up to multiples of {run.student.multiple}" if run.student.multiple > 1 else ""),
        **tokens.beyond(places.directory_of(recipe.model), int(run.store.lengths.max())),
        "device": str(run.student.device),
        "layout": spread.in_force(run.student),
        "directory": str(run.record.directory),
        **{f"code of the model's author: {name}": f"sha256 {digest}" for name, digest in code.items()},
    }
    return {
        "recipe": recipe.model_dump(mode="json"), "recipe_path": str(path), "date": today.isoformat(),
        "derived": derived, "code": code,
        "in_force": [{"what": name, "value": value} for name, value in in_force.items()],
        "versions": {
            "schoolhouse": schoolhouse.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
        "device": {"kind": str(run.student.device), "machine": platform.machine(), "threads": torch.get_num_threads()},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "status": "running",
    }


def _refuse_what_cannot_change(recipe: Recipe, allowed: Sequence[str]) -> None:
    """--allow-change is for settings that leave weights, moments and the order of the data what they mean."""
    known = recipes.flat(recipe.model_dump(mode="json"))
    for key in allowed:
        if key not in known or not key.startswith(CHANGEABLE) or key in ("optim.name", "batch.examples"):
            raise ConfigError(
                f"--allow-change {key}: {'no such setting' if key not in known else 'this cannot change within a run'}",
                required=f"a setting below {', '.join(CHANGEABLE)} that keeps the moments and the order of the data",
                where="command line", remedy="set directory=… to start a new run with it",
            )


def _changes(recipe: Recipe, previous: dict[str, Any], directory: Path, allowed: Sequence[str]) -> list[str]:
    """The allowed changes of settings, as text; others that decide the weights are refused."""
    if not previous:
        return []
    old, new = recipes.flat(previous["recipe"]), recipes.flat(recipe.model_dump(mode="json"))
    changed = {
        key: f"{key}: {old.get(key)} → {new.get(key)}" for key in {**old, **new}
        if old.get(key) != new.get(key) and not key.startswith(HARMLESS)
    }
    refused = [key for key in changed if key not in allowed]
    if refused:
        words = " ".join(f"--allow-change {key}" for key in refused[:5] if key.startswith(CHANGEABLE))
        raise ConfigError(
            f"the directory holds a run of another recipe: {'; '.join(changed[key] for key in refused[:5])}",
            required="the recipe the run began with", where=str(directory),
            remedy="undo the changes to continue it, or set directory=… to start anew"
            + (f", or continue with {words}" if words else ""),
        )
    return [changed[key] for key in changed]


def _due(step: int, every: int, steps: int) -> bool:
    return step in (0, steps) or (every > 0 and step % every == 0)

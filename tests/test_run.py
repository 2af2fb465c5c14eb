"""A whole run, as a user starts it: what it records, that it is what was asked for, and what is made of it.

Other test files use the helpers of the first part: one run is trained, and looked at often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml
from plain_sft import plain_gradient
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schoolhouse import card, checkpoint, cli, evaluate, optim, places, talk, trained
from schoolhouse import recipe as recipes
from schoolhouse import run as runs
from schoolhouse.config import Exam, Recipe
from schoolhouse.data import choose, prepare, served
from schoolhouse.data import store as stores
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.errors import ConfigError
from schoolhouse.parallel.mesh import ALONE
from schoolhouse.report import read
from schoolhouse.screen import Screen
from schoolhouse.types import Message, Part

LESSON = """\
model: starter/qwen3
data:
  train: [{path: starter/arithmetic, limit: 200}]
  validation: {path: starter/arithmetic:validation, limit: 12}
batch: {examples: 4, tokens: 300}
train: {steps: 8}
optim: {learning_rate: 3e-3}
validation: {every: 4}
exam: {data: {path: starter/arithmetic:exam, limit: 6}, every: 4, max_new_tokens: 16, grader: contains}
checkpoint: {every: 2}
"""
"""Small enough to train in a second, with all that a run can have."""

STEP_FIELDS = {
    "kind", "step", "epoch", "loss", "accuracy", "grad_norm", "learning_rate", "examples", "drawn", "tokens",
    "computed_tokens", "supervised_tokens", "seconds", "data_seconds", "tokens_per_second", "tflops", "mfu",
    "peak_memory_gib", "save_stall_seconds",
}
PATIENCE = 240
"""Seconds after which a process that should have done something counts as hanging; generous, for busy machines."""
MEASURED = (
    "seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "peak_memory_gib", "save_stall_seconds",
)
"""What may differ between two runs of one recipe."""


def program(*arguments: object, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own and check its exit code."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=300, encoding="utf-8", **options
    )
    said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert code is None or done.returncode == code, f"exit {done.returncode}\n{said}"
    return done


@contextlib.contextmanager
def started(*arguments: object, python: Sequence[str] = (), **options: Any) -> Iterator[Started]:
    """The program under way in a process group of its own, of which nothing is left afterwards."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as screen:
        words = command(*arguments)
        process = subprocess.Popen(
            [words[0], *python, *words[1:]], stdout=screen, stderr=screen, start_new_session=True, **options
        )
        try:
            yield Started(process, screen)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True, slots=True)
class Started:
    """A process that is under way."""

    process: subprocess.Popen
    screen: IO[str]

    def said(self) -> str:
        """All that it has written so far."""
        return os.pread(self.screen.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def wait_for(self, seen: Callable[[], object], what: str, pause: float = 0.002) -> None:
        """Wait until something is seen; fails where the process ends before, or after minutes."""
        limit = time.monotonic() + PATIENCE
        while not seen():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}\n{self.said()}"
            assert time.monotonic() < limit, f"no {what} in {PATIENCE} s\n{self.said()}"
            time.sleep(pause)

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until a step is in the metrics."""
        self.wait_for(lambda: last_step(run) >= step, f"step {step}")

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal or `kill -9 -GROUP` sends it."""
        assert self.process.poll() is None, f"it was over before the signal\n{self.said()}"
        os.killpg(self.process.pid, number)

    def ended(self) -> int:
        """Its exit code; minus the signal's number where one killed it."""
        return self.process.wait(PATIENCE)


def last_step(run: Path) -> int:
    """The last step in the metrics, whole lines only; 0 where there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return max([0, *(record["step"] for record in map(json.loads, lines) if record["kind"] == "step")])


def check_same(run: Path, whole: Path) -> None:
    """A run that was interrupted is bit for bit the one that was not: every record, answer and final tensor."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        found, wanted = ([exact(record) for record in records(one, name)] for one in (run, whole))
        assert [one for one, other in zip(found, wanted, strict=True) if one != other] == [], name
    found, wanted = ({path.name: path for path in checkpoint.steps_in(one / "checkpoints")} for one in (run, whole))
    assert max(found) == max(wanted), "a stop saves where nothing else would: others may differ"
    assert [name for name in {*found} & {*wanted} if digests(found[name]) != digests(wanted[name])] == []
    assert [path.name for path in run.rglob(".tmp-*")] == []
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "done"


def digests(path: Path) -> dict[str, str]:
    """The SHA-256 of weights and moments of a checkpoint."""
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in path.glob("*.safetensors")}


def here(*arguments: object, code: int = 0) -> None:
    """Run a command that only looks, in this process: it saves the seconds that torch takes to load."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        cli.main([str(one) for one in arguments])
        ended = 0
    except SystemExit as leaving:
        ended = int(leaving.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == code


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "schoolhouse", *map(str, arguments)]


def write_recipe(directory: Path, text: str = LESSON) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lesson.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def finished_run(base: Path) -> Path:
    """The directory of a whole run of `LESSON`, trained once in a session."""
    directory = base / "finished" / "run"
    if not directory.exists():
        done = program("run", write_recipe(directory.parent), f"directory={directory}")
        (directory.parent / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    return directory


def copied(run: Path, place: Path) -> Path:
    """A copy of a run to change."""
    return Path(shutil.copytree(run, place / "run"))


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == "step"]


def exact(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is measured by the clock."""
    return {name: value for name, value in record.items() if name not in MEASURED}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def page(run: Path) -> Path:
    """The recipe of the run."""
    return run.parent / "lesson.yaml"


@pytest.fixture(scope="session")
def recipe(page: Path) -> Recipe:
    return recipes.read(page)


@pytest.fixture(scope="session")
def known(page: Path) -> dict[str, Any]:
    """What `check --json` says."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        here("check", page, "--json")
    return json.loads(said.getvalue())


@pytest.fixture(scope="session")
def store(known: dict[str, Any]) -> Store:
    """The rows as the run's loader meets them."""
    return stores.open_store(Path(known["prepared"]))


@pytest.fixture(scope="session")
def plan(store: Store, recipe: Recipe) -> Plan:
    numbers = (store.lengths, store.supervised, store.supervised_tokens)
    return Plan(*numbers, recipe.batch.examples, recipe.batch.tokens, recipe.seed)


def student(run: Path | None = None, step: int = 8) -> PreTrainedModel:
    """The starter student in plain transformers, with the weights of a run's checkpoint where one is named."""
    model = AutoModelForCausalLM.from_pretrained(places.model_directory("starter/qwen3"), dtype=torch.float32)
    if run is not None:
        weights = checkpoint.verify(run / "checkpoints" / f"step-{step:08d}").tensors(checkpoint.WEIGHTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    return model.eval()


# What is recorded.


def test_metrics_hold_the_contract(run: Path, plan: Plan, recipe: Recipe) -> None:
    """Every step once, in order, with exactly the fields of the contract, and the numbers of the plan."""
    found = steps_of(run)
    assert [record["step"] for record in found] == list(range(1, 9))
    for record in found:
        planned = plan.step(record["step"])
        assert record.keys() == STEP_FIELDS
        assert (record["epoch"], record["examples"], record["tokens"], record["supervised_tokens"]) == (
            planned.epoch, 4, planned.tokens, planned.supervised_tokens,
        )
        assert record["learning_rate"] == optim.learning_rate(recipe.optim, record["step"], 8)
        assert 0 <= record["accuracy"] <= 1 and 0 <= record["data_seconds"] <= record["seconds"] < 60
        assert 0.05 < record["peak_memory_gib"] < 64
    assert any(len(plan.step(index).packs) > 1 for index in range(1, 9)), "the run must have had several micro-batches"


def test_evaluations_are_recorded_where_they_are_due(run: Path) -> None:
    looked = [(record["name"], record["step"]) for record in records(run) if record["kind"] == "eval"]
    assert sorted(looked) == sorted((name, step) for name in ("exam", "validation") for step in (0, 4, 8))
    for record in records(run):
        if record.get("name") == "exam":
            marks = [one["correct"] for one in records(run, "samples.jsonl") if one["step"] == record["step"]]
            assert (record["correct"], record["count"], record["score"]) == (sum(marks), 6, sum(marks) / 6)


def test_training_is_the_plain_loop(run: Path, store: Store, plan: Plan, recipe: Recipe) -> None:
    """Losses and gradient norms of the whole run, against one example at a time, AdamW of PyTorch, and the schedule.

    Float32 sums in another order differ by 1e-6; AdamW divides by the gradient's own size, which over eight steps
    brings that to 1e-4 of the loss. A lost token, a wrong weight or order, or a forgotten clip is 1e-2 and more.
    """
    model = student().train()
    matrices, vectors = ([one for one in model.parameters() if (one.ndim > 1) == wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(recipe.optim.beta1, recipe.optim.beta2), eps=recipe.optim.epsilon,
    )
    for record in steps_of(run):
        planned = plan.step(record["step"])
        loss, grads = plain_gradient(model, [store[one] for pack in planned.packs for one in pack])
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name]
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip))
        assert record["loss"] == pytest.approx(loss, rel=1e-4), record["step"]
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-3), record["step"]
        for group in adamw.param_groups:
            group["lr"] = record["learning_rate"]
        adamw.step()
    start, end = (dict(one.named_parameters()) for one in (student(), student(run)))
    apart, moved = ({name: now[name] - was[name] for name in end} for now, was in (
        (dict(model.named_parameters()), end), (end, start),
    ))
    assert norm_of(apart) < 0.02 * norm_of(moved)


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([one.detach().norm() for one in tensors.values()]).norm())


@pytest.mark.parametrize("step", [0, 8])
def test_validation_loss_is_the_plain_loss(run: Path, recipe: Recipe, step: int) -> None:
    """Before and after: the same as one row at a time through transformers' own forward, to float32."""
    serving = served.serving(recipe.model, places.model_directory(recipe.model.path))
    rows = prepare.prepare(recipe.data, choose.choices(recipe)["validation"], serving, served.rules(recipe))
    wanted, _ = plain_gradient(student(run if step else None), [rows[index] for index in range(len(rows))])
    found = [one for one in records(run) if one.get("name") == "validation" and one["step"] == step]
    assert found[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert len(rows) == 12 and found[0]["supervised_tokens"] == int(rows.supervised_tokens.sum())


def test_the_directory_says_what_was_run(run: Path, recipe: Recipe, known: dict[str, Any]) -> None:
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    resolved = recipes.read(run / "resolved.yaml")
    assert resolved == recipe.model_copy(update={"directory": str(run)})
    assert Recipe.model_validate(info["recipe"]) == resolved and info["status"] == "done"
    assert info["derived"]["steps_total"] == 8 and info["derived"]["exam_questions"] == 6
    assert {row["what"] for row in info["in_force"]} >= {"precision", "attention", "data", "stop tokens", "device"}
    assert json.loads((run / "data.json").read_text(encoding="utf-8")) == {
        name: known[name] for name in ("train", "validation")
    }
    assert {event["event"] for event in records(run, "events.jsonl")} >= {"started", "checkpoint saved", "done"}
    assert (run / "report.html").stat().st_size > 10_000 and records(run, "examples.jsonl")


def test_of_equal_exams_the_last_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exam that stays at nothing must not choose a student that learnt for two steps; the untrained one never is.
    The best stays among those kept, and is what `export` writes and names."""
    scores = iter([0.75, 0.5, 0.5, 0.25, 0.25])
    monkeypatch.setattr(evaluate, "exam", lambda *_: (
        {"score": (score := next(scores)), "count": 4, "correct": int(4 * score), "seconds": 0.0}, []
    ))
    page = write_recipe(tmp_path)
    here("run", page, f"directory={tmp_path / 'run'}", "exam.every=2", "checkpoint.keep=1")
    kept = [checkpoint.verify(path) for path in checkpoint.steps_in(tmp_path / "run" / "checkpoints")]
    assert [one.step for one in kept] == [4, 8] and kept[-1].state["best"] == {
        "step": 4, "score": 0.5, "by": "exam", "waited": 3
    }
    here("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "(step 4, identical logits on 4 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(("best", "chosen"), [("validation", 4), ("exam", 6), (None, 6), ("none", 8)])
def test_the_recipe_says_what_chooses(
    best: str | None, chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest loss of validation, the best exam, or nothing: then the newest. A loss that is no number is none."""
    losses, scores = iter([9.0, 5.0, 3.0, math.nan, 4.0]), iter([0.0, 0.25, 0.25, 0.5, 0.25])
    monkeypatch.setattr(evaluate, "exam", lambda *_: (
        {"score": next(scores), "count": 4, "correct": 1, "seconds": 0.1}, []
    ))
    monkeypatch.setattr(evaluate, "validation", lambda *_: {
        "loss": next(losses), "accuracy": 0.5, "supervised_tokens": 9, "seconds": 0.1,
    })
    words = [] if best is None else [f"checkpoint.best={best}"]
    here("run", write_recipe(tmp_path), f"directory={tmp_path / 'run'}", "exam.every=2", "validation.every=2",
         "checkpoint.keep=1", *words)
    assert trained.chosen(tmp_path / "run").step == chosen
    assert [checkpoint.step_of(one) for one in checkpoint.steps_in(tmp_path / "run" / "checkpoints")] == sorted(
        {chosen, 8})


def faked(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> list[str]:
    """Have validation measure these losses, and the exam nothing; what was measured, in order."""
    measured, given = [], iter(losses)
    monkeypatch.setattr(evaluate, "exam", lambda *_: measured.append("exam") or (
        {"score": 0.0, "count": 4, "correct": 0, "seconds": 0.1}, []
    ))
    monkeypatch.setattr(evaluate, "validation", lambda *_: measured.append("validation") or {
        "loss": next(given), "accuracy": 0.5, "supervised_tokens": 9, "seconds": 0.1,
    })
    return measured


EARLY = ("checkpoint.best=validation", "validation.every=1", "checkpoint.keep=1")


def test_a_run_that_grows_no_better_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two measurements in a row that are no better, one of them no number: everything is measured and saved, the run is
    done, and the best is what is exported. Called again it stays done; with more patience it goes on."""
    measured = faked(monkeypatch, [9.0, 5.0, 4.0, 4.5, 3.0, math.nan, 3.0, 2.0, 2.5])
    page, run = write_recipe(tmp_path), f"directory={tmp_path / 'run'}"
    here("run", page, run, *EARLY, "train.patience=2")
    said = "".join(capsys.readouterr())
    assert "stopped early after step 6: nothing better by the validation since step 6" in said and "done: 6" in said
    assert "".join(one[0] for one in measured) == "ve" "vvvve" "vve", "the last exam was not due"
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "done" and trained.chosen(tmp_path / "run").step == 6
    here("run", page, run, *EARLY, "train.patience=2")
    assert len(records(tmp_path / "run")) == 6 + 7 + 3 and "done: 6" in "".join(capsys.readouterr())
    here("run", page, run, *EARLY, "train.patience=3")
    assert "done: 8" in "".join(capsys.readouterr()) and trained.chosen(tmp_path / "run").step == 7


def test_patience_outlives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was waited for is in the checkpoint: stopped after a step that was no better, the next such one ends it."""
    faked(monkeypatch, [9.0, 5.0, 4.0, 4.5, 4.6, 1.0, 1.0])
    page, place = write_recipe(tmp_path, LESSON.replace("every: 2}", "every: 1}")), tmp_path / "run"
    here("run", page, f"directory={place}", *EARLY, "train.patience=2")
    assert trained.chosen(place).step == 2 and checkpoint.step_of(checkpoint.steps_in(place / "checkpoints")[-1]) == 4
    shutil.rmtree(place / "checkpoints" / "step-00000004")
    faked(monkeypatch, [4.6, 4.7, 4.8])
    here("run", page, f"directory={place}", *EARLY, "train.patience=3")
    assert checkpoint.step_of(checkpoint.steps_in(place / "checkpoints")[-1]) == 5


@pytest.mark.parametrize("words", [["exam.every=0"], ["checkpoint.best=validation", "validation.every=0"],
                                   ["checkpoint.best=none", "exam.every=1"]])
def test_patience_needs_measurements(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("check", write_recipe(tmp_path), "train.patience=2", *words, code=2)
    assert "train.patience needs" in capsys.readouterr().err


def test_another_judge_begins_anew(tmp_path: Path) -> None:
    """A run that is continued with another `checkpoint.best` does not compare a loss with a score."""
    text = LESSON.replace("steps: 8}", "steps: 4}")
    here("run", write_recipe(tmp_path, text), f"directory={tmp_path / 'run'}", "exam.every=4")
    here("run", write_recipe(tmp_path, text), f"directory={tmp_path / 'run'}", "checkpoint.best=validation",
         "train.steps=8", "--allow-change", "train.steps")
    found = trained.chosen(tmp_path / "run")
    assert found.step == 8 and found.state["best"]["by"] == "validation" and found.state["best"]["score"] < 0


def test_checkpoints_kept_are_the_newest_and_the_best(run: Path) -> None:
    """6 and 8 are the newest; each is whole."""
    kept = [checkpoint.verify(path) for path in checkpoint.steps_in(run / "checkpoints")]
    best = kept[-1].state["best"]["step"]
    assert [one.step for one in kept] == sorted({best, 6, 8})
    assert kept[-1].state["position"] == {"epoch": 0, "step": 8}
    assert list((run / "checkpoints").glob(".tmp-*")) == []


def test_the_screen_shows_the_run_and_nothing_of_libraries(run: Path) -> None:
    """What stands in the terminal is ours: the table in force, steps, exams; no bar of a library that loads."""
    said = (run.parent / "stderr.txt").read_text(encoding="utf-8")
    for words in ("in force", "step 1/8", "step 8/8", "exam after step 8", "validation after step 4", "done: 8 steps"):
        assert words in said, words
    assert "Loading weights" not in said and "it/s" not in said and "Warning" not in said


# What is shown is what is trained.


def test_shown_rows_are_the_rows_trained(page: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, in order: ids, labels, weights, source and row; positions count; turns are the supervised text."""
    here("show", page, "--rows", "0:", "--json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(store) == 200
    for index, line in enumerate(lines):
        shown, trained = json.loads(line), store[index]
        assert shown.keys() == {"source", "row", "turns", "ids", "labels", "weights", "positions", "verdict"} | (
            shown.keys() & {"tokens", "special", "texts", "pieces"}
        )
        assert shown["ids"] == trained.input_ids.tolist() and shown["labels"] == trained.labels.tolist()
        assert shown["weights"] == trained.weights.tolist()
        assert (shown["source"], shown["row"]) == (trained.origin.source, trained.origin.row)
        assert shown["positions"] == list(range(len(shown["ids"]))) and shown["verdict"] == "one"
        assert [turn["completion"].endswith("<|im_end|>") for turn in shown["turns"]] == [True]


@pytest.mark.parametrize(("rows", "wanted"), [
    ("0:2", [1, 2]), ("3", [4]), ("198:", [199, 200]), (":1", [1]), ("5:5", []),
])
def test_rows_are_chosen(page: Path, rows: str, wanted: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    here("show", page, "--rows", rows, "--json")
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == wanted


def test_check_counts_what_is_trained(known: dict[str, Any], store: Store) -> None:
    counted = known["train"]
    assert (counted["rows"], counted["kept"], counted["examples"], counted["stop_share"]) == (200, 200, 200, 1.0)
    assert counted["tokens"] == int(store.lengths.sum())
    assert counted["supervised_tokens"] == int(np.count_nonzero(store.arrays["weights"]))
    assert sum(counted["lengths"]["counts"]) == 200 and known["steps"] == 8 and known["steps_per_epoch"] == 50


# A run that is over, and one that is another.


def content(directory: Path) -> dict[str, bytes]:
    """What a run learnt: its metrics, answers and checkpoints."""
    files = [*directory.glob("*.jsonl"), *directory.glob("checkpoints/*/*")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files if path.name != "events.jsonl"}


def test_a_finished_run_is_left_as_it_is(run: Path, page: Path) -> None:
    """The same command again: exit 0, not one step more, every record and checkpoint to the byte."""
    before = content(run)
    assert "step 1/" not in program("run", page, f"directory={run}").stderr
    after = content(run)
    assert after.keys() == before.keys() and [name for name in before if before[name] != after[name]] == []
    assert len(steps_of(run)) == 8
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_another_recipe_is_refused(run: Path, page: Path) -> None:
    """Exit 2 before anything is written, with what each changed setting was and what it would be."""
    before = (run / "run.json").read_bytes()
    changed = ("optim.learning_rate=1e-4", "train.steps=9", "batch.examples=5", "seed=1", "data.supervise=last")
    said = program("run", page, f"directory={run}", *changed, code=2).stderr
    for shown in (
        "optim.learning_rate: 0.003 → 0.0001", "train.steps: 8 → 9", "batch.examples: 4 → 5", "seed: 0 → 1",
        "data.supervise: every → last",
    ):
        assert shown in said
    assert str(run) in said and "Traceback" not in said
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(("changed", "shown"), [
    ({"optim": {"learning_rate": 1e-4}}, "optim.learning_rate: 0.003 → 0.0001"), ({"seed": 1}, "seed: 0 → 1"),
    ({"model": {"path": "starter/qwen3", "precision": "bfloat16"}}, "model.precision: float32 → bfloat16"),
    ({"exam": {"data": "x", "every": 1}}, "exam."), ({"batch": {"examples": 4, "tokens": 301}}, "batch.tokens"),
    ({"data": {"train": "starter/arithmetic", "validation": "x"}}, "data.train"),
    ({"optim": {"learning_rate": 3e-3, "clip": None}}, "optim.clip: 1.0 → None"),
])
def test_each_setting_that_decides_is_compared(run: Path, recipe: Recipe, changed: dict, shown: str) -> None:
    """Alone, too: sums in another order, other answers, other rows are another run."""
    previous = json.loads((run / "run.json").read_text(encoding="utf-8"))
    other = Recipe.model_validate({**recipe.model_dump(), **changed})
    with pytest.raises(ConfigError) as caught:
        runs._changes(other, previous, run, allowed=())
    assert shown in caught.value.found


@pytest.mark.parametrize("changed", [
    {"directory": "x"}, {"device": "cpu"}, {"checkpoint": {"every": 7, "keep": 5}}, {"validation": {"every": 1}},
    {"data": {"workers": 3}}, {"data": {"cache": "x"}},
])
def test_harmless_settings_may_change(run: Path, recipe: Recipe, changed: dict[str, Any]) -> None:
    """Where it runs, how often it looks and saves, how many processes prepare: none of it decides a weight."""
    previous = json.loads((run / "run.json").read_text(encoding="utf-8"))
    values = recipe.model_dump()
    for name, value in changed.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    assert runs._changes(Recipe.model_validate(values), previous, run, allowed=()) == []


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    """The rows under an unchanged recipe are others: exit 2, and the directory still tells of the run it holds."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    page = write_recipe(tmp_path, f"model: starter/qwen3\ndata: {rows}\ntrain: {{steps: 1}}\n")
    program("run", page, f"directory={tmp_path / 'run'}")
    told = sorted((tmp_path / "run").glob("*.json"))
    before = [path.read_bytes() for path in told]
    rows.write_text('{"question": "a", "answer": "x"}\n{"question": "c", "answer": "d"}\n')
    with pytest.raises(ConfigError, match="changed since"):
        runs.begin(recipes.read(page, [f"directory={tmp_path / 'run'}"]), page, Screen(), ALONE)
    assert [path.name for path, was in zip(told, before, strict=True) if path.read_bytes() != was] == []


# What is made of a run.


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        here("export", run, "--out", out)
    assert f"exported and verified: {out}" in said.getvalue()
    return out


def test_the_export_is_what_was_trained(run: Path, exported: Path, store: Store) -> None:
    """Plain transformers loads it, with the logits of the best checkpoint to the bit."""
    best = checkpoint.steps_in(run / "checkpoints")[-1]
    step = checkpoint.verify(best).state["best"]["step"]
    plain, wanted = AutoModelForCausalLM.from_pretrained(exported).eval(), student(run, step)
    for index in range(3):
        ids = torch.tensor(store[index].input_ids[None].astype("int64"))
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, wanted(ids).logits)
    assert not torch.equal(plain.get_input_embeddings().weight, student().get_input_embeddings().weight)


def test_the_export_says_what_it_is(run: Path, exported: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Its card has the hub's facts, both exams, the rows taught, and the recipe that does it again."""
    text = (exported / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["library_name"] == "transformers" and facts["pipeline_tag"] == "text-generation"
    assert "base_model" not in facts, "a starter is no model of the hub"
    step = checkpoint.verify(checkpoint.steps_in(run / "checkpoints")[-1]).state["best"]["step"]
    first, last = ([one for one in records(run) if one["kind"] == "eval" and one["step"] == at] for at in (0, step))
    exams, losses = ([one for one in (*first, *last) if one["name"] == name] for name in ("exam", "validation"))
    assert f"| | before | after step {step} |" in text
    assert "| exam | {} of 6 ({:.1%}) | {} of 6 ({:.1%}) |".format(
        *(value for one in exams for value in (one["correct"], one["score"]))) in text
    assert "| validation loss | {:.4f} | {:.4f} |".format(*(one["loss"] for one in losses)) in text
    assert "200 rows were read and 200 kept: 200 examples" in text
    page = write_recipe(tmp_path, text.split("```yaml\n")[1].split("```")[0])
    assert recipes.read(page).model_copy(update={"directory": recipe.directory}) == recipe
    compile(text.split("```python\n")[1].split("```")[0], "the card", "exec")


def test_a_card_holds_what_is_hard_to_write(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Words that look like numbers, fences inside a message, quotes in a name; damaged counts are left out."""
    told = read.read(run)
    hard = recipe.model_copy(update={
        "model": recipe.model.model_copy(update={"stop_tokens": ("1e-3", "```")}),
        "optim": recipe.optim.model_copy(update={"rates": {"1e5": 2.0}}),
    })
    torn = dataclasses.replace(told, ledgers={"train": {**told.ledgers["train"], "rows": "many"}})
    card.write(tmp_path, tmp_path / 'a"b', torn, hard, 8, "whole", base="x", public=False, sees=False, proof="")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "rows were read" not in text
    page = write_recipe(tmp_path, text.split("````yaml\n")[1].split("````\n")[0])
    assert recipes.read(page).model_copy(update={"directory": hard.directory}) == hard
    compile(text.split("```python\n")[1].split("```")[0], "the card", "exec")


def test_the_export_is_served_as_it_was_trained(exported: Path) -> None:
    """The same template, tokens and stop tokens; nothing that is code or pickle; no staging beside it."""
    base = places.model_directory("starter/qwen3")
    ours, plain = AutoTokenizer.from_pretrained(exported), AutoTokenizer.from_pretrained(base)
    assert ours.chat_template == plain.chat_template and ours.get_vocab() == plain.get_vocab()
    told = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert told in ([plain.eos_token_id], plain.eos_token_id)
    model = AutoModelForCausalLM.from_pretrained(exported)
    asked = [{"role": "user", "content": "1+1?"}]
    said = ours.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    written = model.generate(torch.tensor([said]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape[1] > len(said)
    kinds = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja", ".txt", ".md"}
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_a_chosen_step_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("export", run, "--out", tmp_path / "six", "--step", 6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "six")
    assert torch.equal(plain.get_input_embeddings().weight, student(run, 6).get_input_embeddings().weight)
    here("export", run, "--out", tmp_path / "three", "--step", 3, code=6)
    told = capsys.readouterr().err
    there = ", ".join(map(str, sorted({best_step(run), 6, 8})))
    assert "of step 3" in told and f"there are {there}" in told and not (tmp_path / "three").exists()


def test_an_export_never_removes_what_it_did_not_write(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory with anything else in it is refused, and everything in it is still there."""
    mine = tmp_path / "home" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    here("export", run, "--out", mine.parent, code=2)
    assert mine.exists() and mine.read_text() == "years of work"
    assert str(mine.parent) in capsys.readouterr().err


def test_an_export_may_be_written_again(run: Path, tmp_path: Path) -> None:
    """What an export wrote, an export may replace."""
    for step in (6, 8):
        here("export", run, "--out", tmp_path / "model", "--step", step)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(plain.get_input_embeddings().weight, student(run, 8).get_input_embeddings().weight)


def best_step(run: Path) -> int:
    return checkpoint.verify(checkpoint.steps_in(run / "checkpoints")[-1]).state["best"]["step"]


def test_eval_repeats_the_exam_of_the_run(
    run: Path, page: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best checkpoint, and its export as a model, give the answers that were recorded, to the letter."""
    recorded = [one for one in records(run, "samples.jsonl") if one["step"] == best_step(run)]
    for target in (run, exported):
        here("eval", target, page, "--json")
        said = capsys.readouterr()
        answers = [json.loads(line) for line in said.out.splitlines()]
        assert [{"step": best_step(run), **one} for one in answers] == recorded
        assert f"{sum(one['correct'] for one in recorded)} of 6" in said.err


def test_a_run_answers_as_it_was_trained(run: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would be passed over is refused; the device is the one that is asked for."""
    for setting, found in {
        "model.path=starter/gemma3": "model.path=starter/gemma3, and a run answers as it was trained",
        "lora.rank=2": "lora.rank=2, and a run", "device=nonsense": "nonsense",
    }.items():
        here("eval", run, page, setting, code=2)
        assert found in capsys.readouterr().err
    here("compare", run, run, page, "model.chat_template=chatml", code=2)


def test_students_who_answer_alike_are_no_empty_table(
    run: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here("compare", run, run, page)
    assert "no verdict differs" in capsys.readouterr().out


def test_compare_names_both_and_their_scores(run: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("compare", "starter/qwen3", run, page)
    said = capsys.readouterr().out.replace("\n", "")
    scores = {one["step"]: one["correct"] for one in records(run) if one.get("name") == "exam"}
    assert f"starter/qwen3: {scores[0]} of 6" in said and f"{run}: {scores[best_step(run)]} of 6" in said


def test_verify_names_the_damaged_and_looks_at_all(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = copied(run, tmp_path)
    kept = checkpoint.steps_in(again / "checkpoints")
    here("verify", again)
    assert capsys.readouterr().out.count("every byte verified") == len(kept)
    (kept[0] / "weights-00000.safetensors").write_bytes(b"")
    here("verify", again, code=6)
    said = capsys.readouterr()
    assert f"checkpoint {kept[0].name} rejected: weights-00000.safetensors" in said.out + said.err
    assert said.out.count("every byte verified") == len(kept) - 1
    here("verify", kept[-1])


def test_a_report_is_written_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = copied(run, tmp_path)
    (again / "report.html").unlink()
    here("report", again)
    assert str(again / "report.html") in capsys.readouterr().out
    assert (again / "report.html").stat().st_size > 10_000


def test_chat_answers_until_an_empty_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two messages, two answers, an empty line: the second answer knows the first exchange."""
    asked: list[Sequence[Message]] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 1?\nAnd then?\n\nnever read\n"))
    monkeypatch.setattr(talk, "reply", lambda *words: asked.append(list(words[2])) or f"answer {len(asked)} [b]")
    here("chat", run)
    assert [[message.text for message in one] for one in asked] == [
        ["What is 1 + 1?"], ["What is 1 + 1?", "answer 1 [b]", "And then?"],
    ]
    assert "answer 2 [b]" in capsys.readouterr().out, "what a student writes is text, not markup"


def test_a_reply_is_the_students(run: Path) -> None:
    """What is said is put through the template, answered greedily, and cut at the stop token."""
    one, model = trained.open_student(str(run))
    said = [Message("user", (Part("text", "What is 1 + 1?"),))]
    found = talk.reply(one, model, said, Exam(max_new_tokens=7))
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 1?"}], add_generation_prompt=True, return_dict=False
    )
    plain = student(run, best_step(run))
    written = plain.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False, pad_token_id=0)[0, len(prompt):]
    assert found == model.tokenizer.decode(written, skip_special_tokens=True)

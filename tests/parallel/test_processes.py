"""Runs of several processes, from the command line: the same result as one, resumed by any number, and brought down
whole when one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_run import started

from schoolhouse import places

LESSON = """\
model: {path: %(model)s}
data:
  train: [{path: starter/arithmetic, limit: 60}]
  validation: {path: starter/arithmetic:validation, limit: 5}
batch: {examples: 6, tokens: 200}
optim: {learning_rate: 3e-3}
train: {steps: 6}
checkpoint: {every: 2, keep: 9}
"""
FLOAT32 = 2e-6
"""The same sums of float32 in another order, over six steps at this learning rate."""
BROUGHT_DOWN = 10.0


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter student with dropout in its attention."""
    directory = tmp_path_factory.mktemp("dropping") / "student"
    shutil.copytree(places.model_directory("starter/qwen3"), directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.2}))
    return directory


def page(tmp_path: Path, model: object, more: str = "") -> Path:
    path = tmp_path / "lesson.yaml"
    path.write_text(LESSON % {"model": model} + more)
    return path


def finished(*words: object, code: int = 0) -> str:
    """Run to the end; what was said."""
    with started("run", *words) as process:
        assert process.ended() == code, process.said()
        return process.said()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [one["loss"] for one in records(run)]


def forget_after(run: Path, step: int) -> None:
    """Leave a run as it stood when `step` was its newest checkpoint."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def check_same(one: Path, other: Path, within: float = FLOAT32) -> None:
    assert [r.get("drawn") for r in records(one)] == [r.get("drawn") for r in records(other)]
    assert losses(one) == pytest.approx(losses(other), rel=0, abs=within)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_f8_two_processes_then_one_then_two(optimizer: str, tmp_path: Path, dropping: Path) -> None:
    """F8: the same examples at each step, the same dropout, losses within 2e-6; seen is 1e-7."""
    recipe, whole, mixed = page(tmp_path, dropping), tmp_path / "whole", tmp_path / "mixed"
    recipe.write_text(recipe.read_text().replace("optim: {", f"optim: {{name: {optimizer}, "))
    said = finished(recipe, f"directory={whole}", "--nproc", "2")
    assert "replicate 1 × shard 2 × ulysses 1" in said
    assert any(row["what"] == "layout" and "2 processes" in row["value"]
               for row in json.loads((whole / "run.json").read_text())["in_force"])
    shutil.copytree(whole, mixed)
    forget_after(mixed, 2)
    assert "resumed from step 2" in finished(recipe, f"directory={mixed}")
    check_same(whole, mixed)
    forget_after(mixed, 4)
    assert "resumed from step 4" in finished(recipe, f"directory={mixed}", "--nproc", "2")
    check_same(whole, mixed)
    assert len(list((mixed / "checkpoints" / "step-00000006").glob("weights-*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("parallel.ulysses=2",), ("parallel.replicate=2",), ("model.precision=bfloat16",),
    ("model.activation_checkpointing=true", "parallel.ulysses=2"),
])
def test_layouts_train_alike(words: tuple[str, ...], tmp_path: Path) -> None:
    """Two processes learn as one does; in bfloat16, 8 bits of precision differ by about 1e-2 of the loss."""
    recipe = page(tmp_path, "starter/qwen3")
    alone = [word for word in words if not word.startswith("parallel")]
    finished(recipe, f"directory={tmp_path / 'one'}", *alone)
    finished(recipe, f"directory={tmp_path / 'two'}", *words, "--nproc", "2")
    check_same(tmp_path / "one", tmp_path / "two", 0.05 if "bfloat16" in str(words) else FLOAT32 * 10)


def workers(launcher: int) -> list[int]:
    """The launcher's processes in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def is_gone(number: int) -> bool:
    return not Path(f"/proc/{number}").exists()


def test_f2_a_killed_rank_brings_all_down(tmp_path: Path) -> None:
    """`kill -9` of one of two ranks: the other is dead within 10 s, exit 7, the cause is said last."""
    run, recipe = tmp_path / "run", page(tmp_path, "starter/qwen3")
    with started("run", recipe, f"directory={run}", "--nproc", "2", "train.steps=100000") as process:
        process.wait_for_step(run, 2)
        ranks = workers(process.process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        assert process.ended() == 7, process.said()
        assert time.monotonic() - killed < BROUGHT_DOWN
        assert all(is_gone(number) for number in ranks)
        told = process.said().split("error: ")[-1]
        assert told.startswith("rank 1 died: SIGKILL") and "Traceback" not in told


@pytest.mark.slow
def test_f2_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    """With `parallel.max_restarts=1` the agent starts all again, and they continue from the last checkpoint."""
    run, recipe = tmp_path / "run", page(tmp_path, "starter/qwen3")
    words = ("train.steps=40", "parallel.max_restarts=1", "--nproc", "2")
    with started("run", recipe, f"directory={run}", *words) as process:
        process.wait_for_step(run, 5)
        os.kill(workers(process.process.pid)[1], signal.SIGKILL)
        assert process.ended() == 0, process.said()
        assert "resumed from step" in process.said()


GRADER = """
import os, time
from schoolhouse.errors import DataError


def grade(answer, reference):
    if os.environ["RANK"] == "1":
        %s
    return False
"""


def with_grader(tmp_path: Path, line: str) -> Path:
    (tmp_path / "mine.py").write_text(GRADER % line)
    exam = "exam: {data: {path: starter/arithmetic:exam, limit: 2}, max_new_tokens: 2, grader: 'mine:grade'}\n"
    return page(tmp_path, "starter/qwen3", exam)


def test_f12_a_hanging_rank_is_found(tmp_path: Path) -> None:
    """A rank that sleeps: within `hang_timeout` and a few seconds the stacks of all ranks are written, exit 7."""
    run, recipe = tmp_path / "run", with_grader(tmp_path, "time.sleep(1000)")
    words = (f"directory={run}", "--nproc", "2", "parallel.hang_timeout=5")
    with started("run", recipe, *words, cwd=tmp_path) as process:
        assert process.ended() == 7, process.said()
        assert "no step ended for 5 seconds" in process.said().split("error: ")[-1]
    stacks = sorted((run / "stacks").iterdir())
    assert [path.name for path in stacks] == ["rank-00000.txt", "rank-00001.txt"]
    assert "in grade" in stacks[1].read_text() and "in grade" not in stacks[0].read_text()


@pytest.mark.parametrize(("line", "code", "told"), [
    ("raise DataError('bad picture', required='a', where='rows.jsonl:34', remedy='b')", 3, "rows.jsonl:34"),
    pytest.param("raise ValueError('odd')", 1, "ValueError: odd", marks=pytest.mark.slow),
])
def test_f13_a_raising_rank_is_named_last(line: str, code: int, told: str, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", with_grader(tmp_path, line)
    with started("run", recipe, f"directory={run}", "--nproc", "2", cwd=tmp_path) as process:
        assert process.ended() == code, process.said()
        last = process.said().split("error: ")[-1]
        assert told in last and last.splitlines()[-1].split() == ["rank:", "1"]
        assert len(last.splitlines()) <= 6


@pytest.mark.slow
def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    """SIGTERM to the launcher: every rank stops after one step, it is saved, exit 75, and the command continues."""
    run, recipe = tmp_path / "run", page(tmp_path, "starter/qwen3")
    words = (f"directory={run}", "--nproc", "2", "parallel.ulysses=2", "train.steps=30")
    with started("run", recipe, *words) as process:
        process.wait_for_step(run, 3)
        process.signal(signal.SIGTERM)
        assert process.ended() == 75, process.said()
        assert "stopped after step" in process.said()
    step = records(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert f"resumed from step {step}" in finished(recipe, *words)

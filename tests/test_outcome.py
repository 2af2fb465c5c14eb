"""Numbers of a step that are read while the next one is under way, as on an accelerator: the run stays what it is.

A processor reads them at once; here it is made to read them late.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from test_run import check_same, here, last_step, records, steps_of, write_recipe

from schoolhouse import checkpoint, outcome
from schoolhouse.run import Run

ALONE = ("exam.data=null", "exam.every=0", "validation.every=0", "data.validation=null", "checkpoint.every=100")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "delay", lambda _: 1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each step with the one that was under way when it was written down."""
    begun, found, whole, add = [], [], Run.note_step, outcome.Outcomes.add
    monkeypatch.setattr(outcome.Outcomes, "add", lambda self, one: (begun.append(one.step.index), add(self, one))[1])
    monkeypatch.setattr(
        Run, "note_step", lambda self, record: (found.append((record["step"], begun[-1])), whole(self, record))[1])
    return found


@pytest.mark.parametrize("words", [
    ("checkpoint.every=3",), ("optim.name=muon", "checkpoint.every=100"), ("train.patience=1", "validation.every=3"),
], ids=["adamw", "muon", "patience"])
def test_a_run_is_the_same(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[tuple[int, int]]
) -> None:
    page = write_recipe(tmp_path)
    here("run", page, f"directory={tmp_path / 'at once'}", *words)
    assert all(step == begun for step, begun in told)
    told.clear()
    monkeypatch.setattr(outcome, "delay", lambda _: 1)
    here("run", page, f"directory={tmp_path / 'late'}", *words)
    assert any(step == begun - 1 for step, begun in told) and all(step >= begun - 1 for step, begun in told)
    check_same(tmp_path / "late", tmp_path / "at once")


def test_it_is_stopped_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: None) -> None:
    """What is under way is written down before the checkpoint; seconds are those of steps."""
    page, whole = write_recipe(tmp_path), Run.look

    def interrupted(run: Run, step: int) -> None:
        whole(run, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("checkpoint.every=100", "exam.every=0", "validation.every=0")
    here("run", page, f"directory={tmp_path / 'whole'}", *words)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "look", interrupted)
        here("run", page, f"directory={tmp_path / 'stopped'}", *words, code=75)
    assert last_step(tmp_path / "stopped") == 5
    here("run", page, f"directory={tmp_path / 'stopped'}", *words)
    check_same(tmp_path / "stopped", tmp_path / "whole")
    assert all(record["seconds"] > record["data_seconds"] >= 0 for record in steps_of(tmp_path / "stopped"))


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """Twelve rows, of which the loss of one overflows."""
    rows = [{"messages": [{"role": "user", "content": f"{one} + 1"},
                          {"role": "assistant", "content": f"{one + 1}", "weight": 1.0}]} for one in range(12)]
    rows[7]["messages"][1]["weight"] = 1.6e38
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_recipe(tmp_path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_no_number_moves_nothing(
    name: str, wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is skipped, by its own number, and what follows is what it is when numbers are read at once."""
    words = (f"data.train={tmp_path / 'rows.jsonl'}", *ALONE, "train.on_nonfinite=skip:9", f"optim.name={name}")
    here("run", wild, f"directory={tmp_path / 'at once'}", *words)
    monkeypatch.setattr(outcome, "delay", lambda _: 1)
    here("run", wild, f"directory={tmp_path / 'late'}", *words)
    skipped = [record["step"] for record in records(tmp_path / "late") if record["kind"] == "skipped"]
    assert len(skipped) == 3, "one of each epoch of three steps, the last one cut"
    check_same(tmp_path / "late", tmp_path / "at once")


def test_one_that_stops_the_run_is_named(wild: Path, tmp_path: Path, late: None) -> None:
    """Nothing is saved behind it, although the next step was under way."""
    run = tmp_path / "run"
    here("run", wild, f"directory={run}", f"data.train={tmp_path / 'rows.jsonl'}", *ALONE[:-1], "checkpoint.every=1",
         "train.steps=9", code=4)
    bad = json.loads((run / "bad_step.json").read_text())
    assert any(one.endswith("rows.jsonl:8") for one in bad["examples"]) and len(bad["examples"]) == 4
    assert last_step(run) == bad["step"] - 1
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert (found.step if found else 0) == bad["step"] - 1 and rejected == []

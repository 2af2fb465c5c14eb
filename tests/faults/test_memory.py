"""F14: what does not fit is said before the first step, with what would; what fits leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import here, write_recipe

from schoolhouse import fitting
from schoolhouse import recipe as recipes
from schoolhouse import run as runs
from schoolhouse.data.plan import Plan
from schoolhouse.model.load import Student
from schoolhouse.parallel.mesh import ALONE
from schoolhouse.screen import Screen


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def cap(patch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """An allocator that has no room for a micro-batch of more tokens; the sizes that were tried."""
    tried, whole = [], Student.loss

    def loss(self: Student, micro, drawn=None):
        tried.append(micro.input_ids.shape[1])
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("Tried to allocate 31.20 GiB, 23.70 GiB are free")
        return whole(self, micro, drawn)

    patch.setattr(Student, "loss", loss)
    return tried


def test_f14_what_does_not_fit_is_said_before_the_first_step(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Exit 5 with the allocator's words and a size that fits; with that size the run begins and ends."""
    tried = cap(monkeypatch, 160)
    wide = ("batch.examples=64", "exam.data=null", "exam.every=0", "train.steps=2")
    here("run", page, f"directory={tmp_path / 'run'}", *wide, code=5)
    said = capsys.readouterr().err
    assert "31.20 GiB" in said and "set batch.tokens=150" in said and "Traceback" not in said
    assert tried[-2] > 270 and 120 < tried[-1] <= 150, "the full one, then its half"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    here("run", page, f"directory={tmp_path / 'again'}", *wide, "batch.tokens=150")


def test_f14_the_rehearsal_is_undone_to_the_bit(page: Path, tmp_path: Path) -> None:
    """Weights, moments and gradients are those of a run that was never rehearsed."""
    run = runs.begin(recipes.read(page, [f"directory={tmp_path / 'run'}"]), page, Screen(), ALONE)
    before = {name: tensor.clone() for name, tensor in run.optimizer.weights()}
    fitting.refuse_too_large(run.student, run.optimizer, run.store, run.plan, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.optimizer.weights())
    assert list(run.optimizer.moments()) == []
    assert all(master.grad is None for master in run.optimizer.masters.values())
    run.record.close()


def test_f14_no_step_has_a_heavier_pack() -> None:
    """The rehearsed pack holds the longest example and is at most `batch.tokens`."""
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    plan = Plan(lengths, lengths.astype(float), lengths, 64, 128, 0)
    pack = fitting.heaviest(plan, plan.tokens)
    most = max(int(lengths[list(one)].sum()) for step in range(1, 200) for one in plan.step(step).packs)
    assert lengths[pack[0]] == lengths.max() and most <= int(lengths[list(pack)].sum()) <= 128

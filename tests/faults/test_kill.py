"""`kill -9` at any instant: the same command continues by itself, and nothing of the result tells that it happened."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_run import Started, check_same, last_step, program, started, write_recipe

from schoolhouse import checkpoint

LESSON = """\
model: starter/qwen3
data:
  train: [{path: starter/arithmetic, limit: 200}]
  validation: {path: starter/arithmetic:validation, limit: 12}
batch: {examples: 4, tokens: 300}
optim: {learning_rate: 3e-3}
validation: {every: 5}
exam: {data: {path: starter/arithmetic:exam, limit: 4}, every: 5, max_new_tokens: 8, grader: contains}
checkpoint: {every: 2}
"""
STEP_SECONDS = 0.2
SAVE_SECONDS = 0.04
"""How long a step and a save take here, about: kills are spread over this time."""


@dataclass(slots=True)
class Count:
    """What the kills met."""

    steps_lost: int = 0
    """Steps that had to be done again."""
    staged: int = 0
    """Kills that left a half-written checkpoint."""


@pytest.mark.parametrize(("number", "steps"), [
    pytest.param(3, 22, id="3+3"), pytest.param(10, 64, id="10+10", marks=pytest.mark.slow),
])
def test_f1_a_killed_run_is_the_run_that_was_not_killed(number: int, steps: int, tmp_path: Path) -> None:
    """As many kills between steps as inside saves, at random instants: every record and the weights to the bit."""
    draw, count = random.Random(number), Count()
    page = write_recipe(tmp_path, LESSON + f"train: {{steps: {steps}}}\n")
    run = tmp_path / "killed"
    kinds = [kill_in_training] * number + [kill_in_save] * number
    draw.shuffle(kinds)
    with started("run", page, f"directory={tmp_path / 'whole'}") as undisturbed:
        for kill in kinds:
            with started("run", page, f"directory={run}") as process:
                kill(process, run, draw)
                assert process.ended() == -signal.SIGKILL, "it was killed, and did not end by itself"
                check_left(run, count)
                check_resumed(process.said())
        check_resumed(program("run", page, f"directory={run}").stderr)
        assert undisturbed.ended() == 0, undisturbed.said()
    check_same(run, tmp_path / "whole")
    assert count.staged >= 1, "no kill met a save"
    print(f"{2 * number} kills: {count.staged} left a half-written checkpoint, {count.steps_lost} steps done again")


def kill_in_training(process: Started, run: Path, draw: random.Random) -> None:
    """A random time after a random one of the next steps."""
    process.wait_for_step(run, last_step(run) + draw.randint(1, 3))
    time.sleep(draw.random() * STEP_SECONDS)
    process.signal(signal.SIGKILL)


def kill_in_save(process: Started, run: Path, draw: random.Random) -> None:
    """A random time after this process begins to stage a checkpoint."""
    process.wait_for(lambda: goes_on(process.said()), "start")  # what was left of an earlier save is gone by then
    process.wait_for(lambda: staged(run), "save", pause=0.0005)
    time.sleep(draw.choice([0.0, draw.random() * SAVE_SECONDS]))
    process.signal(signal.SIGKILL)


def staged(run: Path) -> bool:
    """Whether a half-written checkpoint is there."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []  # noqa: PTH208
    return any(name.startswith(".tmp-step-") for name in names)


def check_left(run: Path, count: Count) -> None:
    """Whatever has a checkpoint's name is whole: half-written ones have another."""
    left = [checkpoint.verify(path).step for path in checkpoint.steps_in(run / "checkpoints")]
    count.staged += staged(run)
    count.steps_lost += last_step(run) - max([0, *left])


def check_resumed(said: str) -> None:
    """It says where it continues, once it has anything to continue from; it never asks for anything."""
    assert "Traceback" not in said
    assert goes_on(said)


def goes_on(said: str) -> bool:
    """Whether it has begun to train, from a checkpoint or from nothing."""
    return bool(re.search(r"resumed from step \d+ \(verified\)", said)) or "validation after step 0" in said

"""Trackers: every record is passed on once, while the run goes on and afterwards, and none can harm the run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_run import LESSON, PATIENCE, program, started

from schoolhouse import places

STAND_IN = '''
"""What wandb is asked, a line each; it records and sends nothing."""
import json, os, pathlib, time
def note(*what):
    with pathlib.Path(os.environ["ASKED"]).open("a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**named): note("init", named)
def log(figures, step): note("log", step, figures)
def finish(): note("finish")
'''
"""For wandb, which is no package of the tests: the calls that trackers of its kind take."""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    places.model_directory("starter/qwen3")
    path = tmp_path / "lesson.yaml"
    path.write_text(LESSON)
    return path


def environment(tmp_path: Path, module: str = STAND_IN) -> dict[str, str]:
    """One in which `import wandb` finds the stand-in."""
    (tmp_path / "modules").mkdir(exist_ok=True)
    (tmp_path / "modules" / "wandb.py").write_text(module)
    path = os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "ASKED": str(tmp_path / "asked"), "WANDB_API_KEY": "sk-secret-5309"}


def asked(tmp_path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


def test_every_record_is_passed_on_once(page: Path, tmp_path: Path) -> None:
    """Of a run that is continued too, which is one run there; nothing that is secret goes with it (F24)."""
    words, run = ("run", page, f"directory={tmp_path / 'run'}", "track.to=wandb"), tmp_path / "run"
    program(*words, "track.project=maths", "train.steps=4", env=environment(tmp_path))
    program(*words, "track.project=maths", "--allow-change", "train.steps", env=environment(tmp_path))
    calls = asked(tmp_path)
    first, second = [call[1] for call in calls if call[0] == "init"]
    assert first["id"] == second["id"] and first["project"] == "maths" and first["resume"] == "allow"
    assert first["config"]["optim"]["learning_rate"] == 3e-3 and "sk-secret" not in json.dumps(calls)
    assert [call[0] for call in calls].count("finish") == 2 and calls[-1] == ["finish"]
    logged = [(call[1], name.partition("/")[0]) for call in calls if call[0] == "log" for name in [next(iter(call[2]))]]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [(one["step"], one.get("name", "train")) for one in records]
    assert sorted(logged) == sorted(wanted) and len(set(logged)) == len(logged)
    losses = {call[1]: call[2]["train/loss"] for call in calls if call[0] == "log" and "train/loss" in call[2]}
    assert losses == {one["step"]: one["loss"] for one in records if one["kind"] == "step"}


def test_a_tracker_that_fails_is_said_and_costs_nothing(page: Path, tmp_path: Path) -> None:
    broken = environment(tmp_path, STAND_IN.replace('note("log", step, figures)', 'raise OSError("no network")'))
    done = program("run", page, f"directory={tmp_path / 'run'}", "track.to=wandb", env=broken)
    assert "not everything was passed on to the tracker" in done.stdout + done.stderr
    assert "no network" in (tmp_path / "run" / "track.txt").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"


def test_it_ends_where_the_run_was_killed(page: Path, tmp_path: Path) -> None:
    """Although nobody wrote that it ended."""
    given = environment(tmp_path)
    with started("run", page, f"directory={tmp_path / 'run'}", "track.to=wandb", "train.steps=5000", env=given) as run:
        run.wait_for_step(tmp_path / "run", 3)
        run.wait_for(lambda: (tmp_path / "asked").exists(), "tracker")
        run.signal(signal.SIGKILL)
        run.process.wait()
        limit = time.monotonic() + PATIENCE
        while asked(tmp_path)[-1] != ["finish"]:
            assert time.monotonic() < limit
            time.sleep(0.1)


def test_a_run_that_has_ended_for_tensorboard(page: Path, tmp_path: Path) -> None:
    """Its own reader finds every loss; passed on again, each still stands there once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    from tensorboard.util import tensor_util

    run = tmp_path / "run"
    program("run", page, f"directory={run}")
    for _ in range(2):
        said = program("track", run, "--to", "tensorboard").stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert said == f"{len(records)} records passed on to tensorboard\n"
    found = reader.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    losses = {one.step: float(tensor_util.make_ndarray(one.tensor_proto)) for one in found.Tensors("train/loss")}
    wanted = {one["step"]: one["loss"] for one in records if one["kind"] == "step"}
    assert losses == pytest.approx(wanted, rel=1e-6), "float32 there"
    assert len(found.Tensors("exam/score")) == len([one for one in records if one.get("name") == "exam"])


def test_what_is_not_there(page: Path, tmp_path: Path) -> None:
    """Said before anything is trained."""
    run = tmp_path / "run"
    said = program("run", page, f"directory={run}", "track.to=trackio", code=2).stderr
    assert "trackio is not installed" in said and "pip install 'schoolhouse[trackio]'" in said
    assert not (run / "metrics.jsonl").exists()
    assert "is no run directory" in program("track", tmp_path, "--to", "tensorboard", code=2).stderr

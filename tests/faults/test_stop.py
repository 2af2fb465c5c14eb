"""SIGTERM and ctrl-C: the step under way is finished and saved, exit 75, and the same command continues to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import LESSON, Started, check_same, finished_run, last_step, program, started, write_recipe

from schoolhouse import checkpoint, stopping
from schoolhouse.errors import Stopped
from schoolhouse.parallel import launch, watch

STOPPED, INTERRUPTED = 75, 130


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    return finished_run(tmp_path_factory.getbasetemp())


def in_the_first_exam(process: Started, run: Path) -> None:
    """Nothing is trained yet."""
    process.wait_for(lambda: "validation after step 0" in process.said(), "first exam", pause=0.0005)
    process.signal(signal.SIGTERM)


def in_training(process: Started, run: Path) -> None:
    """Between two steps; a batch system that repeats itself does not break the save."""
    process.wait_for_step(run, 1)
    for _ in range(10):
        process.signal(signal.SIGTERM)
        time.sleep(0.001)


def in_an_exam(process: Started, run: Path) -> None:
    """The loss is measured and answers are being written; ctrl-C this time."""
    process.wait_for(lambda: "validation after step 4" in process.said(), "exam", pause=0.0005)
    process.signal(signal.SIGINT)


def in_a_save(process: Started, run: Path) -> None:
    process.wait_for(lambda: list((run / "checkpoints").glob(".tmp-step-*")), "save", pause=0.0005)
    process.signal(signal.SIGTERM)


def test_f10_a_stopped_run_is_saved_and_continues(whole: Path, tmp_path: Path) -> None:
    """Stopped four times, each time in another phase: exit 75, not one step is lost, and the result is that of a run
    that nobody stopped.
    """
    page, run = write_recipe(tmp_path), tmp_path / "run"
    for moment in (in_the_first_exam, in_training, in_an_exam, in_a_save):
        with started("run", page, f"directory={run}") as process:
            moment(process, run)
            assert process.ended() == STOPPED, process.said()
            check_stopped(run, process.said())
    assert checkpoint.newest(run / "checkpoints")[0].step < 8, "the last stop was in the middle, too"
    program("run", page, f"directory={run}")
    check_same(run, whole)


def check_stopped(run: Path, said: str) -> None:
    """The newest checkpoint is the last step recorded; the program says how to go on, and reports what there is."""
    assert "the same command continues" in said and "Traceback" not in said
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert (found.step if found else 0) == last_step(run) and rejected == []
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"
    assert (run / "report.html").exists()


def test_f10_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """Exit 130 without waiting for the step or the exam under way, and what was saved before is whole."""
    page, run = write_recipe(tmp_path, LESSON.replace("steps: 8", "steps: 4000")), tmp_path / "run"
    with started("run", page, f"directory={run}") as process:  # a thread writes while later steps are computed
        process.wait_for(lambda: checkpoint.newest(run / "checkpoints")[0] is not None, "a whole checkpoint")
        while process.process.poll() is None:
            process.process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert process.ended() == INTERRUPTED, process.said()
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found is not None and found.step >= 2 and rejected == []


def test_f10_stopped_while_the_program_loads(tmp_path: Path) -> None:
    """Half of a start is the loading of torch: a stop in it is a stop like any other."""
    page = write_recipe(tmp_path)
    with started("run", page, f"directory={tmp_path / 'run'}", python=["-X", "importtime"]) as process:
        process.wait_for(lambda: "torch.types" in process.said(), "torch")
        process.signal(signal.SIGTERM)
        assert process.ended() == STOPPED


def test_f10_a_stop_that_was_seen_has_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The launcher of several ends who did not hear of a stop, but nobody who writes his report because of it."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(launch, "stop_asked", lambda: True)
    monkeypatch.setattr(watch, "LOST_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    stop = stopping.StopRequest()
    watcher = watch._Stop(stop)
    with contextlib.suppress(Stopped), stop.deferred():
        stop._handle(signal.SIGTERM, None)
        watcher.look()
        raise Stopped("after its step")
    for _ in range(3):
        watcher.look()
        time.sleep(0.01)


@pytest.mark.parametrize("seconds", [2.5, 4.0, 5.5])
def test_f10_several_stopped_while_they_begin(seconds: float, tmp_path: Path) -> None:
    """Whenever it comes, it is a stop for all: one that has left breaks what the other does, or is waited for in a
    place that no signal reaches. Of 16 moments between 3 and 6 seconds 9 went wrong before."""
    endless = write_recipe(tmp_path, LESSON.replace("steps: 8", "steps: 100000"))
    with started("run", endless, f"directory={tmp_path / 'run'}", "--nproc", 2) as process:
        time.sleep(seconds)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(60) == STOPPED, process.said()
        assert "Traceback" not in process.said()


def test_f10_stopped_while_rows_are_prepared(tmp_path: Path) -> None:
    """Workers end with their parent, exit 75, and no half of a store is left behind."""
    cache = tmp_path / "cache"
    many = LESSON.replace("limit: 200", "limit: 5000").replace("data:\n", f"data:\n  cache: {cache}\n  workers: 2\n")
    with started("run", write_recipe(tmp_path, many), f"directory={tmp_path / 'run'}") as process:
        process.wait_for(lambda: list(cache.glob("stores/.tmp-*")), "preparation")
        time.sleep(0.3)
        process.process.send_signal(signal.SIGTERM)
        assert process.ended() == STOPPED, process.said()
        assert "Traceback" not in process.said()
    assert [path.name for path in (cache / "stores").iterdir() if path.is_dir()] == []


def test_no_library_can_swallow_a_stop() -> None:
    """Raised by a signal anywhere, like ctrl-C: `except Exception` in a library must let it through."""
    assert issubclass(Stopped, BaseException) and not issubclass(Stopped, Exception)


def test_f10_a_request_during_an_import_is_not_lost(tmp_path: Path) -> None:
    """What a handler raises inside an import is swallowed by libraries, or becomes their error: it is raised after."""
    (tmp_path / "swallowing.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    whole = True\n"
        "except BaseException:\n    whole = False\n"
    )
    program = """
import time
from schoolhouse.errors import Stopped
from schoolhouse.parallel import launch, watch
from schoolhouse.stopping import StopRequest
stop = StopRequest()
import swallowing
print(swallowing.whole, stop.asked)
try:
    time.sleep(30)
except Stopped:
    print("stopped")
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    said = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=60, check=True,
    ).stdout
    assert said.split() == ["True", "True", "stopped"]

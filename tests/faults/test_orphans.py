"""F2: the process that a run was started by is killed without a word: none that it started stays behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_run import LESSON, Started, program, started, write_recipe

SOON = 30.0
"""Seconds within which all of them have ended. The kernel takes milliseconds, but one that is still loading its modules
finds its parent dead when it has loaded them."""


def of_run(words: str) -> list[int]:
    """The processes whose environment or command line names these words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            state = (process / "stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if words.encode() in told and state != "Z":
            found.append(int(process.name))
    return found


def has_joined(process: Started, run: Path, cache: Path) -> bool:
    """Both workers have told the launcher that they can be stopped; torch is being loaded."""
    return len(list(cache.glob("schoolhouse-*/worker-*"))) == 2


def trains(process: Started, run: Path, cache: Path) -> bool:
    return "step 1/" in process.said()


def prepares(process: Started, run: Path, cache: Path) -> bool:
    """Rows are being prepared, by processes that have begun."""
    return bool(list(cache.glob("stores/.tmp-*"))) and len(of_run(str(run.parent))) >= 4


@pytest.mark.parametrize(("nproc", "moment"), [(2, has_joined), (2, trains), (1, prepares)])
def test_f2_a_killed_launcher_leaves_no_process(nproc: int, moment: Callable[..., bool], tmp_path: Path) -> None:
    """All are gone soon, and the same command finds the directory free and goes on."""
    text = LESSON.replace("data:\n", "data:\n  workers: 2\n").replace("steps: 8", "steps: 30")
    if moment is prepares:
        text = text.replace("limit: 200", "limit: 5000").replace("data:\n", f"data:\n  cache: {tmp_path}\n")
    words = ("run", write_recipe(tmp_path, text), f"directory={tmp_path / 'run'}", "exam.data=null", "exam.every=0")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "STARTED_BY": str(tmp_path)}
    with started(*words, "--nproc", nproc, env=environment) as process:
        process.wait_for(lambda: moment(process, tmp_path / "run", tmp_path), moment.__name__)
        assert len(of_run(str(tmp_path))) >= 3, "there is somebody to leave behind"
        process.process.send_signal(signal.SIGKILL)
        process.ended()
        limit = time.monotonic() + SOON
        while of_run(str(tmp_path)):
            assert time.monotonic() < limit, of_run(str(tmp_path))
            time.sleep(0.02)
    if moment is trains:
        assert "done: 30 steps" in program(*words).stderr

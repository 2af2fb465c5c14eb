"""Start, resume and stop: the same commands as typed, as lists of words, in processes that outlive the page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from schoolhouse import record
from schoolhouse.errors import ConfigError, Stopped
from schoolhouse.serve.workspace import CONSOLE, Workspace

LONGEST_NAME = 100
"""Bytes of a run's name."""
LONGEST_SETTING = 10_000
"""Characters of one `key=value`."""
MOST_PROCESSES = 64
PROGRAM = (sys.executable, "-u", "-m", "schoolhouse")
Status = Literal["", "under way", "stopping", "failed"]
"""What is known of a run besides its records: whether a process starts or trains it, whether that was asked to stop,
and whether the last command of this page ended with an error."""


class Buttons:
    """What was started from this page, and how the rest is stopped."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping: dict[str, int] = {}
        self._one_at_a_time = threading.Lock()

    def start(self, recipe: str, name: str, processes: int, settings: Sequence[str]) -> None:
        """Begin a run of a recipe of the workspace in `runs/NAME`; raises ConfigError where that cannot be."""
        if recipe not in self._workspace.recipes():
            raise _refused(f"there is no recipe {recipe}", "one of the workspace", "recipe", "choose one of the list")
        _refuse_name(name)
        for one in settings:
            _refuse_setting(one)
        with self._one_at_a_time:
            if not self._workspace.is_free(name):
                raise _refused(f"runs/{name} is no run directory", "a new name", "name", "choose another")
            if (self._workspace.place(name) / "run.json").exists():
                raise _refused(f"there is a run {name}", "a new name", "name", "choose another, or resume that run")
            self._run(name, recipe, processes, settings)

    def resume(self, name: str, processes: int) -> None:
        """Continue a run with the settings it began with."""
        settled = self._workspace.place(name) / "resolved.yaml"
        with self._one_at_a_time:
            if self._number(name) is not None or not settled.is_file():
                raise _refused(f"{name} cannot be resumed", "a run that began and has ended", "run",
                               "wait for its end, or start another")
            self._run(name, str(settled.relative_to(self._workspace.root)), processes, [])

    def stop(self, name: str) -> None:
        """Ask a run to finish its step, save, and end."""
        number = self._number(name)
        if number is None:
            raise _refused(f"no process trains {name} here", "a run that goes on, on this machine", "run",
                           "it has ended already, or runs elsewhere")
        self._stopping[name] = number
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(number, signal.SIGTERM)

    def status(self, name: str) -> Status:
        """What its records do not say."""
        number = self._number(name)
        if number is not None:
            return "stopping" if self._stopping.get(name) == number else "under way"
        begun = self._started.get(name)
        if begun is None or (begun.returncode == -signal.SIGTERM and self._stopping.get(name) == begun.pid):
            return ""  # it was stopped before it could say so
        return "failed" if begun.returncode not in (0, Stopped.exit_code) else ""

    def _number(self, name: str) -> int | None:
        """The process that starts or trains it."""
        begun = self._started.get(name)
        if begun is not None and begun.poll() is None:
            return begun.pid
        return record.holder(self._workspace.place(name))

    def _run(self, name: str, recipe: str, processes: int, settings: Sequence[str]) -> None:
        if not 1 <= processes <= MOST_PROCESSES:
            raise _refused(f"{processes} processes", f"1 to {MOST_PROCESSES}", "processes", "choose another number")
        if self._number(name) is not None:
            raise _refused(f"{name} is under way", "one process a run directory", "name", "wait for it, or stop it")
        directory = str(Path("runs") / name)
        words = ["run", recipe, "--nproc", str(processes), *settings, f"directory={json.dumps(directory)}"]
        place = self._workspace.place(name)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / CONSOLE).open("ab") as console:
                self._started[name] = subprocess.Popen(
                    [*PROGRAM, *words], cwd=self._workspace.root, stdin=subprocess.DEVNULL, stdout=console,
                    stderr=subprocess.STDOUT, start_new_session=True,  # so that the end of the page is not its own
                )
        except OSError as error:
            raise _refused(f"{name} cannot be started: {error.strerror}", "what the system allows", "name",
                           "look at the rights and the space below runs/") from None


def _refuse_name(name: str) -> None:
    whole = name.isprintable() and "/" not in name and name.strip() == name
    if not name or not whole or name.startswith((".", "-")) or len(name.encode()) > LONGEST_NAME:
        raise _refused(f"{name!r:.60} is no name of a run", f"up to {LONGEST_NAME} bytes without /, not beginning with "
                       ". or -", "name", "choose another")


def _refuse_setting(text: str) -> None:
    key, separator, _ = text.partition("=")
    if key.strip() == "directory":
        raise _refused("the directory of a run is runs/ and its name", "other settings", "settings", "leave it out")
    if not separator or text.startswith("-") or not text.isprintable() or len(text) > LONGEST_SETTING:
        raise _refused(f"{text!r:.60} is no setting", f"key=value, a line each, up to {LONGEST_SETTING:,} characters",
                       "settings", "e.g. optim.learning_rate=1e-4")


def _refused(found: str, required: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(found, required=required, where=where, remedy=remedy)

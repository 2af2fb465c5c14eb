"""Start, resume and stop: the same commands as typed, as lists of words, in processes that outlive the page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from schoolhouse import record
from schoolhouse.errors import ConfigError
from schoolhouse.serve.workspace import CONSOLE, Workspace

LONGEST_NAME = 100
"""Bytes of a run's name."""
MOST_PROCESSES = 64
PROGRAM = (sys.executable, "-u", "-m", "schoolhouse")


class Buttons:
    """What was started from this page, and how the rest is stopped."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, recipe: str, name: str, processes: int, settings: Sequence[str]) -> None:
        """Begin a run of a recipe of the workspace in `runs/NAME`; raises ConfigError where that cannot be."""
        if recipe not in self._workspace.recipes():
            raise _refused(f"there is no recipe {recipe}", "one of the workspace", "recipe", "choose one of the list")
        _refuse_name(name)
        if name in self._workspace.runs() and (self._workspace.runs()[name] / "run.json").is_file():
            raise _refused(f"there is a run {name}", "a new name", "name", "choose another, or resume that run")
        for one in settings:
            if "=" not in one or one.startswith("-") or one.partition("=")[0].strip() == "directory":
                raise _refused(f"{one!r} is no setting", "key=value, a line each", "settings",
                               "the run's directory is runs/ and its name" if "=" in one else f"write {one}=VALUE")
        self._run(name, recipe, processes, settings)

    def resume(self, name: str, processes: int) -> None:
        """Continue a run with the settings it began with."""
        settled = self._workspace.root / "runs" / name / "resolved.yaml"
        if self.busy(name) or not settled.is_file():
            raise _refused(f"{name} cannot be resumed", "a run that began and has ended", "run",
                           "wait for its end, or start another")
        self._run(name, str(settled.relative_to(self._workspace.root)), processes, [])

    def stop(self, name: str) -> None:
        """Ask a run to finish its step, save, and end."""
        number = self._number(name)
        if number is None:
            raise _refused(f"no process trains {name} here", "a run that goes on, on this machine", "run",
                           "it has ended already, or runs elsewhere")
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(number, signal.SIGTERM)

    def busy(self, name: str) -> bool:
        """Whether a process starts or trains it."""
        return self._number(name) is not None

    def _number(self, name: str) -> int | None:
        begun = self._started.get(name)
        if begun is not None and begun.poll() is None:
            return begun.pid
        return record.holder(self._workspace.root / "runs" / name)

    def _run(self, name: str, recipe: str, processes: int, settings: Sequence[str]) -> None:
        if not 1 <= processes <= MOST_PROCESSES:
            raise _refused(f"{processes} processes", f"1 to {MOST_PROCESSES}", "processes", "choose another number")
        if self.busy(name):
            raise _refused(f"{name} is under way", "one process a run directory", "name", "wait for it, or stop it")
        directory = Path("runs") / name
        words = ["run", recipe, "--nproc", str(processes), *settings, f"directory={json.dumps(str(directory))}"]
        place = self._workspace.root / directory
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / CONSOLE).open("ab") as console:
                self._started[name] = subprocess.Popen(
                    [*PROGRAM, *words], cwd=self._workspace.root, stdin=subprocess.DEVNULL, stdout=console,
                    stderr=subprocess.STDOUT, start_new_session=True,  # so that the end of the page is not its own
                )
        except OSError as error:
            raise _refused(f"{name} cannot be started: {error.strerror}", "a directory that can be written", "name",
                           "look at the rights and the space below runs/") from None


def _refuse_name(name: str) -> None:
    whole = name.isprintable() and "/" not in name and name.strip() == name
    if not name or not whole or name.startswith((".", "-")) or len(name.encode()) > LONGEST_NAME:
        raise _refused(f"{name!r:.60} is no name of a run", f"up to {LONGEST_NAME} bytes without /, not beginning with "
                       ". or -", "name", "choose another")


def _refused(found: str, required: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(found, required=required, where=where, remedy=remedy)

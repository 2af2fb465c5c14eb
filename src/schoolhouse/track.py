"""What a run records, passed on to TensorBoard, Weights & Biases or trackio.

It reads the run's directory, as the report does, in a process of its own: no tracker can hold training up or end it,
and a run that has ended can be passed on as well.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from schoolhouse import record
from schoolhouse.config import Track
from schoolhouse.errors import ConfigError
from schoolhouse.record import EVENTS, METRICS

OUTPUT = "track.txt"
"""What the tracker of a run has said, in the run's directory."""
RUN = "SCHOOLHOUSE_TRACKED"
"""The variable that names the process of the run that a tracker is for."""
OF_THE_RUN = ("SCHOOLHOUSE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that tell a process its place among several, which a tracker has not."""
SECONDS = 2.0
"""Between two looks at the records."""
PATIENCE = 20.0
"""Seconds that the end of a run waits for its tracker."""
NAMES = {"step": "train"}
"""What a kind of record is called there; an eval has a name of its own."""

Figures = Mapping[str, float]


class Tracker(Protocol):
    """Where figures go."""

    last: dict[str, int]
    """The last step of which it has figures, by kind."""

    def log(self, step: int, figures: Figures) -> None:
        """Note figures after a step."""

    def remember(self) -> None:
        """Keep `last` for the next time, where what was noted stays there."""

    def close(self) -> None:
        """Send what is left."""


class Follower:
    """The process that passes on the records of this run, where one is wanted. It can fail, and nothing else does."""

    def __init__(self, settings: Track | None, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> str:
        """Start it; what to say where that failed."""
        settings = self._settings
        if settings is None or settings.to is None:
            return ""
        words = ["track", str(self._directory), "--to", settings.to, "--project", settings.project]
        own = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_RUN)}
        try:
            with (self._directory / OUTPUT).open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "schoolhouse", *words], stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, env={**own, RUN: str(os.getpid())},
                )
        except OSError as error:
            return f"nothing is passed on to {settings.to}: {error.strerror}"
        return ""

    def end(self) -> str:
        """Wait until the last record is passed on; what to say where that failed."""
        try:
            if self._process is None or self._process.wait(PATIENCE) == 0:
                return ""
            found = "it ended with an error"
        except subprocess.TimeoutExpired:
            found = f"it is not done after {PATIENCE:.0f} s"
        return f"not everything was passed on to the tracker: {found}; see {OUTPUT} in the run's directory"


def require(settings: Track) -> None:
    """Raises ConfigError where the tracker is not installed."""
    found = None if settings.to is None else find_spec(settings.to)
    if settings.to is not None and (found is None or found.origin is None):  # wandb leaves directories of its name
        raise ConfigError(
            f"track.to={settings.to}, and {settings.to} is not installed", where="track.to",
            required=f"the extra `schoolhouse[{settings.to}]`",
            remedy=f"pip install 'schoolhouse[{settings.to}]', or leave track.to out",
        )


def track(directory: Path, settings: Track) -> int:
    """Pass on everything that a run has recorded and records until it ends; how many records that were."""
    require(settings)
    if not (directory / "run.json").is_file():
        raise ConfigError(f"{directory} is no run directory", required="a directory that `schoolhouse run` wrote",
                          where="command line", remedy="check the path")
    try:
        with FileLock(directory / f".track-{settings.to}.lock", timeout=0):
            return _pass_on(directory, _tracker(directory, settings))
    except Timeout:
        raise ConfigError(f"the records of {directory} are being passed on to {settings.to} already",
                          required="one process for each tracker", where=str(directory), remedy="wait for it") from None


def _pass_on(directory: Path, tracker: Tracker) -> int:
    records, sent = _Records(directory / METRICS), 0
    try:
        while True:
            goes_on = _goes_on(directory)  # looked at first: what is written before the end is read below
            for one in records.new():
                sent += _log(tracker, one)
            tracker.remember()
            if not goes_on:
                return sent
            time.sleep(SECONDS)
    finally:
        tracker.close()


def _goes_on(directory: Path) -> bool:
    """Whether the run that this process is for goes on; of another run, whether one does in its directory."""
    of = os.environ.get(RUN)
    return record.under_way(directory) if of is None else os.getppid() == int(of) and record.is_running(directory)


def _log(tracker: Tracker, one: Mapping[str, Any]) -> bool:
    """Pass a record on, unless it was before: a run that was killed writes again what came after its checkpoint."""
    name = one.get("name") or NAMES.get(one["kind"])
    if name is None or one["step"] <= tracker.last.get(name, -1):
        return False
    tracker.log(one["step"], {f"{name}/{key}": value for key, value in one.items()
                              if isinstance(value, int | float) and key != "step"})
    tracker.last[name] = one["step"]
    return True


class _Records:
    """The lines of a file that grows, each read once; of one that was replaced, all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._read = 0, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """What whole lines hold that were not read yet."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._read:
                self._file, self._read = found.st_ino, 0
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    yield json.loads(line)


def _tracker(directory: Path, settings: Track) -> Tracker:
    made = _TensorBoard if settings.to == "tensorboard" else _OnlineRun
    return made(directory, settings)


class _TensorBoard:
    """Event files in the run's directory: `tensorboard --logdir runs`."""

    def __init__(self, directory: Path, settings: Track) -> None:
        place = directory / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)  # they are all written again
        self.last: dict[str, int] = {}
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(place))

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def remember(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _OnlineRun:
    """wandb, and trackio, which speaks its language. A run that continues is the same run there."""

    def __init__(self, directory: Path, settings: Track) -> None:
        self._module = importlib.import_module(settings.to)
        facts: dict[str, Any] = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        began = [one["time"] for one in record.read_lines(directory / EVENTS)][:1]
        identity = hashlib.sha256(json.dumps([str(directory.resolve()), settings.project, began]).encode()).hexdigest()
        name = f"{directory.resolve().name}-{identity[:6]}"  # trackio knows a run by its name
        own = {"dir": str(directory), "id": identity[:16], "settings": {"console": "off"}}
        self._module.init(
            project=settings.project, name=name, config=facts["recipe"], resume="allow",
            **(own if settings.to == "wandb" else {}),
        )
        self._sent = directory / f"track-{settings.to}-{identity[:6]}.json"
        self.last: dict[str, int] = {}
        if self._sent.is_file():
            self.last = json.loads(self._sent.read_text(encoding="utf-8"))

    def log(self, step: int, figures: Figures) -> None:
        self._module.log(dict(figures), step=step)

    def remember(self) -> None:
        staging = self._sent.with_name(f".tmp-{self._sent.name}")
        staging.write_text(json.dumps(self.last), encoding="utf-8")
        staging.replace(self._sent)

    def close(self) -> None:
        self._module.finish()

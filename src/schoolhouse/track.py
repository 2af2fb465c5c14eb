"""What a run records, passed on to TensorBoard, Weights & Biases or trackio.

It reads the run's directory, as the report does, in a process of its own: no tracker can hold training up or end it,
and a run that has ended can be passed on as well.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from schoolhouse import record
from schoolhouse.config import Track
from schoolhouse.errors import ConfigError
from schoolhouse.record import EVENTS, METRICS

OUTPUT = "track.txt"
"""What the tracker of a run has said, in the run's directory."""
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

    def close(self) -> None:
        """Send what is left."""


def require(settings: Track) -> None:
    """Raises ConfigError where the tracker is not installed."""
    if settings.to is not None and find_spec(settings.to) is None:
        raise ConfigError(
            f"track.to={settings.to}, and {settings.to} is not installed", where="track.to",
            required=f"the extra `schoolhouse[{settings.to}]`",
            remedy=f"pip install 'schoolhouse[{settings.to}]', or leave track.to out",
        )


def begin(settings: Track, directory: Path) -> subprocess.Popen[bytes] | None:
    """Pass a run's records on while it goes on, in another process; None where nobody asked for it."""
    if settings.to is None:
        return None
    words = [sys.executable, "-m", "schoolhouse", "track", str(directory), "--to", settings.to]
    words += ["--project", settings.project]
    with (directory / OUTPUT).open("wb") as output:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen[bytes] | None) -> str:
    """Wait until the last record is passed on; what to say where that failed."""
    try:
        if process is None or process.wait(PATIENCE) == 0:
            return ""
        found = "it ended with an error"
    except subprocess.TimeoutExpired:
        found = f"it is not done after {PATIENCE:.0f} s"
    return f"not everything was passed on to the tracker: {found}; see {OUTPUT} in the run's directory"


def track(directory: Path, settings: Track) -> int:
    """Pass on everything that a run has recorded and records until it ends; how many records that were."""
    require(settings)
    if not (directory / "run.json").is_file():
        raise ConfigError(f"{directory} is no run directory", required="a directory that `schoolhouse run` wrote",
                          where="command line", remedy="check the path")
    tracker = _tracker(directory, settings)
    sent = 0
    try:
        for step, figures in _figures(directory, tracker.last):
            tracker.log(step, figures)
            sent += 1
    finally:
        tracker.close()
    return sent


def _figures(directory: Path, last: dict[str, int]) -> Iterator[tuple[int, Figures]]:
    """Every record once; a run that was killed goes on from its last checkpoint, and writes some again."""
    while True:
        ended = not record.under_way(directory)  # looked at first: what is written before the end is read below
        for one in record.read_lines(directory / METRICS):
            name = one.get("name") or NAMES.get(one["kind"])
            if name is None or one["step"] <= last.get(name, -1):
                continue
            last[name] = one["step"]
            yield one["step"], {f"{name}/{key}": value for key, value in one.items()
                                if isinstance(value, int | float) and key != "step"}
        if ended:
            return
        time.sleep(SECONDS)


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

    def close(self) -> None:
        self._module.finish()
        self._sent.write_text(json.dumps(self.last), encoding="utf-8")

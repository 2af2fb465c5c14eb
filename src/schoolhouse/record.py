"""The run directory: the only interface between training and looking at training."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.parallel.launch import LAUNCHER

METRICS, SAMPLES, EVENTS, EXAMPLES = "metrics.jsonl", "samples.jsonl", "events.jsonl", "examples.jsonl"
LOCK, ACTIVE = ".lock", ".active"
"""Held while a run goes on; who holds it."""


class Record:
    """Writes a run's records; one run at a time, by a lock that a kill frees, and only in its first process."""

    def __init__(self, directory: Path, *, writes: bool = True) -> None:
        self.directory = directory
        self._writes = writes
        if writes:
            self._take()

    def _take(self) -> None:
        directory = self.directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(directory / LOCK)
            self._lock.acquire(timeout=0)
            (directory / ACTIVE).write_text(f"pid {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            raise ConfigError(
                f"the run is active ({_active(directory)})", required="one process a run directory",
                where=str(directory), remedy="wait for it, stop it, or set directory=… to another",
            ) from None
        except OSError as error:
            raise _unwritable(directory, error) from None

    def close(self) -> None:
        """Free the directory for another run."""
        if self._writes:
            self._lock.release()

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty where there is none yet."""
        path = self.directory / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        if not self._writes:
            return
        staging = self.directory / f".tmp-{name}"
        try:
            staging.write_text(text, encoding="utf-8")
            staging.replace(self.directory / name)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def append(self, name: str, *values: Mapping[str, Any]) -> None:
        """Append one line of JSON for each value."""
        if not self._writes:
            return
        lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        try:
            with (self.directory / name).open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def event(self, event: str, **fields: Any) -> None:
        """Note something that happened, with its time."""
        self.append(EVENTS, {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                             "event": event, **fields})

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forget what was measured after `step`, and last lines that a kill tore; the metrics that remain."""
        for name in (METRICS, SAMPLES, EVENTS):
            lines = read_lines(self.directory / name)
            kept = lines if name == EVENTS else [value for value in lines if value["step"] <= step]
            self.write_text(name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in kept))
        return read_lines(self.directory / METRICS)


def holder(directory: Path) -> int | None:
    """The process that is to be told to stop, where one trains in this directory on this machine."""
    try:
        told = (directory / ACTIVE).read_text(encoding="utf-8", errors="replace")
        held = re.fullmatch(r"pid (\d{1,9}) on (.*)", told)
        if held is None or held[2] != socket.gethostname() or not _holds_lock(int(held[1]), directory):
            return None
        return _launcher(int(held[1]))
    except OSError:  # it has ended, is somebody else's, or this is no Linux
        return None


def _holds_lock(number: int, directory: Path) -> bool:
    """Whether the process is still the one that wrote its number there: another may have it by now."""
    lock = (directory / LOCK).resolve()
    return any(one.resolve() == lock for one in Path(f"/proc/{number}/fd").iterdir())


def _launcher(number: int) -> int:
    """What started a process among several, and passes a signal on to all of them; alone it is its own."""
    environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    named = [one.partition(b"=")[2] for one in environment if one.startswith(f"{LAUNCHER}=".encode())]
    return int(named[0]) if named and named[0].isdigit() else number


def is_running(directory: Path) -> bool:
    """Whether the last that a run said of itself is that it goes on."""
    path = directory / "run.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "running"


def under_way(directory: Path) -> bool:
    """Whether a run goes on in this directory, on this machine."""
    return is_running(directory) and holder(directory) is not None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a JSON-lines file; none where it is absent, and without lines that a full disk or a kill tore."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def _unwritable(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the run directory cannot be written: {error.strerror or error}",
        required="a directory that is there, is writable and has free space", where=str(directory),
        remedy="put it right and run the same command again, or set directory=… to another",
    )


def _active(directory: Path) -> str:
    path = directory / ACTIVE
    return path.read_text(encoding="utf-8") if path.is_file() else "another process"

"""What lies in a workspace: recipes to choose from, and runs. Nothing is named that was not found in it."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

RECIPES = ("*.yaml", "recipes/*.yaml", "examples/sft/*/*.yaml")
"""Where recipes are looked for."""
CONSOLE = "console.txt"
"""What a run that was started from the page has printed, in its directory."""
WATCHED = ("run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "report.html", CONSOLE)
"""Files that change while a run goes on."""
TAIL_BYTES = 20_000
"""Of what a run has printed, as much as is shown."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory with recipes in it, and `runs/`."""

    root: Path

    def recipes(self) -> list[str]:
        """Paths of the recipes, as from the workspace."""
        found = (path for pattern in RECIPES for path in sorted(self.root.glob(pattern)))
        return [str(path.relative_to(self.root)) for path in found if self._holds(path)]

    def runs(self) -> dict[str, Path]:
        """Run directories by name, the newest first."""
        found = [path for path in (self.root / "runs").glob("*") if self._holds(path) and _is_run(path)]
        return {path.name: path for path in sorted(found, key=_age, reverse=True)}

    def _holds(self, path: Path) -> bool:
        """A link may lead out of it."""
        return path.resolve().is_relative_to(self.root.resolve())


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("run.json", CONSOLE))


def _age(path: Path) -> float:
    return max(one.stat().st_mtime for name in ("run.json", CONSOLE) if (one := path / name).is_file())


def process(directory: Path) -> int | None:
    """The process that is to be told to stop, where one trains in this directory on this machine."""
    try:
        held = re.fullmatch(r"pid (\d+) on (.*)", (directory / ".active").read_text(encoding="utf-8"))
    except OSError:
        return None
    if held is None or held[2] != socket.gethostname():
        return None
    number = int(held[1])
    return _launcher(number) if _holds_lock(number, directory) else None


def _holds_lock(number: int, directory: Path) -> bool:
    """Whether the process is still the one that wrote its number there: another may have it by now."""
    lock = (directory / ".lock").resolve()
    try:
        return any(one.resolve() == lock for one in Path(f"/proc/{number}/fd").iterdir())
    except OSError:  # it is gone, or somebody else's
        return False


def _launcher(number: int) -> int:
    """What started a process among several, and passes a signal on to all of them; alone it is its own."""
    environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    named = [one.partition(b"=")[2] for one in environment if one.startswith(b"SCHOOLHOUSE_LAUNCHER=")]
    return int(named[0]) if named and named[0].isdigit() else number


def version(directory: Path) -> str:
    """Another text whenever something of a run has changed."""
    stamps = [str(one.stat().st_mtime_ns) for name in WATCHED if (one := directory / name).is_file()]
    return "-".join([str(process(directory) or 0), *stamps])


def console(directory: Path) -> str:
    """The end of what a run has printed; empty where it was not started from the page."""
    path = directory / CONSOLE
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")

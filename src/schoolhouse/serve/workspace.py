"""What lies in a workspace: recipes to choose from, and runs. Nothing is named that was not found in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schoolhouse import record

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


def version(directory: Path) -> str:
    """Another text whenever something of a run has changed."""
    stamps = [str(one.stat().st_mtime_ns) for name in WATCHED if (one := directory / name).is_file()]
    return "-".join([str(record.holder(directory) or 0), *stamps])


def console(directory: Path) -> str:
    """The end of what a run has printed; empty where it was not started from the page."""
    path = directory / CONSOLE
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")

"""What lies in a workspace: recipes to choose from, and runs. Nothing is named that was not found in it."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from schoolhouse.record import ACTIVE, LOCK

RECIPES = ("*.yaml", "recipes/*.yaml", "examples/sft/*/*.yaml")
"""Where recipes are looked for."""
CONSOLE = "console.txt"
"""What a run that was started from the page has printed, in its directory."""
COMPLAINTS = "chat.txt"
"""Why its student does not answer."""
WATCHED = ("run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "report.html", CONSOLE)
"""Files that change while a run goes on."""
USED = (*WATCHED, "data.json", "examples.jsonl", "resolved.yaml", COMPLAINTS, ACTIVE, LOCK)
"""All that the page reads or writes in a run's directory. One that is a link or a pipe is nobody's run."""
TAIL_BYTES = 20_000
"""Of what a run has printed, as much as is shown."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory with recipes in it, and `runs/`, which may be a link to a larger disk."""

    root: Path

    def recipes(self) -> list[str]:
        """Paths of the recipes, as from the workspace."""
        found = (path for pattern in RECIPES for path in sorted(self.root.glob(pattern)))
        return [str(path.relative_to(self.root)) for path in found if _lies_in(path, self.root) and _is_text(path.name)]

    def runs(self) -> dict[str, Path]:
        """Run directories by name, the newest first."""
        found = {path: began for path in (self.root / "runs").glob("*") if (began := self._began(path)) is not None}
        return {path.name: path for path in sorted(found, key=found.__getitem__, reverse=True)}

    def place(self, name: str) -> Path:
        """The directory of a run of this name, whether it is there or not."""
        return self.root / "runs" / name

    def is_free(self, name: str) -> bool:
        """Whether nothing, or a run, is where a run of this name would be."""
        place = self.place(name)
        try:
            return not place.is_symlink() and (not place.exists() or _is_plain(place))
        except OSError:
            return False

    def _began(self, path: Path) -> float | None:
        """When a run directory was written last; None for what is none, cannot be read, or lies elsewhere."""
        try:
            if not _is_text(path.name) or not _lies_in(path, self.root / "runs") or not _is_plain(path):
                return None
            written = [one.stat().st_mtime for name in ("run.json", CONSOLE) if (one := path / name).exists()]
            return max(written, default=None)
        except OSError:
            return None


def _lies_in(path: Path, parent: Path) -> bool:
    """A link may lead elsewhere, or in a circle."""
    try:
        return path.resolve().is_relative_to(parent.resolve())
    except (OSError, RuntimeError):
        return False


def _is_text(name: str) -> bool:
    """Names of files are bytes; Python writes what is no UTF-8 as surrogates."""
    return name.encode("utf-8", errors="replace").decode() == name


def _is_plain(directory: Path) -> bool:
    """Whether all that is used of it are plain files, and it is one's own to read."""
    kinds = [(directory / name).lstat().st_mode for name in USED if _is_there(directory / name)]
    return directory.is_dir() and all(map(stat.S_ISREG, kinds))


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def version(directory: Path, status: str) -> str:
    """Another text whenever something of a run has changed."""
    stamps = [str(one.stat().st_mtime_ns) for name in WATCHED if (one := directory / name).is_file()]
    return "-".join([status, *stamps])


def console(directory: Path) -> str:
    """The end of what a run has printed; empty where it was not started from the page."""
    path = directory / CONSOLE
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")

"""The report: one self-contained HTML file that shows what a run directory holds."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import schoolhouse
from schoolhouse.data import show
from schoolhouse.data.show import Html, join, tag
from schoolhouse.report import given, result
from schoolhouse.report.read import Run, read

FILE = "report.html"


def write(run_directory: str | Path) -> Path:
    """Write `report.html` into the run directory and return its path; raises ConfigError where there is no run."""
    run = read(run_directory)
    path = run.directory / FILE
    staged = path.with_name(f".{FILE}.{os.getpid()}")
    staged.write_text(to_html(run), encoding="utf-8")
    staged.replace(path)
    return path


def to_html(run: Run) -> str:
    """The whole page as text."""
    name = result.name(run)
    return show.page(body(run), f"{name} · schoolhouse", style=_beside("page.css"), script=_beside("page.js"))


def body(run: Run) -> Html:
    """Everything the page says."""
    shown = [(key, title, part) for key, title, part in _sections(run) if part is not None]
    contents = tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in shown), aria_label="Contents")
    return join([
        result.header(run),
        result.exam(run),
        result.figures(run),
        contents if shown else None,
        *(_section(key, title, part) for key, title, part in shown),
        given.footer(run, schoolhouse.__version__),
    ])


def _sections(run: Run) -> list[tuple[str, str, Html | None]]:
    """Everything below the head, in order; None where the run has nothing of it."""
    return [
        ("curves", "Curves", result.curves(run)),
        ("answers", "Answers", result.answers(run)),
        ("data", "Data", given.data(run)),
        ("examples", "Examples", given.examples(run)),
        ("events", "Events", given.events(run)),
        ("in-force", "In force", given.in_force(run)),
        ("settings", "Settings", given.settings(run)),
        ("environment", "Environment", given.environment(run)),
    ]


def _section(key: str, title: str, part: Html) -> Html:
    return tag("section", tag("h2", title, id=f"{key}-title"), part, id=key, aria_labelledby=f"{key}-title")


def _beside(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

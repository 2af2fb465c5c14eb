"""What a person is shown of rows being prepared: a bar with an end in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from schoolhouse import screen
from schoolhouse.screen import Screen, uncut


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(screen.time, "monotonic", lambda: self.now)


def said(monkeypatch: pytest.MonkeyPatch, *told: tuple[float, int, int | None], terminal: bool = False) -> str:
    clock, out = Clock(monkeypatch), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    with Screen(console).counting("preparing") as progress:
        for seconds, rows, of in told:
            clock.now = seconds
            progress(rows, of)
    return out.getvalue()


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in ten seconds, with the share and the time that is left; nothing for work that is soon done."""
    told = [(1, 100, 4000), (9, 900, 4000), (11, 1000, 4000), (12, 1100, 4000), (22, 2000, 4000), (23, 4000, 4000)]
    assert said(monkeypatch, *told).splitlines() == [
        "preparing: 1,000 of 4,000 rows (25%), 33 s left", "preparing: 2,000 of 4,000 rows (50%), 22 s left",
    ]
    assert said(monkeypatch, (1, 256, 256)) == ""


def test_where_the_end_is_not_known_or_known_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, (11, 1000, None)) == "preparing: 1,000 rows\n"
    assert said(monkeypatch, (11, 1000, 900)) == "preparing: 1,000 of 1,000 rows (100%), 0 s left\n"
    assert said(monkeypatch, (11, 0, 900)) == "preparing: 0 rows\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = said(monkeypatch, (11, 1000, 4000), terminal=True)
    assert "preparing: 1,000 of 4,000 rows (25%), 33 s left" in shown and "━" in shown


def test_only_a_terminal_cuts_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is read in a file or by a program stays whole; a width that is asked for holds."""
    path, shown = "/place" * 40, []
    for columns in (None, "80"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        out = io.StringIO()
        Screen(uncut(file=out)).table("in force", [("directory", path)])
        shown.append(out.getvalue())
    assert path in shown[0] and path not in shown[1]

"""What a person sees in the terminal: a live line where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

UNCUT = 1 << 16
"""Characters of a line that nothing cuts."""
PLAIN_SECONDS = 10.0
"""Seconds between two plain lines."""


def uncut(*, stderr: bool = False, **more: Any) -> Console:
    """Where a person or a program reads: only a terminal cuts lines, so that a path in a file stays whole."""
    made = Console(stderr=stderr, highlight=False, **more)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = UNCUT
    return made


class Screen:
    """Writes to standard error, so that standard output holds only what was asked for."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or uncut(stderr=True, soft_wrap=True)

    @classmethod
    def of(cls, first: bool) -> Screen:
        """The screen of the first process; the others' shows nothing."""
        return cls() if first else cls(Console(quiet=True, force_terminal=False))

    def say(self, text: str) -> None:
        """One line, as it stands."""
        self.console.print(text, markup=False)

    def note(self, text: str) -> None:
        """One line, if there is anything to say."""
        if text:
            self.say(text)

    def table(self, title: str, rows: Sequence[tuple[str, Any]]) -> None:
        """Two columns: what, and its value."""
        table = Table("", "", title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(f"[dim]{name}[/dim]", str(value).replace("[", "\\["))
        self.console.print(table)

    def counting(self, title: str) -> Counting:
        """Progress of rows."""
        return Counting(self, title)

    def steps(self, total: int, done: int) -> Steps:
        """Progress of training."""
        return Steps(self, total, done)


class Counting:
    """Rows done, of how many if that is known, from time to time."""

    def __init__(self, screen: Screen, title: str) -> None:
        self._screen, self._title = screen, title
        self._began = self._said = time.monotonic()
        self._live = screen.console.is_terminal
        self._progress = Progress(
            BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(), console=screen.console,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int | None], None]:
        if self._live:
            self._progress.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def _update(self, rows: int, of: int | None) -> None:
        now = time.monotonic()
        text = f"{self._title}: {rows:,} rows"
        if of and rows:
            of = max(rows, of)
            left = (now - self._began) / rows * (of - rows)
            text = f"{self._title}: {rows:,} of {of:,} rows ({rows / of:.0%}), {left:,.0f} s left"
        self._progress.update(self._task, completed=rows, total=of, description=text)
        if not self._live and now - self._said > PLAIN_SECONDS:
            self._said = now
            self._screen.say(text)


class Steps:
    """Training as it goes: step, loss, speed, time left."""

    def __init__(self, screen: Screen, total: int, done: int) -> None:
        self._screen, self._total, self._done, self._first = screen, total, done, done
        self._began = self._said = time.monotonic()
        self._live = screen.console.is_terminal
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
            TimeRemainingColumn(), TextColumn("left"), console=screen.console,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Steps:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a step's record."""
        text = (
            f"loss {record['loss']:.4f} · {record['tokens'] / record['seconds']:,.0f} tokens/s"
            f" · {record['supervised_tokens'] / record['seconds']:,.0f} supervised/s · MFU {record['mfu']:.0%}"
        )
        self._progress.update(self._task, completed=record["step"], description=text)
        due = time.monotonic() - self._said > PLAIN_SECONDS or record["step"] in (self._first + 1, self._total)
        if not self._live and due:
            self._said = time.monotonic()
            left = (self._said - self._began) / (record["step"] - self._first) * (self._total - record["step"])
            self._screen.say(f"step {record['step']}/{self._total} · {text} · {left:,.0f} s left")

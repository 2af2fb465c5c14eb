"""Every row accounted for: counted by verdict or by reason, bad rows and dropped ones written down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from schoolhouse.config import Data
from schoolhouse.data.encode import TooLongError
from schoolhouse.data.store import Arrays
from schoolhouse.errors import DataError, TemplateError
from schoolhouse.types import EncodedRow, Ledger, Origin

SHOWN_FAULTS = 5
DROPPED, BAD = "dropped.jsonl", "bad.jsonl"
"""The rows that are not taught, in the store's directory: which and why; the bad ones with their content."""
HELD_OUT = "held out for validation"
_COUNTED = ("cut", "examples", "turns", "stopped_turns", "tokens", "supervised_tokens")


@dataclass(slots=True)
class Tally:
    """What became of some rows."""

    rows: Counter[str] = field(default_factory=Counter)
    """By `Origin.source`."""
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    """Rows by the power of two that bounds their longest sequence, in tokens."""
    bad: int = 0
    faults: list[DataError] = field(default_factory=list)
    """Of the bad rows; of many tallies together the first few."""
    dropped: list[Mapping[str, Any]] = field(default_factory=list)
    """The lines for `dropped.jsonl`."""
    set_aside: list[Mapping[str, Any]] = field(default_factory=list)
    """The lines for `bad.jsonl`."""

    def drop(self, origin: Origin, reason: str) -> None:
        """A row that is not taught, and why."""
        self.reasons[reason] += 1
        self.dropped.append({"source": origin.source, "row": origin.row, "reason": reason})

    def fault(self, origin: Origin, error: DataError, row: Mapping[str, Any] | DataError) -> None:
        """A bad row."""
        self.bad += 1
        if isinstance(error, TooLongError):
            self.sizes[error.tokens.bit_length()] += 1
        self.faults.append(error)
        self.drop(origin, "bad: refused" if isinstance(error, TemplateError) else "bad: unreadable")
        content = None if isinstance(row, DataError) else row
        self.set_aside.append({
            "source": origin.source, "row": origin.row, "where": error.where, "found": error.found,
            "required": error.required, "content": content,
        })

    def keep(self, row: EncodedRow) -> None:
        """A row that has examples; without any it is too long."""
        self.sizes[row.longest.bit_length()] += 1
        if not row.examples:
            self.drop(row.conversation.origin, "longer than data.max_tokens")
            return
        self.verdicts[row.verdict] += 1
        self.counts["cut"] += row.cut_turns > 0
        self.counts["turns"] += len(row.turns) - row.cut_turns

    def deliver(self, arrays: Arrays, stop_ids: tuple[int, ...]) -> None:
        """The examples of all rows that were kept, as they are stored."""
        self.counts.update(
            examples=len(arrays["lengths"]), stopped_turns=int(np.isin(arrays["labels"], stop_ids).sum()),
            tokens=int(arrays["lengths"].sum()), supervised_tokens=int(arrays["supervised_tokens"].sum()),
        )


class Account:
    """The tally of all rows; what is not taught goes to the files of a directory, so that memory does not grow."""

    def __init__(self, directory: Path) -> None:
        self.total = Tally()
        self._dropped = (directory / DROPPED).open("w", encoding="utf-8")
        self._bad = (directory / BAD).open("w", encoding="utf-8")

    def add(self, tally: Tally) -> None:
        """Count the rows of a tally too."""
        total = self.total
        for mine, new in ((total.rows, tally.rows), (total.verdicts, tally.verdicts), (total.reasons, tally.reasons),
                          (total.counts, tally.counts), (total.sizes, tally.sizes)):
            mine.update(new)
        total.bad += tally.bad
        total.faults += tally.faults[: SHOWN_FAULTS - len(total.faults)]
        for file, lines in ((self._dropped, tally.dropped), (self._bad, tally.set_aside)):
            file.writelines(json.dumps(line, ensure_ascii=False, default=_named) + "\n" for line in lines)

    def close(self, data: Data, not_drawn: Mapping[str, int], owners: Mapping[str, str]) -> Ledger:
        """The ledger; raises DataError where more rows are bad than may be, or none is left. `owners`: the source, as
        the user wrote it, of each file."""
        self._dropped.close()
        self._bad.close()
        total, rows = self.total, self.total.rows.total()
        if total.bad > data.bad_share * rows:
            raise _faulty(total, data)
        if not total.counts["examples"]:
            raise _nothing_left(total, list(dict.fromkeys(owners.values())))
        by_source: Counter[str] = Counter()
        for name, count in total.rows.items():
            by_source[owners[name]] += count
        ledger = Ledger(
            rows=rows, verdicts=dict(total.verdicts), dropped=dict(total.reasons), by_source=dict(by_source),
            not_drawn=dict(not_drawn), **{name: total.counts[name] for name in _COUNTED},
        )
        assert ledger.rows == ledger.kept + sum(ledger.dropped.values()), ledger
        return ledger


def _named(value: object) -> str:
    """What stands for a value that is no JSON: encoded images would fill the file with what nobody can read."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes | bytearray | memoryview) else repr(value)


def _faulty(tally: Tally, data: Data) -> DataError:
    """All bad rows as one error: the first in full, the next few by place, and how many there are."""
    first, others, rows = tally.faults[0], tally.faults[1:], tally.rows.total()
    sizes = f"; {_histogram(tally)}" if isinstance(first, TooLongError) else ""
    if tally.bad == 1 and not data.bad_share:
        return type(first)(first.found, required=first.required + sizes, where=first.where, remedy=first.remedy)
    listed = "".join(f"\n{fault.where}: {fault.found:.120}" for fault in others)
    found = f"{first.found} ({tally.bad:,} of {rows:,} rows are bad)"
    if data.bad_share:
        found = f"{found[:-1]}, {tally.bad / rows:.2%}, more than data.on_error={data.on_error} allows)"
    return type(first)(found, required=first.required + sizes, where=first.where, remedy=first.remedy + listed)


def _nothing_left(tally: Tally, names: Sequence[str]) -> DataError:
    if not tally.rows:  # sources without rows are refused before: these were to be held out of them
        return DataError(
            "no row is held out for validation", required="at least one", where=", ".join(names),
            remedy="raise the share data.validation, or name a source of its own there",
        )
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tally.reasons.items())
    return DataError(
        f"of {tally.rows.total():,} rows none is left to learn ({reasons})",
        required="at least one example" + (f"; {_histogram(tally)}" if tally.sizes else ""),
        where=", ".join(names),
        remedy="look at a few rows with `schoolhouse show`; see data.max_tokens, data.too_long, data.supervise",
    )


def _histogram(tally: Tally) -> str:
    """How long the rows are, in one line."""
    return "rows by tokens: " + ", ".join(
        f"{tally.sizes[power]:,} below {2**power:,}" for power in sorted(tally.sizes)
    )

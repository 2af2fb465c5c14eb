"""The parts of a report that say what went in: data, examples, events, what was in force, settings, environment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from schoolhouse import recipe as recipes
from schoolhouse.config import Recipe
from schoolhouse.data import show
from schoolhouse.data.show import Child, Html, join, tag
from schoolhouse.report import plots, words
from schoolhouse.report.read import Record, Run, number

MOST_EVENTS = 100
"""The last events that are shown."""


# ---- data ------------------------------------------------------------------------------------------------------


def data(run: Run) -> Html | None:
    """The ledgers, side by side, each with its sum and its lengths."""
    if not run.ledgers:
        return None
    note = "Every row read is either kept or dropped for a reason that is counted."
    ledgers = [_ledger(name, ledger) for name, ledger in run.ledgers.items()]
    lengths = [_lengths(name, ledger) for name, ledger in run.ledgers.items()]
    columns = (tag("div", *parts, class_="columns") for parts in (ledgers, lengths))
    return tag("div", tag("p", note, class_="note"), *columns)


def _ledger(name: str, ledger: Record) -> Html:
    title = tag("h3", {"train": "Training", "validation": "Validation"}[name])
    return tag("div", title, tag("table", tag("tbody", *_ledger_rows(ledger))), _sum(ledger), _sources(ledger))


def _ledger_rows(ledger: Record) -> list[Html]:
    dropped = [_count(f"dropped: {reason}", count, "less") for reason, count in _mapping(ledger, "dropped").items()]
    verdicts = [_count(f"verdict {verdict}", count, "less") for verdict, count in _mapping(ledger, "verdicts").items()]
    tokens, taught, stopped = (number(ledger, key) for key in ("tokens", "supervised_tokens", "stop_share"))
    share = f" ({plots.percent(taught / tokens)})" if tokens > 0 else ""
    return [
        _count("rows read", ledger.get("rows")),
        *dropped,
        _count("rows kept", _kept(ledger), "sum"),
        *verdicts,
        *([_count("with turns cut from the end", ledger["cut"], "less")] if ledger.get("cut") else []),
        _count("examples", ledger.get("examples")),
        _count("supervised turns", ledger.get("turns")),
        _row("stop token is a target", plots.percent(stopped) if math.isfinite(stopped) else words.NOTHING),
        _count("tokens", ledger.get("tokens")),
        _row("supervised tokens", words.count(taught) + share),
    ]


def _kept(ledger: Record) -> Any:
    return ledger.get("kept", sum(_mapping(ledger, "verdicts").values()))


def _sum(ledger: Record) -> Html:
    """The ledger as an equation, and whether it holds."""
    rows, kept, dropped = number(ledger, "rows"), _kept(ledger), sum(_mapping(ledger, "dropped").values())
    holds = rows == kept + dropped and kept == sum(_mapping(ledger, "verdicts").values())
    equation = f"{words.count(rows)} read = {words.count(kept)} kept + {words.count(dropped)} dropped "
    result = tag("b", "✓ adds up" if holds else "✗ does not add up")
    return tag("p", equation, result, class_="adds" if holds else "adds wrong")


def _sources(ledger: Record) -> Html | None:
    sources = _mapping(ledger, "by_source")
    if not sources:
        return None
    rows = [_count(source, count) for source, count in sources.items()]
    return tag("table", tag("caption", "Rows read, by source"), tag("tbody", *rows), class_="sources")


def _lengths(name: str, ledger: Record) -> Html | None:
    lengths = _mapping(ledger, "lengths")
    edges, counts = lengths.get("edges") or [], lengths.get("counts") or []
    if not counts or len(edges) <= len(counts):
        return None
    name = {"train": "training"}.get(name, name)
    label = f"Lengths of the {name} examples, from {edges[0]:,g} to {edges[-1]:,g} tokens"
    caption = tag("figcaption", f"{name.capitalize()} examples by length")
    return tag("figure", caption, plots.bars(label, edges, counts, "examples"))


def _mapping(record: Record, key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _row(what: str, content: Child, look: str | None = None) -> Html:
    return tag("tr", tag("th", what, scope="row"), tag("td", content, class_="n"), class_=look)


def _count(what: str, count: Any, look: str | None = None) -> Html:
    return _row(what, words.count(count), look)


# ---- examples and events ---------------------------------------------------------------------------------------


def examples(run: Run) -> Html | None:
    """The first training examples in colour."""
    if not run.examples:
        return None
    note = "The first training examples, token for token: what is on green is what the model is asked to write."
    return tag("div", tag("p", note, class_="note"), show.html(run.examples))


def events(run: Run) -> Html | None:
    """What happened and when."""
    if not run.events:
        return None
    shown = run.events[-MOST_EVENTS:]
    rows = [[words.moment(event.get("time")), str(event.get("event", "")), _details(event)] for event in shown]
    hidden = len(run.events) - len(shown)
    note = tag("p", f"{hidden:,} earlier events are in events.jsonl.", class_="note") if hidden else None
    return tag("div", note, _table(["time", "event", ""], rows))


def _details(event: Record) -> str:
    return " · ".join(f"{key} {words.value(value)}" for key, value in event.items() if key not in ("time", "event"))


def _table(head: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    titles = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in head)))
    return tag("div", tag("table", titles, tag("tbody", *body)), class_="scroll")


# ---- in force, settings, environment ---------------------------------------------------------------------------


def in_force(run: Run) -> Html | None:
    """What was asked for, and what was then at work; and the values that follow from the recipe."""
    rows = [row for row in run.facts.get("in_force") or [] if isinstance(row, Mapping)]
    tables = [_alike(heads, [row for row in rows if tuple(row) == heads]) for heads in dict.fromkeys(map(tuple, rows))]
    derived = [_row(str(key).replace("_", " "), words.value(value)) for key, value in run.section("derived").items()]
    if not rows and not derived:
        return None
    follows = tag("div", tag("h3", "What follows from the recipe"), tag("table", tag("tbody", *derived)))
    return tag("div", *tables, tag("div", follows if derived else None, class_="columns below"))


def _alike(heads: Sequence[str], rows: Sequence[Record]) -> Html:
    """A table of rows that have the same columns."""
    return _table(heads, [[words.value(row[head]) for head in heads] for row in rows])


def settings(run: Run) -> Html | None:
    """The settings that are not at their default, and the whole resolved recipe."""
    if not run.recipe:
        return None
    rows = [
        [tag("code", key), tag("code", words.value(value)), words.value(default), _meaning(documentation)]
        for key, value, default, documentation in changed(run.recipe)
    ]
    table = _table(["setting", "value", "default", "meaning"], rows)
    whole = tag("pre", recipes.written(run.recipe), class_="yaml")
    fold = tag("details", tag("summary", "The whole resolved recipe"), whole, class_="fold")
    return tag("div", table, fold, class_="settings")


def _meaning(documentation: str) -> Html:
    """A setting's documentation, what stands between backticks as code."""
    parts = documentation.split("`")
    return join(tag("code", part) if index % 2 else part for index, part in enumerate(parts))


def changed(recipe: Record) -> list[tuple[str, Any, Any, str]]:
    """Dotted key, value, default and meaning of every setting that differs from its default."""
    found = []
    for key, default, documentation in _defaults(Recipe):
        value = words.at(recipe, key)
        if json.dumps(value, sort_keys=True) != json.dumps(default, sort_keys=True, default=str):
            found.append((key, value, default, documentation))
    return found


def _defaults(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting with its default (None where it has none) and the first sentence of its documentation."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _defaults(field.annotation, f"{prefix}{name}.")
        else:
            default = None if field.is_required() else field.default
            yield prefix + name, default, (field.description or "").split(". ")[0].rstrip(".")


def environment(run: Run) -> Html | None:
    """Device and versions."""
    parts = [("Device", run.section("device")), ("Versions", run.section("versions"))]
    tables = [
        tag("div", tag("h3", title), tag("table", tag("tbody", *(_row(str(key), words.value(value))
                                                                 for key, value in facts.items()))))
        for title, facts in parts if facts
    ]  # fmt: skip
    return tag("div", *tables, class_="columns") if tables else None


def footer(run: Run, version: str) -> Html:
    """Where the report comes from."""
    written = [f"Written by schoolhouse {version} from ", tag("code", str(run.directory))]
    return tag("footer", join([*written, ". It is one file that loads nothing and sends nothing."]))

"""What is known about the data before training: the ledger, the lengths, the coloured rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from schoolhouse.config import Recipe
from schoolhouse.data import choose, prepare, served, show
from schoolhouse.data import plan as plans
from schoolhouse.data.served import Rules, Served, Serving
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError
from schoolhouse.screen import Screen
from schoolhouse.types import Conversation

LONGEST = 5


def overview(recipe: Recipe, serving: Serving, screen: Screen) -> dict[str, Any]:
    """Prepare all sources of a recipe and describe them; what `check --json` prints."""
    stores = {}
    for name, choice in choose.choices(recipe).items():
        with screen.counting(f"preparing {name}") as progress:
            stores[name] = prepare.prepare(recipe.data, choice, serving, served.rules(recipe), progress)
    train, validation = stores["train"], stores.get("validation")
    plan = plans.plan(train, recipe)
    first = plan.step(1)
    return {
        "train": ledger(train),
        "validation": ledger(validation) if validation else None,
        "steps": recipe.train.steps or recipe.train.epochs * plan.steps_per_epoch,
        "steps_per_epoch": plan.steps_per_epoch,
        "micro_batches": len(first.packs),
        "prepared": str(train.directory),
    }


def ledger(store: Store) -> dict[str, Any]:
    """The ledger of a store with what follows from it: kept rows, the share of stopped turns, lengths."""
    counted = store.ledger
    counts, edges = np.histogram(store.lengths, bins=min(20, int(store.lengths.max())))
    longest = np.argsort(-store.lengths, kind="stable")[:LONGEST]
    return {
        **dataclasses.asdict(counted), "kept": counted.kept, "stop_share": counted.stopped_turns / counted.turns,
        "fingerprint": store.fingerprint,
        "lengths": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        "longest": [{"row": str(store[int(one)].origin), "tokens": int(store.lengths[one])} for one in longest],
    }


def shown_rows(
    recipe: Recipe, model: Served, rules: Rules, first: int = 0, end: int | None = None
) -> Iterator[dict[str, Any]]:
    """The examples of training rows `first` up to `end`, as `show --json` prints them."""
    added = model.tokenizer.added_tokens_decoder.items()
    special = {*model.tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    decode = functools.partial(
        model.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    for conversation in itertools.islice(_taught(recipe), first, end):
        try:
            yield from show.to_json(model.encode_conversation(conversation, rules), decode, special)
        except DataError:
            if not recipe.data.bad_share:
                raise


def _taught(recipe: Recipe) -> Iterator[Conversation]:
    """The conversations of the training rows; bad ones are passed over where the recipe sets them aside."""
    choice = choose.choices(recipe)["train"]
    for settings, (origin, row) in prepare.rows_of(recipe.data, choice):
        said = prepare.conversation_of(row, settings, origin)
        if isinstance(said, DataError) and not recipe.data.bad_share:
            raise said
        if isinstance(said, Conversation) and choice.holds(said):
            yield said


def print_overview(found: dict[str, Any]) -> None:
    """The overview as tables on standard output."""
    console = Console(highlight=False)
    for name in ("train", "validation"):
        if found[name] is not None:
            console.print(_ledger_table(name, found[name]))
            console.print(_histogram(found[name]))
    console.print(
        f"{found['steps']:,} steps, {found['steps_per_epoch']:,} an epoch; "
        f"{found['micro_batches']} micro-batch(es) in the first step\nprepared: {found['prepared']}", soft_wrap=True
    )


def _ledger_table(name: str, counted: dict[str, Any]) -> Table:
    table = Table("", "", title=name, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("rows read", f"{counted['rows']:,}")
    for source, rows in counted["by_source"].items():
        table.add_row(f"  {source}", f"{rows:,}")
    for verdict, rows in counted["verdicts"].items():
        table.add_row(f"kept: {verdict}", f"{rows:,}")
    for reason, rows in counted["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{rows:,}")
    table.add_row("rows with turns cut", f"{counted['cut']:,}")
    table.add_row("examples", f"{counted['examples']:,}")
    table.add_row("tokens", f"{counted['tokens']:,}")
    table.add_row("supervised tokens", f"{counted['supervised_tokens']:,}")
    table.add_row("turns whose stop token is a target", f"{counted['stopped_turns']:,} of {counted['turns']:,}")
    table.add_row("longest", ", ".join(f"{one['row']} ({one['tokens']:,})" for one in counted["longest"]))
    return table


def _histogram(counted: dict[str, Any]) -> Table:
    edges, counts = counted["lengths"]["edges"], counted["lengths"]["counts"]
    table = Table("tokens", "examples", "", box=None, padding=(0, 2, 0, 0))
    for low, count in zip(edges, counts, strict=False):
        table.add_row(f"{low:,.0f}", f"{count:,}", "█" * round(40 * count / max(counts)))
    return table

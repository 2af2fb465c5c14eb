"""What is known about the data before training: the ledger, the lengths, the coloured rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from schoolhouse import estimate, evaluate, optim, places
from schoolhouse.config import Recipe
from schoolhouse.data import account, choose, prepare, served, show, tokens, vision
from schoolhouse.data import plan as plans
from schoolhouse.data.served import Rules, Served, Serving
from schoolhouse.data.store import Store
from schoolhouse.errors import DataError
from schoolhouse.model import adapter_files, families, fourbit, load, lora, shared_prefixes, sight, teaching
from schoolhouse.screen import Screen, uncut
from schoolhouse.types import Conversation, EncodedRow, Example

LONGEST = 5


def overview(recipe: Recipe, serving: Serving, screen: Screen) -> dict[str, Any]:
    """Prepare all sources of a recipe, read its exam, build its student without weights, and describe them; what
    `check --json` prints."""
    skeleton = load.skeleton(serving.directory, recipe.lora, recipe.model.freeze)
    taught = _taught_parts(recipe, skeleton)
    if recipe.lora is not None and recipe.lora.start:
        adapter_files.begin_with(places.adapter_directory(recipe.lora.start), skeleton, recipe.lora)
    train, validation = stores(recipe, serving, screen)
    model = served.load(serving)
    shares = _shares(recipe, serving.directory)
    plan = plans.plan(train, recipe, shares=shares)
    longest = int(train.lengths.max())
    families.refuse_length(skeleton, longest)
    sight.refuse_unseen(skeleton, shown=train.shows)
    in_force = {**_in_force(recipe, model), **taught, **tokens.beyond(serving.directory, longest)}
    asked = evaluate.questions(recipe, model)
    if asked:
        in_force["exam"] = f"{len(asked):,} questions, graded by {recipe.exam.grader}"
    steps = recipe.train.steps or recipe.train.epochs * plan.steps_per_epoch
    in_force["learning rate"] = optim.told(recipe.optim, steps, adapters=recipe.lora is not None)
    return {
        "train": ledger(train, shares=shares),
        "validation": ledger(validation, shares=shares) if validation else None,
        "duplicates": duplicates(train, validation),
        "steps": steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "micro_batches": len(plan.step(1).packs),
        "prepared": str(train.directory),
        "memory": estimate.memory(recipe, skeleton),
        "in_force": [{"what": what, "value": value} for what, value in in_force.items()],
    }


def stores(recipe: Recipe, serving: Serving, screen: Screen) -> tuple[Store, Store | None]:
    """The examples to train on, and those held out for validation, if any; prepared where they are not yet."""
    found = {}
    for name, choice in choose.choices(recipe).items():
        with screen.counting(f"preparing {name}") as progress:
            found[name] = prepare.prepare(recipe.data, choice, serving, served.rules(recipe), progress)
    return found["train"], found.get("validation")


def ledger(store: Store, *, shares: bool) -> dict[str, Any]:
    """The ledger of a store with what follows from it: kept rows, the share of stopped turns, lengths, costs, for a
    student that `shares` what examples begin with, or not."""
    counted, computed = store.ledger, store.lengths - store.shared if shares else store.lengths
    counts, edges = np.histogram(store.lengths, bins=min(20, int(store.lengths.max())))
    longest = np.argsort(-store.lengths, kind="stable")[:LONGEST]
    return {
        **dataclasses.asdict(counted), "kept": counted.kept, "stop_share": counted.stopped_turns / counted.turns,
        "split_cost": split_cost(store, store.lengths), "computed_cost": split_cost(store, computed),
        "fingerprint": store.fingerprint,
        "lengths": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        "longest": [{"row": str(store[int(one)].origin), "tokens": int(store.lengths[one])} for one in longest],
        "files": {name: str(store.directory / name) for name in (account.DROPPED, account.BAD)},
    }


def split_cost(store: Store, tokens: np.ndarray) -> float:
    """How many times as many these tokens of examples, i64[examples], are as if no row were split."""
    return float(tokens.sum() / np.maximum.reduceat(store.lengths, store.firsts).sum())


def duplicates(train: Store, validation: Store | None) -> dict[str, Any]:
    """Examples whose tokens stand more than once: in training, and in validation though they are trained."""
    seen = {_digest(train[index]) for index in range(len(train))}
    held_out = [] if validation is None else [validation[index] for index in range(len(validation))]
    both = [str(one.origin) for one in held_out if _digest(one) in seen]
    return {"in_train": len(train) - len(seen), "in_both": len(both), "first": both[:LONGEST]}


def _digest(example: Example) -> bytes:
    images = b"".join(picture.digest for picture in example.vision)
    content = example.input_ids.tobytes() + example.labels[-1:].tobytes() + images
    return hashlib.blake2b(content, digest_size=16).digest()


def _in_force(recipe: Recipe, model: Served) -> dict[str, str]:
    """What the recipe comes to, in words, as far as it concerns the rows."""
    data, arguments = recipe.data, json.dumps(recipe.model.template_arguments)
    tool_use = "" if model.template.tool_use is model.template.default else "; tool_use serves rows with tools"
    aside = "stop" if data.on_error == "stop" else f"at most {data.bad_share:.4g} of the rows are set aside"
    held_out = ", ".join(one.path for one in data.validation) if isinstance(data.validation, tuple) else "none"
    if isinstance(data.validation, float):
        held_out = f"{data.validation:g} of the rows, drawn by seed {recipe.seed}"
    return {
        "student": recipe.model.path,
        "tokenizer": tokens.describe(model.tokenizer),
        "chat template": (recipe.model.chat_template or "the tokenizer's own") + tool_use
        + (f", with {arguments}" if recipe.model.template_arguments else ""),
        "stop tokens": ", ".join(model.stops.texts),
        "supervised": {"every": "every answer", "last": "the last answer of each row",
                       "marked": "answers that the data marks"}[data.supervise],
        "longest example": f"{recipe.max_tokens:,} tokens; longer rows: "
        + {"error": "stop", "drop": "are dropped", "turns": "lose whole turns from their end"}[data.too_long],
        "bad rows": aside,
        "validation": held_out,
        "step": f"{recipe.batch.examples:,} examples, in micro-batches of at most {_most(recipe)} tokens",
    }


def _taught_parts(recipe: Recipe, skeleton: PreTrainedModel) -> dict[str, str]:
    """What of a model is trained, and how, by names and shapes; raises ConfigError where a setting names what it does
    not have."""
    if recipe.lora is not None and recipe.lora.base == "nf4":
        fourbit.refuse(skeleton)
    if recipe.model.new_tokens:
        lora.refuse_frozen_words(skeleton)
    objective = teaching.teaching(recipe.train, skeleton).describe()
    sizes = {name: one.numel() for name, one in skeleton.named_parameters() if one.requires_grad}
    optim.factors(sizes, recipe.optim.rates)
    trained, every = sum(sizes.values()), sum(one.numel() for one in skeleton.parameters())
    way = lora.describe(skeleton, recipe.lora) if recipe.lora else "full fine-tuning"
    return {"way": f"{way}; {trained:,} of {every:,} parameters are trained", "objective": objective}


def _most(recipe: Recipe) -> str:
    return "as many as fit" if recipe.batch.tokens == "auto" else f"{recipe.batch.tokens:,}"


def shown_rows(
    recipe: Recipe, model: Served, rules: Rules, first: int = 0, end: int | None = None
) -> Iterator[dict[str, Any]]:
    """The examples of training rows `first` up to `end`, as `show --json` prints them."""
    added = model.tokenizer.added_tokens_decoder.items()
    special = {*model.tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    decode = functools.partial(
        model.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    seen = None if model.sight is None else functools.partial(vision.seen, sight=model.sight)
    for row in encoded_rows(recipe, model, rules, first, end):
        yield from show.to_json(row, decode, special, seen)


def encoded_rows(
    recipe: Recipe, model: Served, rules: Rules, first: int = 0, end: int | None = None
) -> Iterator[EncodedRow]:
    """Training rows `first` up to `end`, encoded; bad ones are passed over where the recipe sets them aside."""
    for conversation in itertools.islice(_taught(recipe), first, end):
        try:
            yield model.encode_conversation(conversation, rules)
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
    console = uncut()
    for name in ("train", "validation"):
        if found[name] is not None:
            console.print(_ledger_table(name, found[name]))
            console.print(_histogram(found[name]))
    console.print(_table("in force", [(row["what"], row["value"]) for row in found["in_force"]]))
    console.print(
        f"{found['steps']:,} steps, {found['steps_per_epoch']:,} an epoch; "
        f"{found['micro_batches']} micro-batch(es) in the first step\n{_repeated(found['duplicates'])}\n"
        f"prepared: {found['prepared']}\n{estimate.told(found['memory'])}", soft_wrap=True, markup=False,
    )


def _repeated(found: dict[str, Any]) -> str:
    both = f"{found['in_both']:,} of the validation examples are trained"
    named = f" ({', '.join(found['first'])}{', …' if found['in_both'] > len(found['first']) else ''})"
    return f"duplicates: {found['in_train']:,} in training; {both}{named if found['first'] else ''}"


def _ledger_table(name: str, counted: dict[str, Any]) -> Table:
    files, left = counted["files"], counted["not_drawn"]
    sources = [(f"  {source}", f"{rows:,}" + (f" ({left[source]:,} not drawn)" if source in left else ""))
               for source, rows in counted["by_source"].items()]
    dropped = [(f"dropped: {reason}", f"{rows:,}") for reason, rows in counted["dropped"].items()]
    listed = [("  listed in", files[account.DROPPED])] if dropped else []
    bad = any(reason.startswith("bad") for reason in counted["dropped"])
    return _table(name, [
        ("rows read", f"{counted['rows']:,}"), *sources,
        *((f"kept: {verdict}", f"{rows:,}") for verdict, rows in counted["verdicts"].items()),
        *dropped, *listed, *([("  bad rows in", files[account.BAD])] if bad else []),
        ("rows with turns cut", f"{counted['cut']:,}"), ("examples", f"{counted['examples']:,}"),
        ("tokens", f"{counted['tokens']:,}{_split(counted) if counted['split_cost'] > 1 else ''}"),
        ("supervised tokens", f"{counted['supervised_tokens']:,}"),
        ("turns whose stop token is a target",
         f"{counted['stopped_turns']:,} of {counted['turns']:,} ({counted['stop_share']:.0%})"),
        ("longest", ", ".join(f"{one['row']} ({one['tokens']:,})" for one in counted["longest"])),
    ])


def _split(counted: dict[str, Any]) -> str:
    once = "" if counted["computed_cost"] == counted["split_cost"] else (
        f"; {counted['computed_cost']:.2f} where what they begin with is computed once")
    return f" (splitting costs {counted['split_cost']:.2f} times as many as rows that stay whole{once})"


def _shares(recipe: Recipe, directory: Path) -> bool:
    """Whether what examples begin with will be computed once, as far as it can be told without weights and device."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    drawn = recipe.train.neftune or recipe.train.balance or (recipe.lora is not None and recipe.lora.dropout)
    known = settings.get("model_type") in shared_prefixes.KNOWN and not shared_prefixes.drops(settings)
    return known and not drawn


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table("", "", title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for what, value in rows:
        table.add_row(Text(what), Text(value, overflow="fold"))
    return table


def _histogram(counted: dict[str, Any]) -> Table:
    edges, counts = counted["lengths"]["edges"], counted["lengths"]["counts"]
    table = Table("tokens", "examples", "", box=None, padding=(0, 2, 0, 0))
    for low, count in zip(edges, counts, strict=False):
        table.add_row(f"{low:,.0f}", f"{count:,}", "█" * round(40 * count / max(counts)))
    return table

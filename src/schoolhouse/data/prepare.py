"""Rows to a store: read, encoded by all cores, every row accounted for; done once for the same content and settings."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schoolhouse import places
from schoolhouse.config import Data, Rows, Source
from schoolhouse.data import formats, served, sources, store, tokens
from schoolhouse.data.served import Rules, Serving
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import EncodedRow, Ledger, Origin

VERSION = 1
"""Raise it when the same row would become other tokens: it is part of every store's fingerprint."""
CHUNK = 256
"""Rows that travel to a worker together."""
SMALL = 2048
"""Up to this many rows, starting worker processes costs more than it saves."""
SHOWN_FAULTS = 5

Row = tuple[Origin, dict[str, Any] | DataError]
Chunk = tuple[Rows, list[Row]]
Progress = Callable[[int], None]
"""Called with the number of rows done."""


@dataclass(slots=True)
class Tally:
    """Counts over rows; adding two is exact."""

    rows: Counter[str] = dataclasses.field(default_factory=Counter)
    """By source."""
    verdicts: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: list[tuple[Origin, str]] = dataclasses.field(default_factory=list)
    faults: list[DataError] = dataclasses.field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count the rows of another tally too."""
        self.rows.update(other.rows)
        self.verdicts.update(other.verdicts)
        self.counts.update(other.counts)
        self.dropped += other.dropped
        self.faults += other.faults

    def ledger(self) -> Ledger:
        """The counts as the ledger that is kept; rows in and out are equal, or this program is wrong."""
        reasons = dict(Counter(reason for _, reason in self.dropped))
        ledger = Ledger(
            rows=self.rows.total(), verdicts=dict(self.verdicts), dropped=reasons, by_source=dict(self.rows),
            **{name: self.counts[name] for name in _COUNTED},
        )
        assert ledger.rows == ledger.kept + sum(reasons.values()), ledger
        return ledger


_COUNTED = ("cut", "examples", "turns", "stopped_turns", "tokens", "supervised_tokens")


def prepare(
    data: Data, which: Sequence[Source], serving: Serving, rules: Rules, progress: Progress = lambda rows: None
) -> store.Store:
    """The store of these sources: found in the cache, or made there. Raises DataError naming the first bad rows."""
    assert multiprocessing.parent_process() is None, "call this below `if __name__ == '__main__':`, workers import you"
    fingerprint = _fingerprint(data, which, serving, rules)
    place = places.cache_directory(data.cache) / "stores" / fingerprint[:32]
    build = functools.partial(_build, data, which, serving, rules, fingerprint, progress)
    return store.open_store(places.built_once(place, build))


def rows_of(data: Data, which: Sequence[Source]) -> Iterator[tuple[Rows, Row]]:
    """Every row of the sources, each with the settings that make it a conversation."""
    for source in which:
        rows = row_settings(data, source)
        for row in sources.read(source):
            yield rows, row


def row_settings(data: Data, source: Source) -> Rows:
    """The source's own row settings where it has any, else those of `data`."""
    own = Rows(**{name: getattr(source, name) for name in Rows.model_fields})
    general = Rows(**{name: getattr(data, name) for name in Rows.model_fields})
    return general if own == Rows() else own


def _build(
    data: Data, which: Sequence[Source], serving: Serving, rules: Rules, fingerprint: str, progress: Progress,
    directory: Path,
) -> None:
    names = list(dict.fromkeys(sources.describe(source) for source in which))
    writer, tally = store.Writer(directory), Tally()
    chunks = _chunks(rows_of(data, which))
    for arrays, counted in _map(functools.partial(_encode_chunk, serving, rules, names), chunks, data.workers):
        writer.append(arrays)
        tally.add(counted)
        progress(tally.rows.total())
    if tally.faults:
        raise _faulty(tally)
    ledger = tally.ledger()
    if not ledger.examples:
        raise _nothing_left(ledger, names)
    with (directory / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for origin, reason in tally.dropped:
            file.write(json.dumps({"source": origin.source, "row": origin.row, "reason": reason}) + "\n")
    writer.close(fingerprint, ledger, names)


def _chunks(rows: Iterable[tuple[Rows, Row]]) -> Iterator[Chunk]:
    for settings, group in itertools.groupby(rows, key=lambda pair: pair[0]):
        plain = (row for _, row in group)
        while batch := list(itertools.islice(plain, CHUNK)):
            yield settings, batch


def _map(work: Callable[[Chunk], Any], chunks: Iterator[Chunk], workers: int) -> Iterator[Any]:
    """`work` on each chunk, in order, in worker processes where there is enough to do; few chunks are under way."""
    workers = workers or os.cpu_count() or 1
    first = list(itertools.islice(chunks, SMALL // CHUNK + 1))
    if workers == 1 or len(first) <= SMALL // CHUNK:
        yield from map(work, itertools.chain(first, chunks))
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch and of tokenizers
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_alone) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for chunk in itertools.chain(first, chunks):
                waiting.append(pool.submit(work, chunk))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _alone() -> None:
    """One thread a worker: the processes are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_chunk(serving: Serving, rules: Rules, names: Sequence[str], chunk: Chunk) -> tuple[store.Arrays, Tally]:
    """Encode the rows of a chunk; their texts are tokenized together, each distinct text once."""
    model, (settings, rows), tally = served.load(serving), chunk, Tally()
    ready = []
    for origin, row in rows:
        tally.rows[origin.source] += 1
        try:
            ready += _turns_of(model, row, settings, origin, rules, tally)
        except DataError as error:
            tally.faults.append(error)
    taught_turns = [turn for _, taught in ready for turn in taught]
    texts = list(dict.fromkeys(text for turn in taught_turns for text in (turn.prompt, turn.completion)))
    known = dict(zip(texts, model.tokenize(texts), strict=True))
    examples = []
    for conversation, taught in ready:
        try:
            row = model.to_row(conversation, taught, rules, lambda wanted: [known[text] for text in wanted])
        except DataError as error:
            tally.faults.append(error)
            continue
        _count(row, model.stops.ids, tally)
        examples += row.examples
    return store.to_arrays(examples, names), tally


def _turns_of(
    model: served.Served, row: dict[str, Any] | DataError, settings: Rows, origin: Origin, rules: Rules, tally: Tally
) -> list[tuple[Any, Any]]:
    """The row's conversation with its turns, as a list of one; empty where it is dropped, with the reason tallied."""
    if isinstance(row, DataError):
        raise row
    conversation = formats.to_conversation(row, settings, origin)
    if conversation is None:
        tally.dropped.append((origin, "your function returned None"))
        return []
    taught = model.to_turns(conversation, rules.supervise)
    if not taught:
        tally.dropped.append((origin, "nothing to learn: every answer has weight 0"))
        return []
    return [(conversation, taught)]


def _count(row: EncodedRow, stop_ids: Sequence[int], tally: Tally) -> None:
    origin = row.conversation.origin
    if not row.examples:
        tally.dropped.append((origin, "longer than data.max_tokens"))
        return
    tally.verdicts[row.verdict] += 1
    tally.counts.update(
        cut=int(row.cut_turns > 0), examples=len(row.examples), turns=len(row.turns) - row.cut_turns,
        stopped_turns=sum(int(np.isin(example.labels, stop_ids).sum()) for example in row.examples),
        tokens=sum(len(example.input_ids) for example in row.examples),
        supervised_tokens=sum(example.supervised for example in row.examples),
    )


def _faulty(tally: Tally) -> DataError:
    """All bad rows as one error: the first in full, the next few by place, and how many there are."""
    first, others = tally.faults[0], tally.faults[1:]
    if not others:
        return first
    listed = "".join(f"\n{fault.where}: {fault.found:.120}" for fault in others[: SHOWN_FAULTS - 1])
    return type(first)(
        f"{first.found} ({len(tally.faults)} of {tally.rows.total()} rows are bad)",
        required=first.required, where=first.where, remedy=first.remedy + listed,
    )


def _nothing_left(ledger: Ledger, names: Sequence[str]) -> DataError:
    return DataError(
        f"of {ledger.rows} rows none is left to learn: {json.dumps(ledger.dropped)}",
        required="at least one example", where=", ".join(names),
        remedy="look at a few rows with `schoolhouse show`; see data.max_tokens, data.too_long, data.supervise",
    )


def _fingerprint(data: Data, which: Sequence[Source], serving: Serving, rules: Rules) -> str:
    """What decides the content of a store, as one hash: rows, their settings, tokenizer, template, rules, version."""
    settings = [row_settings(data, source) for source in which]
    parts = {
        "version": VERSION,
        "sources": [[sources.describe(source), sources.fingerprint(source)] for source in which],
        "rows": [one.model_dump() for one in settings],
        "functions": [_function_hash(one.function) for one in settings if one.function],
        "rules": dataclasses.asdict(rules),
        "serving": serving_fingerprint(serving),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def serving_fingerprint(serving: Serving) -> str:
    """A hash of the tokenizer's files, the template with its arguments, and the stop tokens."""
    digest = hashlib.sha256()
    template = [Path(serving.chat_template)] if serving.chat_template else []
    for path in [*(serving.directory / name for name in tokens.FILES), *template]:
        content = path.read_bytes() if path.is_file() else str(path.name).encode()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
        if b"strftime_now" in content:
            digest.update(str(serving.today).encode())
    digest.update(json.dumps([serving.template_arguments, serving.stop_tokens]).encode())
    return digest.hexdigest()


def _function_hash(function: str) -> str:
    """The file of a user's function, so that an edit of it makes new data."""
    try:
        found = importlib.util.find_spec(function.partition(":")[0])
    except (ImportError, ValueError):  # of the package around it
        found = None
    if found is None or found.origin is None:
        raise ConfigError(
            f"there is no module for {function}", required="`module:function` that Python can import",
            where="data.function", remedy="check its name; put its directory on PYTHONPATH",
        )
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()

"""Rows to a store: read, encoded by all cores, every row accounted for; done once for the same content and settings."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from schoolhouse import inert, orphans, places
from schoolhouse.config import Data, Rows, Source
from schoolhouse.data import account, bounds, choose, formats, images, served, sources, store, tokens, vision
from schoolhouse.data.account import Tally
from schoolhouse.data.choose import Choice
from schoolhouse.data.served import Rules, Serving
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import Conversation, Origin, Picture, Turn

VERSION = 3
"""Raise it when the same row would become other tokens, or a store other files: it is part of every fingerprint."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""What makes tokens of rows beside us: a store is found again where their versions are those it was made with."""
CHUNK = 256
"""Rows that travel to a worker together."""
SMALL = 2048
"""Up to this many rows, starting worker processes costs more than it saves."""

Row = tuple[Origin, dict[str, Any] | DataError]
Chunk = tuple[Rows, list[Row]]
Progress = Callable[[int, int | None], None]
"""Called with the number of rows done, and about how many there are, where that is known."""


def prepare(
    data: Data, choice: Choice, serving: Serving, rules: Rules, progress: Progress = lambda rows, of: None
) -> store.Store:
    """The store of these rows: found in the cache, or made there. Raises DataError naming the first bad rows."""
    assert multiprocessing.parent_process() is None, "call this below `if __name__ == '__main__':`, workers import you"
    fingerprint = _fingerprint(data, choice, serving, rules)
    place = places.cache_directory(data.cache) / "stores" / _name(fingerprint)
    build = functools.partial(_build, data, choice, serving, rules, fingerprint, progress)
    return store.open_store(places.built_once(place, build))


def rows_of(data: Data, choice: Choice, not_drawn: Counter[str] | None = None) -> Iterator[tuple[Rows, Row]]:
    """Every row that is drawn from the sources, each with the settings that make it a conversation.

    Where some are not drawn, all sources are read twice: once to count their rows.
    """
    every = [itertools.repeat(True)] * len(choice.sources)
    if choice.draws:
        counts = [sum(1 for _ in sources.read(source)) for source in choice.sources]
        every = list(choose.drawn(choice, counts))
    for source, chosen in zip(choice.sources, every, strict=True):
        settings = row_settings(data, source)
        for taken, row in zip(chosen, sources.read(source), strict=False):
            if taken:
                yield settings, row
            elif not_drawn is not None:
                not_drawn[sources.describe(source)] += 1


def row_settings(data: Data, source: Source) -> Rows:
    """The source's own row settings where it has any, else those of `data`."""
    own = Rows(**{name: getattr(source, name) for name in Rows.model_fields})
    general = Rows(**{name: getattr(data, name) for name in Rows.model_fields})
    return general if own == Rows() else own


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python looks for unused cycles whenever many objects were made; of rows nearly all are in use: once will do."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)  # what was made since the last time
        if enabled:
            gc.enable()


@_uncollected()
def _build(
    data: Data, choice: Choice, serving: Serving, rules: Rules, fingerprint: str, progress: Progress, directory: Path
) -> None:
    owners = {name: sources.describe(source) for source in choice.sources for name in sources.names(source)}
    names = list(owners)
    writer, kept, not_drawn = store.Writer(directory), account.Account(directory), Counter()
    expected = _expected(choice)
    work = functools.partial(_encode_chunk, serving, rules, dataclasses.replace(choice, sources=()), names)
    for arrays, seen, counted in _map(work, _chunks(rows_of(data, choice, not_drawn)), data.workers):
        writer.append(arrays, seen)
        kept.add(counted)
        progress(kept.total.rows.total(), expected)
    writer.close(fingerprint, kept.close(data, not_drawn, owners), names)


def _expected(choice: Choice) -> int | None:
    """About how many rows the store will account for; None where that is not known before they are read."""
    counts = [sources.count(source) for source in choice.sources]
    if not all(counts):  # not known, or none at all, which reading will refuse
        return choice.limit
    rows = sum(choose.quotas(choice, counts)) if choice.draws else sum(counts)
    return round(rows * choice.held_out) if choice.side == "validation" else rows


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
    trusting = (inert.allowed(),)
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_alone, initargs=trusting) as pool:
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


def _alone(trusting: bool) -> None:
    """One thread a worker: the processes are the parallelism. None outlives the process that waits for its work."""
    orphans.live_no_longer_than(multiprocessing.parent_process().pid)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inert.allow(trusting)
    gc.disable()  # each chunk is followed by a collection


@_uncollected()
@bounds.many()
def _encode_chunk(
    serving: Serving, rules: Rules, choice: Choice, names: Sequence[str], chunk: Chunk
) -> tuple[store.Arrays, list[Picture], Tally]:
    """Encode the rows of a chunk; their texts are tokenized together, what they share once."""
    model, (settings, rows), tally = served.load(serving), chunk, Tally()
    ready = []
    for origin, row in rows:
        try:
            taught = _taught(model, row, settings, origin, rules, choice, tally)
        except DataError as error:
            tally.fault(origin, error, row)
        else:
            ready += [] if taught is None else [(*taught, row)]
    examples = []
    encoded = model.to_rows([(conversation, turns) for conversation, turns, _ in ready], rules)
    for found, (conversation, _, row) in zip(encoded, ready, strict=True):
        if isinstance(found, DataError):
            tally.fault(conversation.origin, found, row)
        else:
            tally.keep(found)
            examples += found.examples
    arrays = store.to_arrays(examples, names)
    tally.deliver(arrays, model.stops.ids)
    return arrays, [one for example in examples for one in example.vision], tally


def _taught(
    model: served.Served, row: dict[str, Any] | DataError, settings: Rows, origin: Origin, rules: Rules, choice: Choice,
    tally: Tally,
) -> tuple[Conversation, Sequence[Turn]] | None:
    """The row's conversation with its turns; None where it is dropped, or stands on the other side.

    What is no conversation has no side of its own, and is counted in training.
    """
    found = conversation_of(row, settings, origin)
    mine = choice.holds(found) if isinstance(found, Conversation) else choice.side == "train"
    if choice.side == "validation" and not mine:
        return None
    tally.rows[origin.source] += 1
    if isinstance(found, DataError):
        raise found
    if found is None:
        return tally.drop(origin, "your function returned None")
    if not mine:
        return tally.drop(origin, account.HELD_OUT)
    turns = model.to_turns(found, rules.supervise)
    return (found, turns) if turns else tally.drop(origin, "nothing to learn: every answer has weight 0")


def conversation_of(row: dict[str, Any] | DataError, settings: Rows, origin: Origin) -> Conversation | DataError | None:
    """The row's conversation, or what is wrong with it; None where the user's function dropped it."""
    if isinstance(row, DataError):
        return row
    try:
        return formats.to_conversation(row, settings, origin)
    except DataError as error:
        return error


def _fingerprint(data: Data, choice: Choice, serving: Serving, rules: Rules) -> str:
    """What decides the content of a store, as one hash: rows, their settings, tokenizer, template, rules, version."""
    settings = [row_settings(data, source) for source in choice.sources]
    drawn = dataclasses.replace(choice, sources=(), seed=choice.seed if choice.draws or choice.held_out else 0)
    parts = {
        "version": VERSION,
        "sources": [[sources.describe(source), sources.fingerprint(source)] for source in choice.sources],
        "choice": [dataclasses.asdict(drawn), [source.proportion for source in choice.sources], data.on_error],
        "rows": [one.model_dump() for one in settings],
        "functions": [_function_hash(one.function) for one in settings if one.function],
        "rules": dataclasses.asdict(rules),
        "serving": serving_fingerprint(serving),
        "images": [images.root(rows, source.path) for rows, source in zip(settings, choice.sources, strict=True)]
        if vision.sees(serving.directory) else [],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _name(fingerprint: str) -> str:
    """Of the directory in the cache."""
    versions = [importlib.metadata.version(library) for library in LIBRARIES]
    return hashlib.sha256(json.dumps([fingerprint, versions]).encode()).hexdigest()[:32]


def serving_fingerprint(serving: Serving) -> str:
    """A hash of the tokenizer's files, the template with its arguments, the stop tokens and the vocabulary's size."""
    digest, size = hashlib.sha256(), tokens.vocabulary(serving.directory)
    for path in served.files(serving):
        content = path.read_bytes() if path.is_file() else str(path.name).encode()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
        if b"strftime_now" in content:
            digest.update(str(serving.today).encode())
    digest.update(json.dumps(inert.code(serving.directory), sort_keys=True).encode())
    digest.update(json.dumps([serving.template_arguments, serving.stop_tokens, size, serving.image_tokens]).encode())
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

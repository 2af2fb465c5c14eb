"""Where rows come from: files, directories, saved data sets, the Hugging Face hub, and the starter lessons.

    data.jsonl  data.json  data.csv  data.parquet      a file
    data  data:train                                   a directory of such files (`directories`)
    saved  saved:train                                 what `datasets.save_to_disk` wrote
    openai/gsm8k:main:train                            a hub data set: name, configuration, split
    starter/arithmetic:train                           a lesson that is made on the spot

Where a split is not named, it is `train`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from schoolhouse.config import Source
from schoolhouse.data import directories, files
from schoolhouse.errors import DataError
from schoolhouse.types import Origin

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:/]*(:.+)?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a source's path turned out to be."""

    kind: Literal["files", "saved", "hub", "starter"]
    files: tuple[Path, ...] = ()
    """The data files; of a saved data set, its Arrow files."""
    name: str = ""
    """The directory, of files or of a saved data set; the hub's name, or the lesson; empty for a single file."""
    config: str | None = None
    split: str = "train"


def read(source: Source, *, start: int = 0) -> Iterator[tuple[Origin, dict[str, Any] | DataError]]:
    """Every row from number `start` on, or the DataError of a bad row in its place; `source.limit` counts from row 0.

    `Origin.source` is one of the `names`, the row's file where the source is a directory of files. `Origin.row` is the
    line in a `.jsonl` file, else the position, from 1. Raises DataError for a source that is missing, unreadable as a
    whole, or empty.
    """
    return _counted(islice(_rows(_place(source), source), source.limit), start, source)


def count(source: Source) -> int | None:
    """About how many rows a source has, for a forecast; None where only reading them would tell."""
    place = _place(source)
    counts = [files.count(file) for file in place.files]
    if place.kind not in ("files", "saved") or None in counts:
        return source.limit
    return sum(counts) if source.limit is None else min(sum(counts), source.limit)


def describe(source: Source) -> str:
    """The source as the user wrote it."""
    return source.path


def names(source: Source) -> list[str]:
    """Each `Origin.source` that its rows can have: the source as the user wrote it, or a directory's files."""
    return _names(_place(source), source)


def _names(place: _Place, source: Source) -> list[str]:
    return [str(file) for file in place.files] if place.kind == "files" and place.name else [source.path]


def fingerprint(source: Source) -> str:
    """The sha256 of what decides the rows: the content, the way it is read, and the limit."""
    place = _place(source)
    digest = hashlib.sha256(f"{place.kind} limit={source.limit}".encode())
    for file in place.files:
        digest.update(f"\n{files.kind(file)} ".encode() + _hash(file, source))
        if place.kind == "files" and place.name:  # each row is known by its file
            digest.update(os.fsencode(file.relative_to(place.name)))
    if place.kind == "hub":
        digest.update(_hub(place, source)._fingerprint.encode())  # of name, configuration, split and revision
    if place.kind == "starter":
        from schoolhouse.starter import lessons

        digest.update(lessons.fingerprint(place.name, place.split).encode())
    return digest.hexdigest()


def _hash(file: Path, source: Source) -> bytes:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest()
    except OSError as error:
        raise _unreadable(error, source) from None


def _counted(
    rows: Iterator[tuple[Origin, dict[str, Any] | DataError]], start: int, source: Source
) -> Iterator[tuple[Origin, dict[str, Any] | DataError]]:
    count = 0
    for count, pair in enumerate(rows, 1):
        if count > start:
            yield pair
    if not count:
        raise DataError("no rows", required="at least one row", where=source.path, remedy="check the path")


def _rows(place: _Place, source: Source) -> Iterator[tuple[Origin, dict[str, Any] | DataError]]:
    match place.kind:
        case "files":
            for file, name in zip(place.files, _names(place, source), strict=True):
                for number, row in files.rows(file, name):
                    yield Origin(name, number), row
            return
        case "starter":
            from schoolhouse.starter import lessons

            numbered = enumerate(lessons.rows(place.name, place.split), 1)
        case "saved" | "hub":
            dataset = _saved(place, source) if place.kind == "saved" else _hub(place, source)
            numbered = enumerate(_rows_of_dataset(dataset, source), 1)
    for number, row in numbered:
        yield Origin(source.path, number), row


def _unreadable(error: Exception, source: Source) -> DataError:
    return DataError(
        f"the source cannot be read: {error}", required="a whole and readable source", where=source.path,
        remedy="check that it was copied completely, and its permissions",
    )


def _place(source: Source) -> _Place:
    """What the path is: a lesson, something on the disk, or else a name on the hub."""
    try:
        return _place_of(source.path)
    except (OSError, ValueError, KeyError) as error:  # no permission, broken JSON of a saved data set
        raise _unreadable(error, source) from None


def _place_of(path: str) -> _Place:
    if path.startswith("starter/"):
        name, _, split = path.removeprefix("starter/").partition(":")
        return _Place("starter", name=name, split=split or "train")
    whole, (head, _, split) = Path(path).expanduser(), path.rpartition(":")
    if whole.exists():
        return _local(whole, None, path)
    if head and Path(head).expanduser().exists():
        return _local(Path(head).expanduser(), split, path)
    if (near := _nearest(Path(path.partition(":")[0]).expanduser())) is not None or not _is_hub_id(path):
        raise DataError(
            "there is no such file or directory", required="a path, starter/NAME, or a hub id name:config:split",
            where=path, remedy=f"did you mean {near}?" if near else "check the path",
        )
    name, config, split = (*path.split(":", 2), "", "")[:3]
    return _Place("hub", name=name, config=config or None, split=split or "train")


def _is_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and files.kind(Path(path.partition(":")[0])) is None


def _nearest(path: Path) -> Path | None:
    """The existing path that differs from this one in a few letters of one name."""
    missing, below = path, Path()
    while not missing.parent.is_dir():
        missing, below = missing.parent, Path(missing.name) / below
    names = [found.name for found in missing.parent.iterdir()]
    close = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.75)
    return next((near for name in close if (near := missing.parent / name / below).exists()), None)


# Files, directories and saved data sets.


def _local(path: Path, split: str | None, where: str) -> _Place:
    """What stands at an existing path; `where` is the path as the user wrote it."""
    if path.is_file():
        if split is not None or files.kind(path) is None:
            raise DataError(
                "a file has no splits" if split is not None else "nothing here reads this kind of file",
                required=f"a file that ends in {', '.join(files.READERS)}", where=where,
                remedy="convert or unpack it" if split is None else f"write {path}",
            )
        return _Place("files", (path,))
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        return _saved_place(path / directories.split_of(splits, split, where))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _saved_place(path)
    return _Place("files", directories.chosen(path, split, where), name=str(path))


def _saved_place(path: Path) -> _Place:
    state = json.loads((path / "state.json").read_text("utf-8"))
    return _Place("saved", tuple(path / one["filename"] for one in state["_data_files"]), name=str(path))


# The datasets library, imported only where it is needed.


def _rows_of_dataset(dataset: Dataset, source: Source) -> Iterator[dict[str, Any]]:
    """The rows as they are stored: images stay unread."""
    arrow = files.arrow()
    try:
        with arrow.faults():
            for table in dataset.with_format("arrow").iter(arrow.BATCH):
                yield from arrow.rows(table)
    except (OSError, ValueError) as error:
        raise _unreadable(error, source) from None


def _saved(place: _Place, source: Source) -> Dataset:
    from datasets import load_from_disk

    try:
        return load_from_disk(place.name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the saved data set cannot be read: {error}", required="a directory that datasets.save_to_disk wrote",
            where=source.path, remedy="save it again",
        ) from None


def _hub(place: _Place, source: Source) -> Dataset:
    """The hub's data set, from the local cache where there is no network."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(place.name, place.config, split=place.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"the hub's data set was not loaded: {reason:.300}", where=source.path,
            required="a path that exists, or name:config:split of a data set that can be reached or is in the cache",
            remedy="check the name and the network (`hf auth login` for gated ones); without a network, load it once "
            "where there is one and copy the cache, or download its files and name their directory",
        ) from None

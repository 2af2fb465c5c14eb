"""Which files of a directory are its rows: those of one split, as the Hugging Face hub lays them out.

    train.jsonl  test.jsonl  chat-train-00000-of-00002.parquet    a file's name begins or ends with its split
    data/train-00000-of-00001.parquet                             in `data`, where there are no data files beside it
    train/part-1.jsonl  test/part-1.jsonl                         a folder for each split

A directory named without a split means its training rows: the files named train or, where none is, those that name no
split. Files of other splits are left out, and never trained unless their split is named (`data:test`). Where files
named train stand beside files that name no split, nobody can tell what is meant, and they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from schoolhouse.data import files
from schoolhouse.errors import DataError

_NAMES = "train|test|testing|validation|valid|val|dev|eval|evaluation"
_FIRST = re.compile(rf"({_NAMES})(?![a-z])", re.IGNORECASE)
_LAST = re.compile(rf"(?<![a-z])({_NAMES})([-_]?\d+([-_]of[-_]\d+)?)?\Z", re.IGNORECASE)
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""What describes a data set and holds no rows."""


def chosen(path: Path, split: str | None, where: str) -> tuple[Path, ...]:
    """The data files that are meant by a directory, and perhaps a split of it, in the order of their names; `where` is
    both as the user wrote them. Raises DataError unless they are of one kind."""
    found = _found(path)
    if split is None and found and None in found.values():
        _refuse_mixture(path, found, where)
        wanted = None
    else:
        splits = sorted({one for one in found.values() if one is not None})
        wanted = split_of(splits, split, where) if splits or split is not None else None
    meant = [file for file, one in found.items() if one == wanted]
    kinds = sorted({str(files.kind(file)) for file in meant})
    if len(kinds) != 1:
        raise DataError(
            f"a directory with files of the kinds {', '.join(kinds)}" if kinds else "a directory without data files",
            required=f"files of one kind: {', '.join(files.READERS)}", where=where,
            remedy="name one file, or list several sources",
        )
    return tuple(meant)


def split_of(splits: Sequence[str], wanted: str | None, where: str) -> str:
    """The split that is wanted, or where none is, `train`, or the only one if its name is not that of another."""
    if wanted is None and len(splits) == 1 and not _FIRST.fullmatch(splits[0]):
        return splits[0]
    if (named := "train" if wanted is None else wanted) in splits:
        return named
    path = where if wanted is None else where.removesuffix(f":{wanted}")
    raise DataError(
        f"there is no split {named!r}", where=where,
        required=f"one of the splits {', '.join(splits)}" if splits else "no split: nothing here names any",
        remedy=f"write {path}:{splits[0]}" if splits else f"write {path}",
    )


def _found(path: Path) -> dict[Path, str | None]:
    """The data files, each with its split: those of the directory, else of its `data`, else of its splits' folders."""
    own = _files_of(path)
    if own:
        return {file: _split(file) for file in own}
    below = path / "data"
    if below.is_dir() and (inner := _found(below)):
        return inner
    folders = [one for one in sorted(path.iterdir()) if _FIRST.fullmatch(one.name) and one.is_dir()]
    return {file: folder.name.lower() for folder in folders for file in _files_of(folder)}


def _files_of(path: Path) -> list[Path]:
    return sorted(
        file for file in path.iterdir()
        if files.kind(file) and file.is_file() and file.name[0] not in "._" and file.name not in _ABOUT
    )


def _split(file: Path) -> str | None:
    """The split that a file's name begins with, or ends with before its suffixes and the number of its shard."""
    name = file.name
    stems = name[: -len(str(files.kind(file)))], name.partition(".")[0]
    match = _FIRST.match(name) or _LAST.search(stems[0]) or _LAST.search(stems[1])
    return match[1].lower() if match else None


def _refuse_mixture(path: Path, found: dict[Path, str | None], where: str) -> None:
    """Raise DataError for files that name no split beside files named train."""
    bare = [file.name for file, one in found.items() if one is None]
    if "train" in found.values():
        listed = ", ".join(bare[:5]) + (", …" if len(bare) > 5 else "")
        raise DataError(
            f"beside the files named train there are files that name no split: {listed}", where=where,
            required="files that all name their split, or none named train",
            remedy=f"write {where}:train for the files named train, or list what you mean as sources, such as "
            f"{next(file for file, one in found.items() if one is None)}",
        )

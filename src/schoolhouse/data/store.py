"""Examples on disk: flat arrays that every process maps, written once.

Images are kept as references, each once: the file's path, or the encoded bytes where the row held them; with the grid
of patches, so that positions and costs are known without them. Pixels are never stored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schoolhouse.data import shared_prefixes
from schoolhouse.errors import CheckpointError
from schoolhouse.types import Example, Ledger, Origin, Picture

ARRAYS: Mapping[str, Any] = {
    "input_ids": np.int32, "labels": np.int32, "weights": np.float32,
    "lengths": np.int64, "rows": np.int64, "sources": np.int32,
    "supervised": np.float64, "supervised_tokens": np.int64, "images": np.int64, "shared": np.int64,
}
"""The type of each file's values."""
PER_TOKEN = ("input_ids", "labels", "weights")
"""These hold a value a token; the others a value an example."""
PICTURES: Mapping[str, Any] = {
    "shown": np.int64, "picture_shapes": np.int64, "picture_digests": np.uint8, "picture_ends": np.int64,
    "picture_bytes": np.uint8,
}
"""`shown`: the picture of each image of each example. The others, by picture: is it a path, size, grid, tokens; its
digest; where its reference ends in `picture_bytes`."""
_SHAPE = 7
_DIGEST = 32

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Store:
    """Prepared examples, read through a memory map."""

    directory: Path
    fingerprint: str
    """A hash of what was asked for and of every byte that came of it."""
    ledger: Ledger
    source_names: tuple[str, ...]
    arrays: Arrays
    ends: np.ndarray
    """i64[examples]: where each example ends in the arrays that hold a value a token."""
    shown_ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """i64[examples]: where each example's images end in `shown`; empty where no example has any."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        """Example `index`; its arrays are views of the map."""
        return Example(*self.tokens(index), self.origin(index), self.pictures(index))

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and weights of an example, without its images."""
        end = int(self.ends[index])
        start = end - int(self.arrays["lengths"][index])
        ids, labels, weights = (self.arrays[name][start:end] for name in PER_TOKEN)
        return ids, labels, weights

    def origin(self, index: int) -> Origin:
        """Where an example came from."""
        return Origin(self.source_names[self.arrays["sources"][index]], int(self.arrays["rows"][index]))

    @property
    def shows(self) -> bool:
        """Whether any example has an image."""
        return bool(self.arrays["images"].any())

    def pictures(self, index: int) -> tuple[Picture, ...]:
        """The images of an example, in order."""
        return tuple(self._picture(int(one)) for one in self._shown(index))

    def grids(self, index: int) -> list[tuple[int, int, int]]:
        """The grid of patches of each image of an example."""
        return [tuple(grid) for grid in self._shapes[self._shown(index), 3:6].tolist()]

    def _shown(self, index: int) -> np.ndarray:
        if not len(self.shown_ends):
            return self.shown_ends
        end = int(self.shown_ends[index])
        return self.arrays["shown"][end - int(self.arrays["images"][index]) : end]

    @property
    def _shapes(self) -> np.ndarray:
        return self.arrays["picture_shapes"].reshape(-1, _SHAPE)

    def _picture(self, place: int) -> Picture:
        ends = self.arrays["picture_ends"]
        reference = self.arrays["picture_bytes"][ends[place - 1] if place else 0 : ends[place]].tobytes()
        is_path, height, width, *grid, tokens = self._shapes[place].tolist()
        digest = self.arrays["picture_digests"][place * _DIGEST : (place + 1) * _DIGEST].tobytes()
        path, content = (os.fsdecode(reference), b"") if is_path else ("", reference)
        return Picture(path, content, digest, (height, width), tuple(grid), tokens)

    @property
    def patches(self) -> np.ndarray:
        """i64[examples]: the patches of each example's images: the work of the vision tower."""
        if not len(self.shown_ends):
            return np.zeros(len(self), dtype=np.int64)
        every = np.append(0, np.cumsum(self._shapes[self.arrays["shown"], 3:6].prod(axis=1, dtype=np.int64)))
        return every[self.shown_ends] - every[self.shown_ends - self.arrays["images"]]

    @property
    def largest_image(self) -> np.ndarray:
        """i64[examples]: the patches of each example's largest image; 0 where it has none."""
        found, images = np.zeros(len(self), dtype=np.int64), self.arrays["images"]
        if len(self.shown_ends):
            every = self._shapes[self.arrays["shown"], 3:6].prod(axis=1, dtype=np.int64)
            found[images > 0] = np.maximum.reduceat(every, (self.shown_ends - images)[images > 0])
        return found

    @property
    def lengths(self) -> np.ndarray:
        """i64[examples]: the tokens T of each example."""
        return self.arrays["lengths"]

    @property
    def firsts(self) -> np.ndarray:
        """i64[rows]: the first example of each row that has any."""
        row = np.stack([self.arrays["sources"], self.arrays["rows"]])
        return np.flatnonzero(np.any(np.diff(row, prepend=-1), axis=0))

    @property
    def shared(self) -> np.ndarray:
        """i64[examples]: the tokens that each begins with as the example before it does, where both are of one row."""
        return self.arrays["shared"]

    @property
    def supervised(self) -> np.ndarray:
        """f64[examples]: the sum of weights of each example."""
        return self.arrays["supervised"]

    @property
    def supervised_tokens(self) -> np.ndarray:
        """i64[examples]: the number of targets of each example."""
        return self.arrays["supervised_tokens"]


def to_arrays(examples: Sequence[Example], source_names: Sequence[str]) -> Arrays:
    """Examples laid end to end, in the form of the files."""
    number = {name: place for place, name in enumerate(source_names)}
    columns = {
        "lengths": [len(example.input_ids) for example in examples],
        "rows": [example.origin.row for example in examples],
        "sources": [number[example.origin.source] for example in examples],
        "supervised": [example.weights.sum(dtype=np.float64) for example in examples],
        "supervised_tokens": [example.supervised for example in examples],
        "images": [len(example.vision) for example in examples],
        "shared": _shared(examples),
    }
    arrays = {name: np.asarray(values, dtype=ARRAYS[name]) for name, values in columns.items()}
    for name in PER_TOKEN:
        values = [getattr(example, name) for example in examples]
        arrays[name] = np.concatenate(values) if values else np.zeros(0, dtype=ARRAYS[name])
    return arrays


def _shared(examples: Sequence[Example]) -> list[int]:
    """The tokens that each example begins with as the one before it in its row does."""
    found: list[int] = []
    for _, row in itertools.groupby(examples, key=lambda example: example.origin):
        parts = list(row)
        ids, weights = ([getattr(one, name) for one in parts] for name in ("input_ids", "weights"))
        found += shared_prefixes.of_row(ids, weights)
    return found


class Writer:
    """Appends examples to the flat files of a directory; memory does not grow with their number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {
            name: _file(directory, name).open("wb") for name in (*ARRAYS, *PICTURES)
        }
        self._hashes = {name: hashlib.blake2b(digest_size=32) for name in self._files}
        self._known: dict[tuple, int] = {}
        self._end = 0

    def append(self, arrays: Arrays, pictures: Sequence[Picture] = ()) -> None:
        """Append examples in the form of `to_arrays`, and their images in order."""
        for name in ARRAYS:
            self._write(name, np.ascontiguousarray(arrays[name]).tobytes())
        self._write("shown", np.asarray([self._place(one) for one in pictures], dtype=np.int64).tobytes())

    def _place(self, picture: Picture) -> int:
        """The picture's number; a new one is written."""
        key = (picture.path, picture.digest, picture.grid)
        if key not in self._known:
            self._known[key] = len(self._known)
            reference = os.fsencode(picture.path) or picture.content
            self._end += len(reference)
            shape = [bool(picture.path), *picture.size, *picture.grid, picture.tokens]
            self._write("picture_shapes", np.asarray(shape, dtype=np.int64).tobytes())
            self._write("picture_digests", picture.digest)
            self._write("picture_ends", np.asarray([self._end], dtype=np.int64).tobytes())
            self._write("picture_bytes", reference)
        return self._known[key]

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self._hashes[name].update(content)

    def close(self, asked: str, ledger: Ledger, source_names: Sequence[str]) -> None:
        """Write what the arrays mean, made of what was `asked` for, a hash; without this file the directory is no
        store."""
        for file in self._files.values():
            file.close()
        hashes = " ".join([asked, *(one.hexdigest() for one in self._hashes.values())])
        fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
        meta = {"fingerprint": fingerprint, "sources": list(source_names), "ledger": dataclasses.asdict(ledger)}
        (self._directory / "store.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def open_store(directory: Path) -> Store:
    """Map the store of a directory."""
    meta = json.loads((directory / "store.json").read_text(encoding="utf-8"))
    arrays = {name: _map(_file(directory, name), kind) for name, kind in {**ARRAYS, **PICTURES}.items()}
    ledger = Ledger(**meta["ledger"])
    _check_sizes(directory, arrays)
    return Store(
        directory, meta["fingerprint"], ledger, tuple(meta["sources"]), arrays, np.cumsum(arrays["lengths"]),
        np.cumsum(arrays["images"]) if len(arrays["shown"]) else arrays["shown"],
    )


@functools.lru_cache(maxsize=2)
def opened(directory: Path) -> Store:
    """The store of a directory, mapped once for each process."""
    return open_store(directory)


def _check_sizes(directory: Path, arrays: Arrays) -> None:
    """A file that was cut short must not become shorter examples."""
    examples = max(len(arrays[name]) for name in ARRAYS if name not in PER_TOKEN)
    pictures = len(arrays["picture_ends"])
    stored = int(arrays["picture_ends"][-1]) if pictures else 0
    others = {"shown": int(arrays["images"].sum()), "picture_shapes": _SHAPE * pictures, "picture_ends": pictures,
              "picture_digests": _DIGEST * pictures, "picture_bytes": stored}
    others |= dict.fromkeys(PER_TOKEN, int(arrays["lengths"].sum()))
    for name, values in arrays.items():
        wanted = others.get(name, examples)
        if len(values) != wanted:
            raise CheckpointError(
                f"the prepared data is damaged: {name} holds {len(values)} values, not {wanted}",
                required="the files that were written", where=str(directory),
                remedy="delete this directory; the rows are prepared again",
            )


def _file(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def _map(path: Path, kind: Any) -> np.ndarray:
    """The array in a file; an empty file cannot be mapped and is an empty array."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))  # a memmap's own slices cost ten times an array's

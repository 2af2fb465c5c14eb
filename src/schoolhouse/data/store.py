"""Examples on disk: flat arrays that every process maps, written once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schoolhouse.errors import CheckpointError
from schoolhouse.types import Example, Ledger, Origin

ARRAYS: Mapping[str, Any] = {
    "input_ids": np.int32, "labels": np.int32, "weights": np.float32,
    "lengths": np.int64, "rows": np.int64, "sources": np.int32,
    "supervised": np.float64, "supervised_tokens": np.int64,
}
"""The type of each file's values."""
PER_TOKEN = ("input_ids", "labels", "weights")
"""These hold a value a token; the others a value an example."""


Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Store:
    """Prepared examples, read through a memory map."""

    directory: Path
    fingerprint: str
    ledger: Ledger
    source_names: tuple[str, ...]
    arrays: Arrays
    ends: np.ndarray
    """i64[examples]: where each example ends in the arrays that hold a value a token."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        """Example `index`; its arrays are views of the map."""
        end = int(self.ends[index])
        start = end - int(self.arrays["lengths"][index])
        origin = Origin(self.source_names[self.arrays["sources"][index]], int(self.arrays["rows"][index]))
        ids, labels, weights = (self.arrays[name][start:end] for name in PER_TOKEN)
        return Example(ids, labels, weights, origin)

    @property
    def lengths(self) -> np.ndarray:
        """i64[examples]: the tokens T of each example."""
        return self.arrays["lengths"]

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
    }
    arrays = {name: np.asarray(values, dtype=ARRAYS[name]) for name, values in columns.items()}
    for name in PER_TOKEN:
        values = [getattr(example, name) for example in examples]
        arrays[name] = np.concatenate(values) if values else np.zeros(0, dtype=ARRAYS[name])
    return arrays


class Writer:
    """Appends examples to the flat files of a directory; memory does not grow with their number."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {name: _file(directory, name).open("wb") for name in ARRAYS}

    def append(self, arrays: Arrays) -> None:
        """Append examples in the form of `to_arrays`."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(arrays[name]).tobytes())

    def close(self, fingerprint: str, ledger: Ledger, source_names: Sequence[str]) -> None:
        """Write what the arrays mean; without this file the directory is no store."""
        for file in self._files.values():
            file.close()
        meta = {"fingerprint": fingerprint, "sources": list(source_names), "ledger": dataclasses.asdict(ledger)}
        (self._directory / "store.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def open_store(directory: Path) -> Store:
    """Map the store of a directory."""
    meta = json.loads((directory / "store.json").read_text(encoding="utf-8"))
    arrays = {name: _map(_file(directory, name), kind) for name, kind in ARRAYS.items()}
    ledger = Ledger(**meta["ledger"])
    _check_sizes(directory, arrays)
    return Store(directory, meta["fingerprint"], ledger, tuple(meta["sources"]), arrays, np.cumsum(arrays["lengths"]))


def _check_sizes(directory: Path, arrays: Arrays) -> None:
    """A file that was cut short must not become shorter examples."""
    examples = max(len(arrays[name]) for name in ARRAYS if name not in PER_TOKEN)
    for name, values in arrays.items():
        wanted = int(arrays["lengths"].sum()) if name in PER_TOKEN else examples
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
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, dtype=kind)

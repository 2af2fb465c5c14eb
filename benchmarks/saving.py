"""What a save costs: how long it holds training up, and how long it writes, beside the machine's own speeds.

    python benchmarks/saving.py --mebibytes 600 --repeats 5

The state is that of an optimizer with two moments. `copy` is what copying the same tensors in memory takes, into memory
that is there already; `plain` writes the same bytes into one file and syncs it. Each round measures all four, in turn,
so that what else the machine does meets all of them; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from schoolhouse import checkpoint
from schoolhouse.saving import Saver, Storage

MATRIX = 1024
"""Rows and columns of each tensor: 4 MiB."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=600, help="of weights and moments (default 600)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--directory", help="where (unset: the place for temporary files)")
    parser.add_argument("--json", metavar="FILE", help="where the figures are written")
    options = parser.parse_args()
    found = measure(options.mebibytes, options.repeats, options.directory)
    print(f"{found['mebibytes']} MiB: stall {found['stall']:.3f} s = {found['stall'] / found['copy']:.2f} x a copy"
          f" ({found['copy']:.3f} s); written in {found['write']:.2f} s = {found['write'] / found['plain']:.2f} x"
          f" a plain write ({found['plain']:.2f} s); first stall {found['first_stall']:.3f} s, it takes the memory")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def measure(mebibytes: int, repeats: int, directory: str | None) -> dict[str, float]:
    """Medians in seconds; the first save takes host memory and is told apart."""
    tensors = [torch.randn(MATRIX, MATRIX) for _ in range(max(3, mebibytes // 4))]
    third = len(tensors) // 3
    kinds = {checkpoint.WEIGHTS: tensors[:third], checkpoint.OPTIMIZER: tensors[third:]}
    spare = [torch.zeros_like(one) for one in tensors]
    rounds: dict[str, list[float]] = {"stall": [], "write": [], "copy": [], "plain": []}
    with tempfile.TemporaryDirectory(dir=directory) as place:
        saver = Saver(Storage(Path(place) / "checkpoints"), keep=1)
        for step in range(repeats + 1):
            named = {kind: ((f"t{one}", tensor) for one, tensor in enumerate(held)) for kind, held in kinds.items()}
            rounds["stall"].append(_seconds(lambda named=named, step=step: saver.save(step, named, {}, "")))
            rounds["write"].append(saver.finish().seconds)
            rounds["copy"].append(_seconds(lambda: [to.copy_(one) for to, one in zip(spare, tensors, strict=True)]))
            rounds["plain"].append(_seconds(lambda: _plain(Path(place) / "plain", tensors)))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in rounds.items()}
    return {"mebibytes": 4 * len(tensors), "first_stall": rounds["stall"][0], **medians}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _plain(path: Path, tensors: list[Tensor]) -> None:
    with path.open("wb") as file:
        for one in tensors:
            file.write(one.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


if __name__ == "__main__":
    main()

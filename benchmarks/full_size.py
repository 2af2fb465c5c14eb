"""Two steps of Qwen2.5-0.5B's true configuration on real rows in bfloat16: peak memory, by part, beside TRL's.

Weights are random, everything else is the real model's: 494 M parameters, 24 layers, 151,936 tokens, its tokenizer.
Each contender has a process of its own, one after another. Parts that can be counted are counted; what remains of the
measured peak is activations, chunks of logits, the allocator's reserve, and the program itself before the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import _inputs as inputs
import throughput as shared
from _commands import run

GIB = 2**30
RANK = 32
"""Of adapters, beside every matrix of every block."""
LORA = (f"lora.rank={RANK}", f"lora.alpha={2 * RANK}", "lora.targets=all-linear")
SAME = {"size": "qwen2.5-0.5b", "precision": "bfloat16", "device": "cpu", "steps": 2, "length": None, "lora": None,
        "recompute": False}
"""What `throughput` is told beside this command's options."""
OURS = {"bfloat16 copies": 2, "masters": 4, "gradients": 4, "moments": 8}
WIDE = {"weights": 4, "gradients": 4, "moments": 8}
NARROW = {"weights": 2, "gradients": 2, "moments": 4}
"""Bytes of a trained weight, by what is kept of it."""


@dataclass(frozen=True, slots=True)
class Way:
    """One line of the table."""

    name: str
    kept: Mapping[str, int]
    lora: bool = False
    numbers: str | None = None
    """TRL's (`_peer.py`); None for schoolhouse."""


WAYS = (
    Way("full", OURS), Way("lora", OURS, lora=True),
    Way("trl", WIDE, numbers="autocast"), Way("trl-bfloat16", NARROW, numbers="bfloat16"),
    Way("trl-lora", WIDE, lora=True, numbers="bfloat16"),  # PEFT keeps adapters in float32
)


def main() -> None:
    """Write the inputs, run the ways asked for, print each one's peak and its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [way.name for way in WAYS]
    parser.add_argument("ways", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--rows", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Qwen2.5's")
    parser.add_argument("--examples", type=int, default=8, help="in a step")
    parser.add_argument("--tokens", type=int, default=2048, help="batch.tokens")
    parser.add_argument("--layout", default="padded:8", help="TRL's micro-batches")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for other programs to be quiet")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(namespace=argparse.Namespace(**SAME))
    if options.write:
        inputs.write(options, options.write)
        return
    with tempfile.TemporaryDirectory(prefix="full-size-") as place:
        work = Path(place)
        run([sys.executable, __file__, *sys.argv[1:], "--write", work], options)
        for way in WAYS:
            if way.name in options.ways:
                print("\n".join(measure(way, options, work)), flush=True)


def measure(way: Way, options: argparse.Namespace, work: Path) -> list[str]:
    """One contender's peak, its parts and its steps, as lines."""
    if way.numbers is not None:
        told = argparse.Namespace(**{**vars(options), "lora": RANK if way.lora else None})
        found = shared.peer(shared.Contender("TRL", options.layout, way.numbers), told, work)
        whole, adapters = count(work)
        weights, trained = (whole + adapters, adapters) if way.lora else (whole, whole)
    else:
        directory = work / way.name
        found = shared.ours(directory, LORA if way.lora else (), options, work)
        derived = json.loads((directory / "run.json").read_text())["derived"]
        weights, trained = derived["parameters"], derived["trainable"]
    return [f"\n{way.name}: peak {found.peak_mib / 1024:.2f} GiB, "
            f"{weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained (others used {found.others:.0%})",
            *parts(way, found, weights, trained), *steps(found)]


def parts(way: Way, found: shared.Measurement, weights: int, trained: int) -> list[str]:
    """What the peak is made of."""
    counted = {name: trained * size / GIB for name, size in way.kept.items()}
    if weights > trained:
        counted["frozen weights, bfloat16"] = (weights - trained) * 2 / GIB
    counted["program before the model"] = found.baseline_mib / 1024
    rest = found.peak_mib / 1024 - sum(counted.values())
    counted["activations, logits, the rest"] = rest
    return [f"  {name:<32}{size:8.2f} GiB" for name, size in counted.items()]


def steps(found: shared.Measurement) -> Sequence[str]:
    """Each step's tokens, seconds and loss."""
    return [f"  step {number}: {step['tokens']} tokens, {step['seconds']:.1f} s, loss {step['loss']:.4f}"
            for number, step in enumerate(found.steps, 1)]


def count(work: Path) -> tuple[int, int]:
    """The model's parameters, and those of adapters, by the shapes in its file."""
    import math

    from safetensors import safe_open

    with safe_open(work / "model" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    inside = [shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]
    return sum(map(math.prod, shapes.values())), sum(RANK * sum(shape) for shape in inside)


if __name__ == "__main__":
    main()

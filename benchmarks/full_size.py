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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _inputs as inputs
import throughput as shared
from _commands import run

GIB = 2**30
LORA = ("lora.rank=32", "lora.alpha=16", "lora.targets=all-linear")
SAME = {"size": "qwen2.5-0.5b", "precision": "bfloat16", "device": "cpu", "steps": 2, "length": None, "lora": None,
        "recompute": False}
"""What `throughput` is told beside this command's options."""
BYTES = {  # of a trained weight: its copy in bfloat16, master, gradient sum, two moments
    "schoolhouse": {"bfloat16 copies": 2, "masters": 4, "gradients": 4, "moments": 8},
    "TRL": {"weights": 4, "gradients": 4, "moments": 8},
}


@dataclass(frozen=True, slots=True)
class Way:
    """One line of the table."""

    name: str
    program: str
    lora: bool = False


WAYS = (Way("full", "schoolhouse"), Way("lora", "schoolhouse", lora=True), Way("trl", "TRL"))


def main() -> None:
    """Write the inputs, run the ways asked for, print each one's peak and its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=["full", "lora", "trl"], help="full, lora, trl")
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
    if way.program == "TRL":
        found = shared.peer(shared.Contender("TRL", options.layout, "autocast"), options, work)
        weights = trained = count(work)
    else:
        directory = work / way.name
        found = shared.ours(directory, LORA if way.lora else (), options, work)
        derived = json.loads((directory / "run.json").read_text())["derived"]
        weights, trained = derived["parameters"], derived["trainable"]
    return [f"\n{way.program} {'LoRA' if way.lora else 'full'}: peak {found.peak_mib / 1024:.2f} GiB, "
            f"{weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained (others used {found.others:.0%})",
            *parts(way, found, weights, trained), *steps(found)]


def parts(way: Way, found: shared.Measurement, weights: int, trained: int) -> list[str]:
    """What the peak is made of."""
    counted = {name: trained * size / GIB for name, size in BYTES[way.program].items()}
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


def count(work: Path) -> int:
    """The model's parameters, by the shapes in its file."""
    import math

    from safetensors import safe_open

    with safe_open(work / "model" / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()

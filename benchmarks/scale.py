"""What each process holds and sends: memory and bytes for models from 0.5 to 72 billion weights on 8 to 512 devices.

    python benchmarks/scale.py                                      the table of docs/scale.md
    python benchmarks/scale.py --devices 16 --tokens 65536          other numbers

Arithmetic only, by the formulas in docs/scale.md; nothing is measured and nothing is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NARROW, WIDE = 2, 4
"""Bytes of a bfloat16 and of a float32 value."""
CHUNK = 1 << 27
"""Logits that the loss makes at a time (`loss.ON_ACCELERATOR`)."""
ROOM = 0.9
"""The share of a device's memory that is planned with; the rest is the allocator's."""
SHARDED = 64
"""The most processes that the weights are cut over; beyond them, groups of so many hold a copy each."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder of the Qwen2 form: gated MLP, grouped heads, biases on query, key and value."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def block(self) -> int:
        """Weights of one decoder block."""
        inner, keys = self.heads * self.head_size, self.key_heads * self.head_size
        attention = self.hidden * (2 * inner + 2 * keys) + inner + 2 * keys
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside the blocks: embeddings, head, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.block + self.root


MODELS = (
    Model("Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151_936, tied=True),
    Model("Qwen2.5-1.5B", 1536, 28, 12, 2, 128, 8960, 151_936, tied=True),
    Model("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18_944, 152_064, tied=False),
    Model("Qwen2.5-14B", 5120, 48, 40, 8, 128, 13_824, 152_064, tied=False),
    Model("Qwen2.5-32B", 5120, 64, 40, 8, 128, 27_648, 152_064, tied=False),
    Model("Qwen2.5-72B", 8192, 80, 64, 8, 128, 29_568, 152_064, tied=False),
)
"""As in the models' config.json."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes stand along each axis."""

    replicate: int
    shard: int
    ulysses: int

    @property
    def parts(self) -> int:
        """The processes that one copy of the weights is cut over."""
        return self.shard * self.ulysses

    def __str__(self) -> str:
        return f"{self.replicate} × {self.shard} × {self.ulysses}"


# ---- memory of one process, in bytes -------------------------------------------------------------------------------


def states(model: Model, layout: Layout) -> float:
    """Float32 weights, gradient sums and two moments of this process's part."""
    return 4 * WIDE * model.weights / layout.parts


def gathered(model: Model) -> int:
    """What is whole for a moment: two blocks in bfloat16, one block's gradient, the root and its gradient."""
    return (2 * NARROW + NARROW + WIDE) * model.block + (NARROW + WIDE) * model.root


def block_activations(model: Model) -> int:
    """Bytes that one block keeps for its backward, for each token of this process.

    Two norms keep their input in float32 and its normalised form; attention its input, query, key, value, both rotated
    ones and its output; the MLP its input, gate, activated gate, up and their product.
    """
    inner, keys = model.heads * model.head_size, model.key_heads * model.head_size
    norms = 2 * (WIDE + 2 * NARROW) * model.hidden
    attention = NARROW * (model.hidden + 3 * inner + 3 * keys)
    return norms + attention + NARROW * (model.hidden + 4 * model.intermediate)


def activations(model: Model, tokens: int, layout: Layout) -> float:
    """A micro-batch with activation checkpointing: every block's input, one block at work, one chunk of logits."""
    inputs = NARROW * model.hidden * model.layers
    return tokens / layout.ulysses * (inputs + block_activations(model)) + CHUNK * (WIDE + NARROW)


def memory(model: Model, tokens: int, layout: Layout) -> float:
    """All of it."""
    return states(model, layout) + gathered(model) + activations(model, tokens, layout)


# ---- bytes that one process sends ----------------------------------------------------------------------------------


def weight_traffic(model: Model, layout: Layout) -> float:
    """For a micro-batch: blocks gathered for forward and backward, the root once, gradients added in float32."""
    share = (layout.parts - 1) / layout.parts
    gathers = NARROW * (2 * model.layers * model.block + model.root)
    return share * (gathers + WIDE * model.weights)


def replica_traffic(model: Model, layout: Layout) -> float:
    """For an optimizer step: the parts of the gradient added over the copies (a ring sends each value twice)."""
    return 2 * (layout.replicate - 1) / layout.replicate * WIDE * model.weights / layout.parts


def exchanged_values(model: Model, ulysses: int) -> int:
    """Values of a token that meet the all-to-alls of one block: query, key, value and output, keys repeated."""
    keys = model.key_heads * repeats(model.key_heads, ulysses)
    return model.head_size * (2 * model.heads + 2 * keys)


def repeats(key_heads: int, ulysses: int) -> int:
    """How often key and value heads are there, so that all processes get equally many."""
    return next(times for times in range(1, ulysses + 1) if key_heads * times % ulysses == 0)


def token_traffic(model: Model, tokens: int, layout: Layout) -> float:
    """For a micro-batch: forward, forward again for the checkpoint, and backward, in every block."""
    share = (layout.ulysses - 1) / layout.ulysses
    return 3 * model.layers * share * tokens / layout.ulysses * NARROW * exchanged_values(model, layout.ulysses)


# ---- the table -----------------------------------------------------------------------------------------------------


def layouts(model: Model, devices: int) -> Iterator[Layout]:
    """Every Ulysses degree that divides heads and devices, the smallest first; weights cut over at most 64."""
    parts = min(devices, SHARDED)
    for ulysses in range(1, parts + 1):
        if parts % ulysses == 0 and model.heads % ulysses == 0:
            yield Layout(devices // parts, parts // ulysses, ulysses)


def chosen(model: Model, devices: int, tokens: int, capacity: float) -> Layout | None:
    """The layout of the smallest Ulysses degree that fits; None where none does."""
    fitting = (one for one in layouts(model, devices) if memory(model, tokens, one) <= ROOM * capacity)
    return next(fitting, None)


def row(model: Model, devices: int, tokens: int, capacity: float) -> Sequence[str]:
    """One line of the table."""
    head = [model.name, f"{devices}", f"{tokens:,}"]
    layout = chosen(model, devices, tokens, capacity)
    if layout is None:
        return [*head, "does not fit", *[""] * 7]
    held = (states(model, layout), gathered(model), activations(model, tokens, layout), memory(model, tokens, layout))
    sent = (weight_traffic(model, layout), token_traffic(model, tokens, layout), replica_traffic(model, layout))
    return [*head, str(layout), *(f"{value / GIB:.1f}" for value in (*held, *sent))]


HEAD = (
    "model", "devices", "tokens", "replicate × shard × ulysses", "states", "gathered", "activations", "memory",
    "weights sent", "tokens sent", "replicas sent",
)


def table(models: Sequence[Model], devices: Sequence[int], tokens: Sequence[int], capacity: float) -> str:
    """Markdown: GiB of one process; what is sent for a micro-batch, over replicas for a step."""
    rows = [row(model, number, length, capacity) for model in models for number in devices for length in tokens]
    lines = [HEAD, ["---"] * 4 + ["---:"] * 7, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192, 131_072], help="of one micro-batch")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a device")
    options = parser.parse_args(arguments)
    print(table(MODELS, options.devices, options.tokens, options.memory * GIB), end="")


if __name__ == "__main__":
    main()

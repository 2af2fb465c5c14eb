"""Which examples make which step, and in which packs: integers, the same on every rank, a pure function of the seed.

An epoch is one seeded permutation of the examples; a step is the next `batch.examples` of them. Packs are only how a
step is executed: each holds at most `batch.tokens`, their number is a multiple of the data ranks, their costs balance.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from schoolhouse.config import Recipe
from schoolhouse.data.store import Store
from schoolhouse.errors import ConfigError
from schoolhouse.types import PlannedStep, Position

ATTENTION_LENGTH = 4096
"""Tokens of an example from which its attention costs as much as all its matrix products: typical of decoders."""
PATCH = 0.3
"""What a patch costs in the vision tower, in tokens: the ratio of the parameters that each meets in Qwen3-VL 2B, 0.4 of
1.4 billion."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a run; nothing but integers that any rank computes for itself."""

    lengths: np.ndarray
    """i64[examples]"""
    supervised: np.ndarray
    """f64[examples]: sums of weights."""
    supervised_tokens: np.ndarray
    """i64[examples]"""
    examples: int
    """`batch.examples`: examples in a step."""
    tokens: int
    """`batch.tokens`: the most tokens in a pack."""
    seed: int
    ranks: int = 1
    """Data ranks: the number of packs computed at the same time."""
    patches: np.ndarray | None = None
    """i64[examples]: of their images; None where there are none."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every example once; the last one may be smaller."""
        return -(-len(self.lengths) // self.examples)

    def position(self, index: int) -> Position:
        """Where the data stream stands after step `index` (0: before the first)."""
        return Position(index // self.steps_per_epoch, index)

    def step(self, index: int) -> PlannedStep:
        """Step `index`, counted from 1 over the whole run."""
        epoch, place = divmod(index - 1, self.steps_per_epoch)
        chosen = order(len(self.lengths), self.seed, epoch)[place * self.examples : (place + 1) * self.examples]
        seen = None if self.patches is None else self.patches[chosen]
        packs = partition(self.lengths[chosen], self.tokens, self.ranks, seen)
        return PlannedStep(
            index, epoch, tuple(tuple(int(chosen[one]) for one in pack) for pack in packs),
            tokens=int(self.lengths[chosen].sum()),
            supervised_tokens=int(self.supervised_tokens[chosen].sum()),
            supervised=float(self.supervised[chosen].sum()),
        )


def plan(store: Store, recipe: Recipe, ranks: int = 1) -> Plan:
    """The plan of a recipe over its prepared rows."""
    return Plan(
        store.lengths, store.supervised, store.supervised_tokens,
        recipe.batch.examples, recipe.micro_batch, recipe.seed, ranks, store.patches,
    )


@functools.lru_cache(maxsize=2)
def order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch: examples sorted by a random number each.

    Philox's raw stream is fixed by its authors (Salmon et al., 2011) and not by numpy's version, unlike `permutation`.
    """
    drawn = np.random.Philox(key=[seed, epoch]).random_raw(examples)
    return np.argsort(drawn, kind="stable")


def partition(
    lengths: np.ndarray, tokens: int, ranks: int = 1, patches: np.ndarray | None = None
) -> list[list[int]]:
    """Places of `lengths` in packs of at most `tokens`: as few as a greedy rule finds, costs balanced.

    The dearest first, each into the cheapest pack that has room (Graham's longest-processing-time rule). An example's
    cost is that of its tokens and of the `patches` of its images, in language model and vision tower together.
    """
    if len(lengths) and lengths.max() > tokens:
        raise ConfigError(
            f"an example has {lengths.max()} tokens, a micro-batch holds {tokens}",
            required="batch.tokens of at least the longest example",
            where="batch.tokens", remedy=f"set batch.tokens={lengths.max()}",
        )
    number = ranks * max(1, -(-int(lengths.sum()) // (tokens * ranks)))
    costs = lengths * (1 + lengths / ATTENTION_LENGTH) + (0 if patches is None else patches * PATCH)
    while True:
        for balanced in (True, False):  # an even filling where it fits, else the tightest (best fit decreasing)
            packs = _fill(lengths, costs, tokens, number, balanced)
            if packs is not None:
                return packs
        number += ranks


def _fill(
    lengths: np.ndarray, costs: np.ndarray, tokens: int, number: int, balanced: bool
) -> list[list[int]] | None:
    """Packs of at most `tokens`, or None where this rule does not find room for all."""
    packs: list[list[int]] = [[] for _ in range(number)]
    filled, spent = np.zeros(number, dtype=np.int64), np.zeros(number)
    for place in np.argsort(-(costs if balanced else lengths), kind="stable"):
        length = int(lengths[place])
        room = np.flatnonzero(filled + length <= tokens)
        if not len(room):
            return None
        pack = room[np.argmin(spent[room])] if balanced else room[np.argmax(filled[room])]
        packs[pack].append(int(place))
        filled[pack] += length
        spent[pack] += costs[place]
    return packs

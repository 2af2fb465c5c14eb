"""Which examples make which step, and in which packs: integers, the same on every rank, a pure function of the seed.

An epoch is one seeded permutation of the rows; a step is the next `batch.examples` of their examples, and those of a
row that was split follow one another. Packs (`packs`) are only how a step is executed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from schoolhouse.config import Recipe
from schoolhouse.data import packs
from schoolhouse.data.store import Store
from schoolhouse.types import PlannedStep, Position


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Where rows became several examples."""

    firsts: np.ndarray
    """i64[rows]: the first example of each row."""
    shared: np.ndarray
    """i64[examples]: tokens that are computed once where the example lies in a pack with the one before it."""


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
    """`batch.tokens`: the most tokens that are computed in a pack."""
    seed: int
    ranks: int = 1
    """Data ranks: the number of packs computed at the same time."""
    patches: np.ndarray | None = None
    """i64[examples]: of their images; None where there are none."""
    split: Split | None = None
    """None where every row is one example."""
    shares: bool = True
    """Whether the student computes once what examples of a row begin with."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every example once; the last one may be smaller."""
        return -(-len(self.lengths) // self.examples)

    def several(self, ranks: int) -> bool:
        """Whether one of `ranks` data ranks may have several micro-batches in a step.

        A pack that goes to the emptiest of them finds room there if all tokens, and those of the longest example on
        every other rank, find room together (Graham, 1969, doi:10.1137/0117039).
        """
        longest, computed = int(self.lengths.max()), self.lengths
        begun = 0
        if self.split is not None and self.shares:
            computed, begun = computed - self.split.shared, longest  # a step may begin inside a row
        most = np.partition(computed, -min(self.examples, len(computed)))[-self.examples :]
        return ranks < self.ranks or int(most.sum()) + begun + (ranks - 1) * longest > self.tokens * ranks

    def position(self, index: int) -> Position:
        """Where the data stream stands after step `index` (0: before the first)."""
        return Position(index // self.steps_per_epoch, index)

    def step(self, index: int) -> PlannedStep:
        """Step `index`, counted from 1 over the whole run."""
        epoch, place = divmod(index - 1, self.steps_per_epoch)
        every = order(len(self.lengths), self.seed, epoch) if self.split is None else _by_rows(
            self.split, self.seed, epoch)
        chosen = every[place * self.examples : (place + 1) * self.examples]
        seen = None if self.patches is None else self.patches[chosen]
        found = packs.partition(self.lengths[chosen], self.tokens, self.ranks, seen, self.shared(chosen))
        return PlannedStep(
            index, epoch, tuple(tuple(int(chosen[one]) for one in pack) for pack in found),
            tokens=int(self.lengths[chosen].sum()),
            supervised_tokens=int(self.supervised_tokens[chosen].sum()),
            supervised=float(self.supervised[chosen].sum()),
        )

    def shared(self, chosen: np.ndarray) -> np.ndarray | None:
        """i64: tokens of each of these examples, in this order, that are computed in the one before it; None for none.
        """
        if self.split is None or not self.shares:
            return None
        return np.where(np.diff(chosen, prepend=-2) == 1, self.split.shared[chosen], 0)


def plan(store: Store, recipe: Recipe, ranks: int = 1, *, shares: bool = True) -> Plan:
    """The plan of a recipe over its prepared rows, for a student that `shares` what examples begin with, or not."""
    return Plan(
        store.lengths, store.supervised, store.supervised_tokens,
        recipe.batch.examples, recipe.micro_batch, recipe.seed, ranks, store.patches, _split(store), shares,
    )


def whole(store: Store, tokens: int, ranks: int, *, shares: bool) -> list[list[int]]:
    """All examples of a store in packs, as a step of them would be."""
    return packs.partition(store.lengths, tokens, ranks, store.patches, store.shared if shares else None)


def _split(store: Store) -> Split | None:
    """Where rows of a store became several examples."""
    firsts = store.firsts
    return None if len(firsts) == len(store) else Split(firsts, store.shared)


@functools.lru_cache(maxsize=2)
def _by_rows(split: Split, seed: int, epoch: int) -> np.ndarray:
    """i64[examples]: those of each row together, the rows in the order of an epoch."""
    rows = order(len(split.firsts), seed, epoch)
    sizes = np.diff(split.firsts, append=len(split.shared))[rows]
    ends = sizes.cumsum()
    return np.repeat(split.firsts[rows] - (ends - sizes), sizes) + np.arange(ends[-1])


@functools.lru_cache(maxsize=2)
def order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch: examples, or rows, sorted by a random number each.

    Philox's raw stream is fixed by its authors (Salmon et al., 2011) and not by numpy's version, unlike `permutation`.
    """
    drawn = np.random.Philox(key=[seed, epoch]).random_raw(examples)
    return np.argsort(drawn, kind="stable")

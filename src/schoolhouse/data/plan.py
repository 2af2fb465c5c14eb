"""Which examples make which step, and in which packs: integers, the same on every rank, a pure function of the seed.

An epoch is one seeded permutation of the examples; a step is the next `batch.examples` of them. Packs are only how a
step is executed: each holds at most `batch.tokens`, their number is a multiple of the data ranks, their costs balance.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
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

ROUND = 512
"""Tokens whose work a round of packs costs besides its own: gathering weights, launching kernels; an estimate."""


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
    """Places of `lengths` in packs of at most `tokens`; each run of `ranks` packs is a round, computed side by side.

    An example's cost is that of its tokens and of the `patches` of its images, in language model and vision tower
    together. A round lasts as long as its dearest pack: of the ways below the one whose rounds last shortest is taken.
    """
    if len(lengths) and lengths.max() > tokens:
        raise ConfigError(
            f"an example has {lengths.max()} tokens, a micro-batch holds {tokens}",
            required="batch.tokens of at least the longest example",
            where="batch.tokens", remedy=f"set batch.tokens={lengths.max()}",
        )
    rows = _Rows(lengths, lengths * (1 + lengths / ATTENTION_LENGTH) + (0 if patches is None else patches * PATCH))
    for rounds in itertools.count(max(1, -(-int(lengths.sum()) // (tokens * ranks)))):
        ways = [_evenly(rows, tokens, rounds * ranks)]
        if ranks > 1:
            ways += [_by_rounds(rows, tokens, ranks, rounds), _by_rounds(rows, tokens, ranks, rounds + 1)]
        found = [packs for packs in ways if packs is not None]
        if not found:
            tight = _tightly(rows, tokens, rounds * ranks)
            found = [] if tight is None else [tight]
        if found:
            return min((rows.in_rounds(packs, ranks) for packs in found), key=lambda packs: rows.duration(packs, ranks))
    raise AssertionError("one example a pack fits")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Lengths i64[examples] and costs f64[examples]."""

    lengths: np.ndarray
    costs: np.ndarray

    def in_rounds(self, packs: list[list[int]], ranks: int) -> list[list[int]]:
        """The packs in rounds of about one cost, dearest first; and each rank's total about the same, as every second
        round runs the other way."""
        order = sorted(packs, key=lambda pack: -self.costs[pack].sum())
        rounds = [order[start : start + ranks] for start in range(0, len(order), ranks)]
        return [pack for number, one in enumerate(rounds) for pack in one[:: -1 if number % 2 else 1]]

    def duration(self, packs: list[list[int]], ranks: int) -> float:
        """What rounds of `ranks` packs last in all."""
        spent = [float(self.costs[pack].sum()) for pack in packs]
        return sum(ROUND + max(spent[start : start + ranks]) for start in range(0, len(spent), ranks))


def _evenly(rows: _Rows, tokens: int, number: int) -> list[list[int]] | None:
    """All packs of about one cost: the dearest first, each into the cheapest that has room (Graham's LPT rule).

    None where this rule does not find room for all; so do the others.
    """
    packs, left = _fill(rows, tokens, number, np.argsort(-rows.costs, kind="stable"), np.inf)
    return None if left else packs


def _by_rounds(rows: _Rows, tokens: int, ranks: int, rounds: int) -> list[list[int]] | None:
    """Round by round, each up to the cost of its dearest example: the long ones share a round, not each its own."""
    left, found = list(np.argsort(-rows.costs, kind="stable")), []
    for after in range(rounds, 0, -1):
        level = max(rows.costs[left[0]], rows.costs[left].sum() / (ranks * after)) if left and after > 1 else np.inf
        packs, left = _fill(rows, tokens, ranks, left, level)
        found += packs
    return None if left else found


def _fill(
    rows: _Rows, tokens: int, number: int, places: Sequence[int], level: float
) -> tuple[list[list[int]], list[int]]:
    """Places in turn, each into the cheapest pack that has room for it below a cost of `level`; and those left over."""
    packs: list[list[int]] = [[] for _ in range(number)]
    filled, spent, left = np.zeros(number, dtype=np.int64), np.zeros(number), []
    for place in places:
        fits = (filled + rows.lengths[place] <= tokens) & (spent + rows.costs[place] <= level * (1 + 1e-9))
        room = np.flatnonzero(fits)
        if len(room):
            pack = room[np.argmin(spent[room])]
            packs[pack].append(int(place))
            filled[pack] += rows.lengths[place]
            spent[pack] += rows.costs[place]
        else:
            left.append(int(place))
    return packs, left


def _tightly(rows: _Rows, tokens: int, number: int) -> list[list[int]] | None:
    """The longest first, each into the fullest pack that has room (best fit decreasing)."""
    packs: list[list[int]] = [[] for _ in range(number)]
    filled = np.zeros(number, dtype=np.int64)
    for place in np.argsort(-rows.lengths, kind="stable"):
        room = np.flatnonzero(filled + rows.lengths[place] <= tokens)
        if not len(room):
            return None
        pack = room[np.argmax(filled[room])]
        packs[pack].append(int(place))
        filled[pack] += rows.lengths[place]
    return packs

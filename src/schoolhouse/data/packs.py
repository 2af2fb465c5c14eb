"""How the examples of a step are cut into packs: integers, the same on every rank.

Each pack holds at most so many tokens that are computed, their number is a multiple of the data ranks, and their costs
balance. Examples of a split row that begin alike lie in one pack where that is cheaper than what they share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schoolhouse.errors import ConfigError

ATTENTION_LENGTH = 4096
"""Tokens of an example from which its attention costs as much as all its matrix products: typical of decoders."""
PATCH = 0.3
"""What a patch costs in the vision tower, in tokens: the ratio of the parameters that each meets in Qwen3-VL 2B, 0.4 of
1.4 billion."""

ROUND = 512
"""Tokens whose work a round of packs costs besides its own: gathering weights, launching kernels; an estimate."""
FEW = 4
"""Several ranks also try examples of a row together up to this part of what each of them does in a step: large units
balance badly."""


def partition(
    lengths: np.ndarray, tokens: int, ranks: int = 1, patches: np.ndarray | None = None,
    shared: np.ndarray | None = None,
) -> list[list[int]]:
    """Places of `lengths` in packs of at most `tokens`; each run of `ranks` packs is a round, computed side by side.

    An example's cost is that of its tokens and of the `patches` of its images, in language model and vision tower
    together. In one pack with the place before it, its first `shared` tokens are not computed. A round lasts as long as
    its dearest pack: of the ways below the one whose rounds last shortest is taken.
    """
    if len(lengths) and lengths.max() > tokens:
        raise ConfigError(
            f"an example has {lengths.max()} tokens, a micro-batch holds {tokens}",
            required="batch.tokens of at least the longest example",
            where="batch.tokens", remedy=f"set batch.tokens={lengths.max()}",
        )
    costs = _cost(lengths) + (0 if patches is None else patches * PATCH)
    every = [alone(lengths, costs)]
    if shared is not None and shared.any():
        every.insert(0, units(lengths, costs, shared, tokens))
        if ranks > 1:
            every.append(units(lengths, costs, shared, tokens, level=every[0].costs.sum() / (FEW * ranks)))
    found = [(one, _best(one, tokens, ranks)) for one in every]
    chosen, packs = min(found, key=lambda one: one[0].duration(one[1], ranks))
    return [[place for unit in pack for place in chosen.places(unit)] for pack in packs]


def _cost(lengths: np.ndarray) -> np.ndarray:
    """What so many tokens from an example's first one on cost, in tokens."""
    return lengths * (1 + lengths / ATTENTION_LENGTH)


def _best(parts: Units, tokens: int, ranks: int) -> list[list[int]]:
    """Units in packs, by the way whose rounds last shortest."""
    lengths = parts.lengths
    for rounds in itertools.count(max(1, -(-int(lengths.sum()) // (tokens * ranks)))):
        ways = [_evenly(parts, tokens, rounds * ranks)]
        if ranks > 1:
            ways += [_by_rounds(parts, tokens, ranks, rounds), _by_rounds(parts, tokens, ranks, rounds + 1)]
        found = [packs for packs in ways if packs is not None]
        if not found:
            tight = _tightly(parts, tokens, rounds * ranks)
            found = [] if tight is None else [tight]
        if found:
            ways = (parts.in_rounds(packs, ranks) for packs in found)
            return min(ways, key=lambda packs: parts.duration(packs, ranks))
    raise AssertionError("one example a pack fits")


@dataclass(frozen=True, slots=True)
class Units:
    """What stays together: an example, or several of a row, one behind the other."""

    starts: np.ndarray
    """i64[units + 1]: offsets of the places of each unit."""
    lengths: np.ndarray
    """i64[units]: tokens that are computed."""
    costs: np.ndarray
    """f64[units]"""

    def places(self, unit: int) -> range:
        """The places of a unit."""
        return range(int(self.starts[unit]), int(self.starts[unit + 1]))

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


def alone(lengths: np.ndarray, costs: np.ndarray) -> Units:
    """Each place by itself."""
    return Units(np.arange(len(lengths) + 1), lengths, costs)


def units(
    lengths: np.ndarray, costs: np.ndarray, shared: np.ndarray, tokens: int, *, level: float = np.inf
) -> Units:
    """Each place with the one before it where it shares something with that, up to so many tokens that are computed and
    a cost of `level`."""
    starts: list[int] = []
    computed: list[int] = []
    spent: list[float] = []
    columns = (lengths, costs, lengths - shared, costs - _cost(shared))
    for place, (length, cost, rest, rest_cost) in enumerate(zip(*(one.tolist() for one in columns), strict=True)):
        if rest < length and starts and computed[-1] + rest <= tokens and spent[-1] + rest_cost <= level:
            computed[-1] += rest
            spent[-1] += rest_cost
        else:
            starts.append(place)
            computed.append(length)
            spent.append(cost)
    return Units(np.asarray([*starts, len(lengths)]), np.asarray(computed), np.asarray(spent))


def _evenly(parts: Units, tokens: int, number: int) -> list[list[int]] | None:
    """All packs of about one cost: the dearest first, each into the cheapest that has room (Graham's LPT rule).

    None where this rule does not find room for all; so do the others.
    """
    packs, left = _fill(parts, tokens, number, np.argsort(-parts.costs, kind="stable"), np.inf)
    return None if left else packs


def _by_rounds(parts: Units, tokens: int, ranks: int, rounds: int) -> list[list[int]] | None:
    """Round by round, each up to the cost of its dearest example: the long ones share a round, not each its own."""
    left, found = list(np.argsort(-parts.costs, kind="stable")), []
    for after in range(rounds, 0, -1):
        level = max(parts.costs[left[0]], parts.costs[left].sum() / (ranks * after)) if left and after > 1 else np.inf
        packs, left = _fill(parts, tokens, ranks, left, level)
        found += packs
    return None if left else found


def _fill(
    parts: Units, tokens: int, number: int, places: Sequence[int], level: float
) -> tuple[list[list[int]], list[int]]:
    """Places in turn, each into the cheapest pack that has room for it below a cost of `level`; and those left over."""
    packs: list[list[int]] = [[] for _ in range(number)]
    filled, spent, left = np.zeros(number, dtype=np.int64), np.zeros(number), []
    for place in places:
        fits = (filled + parts.lengths[place] <= tokens) & (spent + parts.costs[place] <= level * (1 + 1e-9))
        room = np.flatnonzero(fits)
        if len(room):
            pack = room[np.argmin(spent[room])]
            packs[pack].append(int(place))
            filled[pack] += parts.lengths[place]
            spent[pack] += parts.costs[place]
        else:
            left.append(int(place))
    return packs, left


def _tightly(parts: Units, tokens: int, number: int) -> list[list[int]] | None:
    """The longest first, each into the fullest pack that has room (best fit decreasing)."""
    packs: list[list[int]] = [[] for _ in range(number)]
    filled = np.zeros(number, dtype=np.int64)
    for place in np.argsort(-parts.lengths, kind="stable"):
        room = np.flatnonzero(filled + parts.lengths[place] <= tokens)
        if not len(room):
            return None
        pack = room[np.argmax(filled[room])]
        packs[pack].append(int(place))
        filled[pack] += parts.lengths[place]
    return packs

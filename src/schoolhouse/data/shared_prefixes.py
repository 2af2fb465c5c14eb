"""What examples begin with as others do: a system prompt, tools, the history of a conversation that was split.

Under a causal rule the states of a token depend on nothing but the tokens before it and its position. So the first
tokens that two examples have in common are computed once, and both attend to the same states; gradients add up in them.
Each place may have one target: where two examples have one in the same place, they part there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORTH = 0.02
"""The share of the tokens of a micro-batch, or of an example of a row, that must stand in others for them to be
computed once: finding them again in attention costs about as much, measured on a processor."""


@dataclass(frozen=True, slots=True)
class Found:
    """Which tokens of examples end to end, S in all, are the same."""

    begins: list[int]
    """E: the first tokens of each example that stand in another."""
    sources: np.ndarray
    """i64[S]: of each token the one that is computed for it; itself, where it is."""

    @property
    def left_out(self) -> int:
        """The number of tokens that are not computed."""
        return sum(self.begins)


def anywhere(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> Found:
    """What each example shares with the one before it in the order of their tokens, as words stand in a dictionary: the
    most that there is, but for targets that part them."""
    order = sorted(range(len(ids)), key=lambda one: ids[one].astype(">u4").tobytes())
    return _along(ids, weights, order, [True] * len(order))


def in_turn(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray], follows: Sequence[bool]) -> Found:
    """What each example shares with the one before it, where it `follows` that one in its row."""
    return _along(ids, weights, range(len(ids)), follows)


def of_row(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> list[int]:
    """The tokens that a plan counts on: what each example of a row shares with the one before it, where it is worth
    it."""
    if len(ids) == 1:
        return [0]
    begins = in_turn(ids, weights, [True] * len(ids)).begins
    return [begin if begin >= WORTH * len(one) else 0 for begin, one in zip(begins, ids, strict=True)]


def _along(
    ids: Sequence[np.ndarray], weights: Sequence[np.ndarray], order: Sequence[int], follows: Sequence[bool]
) -> Found:
    """What each example shares with the one before it in an order, where it follows that."""
    lengths = np.asarray([len(one) for one in ids])
    starts = np.cumsum(lengths) - lengths
    sources, taken = np.arange(lengths.sum()), np.zeros(lengths.sum(), dtype=bool)
    begins = [0] * len(ids)
    for number, (one, together) in enumerate(zip(order, follows, strict=True)):
        if number and together:
            before = order[number - 1]
            size = _common(ids[before], ids[one])
            seen = sources[starts[before] : starts[before] + size]
            both = np.flatnonzero(taken[seen] & (weights[one][:size] != 0))
            begins[one] = int(min(both[0] if len(both) else size, lengths[one] - 1))
            sources[starts[one] : starts[one] + begins[one]] = seen[: begins[one]]
        taken[sources[starts[one] : starts[one] + lengths[one]][weights[one] != 0]] = True
    return Found(begins, sources)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of tokens that both begin with."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size

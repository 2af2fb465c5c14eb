"""Pieces of work shared out among processes, each by its cost."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(costs: Sequence[int], degree: int) -> tuple[tuple[int, ...], ...]:
    """Which pieces each of `degree` processes takes: the dearest first, each to the one that has least to do."""
    taken: list[list[int]] = [[] for _ in range(degree)]
    loads = [0] * degree
    for piece in sorted(range(len(costs)), key=lambda one: -costs[one]):
        least = loads.index(min(loads))
        taken[least].append(piece)
        loads[least] += costs[piece]
    return tuple(tuple(sorted(pieces)) for pieces in taken)

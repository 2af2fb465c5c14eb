"""From the plan to this rank's micro-batches: examples laid end to end, nothing padded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from schoolhouse.data import ahead
from schoolhouse.data.ahead import WHOLE, Share
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.shares import share_out
from schoolhouse.types import MicroBatch, Step, Vision


def steps(
    store: Store, plan: Plan, first: int, last: int, device: torch.device, *, rank: int = 0, ranks: int = 1,
    sight: Sight | None = None, share: Share = WHOLE,
) -> Iterator[Step]:
    """Steps `first` to `last` (both included) as data rank `rank` of `ranks` executes them, images decoded ahead:
    those of this process's share where several work on one pack."""
    assert plan.ranks % ranks == 0, "every rank computes equally many packs"
    every, coming = itertools.tee(map(plan.step, range(first, last + 1)))
    packs = (pack for planned in coming for pack in planned.packs[rank::ranks])
    seen = pixels(store, packs, sight, -(-plan.examples // ranks), device, share)
    del coming, packs  # where there are no images nobody asks for them, and `tee` would keep every step of the run
    for planned in every:
        mine = planned.packs[rank::ranks]
        yield Step(planned, [micro_batch(store, pack, device, sight, next(seen), share[1]) for pack in mine])


def pixels(
    store: Store, packs: Iterable[Sequence[int]], sight: Sight | None, examples: int, device: torch.device,
    share: Share = WHOLE,
) -> Iterator[torch.Tensor | None]:
    """The pixels of each pack in order, or of this process's share; None for a pack or a model without images."""
    if sight is None:
        return itertools.repeat(None)
    return ahead.of_packs(store, packs, sight, examples, share=share, pinned=device.type == "cuda")


def micro_batch(
    store: Store, pack: Sequence[int], device: torch.device, sight: Sight | None = None,
    seen: torch.Tensor | None = None, degree: int = 1,
) -> MicroBatch:
    """The examples of a pack end to end with the pixels `seen`, of all images or of the share of one of `degree`
    processes; an empty pack is one token that teaches nothing."""
    if not pack:
        return _empty(device, sight)
    ids, labels, weights = map(np.concatenate, zip(*map(store.tokens, pack), strict=True))
    lengths = store.lengths[list(pack)].tolist()
    return MicroBatch(
        input_ids=_row(ids.astype(np.int64), device),
        labels=_row(labels.astype(np.int64), device),
        weights=_row(weights, device),
        positions=_positions(store, pack, lengths, device, sight),
        boundaries=tuple(itertools.accumulate(lengths, initial=0)),
        targets=torch.from_numpy(np.flatnonzero(weights)).to(device),
        pack=tuple(pack),
        supervised=float(store.supervised[list(pack)].sum()),
        vision=None if sight is None else _vision(store, pack, device, sight, seen, degree),
    )


def _positions(
    store: Store, pack: Sequence[int], lengths: Sequence[int], device: torch.device, sight: Sight | None
) -> torch.Tensor:
    """i64[1, S], or i64[3, 1, S] for a model that places its visual tokens in a grid."""
    if sight is None or not sight.family.placed_by_grid:
        return _row(np.concatenate([np.arange(length) for length in lengths]), device)
    placed = [sight.positions(store.tokens(one)[0], store.grids(one)) for one in pack]
    return torch.from_numpy(np.concatenate(placed, axis=1)).unsqueeze(1).to(device)


def _vision(
    store: Store, pack: Sequence[int], device: torch.device, sight: Sight, seen: torch.Tensor | None, degree: int
) -> Vision:
    """The images of a pack, or the blank one of a pack without."""
    if seen is None:
        return _blank(sight, device)
    grids = [grid for one in pack for grid in store.grids(one)]
    shares = None if degree == 1 else share_out([math.prod(grid) for grid in grids], degree)
    return Vision(seen.to(device, non_blocking=True), torch.tensor(grids, device=device), shares=shares)


def _empty(device: torch.device, sight: Sight | None) -> MicroBatch:
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=zero, labels=zero - 100, weights=zero.float(), positions=zero, boundaries=(0, 1),
        targets=zero[0, :0], pack=(), supervised=0.0,
        vision=None if sight is None else _blank(sight, device),
    )


def _blank(sight: Sight, device: torch.device) -> Vision:
    pixels, grid = sight.eyes.blank()
    return Vision(torch.from_numpy(pixels).to(device), torch.tensor([grid], device=device), real=False)


def _row(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).unsqueeze(0).to(device)

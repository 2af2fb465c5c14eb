"""From the plan to this rank's micro-batches: examples laid end to end, nothing padded."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch

from schoolhouse import crossing
from schoolhouse.data import ahead, shared_prefixes
from schoolhouse.data.ahead import WHOLE, Share
from schoolhouse.data.plan import Plan
from schoolhouse.data.shared_prefixes import WORTH
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.shares import share_out
from schoolhouse.types import MicroBatch, Shared, Step, Vision


def steps(
    store: Store, plan: Plan, first: int, last: int, device: torch.device, *, rank: int = 0, ranks: int = 1,
    sight: Sight | None = None, share: Share = WHOLE,
) -> Iterator[Step]:
    """Steps `first` to `last` (both included) as data rank `rank` of `ranks` executes them, in host memory, for a model
    on `device`: a thread has the next one ready, its images decoded, those of this process's share where several work
    on one pack."""
    assert plan.ranks % ranks == 0, "every rank computes equally many packs"
    stopped = threading.Event()
    made = _made(store, plan, first, last, device, rank, ranks, sight, share, stopped)
    with crossing.thread(device) as thread:
        try:
            coming = thread.submit(next, made, None)
            while (step := coming.result()) is not None:
                coming = thread.submit(next, made, None)
                yield step
        finally:
            stopped.set()


def _made(
    store: Store, plan: Plan, first: int, last: int, device: torch.device, rank: int, ranks: int,
    sight: Sight | None, share: Share, stopped: threading.Event,
) -> Iterator[Step]:
    """The steps; nobody asks for the one that was being made when `stopped`, and it is left a part."""
    every, coming = itertools.tee(map(plan.step, range(first, last + 1)))
    packs = (pack for planned in coming for pack in planned.packs[rank::ranks])
    seen = pixels(store, packs, sight, -(-plan.examples // ranks), device, share)
    del coming, packs  # where there are no images nobody asks for them, and `tee` would keep every step of the run
    for planned in every:
        mine = planned.packs[rank::ranks]
        micros = [micro_batch(store, pack, sight, next(seen), share[1]) for pack in mine if not stopped.is_set()]
        yield Step(planned, micros)


def pixels(
    store: Store, packs: Iterable[Sequence[int]], sight: Sight | None, examples: int, device: torch.device,
    share: Share = WHOLE,
) -> Iterator[torch.Tensor | None]:
    """The pixels of each pack in order, or of this process's share; None for a pack or a model without images."""
    if sight is None:
        return itertools.repeat(None)
    return ahead.of_packs(store, packs, sight, examples, share=share, device=device)


def micro_batch(
    store: Store, pack: Sequence[int], sight: Sight | None = None, seen: torch.Tensor | None = None, degree: int = 1
) -> MicroBatch:
    """The examples of a pack end to end, in host memory, with the pixels `seen`, of all images or of the share of one
    of `degree` processes; an empty pack is one token that teaches nothing."""
    if not pack:
        return _empty(sight)
    parts = [*zip(*map(store.tokens, pack), strict=True)]
    ids, labels, weights = map(np.concatenate, parts)
    lengths = store.lengths[list(pack)].tolist()
    return MicroBatch(
        input_ids=_row(ids.astype(np.int64)),
        labels=_row(labels.astype(np.int64)),
        weights=_row(weights),
        positions=_positions(store, pack, lengths, sight),
        boundaries=tuple(itertools.accumulate(lengths, initial=0)),
        targets=torch.from_numpy(np.flatnonzero(weights)),
        pack=tuple(pack),
        supervised=float(store.supervised[list(pack)].sum()),
        vision=None if sight is None else _vision(store, pack, sight, seen, degree),
        shared=None if sight is not None or len(pack) == 1 else shared(parts[0], parts[2], _follows(store, pack)),
    )


def as_planned(store: Store, micro: MicroBatch) -> MicroBatch:
    """The micro-batch with nothing computed once but what the plan counts on: the heaviest that it may be."""
    if micro.shared is None:
        return micro
    ids, _, weights = zip(*map(store.tokens, micro.pack), strict=True)
    planned = _shared(shared_prefixes.in_turn(ids, weights, _follows(store, micro.pack)), weights)
    return replace(micro, shared=planned)


def _follows(store: Store, pack: Sequence[int]) -> list[bool]:
    """Whether each example of a pack has been counted on to share what it begins with with the one before it."""
    return [bool(store.shared[one]) and before == one - 1 for before, one in itertools.pairwise((-2, *pack))]


def shared(
    ids: Sequence[np.ndarray], weights: Sequence[np.ndarray], follows: Sequence[bool] = ()
) -> Shared | None:
    """What examples begin with as others do, no less than by each with the one it `follows`; None where that is less
    than is `WORTH` it and none follows."""
    found = shared_prefixes.anywhere(ids, weights)
    if any(follows):
        found = max(found, shared_prefixes.in_turn(ids, weights, follows), key=lambda one: one.left_out)
        return _shared(found, weights)
    return _shared(found, weights) if found.left_out >= WORTH * len(found.sources) else None


def _shared(found: shared_prefixes.Found, weights: Sequence[np.ndarray]) -> Shared | None:
    """What was found, for a model; None for nothing."""
    if not found.left_out:
        return None
    kept = found.sources == np.arange(len(found.sources))
    places = (kept.cumsum() - 1)[found.sources]
    targets = places[np.flatnonzero(np.concatenate(weights))]
    return Shared(*map(torch.from_numpy, (np.flatnonzero(kept), targets, places)), tuple(found.begins))


def placed(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch in host memory as a model on a device takes it: what is `shared` and the sizes of images stay, for
    they tell how to compute."""
    if device.type == "cpu":
        return micro
    values = {each.name: getattr(micro, each.name) for each in fields(micro)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    vision = micro.vision
    if vision is not None:
        vision = replace(vision, pixels=crossing.sent(vision.pixels, device))
    return replace(micro, vision=vision, **{name: crossing.sent(value, device) for name, value in tensors.items()})


def _positions(store: Store, pack: Sequence[int], lengths: Sequence[int], sight: Sight | None) -> torch.Tensor:
    """i64[1, S], or i64[3, 1, S] for a model that places its visual tokens in a grid."""
    if sight is None or not sight.family.placed_by_grid:
        return _row(np.concatenate([np.arange(length) for length in lengths]))
    found = [sight.positions(store.tokens(one)[0], store.grids(one)) for one in pack]
    return torch.from_numpy(np.concatenate(found, axis=1)).unsqueeze(1)


def _vision(store: Store, pack: Sequence[int], sight: Sight, seen: torch.Tensor | None, degree: int) -> Vision:
    """The images of a pack, or the blank one of a pack without."""
    if seen is None:
        return _blank(sight)
    grids = [grid for one in pack for grid in store.grids(one)]
    shares = None if degree == 1 else share_out([math.prod(grid) for grid in grids], degree)
    return Vision(seen, torch.tensor(grids), shares=shares)


def _empty(sight: Sight | None) -> MicroBatch:
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(
        input_ids=zero, labels=zero - 100, weights=zero.float(), positions=zero, boundaries=(0, 1),
        targets=zero[0, :0], pack=(), supervised=0.0, vision=None if sight is None else _blank(sight),
    )


def _blank(sight: Sight) -> Vision:
    pixels, grid = sight.eyes.blank()
    return Vision(torch.from_numpy(pixels), torch.tensor([grid]), real=False)


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).unsqueeze(0)

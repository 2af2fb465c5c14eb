"""From the plan to this rank's micro-batches: examples laid end to end, nothing padded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.types import MicroBatch, Step


def steps(
    store: Store, plan: Plan, first: int, last: int, device: torch.device, *, rank: int = 0, ranks: int = 1
) -> Iterator[Step]:
    """Steps `first` to `last` (both included) as data rank `rank` of `ranks` executes them."""
    assert plan.ranks % ranks == 0, "every rank computes equally many packs"
    for index in range(first, last + 1):
        planned = plan.step(index)
        mine = planned.packs[rank::ranks]
        yield Step(planned, [micro_batch(store, pack, device) for pack in mine])


def micro_batch(store: Store, pack: Sequence[int], device: torch.device) -> MicroBatch:
    """The examples of a pack end to end; an empty pack is one token that nothing is learnt from."""
    if not pack:
        return _empty(device)
    examples = [store[index] for index in pack]
    lengths = [len(example.input_ids) for example in examples]
    weights = np.concatenate([example.weights for example in examples])
    return MicroBatch(
        input_ids=_row(np.concatenate([example.input_ids for example in examples]).astype(np.int64), device),
        labels=_row(np.concatenate([example.labels for example in examples]).astype(np.int64), device),
        weights=_row(weights, device),
        positions=_row(np.concatenate([np.arange(length) for length in lengths]), device),
        boundaries=tuple(itertools.accumulate(lengths, initial=0)),
        targets=torch.from_numpy(np.flatnonzero(weights)).to(device),
        pack=tuple(pack),
        supervised=float(store.supervised[list(pack)].sum()),
    )


def _empty(device: torch.device) -> MicroBatch:
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids=zero, labels=zero - 100, weights=zero.float(), positions=zero, boundaries=(0, 1),
        targets=zero[0, :0], pack=(), supervised=0.0,
    )


def _row(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).unsqueeze(0).to(device)

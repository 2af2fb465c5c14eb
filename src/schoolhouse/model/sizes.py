"""Micro-batches of a few sizes, on a processor that makes a kernel for each size of a product in bfloat16.

oneDNN prepares such a product when it meets its shape first, and packs have as many tokens, and targets, as it happens.
On an Intel Xeon with AMX preparing takes 1.6 to 3.1 ms, the product of 800 tokens with a matrix of 256 x 768 itself 0.3
to 0.4 ms. So small models' micro-batches are filled up: with an example that nothing is learnt from, and with tokens
that have no target among those that meet the head.
"""

from __future__ import annotations

import dataclasses

import torch

from schoolhouse.model import products
from schoolhouse.model.flops import Work
from schoolhouse.types import MicroBatch

EACH = 128
"""Sizes are multiples of this."""
MOST = 4e9
"""Floating-point operations that filling up half of that may take, at most: about what it saves."""


def multiple(work: Work, place: torch.device, precision: str) -> int:
    """What the tokens of a micro-batch are a multiple of; 1 where filling up does not pay."""
    made = place.type == "cpu" and precision == "bfloat16" and not products.wide_is_faster(place)
    return EACH if made and EACH / 2 * work.token <= MOST else 1


def with_more_targets(micro: MicroBatch, multiple: int) -> MicroBatch:
    """The micro-batch with positions of weight 0 behind its targets, so that they are a multiple; as it was where there
    are none to add, or it has no targets."""
    missing = -len(micro.targets) % multiple
    free = torch.ones_like(micro.labels[0], dtype=torch.bool).index_fill_(0, micro.targets, False)
    others = free.nonzero().flatten()[:missing] if missing else micro.targets[:0]
    if len(others) < missing:
        return micro
    return dataclasses.replace(micro, targets=torch.cat([micro.targets, others]))

"""The heaviest micro-batches go forward, backward and through an update before the first step, and are undone.

A run that would not fit ends in its first minute with a number to set, and not in the night at its longest example.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from schoolhouse import memory
from schoolhouse.data import loader, packs
from schoolhouse.data.packs import Units
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import MemoryFault
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Drawn
from schoolhouse.optim import Optimizer
from schoolhouse.parallel import fsdp

CPU_SAYS = ("can't allocate memory", "could not create a memory object")
"""What torch and oneDNN say on a CPU, where torch has no exception of its own."""

USABLE = 0.9
"""The share of free memory on which several processes count before they try; the rest is for splinters and others."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a micro-batch needs. Before a checkpoint is loaded: trying drops the moments."""

    student: Student
    optimizer: Optimizer
    store: Store
    sight: Sight | None

    def fits(self, plan: Plan) -> bool:
        """Whether the heaviest micro-batches of a plan fit."""
        try:
            self.attempt(plan)
            return True
        except DoesNotFitError:
            return False

    def attempt(self, plan: Plan) -> None:
        """One update with each of them, with the learning rate 0, which moves no weight; raises DoesNotFitError.

        Freed memory is given back before and after, so that neither a smaller try nor training meets its splinters.
        """
        memory.give_back(self.student.device)
        for pack in heaviest_packs(plan, self.store.largest_image):
            with _refused_memory(), memory.capped(self.student.device):
                try:
                    self._update(pack)
                finally:
                    self.optimizer.begin_again()
        memory.give_back(self.student.device)

    def _update(self, pack: Sequence[int]) -> None:
        student = self.student
        share = student.mesh.seat
        seen = next(iter(loader.pixels(self.store, iter([pack]), self.sight, len(pack), student.device, share)))
        micro = loader.micro_batch(self.store, pack, student.device, self.sight, seen, share[1])
        micro = loader.as_planned(self.store, micro)
        fsdp.expect(student, last=True)
        student.loss(micro, Drawn(0, 0), micro.supervised).backward()
        self.optimizer.clip()
        self.optimizer.step(0.0)


class DoesNotFitError(Exception):
    """The allocator refused."""


def refuse_too_large(rehearsal: Rehearsal, plan: Plan, known: int | None = None) -> None:
    """Raises MemoryFault, with a size that would fit, where the heaviest micro-batch of the plan does not.

    `known` is a smaller `batch.tokens` that did.
    """
    try:
        rehearsal.attempt(plan)
    except DoesNotFitError as error:
        longest = int(plan.lengths.max())
        fits = known or (_what_fits(rehearsal, plan) if rehearsal.student.mesh.world == 1 else None)
        raise MemoryFault(
            f"a micro-batch of {plan.tokens} tokens does not fit: {error}",
            required=f"memory for forward, backward and update; the longest example has {longest} tokens",
            where="batch.tokens, rehearsed before the first step",
            remedy=f"set batch.tokens={fits}, which fits and gives the same result" if fits else
            "lower batch.tokens, shorten the examples (data.max_tokens), or set model.activation_checkpointing=true",
        ) from None


def largest_that_fits(rehearsal: Rehearsal, plan: Plan) -> Plan:
    """The plan with the largest micro-batches that fit: 1, 1.5, 2, 3, 4, 6, … times `data.max_tokens`.

    The plan given has the smallest. One that holds a whole step is the largest that makes a difference. One process
    tries until it is refused. Of several, one that is refused would be the end of all: they try what all have room for
    by what the size before took, in proportion to tokens or patches. Where nothing tells what is free or was taken,
    they stay at the smallest.
    """
    student = rehearsal.student
    together = student.mesh.world > 1
    memory.give_back(student.device)
    held = memory.begin_peak(student.device) if together else 0
    refuse_too_large(rehearsal, plan)
    whole_step = int(np.sort(plan.lengths)[-plan.examples :].sum())
    for tokens in _sizes(plan.tokens, whole_step):
        larger = dataclasses.replace(plan, tokens=tokens)
        if together:
            if not _all_have_room(student, held, _growth(plan, larger, rehearsal.store.largest_image)):
                break
            refuse_too_large(rehearsal, larger, known=plan.tokens)
        elif not rehearsal.fits(larger):
            break
        plan = larger
    return plan


def _growth(plan: Plan, larger: Plan, images: np.ndarray) -> float:
    """How many times the tokens, all or supervised, or patches of one plan's heaviest packs a larger one's have."""
    kinds = [plan.lengths, plan.supervised_tokens]
    if plan.patches is not None and plan.patches.any():
        kinds.append(plan.patches)
    both = [heaviest_packs(one, images) for one in (plan, larger)]
    most = [[max(int(kind[list(pack)].sum()) for pack in found) for kind in kinds] for found in both]
    for sizes, found in zip(most, both, strict=True):
        sizes.append(max(_computed(plan, pack) for pack in found))
    return max(after / before for before, after in zip(*most, strict=True))


def _computed(plan: Plan, pack: Sequence[int]) -> int:
    """Tokens of a pack that are computed, by what the plan counts on."""
    chosen = np.asarray(pack)
    shared = plan.shared(chosen)
    return int(plan.lengths[chosen].sum() - (0 if shared is None else shared.sum()))


def _all_have_room(student: Student, held: int | None, ratio: float) -> bool:
    """Whether every process has room for `ratio` times what the last size took beyond `held`; one answer for all."""
    device, mesh = student.device, student.mesh
    most = memory.peak(device) if held is not None else None
    now = memory.begin_peak(device)
    mesh.barrier()  # before anybody looks at what is free, all have ended the last try
    known = None not in (held, most, now)
    more, free = (held + (most - held) * ratio - now, memory.room(device)) if known else (0.0, None)
    said = mesh.gather([_where(device), more, free])
    needed: dict[str, float] = collections.Counter()
    for place, wanted, _ in said:
        needed[place] += max(0.0, wanted)
    return all(free is not None and needed[place] <= USABLE * free for place, _, free in said)


def _where(device: torch.device) -> str:
    """Whose memory it is: the machine's, or a card's, by its own number where each process counts its cards from 0."""
    if device.type == "cuda":
        return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    return f"{socket.gethostname()} {device}"


def _sizes(smallest: int, enough: int) -> Iterator[int]:
    """1.5, 2, 3, 4, 6, 8, … times the smallest, up to the first that is enough."""
    last = smallest
    for power in itertools.count():
        for halves in (3 << power, 4 << power):
            if last >= enough:
                return
            last = smallest * halves // 2
            yield last


def heaviest_packs(plan: Plan, images: np.ndarray) -> list[tuple[int, ...]]:
    """The heaviest pack of tokens that a step can hold, of supervised ones, and of patches, of each class of images.

    Where examples of a row are computed together: of those apart, and of those together, by the tokens attended to.
    `images` i64[examples] are the patches of each one's largest image; sizes less than a doubling apart are a class. A
    pack of one large image and one of many small ones take their memory in other pieces, and in other layers.
    """
    every = np.arange(len(plan.lengths))
    apart = packs.alone(plan.lengths, plan.lengths)
    kinds = [(apart, plan.lengths), (apart, plan.supervised_tokens)]
    shared = plan.shared(every)
    if shared is not None:
        together = packs.units(plan.lengths, plan.lengths, shared, plan.tokens, most=plan.examples)
        kinds += [(together, plan.lengths), (together, plan.supervised_tokens)]
    if plan.patches is not None and plan.patches.any():
        classes = np.frexp(images)[1]
        kinds.append((apart, plan.patches))
        kinds += [(apart, np.where(classes == one, plan.patches, 0)) for one in np.unique(classes[images > 0])]
    return list(dict.fromkeys(heaviest(plan, *kind) for kind in kinds))


def heaviest(plan: Plan, units: Units, weights: np.ndarray) -> tuple[int, ...]:
    """The heaviest unit, by weights of examples, then each next heaviest that finds room in `batch.tokens`; of equals,
    the longest."""
    pack: list[int] = []
    tokens, shortest = plan.tokens, units.lengths.min()
    sums = np.add.reduceat(weights, units.starts[:-1])
    for unit in np.lexsort((-units.lengths, -sums)):
        if len(pack) == plan.examples or tokens < shortest:
            break
        places = units.places(unit)
        if units.lengths[unit] <= tokens and len(pack) + len(places) <= plan.examples:
            pack += places
            tokens -= int(units.lengths[unit])
    return tuple(pack)


def _what_fits(rehearsal: Rehearsal, plan: Plan) -> int | None:
    """The largest half, quarter, … of `batch.tokens` that fits and holds the longest example."""
    tokens = plan.tokens // 2
    while tokens >= plan.lengths.max():
        if rehearsal.fits(dataclasses.replace(plan, tokens=tokens)):
            return tokens
        tokens //= 2
    return None


@contextlib.contextmanager
def _refused_memory() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DoesNotFitError((str(error) or "out of memory").splitlines()[0][:160]) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in CPU_SAYS):
            raise
        raise DoesNotFitError(str(error).splitlines()[0][-160:]) from None

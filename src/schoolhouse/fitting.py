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
from schoolhouse.data import loader
from schoolhouse.data.plan import Plan
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import MemoryFault
from schoolhouse.model import recurrent
from schoolhouse.model.load import Student
from schoolhouse.model.shared_prefixes import unfolded
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
        """Each of them forward and backward as in a later step, beside moments and, where a step has several, the
        gradients of others; raises DoesNotFitError. No weight moves.

        Freed memory is given back before and after, so that neither a smaller try nor training meets its splinters.
        """
        memory.give_back(self.student.device)
        several = plan.several(self.student.mesh.data_ranks)
        packs = [(pack, False) for pack in heaviest_packs(plan, self.store.largest_image)]
        if recurrent.layers(self.student.model):  # which fill up each example, however short, to a chunk of tokens
            packs.append((heaviest(plan, -plan.lengths), False))
        packs += [(pack, True) for pack in heaviest_together(plan)]
        with _refused_memory(), memory.capped(self.student.device):
            try:
                self.optimizer.as_in_a_later_step(gradients=several)
                for pack, together in packs:
                    self._learn(pack, together)
                    self.optimizer.clip()
                    if not several:
                        self.optimizer.forget()
            finally:
                self.optimizer.begin_again()
        memory.give_back(self.student.device)

    def _learn(self, pack: Sequence[int], together: bool) -> None:
        """The gradient of a pack: of examples that share nothing, or what the plan counts on where they are together.
        """
        student = self.student
        share = student.mesh.seat
        seen = next(iter(loader.pixels(self.store, iter([pack]), self.sight, len(pack), student.device, share)))
        micro = loader.micro_batch(self.store, pack, self.sight, seen, share[1])
        micro = loader.as_planned(self.store, micro) if together else unfolded(micro)
        fsdp.expect(student, last=True)
        student.loss(micro, Drawn(0, 0), micro.supervised).backward()


class DoesNotFitError(Exception):
    """The allocator refused."""


def refuse_too_large(rehearsal: Rehearsal, plan: Plan, known: int | None = None) -> None:
    """Raises MemoryFault, with a size that would fit, where the heaviest micro-batch of the plan does not.

    `known` is a smaller `batch.tokens` that did.
    """
    try:
        return rehearsal.attempt(plan)
    except DoesNotFitError as error:
        said = str(error)  # the error itself holds on to what was made before it
    longest = int(plan.lengths.max())
    fits = known or (_what_fits(rehearsal, plan) if rehearsal.student.mesh.world == 1 else None)
    raise MemoryFault(
        f"a micro-batch of {plan.tokens} tokens does not fit: {said}",
        required=f"memory for forward, backward and update; the longest example has {longest} tokens",
        where="batch.tokens, rehearsed before the first step",
        remedy=f"set batch.tokens={fits}, which fits and gives the same result" if fits else
        "lower batch.tokens, shorten the examples (data.max_tokens), or set model.activation_checkpointing=true",
    )


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
    if held is not None:  # moments and gradients do not grow
        held += rehearsal.optimizer.later_bytes(student.device, gradients=plan.several(student.mesh.data_ranks))
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
    most = []
    for one in (plan, larger):
        apart, together = heaviest_packs(one, images), heaviest_together(one)
        sizes = [max(int(kind[list(pack)].sum()) for pack in apart + together) for kind in kinds]
        computed = [int(plan.lengths[list(pack)].sum() - plan.shared(np.asarray(pack)).sum()) for pack in together]
        most.append([*sizes, max([*computed, *(int(plan.lengths[list(pack)].sum()) for pack in apart)])])
    return max(after / before for before, after in zip(*most, strict=True))


def _all_have_room(student: Student, held: int | None, ratio: float) -> bool:
    """Whether every process has room for `ratio` times what the last size took beyond `held`; one answer for all."""
    device, mesh = student.device, student.mesh
    most = memory.peak(device) if held is not None else None
    now = memory.begin_peak(device)
    mesh.barrier()  # before anybody looks at what is free, all have ended the last try
    known = None not in (held, most, now)
    more, free = (held + max(0, most - held) * ratio - now, memory.room(device)) if known else (0.0, None)
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

    `images` i64[examples] are the patches of each one's largest image; sizes less than a doubling apart are a class. A
    pack of one large image and one of many small ones take their memory in other pieces, and in other layers.
    """
    found = [heaviest(plan, plan.lengths), heaviest(plan, plan.supervised_tokens)]
    if plan.patches is not None and plan.patches.any():
        classes = np.frexp(images)[1]
        found.append(heaviest(plan, plan.patches))
        found += [heaviest(plan, np.where(classes == one, plan.patches, 0)) for one in np.unique(classes[images > 0])]
    return list(dict.fromkeys(found))


def heaviest(plan: Plan, weights: np.ndarray) -> tuple[int, ...]:
    """The heaviest example, then each next heaviest that finds room in `batch.tokens`; of equals, the longest."""
    pack: list[int] = []
    tokens, shortest = plan.tokens, plan.lengths.min()
    for index in np.lexsort((-plan.lengths, -weights)):
        if len(pack) == plan.examples or tokens < shortest:
            break
        if plan.lengths[index] <= tokens:
            pack.append(int(index))
            tokens -= int(plan.lengths[index])
    return tuple(pack)


def heaviest_together(plan: Plan) -> list[tuple[int, ...]]:
    """The heaviest packs of rows whose examples are computed together: of tokens that are attended to, which are more
    than those computed, and of supervised ones. A step begins and ends anywhere in a row, and its last examples are
    the longest: rows are taken from their ends, in the order of what they weigh, in all and for each token computed.
    """
    shared = plan.shared(np.arange(len(plan.lengths)))
    if shared is None:
        return []
    kinds, ends = (plan.lengths, plan.supervised_tokens), np.append(np.flatnonzero(shared == 0)[1:], len(shared))
    rows = [_from_its_end(plan, shared, int(end), plan.tokens, plan.examples) for end in ends]
    spent = np.asarray([computed for _, computed in rows], dtype=float)
    found = []
    for kind in kinds:
        weights = np.asarray([kind[list(places)].sum() for places, _ in rows], dtype=float)
        found += [_heaviest_rows(plan, shared, ends[np.argsort(-one, kind="stable")])
                  for one in (weights, weights / np.maximum(spent, 1))]
    return list(dict.fromkeys(found))


def _heaviest_rows(plan: Plan, shared: np.ndarray, ends: Sequence[int]) -> tuple[int, ...]:
    """Of each row in turn, by where its examples end, as many of its last ones as find room."""
    pack: list[int] = []
    tokens, shortest = plan.tokens, plan.lengths.min()
    for end in ends:
        if len(pack) == plan.examples or tokens < shortest:
            break
        places, computed = _from_its_end(plan, shared, int(end), tokens, plan.examples - len(pack))
        pack += places
        tokens -= computed
    return tuple(pack)


def _from_its_end(plan: Plan, shared: np.ndarray, end: int, tokens: int, examples: int) -> tuple[range, int]:
    """The last examples before `end` of one row, at most so many, of at most so many tokens that are computed; and how
    many are. The first of them is computed whole."""
    first, computed = end, 0
    while end - first < examples:
        more = int(plan.lengths[first - 1]) - (int(shared[first]) if first < end else 0)
        if computed + more > tokens:
            break
        first, computed = first - 1, computed + more
        if not shared[first]:
            break
    return range(first, end), computed


def _what_fits(rehearsal: Rehearsal, plan: Plan) -> int | None:
    """The largest half, quarter, … of `batch.tokens` that fits and holds the longest example."""
    tokens = plan.tokens // 2
    while tokens >= plan.lengths.max():
        if rehearsal.fits(dataclasses.replace(plan, tokens=tokens)):
            return tokens
        tokens //= 2
    return None


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Inside, a model that finds no room for its weights alone becomes a MemoryFault."""
    try:
        with _refused_memory():
            yield
    except DoesNotFitError as error:
        raise MemoryFault(
            f"the model does not fit: {error}", required="memory for all weights before anything is rehearsed",
            where="model", remedy="set model.precision=bfloat16, train adapters (lora.rank, lora.base=nf4), or cut the "
            "weights among processes (--nproc)",
        ) from None


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

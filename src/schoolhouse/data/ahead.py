"""Pixels ahead of need: the images of coming packs are decoded and resized while a step is computed, many by worker
processes and few by a thread.

The order is the plan's, whatever the number of workers, and a pack's pixels are a function of its images alone. Of a
Ulysses group each process makes the pixels of the images that it encodes.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from schoolhouse import crossing
from schoolhouse.data import store as stores
from schoolhouse.data.store import Store
from schoolhouse.data.vision import Sight
from schoolhouse.errors import DataError
from schoolhouse.shares import share_out
from schoolhouse.types import Picture, Vision

Pack = Sequence[int]
DEPTH = 2
"""Packs that each worker, or the thread, has ready or under way."""
LITTLE = 1 << 14
"""Patches of an average step that a thread makes: starting workers costs seconds, these cost a few hundredths."""
CPU = torch.device("cpu")
Share = tuple[int, int]
"""This process among those that divide the images of a pack, and how many these are."""
WHOLE: Share = (0, 1)


def pixels(sight: Sight, shown: Sequence[tuple[Picture, str]]) -> torch.Tensor | None:
    """The pixels of images, each with its place for errors, end to end; None where there is none."""
    arrays = [sight.pixels(picture, where) for picture, where in shown]
    return torch.from_numpy(np.concatenate(arrays)) if arrays else None


def vision(sight: Sight, shown: Sequence[Picture], device: torch.device, where: str) -> Vision | None:
    """Images as the model takes them; None where there is none."""
    seen = pixels(sight, [(picture, where) for picture in shown])
    if seen is None:
        return None
    return Vision(seen.to(device), torch.tensor([picture.grid for picture in shown]))


def of_pack(store: Store, pack: Pack, sight: Sight, share: Share = WHOLE) -> torch.Tensor | None:
    """The pixels of a pack's images, or of this process's share of them: then perhaps of none."""
    shown = [(picture, str(store.origin(one))) for one in pack for picture in store.pictures(one)]
    rank, degree = share
    if degree == 1 or not shown:
        return pixels(sight, shown)
    own = share_out([math.prod(picture.grid) for picture, _ in shown], degree)[rank]
    made = pixels(sight, [shown[image] for image in own])
    return torch.from_numpy(sight.eyes.blank()[0][:0]) if made is None else made


def of_packs(
    store: Store, packs: Iterable[Pack], sight: Sight, examples: int, *, share: Share = WHOLE,
    device: torch.device = CPU,
) -> Iterator[torch.Tensor | None]:
    """The pixels of each pack in order, for a model on `device`; made by workers where a step of so many examples is
    worth it."""
    if float(store.patches.mean()) * examples < LITTLE:
        yield from _by_a_thread(store, packs, sight, share, device)
        return
    awaited, asked = itertools.tee(map(tuple, packs))
    made = iter(DataLoader(
        _Packs(store.directory, sight, share), batch_size=None, sampler=_Order(asked),
        num_workers=min(8, os.cpu_count() or 1), prefetch_factor=DEPTH, multiprocessing_context="spawn",
        worker_init_fn=_ignore_signals, pin_memory=device.type == "cuda",
    ))
    for pack in awaited:
        yield _received(made, store, pack)


def _by_a_thread(
    store: Store, packs: Iterable[Pack], sight: Sight, share: Share, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """Pillow and torch let other threads go on while they compute."""
    def make(pack: Pack) -> torch.Tensor | None:
        found = of_pack(store, pack, sight, share)
        return None if found is None else crossing.pinned(found, device)

    with crossing.thread(device) as thread:
        made: deque[Future] = deque()
        for pack in packs:
            made.append(thread.submit(make, pack))
            if len(made) > DEPTH:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def _received(made: Iterator, store: Store, pack: Pack) -> torch.Tensor | None:
    """The next pack's pixels; a worker's error is raised here, and so is its death."""
    try:
        seen = next(made)
    except RuntimeError as error:  # what torch raises for a worker that was killed
        rows = ", ".join(str(store.origin(one)) for one in pack[:4])
        raise DataError(
            f"a process that decodes images died: {' '.join(str(error).split()):.120}", where=rows,
            required="workers that live, and memory for them", remedy="look for what killed it (memory?) and run again",
        ) from None
    if isinstance(seen, DataError):
        raise seen
    return seen


@dataclass(frozen=True)
class _Packs(Dataset):
    """A pack's pixels, made in a worker; an error travels as a value, because torch would rewrite it."""

    directory: Path
    sight: Sight
    share: Share

    def __getitem__(self, pack: Pack) -> torch.Tensor | DataError | None:
        try:
            return of_pack(stores.opened(self.directory), pack, self.sight, self.share)
        except DataError as error:
            return error


@dataclass(frozen=True)
class _Order:
    """The packs in the plan's order, drawn as they are needed."""

    packs: Iterator[Pack]

    def __iter__(self) -> Iterator[Pack]:
        return self.packs


def _ignore_signals(_: int) -> None:
    """The trainer decides when to stop; a worker that dies of the same Ctrl-C would turn the stop into an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

"""The way between host memory and an accelerator, on which the program does not wait for the accelerator.

An accelerator does what it is told in order, later. A copy out of pageable memory, or one whose result is read at once,
waits until all of that is done, and the accelerator then waits for the next things it is told.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

QUEUES = ("cuda",)
"""Kinds of devices that are known to do here what is said of an accelerator; others are waited for, as a processor is.
"""


def is_queue(device: torch.device) -> bool:
    """Whether a device may be told things that it does later."""
    return device.type in QUEUES


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Values of host memory where a device can fetch them by itself; what is there already stays."""
    return values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of host memory on a device, which copies them when it comes to it; what is there already stays."""
    return pinned(values, device).to(device, non_blocking=is_queue(device))


def thread(device: torch.device) -> ThreadPoolExecutor:
    """A thread that makes things for a device: which one is meant by default belongs to a thread."""
    if device.index is None:
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.accelerator.set_device_index, initargs=(device.index,))


class Moment:
    """A place in the order of all that a device was told; of one that does things at once, now."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = torch.Event(device, enable_timing=True) if is_queue(device) else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until the device has come here; what it was told later is not waited for."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds on the device, which has come here, from an earlier moment of it."""
        return self._time - earlier._time if self._event is None else earlier._event.elapsed_time(self._event) / 1000


class Awaited:
    """Values on their way from a device to host memory."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=is_queue(values.device))
        self._arrived = Moment(values.device)

    def read(self) -> list:
        """The values, as lists of numbers, once the device has computed them."""
        self._arrived.wait()
        return self._values.tolist()

"""Inputs of blocks in host memory until backward wants them, copied there and back while the device computes.

For activations of blocks that are computed again in backward: their inputs are all that remains, and grow with the
number of blocks and tokens. Each is copied while its block is computed and leaves the device when the next one comes,
so that the last one is there when backward begins; when backward asks for one, the one before it is sent for. So the
device holds two at a time (as in torchtune's and TRL's activation offloading).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from schoolhouse.errors import ConfigError

LEAST = 1 << 20
"""Bytes of a tensor that is worth a copy."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Away:
    """A tensor in host memory."""

    host: Tensor
    here: Tensor | None
    """The same on the device: not yet gone, or back already."""
    before: _Away | None
    """The one that was handed in before it, which backward wants after it."""
    version: int
    """How often `here` had been changed in place when it was handed in, or sent for."""


def to_host(place: torch.device) -> Offload:
    """The way to host memory from a device; raises ConfigError where there is none."""
    if place.type != "cuda":
        raise ConfigError(
            f"model.activation_offload=true: what blocks are given on {place} is in host memory already"
            if place.type == "cpu" else f"model.activation_offload=true: not known of a device of type {place.type}",
            required="a CUDA device", where="model.activation_offload", remedy="set model.activation_offload=false",
        )
    return Offload(place)


class Offload:
    """The way to host memory and back, of all blocks of a model on a device."""

    def __init__(self, place: torch.device, least: int = LEAST) -> None:
        self._place, self._least = place, least
        self._device = torch.get_device_module(place)
        self._out, self._back = self._device.Stream(place), self._device.Stream(place)
        self._coming: list[Tensor] = []
        """What is being copied to the device: its memory is nobody else's until the main stream has waited."""
        self._last: Callable[[], _Away | None] = lambda: None

    def around(self, forward: Callable) -> Callable:
        """A forward whose large tensors that backward wants are kept in host memory: those it is given, if it computes
        all else again."""

        def kept(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._put, self._get):
                return forward(*args, **kwargs)

        return kept

    def _put(self, tensor: Tensor) -> Tensor | _Away:
        if tensor.nbytes < self._least or tensor.device.type != self._place.type:
            return tensor
        last = self._last()
        if last is not None and last.here is not None:
            self._main().wait_stream(self._out)  # whatever takes its memory now comes after its copy
            _refuse_changed(last)
            last.here = None
        here = tensor.detach()
        host = torch.empty_like(here, device="cpu", pin_memory=self._place.type != "cpu")
        self._copy(self._out, host, here)
        away = _Away(host, here, last, here._version)
        self._last = weakref.ref(away)
        return away

    def _get(self, kept: Tensor | _Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.here is not None:
            _refuse_changed(kept)
        self._fetch(kept)
        self._main().wait_stream(self._back)
        self._coming.clear()
        if kept.before is not None:
            self._fetch(kept.before)
        here, kept.here = kept.here, None
        return here

    def _fetch(self, away: _Away) -> None:
        """Have it on the device, once that has waited for the stream back."""
        if away.here is None:
            away.here = torch.empty_like(away.host, device=self._place, pin_memory=False)
            self._back.wait_stream(self._out)
            self._coming.append(away.here)
            self._copy(self._back, away.here, away.host)
            away.version = away.here._version

    def _copy(self, stream: Any, into: Tensor, source: Tensor) -> None:
        stream.wait_stream(self._main())  # which wrote what is copied, and used before what is written
        with self._device.stream(stream):
            into.copy_(source, non_blocking=True)

    def _main(self) -> Any:
        return self._device.current_stream(self._place)


def _refuse_changed(away: _Away) -> None:
    """Raise RuntimeError, as autograd does for what it keeps itself, where a block changed its input in place."""
    if away.here._version != away.version:
        raise RuntimeError("a block changes its input in place, which activation_offload cannot keep for backward")

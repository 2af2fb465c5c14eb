"""Ulysses: one micro-batch over several processes, each with a part of its tokens.

Jacobs et al., 2023, arXiv:2309.14509.

Everything but attention treats each token by itself. Before attention an all-to-all gives every process the whole
sequence for a part of the heads, and after it another one gives every process its tokens back, with all heads:

    [S / U, H, K]  --to_heads-->  [S, H / U, K]  --attention-->  [S, H / U, K']  --to_sequence-->  [S / U, H, K']

A layer sends, per process and forward pass, (U - 1) / U of S / U x (H K + H' K + H' K' + H K') values: independent of U
but for the repeated key and value heads H'. Backward sends the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from schoolhouse.errors import MeshError
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.types import UNSUPERVISED, MicroBatch


def split(micro: MicroBatch, mesh: Mesh) -> MicroBatch:
    """This process's part [1, S / U] of a micro-batch, `filled` up; `boundaries` stay those of the whole sequence.

    Where a model sees, each process has the pixels of its share of the images; the model itself exchanges their
    features, puts them into the embeddings of the whole sequence, and takes this process's part of these.
    """
    if mesh.ulysses == 1:
        return micro
    micro = filled(micro, mesh.ulysses)
    length = micro.input_ids.shape[1] // mesh.ulysses
    start = mesh.ulysses_rank * length
    own = slice(start, start + length)
    inside = micro.targets[(micro.targets >= start) & (micro.targets < start + length)]
    ids, positions, vision = micro.input_ids[:, own], micro.positions[..., own], micro.vision
    if vision is not None:  # features go into their places first: every process sees all tokens
        ids, positions = micro.input_ids, micro.positions
        vision = dataclasses.replace(vision, part=(start, length))
    return dataclasses.replace(
        micro, input_ids=ids, labels=micro.labels[:, own], weights=micro.weights[:, own], positions=positions,
        vision=vision, targets=inside - start,
    )


def filled(micro: MicroBatch, multiple: int) -> MicroBatch:
    """The micro-batch with an example behind it that nothing is learnt from, so that its tokens are a multiple."""
    tokens, shared = micro.input_ids.shape[1], micro.shared
    missing = -tokens % multiple
    if not missing:
        return micro

    def longer(values: Tensor, padding: int = 0) -> Tensor:
        return torch.nn.functional.pad(values, (0, missing), value=padding)

    positions = longer(micro.positions)
    positions[..., tokens:] = torch.arange(missing, device=positions.device)
    if shared is not None:
        places = torch.cat([shared.places, torch.arange(tokens, tokens + missing)])
        shared = dataclasses.replace(shared, places=places, begins=(*shared.begins, 0))
    return dataclasses.replace(
        micro, input_ids=longer(micro.input_ids), labels=longer(micro.labels, UNSUPERVISED),
        weights=longer(micro.weights), positions=positions, shared=shared,
        boundaries=(*micro.boundaries, micro.boundaries[-1] + missing),
    )


def refuse_heads(heads: int, degree: int) -> None:
    """Raise MeshError where the attention heads cannot be divided."""
    if heads % degree:
        possible = [number for number in range(1, heads + 1) if heads % number == 0]
        raise MeshError(
            f"parallel.ulysses={degree} cannot divide the model's {heads} attention heads",
            required=f"a divisor of {heads}: {', '.join(map(str, possible))}", where="parallel.ulysses",
            remedy=f"set parallel.ulysses={max(number for number in possible if number <= degree)}",
        )


def refuse_rope(settings: Mapping[str, Any], degree: int) -> None:
    """Raise MeshError where rotary frequencies depend on the longest position: a process sees only its own ones."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("dynamic", "longrope"):
        raise MeshError(
            f"parallel.ulysses={degree}: rotary embeddings of the type {kind} change with the longest position",
            required="rotary frequencies that do not depend on the length", where="the model's rope_parameters",
            remedy="set parallel.ulysses=1",
        )


def repeats(heads: int, degree: int) -> int:
    """How often each of the key and value heads must be there, so that U processes get equally many whole groups."""
    return degree // math.gcd(heads, degree)


class Exchange:
    """The way between the processes of a Ulysses group, counting what goes over it."""

    def __init__(self, peers: dist.ProcessGroup) -> None:
        self.peers = peers
        self.degree = peers.size()
        self.calls = 0
        """All-to-alls so far, forward and backward: an attention layer makes two in each direction."""
        self.sent = 0
        """Bytes sent to other processes."""

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[S / U, H, K] of these tokens to [S, H / U, K] of these heads, query, key and value in one exchange.

        Queries of a process meet exactly its key and value heads: these are repeated in place, as grouped heads are.
        """
        times = repeats(key.shape[1], self.degree)
        if times > 1:
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        parts = [one.unflatten(1, (self.degree, -1)).transpose(0, 1).flatten(2) for one in (query, key, value)]
        received = _AllToAll.apply(torch.cat(parts, 2), self).flatten(0, 1)
        own = received.split([part.shape[2] for part in parts], 1)
        return [flat.unflatten(1, (-1, one.shape[2])) for flat, one in zip(own, (query, key, value), strict=True)]

    def to_sequence(self, attended: Tensor) -> Tensor:
        """[S, H / U, K'] of these heads back to [S / U, H, K'] of these tokens."""
        received = _AllToAll.apply(attended.unflatten(0, (self.degree, -1)), self)
        return received.transpose(0, 1).flatten(1, 2)

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes, in the order of their ranks; `sizes` says how many each of them has."""
        return _Gather.apply(rows, self, list(sizes))

    def own_heads(self, values: Tensor) -> Tensor:
        """The part [H / U, …] of per-head values [H, …] that belongs to this process's heads."""
        return values.chunk(self.degree)[self.peers.rank()]

    def all_to_all(self, values: Tensor) -> Tensor:
        """[U, …]: slice u goes to process u, and comes from it."""
        values = values.contiguous()
        received = torch.empty_like(values)
        dist.all_to_all_single(received, values, group=self.peers)
        self.calls += 1
        self.sent += values.numel() * values.element_size() * (self.degree - 1) // self.degree
        return received

    def rows(self, values: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """The rows that come when each process sends the next `sent` of its `values` to each, `received` from each."""
        values = values.contiguous()
        found = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(found, values, list(received), list(sent), group=self.peers)
        self.sent += values.nbytes - values[: sent[self.peers.rank()]].nbytes
        return found


class _AllToAll(torch.autograd.Function):
    """An all-to-all is its own transpose: backward is the same."""

    @staticmethod
    def forward(ctx, values, exchange):
        ctx.exchange = exchange
        return exchange.all_to_all(values)

    @staticmethod
    def backward(ctx, grad):
        return ctx.exchange.all_to_all(grad), None


class _Gather(torch.autograd.Function):
    """Everyone's rows to everyone; backward adds up what reached a process's rows anywhere."""

    @staticmethod
    def forward(ctx, rows, exchange, sizes):
        ctx.exchange, ctx.sizes, ctx.own = exchange, sizes, [len(rows)] * exchange.degree
        return exchange.rows(torch.cat([rows] * exchange.degree), ctx.own, sizes)

    @staticmethod
    def backward(ctx, grad):
        received = ctx.exchange.rows(grad, ctx.sizes, ctx.own)
        return received.unflatten(0, (ctx.exchange.degree, -1)).sum(0), None, None


def exchange(mesh: Mesh) -> Exchange | None:
    """The way to the processes that share a micro-batch; None where one has it whole."""
    return Exchange(mesh.sequence.get_group("ulysses")) if mesh.ulysses > 1 else None

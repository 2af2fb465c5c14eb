"""The loss: hidden rows that have a target meet the vocabulary, a few at a time, and no [S, V] ever exists.

    nll = sum over targets of weight x -log softmax(head(hidden))[target]

Its gradient is linear in what comes from above, so it is computed in the forward pass while a chunk's logits are at
hand (Liger Kernel, Hsu et al., 2024, arXiv:2410.10989) and only scaled in backward: three matrix products, not four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schoolhouse.model import products
from schoolhouse.types import LossSum

CHUNK_ELEMENTS, ON_ACCELERATOR = 1 << 24, 1 << 27
"""Logits of one chunk on a processor and elsewhere: rows are taken as many at a time as stay under this number."""
LEAST_ROWS = 256
"""Rows of a chunk, at least: each reads the whole matrix, and adds to all of its gradient. At a vocabulary of 151,936
110 rows at a time took 1.13 x as long on two cores as 256, and 384 took 0.92 x."""
CACHED = 1 << 18
"""Values of a processor's caches: float32 sums take bfloat16 products in pieces of as many."""


@dataclass(frozen=True, slots=True)
class Head:
    """How hidden states become logits: `cap(scale x (hidden @ weight.T + bias))`."""

    weight: torch.Tensor
    """[V, D]"""
    bias: torch.Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None
    """cap(x) = softcap x tanh(x / softcap), as in Gemma 2."""


def chunk_rows(vocabulary: int, place: torch.device) -> int:
    """The rows whose logits are made at a time."""
    return max(LEAST_ROWS, (CHUNK_ELEMENTS if place.type == "cpu" else ON_ACCELERATOR) // vocabulary)


def linear_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor,
    smoothing: float = 0.0, into: torch.Tensor | None = None, share: float = 1.0,
) -> LossSum:
    """Summed loss of a micro-batch: hidden [1, S, D], labels and weights [1, S], targets i64[M] the supervised places.

    `smoothing` spreads this share of a target's probability evenly over the vocabulary (Szegedy et al., 2016,
    arXiv:1512.00567), as `F.cross_entropy(label_smoothing=…)` does.
    With `into` [V, D], the gradient of the head's matrix, times `share`, is added to it in forward and not returned:
    the sum then has to be given exactly `share` as its gradient. No float32 matrix is made for it, and of bfloat16 one.
    With M = 0 the sum is 0 and still hangs on the graph, so that every rank runs its backward.
    """
    rows = hidden.flatten(0, 1).index_select(0, targets)
    chosen, weight = labels.flatten()[targets], weights.flatten()[targets]
    nll, correct = _LinearCrossEntropy.apply(
        rows, head.weight, head.bias, chosen, weight, head.scale, head.softcap, smoothing, into, share,
        torch.is_grad_enabled(),
    )
    return LossSum(nll, correct, weight.sum(dtype=torch.float64), len(targets), share)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of `rows` [M, D] with the gradients made on the way."""

    @staticmethod
    def forward(ctx, rows, matrix, bias, labels, weights, scale, softcap, smoothing, into, share, training):
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        accurate = torch.promote_types(rows.dtype, torch.float32)
        if rows.dtype == products.NARROW and products.wide_is_faster(rows.device):
            rows, matrix = rows.to(accurate), matrix.to(accurate)
        nll = torch.zeros((), dtype=torch.promote_types(accurate, torch.float64), device=rows.device)
        correct = torch.zeros((), dtype=torch.int64, device=rows.device)
        grad_rows = torch.empty_like(rows) if wanted[0] else None
        begun = in_place = into is not None and wanted[1]
        grad_matrix = into if in_place else torch.empty_like(matrix, dtype=accurate) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=accurate) if bias is not None and wanted[2] else None
        size = min(chunk_rows(len(matrix), rows.device), max(1, len(rows)))
        held = rows.new_empty(size, len(matrix), dtype=accurate)  # once for all chunks: fresh pages cost time
        held_narrow = held if rows.dtype == accurate else rows.new_empty(size, len(matrix))
        product = None if grad_matrix is None or rows.dtype == accurate else torch.empty_like(matrix)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = held[: len(rows[part])]
            narrow = logits if held_narrow is held else held_narrow[: len(rows[part])]
            torch.mm(rows[part], matrix.T, out=narrow)
            _cap(_copied(narrow, logits), bias, scale, softcap)
            target, weight = labels[part].unsqueeze(1), weights[part].to(accurate).unsqueeze(1)
            scores, highest = logits.gather(1, target), logits.amax(1, keepdim=True)
            correct += (scores == highest).sum()
            if smoothing:
                scores.lerp_(logits.mean(1, keepdim=True), smoothing)
            slope = None if softcap is None else _slope(logits, softcap)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)
            nll += ((highest + total.log() - scores) * weight).sum(dtype=nll.dtype)
            if not any(wanted):
                continue
            grad = logits.mul_(weight / total).scatter_add_(1, target, -weight * (1 - smoothing))
            if smoothing:
                grad.sub_(weight * (smoothing / len(matrix)))
            if slope is not None:
                grad.mul_(slope)
            if scale != 1.0:
                grad.mul_(scale)
            narrow = _copied(grad, narrow)
            if grad_rows is not None:
                torch.mm(narrow, matrix, out=grad_rows[part])
            if grad_matrix is not None:
                _add_product(grad_matrix, narrow.T, rows[part], product, share if in_place else 1.0, first=not begun)
                begun = True
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if grad_matrix is not None and not begun:
            grad_matrix.zero_()
        ctx.share = share if in_place else None
        ctx.save_for_backward(grad_rows, None if in_place else grad_matrix, grad_bias)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx, above, _):
        assert ctx.share is None or above.device.type != "cpu" or float(above) == ctx.share, "a part was added already"
        grads = [None if grad is None else grad.mul_(above.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*grads, *[None] * 8)


def _copied(values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """`into` with these values in its number format; it may be they."""
    return into if into is values else into.copy_(values)


def _cap(logits: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None) -> None:
    """Make products of rows and matrix the logits [rows, V] they stand for."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _slope(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """d capped / d uncapped, from the capped logits."""
    return (logits / softcap).square_().neg_().add_(1)


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, product: torch.Tensor | None, share: float,
    first: bool,
) -> None:
    """total += share x left @ right, or = for the first; summed in the precision of `total`, by way of `product` if
    that is narrower. A processor widens what it adds into a fresh copy: in pieces, which stay in its caches.
    """
    if product is None:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right, alpha=share)
        return
    torch.mm(left, right, out=product)
    if first:
        total.copy_(product)
        return
    rows = len(total) if total.device.type != "cpu" else max(1, CACHED // total.shape[1])
    for part, more in zip(total.split(rows), product.split(rows), strict=True):
        part.add_(more, alpha=share)

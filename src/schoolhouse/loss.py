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
LEAST_ROWS, ENOUGH_ROWS = 256, 512
"""Rows of a chunk, at least: each chunk reads the whole matrix, and adds to all of its gradient. At a vocabulary of
151,936 110 rows at a time took 1.13 x as long on two cores as 256, and 384 took 0.92 x. A processor gains nothing by
more than enough of them, or than stay in its caches."""
CACHED = 1 << 20
"""Values that stay in a processor's caches: what is done to logits one after another, and sums of bfloat16 products in
float32, is done to as many at a time."""


class Workspace:
    """Memory for one chunk after another, and one micro-batch after another, on a processor, where fresh pages of
    matrices as wide as the vocabulary take a tenth of a step. An accelerator's allocator remembers by itself."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, use: str, like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] of anything, where `like` is. What was taken for the same `use` before is overwritten."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns, dtype=dtype)
        if (use, dtype) not in self._kept or self._kept[use, dtype].numel() < rows * columns:
            self._kept.pop((use, dtype), None)
            with torch.inference_mode(False):  # else it could serve nothing but inference from then on
                self._kept[use, dtype] = like.new_empty(rows * columns, dtype=dtype)
        return self._kept[use, dtype][: rows * columns].view(rows, columns)


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
    if place.type == "cpu":
        return max(LEAST_ROWS, min(max(ENOUGH_ROWS, CACHED // vocabulary), CHUNK_ELEMENTS // vocabulary))
    return max(LEAST_ROWS, ON_ACCELERATOR // vocabulary)


def linear_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, weights: torch.Tensor, targets: torch.Tensor,
    smoothing: float = 0.0, into: torch.Tensor | None = None, share: float = 1.0, workspace: Workspace | None = None,
) -> LossSum:
    """Summed loss of a micro-batch: hidden [1, S, D], labels and weights [1, S], targets i64[M] the supervised places.

    `smoothing` spreads this share of a target's probability evenly over the vocabulary (Szegedy et al., 2016,
    arXiv:1512.00567), as `F.cross_entropy(label_smoothing=…)` does.
    With `into` [V, D], the gradient of the head's matrix, times `share`, is added to it in forward and not returned:
    the sum then has to be given exactly `share` as its gradient. No matrix as large is made for it.
    A place of weight 0 adds nothing, whatever its label. With M = 0 the sum is 0 and still hangs on the graph, so that
    every rank runs its backward.
    """
    rows = hidden.flatten(0, 1).index_select(0, targets).to(head.weight.dtype)  # Mamba 2's are in float32
    chosen, weight = labels.flatten()[targets].clamp(min=0), weights.flatten()[targets]
    nll, correct = _LinearCrossEntropy.apply(
        rows, head.weight, head.bias, chosen, weight, head.scale, head.softcap, smoothing, into, share,
        torch.is_grad_enabled(), workspace or Workspace(),
    )
    return LossSum(nll, correct, weight.sum(dtype=torch.float64), len(targets), share)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of `rows` [M, D] with the gradients made on the way."""

    @staticmethod
    def forward(ctx, rows, matrix, bias, labels, weights, scale, softcap, smoothing, into, share, training, workspace):
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        learns = any(wanted)
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
        held = workspace.take("products", rows, size, len(matrix), rows.dtype)
        few = size if rows.device.type != "cpu" else max(1, CACHED // len(matrix))
        wide = held if rows.dtype == accurate else workspace.take("logits", rows, min(few, size), len(matrix), accurate)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            narrow = held[: len(rows[part])]
            torch.mm(rows[part], matrix.T, out=narrow)
            for some, its_labels, its_weights in zip(
                narrow.split(few), labels[part].split(few), weights[part].split(few), strict=True
            ):
                logits = some if wide is held else wide[: len(some)].copy_(some)
                _cap(logits, bias, scale, softcap)
                found, hits = _cross_entropy(logits, its_labels, its_weights.to(accurate), smoothing, softcap, learns)
                nll += found.sum(dtype=nll.dtype)
                correct += hits
                if not learns:
                    continue
                if scale != 1.0:
                    logits *= scale
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                if wide is not held:
                    some.copy_(logits)
            if grad_rows is not None:
                torch.mm(narrow, matrix, out=grad_rows[part])
            if grad_matrix is not None:
                _add_product(grad_matrix, narrow.T, rows[part], share if in_place else 1.0, not begun, workspace)
                begun = True
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
        return (*grads, *[None] * 9)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float, softcap: float | None,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss [R, 1] of logits [R, V], which are used up, and how many are highest at their label. Where
    wanted they become its gradient: by what they were before `softcap`, where there is one."""
    target, weight = labels.unsqueeze(1), weights.unsqueeze(1)
    scores, highest = logits.gather(1, target), logits.amax(1, keepdim=True)
    correct = ((scores == highest) & (weight != 0)).sum()
    if smoothing:
        scores.lerp_(logits.mean(1, keepdim=True), smoothing)
    slope = None if softcap is None or not gradient else (logits / softcap).square_().neg_().add_(1)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    loss = (highest + total.log() - scores) * weight
    if not gradient:
        return loss, correct
    logits.mul_(weight / total).scatter_add_(1, target, -weight * (1 - smoothing))
    if smoothing:
        logits.sub_(weight * (smoothing / logits.shape[1]))
    if slope is not None:
        logits.mul_(slope)
    return loss, correct


def _cap(logits: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None) -> None:
    """Make products of rows and matrix the logits [rows, V] they stand for."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, share: float, first: bool, workspace: Workspace
) -> None:
    """total += share x left @ right, or = for the first; summed in the precision of `total`. Narrower products are made
    in pieces: a processor widens what it adds into a fresh copy, which so stays in its caches.
    """
    if right.dtype == total.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right, alpha=share)
        return
    at_once = max(1, (CACHED if total.device.type == "cpu" else ON_ACCELERATOR) // total.shape[1])
    product = workspace.take("piece", right, min(at_once, len(total)), total.shape[1], right.dtype)
    for part, rows in zip(total.split(at_once), left.split(at_once), strict=True):
        torch.mm(rows, right, out=product[: len(rows)])
        part.copy_(product[: len(rows)]) if first else part.add_(product[: len(rows)], alpha=share)

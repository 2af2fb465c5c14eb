"""What a step may add to the plain loss while it teaches: label smoothing, noise on embeddings, a balance of experts.

Each is defined for one example, so that packs, micro-batches and processes change nothing:

    loss = sum over examples of [ sum over targets of weight x smoothed nll + balance x W x aux ] / N

W is the supervised weight of the example, N that of the whole step: with balance 0.001 an example counts exactly as
transformers' own loss of it alone, `nll / W + 0.001 aux`, times its share W / N of the step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from schoolhouse import crossing
from schoolhouse.config import Train
from schoolhouse.errors import ConfigError

COEFFICIENT, ASKED = "router_aux_loss_coef", "output_router_logits"
"""transformers' names for the weight of the balance loss, and for the switch that puts it into a model's own loss."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """The additions that are in force; none by default."""

    smoothing: float = 0.0
    """Share of each target's probability that is spread over the vocabulary."""
    noise: float = 0.0
    """NEFTune's alpha."""
    balance: float = 0.0
    """Weight of the balance loss of experts."""

    @property
    def apart(self) -> str:
        """Why examples that begin alike do not go through the model alike; empty where they do."""
        if self.noise:
            return "NEFTune draws noise for each example"
        return "the balance of experts is that of each example" if self.balance else ""

    def describe(self) -> str:
        """What is learnt, for the table of what is in force."""
        parts = ["cross-entropy of the supervised tokens"]
        parts += [f"label smoothing {self.smoothing:g}"] * bool(self.smoothing)
        parts += [f"NEFTune {self.noise:g}"] * bool(self.noise)
        parts += [f"balance loss of experts x {self.balance:g}"] * bool(self.balance)
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What random numbers of a step are keyed by, beside the example."""

    seed: int
    step: int


@dataclass(frozen=True, slots=True)
class Span:
    """Where the tokens of this process's part stand: `length` of them from `start` in a micro-batch of E examples."""

    boundaries: tuple[int, ...]
    """E + 1 offsets of the whole sequence."""
    start: int
    length: int

    def examples(self, device: torch.device) -> Tensor:
        """i64[S / U]: the example of each token."""
        ends = crossing.sent(torch.tensor(self.boundaries[1:]), device)
        return torch.searchsorted(ends, torch.arange(self.start, self.start + self.length, device=device), right=True)


def teaching(settings: Train, model: PreTrainedModel) -> Teaching:
    """The additions that the recipe, or the model's own configuration, asks for; refused where they cannot be."""
    own = model.config.get_text_config().to_dict()
    balance = settings.balance
    if balance is None:
        balance = (own.get(COEFFICIENT) or 0.0) if own.get(ASKED) else 0.0
    if balance and COEFFICIENT not in own:
        raise ConfigError(
            f"train.balance={balance:g}, and transformers defines no balance loss for {type(model).__name__}",
            required="a mixture of experts whose configuration has router_aux_loss_coef", where="train.balance",
            remedy="leave train.balance out, or set it to 0",
        )
    return Teaching(settings.label_smoothing, settings.neftune, balance)


@contextlib.contextmanager
def noisy(embeddings: nn.Module, alpha: float, pack: Sequence[int], span: Span, drawn: Drawn) -> Iterator[None]:
    """Inside, the embeddings of each example of T tokens carry noise (NEFTune; Jain et al., 2023, arXiv:2310.05914),
    uniform in +-alpha / sqrt(T D) and drawn by (seed, step, example) alone."""

    def add(_: nn.Module, __: tuple, found: Tensor) -> Tensor:
        return found + _noise(found, alpha, pack, span, drawn)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def _noise(like: Tensor, alpha: float, pack: Sequence[int], span: Span, drawn: Drawn) -> Tensor:
    """[1, S / U, D], of the tokens of the span; zero where a padding example stands behind those of the pack."""
    noise, width = torch.zeros_like(like), like.shape[-1]
    for index, (begin, end) in zip(pack, itertools.pairwise(span.boundaries), strict=False):
        first, last = max(begin, span.start), min(end, span.start + span.length)
        if first < last:
            words = np.random.SeedSequence([drawn.seed, drawn.step, index]).generate_state(1, np.uint64)
            generator = torch.Generator(like.device).manual_seed(int(words[0] >> np.uint64(1)))
            whole = torch.rand(end - begin, width, generator=generator, device=like.device, dtype=torch.float32)
            values = (2 * whole - 1) * (alpha / math.sqrt((end - begin) * width))
            noise[0, first - span.start : last - span.start] = values[first - begin : last - begin]
    return noise


def balance_loss(
    logits: Sequence[Tensor], chosen: int, worth: Tensor, span: Span, peers: dist.ProcessGroup | None
) -> Tensor:
    """Sum over examples of worth [E] x their balance loss (Switch Transformer, Fedus et al., 2021, arXiv:2101.03961,
    equations 4 to 6), the part of it that this process's tokens add.

    `logits` are the routers' [S / U, X] of every layer. As in transformers, an example's loss is X times the sum over
    experts of (share of its tokens, over all layers, that chose the expert) x (mean probability of the expert).
    """
    lengths = crossing.sent(torch.tensor(span.boundaries), worth.device).diff()
    owner = span.examples(worth.device)
    accurate = torch.promote_types(logits[0].dtype, torch.float32)
    counts = torch.zeros(len(lengths), logits[0].shape[-1], dtype=accurate, device=worth.device)
    shares = torch.zeros_like(counts)
    for layer in logits:
        probabilities = layer.softmax(-1, dtype=accurate)
        with torch.no_grad():
            taken = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
            counts.index_add_(0, owner, taken)
        shares = shares.index_add(0, owner, probabilities)
    if peers is not None:  # who chose what is no function of the weights: the product stays a sum over processes
        dist.all_reduce(counts, group=peers)
    rows = (len(logits) * lengths).to(accurate).square()
    return (worth.to(accurate) * counts.shape[1] * (counts * shares).sum(1) / rows).sum()

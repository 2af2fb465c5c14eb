"""The proof that examples of a pack do not see one another, made for each model before its first step.

A packed micro-batch has the loss of its examples, one at a time, by the model's own forward; and nothing of the later
examples moves when the first is another. The second finds what the first cannot: what a convolution or a recurrent
state carries over the edge may be small at the weights a model begins with, and grows while it is trained.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from schoolhouse.data import loader
from schoolhouse.data.vision import Sight
from schoolhouse.errors import ModelError
from schoolhouse.model import attention, elementwise, recurrent, sight
from schoolhouse.model.load import Student
from schoolhouse.parallel import fsdp
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.shares import share_out
from schoolhouse.types import MicroBatch, Vision

OPENING = 3
"""Tokens that two of the proof's sequences begin with."""
EACH = 2
"""Tokens of its sequences, behind what two begin with, to one that is supervised."""
MOVED = 1e-5
"""How far states may move with what they must not see: kernels of another size for experts with other tokens."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the proof of a student found."""

    loss: float
    """Of the micro-batch that was packed (nats, summed)."""
    difference: float
    """Relative, from the model's own loss of the same examples, one at a time."""


def prove(student: Student, seeing: Sight | None = None) -> Proof:
    """Compare a packed micro-batch of a few examples with the model's own forward, one example at a time.

    A model whose logits pass through something we do not know, or whose layers let examples of a pack see one another,
    is refused here with a ModelError instead of being trained wrongly. Two examples begin alike, and the last one, of
    which the first token is supervised, with nothing that stands before it. A model that sees is shown an image in its
    last example, and finds the positions of the first way for itself.
    """
    sequences, vision = _sequences(student, seeing)
    training = student.model.training
    student.model.eval()
    for layer in recurrent.layers(student.model):
        layer.train()  # as they will compute: some kernels are taken in training alone
    try:
        with torch.no_grad(), _understood(student):
            packed, states = _states(student, _pack(sequences, seeing, vision))
            others = [_other(student, sequences[0], seeing), *sequences[1:]]
            moved = _moved(states, _states(student, _pack(others, seeing, vision))[1])
            student.model.set_attn_implementation("eager")
            with elementwise.as_written(student.model):
                alone = sum(
                    _own_loss(student.model, sequence.to(student.device), chosen.to(student.device), seeing, seen)
                    for sequence, chosen, seen in zip(
                        sequences, _supervised(sequences), [*[None] * (len(sequences) - 1), vision], strict=True)
                )
    finally:
        sight.attend(student.model, attention.NAME)
        student.model.train(training)
    difference = abs(float(packed) - float(alone)) / max(abs(float(alone)), 1e-6)
    if not difference < 2e-5:  # float32 kernels agree to 1e-6; a pack that leaks was seen to differ by 2e-4 and more
        raise ModelError(
            f"{type(student.model).__name__} cannot be trained packed: its own loss is {float(alone):.6f}, "
            f"packed {float(packed):.6f}",
            required="the same loss for two examples in one pack as for each alone",
            where=str(student.model.config.name_or_path),
            remedy="choose another model, or report its architecture",
        )
    if not moved < MOVED:
        raise ModelError(
            f"{type(student.model).__name__} cannot be trained packed: with another first example the states of the "
            f"others move by {moved:.1e} of their length",
            required="layers in which no example of a pack sees another: states along the sequence are kept apart "
            "where a layer with a convolution of its own is told where examples end",
            where=str(student.model.config.name_or_path), remedy="choose another model, or report its architecture",
        )
    return Proof(float(packed), difference)


@contextlib.contextmanager
def _understood(student: Student) -> Iterator[None]:
    """Inside, a model that is called in a way it does not know is one that cannot be trained packed."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"{type(student.model).__name__} cannot be trained packed: {type(error).__name__}: {error}",
            required="a model whose layers hand arguments on to transformers' attention interface, and take positions",
            where=str(student.model.config.name_or_path), remedy="choose another model, or report its architecture",
        ) from error


def _states(student: Student, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a micro-batch, and the last hidden states [M, D] of the targets of all examples but the first."""
    seen: list[torch.Tensor] = []
    hook = student.model.base_model.register_forward_hook(lambda *given: seen.append(given[-1].last_hidden_state))
    try:
        nll = student.loss(micro).nll
    finally:
        hook.remove()
    computed = student.folded(micro)
    later = computed.targets[computed.targets >= computed.boundaries[1]]
    return nll, seen[0].flatten(0, 1)[later]


def _other(student: Student, sequence: torch.Tensor, seeing: Sight | None) -> torch.Tensor:
    """A sequence with other tokens behind what it may begin with as another one."""
    found = torch.cat([sequence[:OPENING], (sequence[OPENING:] + 1) % student.vocabulary])
    return found if seeing is None else torch.where(found == seeing.token, sequence, found)


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    """How far the states of a token moved at most, as a share of their length."""
    return float(((after - before).norm(dim=1) / before.norm(dim=1)).max())


@torch.no_grad()
def packed_loss(student: Student, seeing: Sight | None = None) -> float:
    """The loss of the proof's micro-batch, dropout off, by all processes that share it (nats, summed)."""
    sequences, vision = _sequences(student, seeing)
    training = student.model.training
    student.model.eval()
    nll = student.loss(_pack(sequences, seeing, vision)).nll
    student.model.train(training)
    fsdp.rest(student)
    return float(student.mesh.sum(nll)) / student.mesh.data_ranks


def _sequences(
    student: Student, seeing: Sight | None, tokens: int = 7
) -> tuple[list[torch.Tensor], Vision | None]:
    """Sequences of tokens spread over the vocabulary, the same every time, and the image that the last one shows.

    Those of a model that sees, which shares nothing, begin with different tokens."""
    drawn = torch.arange(1, 3 * tokens + 4) * 7919 % student.vocabulary
    first, second, third = drawn[: tokens + 1], drawn[tokens + 1 : 2 * tokens + 3], drawn[2 * tokens + 3 :]
    if seeing is not None:
        return _with_image([first, second], seeing, student.device, student.mesh)
    return [first, torch.cat([first[:OPENING], second[OPENING:]]), third], None


def _supervised(sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """bool[T] of each sequence of T + 1 tokens: every `EACH`th is supervised, behind what it begins with as another."""
    found = []
    for one in sequences:
        alike = sum(torch.equal(one[:OPENING], other[:OPENING]) for other in sequences) > 1
        behind = torch.arange(len(one) - 1) - (OPENING if alike else 0)
        found.append((behind >= 0) & (behind % EACH == 0))
    return found


def _with_image(
    sequences: list[torch.Tensor], seeing: Sight, place: torch.device, mesh: Mesh
) -> tuple[list[torch.Tensor], Vision]:
    """The sequences with the places of an image inside the second one, and the image: the first process of a group
    that shares a micro-batch has its pixels."""
    pixels, grid = seeing.eyes.trial()
    plain = [torch.where(one == seeing.token, (one + 1) % seeing.token, one) for one in sequences]
    places = torch.full((seeing.eyes.tokens(grid),), seeing.token)
    second = torch.cat([plain[1][:2], places, plain[1][2:]])
    shares = None if mesh.ulysses == 1 else share_out([1], mesh.ulysses)
    seen = torch.from_numpy(pixels if mesh.ulysses_rank == 0 else pixels[:0]).to(place)
    return [plain[0], second], Vision(seen, torch.tensor([grid]), shares=shares)


def _pack(sequences: list[torch.Tensor], seeing: Sight | None, vision: Vision | None) -> MicroBatch:
    """Token sequences as one micro-batch; the image, where there is one, is the last sequence's.

    Not every token is supervised, so that the proof sees it where something is computed for targets alone.
    """
    lengths, chosen = [len(sequence) - 1 for sequence in sequences], _supervised(sequences)
    supervised, ids = torch.cat(chosen), [sequence[:-1].numpy() for sequence in sequences]
    shared = None if seeing is not None else loader.shared(ids, [one.numpy() for one in chosen])
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    if seeing is not None and seeing.family.placed_by_grid:
        grids = [[], [tuple(vision.grid[0].tolist())]]
        placed = [seeing.positions(one[:-1].numpy(), grid) for one, grid in zip(sequences, grids, strict=True)]
        positions = torch.cat([torch.from_numpy(one) for one in placed], dim=1).unsqueeze(1)
    return MicroBatch(
        input_ids=torch.cat([sequence[:-1] for sequence in sequences]).unsqueeze(0),
        labels=torch.cat([sequence[1:] for sequence in sequences]).unsqueeze(0),
        weights=supervised.float().unsqueeze(0),
        positions=positions,
        boundaries=tuple(itertools.accumulate(lengths, initial=0)),
        targets=supervised.nonzero().flatten(),
        pack=(), supervised=float(supervised.sum()), vision=vision, shared=shared,
    )


def _own_loss(
    model: PreTrainedModel, sequence: torch.Tensor, chosen: torch.Tensor, seeing: Sight | None, vision: Vision | None
) -> torch.Tensor:
    """The summed loss of the supervised tokens, bool[T] of a sequence of T + 1, by the model's own logits."""
    ids = sequence[:-1].unsqueeze(0)
    seen = {} if vision is None else sight.own_inputs(model, vision, ids == seeing.token)
    logits = model(input_ids=ids, use_cache=False, **seen).logits[0]
    return torch.nn.functional.cross_entropy(logits[chosen].float(), sequence[1:][chosen], reduction="sum")

"""Load a student: weights from safetensors, our attention, the precision asked for; no code of the model's author."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from schoolhouse import loss
from schoolhouse.config import Lora, Model
from schoolhouse.data.vision import Sight
from schoolhouse.errors import ConfigError, MeshError, ModelError
from schoolhouse.loss import Head
from schoolhouse.model import attention, families, lora, sight
from schoolhouse.parallel import ulysses
from schoolhouse.parallel.mesh import ALONE, Mesh
from schoolhouse.types import LossSum, MicroBatch, Vision


class Student(nn.Module):
    """A causal language model with its way to the loss, on its place in the mesh.

    It is a module so that all its weights, those of the head too, are whole while its `forward` runs.
    """

    def __init__(self, model: PreTrainedModel, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def head(self) -> Head:
        """The model's way from hidden states to logits, with the weights as they stand now."""
        return families.head(self.model)

    def loss(self, micro: MicroBatch) -> LossSum:
        """The loss of this process's part of a micro-batch [1, S]; only supervised positions meet the vocabulary."""
        part = ulysses.split(micro, self.mesh)
        nll, correct, supervised = self(part)
        return LossSum(nll, correct, supervised, len(part.targets))

    def forward(self, part: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Negative log-likelihood, correct targets and supervised weight of this process's part [1, S / U]."""
        hidden = self.model.base_model(
            input_ids=part.input_ids,
            attention_mask=None,
            position_ids=part.positions,
            use_cache=False,
            layout=attention.layout(part.boundaries, part.input_ids.device, self.mesh.ulysses_group),
            **sight.inputs(self.model, part.vision),
        ).last_hidden_state
        found = loss.linear_cross_entropy(hidden, self.head, part.labels, part.weights, part.targets)
        return found.nll, found.correct, found.supervised


def device(setting: str, local: int = 0) -> torch.device:
    """The torch device of the recipe for process `local` of a machine; `auto` is the accelerator where there is one."""
    if setting != "auto":
        try:
            place = torch.device(setting)
            torch.empty(0, device=place)
            return place
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"the device {setting!r} is not there: {str(error).splitlines()[0]:.120}",
                required="auto, cpu, or an accelerator of this machine", where="device", remedy="set device=auto",
            ) from None
    kind = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if kind is None else torch.device(kind.type, local % torch.accelerator.device_count())


def load(
    directory: Path, settings: Model, place: torch.device, mesh: Mesh = ALONE, adapters: Lora | None = None
) -> Student:
    """The model of a directory in float32 on `place`, ready to train; raises ModelError where it cannot be exact."""
    attention.register()
    try:
        model = sight.loader(directory).from_pretrained(
            directory, dtype=torch.float32, attn_implementation=sight.attentions(directory, attention.NAME),
            trust_remote_code=False, use_safetensors=True, local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the model does not load: {' '.join(str(error).split())[:200]}",
            required="a causal language model of transformers, in safetensors, whose attention can be exchanged",
            where=str(directory), remedy="check config.json and the weights; models with code of their own are refused",
        ) from None
    if mesh.world > 1:
        raise MeshError(
            f"{mesh.world} processes: weights cannot be cut yet", required="one process", where="--nproc",
            remedy="use one process",
        )
    if sight.sees(model):
        sight.prepare(model)
    if adapters is not None:
        lora.inject(model, adapters)
    sight.freeze(model, settings.freeze)
    model.to(place).train()
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    return Student(model, mesh)


def plain(directory: Path) -> PreTrainedModel:
    """The model of a directory as transformers alone loads it, in the number format of its files."""
    return sight.loader(directory).from_pretrained(
        directory, dtype="auto", trust_remote_code=False, use_safetensors=True, local_files_only=True
    )


def skeleton(directory: Path, adapters: Lora | None) -> PreTrainedModel:
    """The model of a directory without its weights: names and shapes only, on the device `meta`."""
    with torch.device("meta"):
        configuration = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = sight.loader(directory).from_config(configuration, trust_remote_code=False)
        if adapters is not None:
            lora.inject(model, adapters)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each block in forward; backward computes the rest again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.2x; the new name is not in 5.17
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def prove(student: Student, seeing: Sight | None = None, tokens: int = 7) -> float:
    """Compare a packed micro-batch of two examples with the model's own forward, one example at a time.

    Returns the largest relative difference of the losses. A model whose logits pass through something we do not know,
    or whose layers let examples of a pack see one another, is refused here instead of being trained wrongly. A model
    that sees is shown an image in its second example, and finds the positions of the first way for itself.
    """
    vocabulary = len(student.head.weight)
    drawn = torch.arange(1, 2 * tokens + 4) * 7919 % vocabulary  # spread over the vocabulary, the same every time
    sequences, vision = [drawn[: tokens + 1], drawn[tokens + 1 :]], None
    if seeing is not None:
        sequences, vision = _with_image(sequences, seeing, student.device)
    training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            packed = student.loss(_pack(sequences, student.device, seeing, vision)).nll
            student.model.set_attn_implementation("eager")
            alone = sum(
                _own_loss(student.model, sequence.to(student.device), seeing, vision if number else None)
                for number, sequence in enumerate(sequences)
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
    return difference


def _with_image(
    sequences: list[torch.Tensor], seeing: Sight, place: torch.device
) -> tuple[list[torch.Tensor], Vision]:
    """The sequences with the places of an image inside the second one, and the image."""
    pixels, grid, tokens = seeing.trial()
    plain = [torch.where(one == seeing.token, (one + 1) % seeing.token, one) for one in sequences]
    places = torch.full((tokens,), seeing.token)
    second = torch.cat([plain[1][:2], places, plain[1][2:]])
    return [plain[0], second], Vision(torch.from_numpy(pixels).to(place), torch.tensor([grid], device=place))


def _pack(
    sequences: list[torch.Tensor], place: torch.device, seeing: Sight | None, vision: Vision | None
) -> MicroBatch:
    """Token sequences as one fully supervised micro-batch; the image, where there is one, is the last sequence's."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    weights = torch.ones(1, sum(lengths), device=place)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    if seeing is not None and seeing.family.placed_by_grid:
        grids = [[], [tuple(vision.grid[0].tolist())]]
        placed = [seeing.positions(one[:-1].numpy(), grid) for one, grid in zip(sequences, grids, strict=True)]
        positions = torch.cat([torch.from_numpy(one) for one in placed], dim=1).unsqueeze(1)
    return MicroBatch(
        input_ids=torch.cat([sequence[:-1] for sequence in sequences]).unsqueeze(0).to(place),
        labels=torch.cat([sequence[1:] for sequence in sequences]).unsqueeze(0).to(place),
        weights=weights,
        positions=positions.to(place),
        boundaries=(0, lengths[0], sum(lengths)),
        targets=torch.arange(sum(lengths), device=place),
        pack=(), supervised=float(sum(lengths)), vision=vision,
    )


def _own_loss(
    model: PreTrainedModel, sequence: torch.Tensor, seeing: Sight | None, vision: Vision | None
) -> torch.Tensor:
    """The summed loss by the model's own logits."""
    ids = sequence[:-1].unsqueeze(0)
    seen = {} if vision is None else sight.own_inputs(model, vision, ids == seeing.token)
    logits = model(input_ids=ids, use_cache=False, **seen).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), sequence[1:], reduction="sum")

"""Load a student: weights from safetensors, our attention, the precision asked for; no code of the model's author."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from schoolhouse import loss
from schoolhouse.config import Lora, Model
from schoolhouse.errors import ConfigError, MeshError, ModelError
from schoolhouse.loss import Head
from schoolhouse.model import attention, families, lora
from schoolhouse.parallel import ulysses
from schoolhouse.parallel.mesh import ALONE, Mesh
from schoolhouse.types import LossSum, MicroBatch


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
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention.NAME,
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
    if adapters is not None:
        lora.inject(model, adapters)
    model.to(place).train()
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    return Student(model, mesh)


def plain(directory: Path) -> PreTrainedModel:
    """The model of a directory as transformers alone loads it, in the number format of its files."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", trust_remote_code=False, use_safetensors=True, local_files_only=True
    )


def skeleton(directory: Path, adapters: Lora | None) -> PreTrainedModel:
    """The model of a directory without its weights: names and shapes only, on the device `meta`."""
    with torch.device("meta"):
        configuration = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)
        if adapters is not None:
            lora.inject(model, adapters)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each block in forward; backward computes the rest again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.2x; the new name is not in 5.17
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def prove(student: Student, tokens: int = 7) -> float:
    """Compare a packed micro-batch of two examples with the model's own forward, one example at a time.

    Returns the largest relative difference of the losses. A model whose logits pass through something we do not know,
    or whose layers let examples of a pack see one another, is refused here instead of being trained wrongly.
    """
    vocabulary = len(student.head.weight)
    drawn = torch.arange(1, 2 * tokens + 4) * 7919 % vocabulary  # spread over the vocabulary, the same every time
    sequences = [drawn[: tokens + 1], drawn[tokens + 1 :]]
    training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            packed = student.loss(_pack(sequences, student.device)).nll
            student.model.set_attn_implementation("eager")
            alone = sum(_own_loss(student.model, sequence.to(student.device)) for sequence in sequences)
    finally:
        student.model.set_attn_implementation(attention.NAME)
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


def _pack(sequences: list[torch.Tensor], place: torch.device) -> MicroBatch:
    """Token sequences as one fully supervised micro-batch."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    weights = torch.ones(1, sum(lengths), device=place)
    return MicroBatch(
        input_ids=torch.cat([sequence[:-1] for sequence in sequences]).unsqueeze(0).to(place),
        labels=torch.cat([sequence[1:] for sequence in sequences]).unsqueeze(0).to(place),
        weights=weights,
        positions=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(place),
        boundaries=(0, lengths[0], sum(lengths)),
        targets=torch.arange(sum(lengths), device=place),
        pack=(), supervised=float(sum(lengths)),
    )


def _own_loss(model: PreTrainedModel, sequence: torch.Tensor) -> torch.Tensor:
    """The summed loss by the model's own logits."""
    logits = model(input_ids=sequence[:-1].unsqueeze(0), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), sequence[1:], reduction="sum")

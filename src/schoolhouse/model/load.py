"""Load a student: weights from safetensors, our attention, the precision asked for; no code of the model's author."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import ModelOutput

from schoolhouse import crossing, inert, loss
from schoolhouse.config import Lora, Model
from schoolhouse.data import loader
from schoolhouse.errors import ConfigError, ModelError
from schoolhouse.loss import Head
from schoolhouse.model import (
    adapter_files,
    attention,
    blocks,
    elementwise,
    families,
    float8,
    flops,
    fourbit,
    kernels,
    last_block,
    layouts,
    lora,
    products,
    recurrent,
    shared_prefixes,
    sight,
    sizes,
    teaching,
    varlen,
)
from schoolhouse.model.flops import Work
from schoolhouse.model.offload import to_host
from schoolhouse.model.teaching import Drawn, Span, Teaching
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
        self._only_targets = last_block.only_targets(model)
        recurrent.keep_apart(model)
        self.mesh = mesh
        self.exchange = ulysses.exchange(mesh)
        self.teaching = Teaching()
        """What a step that teaches adds to the plain loss."""
        self.kernels = varlen.Kernels()
        """The kernels of attention that proved themselves on the device."""
        self.multiple = 1
        """What the tokens and targets of a micro-batch are filled up to multiples of, where it has no images."""
        self.totals: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None
        """Where the gradients of a trained table of tokens are summed up, if they may be added there in place."""
        self._workspace = loss.Workspace()
        self._apart = shared_prefixes.why_not(model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mesh.device or self.model.device

    @property
    def vocabulary(self) -> int:
        """The number of tokens the head knows."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def head(self) -> Head:
        """The model's way from hidden states to logits, with the weights as they stand now."""
        return families.head(self.model)

    @functools.cached_property
    def work(self) -> Work:
        """What a step costs that trains the model as it is now."""
        return flops.work(self.model)

    @property
    def apart(self) -> str:
        """Why examples that begin alike are computed apart; empty where what they begin with is computed once."""
        return self._apart or self.teaching.apart or self.kernels.whole

    def add_in_place(self, totals: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Have the gradients of embedding and head added to `totals` of them while they are made, instead of filling
        matrices as large as the vocabulary in every micro-batch; on a processor an embedding's has the rows that it
        met. Weights that are cut among processes keep autograd's way, since their gradients travel first."""
        if self.mesh.world > 1:
            return
        self.totals = totals
        embeddings = self.model.get_input_embeddings()
        if self.device.type == "cpu" and isinstance(embeddings, nn.Embedding) and embeddings.weight.requires_grad:
            embeddings.sparse = True

    def loss(self, micro: MicroBatch, drawn: Drawn | None = None, supervised: float = 1.0) -> LossSum:
        """The loss of this process's part of a micro-batch [1, S]; only supervised positions meet the vocabulary.

        With `drawn`, the step whose random numbers are meant, it is what the step teaches (`self.teaching`); without,
        it is the plain loss. Its gradient counts 1 / `supervised`, the weight of the step.
        """
        micro = self.folded(micro)
        spared, fills = micro.shared.begins if micro.shared else (), self.multiple > 1 and micro.vision is None
        if fills:
            micro = ulysses.filled(micro, self.multiple * self.mesh.ulysses)
        part, share = ulysses.split(micro, self.mesh), 1.0 / supervised
        tokens = len(part.targets)
        if fills:
            part = sizes.with_more_targets(part, self.multiple)
        # what is a tensor by itself would be moved by FSDP, which waits
        worth = crossing.sent(_worth(micro, part), self.device) if self.teaching.balance else None
        nll, correct, weight = self(part, drawn, worth, share)
        return LossSum(nll, correct, weight, tokens, share, spared)

    def folded(self, micro: MicroBatch) -> MicroBatch:
        """A micro-batch as the model computes it: what examples begin with alike once, where that is possible."""
        if micro.shared is None:
            return micro
        return shared_prefixes.unfolded(micro) if self.apart else shared_prefixes.fold(micro)

    def forward(
        self, part: MicroBatch, drawn: Drawn | None = None, worth: torch.Tensor | None = None, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, correct targets and supervised weight of this process's part [1, S / U]; `worth` [E] of examples."""
        ids, part = part.input_ids, loader.placed(part, self.device)
        visual = None if part.vision is None else sight.together(self.model, ids)
        head = self.head
        totals = [None, None]
        if torch.is_grad_enabled():
            totals = [self.totals(one) for one in (head.weight, self.model.get_input_embeddings().weight)]
        added = Teaching() if drawn is None else self.teaching
        length = part.labels.shape[1]
        span = Span(part.boundaries, length * self.mesh.ulysses_rank, length)
        with contextlib.ExitStack() as inside:
            if added.noise:
                seen = span if part.vision is None or part.vision.part is None else Span(
                    part.boundaries, 0, part.input_ids.shape[1])
                embeddings = self.model.get_input_embeddings()
                inside.enter_context(teaching.noisy(embeddings, added.noise, part.pack, seen, drawn))
            out = self.model.base_model(
                input_ids=part.input_ids,
                attention_mask=None,
                position_ids=part.positions,
                use_cache=False,
                **({"targets": part.targets} if self._only_targets and len(part.targets) else {}),
                layout=layouts.layout(
                    part.boundaries, self.device, self.exchange, visual, kernels=self.kernels, shared=part.shared,
                ),
                **({"output_router_logits": True} if added.balance else {}),
                **sight.inputs(self.model, part.vision, ids, self.exchange),
            )
        found = loss.linear_cross_entropy(
            out.last_hidden_state, head, part.labels, part.weights, part.targets, added.smoothing, totals[0], share,
            self._workspace,
        )
        nll = found.nll + self._balance(out, worth, span, added.balance) if added.balance else found.nll
        return nll, found.correct, found.supervised

    def _balance(self, out: ModelOutput, worth: torch.Tensor, span: Span, weight: float) -> torch.Tensor:
        """The balance loss of this part, weighted; raises ModelError where the model shows no routers' logits."""
        if not out.router_logits:
            raise ModelError(
                f"{type(self.model).__name__} does not return its routers' logits", where="train.balance",
                required="the logits of every router, which the balance loss is made of", remedy="set train.balance=0",
            )
        chosen = self.model.config.get_text_config().num_experts_per_tok
        peers = None if self.exchange is None else self.exchange.peers
        return weight * teaching.balance_loss(out.router_logits, chosen, worth, span, peers)


def _worth(micro: MicroBatch, part: MicroBatch) -> torch.Tensor:
    """The supervised weight of each example of the whole micro-batch [E]; of one that only pads it, 0."""
    ends = torch.tensor(part.boundaries).clamp(max=micro.weights.shape[1])
    sums = torch.nn.functional.pad(micro.weights[0].double().cumsum(0), (1, 0))
    return sums[ends].diff()


def device(setting: str, local: int = 0) -> torch.device:
    """The torch device of the recipe for process `local` of a machine; `auto` is the accelerator where there is one."""
    if setting == "auto":
        found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        setting = found.type
    try:
        place = torch.device(setting)
        if place.type != "cpu" and place.index is None:
            place = torch.device(place.type, local % max(1, torch.accelerator.device_count()))
        torch.empty(0, device=place)
        return place
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the device {setting!r} is not there: {str(error).splitlines()[0]:.120}",
            required="auto, cpu, or an accelerator of this machine", where="device", remedy="set device=auto",
        ) from None


def load(
    directory: Path, settings: Model, place: torch.device, adapters: Lora | None = None, *,
    number: torch.dtype = torch.float32, computes_on: torch.device | None = None, lighter: bool = True,
    start: Path | None = None,
) -> Student:
    """The model of a directory on `place`, ready to train; raises ModelError where it cannot be exact.

    In the number format of its files and on the CPU, weights stay in the files: they are mapped, and take no memory.
    Where it will compute elsewhere, on `computes_on`, matrices in 4 bits are made, and stay, there; kernels and what is
    recomputed are chosen for it. Where it is not to be `lighter`, parts that are known (`elementwise`) compute as
    transformers wrote them. Its adapters are new, or those of the directory `start`.
    """
    attention.register()
    with _refused(directory):
        model, found = sight.loader(directory).from_pretrained(
            directory, dtype=number, attn_implementation=sight.attentions(directory, attention.NAME),
            trust_remote_code=inert.allowed(), use_safetensors=True, local_files_only=True, output_loading_info=True,
        )
    _refuse_missing(directory, found["missing_keys"])
    if sight.sees(model):
        sight.prepare(model)
    sight.freeze(model, settings.freeze)
    families.refuse(model)
    if adapters is not None:
        lora.inject(model, adapters)
        if start is not None:
            adapter_files.begin_with(start, model, adapters)
        if adapters.base == "nf4":
            fourbit.narrow(model, computes_on or place)
    if settings.new_tokens:
        lora.refuse_frozen_words(model)
    if settings.liger:
        kernels.fuse(model, computes_on or place)
    if lighter:
        widened = products.widened(computes_on or place, settings.precision)  # then PEFT multiplies, by way of float32
        elementwise.lighten(
            model, blocks=not settings.liger and not settings.compile, adapted=not widened and not settings.compile)
    if settings.float8:
        float8.narrow(model, computes_on or place)
    (model if place.type == "cpu" else model.to(place)).train()  # it was read on the CPU
    student = Student(model)
    if settings.compile:
        blocks.compile_blocks(model, computes_on or place)
    if settings.activation_checkpointing:
        blocks.compute_again(
            model, settings.precision, computes_on or place,
            keep_attention=settings.activation_checkpointing == "selective",
            offload=to_host(computes_on or place) if settings.activation_offload else None,
        )
    return student


@contextlib.contextmanager
def _refused(directory: Path, *more: type[Exception]) -> Iterator[None]:
    """Inside, what transformers cannot load is a ModelError; also where it says so by `more`."""
    try:
        yield
    except (OSError, ValueError, KeyError, *more, *inert.faults()) as error:
        inert.refuse_code(error, directory)
        raise ModelError(
            f"the model does not load: {' '.join(str(error).split())[:200]}",
            required="a causal language model of transformers, in safetensors, whose attention can be exchanged",
            where=str(directory), remedy="check config.json and the weights",
        ) from None


def _refuse_missing(directory: Path, names: Collection[str]) -> None:
    """Raise ModelError for weights that are in no file: transformers would draw them at random, and say so in a log."""
    if names:
        raise ModelError(
            f"{len(names)} weights are in no file, e.g. {min(names)}", required="a file with every weight of the model",
            where=str(directory), remedy="copy the missing files; config.json may name another model than the weights",
        )


def plain(directory: Path) -> PreTrainedModel:
    """The model of a directory as transformers alone loads it, in the number format of its files."""
    return sight.loader(directory).from_pretrained(
        directory, dtype="auto", trust_remote_code=inert.allowed(), use_safetensors=True, local_files_only=True
    )


def skeleton(directory: Path, adapters: Lora | None, frozen: tuple[str, ...] = ()) -> PreTrainedModel:
    """The model of a directory without its weights: names and shapes only, on the device `meta`."""
    with torch.device("meta"):
        with _refused(directory, ImportError, AttributeError, TypeError):  # by a configuration with holes
            configuration = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=inert.allowed())
            model = sight.loader(directory).from_config(configuration, trust_remote_code=inert.allowed())
        sight.freeze(model, frozen)
        families.refuse(model)
        if adapters is not None:
            lora.inject(model, adapters)
    return model

"""LoRA through PEFT: a frozen model learns through small factors beside its matrices (Hu et al., 2021, 2106.09685).

    y = W x + scale B A x        scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski, 2023, 2312.03732)

DoRA (Liu et al., 2024, 2402.09353) also learns the length of each row of W + scale B A. Modules named in
`modules_to_save` are trained whole and in place, so that tied embeddings stay one tensor.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from schoolhouse.config import Lora
from schoolhouse.errors import ConfigError
from schoolhouse.model import recurrent

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

ADAPTER = "default"
"""The name PEFT gives an adapter that nobody named."""
RENAMED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""In a mixture PEFT reads these names as the experts' of transformers 4, and adapts stacks instead of layers."""
BASE = ".base_layer"
"""What PEFT puts before the name of a tensor it stands around."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """One tensor of the plain model and the module that adapts it."""

    tensor: str
    """Its name in the plain model."""
    module: str
    """The PEFT module's name in the adapted model."""
    stack: bool = False
    """A stack of experts' matrices [experts, …, …]."""
    transposed: bool = False
    """The stack holds [experts, in, out] (GPT-OSS), not [experts, out, in]."""
    embedding: bool = False


def inject(model: PreTrainedModel, settings: Lora) -> None:
    """Freeze the model and put adapters in; raises ConfigError where a target matches nothing or cannot be adapted."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    whole = [name for name, _ in _whole(model, settings)]
    wanted = {*_experts(model, settings), *(f"{name}.weight" for name in _modules(model, settings))}
    configuration = config(model, settings)
    configuration.modules_to_save, configuration.ensure_weight_tying = None, False  # trained in place, below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers 5.2x renamed
        try:
            inject_adapter_in_model(configuration, model, ADAPTER)
        except ValueError as error:
            raise ConfigError(
                f"PEFT does not adapt {type(model).__name__}: {' '.join(str(error).split())[:200]}",
                required="modules beside which PEFT puts adapters", where="lora.targets", remedy="choose other targets",
            ) from None
    found = {one.tensor for one in adapted(model)}
    assert found == wanted, f"PEFT adapted other tensors than were asked for: {sorted(found ^ wanted)[:3]}"
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _begin_in_float32(module)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)


@torch.no_grad()
def _begin_in_float32(layer: LoraLayer) -> None:
    """PEFT rounds adapters to the number format of the matrix beside them: they are drawn again, and DoRA's lengths of
    its rows measured again. Beside a wide matrix too, so that a seed's draws depend on no format."""
    adapters = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B, layer.lora_magnitude_vector)
    for one in (one for group in adapters for one in group.parameters()):
        one.data = one.data.to(torch.promote_types(one.dtype, torch.float32))
    layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    for lengths in layer.lora_magnitude_vector.values():
        first, second = (
            (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) if ADAPTER in layer.lora_A
            else (layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER])
        )
        lengths.update_layer(
            base_layer=layer.get_base_layer(), lora_A=first, lora_B=second, scaling=layer.scaling[ADAPTER]
        )


def refuse_frozen_words(model: PreTrainedModel) -> None:
    """Raise ConfigError where new tokens would never learn: their rows are frozen in the embeddings or the head."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not all(one.requires_grad for one in module.parameters()):
            names = [name_of(model, one) for one in (model.get_input_embeddings(), model.get_output_embeddings())]
            raise ConfigError(
                f"model.new_tokens, and {name_of(model, module)} is frozen", where="model.new_tokens",
                required="embeddings and head that are trained, or the new tokens stay the mean of all others",
                remedy="set lora.modules_to_save: "
                f"[{', '.join(dict.fromkeys(name.rsplit('.', 1)[-1] for name in names))}], or freeze no language part",
            )


def config(model: PreTrainedModel, settings: Lora, base: str | None = None) -> LoraConfig:
    """PEFT's own configuration, for a plain model whose directory or hub id is `base`."""
    from peft import LoraConfig

    parameters, whole, modules = _experts(model, settings), _whole(model, settings), _modules(model, settings)
    if _stacks(model):
        parameters += [f"{name}.weight" for name in modules if name.endswith(RENAMED)]
        modules = [name for name in modules if not name.endswith(RENAMED)]
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
        use_rslora=settings.rslora, use_dora=settings.dora, task_type="CAUSAL_LM", base_model_name_or_path=base,
        target_modules=_shortest(model, modules), target_parameters=parameters or None,
        modules_to_save=sorted(name for name, _ in whole) or None,
        ensure_weight_tying=tied(model) and any(module is model.get_input_embeddings() for _, module in whole),
    )


def adapted(model: nn.Module) -> list[Adapted]:
    """The tensors of the plain model that adapters stand beside."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = []
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            plain = f"{name.replace(BASE, '')}.{module.parameter_name}"
            stack = module.get_param().ndim == 3
            found.append(Adapted(plain, name, stack, stack and not module._did_swap_in_out_features))
        elif isinstance(module, LoraLayer):
            embedding = isinstance(module.get_base_layer(), nn.Embedding)
            found.append(Adapted(f"{name.replace(BASE, '')}.weight", name, embedding=embedding))
    return found


def plain_name(name: str) -> str:
    """A parameter's name in the model before adapters were put in."""
    return name.replace(BASE, "")


def describe(model: nn.Module, settings: Lora) -> str:
    """How much is adapted, of which kinds, for the table of what is in force."""
    beside = {one.tensor for one in adapted(model)}
    every, reached = Counter(), Counter()
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if parameter.ndim < 2 or "lora_" in name:
            continue
        every[kind(plain)] += 1
        reached[kind(plain)] += plain in beside
    whole = Counter(kind(name) for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name)
    parts = [f"{name} {reached[name]} of {every[name]}" for name in every if reached[name]]
    left = [f"{name} {every[name]}" for name in every if not reached[name] and not whole[name]]
    how = "DoRA" if settings.dora else "rsLoRA" if settings.rslora else "LoRA"
    text = (
        f"{how} rank {settings.rank}, alpha {settings.alpha:g}: adapted {len(beside)} of {every.total()} matrices "
        f"({', '.join(parts)})"
    )
    text += f"; going on from {settings.start}" if settings.start else ""
    text += f"; trained whole: {', '.join(f'{name} {number}' for name, number in whole.items())}" if whole else ""
    return text + (f"; frozen: {', '.join(left)}" if left else "")


def kind(name: str) -> str:
    """A tensor's kind: `q_proj` of `model.layers.0.self_attn.q_proj.weight`, `experts.down_proj` of an expert stack."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-2] if parts[-1] in ("weight", "bias") else ".".join(parts[-2:])


def scale(settings: Lora) -> float:
    """What the product of the factors is multiplied with."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


@torch.no_grad()
def delta(one: Adapted, factors: Mapping[str, Tensor], settings: Lora, expert: int | None = None) -> Tensor:
    """scale B A in float32 (or wider) in the layout of the plain tensor, or of one expert's matrix in it.

    `factors` are the trained tensors by their names in the adapted model.
    """
    first, second = ("lora_embedding_A", "lora_embedding_B") if one.embedding else ("lora_A", "lora_B")
    ending = "" if one.embedding else ".weight"
    left, right = (factors[f"{one.module}.{name}.{ADAPTER}{ending}"] for name in (second, first))
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(wide), right.to(wide)
    if one.stack:
        rank = settings.rank
        left, right = left.unflatten(1, (rank, -1)).permute(2, 0, 1), right.unflatten(0, (-1, rank))
        left, right = (left, right) if expert is None else (left[expert], right[expert])
    product = scale(settings) * (left @ right)
    return product.transpose(-2, -1) if one.embedding or one.transposed else product


@torch.no_grad()
def merged(weight: Tensor, one: Adapted, factors: Mapping[str, Tensor], settings: Lora) -> Tensor:
    """The plain tensor with its adapter added, computed in float32 (or wider), in the type of `weight`."""
    change = delta(one, factors, settings).to(weight.device)
    whole = weight.to(torch.promote_types(weight.dtype, change.dtype)) + change
    if settings.dora:
        magnitude = factors[f"{one.module}.lora_magnitude_vector.{ADAPTER}.weight"].to(whole)
        whole = whole * (magnitude / torch.linalg.norm(whole, dim=1)).unsqueeze(1)
    return whole.to(weight.dtype)


def _modules(model: PreTrainedModel, settings: Lora) -> list[str]:
    """The names of the modules to adapt."""
    able = dict(_able(model))
    head, targets = name_of(model, model.get_output_embeddings()), settings.targets
    missed = recurrent.passed_by(model)
    if targets == "all-linear":
        chosen = [name for name, module in able.items() if isinstance(module, nn.Linear) and name != head]
        chosen = [name for name in chosen if able[name].weight.requires_grad]  # what model.freeze froze stays so
        chosen = [name for name in chosen if name not in missed]
    elif isinstance(targets, str):
        chosen = [name for name in able if re.fullmatch(targets, name)]
    else:
        missing = [target for target in targets if not any(_ends(name, target) for name in able)]
        if missing:
            raise _unmatched(missing[0], able)
        chosen = [name for name in able if any(_ends(name, target) for target in targets)]
    if not chosen:
        raise _unmatched(str(targets), able)
    _refuse_tied(model, chosen, head)
    _refuse_passed_by(missed.intersection(chosen))
    return chosen


def _able(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    return ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear | nn.Embedding))


def _refuse_tied(model: PreTrainedModel, chosen: list[str], head: str) -> None:
    """Factors beside a shared tensor would be added to one of its two uses only (peft #1035)."""
    embedding = name_of(model, model.get_input_embeddings())
    if head in chosen or (embedding in chosen and tied(model)):
        name = head if head in chosen else embedding
        raise ConfigError(
            f"lora.targets reaches {name}, {'which is tied to the embeddings' if tied(model) else 'the output head'}",
            required="targets below the head; tied embeddings are one tensor with two uses", where="lora.targets",
            remedy=f"leave it out, or train it whole with lora.modules_to_save: [{name}]",
        )


def _refuse_passed_by(chosen: set[str]) -> None:
    """Fused kernels of recurrent layers read a matrix themselves, and would leave out what stands beside it."""
    if chosen:
        raise ConfigError(
            f"lora.targets reaches {min(chosen)}, which kernels of Mamba read without its adapters",
            required="matrices that are always called", where="lora.targets",
            remedy="set lora.targets=all-linear, which leaves it out",
        )


def _stacks(model: PreTrainedModel) -> list[str]:
    """The names of stacked experts' matrices, [experts, …, …]."""
    return [
        f"{path}.{name}" for path, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, one in module.named_parameters(recurse=False) if one.ndim == 3 and one.requires_grad
    ]


def _experts(model: PreTrainedModel, settings: Lora) -> list[str]:
    """The stacks to adapt; leaving them out must be the user's decision."""
    stacks = _stacks(model)
    if stacks and settings.experts is None:
        raise ConfigError(
            f"{len(stacks)} stacks of experts, such as {stacks[0]}, are no linear layers, and no target reaches them",
            required="a decision: most of a mixture's weights are there", where="lora.experts",
            remedy="set lora.experts=true to adapt them too, or false to leave them frozen",
        )
    if settings.experts and not stacks:
        raise ConfigError(
            "lora.experts is true, and the model has no experts", required="a mixture of experts",
            where="lora.experts", remedy="leave lora.experts out",
        )
    named = [name for name in _modules(model, settings) if name.endswith(RENAMED)] if stacks else []
    if (settings.experts or named) and (settings.dora or settings.dropout):
        raise ConfigError(
            f"{named[0] if named else stacks[0]} cannot be adapted with {'DoRA' if settings.dora else 'dropout'}",
            required="plain LoRA or rsLoRA without dropout: PEFT adds the factors to such tensors themselves",
            where="lora", remedy="set lora.dora=false lora.dropout=0, or targets and experts that leave them out",
        )
    return stacks if settings.experts else []


def _whole(model: PreTrainedModel, settings: Lora) -> list[tuple[str, nn.Module]]:
    """The modules to train whole; a tied head is its embedding."""
    found = []
    modules = dict(model.named_modules())
    head, embedding = (name_of(model, one) for one in (model.get_output_embeddings(), model.get_input_embeddings()))
    for target in settings.modules_to_save:
        names = [name for name in modules if _ends(name, target)]
        if not names:
            raise _unmatched(target, modules, "lora.modules_to_save")
        found += [embedding if name == head and tied(model) else name for name in names]
    return [(name, modules[name]) for name in dict.fromkeys(found)]


def _shortest(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Last names where they mean the same modules, as PEFT's users write them; else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = [name for name, _ in model.named_modules() if any(_ends(name, one) for one in short)]
    return short if set(meant) == set(names) else sorted(names)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    """The name of a module in its model; empty where it is not there."""
    return next((name for name, one in model.named_modules() if one is module), "")


def _unmatched(target: str, names: Iterable[str], where: str = "lora.targets") -> ConfigError:
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name))
    return ConfigError(
        f"{target!r} matches nothing of this model", required="all-linear, names of linear layers, or a regex of them",
        where=where, remedy=f"there are: {', '.join(kinds[:16])}",
    )

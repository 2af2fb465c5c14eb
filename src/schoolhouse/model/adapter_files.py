"""Adapters as PEFT keeps them in a directory: their settings and the names of their tensors, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from schoolhouse.config import Lora, Model
from schoolhouse.errors import ConfigError
from schoolhouse.model import lora

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT's files put before a tensor's name in the plain model."""
SAME = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
"""Settings that adapters which are trained on must have kept, by PEFT's names."""


def name_in_file(name: str) -> str:
    """The name in PEFT's file of a trained tensor of the adapted model."""
    return PREFIX + name.replace(f".{lora.ADAPTER}", "")


def tensors(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors by the names PEFT's file gives them, for the plain `model`; a tied head stands there too."""
    found = {name_in_file(name): one.contiguous() for name, one in weights.items()}
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (lora.name_of(model, one) for one in both)
    if lora.tied(model) and f"{embedding}.weight" in weights:
        found[f"{PREFIX}{head}.weight"] = weights[f"{embedding}.weight"].clone()
    return found


def made_by(directory: Path) -> tuple[Lora, Model]:
    """The settings that adapters of a directory were made by, as ours, and their base; raises ConfigError where there
    are none of the kind."""
    kept = _kept(directory)
    parameters, targets = kept.get("target_parameters") or [], kept.get("target_modules") or []
    layers = [one.removesuffix(".weight") for one in parameters if one.endswith(".weight")]
    settings = Lora(
        **{ours: kept.get(theirs) or False for ours, theirs in SAME.items()}, experts=len(parameters) > len(layers),
        targets=targets if isinstance(targets, str) else (*targets, *layers),
        modules_to_save=tuple(kept.get("modules_to_save") or ()),
    )
    return settings, Model(path=kept.get("base_model_name_or_path") or str(directory), revision=kept.get("revision"))


def _kept(directory: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no adapters can be read there: {error}", required=f"{SETTINGS} and {TENSORS}, as PEFT writes them",
            where=f"lora.start: {directory}", remedy="name the directory of an adapter, e.g. a run's export/",
        ) from None
    if kept.get("peft_type") != "LORA" or kept.get("rank_pattern") or kept.get("alpha_pattern"):
        raise ConfigError(
            f"these adapters are {kept.get('peft_type')}, or of several ranks", where=f"lora.start: {directory}",
            required="LoRA with one rank and one alpha", remedy="train new adapters: leave lora.start out",
        )
    return kept


def refuse_others(directory: Path, settings: Lora) -> None:
    """Raise ConfigError where adapters of a directory are no adapters, or were made by other settings than these."""
    kept = _kept(directory)
    mine = settings.model_dump()
    others = {ours: kept.get(theirs) for ours, theirs in SAME.items() if mine[ours] != (kept.get(theirs) or False)}
    if others:
        raise ConfigError(
            "these adapters were made by other settings: "
            + ", ".join(f"{name} {value}, here {mine[name]}" for name, value in others.items()),
            required="the settings that they were made by", where=f"lora.start: {directory}",
            remedy="set " + " ".join(f"lora.{name}={json.dumps(value)}" for name, value in others.items()),
        )


@torch.no_grad()
def begin_with(directory: Path, model: PreTrainedModel, settings: Lora) -> None:
    """Put the adapters of a directory into a model that has such; raises ConfigError where they are others."""
    refuse_others(directory, settings)
    wanted = {name_in_file(name): one for name, one in model.named_parameters() if one.requires_grad}
    wanted |= {name.removesuffix(".weight"): one for name, one in wanted.items() if "lora_magnitude_vector" in name}
    try:
        with safe_open(directory / TENSORS, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the adapters cannot be read: {error}", required=f"a whole {TENSORS}", where=f"lora.start: {directory}",
            remedy="copy it again from where it was made",
        ) from None
    head = f"{PREFIX}{lora.name_of(model, model.get_output_embeddings())}.weight"
    if lora.tied(model) and head not in wanted:
        found.pop(head, None)  # PEFT writes a tied head beside its embeddings
    seen = {id(one) for name, one in wanted.items() if name in found and found[name].shape == one.shape}
    strange = [name for name in found if name not in wanted or found[name].shape != wanted[name].shape]
    missing = [name for name, one in wanted.items() if id(one) not in seen]
    if strange or missing:
        raise ConfigError(
            f"these adapters stand beside other matrices: {len(strange)} that this model has not so, such as "
            f"{min(strange, default='none')}; {len(missing)} that they lack, such as {min(missing, default='none')}",
            required="adapters of this model, by these lora.targets, experts and modules_to_save",
            where=f"lora.start: {directory}", remedy="set lora.targets and modules_to_save as adapter_config.json has "
            "them (target_modules), and model.path to its base",
        )
    for name, tensor in found.items():
        wanted[name].copy_(tensor)

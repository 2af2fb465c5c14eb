"""Examples of a micro-batch that begin alike: what they begin with goes through the model once.

It is right where a token's states depend on the tokens before it alone, and where nothing random is drawn for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from schoolhouse.types import UNSUPERVISED, MicroBatch

KNOWN = frozenset((
    "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "qwen2", "qwen3",
    "qwen3_moe", "seed_oss",
))
"""transformers' model types whose tokens meet in causal attention alone: shown for each of them. None of them sees."""


def drops(settings: Mapping[str, Any]) -> bool:
    """Whether a model's configuration asks for dropout."""
    return any(value for name, value in settings.items() if "dropout" in name or name.endswith("pdrop"))


def why_not(model: PreTrainedModel) -> str:
    """Why each example of a model has to be computed whole; empty where it has not."""
    decoder, settings = model.get_decoder(), model.config.get_text_config().to_dict()
    if model.config.model_type not in KNOWN or not type(decoder).__module__.startswith("transformers."):
        return f"not shown for {type(model).__name__}"
    if drops(settings) or any(isinstance(one, nn.Dropout) and one.p for one in model.modules()):
        return "dropout is drawn for each example"
    return ""


def unfolded(micro: MicroBatch) -> MicroBatch:
    """The micro-batch with every token computed."""
    return dataclasses.replace(micro, shared=None)


def fold(micro: MicroBatch) -> MicroBatch:
    """The micro-batch with the tokens that are computed alone, [1, S']; `boundaries` stay those of all S."""
    shared = micro.shared
    labels = torch.full_like(micro.labels[:, : len(shared.kept)], UNSUPERVISED)
    weights = torch.zeros_like(micro.weights[:, : len(shared.kept)])
    labels[0, shared.targets] = micro.labels[0, micro.targets]
    weights[0, shared.targets] = micro.weights[0, micro.targets]
    return dataclasses.replace(
        micro, input_ids=micro.input_ids[:, shared.kept], labels=labels, weights=weights,
        positions=micro.positions[..., shared.kept], targets=shared.targets,
    )

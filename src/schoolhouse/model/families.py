"""What cannot be read from a model's code: where its family hides a step between hidden states and logits."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from schoolhouse.errors import ConfigError, ModelError
from schoolhouse.loss import Head

SOFTCAP = "final_logit_softcapping"
MULTIPLIED = ("logit_scale", "lm_head_multiplier")
"""Configuration names whose value multiplies the logits (Cohere, Falcon-H1)."""
DIVIDED = ("logits_scaling",)
"""Configuration names whose value divides the logits (Granite)."""


ATTENTION_SOFTCAP = "attn_logit_softcapping"
LEARNT = re.compile(r"^(?!.*vi(sion|sual)).*\b(wpe|embed_positions|position_embeddings?)$")
"""Modules with a vector for each place of a text, by their names; vision towers have such of their patches."""
SINKS = ("gpt_oss",)
"""Model types whose attention has sinks."""


def settings_of(configuration: PretrainedConfig) -> dict[str, Any]:
    """The settings of a model's text part; also by transformers' names for them, where the family has its own (GPT-2's
    `n_head`)."""
    text = configuration.get_text_config()
    own = text.to_dict()
    return {**{name: own[its] for name, its in text.attribute_map.items() if its in own}, **own}


def serving_attention(model: PreTrainedModel) -> str:
    """transformers' attention for generation: PyTorch's, but for models whose scores it does not know how to bend, and
    for those that do not attend at all (Mamba 2)."""
    settings = settings_of(model.config)
    bent = settings.get(ATTENTION_SOFTCAP) or settings["model_type"] in SINKS
    return "eager" if bent or not model._supports_sdpa else "sdpa"


def refuse(model: PreTrainedModel) -> None:
    """Raise ModelError where a model asks for what its training here would leave out."""
    settings = settings_of(model.config)
    where = str(model.config.name_or_path)
    if settings.get("quantization_config"):
        raise ModelError(
            "the weights are stored quantised", required="weights in float32, float16 or bfloat16", where=where,
            remedy="use the full-precision weights of the model",
        )


def refuse_length(model: PreTrainedModel, longest: int) -> None:
    """Raise ConfigError where a model has learnt each place of a text, and an example has more tokens than places."""
    made_for = settings_of(model.config).get("max_position_embeddings")
    learnt = any(isinstance(one, nn.Embedding) and LEARNT.search(name) for name, one in model.named_modules())
    if learnt and made_for and longest > made_for:
        raise ConfigError(
            f"the longest example has {longest:,} tokens, and the model has learnt {made_for:,} places",
            required=f"examples of at most {made_for:,} tokens", where="data.max_tokens",
            remedy=f"set data.max_tokens={made_for}, and data.too_long to what becomes of longer rows",
        )


def head(model: PreTrainedModel) -> Head:
    """The model's own way from hidden states to logits."""
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(
            f"{type(model).__name__} has no output embeddings", required="a causal language model",
            where=str(model.config.name_or_path), remedy="choose a model that AutoModelForCausalLM generates text with",
        )
    settings = settings_of(model.config)
    scale = 1.0
    for name in MULTIPLIED:
        scale *= settings.get(name) or 1.0
    for name in DIVIDED:
        scale /= settings.get(name) or 1.0
    return Head(output.weight, dict(output.named_parameters()).get("bias"), scale, settings.get(SOFTCAP))

"""Miniatures: the smallest model of an architecture that still has every part of it.

They are what `run RECIPE --rehearse` trains where the real model is out of reach, and what the tests are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0,
}
_LATENT = {  # latent attention, and a mixture of experts behind one dense layer (DeepSeek-V2, arXiv:2405.04434)
    "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "head_dim": 8,
}
_LAYERS = ["sliding_attention", "full_attention"]
_DELTA = {  # a layer with Gated DeltaNet before one with attention
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 7},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "gemma": {"num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "sliding_window": 7, "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0, "layer_types": _LAYERS,
    },
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 16, "layer_types": _LAYERS},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"sliding_window": 7, **_EXPERTS, "layer_types": _LAYERS},
    "qwen3_5_text": _DELTA,
    "qwen3_next": {
        **_DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "lm_head_multiplier": 0.5, "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.2, "embedding_multiplier": 2.0, "key_multiplier": 0.7, "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.6, "mlp_multipliers": [1.1, 0.9], "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    },
    "granitemoehybrid": {
        **_EXPERTS, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 8, "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
        "n_group": 1, "topk_group": 1,
    },
}
"""What each architecture needs beside the common sizes, by transformers' `model_type`."""

_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
MODELS: Mapping[str, str | tuple[str, Mapping[str, Any]]] = {
    "deepseek-ai/deepseek-coder-6.7b-instruct": ("llama", _UNTIED),
    "google/gemma-2b-it": ("gemma", _TIED),
    "google/gemma-1.1-7b-it": ("gemma", _TIED),
    "google/gemma-2-2b-it": ("gemma2", _TIED),
    "google/gemma-3-1b-it": ("gemma3_text", _TIED),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", _TIED),
    "Qwen/Qwen3-0.6B": ("qwen3", _TIED),
    "Qwen/Qwen3-1.7B": ("qwen3", _TIED),
    "Qwen/Qwen3-8B": ("qwen3", _UNTIED),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", _UNTIED),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": ("seed_oss", _UNTIED),
    "Qwen/Qwen3.5-0.8B": "starter/qwen3.5",
    "Qwen/Qwen3-VL-2B-Instruct": "starter/qwen3-vl",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "starter/qwen3-vl",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("deepseek_v2", {**_UNTIED, "q_lora_rank": None}),
}
"""The architecture of the models that the recipes name, or the starter student that stands for one, for machines that
the hub is out of reach of."""


def settings(model_type: str, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """The configuration of a miniature with `vocabulary` tokens; raises KeyError for an unknown architecture."""
    return {"model_type": model_type, "vocab_size": vocabulary, **_COMMON, **ARCHITECTURES[model_type], **changes}

"""Every architecture, full and with LoRA: loss and gradient of packs equal the plain loop's, to 1e-9 in float64.

The plain loop is transformers' own forward, so whatever hides in a family (soft-capping, sliding windows, sinks, latent
attention, experts, scaled embeddings) is either honoured or shows here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_invariance import PACKS, a_step, check_equal, examples
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse.config import Lora
from schoolhouse.model import attention, elementwise, isolation, lora
from schoolhouse.model.load import Student
from schoolhouse.starter import miniatures

MIXTURES = (
    "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoehybrid", "nemotron_h",
)
LATENT = ("deepseek_v2", "deepseek_v3")


def student(family: str, settings: Lora | None = None, lighter: bool = True, **changes: object) -> Student:
    """A miniature in float64 with weights large enough that every term of the gradient counts; `lighter`: not compiled,
    and not by Liger's kernels."""
    attention.register()
    config = AutoConfig.for_model(**miniatures.settings(family, 97, **changes))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).double().train()
    if family in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    if settings is not None:
        lora.inject(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    if lighter:
        elementwise.lighten(model)
    return Student(model)


def adapters(family: str) -> Lora:
    return Lora(rank=3, alpha=4.0, experts=True if family in MIXTURES else None)


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_every_architecture(family: str, way: str) -> None:
    rows = examples("fractional", number=8, seed=3)
    check_equal(student(family, adapters(family) if way == "lora" else None), rows, PACKS["planned"](rows))


@pytest.mark.parametrize("settings", [
    Lora(rank=3, dora=True), Lora(rank=3, rslora=True), Lora(rank=3, targets=("q_proj", "embed_tokens")),
    Lora(rank=3, modules_to_save=("embed_tokens", "lm_head")),
], ids=["dora", "rslora", "embedding", "whole"])
def test_other_ways_to_adapt(settings: Lora) -> None:
    rows = examples("whole", number=8, seed=4)
    check_equal(student("qwen3", settings, tie_word_embeddings=False), rows, PACKS["planned"](rows))


def test_a_tied_embedding_trained_whole() -> None:
    """Beside adapters, both of its uses add to one gradient."""
    rows = examples("whole", number=8, seed=5)
    one = student("qwen3", Lora(rank=3, modules_to_save=("embed_tokens",)), tie_word_embeddings=True)
    check_equal(one, rows, PACKS["planned"](rows))


@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_every_architecture_is_proved(family: str) -> None:
    """The check before the first step accepts each of them, in float32, with its adapters in place."""
    one = student(family, adapters(family))
    one.model.float()
    assert isolation.prove(one).difference < 2e-5


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
OF_MAMBA = {
    "mamba2": {  # which does not attend, and whose configuration knows no heads that do
        "num_attention_heads": None, "num_key_value_heads": None, "num_heads": 8, "head_dim": 16, "state_size": 8,
        "n_groups": 2, "chunk_size": 8, "expand": 2,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "zamba2": {
        "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8,
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("family", OF_MAMBA)
def test_other_models_with_mamba_2(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one gradient equation with the rest, proved, their work counted; in bfloat16, where states stay float32."""
    monkeypatch.setitem(miniatures.ARCHITECTURES, family, OF_MAMBA[family])
    rows = examples("fractional", number=8, seed=3)
    check_equal(student(family), rows, PACKS["planned"](rows))
    one = student(family, adapters(family))
    one.model.float()
    assert isolation.prove(one).difference < 2e-5
    assert one.work.of_step(np.array([9, 5]), 3) > 0 and bool(one.work.windows) == (family != "mamba2")
    micro = a_step(rows, PACKS["planned"](rows)).micro_batches[0]
    wide = one.loss(micro).nll
    one.model.bfloat16()
    narrow = one.loss(micro).nll
    narrow.backward()
    assert float(narrow.detach()) == pytest.approx(float(wide.detach()), rel=2e-2)

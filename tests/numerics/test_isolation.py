"""The proof before the first step: what lets examples of a pack see one another is refused, however little it shows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse.errors import ConfigError, ModelError
from schoolhouse.model import attention, families, isolation, recurrent
from schoolhouse.model.load import Student

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LEAKING = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
}
"""With weights as they are initialised what leaks changes a loss by no more than rounding does, or little more."""


def made(family: str, **changes: object) -> Student:
    attention.register()
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    return Student(AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train())


@pytest.mark.parametrize("family", LEAKING)
def test_a_small_leak_is_a_leak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "keep_apart", lambda model: None)
    with pytest.raises(ModelError, match="move by" if family == "lfm2" else "cannot be trained packed"):
        isolation.prove(made(family, **LEAKING[family]))


def test_layers_are_proved_as_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes Mamba's fused kernel in training alone: one that mixes examples there is seen by the proof."""
    from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon

    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
    one, whole = made("falcon_h1", **sizes), falcon.FalconH1Mixer.forward
    assert isolation.prove(one).difference < 2e-5

    def mixing(self: torch.nn.Module, states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        found = whole(self, states, *args, **kwargs)
        return found + found.mean(0, keepdim=True) if self.training else found

    monkeypatch.setattr(falcon.FalconH1Mixer, "forward", mixing)
    with pytest.raises(ModelError, match="move by"):
        isolation.prove(made("falcon_h1", **sizes))


def test_chunks_are_no_longer_than_examples() -> None:
    """What a layer fills up and keeps of many short examples is a few times theirs, not 256 tokens of each."""
    one = made("falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)
    taken: list[int] = []
    one.model.model.layers[0].mamba.register_forward_pre_hook(lambda layer, _: taken.append(layer.chunk_size))
    seen = [recurrent._chunks_of(one.model.model.layers[0].mamba, tokens) for tokens in (1, 16, 17, 300)]
    for each in seen:
        with each:
            taken.append(one.model.model.layers[0].mamba.chunk_size)
    assert taken == [16, 16, 32, 256] and one.model.model.layers[0].mamba.chunk_size == 256


@pytest.mark.parametrize("family", ["llama", "olmoe", "gpt2"])
def test_what_is_isolated_does_not_move(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; in a mixture as far as experts with other numbers of tokens compute alike."""
    found, whole = [], isolation._moved
    monkeypatch.setattr(isolation, "_moved", lambda *states: found.append(whole(*states)) or found[-1])
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    one = made(family, **sizes)
    assert isolation.prove(one).difference < 1e-6
    assert len(found) == 1 and (found[0] == 0 or (family == "olmoe" and found[0] < 1e-6))
    assert one.work.token > 0, "its operations are counted, whatever it calls its settings"


@pytest.mark.parametrize("family", ["nemotron", "stablelm"])
def test_a_model_that_is_called_in_vain_is_refused_by_name(family: str) -> None:
    """Its layers hand no arguments on to the attention: no Python error of some depth."""
    with pytest.raises(ModelError, match="cannot be trained packed: TypeError"):
        isolation.prove(made(family))


@pytest.mark.parametrize(("family", "sizes"), [
    ("gpt2", {"n_positions": 64}), ("opt", {"max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}),
])
def test_more_tokens_than_learnt_places_are_refused(family: str, sizes: dict[str, int]) -> None:
    """No index out of range somewhere in the first step; rotary places have no such end."""
    one = made(family, **sizes).model
    families.refuse_length(one, 64)
    with pytest.raises(ConfigError, match=r"has learnt 64 places"):
        families.refuse_length(one, 65)
    families.refuse_length(made("llama", max_position_embeddings=64).model, 65)

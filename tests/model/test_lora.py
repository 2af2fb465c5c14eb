"""LoRA: what is adapted, that nothing is skipped silently, and that merging is what PEFT would do."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from schoolhouse.config import Lora
from schoolhouse.errors import ConfigError
from schoolhouse.model import adapter_files, lora, recurrent
from schoolhouse.starter import miniatures

TYPES = ["qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def model(model_type: str = "qwen3", **changes: object) -> PreTrainedModel:
    """A miniature in float64, the same each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**miniatures.settings(model_type, 61, **changes))
    one = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    one.set_experts_implementation("eager")  # the grouped product knows no float64
    with torch.no_grad():  # stacks of experts may be left as they were allocated
        for parameter in one.parameters():
            parameter.normal_(0, 0.1)
    return one


def stirred(one: PreTrainedModel) -> PreTrainedModel:
    """Every trained tensor moved, so that no adapter is without effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return one


def lora_for(model_type: str, **changes: object) -> Lora:
    mixture = model_type in ("qwen3_moe", "gpt_oss", "deepseek_v3")
    return Lora(**{"rank": 3, "alpha": 5.0, "experts": True if mixture else None, **changes})


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}, {"targets": ("o_proj", "embed_tokens")}],
                         ids=["lora", "rslora", "dora", "embedding"])
@pytest.mark.parametrize("model_type", TYPES)
def test_merging_is_what_peft_does(model_type: str, changes: dict) -> None:
    """W + scale B A of every tensor, ours against `merge_and_unload`; sums in float64 in another order: 1e-12."""
    if changes.get("dora"):
        if model_type == "deepseek_v3":
            pytest.skip("its dense layers share PEFT's expert names, which DoRA is refused for")
        changes = {**changes, "experts": False if model_type != "qwen3" else None}
    settings = lora_for(model_type, **changes)
    one = model(model_type, tie_word_embeddings=False)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    lora.inject(one, settings)
    stirred(one)
    trained = {name: value for name, value in one.named_parameters() if value.requires_grad}
    ours = {each.tensor: lora.merged(before[each.tensor], each, trained, settings) for each in lora.adapted(one)}
    peers = get_peft_model(model(model_type, tie_word_embeddings=False), lora.config(
        model(model_type, tie_word_embeddings=False), settings))
    names = {name.replace("base_model.model.", ""): value for name, value in peers.named_parameters()}
    with torch.no_grad():
        for name, value in trained.items():
            names[name].copy_(value)
    merged = dict(peers.merge_and_unload().named_parameters())
    assert ours
    for name, value in before.items():
        if name in ours:
            assert not torch.equal(ours[name], value)
            assert float((ours[name] - merged[name]).norm()) <= 1e-12 * float(merged[name].norm()), name
        elif name in merged:
            assert torch.equal(merged[name], value), name


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_one_experts_delta_is_its_part_of_the_stack(model_type: str) -> None:
    settings, one = lora_for(model_type), model(model_type)
    lora.inject(one, settings)
    stirred(one)
    trained = {name: value for name, value in one.named_parameters() if value.requires_grad}
    stacks = [each for each in lora.adapted(one) if each.stack]
    assert stacks
    for each in stacks:
        whole = lora.delta(each, trained, settings)
        assert whole.shape == dict(model(model_type).named_parameters())[each.tensor].shape
        for expert, part in enumerate(whole):
            assert torch.allclose(part, lora.delta(each, trained, settings, expert), rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [
    Lora(targets=("q_porj",)), Lora(targets=("q_proj", "gate")), Lora(targets="model.layers.9.*"),
    Lora(modules_to_save=("embeddings",)), Lora(experts=True), Lora(targets=("lm_head",)),
    Lora(targets=("q_proj", "embed_tokens")), Lora(targets=".*"),
], ids=str)
def test_what_matches_nothing_or_a_tied_tensor_is_refused(settings: Lora) -> None:
    with pytest.raises(ConfigError) as refused:
        lora.inject(model(tie_word_embeddings=True), settings)
    assert refused.value.where.startswith("lora.") and len(str(refused.value).splitlines()) <= 6


def test_experts_are_never_skipped_silently() -> None:
    with pytest.raises(ConfigError, match="4 stacks of experts"):
        lora.inject(model("qwen3_moe"), Lora())
    for settings in (Lora(experts=True, dora=True), Lora(experts=True, dropout=0.1)):
        with pytest.raises(ConfigError, match="cannot be adapted with"):
            lora.inject(model("qwen3_moe"), settings)
    one = model("qwen3_moe")
    lora.inject(one, Lora(experts=False))
    assert "experts.down_proj 2" in lora.describe(one, Lora(experts=False)).split("frozen:")[1]


@pytest.mark.parametrize("model_type", ["falcon_h1", "granitemoehybrid", "nemotron_h"])
def test_what_kernels_read_without_adapters_is_left_out(model_type: str) -> None:
    """Mamba's fused kernels are handed `out_proj.weight`: adapters beside it would be trained on no GPU. PEFT knows it
    of some of these models."""
    settings = Lora(experts=None if model_type == "falcon_h1" else False)
    one = model(model_type)
    with_state = [name for name, layer in one.named_modules() if layer in recurrent.layers(one)]
    lora.inject(one, settings)
    beside = {each.tensor for each in lora.adapted(one)}
    assert with_state and all(f"{name}.in_proj.weight" in beside for name in with_state)
    assert not any(f"{name}.out_proj.weight" in beside for name in with_state)
    kind = type(next(layer for layer in one.modules() if layer in recurrent.layers(one)))
    assert recurrent._read_by(type("Heir", (kind,), {})) == recurrent._read_by(kind) >= {"out_proj", "conv1d"}
    with pytest.raises(ConfigError, match="kernels of Mamba"):
        lora.inject(model(model_type), settings.model_copy(update={"targets": ("in_proj", "out_proj")}))


def test_the_description_counts_by_kind() -> None:
    one, settings = model("qwen3_moe", tie_word_embeddings=False), lora_for("qwen3_moe", modules_to_save=("lm_head",))
    lora.inject(one, settings)
    assert lora.describe(one, settings) == (
        "LoRA rank 3, alpha 5: adapted 12 of 16 matrices (q_proj 2 of 2, k_proj 2 of 2, v_proj 2 of 2, o_proj 2 of 2, "
        "experts.gate_up_proj 2 of 2, experts.down_proj 2 of 2); trained whole: lm_head 1; "
        "frozen: embed_tokens 1, gate 2"
    )


def test_only_adapters_and_what_is_named_learn() -> None:
    one = model(tie_word_embeddings=True)
    lora.inject(one, Lora(modules_to_save=("lm_head",)))
    learning = {name for name, value in one.named_parameters() if value.requires_grad and "lora_" not in name}
    assert learning == {"model.embed_tokens.weight"}  # tied: one tensor with two uses
    assert one.lm_head.weight is one.model.embed_tokens.weight


def test_a_regex_and_names_reach_what_they_say() -> None:
    for targets, wanted in (("model\\.layers\\.1\\..*_proj", 7), (("self_attn.q_proj",), 2), ("all-linear", 14)):
        one = model()
        lora.inject(one, Lora(targets=targets))
        assert len(lora.adapted(one)) == wanted


def test_frozen_before_is_left_alone() -> None:
    """What another setting froze, all-linear does not reach."""
    one = model()
    one.model.layers[0].requires_grad_(False)
    lora.inject(one, Lora())
    assert {each.tensor.split(".")[2] for each in lora.adapted(one)} == {"1"}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_adapters_file_is_pefts(model_type: str, tmp_path) -> None:
    """The names and the configuration we write, read by PEFT, give the same logits, modules trained whole included."""
    from safetensors.torch import save_file

    settings = lora_for(model_type, modules_to_save=("embed_tokens",))
    base, one = model(model_type, tie_word_embeddings=True), model(model_type, tie_word_embeddings=True)
    lora.inject(one, settings)
    stirred(one)
    trained = {name: value.detach() for name, value in one.named_parameters() if value.requires_grad}
    configuration = lora.config(base, settings, "somewhere")
    configuration.save_pretrained(tmp_path)
    save_file(adapter_files.tensors(base, trained), tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, one.eval()(input_ids=ids).logits)


def test_adapters_of_narrow_matrices_begin_in_float32() -> None:
    """PEFT rounds them to the format of the matrix beside them: A would have 8 bits, and DoRA's lengths be off by up to
    2^-9 from those of the rows, so that the first answers were not the model's."""
    config = AutoConfig.for_model(**miniatures.settings("qwen3", 61))
    one = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora.inject(one, Lora(rank=4, dora=True, targets=("q_proj", "up_proj", "embed_tokens")))
    adapters = {name: value for name, value in one.named_parameters() if "lora_" in name}
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    first = adapters["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert not torch.equal(first, first.bfloat16().float()), "drawn in float32"
    layer = one.model.layers[1].mlp.up_proj
    wanted = layer.base_layer.weight.float().norm(dim=1)
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, wanted)
    found = one.model.embed_tokens.lora_magnitude_vector["default"].weight
    assert torch.allclose(found, one.model.embed_tokens.base_layer.weight.float().norm(dim=0), rtol=1e-6)

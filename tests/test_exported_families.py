"""Every architecture, full, as an adapter and merged: plain transformers writes what the student itself would write.

The student is the one that trains (packed attention, float32 masters); its weights are moved far from the base's, so
that an export that forgot a tensor, a scale or a tie would write something else.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)

from schoolhouse import evaluate, export, places, proof
from schoolhouse.config import Exam, Lora, Model
from schoolhouse.data import served
from schoolhouse.data.served import Served
from schoolhouse.errors import CheckpointError
from schoolhouse.export import Trained
from schoolhouse.model import isolation, load, sight
from schoolhouse.starter import miniatures

MIXTURES = (
    "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoehybrid", "nemotron_h",
)
PROMPTS = ["Tom has 3 pens. How many?", "Mia buys 4 boxes of 5 eggs and gives away 7. How many eggs are left?"]
WRITTEN = 12
"""Tokens of an answer: random weights never stop by themselves."""


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8,
         "image_size": 32, "head_dim": 16}
SEEING = {
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": TOWER},
    "internvl": {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": {
        **TOWER, "patch_size": [8, 8], "image_size": [32, 32]}},
    "lfm2_vl": {"text_config": {**TEXT, "layer_types": ["conv", "full_attention"]}, "vision_config": TOWER},
    "smolvlm": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER},
    "gemma4": {
        "text_config": {
            **TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1024, "global_head_dim": 16,
            "num_kv_shared_layers": 0},
        "vision_config": {**TOWER, "num_key_value_heads": 2, "position_embedding_size": 64},
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}},
}
"""Families that see, or hear, in ways that are not known here: they learn from texts."""


def base(family: str, place: Path, number: torch.dtype = torch.float32) -> Path:
    """A miniature with random weights and the starter's tokenizer."""
    starter = places.model_directory("starter/qwen3")
    ids = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    tied = family.startswith("gemma")
    torch.manual_seed(2)
    if family in SEEING:
        settings = copy.deepcopy(SEEING[family])
        settings["text_config"] |= {**ids, "tie_word_embeddings": tied}
        config = AutoConfig.for_model(family, **settings, **ids, image_token_id=5, tie_word_embeddings=tied)
        model = AutoModelForImageTextToText.from_config(config)
    else:
        config = AutoConfig.for_model(**miniatures.settings(family, 1024, tie_word_embeddings=tied, **ids))
        model = AutoModelForCausalLM.from_config(config)
    stir(dict(model.named_parameters()))
    model.to(number).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(starter / name, place / name)
    return place


@torch.no_grad()
def stir(parameters: dict[str, torch.Tensor]) -> None:
    """Move each tensor; embeddings less, or a model whose head is tied to them would repeat its last token."""
    for name, parameter in parameters.items():
        parameter.add_(torch.randn_like(parameter) * (0.01 if "embed" in name else 0.15))


@torch.no_grad()
def plainly_written(model: PreTrainedModel, words: Served) -> list[str]:
    """What plain transformers writes greedily, one prompt at a time, up to its first stop token."""
    found = []
    model.generation_config = GenerationConfig(pad_token_id=0)
    for prompt in words.tokenize(PROMPTS):
        ids = torch.tensor([prompt])
        out = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN, do_sample=False,
            eos_token_id=list(words.stops.ids),
        )
        found.append(words.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("family", [*miniatures.ARCHITECTURES, *SEEING])
def test_an_export_writes_what_the_run_writes(family: str, tmp_path: Path) -> None:
    directory = base(family, tmp_path / "base")
    settings = Model(path=str(directory), freeze=("vision", "projector") if family in SEEING else ())
    words = served.load(served.serving(settings, directory))
    for way in (None, Lora(rank=3, alpha=5.0, experts=True if family in MIXTURES else None)):
        student = load.load(directory, settings, torch.device("cpu"), way)
        assert isolation.prove(student).difference < 2e-5
        sight.refuse_unseen(student.model, shown=False)
        learnt = {name: one for name, one in student.model.named_parameters() if one.requires_grad}
        stir(learnt)
        trained, exam = Trained(learnt, way, settings.freeze), Exam(max_new_tokens=WRITTEN)
        wanted = [one.text for one in evaluate.generate(student, words, words.tokenize(PROMPTS), exam, seed=0)]
        assert wanted[0] != wanted[1] and len(set(wanted[1])) > 3, "an answer that would not tell exports apart"
        for form in ("model",) if way is None else ("adapter", "model"):
            out = tmp_path / f"{'full' if way is None else 'lora'}-{form}"
            out.mkdir()
            if form == "model":
                export.write_model(directory, trained, words, out)
                again = sight.loader(out).from_pretrained(out)
            else:
                export.write_adapter(directory, str(directory), None, trained, words, out)
                again = PeftModel.from_pretrained(sight.loader(directory).from_pretrained(directory), out)
            proof.prove(directory, trained, words, [(prompt, ()) for prompt in PROMPTS], out)
            assert plainly_written(again, words) == wanted, (way, form)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_merged_bfloat16_is_rounded_once_and_nothing_else(family: str, tmp_path: Path) -> None:
    """W + scale B A rounded once, to KL 1e-6 in float32; a factor 1 % off, which rounding would hide, is seen."""
    directory = base(family, tmp_path / "base", torch.bfloat16)
    settings = Model(path=str(directory))
    words = served.load(served.serving(settings, directory))
    way = Lora(rank=3, alpha=5.0, experts=True if family in MIXTURES else None)
    student = load.load(directory, settings, torch.device("cpu"), way)
    learnt = {name: one for name, one in student.model.named_parameters() if one.requires_grad}
    stir(learnt)
    out, asked = tmp_path / "out", [(prompt, ()) for prompt in PROMPTS]
    out.mkdir()
    export.write_model(directory, Trained(learnt, way), words, out)
    said = proof.prove(directory, Trained(learnt, way), words, asked, out)
    assert "rounded once; the rounding costs" in said and float(said.split()[4]) < 1e-6
    other = way.model_copy(update={"alpha": 5.05})
    with pytest.raises(CheckpointError, match="logits differ"):
        proof.prove(directory, Trained(learnt, other), words, asked, out)

"""A real pretrained model, 260,000 parameters that tell stories: adapters train, merge and load in plain transformers.

Perplexity is that of the model's own golden text (`golden.json`, computed in float64 by another program). In float32 it
is met to 1e-5; an adapter that was not trained moves it by less than 1e-6 of itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from test_lora_run import said
from test_run import here
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schoolhouse import export, trained
from schoolhouse.config import Lora, Model
from schoolhouse.data import served
from schoolhouse.export import Trained
from schoolhouse.model import load

MOVES = 1e-6
"""An adapter of zeros adds exact zeros; DoRA divides each row by its own length, which rounds to 6e-8 a weight."""
WAYS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "tiny_models" / "stories260K"


def golden(stories: Path) -> torch.Tensor:
    return torch.tensor([json.loads((stories / "golden.json").read_text())["ids"]])


def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first, in plain transformers."""
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1]
    return math.exp(float(F.cross_entropy(logits.double(), ids[0, 1:])))


def test_the_golden_text_is_met(stories: Path) -> None:
    told = json.loads((stories / "golden.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(stories / "hf")
    assert math.log(perplexity(plain, golden(stories))) == pytest.approx(told["mean_nll"], abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_an_untrained_adapter_changes_nothing(way: str, stories: Path, tmp_path: Path) -> None:
    """In the model, as PEFT's file beside the base, and merged into plain weights."""
    base, settings, ids = stories / "hf", Lora(rank=8, alpha=16, **WAYS[way]), golden(stories)
    before = perplexity(AutoModelForCausalLM.from_pretrained(base), ids)
    page = Model(path=str(base), chat_template="plain")
    student = load.load(base, page, torch.device("cpu"), settings)
    student.model.set_attn_implementation("sdpa")
    assert perplexity(student.model, ids) == pytest.approx(before, rel=MOVES)
    fresh = Trained({name: one for name, one in student.model.named_parameters() if one.requires_grad}, settings)
    model = served.load(served.serving(page, base))
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    export.write_adapter(base, str(base), None, fresh, model, tmp_path / "adapter")
    export.write_model(base, fresh, model, tmp_path / "merged")
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert perplexity(adapter, ids) == pytest.approx(before, rel=MOVES)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert perplexity(merged, ids) == pytest.approx(before, rel=MOVES)


@pytest.mark.parametrize("way", ["lora", "dora"])
def test_adapters_learn_a_story(way: str, stories: Path, tmp_path: Path) -> None:
    """Trained on a text that the model does not expect; merged and loaded in plain transformers, it expects it.

    The base's files are not touched, and adapter, merged model and run agree on what they have learnt.
    """
    story = "Lily met a robot. The robot counted to ten, and ten more, and slept under the moon."
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Once upon a time,", "completion": f" {story}"}) + "\n")
    page = tmp_path / "page.yaml"
    page.write_text(f"""\
model: {{path: {stories / 'hf'}, chat_template: plain}}
data: {{train: {tmp_path / 'rows.jsonl'}}}
directory: {tmp_path / 'run'}
lora: {{rank: 8, alpha: 16, dora: {str(way == 'dora').lower()}}}
batch: {{examples: 1, tokens: 512}}
train: {{steps: 20}}
optim: {{learning_rate: 1.0e-2}}
""")
    bytes_before = (stories / "hf" / "model.safetensors").read_bytes()
    here("run", page)
    assert "identical logits" in said("export", tmp_path / "run")
    assert "relative difference of logits" in said("export", tmp_path / "run", "--merge")
    assert (stories / "hf" / "model.safetensors").read_bytes() == bytes_before
    ids = AutoTokenizer.from_pretrained(stories / "hf")(story, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(stories / "hf")
    student, _ = trained.open_student(str(tmp_path / "run"))
    student.model.set_attn_implementation("sdpa")
    before, after = perplexity(base, ids), perplexity(student.model, ids)
    assert after < 0.2 * before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert perplexity(merged, ids) == pytest.approx(after, rel=1e-5)
    adapter = PeftModel.from_pretrained(base, tmp_path / "run" / "export")
    assert perplexity(adapter, ids) == pytest.approx(after, rel=1e-5)

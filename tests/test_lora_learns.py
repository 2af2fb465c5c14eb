"""LoRA really learns: a student that was taught one-step problems only solves problems of two steps.

The student is the starter, twice as wide (3.7 M parameters), so that factors of rank 8 beside every matrix stay under
5 % of it. Exams are of calculations that occur in no training row. About 12 minutes on one core.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_run import here
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import places, trained

ROOT = Path(__file__).resolve().parents[1]
ROWS = "examples.sft.gsm8k.rows"
FIRST = f"""\
data: {{train: starter/arithmetic, function: "{ROWS}:one_step"}}
batch: {{examples: 32, tokens: 2048}}
train: {{steps: 500}}
optim: {{name: muon, learning_rate: 4.0e-3, minimum: 0.05, weight_decay: 0.1}}
checkpoint: {{every: 250}}
"""
SECOND = f"""\
data: {{train: starter/arithmetic, function: "{ROWS}:two_steps"}}
exam: {{data: {{path: starter/arithmetic:exam, function: "{ROWS}:two_steps"}}, max_new_tokens: 110, examples: 256}}
batch: {{examples: 32, tokens: 4096}}
lora: {{rank: 8, alpha: 16}}
train: {{steps: 800}}
optim: {{learning_rate: 5.0e-3, minimum: 0.05, weight_decay: 0.0}}
checkpoint: {{every: 250}}
"""


def wide_starter(place: Path) -> Path:
    """The starter student, twice as wide, with random weights."""
    base = places.model_directory("starter/qwen3")
    shutil.copytree(base, place, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.from_pretrained(base)
    config.update({"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "initializer_range": 0.04})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def scores(run: Path) -> dict[int, float]:
    """The exam's score by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {one["step"]: one["score"] for one in records if one["kind"] == "eval"}


@pytest.mark.slow
def test_lora_learns_a_second_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 10 % before, at least 85 % after, less than 5 % trained, and the base as it was to the bit."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "first.yaml").write_text(f"model: {wide_starter(tmp_path / 'student')}\n{FIRST}")
    here("run", tmp_path / "first.yaml", f"directory={tmp_path / 'first'}")
    here("export", tmp_path / "first")
    base = tmp_path / "first" / "export"
    (tmp_path / "second.yaml").write_text(f"model: {base}\n{SECOND}")
    here("run", tmp_path / "second.yaml", f"directory={tmp_path / 'second'}")
    score = scores(tmp_path / "second")
    assert score[0] <= 0.10 and score[800] >= 0.85, score
    told = json.loads((tmp_path / "second" / "run.json").read_text())["derived"]
    assert told["trainable"] < 0.05 * told["parameters"]
    student, _ = trained.open_student(str(tmp_path / "second"))
    found = {name.replace(".base_layer", ""): one for name, one in student.model.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(found[name], one) for name, one in plain.named_parameters())
    here("export", tmp_path / "second", "--merge")

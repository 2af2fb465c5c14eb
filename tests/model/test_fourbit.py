"""QLoRA: the base in 4 bits is what is computed with, trained beside, and merged into; or the setting is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lora_run import LESSON, said, weights
from test_run import here
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import places
from schoolhouse.config import Lora, Model
from schoolhouse.errors import ConfigError
from schoolhouse.model import fourbit, load, lora
from schoolhouse.starter import miniatures

pytest.importorskip("torchao", reason="needs the extra qlora")
FOUR = Lora(rank=4, alpha=8.0, base="nf4")


def student(settings: Lora) -> load.Student:
    base = places.model_directory("starter/qwen3")
    torch.manual_seed(0)
    one = load.load(base, Model(path=str(base)), torch.device("cpu"), settings)
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return one


def test_it_computes_with_the_values_of_the_four_bits() -> None:
    """Logits and gradients of the adapters are those of a base whose matrices were rounded so (float32: 1e-5)."""
    narrow, wide = student(FOUR).model, student(FOUR.model_copy(update={"base": "stored"})).model
    fourbit.round_base(wide)
    ids, found = torch.arange(3, 40)[None], []
    for model in (narrow, wide):
        model.set_attn_implementation("eager")
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        found.append((logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}))
    (one, gradients), (other, wanted) = found
    assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
    longest = max(float(gradient.norm()) for gradient in wanted.values())
    assert len(wanted) == 56
    assert all(float((gradients[name] - each).norm()) < 1e-5 * longest for name, each in wanted.items())


def test_half_a_byte_a_weight() -> None:
    model = student(FOUR).model
    narrow = [one for one in model.parameters() if fourbit.is_narrow(one)]
    assert len(narrow) == 28 and not any(one.requires_grad for one in narrow)
    assert sum(map(fourbit.bytes_of, narrow)) < 0.54 * sum(one.numel() for one in narrow)
    assert "28 of them in 4 bits" in fourbit.describe(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_in_four_bits(precision: str, tmp_path: Path) -> None:
    """Trains, stops, resumes bit by bit, and is exported both ways; merged weights are the 4-bit ones and a delta."""
    page = tmp_path / "page.yaml"
    page.write_text(LESSON.replace("dropout: 0.1", "base: nf4"))
    common = ("run", page, f"model.precision={precision}")
    here(*common, f"directory={tmp_path / 'whole'}")
    here(*common, f"directory={tmp_path / 'again'}")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    here(*common, f"directory={tmp_path / 'again'}")
    kept, resumed = (weights(tmp_path / name, 6) for name in ("whole", "again"))
    assert len(kept) == 56 and all(torch.equal(kept[name], resumed[name]) for name in kept)
    told = {row["what"]: row["value"] for row in json.loads((tmp_path / "whole" / "run.json").read_text())["in_force"]}
    assert "28 of them in 4 bits (NF4)" in told["way"]
    assert "trained beside 4 bits: beside the whole base, answers move by KL" in said("export", tmp_path / "whole")
    assert "relative difference of logits" in said("export", tmp_path / "whole", "--merge")
    base = AutoModelForCausalLM.from_pretrained(places.model_directory("starter/qwen3"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "merged")
    name = "model.layers.0.mlp.down_proj.weight"
    one = next(each for each in lora.adapted(student(FOUR).model) if each.tensor == name)
    wanted = fourbit.rounded(dict(base.named_parameters())[name].detach()) + lora.delta(one, kept, FOUR)
    assert torch.allclose(dict(merged.named_parameters())[name], wanted, atol=1e-6)


def test_in_force_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stacked experts, matrices that are no whole blocks, DoRA, and no torchao."""
    with pytest.raises(ValueError, match="dora"):
        Lora(base="nf4", dora=True)
    for family, message in (("qwen3_moe", "stacked"), ("qwen3", "whole blocks")):
        config = AutoConfig.for_model(**miniatures.settings(family, 61, hidden_size=60, intermediate_size=95))
        model = AutoModelForCausalLM.from_config(config)
        lora.inject(model, FOUR.model_copy(update={"experts": False if family == "qwen3_moe" else None}))
        with pytest.raises(ConfigError, match=message):
            fourbit.narrow(model, torch.device("cpu"))
    monkeypatch.setattr(fourbit, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao is not installed"):
        student(FOUR)


@pytest.mark.parametrize(("precision", "ulysses", "near"), [("float32", 2, 1e-5), ("bfloat16", 1, 1e-2)])
def test_on_several_processes(precision: str, ulysses: int, near: float, tmp_path: Path) -> None:
    """Matrices in 4 bits are whole in every process, adapters are cut: two processes teach what one does, and one goes
    on where two were stopped. Sums in another order: 1e-5 of the loss in float32; in bfloat16 1e-2, for its 8 bits and
    the errors that six steps carry on."""
    page = tmp_path / "page.yaml"
    page.write_text(LESSON.replace("dropout: 0.1", "base: nf4"))
    one, two = tmp_path / "one", tmp_path / "two"
    trained(page, one, 1, f"model.precision={precision}")
    trained(page, two, 2, f"model.precision={precision}", f"parallel.ulysses={ulysses}")
    alone = losses(one)
    assert len(alone) == 6 and alone[-1] < alone[0]
    assert losses(two) == pytest.approx(alone, rel=near)
    shutil.rmtree(two / "checkpoints" / "step-00000006")
    trained(page, two, 1, f"model.precision={precision}")
    assert losses(two)[-1] == pytest.approx(alone[-1], rel=near)
    assert "trained beside 4 bits" in said("export", two)


def trained(page: Path, place: Path, processes: int, *words: str) -> None:
    command = [sys.executable, "-m", "schoolhouse", "run", str(page), "--nproc", str(processes)]
    done = subprocess.run(
        [*command, f"directory={place}", *words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(place: Path) -> list[float]:
    rows = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "step"]

"""Adapters that are trained on: a run begins where another ended, or where PEFT itself left them, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_run import here
from transformers import AutoModelForCausalLM

from schoolhouse import cli, places, talk, trained
from schoolhouse.config import Lora, Model
from schoolhouse.errors import ConfigError
from schoolhouse.model import adapter_files, load, lora
from schoolhouse.types import Message, Part

PAGE = """\
model: starter/qwen3
data: {train: {path: starter/arithmetic, limit: 24}, validation: {path: starter/arithmetic:validation, limit: 8}}
lora: {rank: 4, alpha: 8}
batch: {examples: 8, tokens: 300}
train: {steps: 3}
optim: {learning_rate: 1e-2}
"""
WAYS = {
    "lora": Lora(rank=3, alpha=5.0), "dora": Lora(rank=3, dora=True), "rslora": Lora(rank=2, rslora=True),
    "embedding": Lora(rank=3, targets=("q_proj", "down_proj"), modules_to_save=("embed_tokens",)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a page, and the run of it, exported."""
    found = tmp_path_factory.mktemp("start")
    (found / "page.yaml").write_text(PAGE)
    here("run", found / "page.yaml", f"directory={found / 'first'}")
    here("export", found / "first")
    return found


def losses(run: Path) -> list[float]:
    """Of validation, before the first step and after the last."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [one["loss"] for one in records if one["kind"] == "eval"]


def test_a_run_begins_where_another_ended(place: Path, tmp_path: Path) -> None:
    """Its first loss is the other's last, it learns, it says so; a copy of it needs no adapters any more."""
    start = place / "first" / "export"
    here("run", place / "page.yaml", f"directory={tmp_path / 'run'}", f"lora.start={start}")
    (before, first), (begun, after) = losses(place / "first"), losses(tmp_path / "run")
    assert begun == pytest.approx(first, rel=1e-6) and after < first < before
    told = {one["what"]: one["value"] for one in json.loads((tmp_path / "run" / "run.json").read_text())["in_force"]}
    assert f"going on from {start}" in told["way"]
    here("export", tmp_path / "run", "--merge")


def test_adapters_answer_beside_their_base(place: Path, tmp_path: Path) -> None:
    """`chat` and `eval` of the exported directory say what the run says, with its template; the base says other."""
    chosen, asked = place / "first", [Message("user", (Part("text", "Tom has 3 pens. How many?"),))]
    both = [trained.open_student(str(one)) for one in (chosen, chosen / "export")]
    answers = [talk.reply(*one, asked) for one in both]
    plain = talk.reply(*trained.open_student("starter/qwen3"), asked)
    assert answers[0] == answers[1] != plain and both[1][1].template.source == both[0][1].template.source
    exam = "exam: {data: {path: starter/arithmetic:exam, limit: 2}, max_new_tokens: 4}\n"
    (tmp_path / "exam.yaml").write_text(PAGE + exam)
    here("eval", chosen / "export", tmp_path / "exam.yaml")


@pytest.mark.parametrize("way", WAYS)
def test_what_peft_keeps_is_put_in_its_place(way: str, tmp_path: Path) -> None:
    """Every trained tensor of a file that PEFT wrote, its DoRA's lengths and a tied embedding too."""
    settings, base = WAYS[way], places.model_directory("starter/qwen3")
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(base)
    peers = get_peft_model(plain, lora.config(AutoModelForCausalLM.from_pretrained(base), settings))
    with torch.no_grad():
        for one in peers.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one) * 0.1)
    peers.save_pretrained(tmp_path)
    ids = torch.arange(30)[None] + 40
    student = load.load(base, Model(path=str(base)), torch.device("cpu"), settings, start=tmp_path)
    student.model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        wanted, found = peers.eval()(input_ids=ids).logits, student.model(input_ids=ids).logits
        other = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - other).abs().max()) > 0.1


@pytest.mark.parametrize(("changes", "words"), [
    ({"rank": 8}, "rank 4, here 8"), ({"alpha": 16.0}, "set lora.alpha=8"), ({"rslora": True}, "rslora False, here"),
    ({"targets": ("q_proj",)}, "that this model has not so"), ({"dora": True}, "dora"),
    ({"modules_to_save": ("embed_tokens",)}, "that they lack, such as base_model.model.model.embed_tokens.weight"),
])
def test_other_settings_are_refused(place: Path, changes: dict[str, object], words: str) -> None:
    """With the names and the values that would fit; nothing is put anywhere."""
    model = AutoModelForCausalLM.from_pretrained(places.model_directory("starter/qwen3"))
    settings = Lora(**{"rank": 4, "alpha": 8.0, **changes})
    lora.inject(model, settings)
    before = {name: one.clone() for name, one in model.named_parameters()}
    with pytest.raises(ConfigError) as refused:
        adapter_files.begin_with(place / "first" / "export", model, settings)
    assert words in str(refused.value) and refused.value.where.startswith("lora.start")
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())


def test_what_is_no_adapter_is_refused_before_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By check too: a directory that is not there, one without adapters, a torn file, ones of another model."""
    torn, strange = tmp_path / "torn", tmp_path / "strange"
    for one in (torn, strange):
        one.mkdir()
        (one / "adapter_config.json").write_text((place / "first/export/adapter_config.json").read_text())
    (torn / "adapter_model.safetensors").write_bytes(b"no")
    file = load_file(place / "first" / "export" / "adapter_model.safetensors")
    save_file({name.replace("q_proj", "qkv"): one for name, one in file.items()}, strange / "adapter_model.safetensors")
    for start, words in (
        (tmp_path / "none", "there is no directory"), (tmp_path, "no adapters can be read there"),
        (torn, "the adapters cannot be read"), (strange, "other matrices"),
    ):
        for command in ("check", "run"):
            with pytest.raises(SystemExit) as ended:
                cli.main([command, str(place / "page.yaml"), f"directory={tmp_path / 'run'}", f"lora.start={start}"])
            assert ended.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", str(place / "page.yaml"), f"model={place / 'first' / 'export'}"])
    assert "lora.start" in capsys.readouterr().err

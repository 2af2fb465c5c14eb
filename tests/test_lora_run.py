"""A run with adapters: only they are trained and kept, it resumes bit by bit, and every command understands it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_run import here
from transformers import AutoModelForCausalLM

from schoolhouse import card, checkpoint, places, talk, trained
from schoolhouse import recipe as recipes
from schoolhouse.config import Lora, Recipe
from schoolhouse.model import lora, spread
from schoolhouse.parallel.mesh import ALONE
from schoolhouse.report import read
from schoolhouse.types import Message, Part

LESSON = """\
model: starter/qwen3
data:
  train: [{path: starter/arithmetic, limit: 120}]
lora: {rank: 4, alpha: 8, dropout: 0.1}
batch: {examples: 4, tokens: 300}
train: {steps: 6}
optim: {learning_rate: 1e-2}
exam: {data: {path: starter/arithmetic:exam, limit: 4}, max_new_tokens: 8, grader: contains}
checkpoint: {every: 3}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.yaml"
    path.write_text(LESSON)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run") / request.param
    here("run", page, f"directory={place}", f"model.precision={request.param}")
    return place


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.verify(run / "checkpoints" / f"step-{step:08d}").tensors(checkpoint.WEIGHTS)


def said(*arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        here(*arguments)
    return out.getvalue()


def test_only_the_adapters_are_trained_and_kept(run: Path) -> None:
    """56 factors of 28 matrices, moved; under 5 % of the parameters; and the base as it was, to the bit."""
    kept = weights(run, 6)
    assert len(kept) == 56 and all("lora_" in name and value.dtype == torch.float32 for name, value in kept.items())
    assert all(bool(value.any()) for value in kept.values())
    told = json.loads((run / "run.json").read_text())
    assert 0 < told["derived"]["trainable"] < 0.05 * told["derived"]["parameters"]
    way = next(row["value"] for row in told["in_force"] if row["what"] == "way")
    assert way.startswith("LoRA rank 4, alpha 8: adapted 28 of 29 matrices") and "frozen: embed_tokens 1" in way
    student, _ = trained.open_student(str(run))
    found = {name.replace(".base_layer", ""): one for name, one in student.model.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(places.model_directory("starter/qwen3"))
    assert {one.dtype for one in found.values()} == {getattr(torch, run.name)}, "it answers as in the run's exams"
    assert all(torch.equal(found[name], one.to(found[name].dtype)) for name, one in plain.named_parameters())


def test_a_stopped_run_goes_on_bit_by_bit(run: Path, page: Path, tmp_path: Path) -> None:
    """Stopped after step 3 and continued, dropout and all: the factors are those of the unbroken run."""
    copy = tmp_path / "again"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    here("run", page, f"directory={copy}", f"model.precision={run.name}")
    one, other = weights(run, 6), weights(copy, 6)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_adapter_is_exported_in_pefts_format(run: Path, tmp_path: Path) -> None:
    """Alpha, rank and base are right; PEFT loads it; the file holds what was trained."""
    assert "identical logits on 4 prompts" in said("export", run, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["peft_type"]) == (4, 8, "LORA")
    assert set(told["target_modules"]) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    base = Path(told["base_model_name_or_path"])
    assert (base / "config.json").is_file()
    file, kept = load_file(tmp_path / "out" / "adapter_model.safetensors"), weights(run, 6)
    assert len(file) == len(kept)
    assert all(torch.equal(file[f"base_model.model.{name.replace('.default', '')}"], kept[name]) for name in kept)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_the_adapters_card_loads_them(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own lines; beside a base of the hub, the hub is told which."""
    said("export", run, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "LoRA r4" in text and "base_model" not in text.split("---")[1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert type(names["student"]).__name__ == "PeftModelForCausalLM" and names["tokenizer"].chat_template
    told = Recipe.model_validate(json.loads((run / "run.json").read_text())["recipe"])
    card.write(tmp_path, tmp_path / "out", read.read(run), told, 6, "adapter", base="Qwen/Qwen3-0.6B", public=True,
               sees=False, proof="")
    facts = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (facts["base_model"], facts["base_model_relation"], facts["library_name"]) == (
        "Qwen/Qwen3-0.6B", "adapter", "peft")


def test_the_merged_model_is_a_plain_one(run: Path, tmp_path: Path) -> None:
    """Tensors by the base's names, shapes and formats; embeddings still tied; it says what the run's model says.

    In float32 both answer alike. In bfloat16 the run's base is rounded and the file's is not, so no two greedy answers
    of a model this young have to agree. There the logits do, to 3 % of their size: the base's own are 1.6 % from those
    of its rounded weights. The base is 29 % away.
    """
    assert "relative difference of logits" in said("export", run, "--merge", "--out", tmp_path / "out")
    base, file = places.model_directory("starter/qwen3"), load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in file.items()} == {
        name: (one.shape, one.dtype) for name, one in plain.items()
    }
    moved = {name for name in file if not torch.equal(file[name], plain[name])}
    assert moved == {name for name in file if "proj" in name}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    students = [trained.open_student(str(one)) for one in (run, tmp_path / "out", base)]
    ids = torch.randint(20, 120, (2, 24), generator=torch.Generator().manual_seed(5))
    for student, *_ in students:
        student.model.eval().set_attn_implementation("sdpa")
    with torch.no_grad():
        run_logits, merged, untrained = (student.model(ids).logits.float() for student, *_ in students)
    size = merged.norm()
    assert (run_logits - merged).norm() < {"float32": 1e-5, "bfloat16": 0.03}[run.name] * size
    assert (untrained - merged).norm() > 0.2 * size
    if run.name == "float32":
        asked = [Message("user", (Part("text", "Tom has 3 pens and buys 4. How many?"),))]
        assert talk.reply(*students[0], asked) == talk.reply(*students[1], asked)


def test_merging_needs_adapters(tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full.yaml"
    full.write_text(LESSON.replace("lora: {rank: 4, alpha: 8, dropout: 0.1}\n", "").replace("steps: 6", "steps: 1"))
    here("run", full, f"directory={tmp_path / 'run'}")
    here("export", tmp_path / "run", "--merge", code=2)
    assert "no adapters to merge" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "where"), [
    ("lora.targets=[q_porj]", "lora.targets"), ("lora.experts=true", "lora.experts"), ("lora.rank=0", "lora.rank"),
])
def test_what_cannot_be_adapted_is_refused(
    setting: str, where: str, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here("run", page, f"directory={tmp_path / 'run'}", setting, code=2)
    assert where in capsys.readouterr().err


def test_another_rank_does_not_continue_a_run(run: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("run", page, f"directory={run}", f"model.precision={run.name}", "lora.rank=8", code=2)
    assert "lora.rank: 4 → 8" in capsys.readouterr().err


def test_what_is_frozen_is_never_held_in_float32(tmp_path: Path) -> None:
    """With bfloat16, from files in either format: what learns is float32, the rest is out of its file and narrow. The
    loss by which it was proved is that of float32 weights."""
    page = tmp_path / "page.yaml"
    page.write_text(LESSON)
    whole, proof = None, []
    for number in (torch.float32, torch.bfloat16):
        directory = tmp_path / str(number)
        if whole is None:
            whole = AutoModelForCausalLM.from_pretrained(places.model_directory("starter/qwen3"))
        shutil.copytree(places.model_directory("starter/qwen3"), directory)
        whole.to(number).save_pretrained(directory)
        one = recipes.read(str(page), [f"model.path={directory}", "model.precision=bfloat16", "lora.dora=true"])
        student, found = spread.proved(directory, one, torch.device("cpu"), ALONE, None)
        numbers = {(value.requires_grad, value.dtype) for value in student.model.parameters()}
        assert numbers == {(True, torch.float32), (False, torch.bfloat16)}
        files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        assert not any(name.startswith(str(directory)) for name in files), "the files may change now"
        proof.append(found.loss)
    assert proof[0] == pytest.approx(proof[1], rel=1e-2) and proof[0] != proof[1]


def test_what_serves_training_alone_is_no_matter_to_who_answers(run: Path, tmp_path: Path) -> None:
    """A run with what only an accelerator has is opened on a processor, too."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    info = json.loads((copy / "run.json").read_text())
    extras = ("liger", "activation_checkpointing", "activation_offload")
    info["recipe"]["model"] |= dict.fromkeys(extras, True)
    (copy / "run.json").write_text(json.dumps(info))
    one, other = (dict(trained.open_student(str(place))[0].model.named_parameters()) for place in (run, copy))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("more", [(), ("lora.dora=true",), ("model.precision=float32",)], ids=["", "dora", "wide"])
def test_a_base_in_bfloat16(more: tuple[str, ...], page: Path, tmp_path: Path) -> None:
    """As most models of the hub are stored: checked against PEFT, trained, exported, and opened by PEFT to the bit. The
    adapters a seed draws are those beside a float32 base."""
    base = tmp_path / "base"
    shutil.copytree(places.model_directory("starter/qwen3"), base)
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
    settings = (f"model.path={base}", "model.precision=bfloat16", "train.steps=3", *more)
    here("selfcheck", page, *settings)
    here("run", page, f"directory={tmp_path / 'run'}", *settings)
    assert "identical logits on 4 prompts" in said("export", tmp_path / "run", "--out", tmp_path / "out")
    drawn = []
    for number in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        one = AutoModelForCausalLM.from_pretrained(base, dtype=number)
        lora.inject(one, Lora(rank=4))
        drawn.append([value for name, value in one.named_parameters() if "lora_A" in name])
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))

"""New tokens: rows for them are made, trained, saved, resumed and exported, and tied embeddings stay tied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_lora_run import said
from test_run import here
from transformers import AutoModelForCausalLM, AutoTokenizer

from schoolhouse import enlarge, places, talk, trained
from schoolhouse.config import Model
from schoolhouse.types import Message, Part

NEW = ("<reply>", "</reply>")
PAGE = """\
model: {path: starter/qwen3, new_tokens: ["<reply>", "</reply>"]}
data: {train: ROWS}
batch: {examples: 2, tokens: 300}
train: {steps: 30}
optim: {learning_rate: 1e-2}
checkpoint: {every: 15}
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    rows = [{"prompt": ask, "completion": f"<reply>{answer}</reply>"} for ask, answer in (
        ("Where is Mia?", "Mia is here"), ("Where is Tom?", "Tom is left"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "page.yaml").write_text(PAGE.replace("ROWS", str(tmp_path / "rows.jsonl")))
    return tmp_path / "page.yaml"


def test_a_new_token_begins_as_the_mean_of_all() -> None:
    """And nothing else of the model or its tokenizer changes."""
    base, found = places.model_directory("starter/qwen3"), places.directory_of(Model(path="starter/qwen3",
                                                                                    new_tokens=NEW))
    assert places.directory_of(Model(path="starter/qwen3", new_tokens=NEW)) == found != base
    plain, enlarged = (AutoModelForCausalLM.from_pretrained(one) for one in (base, found))
    old, new = plain.model.embed_tokens.weight, enlarged.model.embed_tokens.weight
    assert new.shape[0] == old.shape[0] + 2 == enlarged.config.vocab_size and torch.equal(new[:-2], old)
    assert torch.allclose(new[-2:], old.mean(0).expand(2, -1), atol=1e-6)
    assert enlarged.lm_head.weight is enlarged.model.embed_tokens.weight
    first, second = (AutoTokenizer.from_pretrained(one) for one in (base, found))
    assert second.encode("a <reply>b") == [*first.encode("a "), len(first), *first.encode("b")]
    assert second.chat_template == first.chat_template
    ids = torch.arange(5, 25)[None]
    assert torch.equal(plain(ids).logits, enlarged(ids).logits[..., :-2])


def test_spare_rows_are_used_first(tmp_path: Path) -> None:
    """Qwen's models have more rows than their tokenizers have words; the table must not be cut down to these."""
    base = places.model_directory("starter/qwen3")
    model = AutoModelForCausalLM.from_pretrained(base)
    words = len(AutoTokenizer.from_pretrained(base))
    model.resize_token_embeddings(words + 50, mean_resizing=False)
    model.save_pretrained(tmp_path / "spare")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "spare")
    (tmp_path / "out").mkdir()
    enlarge.build(tmp_path / "spare", NEW, tmp_path / "out")
    table = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert table.shape[0] == words + 50
    assert torch.allclose(table[words : words + 2], table[:words].mean(0).expand(2, -1), atol=1e-6)


def test_new_tokens_are_learnt_and_exported(page: Path, tmp_path: Path) -> None:
    """Written in an answer, resumed and exported; plain transformers and the exported tokenizer say the same."""
    here("run", page, f"directory={tmp_path / 'run'}", "--nproc", "1")
    asked = [Message("user", (Part("text", "Where is Mia?"),))]
    answer = talk.reply(*trained.open_student(str(tmp_path / "run")), asked)
    assert answer == "<reply>Mia is here</reply>"
    assert "identical logits" in said("export", tmp_path / "run")
    out = tmp_path / "run" / "export"
    model, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == len(words)
    assert len(words.encode("<reply></reply>")) == 2
    assert talk.reply(*trained.open_student(str(out)), asked) == answer
    base = places.directory_of(Model(path="starter/qwen3", new_tokens=NEW))
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"][-2:]
    assert float((model.model.embed_tokens.weight[-2:] - before).norm(dim=1).min().detach()) > 0.1


def test_with_adapters_the_embeddings_must_be_trained(page: Path, tmp_path: Path, capsys) -> None:
    here("run", page, f"directory={tmp_path / 'no'}", "lora.rank=4", code=2)
    assert "lora.modules_to_save: [embed_tokens, lm_head]" in capsys.readouterr().err
    here("run", page, f"directory={tmp_path / 'run'}", "lora.rank=4", "lora.modules_to_save=[embed_tokens]")
    assert "identical logits" in said("export", tmp_path / "run")
    told = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(told["base_model_name_or_path"])
    adapter = PeftModel.from_pretrained(base, tmp_path / "run" / "export")
    assert "relative difference" in said("export", tmp_path / "run", "--merge")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "run" / "merged").encode("Where <reply>Tom is")])
    with torch.no_grad():
        one, other = adapter.eval()(ids).logits, merged.eval()(ids).logits
    assert float((one - other).abs().max()) < 1e-5 * float(one.abs().max())


@pytest.mark.parametrize(("tokens", "said_so"), [
    ('["<think>"]', "is a token of this model already"), ('["<a>","<a>"]', "twice"), ('[""]', "new_tokens"),
])
def test_what_is_no_new_token(tokens: str, said_so: str, page: Path, tmp_path: Path, capsys) -> None:
    here("run", page, f"directory={tmp_path / 'run'}", f"model.new_tokens={tokens}", code=2)
    assert said_so in capsys.readouterr().err


def test_a_model_without_weights_is_not_a_cache_that_cannot_be_written(page: Path, tmp_path: Path, capsys) -> None:
    """transformers raises OSError for both."""
    empty = tmp_path / "empty"
    shutil.copytree(places.model_directory("starter/qwen3"), empty, ignore=shutil.ignore_patterns("*.safetensors"))
    here("run", page, f"directory={tmp_path / 'run'}", f"model.path={empty}", code=2)
    told = capsys.readouterr().err
    assert "the model does not load" in told and "cache" not in told

"""Real input: GSM8K with the Qwen2.5 tokenizer and its true vocabulary, and a real pretrained Llama."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from schoolhouse import recipe as recipes
from schoolhouse.data import choose, prepare, served


def schoolhouse(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would."""
    command = [sys.executable, "-m", "schoolhouse", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done


def metrics(directory: Path, kind: str) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, shared_module: Path) -> Path:
    """A small Qwen2 with the true vocabulary and the real Qwen2.5 tokenizer."""
    place = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=151_643, eos_token_id=151_645,
    )
    Qwen2ForCausalLM(config).save_pretrained(place)
    for file in (shared_module / "tokenizers" / "qwen2.5-instruct").iterdir():
        shutil.copy(file, place / file.name)
    return place


@pytest.fixture(scope="module")
def shared_module() -> Path:
    place = Path(__file__).resolve().parents[2] / "shared"
    if not place.is_dir():
        pytest.skip("needs the real data of ../shared, which is not here")
    return place


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory, shared_module: Path, qwen: Path) -> Path:
    """A recipe for GSM8K as it is."""
    path = tmp_path_factory.mktemp("recipes") / "gsm8k.yaml"
    path.write_text(f"""
model: {qwen}
data: {{train: {shared_module}/gsm8k/train.jsonl, validation: {shared_module}/gsm8k/test.jsonl}}
batch: {{examples: 64, tokens: 4096}}
optim: {{learning_rate: 3.0e-3}}
train: {{steps: 8}}
""")
    return path


def test_all_gsm8k_rows_are_accounted_for_and_prepared_once(gsm8k: Path) -> None:
    """7,473 rows in, 7,473 examples, every stop token a target; a second start maps what the first one made.

    Limits: 60 s for the first start and 2 s for the second, as promised for two cores.
    """
    recipe = recipes.read(gsm8k)
    serving, rules = served.serving(recipe.model, Path(recipe.model.path)), served.rules(recipe)
    started = time.perf_counter()
    first = prepare.prepare(recipe.data, choose.choices(recipe)["train"], serving, rules)
    assert time.perf_counter() - started < 60
    ledger = first.ledger
    assert (ledger.rows, ledger.kept, ledger.examples, ledger.stopped_turns) == (7473,) * 4
    assert not ledger.dropped and ledger.turns == 7473
    started = time.perf_counter()
    again = prepare.prepare(recipe.data, choose.choices(recipe)["train"], serving, rules)
    assert time.perf_counter() - started < 2
    assert again.directory == first.directory


def test_gsm8k_tokens_decode_to_the_rows(gsm8k: Path, shared: Path) -> None:
    """The targets of every 97th row decode to its answer and the stop token, after the prompt as served."""
    recipe = recipes.read(gsm8k)
    serving, rules = served.serving(recipe.model, Path(recipe.model.path)), served.rules(recipe)
    store = prepare.prepare(recipe.data, choose.choices(recipe)["train"], serving, rules)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    rows = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").open()]
    for index in range(0, len(store), 97):
        example, row = store[index], rows[index]
        assert example.origin.row == index + 1
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False
        )
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example.input_ids[: len(context)].tolist() == context
        targets = example.labels[example.weights != 0]
        assert tokenizer.decode(targets) == row["answer"] + "<|im_end|>"
        assert example.supervised == len(example.labels) - len(context) + 1


def test_validation_loss_on_gsm8k_falls(gsm8k: Path, shared: Path, tmp_path: Path) -> None:
    """Twelve small steps from random weights take the loss on test.jsonl well below its start, log(151,936)."""
    few = f"data.validation={{path: {shared}/gsm8k/test.jsonl, limit: 40}}"
    schoolhouse("run", gsm8k, f"directory={tmp_path}/run", few, "batch.examples=16", "train.steps=12",
                "optim.learning_rate=1e-2")
    before, after = (record["loss"] for record in metrics(tmp_path / "run", "eval"))
    assert before == pytest.approx(11.93, abs=0.2)
    assert after < before - 1
    assert metrics(tmp_path / "run", "step")[-1]["examples"] == 16


def test_stories260k_matches_its_golden_values(shared: Path) -> None:
    """The pretrained Llama through our packed path gives its float64 reference's golden loss of supervised tokens."""
    from schoolhouse.config import Model
    from schoolhouse.model import isolation, load

    place, golden = _stories(shared)
    student = load.load(place, Model(path=str(place)), torch.device("cpu"))
    ids = torch.tensor(golden["ids"])
    loss = student.loss(isolation._pack([ids, ids[:40]], None, None))
    both = (golden["nll_per_token"][isolation.OPENING : end : isolation.EACH] for end in (None, 39))
    wanted = sum(map(sum, both))
    assert float(loss.nll.detach()) == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(place)(input_ids=ids[None]).logits[0, -1]
    assert torch.allclose(logits, torch.tensor(golden["last_position_logits"]), atol=2e-4)


def test_stories260k_is_tuned_exported_and_reloaded(shared: Path, tmp_path: Path) -> None:
    """Fine-tuned on real rows, exported, and loaded by plain transformers with the logits of the run."""
    from schoolhouse import trained

    place, _ = _stories(shared)
    path = tmp_path / "stories.yaml"
    path.write_text(f"""
model: {{path: {place}, chat_template: plain}}
data: {{train: {{path: {shared}/gsm8k/train.jsonl, limit: 64}}}}
batch: {{examples: 16, tokens: 2048}}
optim: {{learning_rate: 1.0e-3}}
train: {{steps: 6}}
""")
    schoolhouse("run", path, f"directory={tmp_path}/run")
    steps = metrics(tmp_path / "run", "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    schoolhouse("export", tmp_path / "run")
    student, model = trained.open_student(str(tmp_path / "run"))
    student.model.set_attn_implementation("sdpa")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    ids = torch.tensor(model.tokenize(["Once upon a time, there was a little girl"]))
    with torch.no_grad():
        assert torch.equal(student.model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    base = AutoModelForCausalLM.from_pretrained(place)
    assert not torch.equal(base.get_input_embeddings().weight, again.get_input_embeddings().weight)
    assert again.generation_config.eos_token_id == [2]


def _stories(shared: Path) -> tuple[Path, dict]:
    place = shared / "tiny_models" / "stories260K"
    return place / "hf", json.loads((place / "golden.json").read_text())

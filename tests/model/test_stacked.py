"""Experts stacked once in the cache: the same weights, mapped from files instead of made in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse.config import Model
from schoolhouse.errors import ModelError
from schoolhouse.model import isolation, load, sight, spread, stacked
from schoolhouse.starter import miniatures

MIXTURES = ("qwen3_moe", "deepseek_v2", "deepseek_v3")


def saved(family: str, place: Path, number: torch.dtype = torch.float32) -> Path:
    """A miniature with random weights, in files as its family writes them."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(**miniatures.settings(family, 256))
    place.mkdir()
    config.save_pretrained(place)
    model = sight.loader(place).from_config(config).to(number)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("family", MIXTURES)
def test_the_copy_is_the_model(family: str, tmp_path: Path) -> None:
    """Every weight and buffer to the bit, with nothing missing, and the copy itself needs no copy."""
    directory = saved(family, tmp_path / family)
    copy = stacked.directory_of(directory, torch.float32)
    assert copy != directory and stacked.directory_of(directory, torch.float32) == copy
    assert stacked.directory_of(copy, torch.float32) == copy and spread.stored(copy) == torch.float32
    one, other = (load.plain(place).state_dict() for place in (directory, copy))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_what_is_not_stacked_is_left_alone(family: str, tmp_path: Path) -> None:
    directory = saved(family, tmp_path / family)
    assert stacked.directory_of(directory, torch.float32) == directory


LOADING = """
import json, sys, threading, time
from pathlib import Path
import torch
from schoolhouse.config import Model
from schoolhouse.model import load, stacked
from transformers.models.qwen3_moe import modeling_qwen3_moe


def held():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def most(work):
    peak, over = [0], threading.Event()
    def watch():
        while not over.wait(0.001):
            peak[0] = max(peak[0], held())
    thread = threading.Thread(target=watch)
    before = held()
    thread.start()
    try:
        kept = work()
    finally:
        over.set()
        thread.join()
    return peak[0] - before


small, directory = Path(sys.argv[1]), Path(sys.argv[2])
stacked.directory_of(small, torch.float32)  # what is imported on the first use is no weight
load.load(small, Model(path="x"), torch.device("cpu"))
made = []
writing = most(lambda: made.append(stacked.directory_of(directory, torch.float32)))
mapped, whole = (most(lambda: load.load(place, Model(path="x"), torch.device("cpu"))) for place in (made[0], directory))
print(json.dumps([writing, mapped, whole]))
"""


def test_no_process_holds_the_experts(tmp_path: Path) -> None:
    """Memory of its own that a process takes, of 8 layers of 12 MiB: to write the copy, to load it, and without it.

    Writing may hold the tensors of one layer twice (read, and stacked); a mapped model holds none.
    """
    size = {"hidden_size": 128, "num_hidden_layers": 8, "num_experts": 64, "moe_intermediate_size": 128,
            "num_experts_per_tok": 2, "decoder_sparse_step": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": 100, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **size)).save_pretrained(tmp_path / "big")
    layer = 64 * 3 * 128 * 128 * 4
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(saved("qwen3_moe", tmp_path / "small")), str(tmp_path / "big")],
        capture_output=True, text=True, check=True,
    )
    writing, mapped, whole = json.loads(done.stdout.splitlines()[-1])
    print(f"layers of memory: writing {writing / layer:.2f}, mapped {mapped / layer:.2f}, whole {whole / layer:.2f}")
    assert writing < 4 * layer and mapped < layer and whole > 7 * layer


def test_a_student_of_the_copy_is_ready_to_train(tmp_path: Path) -> None:
    directory = saved("qwen3_moe", tmp_path / "one")
    copy = stacked.directory_of(directory, torch.float32)
    one, other = (load.load(place, Model(path="x"), torch.device("cpu")) for place in (directory, copy))
    assert isolation.prove(one).loss == isolation.prove(other).loss


def test_weights_that_are_in_no_file_are_refused(tmp_path: Path) -> None:
    """transformers would draw them at random, and log it."""
    directory = saved("qwen3", tmp_path / "one")
    weights = load_file(directory / "model.safetensors")
    save_file({name: one for name, one in weights.items() if "layers.1.mlp" not in name},
              directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"3 weights are in no file, e.g. model\.layers\.1\.mlp\.down_proj\.weight"):
        load.load(directory, Model(path="x"), torch.device("cpu"))

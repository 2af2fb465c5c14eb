"""Blocks that are compiled, or computed again: the same loss and gradient; or the setting is refused.

The same few graphs serve whatever lengths.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import seeing
import torch
from test_families import MIXTURES, adapters, student
from test_invariance import PACKS, a_step, examples
from test_run import LESSON, here
from torch._dynamo.utils import counters

from schoolhouse import train
from schoolhouse.config import Lora
from schoolhouse.data import vision
from schoolhouse.errors import ConfigError
from schoolhouse.model import blocks, isolation
from schoolhouse.model.load import Student
from schoolhouse.starter import miniatures
from schoolhouse.types import Step

CPU = torch.device("cpu")
TRACED = "aot_eager"
"""Everything of torch.compile but the compiler of kernels, which takes ten times as long."""


@pytest.fixture(autouse=True)
def afresh() -> None:
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()


def gradient(one: Student, rows: list, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step of several micro-batches, each of other lengths."""
    return of_step(one, a_step(rows, PACKS["planned"](rows)), seed)


def of_step(one: Student, step: Step, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    found, *_ = train.compute_gradient(one, step, seed)
    return found, {name: each.grad for name, each in one.model.named_parameters() if each.grad is not None}


def some_adapters(family: str) -> Lora:
    """Those of `test_families` but on experts, which are refused."""
    return adapters(family).model_copy(update={"experts": False} if family in MIXTURES else {})


def check(family: str, way: str, backend: str, again: bool = False, **changes: object) -> None:
    """Of float32, to 1e-5 of the longest gradient: kernels sum in another order (4e-7 was seen)."""
    rows = examples("fractional", number=8, seed=3)
    adapted = some_adapters(family) if way == "lora" else None
    plain, fast = (student(family, adapted, lighter, **changes) for lighter in (True, False))
    plain.model.float(), fast.model.float()
    assert blocks.compile_blocks(fast.model, CPU, backend) == fast.model.config.num_hidden_layers
    if again:
        blocks.compute_again(fast.model, keep_attention=True)
    check_same(gradient(plain, rows), gradient(fast, rows))


def check_same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    (loss, wanted), (found, gradients) = one, other
    longest = max(float(one.norm()) for one in wanted.values())
    assert counters["stats"]["unique_graphs"] > 1, "nothing of a block was compiled"
    assert found == pytest.approx(loss, rel=1e-6) and gradients.keys() == wanted.keys()
    assert all(float((gradients[name] - one).norm()) < 1e-5 * longest for name, one in wanted.items())


def test_compiled_blocks_learn_the_same() -> None:
    check("qwen3", "full", "inductor")


@pytest.mark.parametrize(("family", "way", "again"), [
    ("gemma3_text", "full", True), ("qwen2", "lora", False), ("qwen3_moe", "full", False),
])
def test_with_what_else_there_is(family: str, way: str, again: bool) -> None:
    check(family, way, TRACED, again)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_every_architecture(family: str, way: str, again: bool) -> None:
    check(family, way, TRACED, again)


@pytest.mark.slow
@pytest.mark.parametrize("family", vision.FAMILIES)
def test_every_sight(family: str, tmp_path: Path) -> None:
    """Blocks of vision towers too, for images of whatever sizes and none."""
    plain, fast = (seeing.student(family, lighter=lighter) for lighter in (True, False))
    plain.model.float(), fast.model.float()
    blocks.compile_blocks(fast.model, CPU, TRACED)
    eyes = seeing.eyes(family)
    kept = seeing.stored(seeing.examples(eyes, [0, 1, 3, 2, 0, 4, 1], seed=3), tmp_path)
    step = seeing.step(kept, [[0, 1], [2], [3], [4], [5, 6]], eyes)
    check_same(of_step(plain, step), of_step(fast, step))


def test_neither_layers_nor_lengths_are_compiled_again() -> None:
    """What was compiled for one block and one micro-batch serves all; the count is what a recompilation would raise."""
    graphs = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        one = student("qwen3", lighter=False, num_hidden_layers=layers)
        one.model.float()
        blocks.compile_blocks(one.model, CPU, TRACED)
        for number in (8, 5, 11):
            gradient(one, examples("fractional", number=number, seed=number))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 6, "two parts of a block, one of the last, two of attention, one of its trial"


def test_adapters_of_experts_are_refused() -> None:
    """Each forward would be compiled anew; the ninth, computed again in backward, was seen to fail."""
    with pytest.raises(ConfigError, match="adapters of experts are not compiled"):
        blocks.compile_blocks(student("gpt_oss", adapters("gpt_oss")).model, CPU, TRACED)


def test_only_what_is_trained_is_compiled() -> None:
    one = student("qwen3", lighter=False)
    one.model.float()
    blocks.compile_blocks(one.model, CPU, TRACED)
    before = counters["stats"]["unique_graphs"]
    assert isolation.prove(one).difference < 2e-5
    assert counters["stats"]["unique_graphs"] == before


def test_a_machine_that_cannot_compile_is_told_so() -> None:
    one = student("qwen3")
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"does not work here: .*No working C\+\+ compiler") as told,
    ):
        blocks.compile_blocks(one.model, CPU)
    assert "model.compile=false" in told.value.remedy


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_run_with_compiled_blocks(tmp_path: Path) -> None:
    """The command line's switch, with all that a run has: it says so, and learns what the run without it learns."""
    page, losses = tmp_path / "page.yaml", {}
    page.write_text(LESSON.replace("steps: 8", "steps: 4"))
    fast = ("model.compile=true", "model.activation_checkpointing=selective")
    for name, more in (("plain", ()), ("fast", fast)):
        here("run", page, f"directory={tmp_path / name}", *more)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [one["loss"] for one in lines if one["kind"] == "step"]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-4)  # four steps of rounding
    infos = [json.loads((tmp_path / name / "run.json").read_text())["in_force"] for name in losses]
    assert [row["value"] for info in infos for row in info if row["what"] == "blocks"] == [
        "gates, norms, rotations in fewer passes",
        "compiled where they are trained, computed again in backward but for attention",
    ]

"""The user's own check: it agrees where all is well, and sees what has gone wrong in other tools."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from schoolhouse import cli, selfcheck
from schoolhouse.config import Model, Recipe
from schoolhouse.errors import ModelError
from schoolhouse.model import elementwise, layouts, load
from schoolhouse.types import Shared

RECIPE = {
    "model": "starter/qwen3", "data": {"train": "starter/recall", "workers": 1}, "batch": {"tokens": 400},
}
"""Three rows make more than one pack of these, so that packs are added up too."""


@pytest.fixture(scope="module")
def lines(cache: Path) -> list[selfcheck.Line]:
    recipe = Recipe.model_validate({**RECIPE, "model": {"path": "starter/qwen3", "precision": "bfloat16"}})
    return selfcheck.selfcheck(recipe, rows=3)


def test_a_sound_student_agrees(lines: list[selfcheck.Line]) -> None:
    """In float32 to a tenth of what is allowed: the limit has room for deeper models, and is not what holds here."""
    selfcheck.refuse(lines, "test")
    strict = [line for line in lines if line.precision == "float32"]
    assert all(line.difference < line.allowed / 10 for line in strict)
    assert {line.precision for line in lines} == {"float32", "bfloat16"}


def test_every_parameter_is_compared(lines: list[selfcheck.Line]) -> None:
    strict = {line.what for line in lines if line.precision == "float32"}
    projections = {f"layers.*.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert projections | {"loss", "embed_tokens.weight", "norm.weight", "layers.*.mlp.down_proj.weight"} <= strict
    assert len(strict) == 14 and all(line.plain > 0 for line in lines)


def test_bfloat16_is_held_to_what_plain_transformers_itself_reaches(lines: list[selfcheck.Line]) -> None:
    for line in lines:
        if line.precision == "bfloat16":
            assert selfcheck.MORE <= line.allowed < 0.2, "a measure that anything passes is none"


def test_a_leak_between_examples_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One boundary lost, and each example of a pack sees those before it: exit code 2, the table printed, no run."""
    whole: Callable[..., layouts.Layout] = layouts.layout

    def lost(boundaries: tuple[int, ...], *rest: Any, shared: Shared | None = None, **named: Any) -> layouts.Layout:
        return whole((0, boundaries[-1] - sum(shared.begins if shared else ())), *rest, **named)

    monkeypatch.setattr(layouts, "layout", lost)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: starter/qwen3\ndata: {train: starter/recall, workers: 1}\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["selfcheck", str(path), "--rows", "3"])
    assert caught.value.code == 2


@pytest.mark.parametrize("part", [elementwise._Norm, elementwise._Turn])
def test_a_wrong_gradient_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch, cache: Path, part: type) -> None:
    """The plain side has none of our parts."""
    own = part.backward

    def wrong(ctx: Any, above: torch.Tensor) -> tuple:
        first, *rest = own(ctx, above)
        return 1.01 * first, *rest

    monkeypatch.setattr(part, "backward", staticmethod(wrong))
    with pytest.raises(ModelError, match=r"of 14 .* most of all"):
        selfcheck.refuse(selfcheck.selfcheck(Recipe.model_validate(RECIPE), rows=3), "test")


def test_the_plain_side_is_neither_compiled_nor_lighter(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    own, met = load.load, set()

    def noted(directory: Path, settings: Model, *rest: Any, lighter: bool = True, **named: Any) -> load.Student:
        met.add((settings.compile, lighter))
        return own(directory, settings.model_copy(update={"compile": False}), *rest, lighter=lighter, **named)

    monkeypatch.setattr(load, "load", noted)
    recipe = Recipe.model_validate({**RECIPE, "model": {"path": "starter/qwen3", "compile": True}})
    selfcheck.refuse(selfcheck.selfcheck(recipe, rows=3), "test")
    assert met == {(True, True), (False, False)}


@pytest.mark.parametrize("axis", ["ulysses", "shard"])
def test_layouts_of_two_processes_agree(tmp_path: Path, axis: str) -> None:
    """The whole command under --nproc 2: each process computes its part, the first prints the one table."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: starter/qwen3\ndata: {train: starter/recall, workers: 1}\nbatch: {tokens: 700}\n")
    words = ["selfcheck", str(path), "--rows", "4", "--nproc", "2", f"parallel.{axis}=2"]
    done = subprocess.run([sys.executable, "-m", "schoolhouse", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 14 and "differs" not in done.stdout


def test_the_command_prints_every_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: starter/qwen3\ndata: {train: starter/recall, workers: 1}\n")
    cli.main(["selfcheck", str(path), "--rows", "1"])
    printed = capsys.readouterr().out
    assert printed.count("agrees") == 14 and "layers.*.self_attn.q_proj.weight" in printed


def test_adapters_are_compared_where_they_are_not_zero() -> None:
    """Fresh adapters have second factors of zeros, and first factors with no gradient at all: both are moved first."""
    recipe = Recipe.model_validate({**RECIPE, "lora": {"rank": 4, "dora": True}})
    lines = selfcheck.selfcheck(recipe, rows=3)
    selfcheck.refuse(lines, "test")
    longest = max(line.plain for line in lines if line.what != "loss")
    factors = [line for line in lines if "lora_" in line.what]
    assert len(factors) == 3 * 7 and all(line.plain > 1e-3 * longest for line in factors)


def test_adapters_agree_on_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: starter/qwen3\ndata: {train: starter/recall, workers: 1}\nlora: {rank: 3}\n")
    words = ["selfcheck", str(path), "--rows", "2", "--nproc", "2", "parallel.shard=2"]
    done = subprocess.run([sys.executable, "-m", "schoolhouse", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 15 and "differs" not in done.stdout


def gradients(scale: float = 1.0, noise: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = {f"model.layers.{index}.{name}": torch.randn(40, generator=generator) for index in range(3) for name in "ab"}
    made["model.layers.0.c"] = torch.full((4,), 1e-9)  # what a softmax ignores: its gradient is rounding alone
    added = {name: noise * torch.randn(value.shape, generator=generator) for name, value in made.items()}
    return 2.0 * scale, {name: value * scale + added[name] for name, value in made.items()}


def wrong(found: tuple[float, dict[str, torch.Tensor]]) -> Iterator[str]:
    lines = selfcheck.judge("float32", selfcheck.compare(gradients(), found))
    return (line.what for line in lines if not line.agrees)


def test_what_is_told_apart() -> None:
    """Rounding passes; a factor of 1.001, a gradient that is missing or too much, and NaN do not."""
    assert list(wrong(gradients(noise=1e-7))) == []
    assert set(wrong(gradients(scale=1.001))) == {"loss", "layers.*.a", "layers.*.b"}
    loss, short = gradients()
    del short["model.layers.1.b"]
    assert list(wrong((loss, short))) == ["layers.*.b"]
    assert list(wrong((loss, {**gradients()[1], "lm_head.weight": torch.ones(3)}))) == ["lm_head.weight"]
    broken = {**gradients()[1], "model.layers.2.a": torch.full((40,), math.nan)}
    assert list(wrong((loss, broken))) == ["layers.*.a"]
    assert list(wrong((math.nan, gradients()[1]))) == ["loss"]


def test_the_worst_difference_is_named() -> None:
    lines = [selfcheck.Line("float32", what, 1.0, difference, 1e-4) for what, difference in (("a", 1e-3), ("b", 2e-3))]
    with pytest.raises(ModelError, match=r"2 of 3 .* most of all b in float32: 2.0e-03") as caught:
        selfcheck.refuse([*lines, selfcheck.Line("float32", "c", 1.0, 0.0, 1e-4)], "recipe.yaml")
    assert caught.value.exit_code == 2

"""Long examples are looked at in parts: the same loss and gradient, and nothing as large as length x length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import test_vision_invariance as seeing
import torch
from test_families import student
from test_invariance import PACKS, check_equal, examples
from torch._subclasses.fake_tensor import FakeTensorMode

from schoolhouse.model import attention
from schoolhouse.model.layouts import Group
from schoolhouse.model.varlen import Rule

LENGTH, WINDOW, HEADS = 1200, 50, 2


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of a few queries; the number of queries of every part that was looked at."""
    queries: list[int] = []

    def counted(whole: Callable, query: torch.Tensor, *rest: object) -> torch.Tensor:
        queries.append(query.shape[2])
        return whole(query, *rest)

    for whole in (attention._looked_up, attention._written_out):
        monkeypatch.setattr(attention, whole.__name__, functools.partial(counted, whole))
    monkeypatch.setattr(attention, "ROWS", 3)
    monkeypatch.setattr(attention, "SCORES", 1 << 11)
    return queries


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_parts_are_the_whole(family: str, small_parts: list[int]) -> None:
    """To 1e-9 in float64, against transformers' own layers: windows, soft-capping, sinks."""
    rows = examples("fractional", number=8, seed=3)
    check_equal(student(family), rows, PACKS["planned"](rows))
    longest = max(len(one.input_ids) for one in rows)
    assert longest > 20 and any(one < longest / 2 for one in small_parts[1:] if one > 1)


def test_parts_where_visual_tokens_see_one_another(small_parts: list[int], tmp_path: Path) -> None:
    seeing.check(seeing.student("gemma3"), "gemma3", seeing.IMAGES["mixed"], seeing.PACKS["four"], tmp_path)
    assert len(set(small_parts)) > 2


@pytest.mark.parametrize("rule", [
    Rule(True, WINDOW, None, None, None, 0.0), Rule(True, WINDOW, 5.0, None, None, 0.0),
    Rule(True, None, None, torch.zeros(HEADS), None, 0.0),
], ids=["window", "window and soft-capping", "sinks"])
def test_nothing_grows_with_the_square_of_the_length(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward and its backward, the largest tensor that any operation makes."""
    from test_counts import Calls

    monkeypatch.setattr(attention, "SCORES", 1 << 16)
    states = [torch.randn(1, HEADS, LENGTH, 8, requires_grad=True) for _ in range(3)]
    with Calls() as calls:
        attention._of_group(*states, Group(1, range(LENGTH)), rule, {}).sum().backward()
    assert 0 < calls.largest < LENGTH * LENGTH * HEADS / 4
    assert all(bool(one.grad.any()) for one in states)


@pytest.mark.parametrize("serves", [True, False])
def test_grouped_heads_on_an_accelerator(serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels beside FlashAttention know no grouped heads; asked for them, PyTorch holds all T x T scores."""
    asked = []
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: asked.append(params) or serves)
    monkeypatch.setattr(attention, "SDPAParams", lambda *given: given)
    states, calls = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)], []
    wanted = attention._looked_up(*states, None, Rule())
    monkeypatch.setattr(attention.products, "attend", lambda *given, **how: calls.append((given, how)))
    with FakeTensorMode():
        attention._looked_up(*(torch.empty(one.shape, device="cuda") for one in states), None, Rule())
    (given, how), heads = calls[0], 2 if serves else 4
    assert (len(asked), how["enable_gqa"], [one.shape[1] for one in given[:3]]) == (1, serves, [4, heads, heads])
    repeated = [states[0], *(one.repeat_interleave(2, 1) for one in states[1:])]
    monkeypatch.undo()
    assert torch.allclose(attention._looked_up(*repeated, None, Rule()), wanted, atol=1e-6)

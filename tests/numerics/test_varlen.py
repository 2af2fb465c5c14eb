"""Kernels for examples of any length, as far as a machine without a GPU shows them: what they are asked for, the masks
they are given, their results by PyTorch's own uncompiled FlexAttention, and that one which is wrong is not used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from test_families import student
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from schoolhouse.model import attention, layouts, varlen
from schoolhouse.model.varlen import Ends, Heads, Rule
from schoolhouse.parallel.mesh import ALONE

CPU = torch.device("cpu")
BOUNDARIES = (0, 1, 150, 151, 600, 680)
"""Examples of one token, of a part of a block of 128, and over five blocks."""
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
RULES = {
    "causal": Rule(), "window": Rule(window=40), "long window": Rule(window=1000), "capped": Rule(softcap=3.0),
    "sinks": Rule(sinks=SINKS), "all": Rule(window=40, softcap=3.0, sinks=SINKS, scaling=0.2),
}


@pytest.fixture
def pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention that is not compiled, and that lets itself be differentiated on a processor."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def states(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BOUNDARIES[-1], heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def runs() -> Tensor:
    """Images: within an example, across blocks of 128, longer than a window, two side by side."""
    found = torch.zeros(BOUNDARIES[-1], dtype=torch.int64)
    for number, (start, end) in enumerate([(3, 10), (100, 149), (200, 290), (290, 400), (630, 680)], 1):
        found[start:end] = number
    return found


def by_groups(*given: Tensor, rule: Rule, visual: Tensor | None = None) -> Tensor:
    return attention._attend(*given, layouts.layout(BOUNDARIES, CPU, visual=visual), rule)


def check_equal(found: Tensor, wanted: Tensor, leaves: list[Tensor], tolerance: float = 1e-9) -> None:
    above = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, leaves, above), torch.autograd.grad(wanted, leaves, above), strict=True)
    for one, other in [(found, wanted), *pairs]:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("images", [False, True])
def test_flex_attention_is_asked_for_what_the_groups_compute(name: str, images: bool, pure: None) -> None:
    """To 1e-9 in float64, result and gradients; uncompiled, it looks at every pair by the mask's rule."""
    given, rule, visual = states(), RULES[name], runs() > 0 if images else None
    seen = layouts._runs(visual, BOUNDARIES) if images else None
    found = varlen.attend("flex", *given, varlen.ends(BOUNDARIES, CPU, seen), rule)
    check_equal(found, by_groups(*given, rule=rule, visual=visual), given)


@pytest.mark.parametrize("window", [None, 1, 40, 128, 300])
@pytest.mark.parametrize("images", [False, True])
def test_blocks_of_the_mask_hold_what_their_rule_says(window: int | None, images: bool) -> None:
    """Every pair that a query sees lies in a block that is looked at, and blocks that are taken whole hold no other;
    about as few blocks are looked at as PyTorch finds by asking for every pair."""
    ends = varlen.ends(BOUNDARIES, CPU, runs() if images else None)
    mask = varlen._blocks(ends, window, CPU)
    tokens, side = BOUNDARIES[-1], varlen.BLOCK
    places = torch.arange(tokens)
    sees = varlen._sight(ends, window, CPU)(0, 0, places[:, None], places[None])
    partial, whole = (
        {(row, int(key)) for row in range(len(counts)) for key in order[row, : counts[row]]}
        for counts, order in ((mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0]),
                              (mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]))
    )
    assert not partial & whole
    needed = set()
    for row, column in itertools.product(range(-(-tokens // side)), repeat=2):
        block = sees[row * side : (row + 1) * side, column * side : (column + 1) * side]
        if block.any():
            needed.add((row, column))
        assert (row, column) not in whole or bool(block.all())
    assert needed <= partial | whole
    assert len(partial | whole) <= len(needed) + 2
    assert bool(whole) == (window not in (1, 40, 128))


def flash(query, key, value, from_, to, asking, longest, *, scale, window_size, enable_gqa) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, example by example."""
    assert (asking, longest) == (int(from_.diff().max()), int(to.diff().max())) and from_.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    parts = []
    for (first, last), (start, end) in zip(*(itertools.pairwise(one.tolist()) for one in (from_, to)), strict=True):
        q, k, v = query[first:last].transpose(0, 1), *(one[start:end].transpose(0, 1) for one in (key, value))
        k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(end - start - (last - first), end - start)[:, None] - torch.arange(end - start)
        left, right = (end if side < 0 else side for side in window_size)
        seen = (distance <= left) & (-distance <= right)
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("rule", [
    Rule(), Rule(window=40, scaling=0.3), Rule(window=1), Rule(window=449), Rule(window=1000),
], ids=str)
def test_flash_attention_is_asked_for_what_the_groups_compute(rule: Rule, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    given = states()
    found = varlen.attend("varlen", *given, varlen.ends(BOUNDARIES, CPU), rule)
    check_equal(found, by_groups(*given, rule=rule), given)


def test_the_real_kernel_takes_what_it_is_given() -> None:
    """The operation and its backward on tensors without values: shapes and the names of arguments."""
    given = [pretended(heads, 64).requires_grad_() for heads in (4, 2, 2)]
    offsets = torch.empty(6, device="meta", dtype=torch.int32)
    ends = Ends(offsets, 449, BOUNDARIES, offsets, 449)
    found = varlen.attend("varlen", *given, ends, Rule(window=40))
    grads = torch.autograd.grad(found, given, torch.empty_like(found))
    assert found.shape == given[0].shape
    assert [one.shape for one in grads] == [one.shape for one in given]


def pretended(heads: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(BOUNDARIES[-1], heads, size, device="meta", dtype=dtype)


@pytest.mark.parametrize(("query", "rule", "images", "wanted"), [
    (pretended(4, 64), Rule(), False, "varlen"),
    (pretended(4, 64), Rule(window=8), False, "varlen"),
    (pretended(4, 64), Rule(), True, "flex"),
    (pretended(4, 64), Rule(softcap=5.0), False, "flex"),
    (pretended(4, 64), Rule(sinks=SINKS), False, "flex"),
    (pretended(4, 64)[:100], Rule(softcap=5.0), False, None),
    (pretended(4, 64), Rule(dropout=0.1), False, None),
    (pretended(4, 64, torch.float32), Rule(), False, None),
])
def test_which_kernel_computes_what(query, rule, images, wanted) -> None:
    ends = varlen.ends(BOUNDARIES, CPU, runs() if images else None, frozenset({"varlen", "flex"}))
    assert varlen.kernel(query, rule, ends) == wanted
    assert varlen.kernel(query, rule, None) is None
    assert varlen.kernel(query, rule, varlen.ends(BOUNDARIES, CPU)) is None
    with torch.no_grad():
        assert varlen.kernel(query, rule, ends) == (None if wanted == "flex" else wanted)


HEADS = Heads(4, 2, 64, 64)


def fault(
    chosen: str, heads: Heads = HEADS, softcap: float | None = None, sinks: bool = False, images: bool = False,
    rests: bool = False,
) -> str:
    return varlen.fault.__wrapped__(chosen, heads, softcap, sinks, images, CPU, rests)


def test_a_kernel_that_is_right_is_trusted(pure: None, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    assert fault("varlen") == "" and fault("varlen", Heads(3, 1, 128, 128)) == ""
    assert fault("varlen", rests=True) == ""
    assert fault("flex", softcap=50.0) == "" and fault("flex", sinks=True) == "" and fault("flex", images=True) == ""


@pytest.mark.parametrize("wrong", ["a key too many", "no scale", "other examples", "not a number"])
def test_a_kernel_that_is_wrong_is_not_used(wrong: str, monkeypatch) -> None:
    def attn(query, key, value, from_, to, *rest, scale, window_size, enable_gqa) -> Tensor:
        if wrong == "a key too many" and window_size[0] >= 0:
            window_size = (window_size[0] + 1, 0)
        elif wrong == "no scale":
            scale = 1.0
        elif wrong == "other examples":
            tokens = len(query)
            from_, rest = torch.tensor([0, tokens], dtype=torch.int32), (tokens, tokens)
        found = flash(query, key, value, from_, from_, *rest, scale=scale, window_size=window_size,
                      enable_gqa=enable_gqa)
        return found * torch.nan if wrong == "not a number" else found

    monkeypatch.setattr(varlen, "varlen_attn", attn)
    assert "off by" in fault("varlen")


def test_a_kernel_that_takes_the_first_query_for_the_first_token_gets_whole_examples(monkeypatch) -> None:
    def first(query, key, value, from_, to, *rest, scale, window_size, enable_gqa) -> Tensor:
        later = zip(from_.diff().tolist(), to.tolist()[:-1], strict=True)
        padded = torch.zeros(len(key), *query.shape[1:], dtype=query.dtype)
        places = torch.cat([torch.arange(start, start + count) for count, start in later])
        padded = padded.index_copy(0, places, query)
        found = flash(padded, key, value, to, to, rest[1], rest[1], scale=scale, window_size=window_size,
                      enable_gqa=enable_gqa)
        return found[places]

    monkeypatch.setattr(varlen, "varlen_attn", first)
    assert fault("varlen") == "" and "off by" in fault("varlen", rests=True)


def test_a_kernel_that_is_not_there_is_named() -> None:
    """On a processor both say so."""
    assert "Error" in fault("varlen") and "Error" in fault("flex", softcap=50.0)


def test_no_room_is_no_fault_of_a_kernel(monkeypatch) -> None:
    def full(*_, **__) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(varlen, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        fault("varlen")


@pytest.mark.parametrize(("family", "changes", "together", "trusted", "said"), [
    ("qwen3", {}, False, {"varlen"}, "by FlashAttention of any length"),
    ("gemma2", {}, False, {"flex"}, "by FlexAttention"),
    ("gpt_oss", {"attention_dropout": 0.0}, False, {"flex"}, "by FlexAttention"),
    ("gemma3_text", {}, True, {"varlen", "flex"},
     "by FlashAttention of any length, by FlexAttention where a pack has images"),
    ("qwen3", {"attention_dropout": 0.1}, False, set(), "in groups of like length (attention has dropout)"),
    ("qwen3", {"head_dim": 36}, False, set(), "in groups of like length (heads of 36 and 36)"),
])
def test_the_table_says_how_a_model_attends(family, changes, together, trusted, said, monkeypatch) -> None:
    changes = {"head_dim": 16, **changes}
    model, place = student(family, **changes).model, torch.device("cuda")
    monkeypatch.setattr(varlen, "fault", lambda *_, rests=False: "")
    found = varlen.kernels(model, place, "bfloat16", ALONE, together)
    assert (found.trusted, found.said) == (trusted, said)
    assert found.whole == ("FlexAttention takes each example whole" if "flex" in trusted else "")
    monkeypatch.setattr(varlen, "fault", lambda *_, rests=False: "off by 9%" if rests else "")
    found = varlen.kernels(model, place, "bfloat16", ALONE, together)
    assert found.trusted == trusted and ("off by 9%" in found.whole) == ("varlen" in trusted)
    assert varlen.kernels(model, place, "float32", ALONE, together).said == "in groups of like length"
    assert not varlen.kernels(model, CPU, "bfloat16", ALONE, together).trusted
    monkeypatch.setattr(varlen, "fault", lambda *_, rests=False: "its results are off by 7%")
    found = varlen.kernels(model, place, "bfloat16", ALONE, together)
    assert not found.trusted and (not trusted or "does not serve here: its results are off by 7%" in found.said)


def test_a_layout_with_trusted_kernels_uses_them(monkeypatch) -> None:
    """A step of a model in bfloat16, whose packs go through the kernel in forward and recomputed in backward."""
    from test_invariance import a_step, examples

    from schoolhouse import train
    from schoolhouse.model import blocks

    calls = []

    @functools.wraps(flash)
    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(len(given[0]))
        return flash(*given, **named)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    gradients = []
    for trusted in (frozenset(), frozenset({"varlen"})):
        one = student("qwen3")
        one.model.bfloat16()
        one.kernels = varlen.Kernels(trusted)
        blocks.compute_again(one.model)
        train.compute_gradient(one, a_step(examples("whole", number=6), [[0, 1, 2], [3, 4, 5]]), seed=0)
        gradients.append(torch.cat([each.grad.flatten() for each in one.model.parameters()]).double())
    assert len(calls) == 2 * 2 * one.model.config.num_hidden_layers
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.03


def test_flex_attention_is_compiled_as_a_whole_and_seldom(monkeypatch) -> None:
    """By what torch.compile traces: lengths, windows, images, another model's cap. What it left uncompiled would make
    all S x S scores."""
    graphs = []

    def noted(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    compiled = torch.compile(flex.flex_attention, fullgraph=True, backend=noted)
    monkeypatch.setattr(varlen, "_flex", lambda kind: compiled)
    capped = Rule(softcap=50.0)
    for rule, images in [(Rule(softcap=20.0), False), (dataclasses.replace(capped, window=40), False), (capped, True)]:
        for tokens in (200, 301, 835, 700):
            given = [torch.randn(tokens, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
            seen = torch.arange(tokens).clamp(max=1) if images else None
            varlen.attend("flex", *given, varlen.ends((0, tokens // 3, tokens), CPU, seen), rule)
    assert 0 < len(graphs) <= 4
    torch.compiler.reset()

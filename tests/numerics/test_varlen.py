"""Kernels for examples of any length, as far as a machine without a GPU shows them: what they are asked for, the masks
they are given, their results by PyTorch's own uncompiled FlexAttention, and that one which is wrong is not used."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from schoolhouse.model import attention, varlen
from schoolhouse.model.varlen import Ends, Rule

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
    return attention._attend(*given, attention.layout(BOUNDARIES, CPU, visual=visual), rule)


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
    seen = attention._runs(visual, BOUNDARIES) if images else None
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


def flash(query, key, value, from_, to, longest, same, *, scale, window_size, enable_gqa) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, example by example."""
    assert (longest, longest) == (int(from_.diff().max()), same) and from_.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    parts = []
    for start, end in itertools.pairwise(from_.tolist()):
        q, k, v = (one[start:end].transpose(0, 1) for one in (query, key, value))
        k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = (end if side < 0 else side for side in window_size)
        seen = (distance <= left) & (-distance <= right)
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("rule", [
    Rule(), Rule(window=40, scaling=0.3), Rule(window=1), Rule(window=449), Rule(window=1000), Rule(causal=False),
], ids=str)
def test_flash_attention_is_asked_for_what_the_groups_compute(rule: Rule, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    given = states()
    found = varlen.attend("varlen", *given, varlen.ends(BOUNDARIES, CPU), rule)
    check_equal(found, by_groups(*given, rule=rule), given)


def test_the_real_kernel_takes_what_it_is_given() -> None:
    """The operation and its backward on tensors without values: shapes and the names of arguments."""
    given = [pretended(heads, 64).requires_grad_() for heads in (4, 2, 2)]
    ends = Ends(torch.empty(6, device="meta", dtype=torch.int32), 449, BOUNDARIES)
    found = varlen.attend("varlen", *given, ends, Rule(window=40))
    grads = torch.autograd.grad(found, given, torch.empty_like(found))
    assert found.shape == given[0].shape
    assert [one.shape for one in grads] == [one.shape for one in given]


def pretended(heads: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(BOUNDARIES[-1], heads, size, device="meta", dtype=dtype)


@pytest.mark.parametrize(("query", "value", "rule", "images", "wanted"), [
    (pretended(4, 64), pretended(2, 64), Rule(), False, "varlen"),
    (pretended(4, 64), pretended(2, 64), Rule(window=8), False, "varlen"),
    (pretended(4, 64), pretended(2, 64), Rule(causal=False), True, "varlen"),
    (pretended(4, 64), pretended(2, 64), Rule(), True, "flex"),
    (pretended(4, 64), pretended(2, 64), Rule(softcap=5.0), False, "flex"),
    (pretended(4, 64), pretended(2, 64), Rule(sinks=SINKS), False, "flex"),
    (pretended(4, 192), pretended(4, 128), Rule(), False, None),
    (pretended(4, 60), pretended(4, 60), Rule(), False, None),
    (pretended(4, 64), pretended(2, 64), Rule(dropout=0.1), False, None),
    (pretended(4, 64, torch.float32), pretended(2, 64, torch.float32), Rule(), False, None),
])
def test_which_kernel_computes_what(query, value, rule, images, wanted, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "untrusted", lambda chosen, place: "")
    ends = varlen.ends(BOUNDARIES, CPU, runs() if images else None)
    assert varlen.kernel(query, value, rule, ends) == wanted
    assert varlen.kernel(query, value, rule, None) is None
    monkeypatch.setattr(varlen, "untrusted", lambda chosen, place: "it is wrong")
    assert varlen.kernel(query, value, rule, ends) is None


def test_a_kernel_that_is_right_is_trusted(pure: None, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    assert varlen.untrusted.__wrapped__("varlen", CPU) == ""
    assert varlen.untrusted.__wrapped__("flex", CPU) == ""


@pytest.mark.parametrize("fault", ["a key too many", "no scale", "other examples", "not a number"])
def test_a_kernel_that_is_wrong_is_not_used(fault: str, monkeypatch) -> None:
    def wrong(query, key, value, from_, to, *rest, scale, window_size, enable_gqa) -> Tensor:
        if fault == "a key too many":
            window_size = (window_size[0] + 1, 0)
        elif fault == "no scale":
            scale = 1.0
        elif fault == "other examples":
            tokens = len(query)
            from_, rest = torch.tensor([0, tokens], dtype=torch.int32), (tokens, tokens)
        found = flash(query, key, value, from_, from_, *rest, scale=scale, window_size=window_size,
                      enable_gqa=enable_gqa)
        return found * torch.nan if fault == "not a number" else found

    monkeypatch.setattr(varlen, "varlen_attn", wrong)
    assert "off by" in varlen.untrusted.__wrapped__("varlen", CPU)


def test_a_kernel_that_is_not_there_is_named() -> None:
    """On a processor both say so; the table tells it where the device would have had them."""
    for chosen in ("varlen", "flex"):
        assert "Error" in varlen.untrusted.__wrapped__(chosen, CPU)
    assert varlen.describe(CPU, "bfloat16", written_out=False) == "in groups of like length"


def test_the_table_says_how_a_model_attends(monkeypatch) -> None:
    place = torch.device("cuda")
    monkeypatch.setattr(varlen, "untrusted", lambda chosen, place: "")
    assert varlen.describe(place, "bfloat16", written_out=False) == "by FlashAttention of any length"
    assert varlen.describe(place, "bfloat16", written_out=True) == "by FlexAttention"
    assert varlen.describe(place, "float32", written_out=False) == "in groups of like length"
    monkeypatch.setattr(varlen, "untrusted", lambda chosen, place: "its results are off by 7%")
    assert varlen.describe(place, "bfloat16", written_out=False) == (
        "in groups of like length (FlashAttention of any length does not serve here: its results are off by 7%)")

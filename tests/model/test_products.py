"""bfloat16 by way of float32: as exact as bfloat16 allows, in force where it is faster, the same everywhere else."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from schoolhouse.model import products

X86 = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}
ROUNDED = 2.0**-8
"""The largest relative error of one rounding to bfloat16."""


@pytest.mark.parametrize("able, wide", [
    (X86, True),
    (X86 | {"amx_bf16": True}, False),
    (X86 | {"cpu_name": "AMD EPYC"}, False),
    (X86 | {"cpu_name": "AMD EPYC", "avx512_bf16": False}, True),
    ({"architecture": "arm64", "bf16": True}, False),
])
def test_which_processors_multiply_float32_faster(able, wide) -> None:
    assert products.multiplies_float32_faster(able) is wide


def test_this_processor_says_what_is_asked() -> None:
    assert products.wide_is_faster(torch.device("cpu")) in (True, False)
    assert not products.wide_is_faster(torch.device("meta"))


def double(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
    copy.load_state_dict(layer.state_dict())
    return copy


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_rounded_once(bias) -> None:
    """Against float64: sums of 300 float32 products are off by far less than the one rounding at the end."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 64, bias, dtype=torch.bfloat16)
    states = torch.randn(2, 150, 300, dtype=torch.bfloat16, requires_grad=True)
    above = torch.randn(2, 150, 64, dtype=torch.bfloat16)
    with products.Wide():
        found = layer(states)
        found.backward(above)
    exact, same = double(layer), states.detach().double().requires_grad_()
    wanted = exact(same)
    wanted.backward(above.double())
    pairs = [(found, wanted), (states.grad, same.grad), (layer.weight.grad, exact.weight.grad)]
    pairs += [(layer.bias.grad, exact.bias.grad)] if bias else []
    for narrow, wide in pairs:
        assert narrow.dtype == torch.bfloat16
        slack = 1e-5 * float(wide.detach().abs().max())  # sums near zero keep the error of their larger terms
        assert ((narrow.double() - wide).abs() <= ROUNDED * wide.abs() + slack).all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_rounded_once(masked, monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "attends_wider", lambda place, length: True)
    states = [torch.randn(2, 4, 50, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [one.detach().double().requires_grad_() for one in states]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True)
    mask = torch.ones(50, 50, dtype=torch.bool).tril() if masked else None
    found = products.attend(*states, mask, is_causal=not masked)
    above = torch.randn(found.shape, dtype=torch.bfloat16)
    found.backward(above)
    wanted.backward(above.double())
    for narrow, wide in [(found, wanted), *((one.grad, same.grad) for one, same in zip(states, exact, strict=True))]:
        assert narrow.dtype == torch.bfloat16
        assert ((narrow.double() - wide).abs() <= ROUNDED * wide.abs() + 1e-5).all()


@pytest.mark.parametrize(("able", "short", "long"), [
    (X86, True, True),
    (X86 | {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True, False),
    (X86 | {"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True, False),
    (X86 | {"architecture": "aarch64"}, False, False),
])
def test_attention_is_widened_where_that_is_faster(able, short, long, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    place = torch.device("cpu")
    assert (products.attends_wider(place, 200), products.attends_wider(place, 3000)) == (short, long)
    assert not products.attends_wider(torch.device("meta"), 200)


def test_arguments_by_name_and_masks_in_bfloat16() -> None:
    states = [torch.randn(2, 4, 5, 16, dtype=torch.bfloat16) for _ in range(3)]
    mask = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    rows, weight, bias = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.randn(4).bfloat16()
    with products.Wide():
        found = F.scaled_dot_product_attention(*states, attn_mask=mask)
        wanted = F.scaled_dot_product_attention(*states, is_causal=True)
        named, placed = F.linear(rows, weight, bias=bias), F.linear(rows, weight, bias)
    exact = F.scaled_dot_product_attention(*(one.double() for one in states), is_causal=True)
    torch.testing.assert_close(found, wanted, rtol=ROUNDED, atol=1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDED, atol=1e-6)
    assert torch.equal(named, placed) and named.dtype == torch.bfloat16


def test_activation_checkpointing_changes_nothing(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "wide_is_faster", lambda place: True)
    again = functools.partial(products.again, torch.device("cpu"), "bfloat16")
    layer = nn.Linear(16, 16, dtype=torch.bfloat16)
    states, gradients = torch.randn(3, 16, dtype=torch.bfloat16), []
    with products.Wide():
        for run in (layer, lambda given: checkpoint(layer, given, use_reentrant=False, context_fn=again)):
            layer.zero_grad()
            run(states).square().sum().backward()
            gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)


def test_frozen_weights_have_no_gradient_and_other_numbers_are_left_alone() -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16).requires_grad_(False)
    states = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    wide = nn.Linear(8, 4)
    with products.Wide():
        layer(states).sum().backward()
        same = wide(states.detach().float())
    assert layer.weight.grad is None and layer.bias.grad is None and states.grad is not None
    assert torch.equal(same, wide(states.detach().float()))


def test_what_is_kept_for_backward_is_narrow() -> None:
    layer, kept = nn.Linear(8, 4, dtype=torch.bfloat16), []
    noting = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.dtype) or one, lambda one: one)
    with products.Wide(), noting:
        layer(torch.randn(3, 8, dtype=torch.bfloat16))
    assert set(kept) == {torch.bfloat16}


def test_the_table_says_which_way_is_taken(monkeypatch) -> None:
    place = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86)
    assert "by way of float32" in products.describe(place, "bfloat16")
    assert isinstance(products.fastest(place, "bfloat16"), products.Wide)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86 | {"amx_bf16": True})
    assert "by way of float32" not in products.describe(place, "bfloat16")
    assert not isinstance(products.fastest(place, "bfloat16"), products.Wide)
    assert products.describe(place, "float32") == "float32"

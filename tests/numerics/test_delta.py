"""The gated delta rule by chunks: transformers' results and gradients, in time that grows with the length alone."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_next import modeling_qwen3_next as theirs
from true_float64 import TrueFloat64

from schoolhouse.model import delta

OWN = theirs.torch_chunk_gated_delta_rule


def states(tokens: int, *, fades: float = 1.0, heads: tuple[int, int] = (2, 4), dtype=torch.float64) -> list[Tensor]:
    """Of three examples: query, key, value, logarithms of decay, share."""
    torch.manual_seed(tokens)
    asked = [torch.randn(3, tokens, one, 8, dtype=dtype) for one in (heads[0], heads[0], heads[1])]
    asked += [-fades * torch.rand(3, tokens, heads[1], dtype=dtype), torch.rand(3, tokens, heads[1], dtype=dtype)]
    return [one.requires_grad_() for one in asked]


def own(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> tuple[Tensor, None]:
    """transformers' own, which until 5.17 left it to the layer to repeat grouped heads."""
    query, key = (one.repeat_interleave(value.shape[2] // one.shape[2], 2) for one in (query, key))
    return OWN(query, key, value, **how)


def computed(rule: Callable, given: list[Tensor]) -> list[Tensor]:
    query, key, value, g, beta = given
    found, _ = rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=None)
    above = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return [found, *torch.autograd.grad(found, given, above)]


@pytest.mark.parametrize("fades", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("heads", [(2, 4), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 300])
def test_it_is_transformers(tokens: int, heads: tuple[int, int], fades: float) -> None:
    """To 1e-12 in float64, result and every gradient; what has faded to less than 1e-17 is left out."""
    given = states(tokens, fades=fades, heads=heads)
    with TrueFloat64():
        for found, wanted in zip(computed(delta.gated_delta_rule, given), computed(own, given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fades", [1.0, 20.0])
def test_it_is_as_near_to_float64_as_transformers(fades: float) -> None:
    """In float32, where what fades below 2e-9 is left out."""
    given = states(300, fades=fades)
    with TrueFloat64():
        wanted = computed(own, given)
    narrow = [one.detach().float().requires_grad_() for one in given]
    for ours, other, exact in zip(computed(delta.gated_delta_rule, narrow), computed(own, narrow), wanted, strict=True):
        errors = [float((one.double() - exact).detach().norm() / exact.detach().norm().clamp(min=1e-12))
                  for one in (ours, other)]
        assert errors[0] < max(1.5 * errors[1], 1e-6)


class Made(TorchDispatchMode):
    """Counts the values that operations make, and finds those that are smaller than a processor likes."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.tiny = 0, set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor) and one.dtype == torch.float32:
                self.values += one.numel()
                if bool(((one != 0) & (one.abs() < torch.finfo(one.dtype).tiny)).any()):
                    self.tiny.add(call.name())
        return found


def made(rule: Callable, tokens: int, fades: float = 1.0) -> Made:
    given = [one.detach().float().requires_grad_() for one in states(tokens, fades=fades)]
    with Made() as seen:
        computed(rule, given)
    return seen


def test_a_longer_example_makes_as_many_values_a_token() -> None:
    """transformers' own makes 1.8 times as many for a token where there are four times as many of them."""
    ours, other = ([made(rule, tokens).values for tokens in (1024, 4096)] for rule in (delta.gated_delta_rule, own))
    assert ours[1] < 4.05 * ours[0] and other[1] > 5 * other[0]


def test_what_fades_does_not_make_a_processor_slow() -> None:
    """Only the solution of a chunk's equations may hold such values, before they are taken out."""
    assert made(delta.gated_delta_rule, 300, fades=20.0).tiny <= {
        "aten::linalg_solve_triangular", "aten::slice.Tensor", "aten::abs"}
    assert {"aten::bmm", "aten::mul.Tensor"} & made(own, 300, fades=20.0).tiny


def test_transformers_own_is_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside, and where a kernel serves, nothing is exchanged."""
    kind, names = theirs.Qwen3NextGatedDeltaNet, vars(theirs)
    with pytest.raises(KeyError), delta.taken(kind):
        assert names[delta.NAME] is delta.gated_delta_rule
        raise KeyError
    assert names[delta.NAME] is OWN
    delta.takes_its_place.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with delta.taken(kind):
        assert names[delta.NAME] is OWN
    monkeypatch.undo()
    delta.takes_its_place.cache_clear()
    with delta.taken(torch.nn.Linear):
        pass
    assert [*itertools.chain(names)].count(delta.NAME) == 1

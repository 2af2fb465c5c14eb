"""Rules that stand in for transformers': its results and gradients, in time that grows with the length alone."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from true_float64 import TrueFloat64

from schoolhouse.model import stand_ins
from schoolhouse.model.delta import gated_delta_rule
from schoolhouse.model.state_space import chunk_scan

DELTA, SCAN = "torch_chunk_gated_delta_rule", "mamba2_chunk_scan"
THEIRS = {DELTA: vars(qwen)[DELTA], SCAN: vars(nemotron)[SCAN]}
OURS = {DELTA: gated_delta_rule, SCAN: chunk_scan}
HEADS = [(2, 4), (3, 3)]


def states(rule: str, tokens: int, *, fades: float = 1.0, heads: tuple[int, int] = (2, 4)) -> list[Tensor]:
    """What a rule is given of three examples, as its layers do, with fewer heads (or groups of them) for some of it."""
    torch.manual_seed(tokens)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    few, all_of_them = ((3, tokens, one, 8) for one in heads)
    if rule == DELTA:  # query, key, value, logarithms of decay, share
        share = torch.rand(2, 3, tokens, heads[1], dtype=torch.float64)
        asked = [drawn(*few), drawn(*few), drawn(*all_of_them), -fades * share[0], share[1]]
    else:  # states, steps, their bias, decays, what is written and read, what passes by
        decays = -fades * torch.linspace(0.1, 4, heads[1], dtype=torch.float64)
        asked = [drawn(*all_of_them), drawn(*all_of_them[:3]), drawn(heads[1]), decays, drawn(*few), drawn(*few),
                 drawn(heads[1])]
    return [one.requires_grad_() for one in asked]


def called(rule: str, function: Callable, given: list[Tensor]) -> Tensor:
    if rule == SCAN:
        hidden, dt, bias, decays, written, read, passing = given
        return function(
            hidden, dt, decays, written, read, chunk_size=256, D=passing, z=None, dt_bias=bias, dt_softplus=True,
            initial_states=None, return_final_states=False, dt_limit=(0.001, float("inf")),
        )
    query, key, value, g, beta = given
    if function is THEIRS[DELTA]:  # which until 5.17 left it to the layer to repeat grouped heads
        query, key = (one.repeat_interleave(value.shape[2] // one.shape[2], 2) for one in (query, key))
    return function(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=None)[0]


def computed(rule: str, function: Callable, given: list[Tensor]) -> list[Tensor]:
    """The result and every gradient."""
    found = called(rule, function, given)
    above = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return [found, *torch.autograd.grad(found, given, above)]


@pytest.mark.parametrize("fades", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 300])
@pytest.mark.parametrize("rule", OURS)
def test_it_is_transformers(rule: str, tokens: int, heads: tuple[int, int], fades: float) -> None:
    """To 1e-12 in float64, result and every gradient; what has faded to less than 1e-17 is left out."""
    given = states(rule, tokens, fades=fades, heads=heads)
    with TrueFloat64():
        ours, wanted = (computed(rule, one[rule], given) for one in (OURS, THEIRS))
    for found, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12 * max(1.0, float(other.detach().abs().max())))


@pytest.mark.parametrize("fades", [1.0, 20.0])
@pytest.mark.parametrize("rule", OURS)
def test_it_is_as_near_to_float64_as_transformers(rule: str, fades: float) -> None:
    """In float32, where what fades below 2e-9 is left out."""
    given = states(rule, 300, fades=fades)
    with TrueFloat64():
        wanted = computed(rule, THEIRS[rule], given)
    narrow = [one.detach().float().requires_grad_() for one in given]
    found = (computed(rule, one[rule], narrow) for one in (OURS, THEIRS))
    for ours, other, exact in zip(*found, wanted, strict=True):
        errors = [float((one.double() - exact).detach().norm() / exact.detach().norm().clamp(min=1e-12))
                  for one in (ours, other)]
        assert errors[0] < max(1.5 * errors[1], 1e-6)


def test_what_is_far_larger_is_still_seen_where_it_faded() -> None:
    """One token a million times as large as others, in heads that forget within a chunk: each token's result."""
    given = states(SCAN, 300)
    with torch.no_grad():
        given[0][:, 5] *= 1e6
        given[3].fill_(-1.0)
        with TrueFloat64():
            wanted = called(SCAN, THEIRS[SCAN], given)
        found = called(SCAN, chunk_scan, [one.float() for one in given]).double()
    errors = (found - wanted).flatten(2).norm(dim=-1) / wanted.flatten(2).norm(dim=-1)
    assert float(errors.max()) < 2e-6


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


def made(rule: str, function: Callable, tokens: int, fades: float = 1.0) -> Made:
    given = [one.detach().float().requires_grad_() for one in states(rule, tokens, fades=fades)]
    with Made() as seen:
        computed(rule, function, given)
    return seen


@pytest.mark.parametrize(("rule", "theirs"), [(DELTA, 5), (SCAN, 4)])
def test_a_longer_example_makes_as_many_values_a_token(rule: str, theirs: float) -> None:
    """transformers' delta rule makes 1.8 times as many for a token where there are four times as many of them; its scan
    makes more than ours at any length."""
    ours, other = ([made(rule, one[rule], tokens).values for tokens in (1024, 4096)] for one in (OURS, THEIRS))
    assert ours[1] < 4.05 * ours[0] and other[1] > theirs * other[0] and other[0] > ours[0]


def test_what_fades_does_not_make_a_processor_slow() -> None:
    """Only the solution of a chunk's equations may hold such values, before they are taken out."""
    assert made(DELTA, gated_delta_rule, 300, fades=20.0).tiny <= {
        "aten::linalg_solve_triangular", "aten::slice.Tensor", "aten::abs"}
    assert {"aten::bmm", "aten::mul.Tensor"} & made(DELTA, THEIRS[DELTA], 300, fades=20.0).tiny
    assert not made(SCAN, chunk_scan, 300, fades=20.0).tiny and made(SCAN, THEIRS[SCAN], 300, fades=20.0).tiny


def test_what_heads_share_is_multiplied_once() -> None:
    """Of 32 heads in one group, as many pairs of tokens are multiplied by their states as of 4."""
    products = []
    for heads in (4, 32):
        given = states(SCAN, 64, heads=(1, heads))
        with torch.no_grad(), Calls() as seen:
            called(SCAN, chunk_scan, given)
        products.append(seen.rows)
    assert products == [[(3, 64, 64), (12, 64, 8)], [(3, 64, 64), (96, 64, 8)]]


class Calls(TorchDispatchMode):
    """The shapes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        if call is torch.ops.aten.bmm.default:
            self.rows.append(tuple(found.shape))
        return found


@pytest.mark.parametrize("name", OURS)
def test_transformers_own_is_back_afterwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside, and where a kernel serves, nothing is exchanged."""
    kind = qwen.Qwen3NextGatedDeltaNet if name == DELTA else nemotron.NemotronHMamba2Mixer
    names = vars(qwen if name == DELTA else nemotron)
    with pytest.raises(KeyError), stand_ins.taken(kind):
        assert names[name] is OURS[name]
        raise KeyError
    assert names[name] is THEIRS[name]
    stand_ins.of.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with stand_ins.taken(kind):
        assert names[name] is THEIRS[name]
    monkeypatch.undo()
    stand_ins.of.cache_clear()
    with stand_ins.taken(torch.nn.Linear):
        pass
    assert [*itertools.chain(names)].count(name) == 1

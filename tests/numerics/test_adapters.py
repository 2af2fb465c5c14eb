"""Adapters in fewer passes: what PEFT gives to rounding, nothing wide touched twice, and the rest as PEFT does it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from schoolhouse.model import adapters, elementwise, fourbit

IN, OUT, RANK = 64, 96, 4
SHAPES = [(1, 9, IN), (2, 7, IN), (5, IN), (0, IN)]


def layer(
    number: torch.dtype = torch.float64, *, bias: bool = True, light: bool = True, **more: object
) -> nn.Module:
    """A frozen linear layer and an adapter that is not zero; the same each time."""
    torch.manual_seed(0)
    one = nn.ModuleDict({"wide": nn.Linear(IN, OUT, bias=bias)})
    settings = {"r": RANK, "lora_alpha": 10.0, "target_modules": ["wide"], **more}
    inject_adapter_in_model(LoraConfig(**settings), one)
    for name, weight in one.named_parameters():
        weight.data = (torch.randn_like(weight) * 0.3).to(number)
        weight.requires_grad_("lora_" in name)
    if light:
        elementwise.lighten(one)
        assert elementwise.lighter(one) == ([] if {"use_dora", "lora_bias"} & {*more} else ["adapters"])
    return one["wide"].train()


def learnt(
    one: nn.Module, shape: tuple[int, ...] = (2, 7, IN), number: torch.dtype = torch.float64, *, first: bool = False
) -> list[torch.Tensor]:
    """The result for random states, and the gradients of the states and of all that is trained. The `first` layer of
    a model has states without a gradient."""
    torch.manual_seed(1)
    states, above = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    states = states.to(number).requires_grad_(not first)
    out = one(states)
    out.backward(above.to(out.dtype))
    grads = [weight.grad for weight in one.parameters() if weight.requires_grad]
    return [out.detach(), *([] if first else [states.grad]), *grads]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """The distance of each from what it should be, relative to its length."""
    assert [one.shape for one in found] == [one.shape for one in truth]
    return [float((one.double() - true.double()).norm() / true.double().norm().clamp(min=1e-9))
            for one, true in zip(found, truth, strict=True)]


@pytest.mark.parametrize("first", [False, True], ids=["within", "first"])
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"lora_dropout": 0.5}, {"use_rslora": True}],
                         ids=["plain", "no bias", "dropout", "rslora"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_pefts(shape: tuple[int, ...], more: dict, first: bool) -> None:
    """Values and every gradient, with the same draws of a dropout: sums of float64 in another order."""
    if "bias" in more:
        ours, peft = layer(bias=False), layer(bias=False, light=False)
    else:
        ours, peft = layer(**more), layer(light=False, **more)
    assert max(error(learnt(ours, shape, first=first), learnt(peft, shape, first=first))) < 1e-13


def test_bfloat16_is_no_farther_from_the_truth() -> None:
    """Than PEFT's, of float64 on the same numbers: the result, and each gradient by less than a tenth."""
    number, shape = torch.bfloat16, (1, 512, IN)
    truth = learnt(layer(number, light=False).double(), shape)
    ours, peft = (error(learnt(layer(number, light=light), shape, number), truth) for light in (True, False))
    assert ours[0] < peft[0] and all(one < 1.1 * other for one, other in zip(ours, peft, strict=True))


class _Wide(TorchDispatchMode):
    """Counts operations that touch matrices [tokens, OUT] or [tokens, IN] and are no products."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.seen, self._least = [], tokens * min(IN, OUT)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(out, torch.Tensor) and out.numel() >= self._least and not function.is_view \
                and name not in ("mm", "addmm", "linear", "detach", "empty", "_unsafe_view"):
            self.seen.append(name)
        return out


def passes(one: nn.Module) -> list[str]:
    """Of one forward and backward over 64 tokens."""
    states, above = torch.randn(1, 64, IN, dtype=torch.float64, requires_grad=True), torch.ones(1, 64, OUT).double()
    with _Wide(64) as mode:
        one(states).backward(above)
    return mode.seen


def test_nothing_wide_is_touched_but_by_products() -> None:
    """PEFT multiplies and adds, forward and backward."""
    assert passes(layer(light=False)).count("mul") == 2
    assert passes(layer()) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_result_may_be_changed_in_place(shape: tuple[int, ...], bias: bool) -> None:
    """As OLMo does, which clamps queries where they are: a view made inside a function of autograd may not be."""
    found, wanted = [], []
    for light, kept in ((True, found), (False, wanted)):
        torch.manual_seed(1)
        states = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = layer(bias=bias, light=light)(states).clamp_(-1.0, 1.0)
        out.sum().backward()
        kept += [out.detach(), states.grad]
    assert max(error(found, wanted)) < 1e-13


def test_no_second_derivative_is_wrong() -> None:
    """There is none: a part of backward is no function of what it was computed from."""
    states = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer()(states).square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def two(one: nn.Module) -> None:
    """Both of two adapters are in force."""
    one.update_layer("other", RANK, 8.0, config=LoraConfig(r=RANK, lora_alpha=8.0, init_lora_weights=False))
    one.to(torch.float64).set_adapter(["default", "other"])


@pytest.mark.parametrize("change", [
    lambda one: one.enable_adapters(False), lambda one: one.merge(), two,
    lambda one: one.base_layer.weight.requires_grad_(True), lambda one: one.base_layer.bias.requires_grad_(True),
    lambda one: one.float().base_layer.double(), lambda one: one.set_adapter([]),
    lambda one: one.base_layer.register_forward_hook(lambda *_: None),
    lambda one: one.lora_B.default.register_forward_pre_hook(lambda *_: None),
    lambda one: setattr(one.lora_A.default, "forward", lambda x: x[..., :RANK] * 2),
], ids=["switched off", "merged", "two", "trained base", "trained bias", "other formats", "none", "heard",
        "heard before", "another forward"])
def test_all_else_is_pefts_own(change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, since it is computed by its code."""
    made = [layer(), layer(light=False)]
    for one in made:
        torch.manual_seed(2)
        change(one)
    monkeypatch.setattr(adapters._Adapted, "forward", None)
    found, wanted = (answer(one) for one in made)
    assert torch.equal(found, wanted)


def answer(one: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    return one(torch.randn(3, IN, dtype=torch.float64)).detach()


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "bias"])
def test_other_kinds_are_pefts_own(more: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters._Adapted, "forward", None)
    assert torch.equal(answer(layer(**more)), answer(layer(light=False, **more)))


def test_a_layer_that_is_wrapped_goes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 makes a class of its own and a layer's: then that layer's parent is no other one."""
    one, peft = layer(), layer(light=False)
    one.__class__ = type("Wrapped", (type("Wrapping", (), {}), type(one)), {})
    for each in (one, peft):
        each.enable_adapters(False)
    monkeypatch.setattr(adapters._Adapted, "forward", None)
    assert torch.equal(answer(one), answer(peft))


def test_a_dropout_has_a_mode_of_its_own() -> None:
    ours, peft = layer(lora_dropout=0.5), layer(lora_dropout=0.5, light=False)
    for one in (ours, peft):
        one.eval().lora_dropout.train()
    assert max(error(learnt(ours), learnt(peft))) < 1e-13


def test_autocast_is_pefts() -> None:
    ours, peft = layer(torch.float32), layer(torch.float32, light=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (learnt(one, number=torch.float32) for one in (ours, peft))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("number", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)], ids=str)
def test_beside_four_bits(number: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen matrix in 4 bits, made of float32, is widened in backward as in forward: PEFT's results to rounding."""
    pytest.importorskip("torchao")
    made = [layer(number), layer(number, light=False)]
    for one in made:
        one.base_layer.weight = nn.Parameter(fourbit._four_bits(one.base_layer.weight.detach(), ""), False)
    found, wanted = (learnt(one, number=number) for one in made)
    assert max(error(found, wanted)) < tolerance
    monkeypatch.setattr(adapters._Adapted, "forward", None)
    with pytest.raises(TypeError):  # it was our own way
        learnt(made[0], number=number)


def test_as_written_is_peft() -> None:
    """What proofs compare with."""
    one = nn.ModuleDict({"wide": layer()})
    own = answer(layer(light=False))
    assert elementwise.lighter(one) == ["adapters"]
    with elementwise.as_written(one):
        assert adapters.suits(one["wide"]) and torch.equal(answer(one["wide"]), own)
    assert not adapters.suits(one["wide"])

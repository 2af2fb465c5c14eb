"""AdamW over masters: equal to PyTorch's own, no update rounded away, and the learning rate a pure function."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import optim
from schoolhouse.config import Optim
from schoolhouse.errors import ConfigError
from schoolhouse.model import eightbit, muon
from schoolhouse.optim import Optimizer

SETTINGS = Optim(learning_rate=1e-2, weight_decay=0.1, clip=0.5)


def network(seed: int = 0) -> nn.Sequential:
    """Matrices, vectors and a norm: everything that decays and everything that does not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    inputs = torch.randn(5, 6, generator=draw).to(dtype)
    return (model(inputs).float() - torch.randn(5, 3, generator=draw)).square().sum() * 3


def test_float32_equals_plain_adamw() -> None:
    """Clip, decay of matrices only, schedule and update: ten steps of ours are ten steps of `torch.optim.AdamW`.

    Both use the same fused kernel on the same numbers, so nothing but equality is right.
    """
    ours, plain, steps = network(), network(), 10
    optimizer = Optimizer(ours, SETTINGS, "float32")
    matrices, vectors = ([one for one in plain.parameters() if (one.ndim > 1) == wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95),
        eps=1e-8, fused=True,
    )
    for step in range(1, steps + 1):
        loss_of(ours, step).backward()
        loss_of(plain, step).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate(SETTINGS, step, steps)
        adamw.step()
        adamw.zero_grad()
        assert torch.equal(optimizer.clip(), norm)
        optimizer.step(optim.learning_rate(SETTINGS, step, steps))
        assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), plain.parameters(), strict=True))
    assert all(one.grad is None for one in ours.parameters())


def test_one_step_by_hand() -> None:
    """The first update of AdamW is written down in one line: minus rate x sign, after decay."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0), model.bias.fill_(3.0)
    optimizer = Optimizer(model, Optim(weight_decay=0.5, epsilon=1e-12, clip=None), "float32")
    model.weight.grad, model.bias.grad = torch.tensor([[0.25]]), torch.tensor([-4.0])
    optimizer.step(0.1)
    assert float(model.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)
    assert float(model.bias.detach()) == pytest.approx(3.0 + 0.1, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1e3), st.one_of(st.none(), st.floats(1e-3, 1e3)))
def test_clip_equals_torch(scale: float, limit: float | None) -> None:
    """The norm reported is the whole gradient's, before clipping; shorter gradients are left alone."""
    ours, plain = network(), network()
    optimizer = Optimizer(ours, Optim(clip=limit), "float32")
    (loss_of(ours, 1) * scale).backward()
    (loss_of(plain, 1) * scale).backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), math.inf if limit is None else limit)
    assert torch.equal(optimizer.clip(), norm)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# bfloat16: narrow copies compute, float32 masters learn.


def test_updates_below_a_bfloat16_step_are_kept() -> None:
    """At 1.0 a bfloat16 step is 2^-8 = 0.004: a thousand updates of 1e-5 must move the weight by 0.01, not by 0.

    Near 1.0 a float32 step is 6e-8, so a thousand sums err by 6e-5 at most.
    """
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = Optimizer(model, Optim(weight_decay=0.0, clip=None), "bfloat16")
    assert model.weight.dtype == torch.bfloat16
    for _ in range(1000):
        (model(torch.ones(1, 1, dtype=torch.bfloat16)) * 3).sum().backward()
        optimizer.step(1e-5)
    master = dict(optimizer.weights())["weight"]
    assert master.dtype == torch.float32
    assert float(master) == pytest.approx(1 - 0.01, abs=6e-5)
    assert torch.equal(model.weight, master.to(torch.bfloat16)) and float(model.weight.detach()) < 1.0


def test_bfloat16_masters_start_exact() -> None:
    """The weights as they were loaded, not their narrow copies widened again."""
    model = network()
    wanted = {name: one.detach().clone() for name, one in model.named_parameters()}
    optimizer = Optimizer(model, SETTINGS, "bfloat16")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert dict(optimizer.weights()).keys() == wanted.keys()
    assert all(torch.equal(master, wanted[name]) for name, master in optimizer.weights())


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    """256 micro-batches of gradient 1 and one of 2^-9: bfloat16 would stop counting and lose the last."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(model, Optim(clip=None), "bfloat16")
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(300):
        model(one).sum().backward()
    (model(one) * 2**-9).sum().backward()
    assert float(optimizer.masters["weight"].grad) == 300 + 2**-9
    assert model.weight.grad is None
    assert float(optimizer.clip()) == 300 + 2**-9


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_of_gradients_serves_the_next_step(precision: str) -> None:
    """Not a bit of a weight differs, also of one that has a gradient in every other step alone, and no step after the
    first makes a fresh sum."""
    found, places = [], set()
    for keeps in (False, True):
        model = network()
        optimizer = Optimizer(model, SETTINGS, precision)
        optimizer.sums.stay = keeps
        head = model[3].weight
        for step in range(6):
            if step % 2:
                optimizer.total(head).add_(0.5)
                places.add((keeps, optimizer.total(head).data_ptr()))
            model[0](torch.full((2, 6), step + 1.0, dtype=model[0].weight.dtype)).sum().backward()
            optimizer.clip()
            optimizer.step(1e-2)
            assert all(master.grad is None for master in optimizer.masters.values())
        found.append(dict(optimizer.weights()))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert len([one for keeps, one in places if keeps]) == 1


def test_an_optimizer_goes_with_its_model() -> None:
    """Nothing holds weights, gradients or moments once both are dropped, not even until garbage is looked for."""
    for precision in ("float32", "bfloat16"):
        model = network()
        optimizer = Optimizer(model, SETTINGS, precision)
        loss_of(model, 1, next(model.parameters()).dtype).backward()
        optimizer.step(1e-3)
        left = [weakref.ref(one) for one in (optimizer, *optimizer.masters.values())]
        del model, optimizer
        assert not any(one() is not None for one in left), precision


def test_bfloat16_learns_like_float32() -> None:
    """Twenty steps of the narrow model stay beside the wide one: 8-bit products, so 2 % of the way gone."""
    wide, narrow, start = network(), network(), network()
    for model, precision, dtype in ((wide, "float32", torch.float32), (narrow, "bfloat16", torch.bfloat16)):
        optimizer = Optimizer(model, SETTINGS, precision)
        for step in range(1, 21):
            loss_of(model, step, dtype).backward()
            optimizer.clip()
            optimizer.step(3e-3)
        weights = dict(optimizer.weights())
        gone = torch.cat([(weights[name] - one).flatten() for name, one in start.named_parameters()]).detach()
        if precision == "float32":
            wanted = gone
    assert float((gone - wanted).norm()) < 0.1 * float(wanted.norm())
    assert float(torch.cosine_similarity(gone, wanted, dim=0)) > 0.995


def test_buffers_keep_their_precision() -> None:
    """Rotary frequencies in bfloat16 would place far tokens wrongly."""
    model = network()
    model.register_buffer("frequencies", torch.tensor([0.1]))
    Optimizer(model, SETTINGS, "bfloat16")
    assert model.frequencies.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_parameters_stay(precision: str) -> None:
    """What does not require a gradient is neither moved nor decayed nor saved."""
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer = Optimizer(model, SETTINGS, precision)
    for step in range(1, 4):
        loss_of(model, step, next(model.parameters()).dtype).backward()
        optimizer.step(0.1)
    assert all(torch.equal(before[name].to(one.dtype), one) for name, one in model[0].state_dict().items())
    assert {name.split(".")[0] for name, _ in optimizer.weights()} == {"1", "3"}


# Muon.


def test_muon_moves_all_directions_of_a_matrix_alike() -> None:
    """One step on a gradient with lengths from 1 to 20, without decay: those of the change are near 0.2 sqrt(8) x rate.

    Five Newton-Schulz steps bring singular values between about 0.7 and 1.2 (Jordan et al., 2024), whatever
    the gradient's own are; AdamW moves the biases and norms, by the learning rate each at its first step.
    """
    model = network()
    optimizer = Optimizer(model, Optim(name="muon", weight_decay=0.0, clip=None), "float32")
    assert optimizer.matrices == {"0.weight", "3.weight"}
    before = {name: one.clone() for name, one in optimizer.weights()}
    loss_of(model, 1).backward()
    left, _, right = torch.linalg.svd(model[0].weight.grad, full_matrices=False)
    model[0].weight.grad.copy_(left * torch.linspace(20, 1, 6) @ right)
    optimizer.step(0.01)
    change = {name: one - before[name] for name, one in optimizer.weights()}
    lengths = torch.linalg.svdvals(change["0.weight"]) / (0.01 * 0.2 * math.sqrt(8))
    assert float(lengths.min()) > 0.6 and float(lengths.max()) < 1.3
    assert float((left.T @ change["0.weight"] @ right.T).diagonal().max()) < 0
    moved = change["3.bias"].abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)], ids=str)
def test_muon_bends_singular_values_and_nothing_else(shape: tuple[int, int]) -> None:
    """The polynomial a s + b s^3 + c s^5, five times, of each singular value divided by their norm; in float64 to 1e-9.
    """
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(muon.orthogonal(matrix[None])[0], left * values @ right, rtol=0, atol=1e-9)
    assert not muon.orthogonal(torch.zeros(1, *shape)).any()


def test_muon_equals_pytorchs_to_bfloat16() -> None:
    """Ten steps with decay and momentum beside `torch.optim.Muon`, which bends singular values in bfloat16: 1 % a step.

    Its momentum is the same to the bit.
    """
    shape, draw = (24, 16), torch.Generator().manual_seed(5)
    start, gradients = torch.randn(shape, generator=draw), torch.randn((10, *shape), generator=draw)
    ours, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours], "weight_decay": 0.1, "lr": 0.01}]
    both = [muon.Muon(groups, 0.9), torch.optim.Muon([plain], 0.01, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")]
    for gradient in gradients:
        for parameter, optimizer in zip((ours, plain), both, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, wanted = (one.detach() - start * (1 - 0.001) ** 10 for one in (ours, plain))
    assert float((moved - wanted).norm() / wanted.norm()) < 0.02
    assert torch.equal(*(one.state[parameter]["momentum_buffer"]
                         for one, parameter in zip(both, (ours, plain), strict=True)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_muon_leaves_embeddings_and_head_to_adamw(tied: bool) -> None:
    """Their rows are tokens, and most of them have no gradient in a step."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )
    names = optim.hidden_matrices(AutoModelForCausalLM.from_config(config))
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(name.split(".")[-2] for name in names) == sorted(kinds)


# Saved and put back.


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_optimizer_continues_exactly(precision: str, name: str) -> None:
    """Three steps, saved, put into another network, three more: the bits of six steps."""
    whole, first, second = network(1), network(1), network(2)
    chosen = SETTINGS.model_copy(update={"name": name})
    optimizers = [Optimizer(model, chosen, precision) for model in (whole, first, second)]
    train(whole, optimizers[0], range(1, 7))
    train(first, optimizers[1], range(1, 4))
    weights, moments = ({name: one.clone() for name, one in pairs()} for pairs in (
        optimizers[1].weights, optimizers[1].moments,
    ))
    optimizers[2].load(weights, moments)
    train(second, optimizers[2], range(4, 7))
    for pairs in (Optimizer.weights, Optimizer.moments):
        one, other = dict(pairs(optimizers[0])), dict(pairs(optimizers[2]))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step, next(model.parameters()).dtype).backward()
        optimizer.clip()
        optimizer.step(optim.learning_rate(SETTINGS, step, 6))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_parameter_without_gradient_can_be_saved_and_put_back(precision: str) -> None:
    """A part of the model that no row reached yet has no moments; a run with one must still continue."""
    model, again = network(), network()
    for one in (model, again):
        one.register_parameter("unused", nn.Parameter(torch.randn(2, 2)))
    optimizer, other = Optimizer(model, SETTINGS, precision), Optimizer(again, SETTINGS, precision)
    train(model, optimizer, range(1, 3))
    other.load(dict(optimizer.weights()), dict(optimizer.moments()))
    assert torch.equal(dict(other.weights())["unused"], dict(optimizer.weights())["unused"])


# The learning rate.


RATES = st.builds(
    Optim, learning_rate=st.floats(1e-8, 1.0), schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.floats(0, 1, exclude_max=True), minimum=st.floats(0, 1),
) | st.floats(0, 0.98).flatmap(lambda warmup: st.builds(
    Optim, learning_rate=st.floats(1e-8, 1.0), warmup=st.just(warmup), minimum=st.floats(0, 1),
    schedule=st.floats(0.005, 1 - warmup - 0.001).map(lambda falls: f"wsd:{falls:.6f}"),
))


@settings(max_examples=200, deadline=None)
@given(RATES, st.integers(1, 500))
def test_the_rate_rises_and_falls(settings_: Optim, steps: int) -> None:
    """Up in equal parts to the peak, then down without a rise to the minimum; never outside; pure."""
    rates = [optim.learning_rate(settings_, step, steps) for step in range(1, steps + 1)]
    assert rates == [optim.learning_rate(settings_, step, steps) for step in range(1, steps + 1)]
    peak, warmup, slack = settings_.learning_rate, optim.warmup_steps(settings_, steps), settings_.learning_rate * 1e-9
    assert warmup == round(settings_.warmup * steps)
    for step, rate in enumerate(rates[:warmup], 1):
        assert rate == pytest.approx(peak * step / warmup)
    down = rates[max(0, warmup - 1):]
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(down))
    assert all(-slack <= rate <= peak + slack for rate in rates)
    if warmup < steps and steps > 1:
        last = peak if settings_.schedule == "constant" else peak * settings_.minimum
        assert rates[-1] == pytest.approx(last, abs=slack)


def test_the_rate_is_told() -> None:
    """Before training: the peak, the steps of its rise, the way down; and that adapters take more, where they do."""
    said = optim.told(Optim(), 60, adapters=False)
    assert said == "up to 1e-05 in 3 of 60 steps, then down to 0 (cosine)"
    assert optim.told(Optim(), 60, adapters=True) == f"{said}; adapters usually take 0.0001 to 0.0004"
    steady = Optim(learning_rate=2e-4, schedule="constant", warmup=0)
    assert optim.told(steady, 1000, adapters=True) == "up to 0.0002 in 0 of 1,000 steps, then constant"
    late = Optim(schedule="wsd", minimum=0.1)
    assert optim.told(late, 60, adapters=False) == (
        "up to 1e-05 in 3 of 60 steps, then constant, in the last 12 down to 1e-06 (wsd)")


def test_the_rate_at_known_points() -> None:
    """Cosine and line by hand: half way down is half way, a quarter of a cosine is (1 + cos 45°) / 2."""
    cosine = Optim(learning_rate=2.0, warmup=0.2, minimum=0.1)
    line = Optim(learning_rate=2.0, warmup=0.2, minimum=0.1, schedule="linear")
    assert [optim.learning_rate(cosine, step, 10) for step in (1, 2)] == [1.0, 2.0]
    assert optim.learning_rate(cosine, 6, 10) == pytest.approx(0.2 + 1.8 * 0.5)
    assert optim.learning_rate(cosine, 4, 10) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert optim.learning_rate(line, 4, 10) == pytest.approx(0.2 + 1.8 * 0.75)
    assert optim.learning_rate(Optim(learning_rate=2.0, warmup=0, schedule="constant"), 7, 10) == 2.0
    stable = Optim(learning_rate=2.0, warmup=0.2, minimum=0.1, schedule="wsd:0.4")
    assert [optim.learning_rate(stable, step, 10) for step in (1, 2, 3, 6, 10)] == [1.0, 2.0, 2.0, 2.0, 0.2]
    assert optim.learning_rate(stable, 8, 10) == pytest.approx(0.2 + 1.8 * 0.5)


@pytest.mark.parametrize(("given", "said"), [
    ({"schedule": "wsd:0.6", "warmup": 0.5}, "more than all steps"),
    ({"schedule": "wsd", "warmup": 0.9}, "more than all steps"), ({"schedule": "wsd:20"}, "match"),
    ({"schedule": "wsd:0.0"}, "match"),
])
def test_a_fall_that_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Optim(**given)


# Factors of the learning rate.


def moved(rates: dict[str, float], name: str = "adamw") -> dict[str, float]:
    """How far the first update moves each parameter of a network without decay."""
    model = network()
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    optimizer = Optimizer(model, Optim(name=name, weight_decay=0.0, clip=None, rates=rates), "float32")
    loss_of(model, 1).backward()
    optimizer.step(1e-3)
    return {key: float((one.detach() - before[key]).norm()) for key, one in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_factor_moves_its_parameters_so_much_further(name: str) -> None:
    """The first update is proportional to the rate, whichever optimizer moves; float32 rounds a sum near 1 to 6e-8."""
    plain, other = moved({}, name), moved({"^0": 0.25, "weight": 3.0}, name)
    wanted = {"0.weight": 0.25, "0.bias": 0.25, "1.weight": 3.0, "1.bias": 1.0, "3.weight": 3.0, "3.bias": 1.0}
    for key, factor in wanted.items():
        assert other[key] == pytest.approx(factor * plain[key], rel=1e-3), key


def test_a_factor_that_decides_nothing_is_refused() -> None:
    for rates in ({"visoin": 0.1}, {"vision": 0.1}, {"weight": 2.0, "3.weight": 3.0}):
        with pytest.raises(ConfigError, match="decides no trained parameter"):
            Optimizer(network(), Optim(rates=rates), "float32")
    with pytest.raises(ValueError, match="is no regex"):
        Optim(rates={"(": 1.0})


def test_parts_of_a_model_that_sees_have_their_own_rates() -> None:
    names = ["model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.weight",
             "model.language_model.embed_tokens.weight", "lm_head.weight",
             "model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    found = optim.factors(names, {"lora_B": 16.0, "vision": 0.1, "projector": 2.0, "language": 0.5})
    assert list(found.values()) == [0.1, 2.0, 0.5, 0.5, 16.0]


def test_the_factors_are_said() -> None:
    optimizer = Optimizer(network(), Optim(rates={"^0": 0.5}), "float32")
    assert optimizer.describe() == "AdamW; learning rates: 2 tensors × 0.5, 4 tensors × 1"


# Moments in 8 bits.


def wide(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(64, 64, bias=False)


def teach(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 64, generator=draw)
        (model(inputs) - inputs.flip(1)).square().mean().backward()
        optimizer.clip()
        optimizer.step(1e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torchao's update is compiled: needs a C++ compiler")
def test_eight_bits_learn_and_resume() -> None:
    """As far as AdamW itself within a tenth; from its saved state it goes on bit by bit; a quarter of the memory."""
    pytest.importorskip("torchao", reason="needs the extra adamw8bit")
    settings, error = Optim(name="adamw8bit", weight_decay=0.0), {}
    for name in ("adamw", "adamw8bit"):
        model = wide()
        teach(model, Optimizer(model, settings.model_copy(update={"name": name}), "float32"), range(150))
        inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(999))
        error[name] = float((model(inputs) - inputs.flip(1)).square().mean().detach())
    assert error["adamw8bit"] < 0.1 and error["adamw8bit"] == pytest.approx(error["adamw"], rel=0.1)
    whole, first, second = wide(), wide(), wide(1)
    optimizer = Optimizer(first, settings, "float32")
    teach(first, optimizer, range(5))
    kept = {name: one.clone() for name, one in optimizer.moments()}
    assert kept["exp_avg_codes.weight"].dtype == torch.uint8
    assert sum(one.nbytes for one in kept.values()) < 0.26 * 2 * 4 * 64 * 64
    again = Optimizer(second, settings, "float32")
    again.load({name: one.clone() for name, one in optimizer.weights()}, kept)
    teach(second, again, range(5, 9))
    teach(whole, Optimizer(whole, settings, "float32"), range(9))
    assert torch.equal(whole.weight, second.weight)


def test_eight_bits_in_force_or_refused() -> None:
    pytest.importorskip("torchao", reason="needs the extra adamw8bit")
    with pytest.raises(ConfigError, match="narrow no tensor"):
        Optimizer(network(), Optim(name="adamw8bit"), "float32")


def test_eight_bits_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eightbit, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao is not installed"):
        Optimizer(wide(), Optim(name="adamw8bit"), "float32")


def test_muon_may_move_everything() -> None:
    """No tensor is left for AdamW where nothing but matrices is trained."""
    model = nn.Sequential(wide())
    optimizer = Optimizer(model, Optim(name="muon"), "float32")
    before = model[0].weight.detach().clone()
    teach(model, optimizer, range(1))
    assert not torch.equal(before, model[0].weight)
    assert optimizer.describe() == "Muon for 1 matrices, AdamW for 0 other tensors"


def test_a_single_step_has_the_peak() -> None:
    """It would be the last of its schedule, at `minimum`: a first try of one step would try nothing."""
    for schedule in ("cosine", "linear", "constant", "wsd"):
        assert optim.learning_rate(Optim(learning_rate=0.5, schedule=schedule, warmup=0.1), 1, 1) == 0.5
        assert optim.learning_rate(Optim(learning_rate=0.5, schedule="cosine", warmup=0.0), 2, 2) == 0.0


def test_biases_of_experts_do_not_decay() -> None:
    """They are stacks [E, …], with two dimensions as matrices have."""
    model = torch.nn.Module()
    model.down_proj, model.down_proj_bias = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    one = optim.Optimizer(model, Optim(weight_decay=0.1), "float32")
    groups = one._optimizers[0].param_groups
    decays = {id(tensor): group["weight_decay"] for group in groups for tensor in group["params"]}
    assert (decays[id(model.down_proj)], decays[id(model.down_proj_bias)]) == (0.1, 0.0)

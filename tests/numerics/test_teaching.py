"""Label smoothing, noise on embeddings, the balance of experts: packs change nothing, to 1e-9 in float64.

Tolerances as in `test_invariance.py`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from taught import aux, taught_gradient
from test_families import adapters, student
from test_invariance import PACKS, TOLERANCE, a_step, examples
from true_float64 import TrueFloat64

from schoolhouse import loss, train
from schoolhouse.config import Train
from schoolhouse.errors import ConfigError
from schoolhouse.loss import Head
from schoolhouse.model import blocks, teaching
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Span, Teaching

ALL = Teaching(smoothing=0.1, noise=5.0, balance=0.3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "scale": 0.7}], ids=["plain", "capped"])
def test_smoothing_is_pytorchs(smoothing: float, head: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of `F.cross_entropy(label_smoothing=…)`, weighted, in chunks of 64 rows."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss, "LEAST_ROWS", 64)
    torch.manual_seed(0)
    hidden = torch.randn(1, 150, 8, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, 11, (1, 150)), torch.rand(1, 150, dtype=torch.float64)
    ours = loss.linear_cross_entropy(
        hidden, Head(matrix, bias, **head), labels, weights, torch.arange(150), smoothing
    ).nll
    found = torch.autograd.grad(ours, (hidden, matrix, bias))
    logits = (hidden @ matrix.T + bias) * head.get("scale", 1.0)
    if head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    nll = F.cross_entropy(logits[0], labels[0], reduction="none", label_smoothing=smoothing)
    plain = (nll * weights[0]).sum()
    wanted = torch.autograd.grad(plain, (hidden, matrix, bias))
    assert float(ours) == pytest.approx(float(plain), rel=1e-12)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-12 * float(other.norm())


def check(one: Student, added: Teaching, packs: str, rows: list | None = None) -> None:
    """Loss and every gradient of a step that teaches equal the oracle's."""
    rows, one.teaching = rows or examples("fractional", number=9, seed=8), added
    with TrueFloat64():
        wanted_loss, wanted = taught_gradient(one.model, rows, added, seed=4, step=1)
        found_loss, *_ = train.compute_gradient(one, a_step(rows, PACKS[packs](rows)), seed=4)
    assert found_loss == pytest.approx(wanted_loss, rel=TOLERANCE)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    found = {name: each.grad for name, each in one.model.named_parameters()}
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= TOLERANCE * largest, name


@pytest.mark.parametrize("packs", PACKS)
def test_all_together_on_any_packs(packs: str) -> None:
    check(student("qwen3_moe"), ALL, packs)


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_mixture_is_balanced(family: str, way: str) -> None:
    one = student(family, adapters(family) if way == "lora" else None)
    check(one, Teaching(balance=0.3), "planned")


def test_examples_without_supervision_balance_nothing() -> None:
    rows = [*examples("whole", number=4, seed=2), *examples("none", number=2, seed=3)]
    check(student("qwen3_moe"), ALL, "one pack", rows)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_noise_and_smoothing_of_a_dense_model(family: str) -> None:
    check(student(family), Teaching(smoothing=0.2, noise=5.0), "planned")


def test_recomputed_blocks_change_no_bit() -> None:
    """With activation checkpointing the routers' logits leave blocks that are computed twice."""
    rows = examples("whole", number=8, seed=6)
    plain, again = student("qwen3_moe"), student("qwen3_moe")
    blocks.compute_again(again.model)
    plain.teaching = again.teaching = ALL
    step = a_step(rows, PACKS["planned"](rows))
    assert train.compute_gradient(plain, step, seed=0) == train.compute_gradient(again, step, seed=0)
    gradients = {name: one.grad for name, one in plain.model.named_parameters()}
    assert all(torch.equal(gradients[name], one.grad) for name, one in again.model.named_parameters())


def test_the_balance_loss_is_transformers_own() -> None:
    """Of one example, `aux_loss` as the model itself returns it (float32: 1e-6)."""
    one = student("qwen3_moe").model.float()
    one.set_attn_implementation("eager")
    out = one(input_ids=torch.arange(3, 40)[None], output_router_logits=True)
    span = Span((0, 37), 0, 37)
    ours = teaching.balance_loss(out.router_logits, 2, torch.ones(1), span, None)
    assert float(ours) == pytest.approx(float(out.aux_loss), rel=1e-6)
    assert float(aux(out.router_logits, 2)) == pytest.approx(float(out.aux_loss), rel=1e-6)


def test_noise_differs_by_step_and_example_only() -> None:
    span, like = Span((0, 4, 9, 12), 0, 12), torch.zeros(1, 12, 3)
    drawn = [teaching._noise(like, 5.0, (7, 2), span, teaching.Drawn(0, step)) for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not drawn[0][0, 9:].any()  # what pads a sequence for its processes is no example
    alone = teaching._noise(torch.zeros(1, 5, 3), 5.0, (2,), Span((0, 5), 0, 5), teaching.Drawn(0, 1))
    assert torch.equal(drawn[0][0, 4:9], alone[0])
    assert float(alone.abs().max()) <= 5.0 / 15**0.5


def test_the_plain_loss_has_none_of_it() -> None:
    """Validation and the proof before the first step know no additions."""
    one, rows = student("qwen3_moe"), examples("whole", number=3, seed=1)
    micro = a_step(rows, [[0, 1, 2]]).micro_batches[0]
    plain = float(one.loss(micro).nll.detach())
    one.teaching = ALL
    assert float(one.loss(micro).nll.detach()) == plain
    assert float(one.loss(micro, teaching.Drawn(0, 1)).nll.detach()) != plain


def test_what_a_configuration_asks_for_is_in_force() -> None:
    """`output_router_logits` puts the balance loss into transformers' own loss; the recipe may say otherwise."""
    model = student("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.02).model
    assert teaching.teaching(Train(), model).balance == 0.02
    assert teaching.teaching(Train(balance=0.0), model).balance == 0.0
    assert teaching.teaching(Train(), student("qwen3_moe").model).balance == 0.0
    for family in ("qwen3", "deepseek_v3"):
        with pytest.raises(ConfigError, match="no balance loss"):
            teaching.teaching(Train(balance=0.01), student(family).model)

"""The operations of a step, against PyTorch's own count of every matrix product that was called."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse.config import Lora
from schoolhouse.model import attention, elementwise, flops, lora
from schoolhouse.model.load import Student
from schoolhouse.starter import miniatures
from schoolhouse.types import MicroBatch
from tests import seeing

LENGTH, TARGETS = 24, 7
DENSE = ("llama", "qwen2", "qwen3", "mistral", "seed_oss", "gemma", "gemma3_text")
MIXTURES = ("qwen3_moe", "deepseek_v2", "deepseek_v3")


def student(family: str, settings: Lora | None = None, **changes: object) -> Student:
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**miniatures.settings(family, 61, **changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32).train()
    model.set_experts_implementation("eager")
    if settings is not None:
        lora.inject(model, settings)
    elementwise.lighten(model)
    return Student(model)


def micro() -> MicroBatch:
    """One example of which the last places are supervised."""
    weights = torch.zeros(1, LENGTH)
    weights[0, -TARGETS:] = 1
    return MicroBatch(
        input_ids=torch.arange(LENGTH)[None] % 61, labels=torch.arange(LENGTH)[None] % 61, weights=weights,
        positions=torch.arange(LENGTH)[None], boundaries=(0, LENGTH), targets=weights.flatten().nonzero().flatten(),
        pack=(0,), supervised=float(TARGETS),
    )


def counted(one: Student, batch: MicroBatch) -> float:
    """Operations of plain matrix products in forward and backward, as PyTorch counts calls; all of the head's are
    in one chunk (those that a second one adds by `addmm_` it does not know)."""
    with FlopCounterMode(display=False) as counter:
        one.loss(batch).nll.backward()
    return _of(counter, "aten.mm", "aten.addmm")


def attended(one: Student, batch: MicroBatch) -> float:
    """Operations of the batched products in forward: attention as PyTorch writes it out, and rotary angles (1 %)."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one.loss(batch)
    return _of(counter, "aten.bmm")


def _of(counter: FlopCounterMode, *names: str) -> float:
    return sum(count for call, count in counter.get_flop_counts()["Global"].items() if str(call) in names)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", DENSE)
def test_matrices_of_a_dense_model_are_counted_exactly(family: str, tied: bool) -> None:
    one = student(family, tie_word_embeddings=tied)
    found, batch = flops.work(one.model), micro()
    assert counted(one, batch) == LENGTH * found.token + TARGETS * found.target
    square = len(found.windows) * found.pair / 3 * LENGTH**2  # PyTorch counts the square, we what is seen of it
    assert attended(one, batch) == pytest.approx(square, rel=0.01)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_counts_the_experts_that_a_token_chooses(family: str) -> None:
    """All but the router, whose few rows are no module of a matrix: 3 % of these miniatures."""
    one = student(family)
    found = flops.work(one.model)
    assert counted(one, micro()) == pytest.approx(LENGTH * found.token + TARGETS * found.target, rel=0.03)
    assert attended(one, micro()) == pytest.approx(len(found.windows) * found.pair / 3 * LENGTH**2, rel=0.01)


def test_adapters_cost_two_thirds_of_a_frozen_matrix_and_their_own() -> None:
    """The first layer's projections have no gradient of their input to make: less than a tenth of two layers."""
    one = student("qwen3", Lora(rank=4, alpha=8.0))
    whole, found = flops.work(student("qwen3").model), flops.work(one.model)
    plain = counted(one, micro())
    promised = LENGTH * found.token + TARGETS * found.target
    assert 0.9 * promised < plain <= promised
    own = sum(3 * 2 * value.numel() for name, value in one.model.named_parameters() if value.requires_grad)
    assert found.token + found.target == pytest.approx((whole.token + whole.target) * 2 / 3 + own)


def test_a_frozen_tower_costs_a_third() -> None:
    found = flops.work(seeing.student().model)
    assert found.patch > 0
    frozen = seeing.student()
    frozen.model.model.visual.requires_grad_(False)
    assert flops.work(frozen.model).patch == pytest.approx(found.patch / 3)
    assert flops.work(frozen.model).token == found.token


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_that_a_query_sees(window: int | None) -> None:
    lengths = np.asarray([1, 2, 9])
    seen = [sum(1 for query, key in itertools.product(range(length), repeat=2)
                if key <= query and (window is None or query - key < window)) for length in lengths]
    assert flops._pairs(lengths, window).tolist() == seen


def test_a_rate_is_measured() -> None:
    assert 1e8 < flops.rate(torch.device("cpu"), "float32") < 1e15

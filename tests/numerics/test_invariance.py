"""One gradient equation: packs and micro-batches change nothing, to 1e-9 in float64, against the plain loop.

Tolerance: sums of a few thousand float64 terms in another order differ by about 1e-13 of the largest term; 1e-9 of the
norm leaves room for the depth of the network and is far below any wrong factor, lost token or leaked example.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_sft import plain_gradient
from transformers import AutoConfig, AutoModelForCausalLM
from true_float64 import TrueFloat64

from schoolhouse import train
from schoolhouse.data import loader, store
from schoolhouse.data.packs import partition
from schoolhouse.model import attention, elementwise
from schoolhouse.model.load import Student
from schoolhouse.types import UNSUPERVISED, Example, Ledger, Origin, PlannedStep, Step

TOLERANCE = 1e-9
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}
FAMILIES = {
    "qwen2": {}, "qwen3": {}, "llama": {}, "gemma": {},
    "gemma2": {"sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "mistral": {"sliding_window": 4}, "granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3},
}


def student(family: str = "qwen3", tied: bool = True, **changes: object) -> Student:
    """A miniature of a family in float64 with weights large enough that every term of the gradient counts."""
    attention.register()
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes}, tie_word_embeddings=tied)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float64).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    elementwise.lighten(model)
    return Student(model)


def example(length: int, generator: np.random.Generator, kind: str) -> Example:
    """A random example: `whole` weights, `fractional` ones, or `none` supervised."""
    tokens = generator.integers(3, 97, length + 1).astype(np.int32)
    weights = np.zeros(length, dtype=np.float32)
    if kind != "none":
        chosen = generator.random(length) < 0.6
        chosen[-1] = True
        weights[chosen] = 1.0 if kind == "whole" else generator.uniform(0.1, 2.0, int(chosen.sum()))
    labels = np.where(weights != 0, tokens[1:], UNSUPERVISED).astype(np.int32)
    return Example(tokens[:-1], labels, weights, Origin("test", 1))


def examples(kind: str, number: int = 12, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [example(int(length), generator, kind) for length in generator.integers(1, 30, number)]


def a_store(rows: list[Example]) -> store.Store:
    """The examples as a store in memory."""
    arrays = store.to_arrays(rows, ["test"])
    ledger = Ledger(len(rows), {"one": len(rows)}, {}, 0, len(rows), len(rows), len(rows), 0, 0)
    return store.Store(None, "", ledger, ("test",), arrays, np.cumsum(arrays["lengths"]))


def a_step(rows: list[Example], packs: list[list[int]]) -> Step:
    """One step of these packs, with N as the plan computes it."""
    stored = a_store(rows)
    planned = PlannedStep(
        1, 0, tuple(map(tuple, packs)), int(stored.lengths.sum()), int(stored.supervised_tokens.sum()),
        float(stored.supervised.sum()),
    )
    return Step(planned, [loader.micro_batch(stored, pack) for pack in packs])


def check_equal(one: Student, rows: list[Example], packs: list[list[int]]) -> None:
    """Loss and every gradient of the packed step equal those of the plain loop."""
    with TrueFloat64():
        wanted_loss, wanted = plain_gradient(one.model, rows)
        one.model.zero_grad()
        loss, *_ = train.compute_gradient(one, a_step(rows, packs), seed=0)
    found = {name: parameter.grad for name, parameter in one.model.named_parameters() if parameter.grad is not None}
    assert found.keys() == wanted.keys()
    assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= TOLERANCE * max(largest, 1e-3), name


PACKS = {
    "unpacked": lambda rows: [[index] for index in range(len(rows))],
    "one pack": lambda rows: [list(range(len(rows)))],
    "four micro-batches": lambda rows: [list(range(start, len(rows), 4)) for start in range(4)],
    "planned": lambda rows: partition(np.asarray([len(row.input_ids) for row in rows]), 40),
}


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("kind", ["whole", "fractional"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_invariance(packs: str, kind: str, tied: bool) -> None:
    rows = examples(kind)
    check_equal(student(tied=tied), rows, PACKS[packs](rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_invariance_of_families(family: str) -> None:
    rows = examples("fractional", seed=3)
    check_equal(student(family), rows, PACKS["planned"](rows))


def test_zero_supervised_micro_batch_backward() -> None:
    """A micro-batch with nothing supervised adds exactly nothing, and still has a backward."""
    generator = np.random.default_rng(5)
    rows = [*examples("whole", seed=6), *(example(9, generator, "none") for _ in range(3))]
    packs = [list(range(12)), [12, 13, 14]]
    check_equal(student(), rows, packs)
    one = student()
    train.compute_gradient(one, a_step(rows, packs), seed=0)
    with_empty = {name: value.grad.clone() for name, value in one.model.named_parameters()}
    one.model.zero_grad()
    train.compute_gradient(one, a_step(rows[:12], packs[:1]), seed=0)
    assert all(torch.equal(with_empty[name], value.grad) for name, value in one.model.named_parameters())


def test_invariance_with_an_empty_pack() -> None:
    """More ranks than examples: an empty pack computes one unsupervised token."""
    rows = examples("whole", number=3, seed=7)
    check_equal(student(), rows, [[0, 1, 2], []])


def test_supervised_tokens_reach_the_loss() -> None:
    """Counted at the loss: a pack that delivers other targets than promised stops the step."""
    rows = examples("whole", number=4, seed=8)
    step = a_step(rows, [[0, 1], [2, 3]])
    short = Step(step.planned, step.micro_batches[:1])
    with pytest.raises(AssertionError, match="were promised"):
        train.compute_gradient(student(), short, seed=0)


def test_no_label_crosses_a_boundary() -> None:
    """The last position of an example never learns the first token of the next."""
    rows = examples("whole", number=6, seed=9)
    micro = a_step(rows, [[3, 0, 5, 1, 2, 4]]).micro_batches[0]
    for start, end, index in zip(micro.boundaries[:-1], micro.boundaries[1:], micro.pack, strict=True):
        assert micro.labels[0, start:end].tolist() == rows[index].labels.tolist()
        assert micro.positions[0, start:end].tolist() == list(range(end - start))


def test_float32_agrees_with_float64() -> None:
    """In float32 loss and gradient stay within 1e-5 of the largest norm: 24-bit sums of about a thousand terms."""
    rows, one = examples("whole", seed=10), student()
    _, wanted = plain_gradient(one.model, rows)
    one.model.float()
    train.compute_gradient(one, a_step(rows, PACKS["planned"](rows)), seed=0)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, parameter in one.model.named_parameters():
        assert float((parameter.grad.double() - wanted[name]).norm()) <= 1e-5 * largest, name

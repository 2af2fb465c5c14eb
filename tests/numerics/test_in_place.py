"""Gradients of embedding and head that are added in place: the same sums, and no fresh matrix as large as a table."""

from __future__ import annotations

import weakref

import pytest
import torch
from test_counts import micro
from test_families import student
from test_invariance import PACKS, a_step, examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from schoolhouse import loss, train
from schoolhouse.config import Optim
from schoolhouse.loss import Head
from schoolhouse.model.load import Student
from schoolhouse.optim import Optimizer

VOCABULARY, WIDTH = 8000, 64


def gradient(one: Student, precision: str, in_place: bool) -> dict[str, Tensor]:
    """The masters' gradients of a step of several micro-batches."""
    optimizer = Optimizer(one.model, Optim(), precision)
    if in_place:
        one.add_in_place(optimizer.total)
    rows = examples("fractional", number=8, seed=3)
    train.compute_gradient(one, a_step(rows, PACKS["planned"](rows)), seed=0)
    return {name: master.grad for name, master in optimizer.masters.items()}


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-12), ("bfloat16", 1e-2)])
def test_the_same_gradient(family: str, tied: bool, precision: str, tolerance: float) -> None:
    """Relative to each one's length: of float64 all digits; bfloat16 sums rows of an embedding once less."""
    wanted, found = (
        gradient(student(family, tie_word_embeddings=tied), precision, in_place) for in_place in (False, True)
    )
    assert wanted.keys() == found.keys() and all(one.layout == torch.strided for one in found.values())
    for name, one in wanted.items():
        assert float((found[name] - one).norm()) <= tolerance * float(one.norm()), name


def test_nothing_of_a_micro_batch_is_left_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph, even without what it had kept, would lie between the next one's activations."""
    before: list[weakref.ref] = []
    whole = Student.loss

    def watched(self, *args):
        assert all(one() is None for one in before)
        made = whole(self, *args)
        before.append(weakref.ref(made.nll))
        return made

    monkeypatch.setattr(Student, "loss", watched)
    gradient(student("llama"), "float32", in_place=False)
    assert len(before) > 1


class Fresh(TorchDispatchMode):
    """The largest number of values of a matrix of its own that an operation makes; `known` storages do not count."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.largest = {one.untyped_storage().data_ptr() for one in known}, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        own = isinstance(result, Tensor) and result.layout == torch.strided
        if own and result.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.itemsize)
        return result


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_as_large_as_a_table_is_made(tied: bool, in_place: bool) -> None:
    """Once the sums are there. Without it there is: what would be seen, if this were out of force."""
    one = student("qwen3", tie_word_embeddings=tied, vocab_size=VOCABULARY, hidden_size=WIDTH)
    one.model.float()
    optimizer = Optimizer(one.model, Optim(), "float32")
    if in_place:
        one.add_in_place(optimizer.total)
    one.loss(micro()).backward()
    tables = [one.model.get_input_embeddings().weight, one.head.weight]
    with Fresh([*tables, *(table.grad for table in tables)]) as fresh:
        one.loss(micro()).backward()
    assert (fresh.largest < VOCABULARY * WIDTH) is in_place


def test_logits_are_made_where_those_before_were() -> None:
    """From the second micro-batch on a processor has no fresh page for them, nor for products with them; bfloat16."""
    one = student("qwen3", tie_word_embeddings=True, vocab_size=VOCABULARY, hidden_size=WIDTH)
    one.model.bfloat16()
    optimizer = Optimizer(one.model, Optim(), "bfloat16")
    one.add_in_place(optimizer.total)
    first = one.loss(micro())
    first.backward()
    sums = [master.grad for master in optimizer.masters.values()]
    with Fresh([one.head.weight, *sums, *one._workspace._kept.values()]) as fresh:
        found = one.loss(micro())
    assert fresh.largest < VOCABULARY * min(WIDTH, len(micro().targets))
    assert torch.equal(found.nll, first.nll)


def test_a_gradient_that_was_added_counts_once() -> None:
    """The share is promised before it is added; another one afterwards is an error, not a wrong gradient."""
    hidden = torch.randn(1, 9, 4, requires_grad=True)
    head, total = Head(torch.randn(11, 4, requires_grad=True)), torch.zeros(11, 4)
    found = loss.linear_cross_entropy(
        hidden, head, torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9), torch.arange(9), into=total, share=0.25
    )
    with pytest.raises(AssertionError, match="added already"):
        found.nll.backward()


def test_looking_adds_nothing() -> None:
    one = student("qwen3")
    optimizer = Optimizer(one.model, Optim(), "float32")
    one.add_in_place(optimizer.total)
    with torch.no_grad():
        rows = examples("whole", number=2)
        one.loss(a_step(rows, [[0, 1]]).micro_batches[0])
    assert all(master.grad is None for master in optimizer.masters.values())

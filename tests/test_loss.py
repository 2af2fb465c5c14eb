"""The loss equals `F.cross_entropy` on full logits, value and gradients, and never makes the full logits.

Tolerances: in float64 both sum the same few thousand terms in another order, 1e-12 of the largest; the tests allow
1e-10. In bfloat16 hidden states and weights have 8 bits (2^-9 = 0.2 % each), logits are sums of 32 such products, and
the gradient of a logit is rounded once more: 2 % of the norm is allowed, and a wrong factor would be far outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from schoolhouse import loss
from schoolhouse.loss import Head, linear_cross_entropy
from schoolhouse.types import UNSUPERVISED, LossSum

EXACT = 1e-10
ROUNDED = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """A micro-batch and a head; `parts` are what has gradients, by name."""

    parts: dict[str, Tensor]
    labels: Tensor
    weights: Tensor
    scale: float
    softcap: float | None

    def ours(self) -> LossSum:
        head = Head(self.parts["weight"], self.parts.get("bias"), self.scale, self.softcap)
        targets = self.weights.flatten().nonzero().flatten()
        return linear_cross_entropy(self.parts["hidden"], head, self.labels, self.weights, targets)

    def plain(self) -> Tensor:
        """As it stands in a textbook: all logits, all losses, weighted and summed."""
        logits = self.parts["hidden"][0] @ self.parts["weight"].T
        logits = (logits + self.parts["bias"] if "bias" in self.parts else logits) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        nll = F.cross_entropy(logits, self.labels[0], reduction="none", ignore_index=UNSUPERVISED)
        return (nll * self.weights[0]).sum()


def make(
    tokens: int = 200, vocabulary: int = 37, width: int = 8, *, seed: int = 0, share: float = 0.6, bias: bool = True,
    scale: float = 1.0, softcap: float | None = None, fractional: bool = True, dtype: torch.dtype = torch.float64,
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    parts = {
        "hidden": torch.randn(1, tokens, width, generator=draw, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=draw, dtype=torch.float64),
        "bias": torch.randn(vocabulary, generator=draw, dtype=torch.float64),
    }
    chosen = torch.rand(1, tokens, generator=draw) < share
    labels = torch.randint(vocabulary, (1, tokens), generator=draw).where(chosen, torch.tensor(UNSUPERVISED))
    weights = (torch.rand(1, tokens, generator=draw) * 2 + 0.01 if fractional else torch.ones(1, tokens)) * chosen
    kept = {name: part.to(dtype).requires_grad_() for name, part in parts.items() if bias or name != "bias"}
    return Case(kept, labels, weights, scale, softcap)


def gradients(value: Tensor, case: Case, above: float = 1.0) -> dict[str, Tensor]:
    found = torch.autograd.grad(value * above, list(case.parts.values()), allow_unused=True)
    return dict(zip(case.parts, found, strict=True))


def check_equal(case: Case, above: float = 1.0) -> None:
    ours, plain = case.ours(), case.plain()
    torch.testing.assert_close(ours.nll.double(), plain.double(), rtol=EXACT, atol=EXACT)
    found, wanted = gradients(ours.nll, case, above), gradients(plain, case, above)
    for name in case.parts:
        torch.testing.assert_close(found[name], wanted[name], rtol=EXACT, atol=EXACT)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rows at a time, so that even small cases are computed in several chunks."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss, "LEAST_ROWS", 64)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 210), st.integers(2, 40), st.integers(1, 9)), st.integers(0, 10**6),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]), st.booleans(), st.sampled_from([1.0, 0.3, 4.0]),
    st.sampled_from([None, 0.7, 30.0]), st.booleans(), st.sampled_from([1.0, 0.125, -3.0]),
)
def test_it_equals_cross_entropy(
    sizes: tuple[int, int, int], seed: int, share: float, bias: bool, scale: float, softcap: float | None,
    fractional: bool, above: float,
) -> None:
    """Value and every gradient, for any size, share of targets, weights, scale, soft-cap, bias and outer factor."""
    case = make(*sizes, seed=seed, share=share, bias=bias, scale=scale, softcap=softcap, fractional=fractional)
    check_equal(case, above)


@pytest.mark.parametrize("targets", [1, 63, 64, 65, 127, 128, 129, 192, 200])
def test_no_row_is_lost_where_chunks_meet(targets: int) -> None:
    """The chunk holds 64 rows here: one more, one less, and exact multiples of it."""
    case = make(targets, share=1.1)
    assert int((case.weights != 0).sum()) == targets
    check_equal(case)


@pytest.mark.parametrize("rows", [1 << 24, 37 * 64, 37 * 100, 37 * 150])
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows)
    check_equal(make(300, softcap=5.0, scale=2.0))


def test_counts_are_those_of_the_targets() -> None:
    """Correct answers, weights and tokens are counted at supervised positions only."""
    case = make(300)
    found = case.ours()
    logits = case.parts["hidden"][0] @ case.parts["weight"].T + case.parts["bias"]
    right = (logits.argmax(1) == case.labels[0]) & (case.weights[0] != 0)
    assert (int(found.correct), found.tokens) == (int(right.sum()), int((case.weights != 0).sum()))
    assert float(found.supervised) == float(case.weights.double().sum())
    assert found.supervised.dtype == torch.float64 and found.nll.dtype == torch.float64


def test_tied_embeddings_receive_both_gradients() -> None:
    """The matrix that embeds the input and meets the hidden states learns from both sides."""
    case = make(150, vocabulary=37)
    ids = torch.randint(37, (1, 150), generator=torch.Generator().manual_seed(9))
    table = case.parts["weight"]

    def tied(kind: str) -> Tensor:
        hidden = torch.tanh(F.embedding(ids, table) * 1.5)
        one = Case({"hidden": hidden, "weight": table}, case.labels, case.weights, 1.0, None)
        return torch.autograd.grad(one.ours().nll if kind == "ours" else one.plain(), table)[0]

    torch.testing.assert_close(tied("ours"), tied("plain"), rtol=EXACT, atol=EXACT)


def test_nothing_supervised_is_exactly_zero_and_on_the_graph() -> None:
    """Every rank runs its backward, also one that has nothing to learn; all its gradients are zeros."""
    case = make(20, share=0.0)
    found = case.ours()
    assert (float(found.nll.detach()), int(found.correct), found.tokens, float(found.supervised)) == (0.0, 0, 0, 0.0)
    for name, gradient in gradients(found.nll, case).items():
        assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    """A frozen head or a frozen body: the other's gradients are as they were."""
    case = make(100)
    wanted = gradients(case.plain(), case)
    case.parts[frozen].requires_grad_(False)
    case.ours().nll.backward()
    assert case.parts[frozen].grad is None
    for name in case.parts.keys() - {frozen}:
        torch.testing.assert_close(case.parts[name].grad, wanted[name], rtol=EXACT, atol=EXACT)


def test_finite_differences_agree() -> None:
    """The gradient is the slope of the value itself: along random directions, to the accuracy of the difference.

    A central difference of step 1e-5 errs by 1e-10 of the third derivative and by 1e-11 of rounding.
    """
    case, draw, step = make(90, softcap=3.0, scale=1.5), torch.Generator().manual_seed(3), 1e-5
    found = gradients(case.ours().nll, case)
    for _ in range(5):
        way = {name: torch.randn(part.shape, generator=draw, dtype=part.dtype) for name, part in case.parts.items()}
        ends = []
        for sign in (1, -1):
            moved = {name: part.detach() + sign * step * way[name] for name, part in case.parts.items()}
            ends.append(float(Case(moved, case.labels, case.weights, case.scale, case.softcap).ours().nll))
        slope = sum(float((found[name] * way[name]).sum()) for name in way)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_a_second_backward_is_refused_or_right() -> None:
    """Gradients are scaled in place: the graph may serve once, and must not give another answer the second time."""
    case = make(30)
    value = case.ours().nll
    first = torch.autograd.grad(value, case.parts["weight"], torch.tensor(3.0).double(), retain_graph=True)[0].clone()
    try:
        again = torch.autograd.grad(value, case.parts["weight"], torch.tensor(3.0).double())[0]
    except RuntimeError:
        return
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_bfloat16_is_close(softcap: float | None) -> None:
    """Rounded inputs, sums in float32: gradients within 2 % of the norm, the value within 0.5 %."""
    wide = make(256, 300, 32, bias=False, softcap=softcap, seed=5)
    narrow = make(256, 300, 32, bias=False, softcap=softcap, seed=5, dtype=torch.bfloat16)
    assert float(narrow.ours().nll) == pytest.approx(float(wide.plain()), rel=5e-3)
    found, wanted = gradients(narrow.ours().nll, narrow), gradients(wide.plain(), wide)
    for name in wide.parts:
        assert found[name].dtype == torch.bfloat16
        assert float((found[name].double() - wanted[name]).norm()) < ROUNDED * float(wanted[name].norm()), name


def test_float32_is_close() -> None:
    """24 bits and sums of 300 terms: 1e-5 of the norm."""
    wide, narrow = make(256, 300, 32, seed=5), make(256, 300, 32, seed=5, dtype=torch.float32)
    assert float(narrow.ours().nll) == pytest.approx(float(wide.plain()), rel=1e-6)
    found, wanted = gradients(narrow.ours().nll, narrow), gradients(wide.plain(), wide)
    for name in wide.parts:
        assert float((found[name].double() - wanted[name]).norm()) < 1e-5 * float(wanted[name].norm()), name


def test_extreme_logits_stay_finite() -> None:
    """Logits of a thousand: the softmax is computed from differences, so nothing overflows."""
    case = make(100, scale=300.0)
    check_equal(case)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(case.ours().nll, case).values())


class Largest(TorchDispatchMode):
    """Remembers the most values that any tensor made inside held."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.values = max([self.values, *(one.untyped_storage().nbytes() // one.itemsize for one in tensors)])
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 1.1], ids=["a tenth supervised", "all supervised"])
def test_full_logits_never_exist(dtype: torch.dtype, share: float) -> None:
    """No tensor as large as [S, V], not even [M, V]: the largest is a chunk of logits, or the head itself."""
    tokens, vocabulary, width, chunk = 640, 1000, 4, 64
    case = make(tokens, vocabulary, width, share=share, softcap=5.0, dtype=dtype)
    with Largest() as largest:
        case.ours().nll.backward()
    assert 0 < largest.values <= max(chunk * vocabulary, vocabulary * width, tokens * width)


def test_the_measure_sees_full_logits() -> None:
    """The plain loss makes them, so the test above can fail."""
    with Largest() as largest:
        make(640, 1000, 4).plain()
    assert largest.values >= 640 * 1000


def test_without_gradients_none_are_made() -> None:
    """Validation pays for one matrix product, not for three."""
    case = make(640, 1000, 4)
    with torch.no_grad():
        found = case.ours()
    assert found.nll.grad_fn is None
    torch.testing.assert_close(found.nll, case.plain().detach(), rtol=EXACT, atol=EXACT)

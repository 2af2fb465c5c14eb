"""The last block's feed-forward part meets supervised tokens alone. That loss and gradient are what they were is shown
for every architecture against plain loops (`test_families`), and on every layout (`tests/parallel`)."""

from __future__ import annotations

import pytest
import torch
from test_families import MIXTURES, student
from test_invariance import PACKS, a_step, examples

from schoolhouse import train
from schoolhouse.model import blocks, last_block, load
from schoolhouse.starter import miniatures
from tests import seeing


def tokens_met(one: load.Student, again: bool) -> tuple[list[int], list[int], int, int]:
    """Tokens in each call of the first and of the last block's feed-forward part in a step; and the step's tokens and
    its targets."""
    met: tuple[list[int], list[int]] = ([], [])
    layers = one.model.get_decoder().layers
    for noted, block in zip(met, (layers[0], layers[-1]), strict=True):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given, noted=noted: noted.append(given[0].shape[1]))
    if again:
        blocks.compute_again(one.model, "float32")
    rows = examples("whole", number=8, seed=3)
    step = a_step(rows, PACKS["planned"](rows))
    train.compute_gradient(one, step, 0)
    return *met, step.planned.tokens, step.planned.supervised_tokens


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", sorted(last_block.KNOWN & {*miniatures.ARCHITECTURES}))
def test_tokens_without_a_target_are_not_computed(family: str, again: bool) -> None:
    first, last, tokens, targets = tokens_met(student(family), again)
    times = 2 if again else 1
    assert (sum(first), sum(last)) == (times * tokens, times * targets) and targets < tokens


def test_what_is_not_known_is_left_alone() -> None:
    """Experts, whose balance is that of all tokens; code of another author, whatever it calls itself."""
    for family in MIXTURES:
        assert last_block.feed_forward(student(family).model) is None
    model = student("qwen3").model
    assert last_block.feed_forward(model) is model.model.layers[-1].mlp
    model.model.__class__ = type("Qwen3Model", (type(model.model),), {"__module__": "transformers_modules.author"})
    assert last_block.feed_forward(model) is None


def test_what_is_known_is_compared_with_plain_loops() -> None:
    """By `test_families` and `test_vision_invariance`."""
    assert {f"{one}_text" for one in seeing.SETTINGS} | {*miniatures.ARCHITECTURES} >= last_block.KNOWN


def test_answers_are_written_by_all_of_the_model() -> None:
    """A forward that is told no targets computes every token, also after one that was."""
    one, ids = student("qwen3"), torch.arange(3, 23)[None]
    one.model.set_attn_implementation("sdpa")
    before = one.model(input_ids=ids).logits
    told = one.model(input_ids=ids, targets=torch.tensor([4, 9])).logits
    after = one.model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert torch.allclose(told[0, [4, 9]], before[0, [4, 9]], rtol=1e-12, atol=1e-12), "other sums: 1e-15 seen"
    assert not torch.allclose(told[0, 5], before[0, 5])


def test_norms_behind_the_part_divide_by_no_zero() -> None:
    """Gemma 2 has one; without an epsilon a row of zeros would have no gradient."""
    one = student("gemma2", rms_norm_eps=0.0)
    rows = examples("whole", number=8, seed=3)
    train.compute_gradient(one, a_step(rows, PACKS["planned"](rows)), 0)
    assert all(bool(each.grad.isfinite().all()) for each in one.model.parameters())

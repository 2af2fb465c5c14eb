"""The last block's feed-forward part meets supervised tokens alone. That loss and gradient are what they were is shown
for every architecture against plain loops (`test_families`), and on every layout (`tests/parallel`)."""

from __future__ import annotations

import pytest
import torch
from test_families import MIXTURES, student
from test_invariance import PACKS, a_step, examples
from torch import nn

from schoolhouse import train
from schoolhouse.errors import ModelError
from schoolhouse.model import blocks, last_block, load
from schoolhouse.starter import miniatures


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
@pytest.mark.parametrize("family", [one for one in miniatures.ARCHITECTURES if one not in MIXTURES])
def test_tokens_without_a_target_are_not_computed(family: str, again: bool) -> None:
    first, last, tokens, targets = tokens_met(student(family), again)
    times = 2 if again else 1
    assert (sum(first), sum(last)) == (times * tokens, times * targets) and targets < tokens


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_left_alone(family: str) -> None:
    """Their balance is that of all tokens."""
    assert last_block.feed_forward(student(family).model) is None


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


class Mixing(nn.Module):
    """Each token sees a little of the one before it in its example; those of the proof have 7 and 8."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [1, S, D] to the same."""
        follows = torch.arange(states.shape[1]) % 7 != 0
        return states + 0.1 * states.roll(1, dims=1) * follows.unsqueeze(1)


def mixing() -> load.Student:
    one = student("qwen3")
    one.model.float()
    one.model.model.norm = nn.Sequential(one.model.model.norm, Mixing())
    return one


def test_a_model_that_mixes_tokens_behind_its_last_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before the first step supervises every second token; were all computed, it would hold."""
    with pytest.raises(ModelError, match="cannot be trained packed"):
        load.prove(mixing())
    monkeypatch.setattr(last_block, "feed_forward", lambda _: None)
    assert load.prove(mixing()).difference < 2e-5

"""Products in float8: what torchao emulates on a processor is close to bfloat16, learns, keeps examples of a pack apart
and every name of a weight; on a device without float8 the setting is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from schoolhouse import config
from schoolhouse.errors import ConfigError
from schoolhouse.model import float8
from schoolhouse.optim import Optimizer

CPU = torch.device("cpu")


def model(hidden: int = 32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=64, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    ))


def narrowed() -> tuple[nn.Module, nn.Module]:
    plain, fast = model().bfloat16(), model().bfloat16()
    assert float8.narrow(fast, CPU, emulate=True) == 14  # four of attention, three of the MLP; not the head
    return plain, fast


def test_products_are_float8_only_where_gradients_are_wanted() -> None:
    plain, fast = narrowed()
    ids = torch.arange(37)[None]
    wanted, found = plain(ids).logits, fast(ids).logits
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-3 < error < 0.1  # bfloat16's own is 2e-3; float8 was seen to be at 3 %
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, plain(ids).logits)


def test_weights_keep_their_names_and_gradients_their_way() -> None:
    plain, fast = narrowed()
    assert [*dict(plain.named_parameters())] == [*dict(fast.named_parameters())]
    ids = torch.arange(37)[None]
    for one in (plain, fast):
        one(ids, labels=ids).loss.backward()
    fast_gradients = {name: one.grad.float() for name, one in fast.named_parameters()}
    for name, one in plain.named_parameters():
        likeness = torch.cosine_similarity(one.grad.float().flatten(), fast_gradients[name].flatten(), 0)
        assert likeness > 0.97, name


def test_it_learns() -> None:
    """As far as in bfloat16, with the optimizer of a run: masters in float32."""
    ids = torch.randint(64, (4, 21), generator=torch.Generator().manual_seed(1))
    losses = []
    for fast in (False, True):
        one = model()
        if fast:
            float8.narrow(one, CPU, emulate=True)
        optimizer = Optimizer(one, config.Optim(), "bfloat16")
        for _ in range(40):
            loss = one(ids, labels=ids).loss
            loss.backward()
            optimizer.step(5e-3)
        losses.append(float(loss.detach()))
    assert losses[1] < 1.0 and losses[1] == pytest.approx(losses[0], abs=0.3)


def test_examples_of_a_pack_do_not_meet_by_their_scales() -> None:
    """A row's result is the same bits beside a row that is a thousand times larger."""
    layer = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(32, 48, bias=False))]))
    holder = nn.Module()
    holder.layers = layer[0]
    holder.bfloat16()
    converted = float8.narrow(holder, CPU, emulate=True)
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    alone, beside = holder.layers[0](row), holder.layers[0](torch.cat([row, 1000 * row.flip(1)]))
    assert converted == 1
    assert torch.equal(alone[0], beside[0])
    left, right = row.clone(), 1000 * row.flip(1)  # whose columns of the weight's gradient are not the same ones
    left[:, 16:], right[:, :16] = 0, 0
    above = torch.ones(2, 48).bfloat16() * torch.tensor([[1.0], [1000.0]]).bfloat16()
    gradients = []
    for given, times in ((left, above[:1]), (torch.cat([left, right]), above)):
        holder.zero_grad()
        holder.layers[0](given).backward(times)
        gradients.append(next(holder.parameters()).grad[:, :16].clone())
    assert bool(gradients[0].any()) and torch.equal(*gradients)


@pytest.mark.parametrize(("settings", "said"), [
    ({"precision": "float32", "float8": True}, "precision=bfloat16"),
])
def test_settings_that_do_not_fit(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.Model(path="starter/qwen3", **settings)


def test_a_processor_refuses() -> None:
    with pytest.raises(ConfigError) as caught:
        float8.narrow(model(), CPU)
    assert "the device is cpu" in str(caught.value) and "model.float8=false" in str(caught.value)


def test_sides_that_fit_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        float8.narrow(model(hidden=36), CPU, emulate=True)


def test_a_trial_that_fails_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.float8 import float8_linear

    real = float8_linear.Float8Linear.forward
    monkeypatch.setattr(float8_linear.Float8Linear, "forward", lambda self, given: 1.3 * real(self, given))
    with pytest.raises(ConfigError, match="results are off by"):
        float8.narrow(model(), CPU, emulate=True)

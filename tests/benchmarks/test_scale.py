"""The arithmetic of docs/scale.md: held against transformers' own models, what autograd really keeps, and the page."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import loss
from schoolhouse.model import attention, layouts
from schoolhouse.parallel import ulysses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    """The command as a module; `benchmarks` is no package."""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]


def made(model, device: str = "meta", **changes: object) -> torch.nn.Module:
    """transformers' own model of these sizes."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.heads,
        num_key_value_heads=model.key_heads, intermediate_size=model.intermediate, vocab_size=model.vocabulary,
        tie_word_embeddings=model.tied, **changes,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)


def test_weights_are_counted_as_transformers_makes_them(scale: ModuleType) -> None:
    attention.register()
    for model in scale.MODELS:
        real = made(model)
        assert sum(one.numel() for one in real.parameters()) == model.weights
        assert sum(one.numel() for one in real.model.layers[0].parameters()) == model.block


def test_a_block_keeps_what_the_formula_says(scale: ModuleType) -> None:
    """Storages that autograd saves in one bfloat16 block, its weights aside, within 15 %.

    The rest is bookkeeping that grows with the sequence alone: rotary angles, scales of norms, scores' sums.
    """
    attention.register()
    model, tokens = scale.Model("small", 256, 1, 4, 2, 64, 1024, 1000, tied=True), 512
    real = made(model, "cpu").train()
    weights = {one.untyped_storage().data_ptr() for one in real.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, tokens, model.hidden, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(tokens)[None]
    angles = real.model.rotary_emb(hidden, places)
    layout = layouts.layout((0, tokens), hidden.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        real.model.layers[0](
            hidden, attention_mask=None, position_ids=places, position_embeddings=angles, layout=layout
        )
    assert sum(kept.values()) / tokens == pytest.approx(scale.block_activations(model), rel=0.15)


@pytest.mark.parametrize(("heads", "keys", "degree"), [(8, 8, 2), (8, 2, 4), (12, 2, 4), (6, 3, 2), (4, 1, 4)])
def test_the_exchange_sends_what_the_formula_says(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, heads: int, keys: int, degree: int
) -> None:
    """Bytes handed to the all-to-alls of one block, forward, by the code that trains: the same as the table counts."""
    sent = []

    class Peers:
        def size(self) -> int:
            return degree

        def rank(self) -> int:
            return 0

    def record(received: torch.Tensor, values: torch.Tensor, group: object) -> None:
        sent.append(values.nbytes)
        received.copy_(values)

    monkeypatch.setattr(ulysses.dist, "all_to_all_single", record)
    tokens = 6
    query, key = (torch.zeros(tokens, number, 16, dtype=torch.bfloat16) for number in (heads, keys))
    exchange = ulysses.Exchange(Peers())
    own, *_ = exchange.to_heads(query, key, key)
    exchange.to_sequence(own)
    model = scale.Model("small", 64, 1, heads, keys, 16, 64, 100, tied=True)
    layout = scale.Layout(1, 1, degree)
    others = sum(sent) * (degree - 1) / degree  # the part for itself is not sent
    assert 3 * others == scale.token_traffic(model, tokens * degree, layout)


def test_the_loss_makes_as_many_logits_as_planned(scale: ModuleType) -> None:
    assert scale.CHUNK == loss.ON_ACCELERATOR


def test_more_processes_never_hold_more(scale: ModuleType) -> None:
    """States fall as 1 / parts, activations as 1 / U; the bytes sent stay below their limits."""
    model = scale.MODELS[2]
    one, two, four = scale.Layout(1, 1, 1), scale.Layout(1, 2, 1), scale.Layout(1, 2, 2)
    assert scale.states(model, one) == 16 * model.weights == 2 * scale.states(model, two)
    fixed = scale.activations(model, 0, one)
    assert scale.activations(model, 8192, four) - fixed == (scale.activations(model, 8192, two) - fixed) / 2
    assert scale.weight_traffic(model, one) == scale.token_traffic(model, 8192, two) == 0
    assert scale.replica_traffic(model, two) == 0 < scale.replica_traffic(model, scale.Layout(2, 2, 1))


def test_the_chosen_layout_is_the_first_that_fits(scale: ModuleType) -> None:
    for model in scale.MODELS:
        for devices in (8, 64, 512):
            layout = scale.chosen(model, devices, 131_072, 80 * scale.GIB)
            if layout is not None:
                assert layout.replicate * layout.shard * layout.ulysses == devices
                assert model.heads % layout.ulysses == 0
                assert scale.memory(model, 131_072, layout) <= 72 * scale.GIB
                smaller = [one for one in scale.layouts(model, devices) if one.ulysses < layout.ulysses]
                assert all(scale.memory(model, 131_072, one) > 72 * scale.GIB for one in smaller)


def test_the_page_holds_the_commands_output(scale: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main([])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 + 6 * 3 * 2
    assert printed in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")

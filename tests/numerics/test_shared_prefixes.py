"""What examples of a micro-batch begin with alike is computed once: loss and gradient stay those of the plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_families import adapters, student
from test_invariance import a_step, check_equal, example
from test_varlen import flash
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import train
from schoolhouse.config import Lora
from schoolhouse.data import shared_prefixes as shared
from schoolhouse.errors import ModelError
from schoolhouse.model import attention, blocks, isolation, layouts, recurrent, varlen
from schoolhouse.model import shared_prefixes as folding
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Teaching
from schoolhouse.starter import miniatures
from schoolhouse.types import UNSUPERVISED, Example, Origin

CPU = torch.device("cpu")


def branches(seed: int = 0) -> list[Example]:
    """Conversations that were split, in another order, beside examples that share a little, nothing, or all but a
    target: each one goes on where an earlier one left off, and has its targets behind that."""
    generator = np.random.default_rng(seed)
    rows = [example(int(length), generator, "fractional") for length in (9, 1, 5)]
    for _ in range(2):
        history = generator.integers(3, 97, 11).astype(np.int32)
        for _ in range(4):
            rest = generator.integers(3, 97, int(generator.integers(2, 9))).astype(np.int32)
            ids = np.concatenate([history, rest])
            weights = np.zeros(len(ids) - 1, dtype=np.float32)
            weights[len(history) - 1 :] = generator.uniform(0.1, 2.0, len(rest))
            labels = np.where(weights != 0, ids[1:], UNSUPERVISED).astype(np.int32)
            rows.append(Example(ids[:-1], labels, weights, Origin("test", 1)))
            history = np.concatenate([history, rest[:-1], generator.integers(3, 97, 7).astype(np.int32)])
    again = rows[-1]
    rows += [Example(again.input_ids.copy(), again.labels, again.weights, again.origin)]
    return [rows[place] for place in generator.permutation(len(rows))]


def whole(rows: list[Example]) -> list[list[int]]:
    return [list(range(len(rows)))]


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", sorted(folding.KNOWN))
def test_every_architecture(family: str, way: str) -> None:
    """To 1e-9 in float64; less than three quarters of the tokens go through the first block."""
    one, rows, met = student(family, adapters(family) if way == "lora" else None), branches(), []
    assert one.apart == ""
    one.model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: met.append(args[0].shape[1]))
    check_equal(one, rows, whole(rows))
    assert met[-1] < 0.75 * met[0] if len(met) == 1 else met[-1] < 0.75 * sum(len(each.input_ids) for each in rows)


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt_oss"])
def test_whole_examples_and_rests_attend_alike(family: str, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example asks with all of its tokens, or with its own alone; and a few queries at a time."""
    monkeypatch.setattr(layouts, "PART", part)
    monkeypatch.setattr(attention, "ROWS", 3)
    check_equal(student(family), branches(1), whole(branches(1)))


def test_by_a_kernel_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention by what PyTorch documents of it: gradients of bfloat16 as near to those of float32 as the
    groups'."""
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    rows, gradients = branches(2), []
    for trusted, kind in ((frozenset(), torch.float32), (frozenset(), torch.bfloat16), (frozenset({"varlen"}), None)):
        one = student("qwen3")
        one.model.to(kind or torch.bfloat16)
        one.kernels = varlen.Kernels(trusted)
        train.compute_gradient(one, a_step(rows, whole(rows)), seed=0)
        gradients.append(torch.cat([each.grad.flatten() for each in one.model.parameters()]).double())
    groups, kernel = (float((one - gradients[0]).norm() / gradients[0].norm()) for one in gradients[1:])
    assert kernel < 1.5 * groups < 0.1


def test_what_is_spared_is_told() -> None:
    """Tokens, and the operations that they and the pairs before them would take."""
    one, rows = student("mistral"), branches()
    packs = [list(range(0, len(rows), 2)), list(range(1, len(rows), 2))]
    step = a_step(rows, packs)
    begins = np.concatenate([micro.shared.begins for micro in step.micro_batches])
    *_, (tokens, operations) = train.compute_gradient(one, step, seed=0)
    window, layers = one.model.config.sliding_window, one.model.config.num_hidden_layers
    pairs = sum(min(place + 1, window) for begin in begins for place in range(begin))
    assert tokens == begins.sum() > 0
    assert operations == pytest.approx(tokens * one.work.token + layers * pairs * one.work.pair)
    alone = a_step(rows, [[index] for index in range(len(rows))])
    assert train.compute_gradient(one, alone, seed=0)[2] == (0, 0)


LETTERS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=9)


@given(rows=LETTERS, data=st.data())
def test_what_is_found(rows: list[list[int]], data: st.DataObject) -> None:
    """Each token's source follows the same tokens in its example, no place has two targets, every example has a token
    of its own; without targets every beginning is computed once."""
    ids = [np.asarray(one, dtype=np.int32) for one in rows]
    weights = [np.asarray(data.draw(st.lists(st.booleans(), min_size=len(one), max_size=len(one)))) for one in ids]
    text, starts = np.concatenate(ids), np.cumsum([0, *map(len, ids)])
    follows = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    history = [tuple(one[: place + 1].tolist()) for one in ids for place in range(len(one))]
    for found in (shared.anywhere(ids, weights), shared.in_turn(ids, weights, follows)):
        assert (found.sources[found.sources] == found.sources).all()
        assert all(history[place] == history[source] for place, source in enumerate(found.sources))
        targets = found.sources[np.flatnonzero(np.concatenate(weights))]
        assert len(set(targets.tolist())) == len(targets)
        own = found.sources == np.arange(len(text))
        for begin, (start, end) in zip(found.begins, itertools.pairwise(starts), strict=True):
            assert begin < end - start and not own[start : start + begin].any() and own[start + begin : end].all()
    found = shared.anywhere(ids, [np.zeros(len(one)) for one in ids])
    assert len(set(history)) <= len(text) - found.left_out <= len(set(history)) + len(ids)  # each computes its last


def test_a_layout_brings_every_token_to_its_places() -> None:
    """Way there and back; the copies of a token are where it stands in others."""
    micro = a_step(branches(3), whole(branches(3))).micro_batches[0]
    found = layouts.layout(micro.boundaries, CPU, shared=micro.shared)
    computed = torch.arange(len(micro.shared.kept))
    for way in (found.queries, found.keys):
        assert torch.equal(way.there[way.back], computed)
    assert torch.equal(found.keys.there[found.keys.copies], found.keys.copied)
    ids = micro.input_ids[0]
    spans = {tuple(ids[start:end].tolist()) for start, end in itertools.pairwise(micro.boundaries)}
    seen = ids[micro.shared.kept][found.keys.there].split([each.examples * each.queries.stop for each in found.groups])
    for group, part in zip(found.groups, seen, strict=True):
        for row in part.view(group.examples, -1).tolist():
            assert any(tuple(row[: len(one)]) == one for one in spans)
    assert any(group.queries.start for group in found.groups)


@pytest.mark.parametrize(("change", "why"), [
    ({"teaching": Teaching(noise=5.0)}, "NEFTune"), ({"teaching": Teaching(balance=0.1)}, "balance"),
    ({"kernels": varlen.Kernels(whole="not here")}, "not here"),
])
def test_examples_stay_apart_where_they_must(change: dict, why: str) -> None:
    one = student("qwen3")
    for name, value in change.items():
        setattr(one, name, value)
    assert why in one.apart
    rows = branches()
    if "kernels" in change:
        check_equal(one, rows, whole(rows))
        assert one.loss(a_step(rows, whole(rows)).micro_batches[0]).spared == ()


def test_dropout_and_unknown_models_keep_examples_apart() -> None:
    assert "dropout" in student("qwen3", attention_dropout=0.1).apart
    assert "dropout" in student("llama", Lora(rank=2, dropout=0.1)).apart
    model = student("qwen3").model
    model.config.model_type = "unheard_of"
    assert "not shown" in folding.why_not(model)


def test_what_is_known_is_compared_with_plain_loops() -> None:
    """All but those with a state of each example along its sequence."""
    recurrent_ones = {one for one in miniatures.ARCHITECTURES if recurrent.layers(student(one).model)}
    assert {*miniatures.ARCHITECTURES} - recurrent_ones == folding.KNOWN


@pytest.mark.parametrize("layers", [
    ["conv", "full_attention"], ["full_attention", "conv"], ["conv", "full_attention", "conv"],
])
def test_what_leaks_into_the_first_tokens_of_an_example_is_refused(
    layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not kept apart, short convolutions see the two tokens before: in a pack those of another example, which the proof
    has to see though its examples begin alike."""
    attention.register()
    sizes = {"vocab_size": 997, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = AutoConfig.for_model("lfm2", **sizes, num_hidden_layers=len(layers), layer_types=layers, conv_L_cache=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(recurrent, "keep_apart", lambda model: None)
        with pytest.raises(ModelError, match="cannot be trained packed"):
            isolation.prove(Student(model))
    assert isolation.prove(Student(model)).difference < 2e-5


@pytest.mark.parametrize("how", [{}, {"keep_attention": True}], ids=["again", "but attention"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_recomputed_blocks_give_the_same_bits(family: str, how: dict[str, bool]) -> None:
    rows, found = branches(5), []
    for again in (False, True):
        one = student(family)
        if again:
            blocks.compute_again(one.model, **how)
        train.compute_gradient(one, a_step(rows, whole(rows)), seed=0)
        found.append([each.grad for each in one.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_little_in_common_is_not_looked_for() -> None:
    """Below a fiftieth of the tokens a micro-batch is as it was."""
    generator = np.random.default_rng(4)
    rows = [example(60, generator, "whole") for _ in range(6)]
    for row in rows:
        row.input_ids[:1] = 5
    assert a_step(rows, whole(rows)).micro_batches[0].shared is None
    for row in rows:
        row.input_ids[:3], row.weights[:3], row.labels[:3] = 5, 0, UNSUPERVISED
    assert a_step(rows, whole(rows)).micro_batches[0].shared is not None

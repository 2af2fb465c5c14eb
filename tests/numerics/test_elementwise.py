"""Norms, rotations, gates and patches in fewer passes: transformers' results and gradients, with less kept.

That the gradient of whole steps is a plain loop's, to 1e-9 in float64, is shown for every architecture elsewhere
(`test_families`, `test_vision_invariance`), since those miniatures are lighter, too.
"""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import seeing
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from schoolhouse.config import Lora
from schoolhouse.data import vision
from schoolhouse.model import blocks, elementwise, lora
from schoolhouse.starter import miniatures

ALL = ["gates", "norms", "rotations"]
OTHERS = {
    "seed_oss": ["norms", "rotations"],  # its feed-forward part may drop out
    "qwen3_moe": ["norms", "rotations"],  # every part of it is experts
    "deepseek_v2": ["gates", "norms"],  # turns by complex numbers
    "gpt_oss": [],
    **{family: ["gates", "norms"] for family in ("qwen3_5_text", "qwen3_next")},  # turn a part of each head
    **{family: ["norms", "rotations"] for family in ("lfm2", "falcon_h1", "granitemoehybrid")},
    "nemotron_h": [],
}


TOWERS = {"qwen2_5_vl": ["norms", "rotations"]}


def model(family: str, number: torch.dtype = torch.float32, settings: Lora | None = None) -> PreTrainedModel:
    """A miniature whose every weight counts."""
    torch.manual_seed(1)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**miniatures.settings(family, 97)), dtype=number)
    if settings is not None:
        lora.inject(made, settings)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return made.train()


def learnt(one: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of 80 tokens, and the gradient of their loss."""
    ids = torch.arange(80).view(2, 40) * 7 % 97
    one.zero_grad()
    out = one(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits, {name: each.grad.clone() for name, each in one.named_parameters() if each.grad is not None}


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest of any weight's gradient, relative to its length."""
    assert found.keys() == wanted.keys()
    pairs = [(found[name].double(), one.double()) for name, one in wanted.items()]
    return float(torch.stack([(each - one).norm() / one.norm() for each, one in pairs]).max())  # of no number, none


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", miniatures.ARCHITECTURES)
def test_every_architecture(family: str, number: torch.dtype) -> None:
    """Forward is the same bit by bit; backward sums in another order: 6e-7 was seen in float32, 1.3e-2 in bfloat16,
    where one rounding is 4e-3. Of Gated DeltaNet's decay transformers' own gradient is 6e-5 away from float64's, ours
    as far, and they are 1.4e-5 apart."""
    one = model(family, number)
    logits, wanted = learnt(one)
    elementwise.lighten(one)
    assert elementwise.lighter(one) == OTHERS.get(family, ALL)
    found, gradients = learnt(one)
    assert torch.equal(found, logits)
    exact = 3e-5 if any("A_log" in name for name in gradients) else 2e-6
    assert distance(gradients, wanted) < (exact if number == torch.float32 else 4e-2)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_adapters_beside_every_matrix(family: str) -> None:
    """Of a whole model: results to rounding, since PEFT adds in another order; its experts' stacks stay PEFT's."""
    mixture = None if family == "qwen3" else True
    one = model(family, settings=Lora(rank=4, experts=mixture))
    logits, wanted = learnt(one)
    elementwise.lighten(one)
    assert elementwise.lighter(one) == ["adapters", *OTHERS.get(family, ALL)]
    found, gradients = learnt(one)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert distance(gradients, wanted) < 2e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_bfloat16_is_no_farther_from_the_truth(family: str) -> None:
    """Against float64, over all weights: Llama's way rounds inside backward where ours does not."""
    _, truth = learnt(model(family, torch.bfloat16).double())
    one = model(family, torch.bfloat16)
    _, own = learnt(one)
    elementwise.lighten(one)
    _, ours = learnt(one)
    errors = [sum(float((each[name].double() - true).norm() / true.norm()) for name, true in truth.items())
              for each in (own, ours)]
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name, one in vision.FAMILIES.items() if one.placed_by_grid])
def test_every_tower(family: str, number: torch.dtype) -> None:
    """What a vision tower makes of two images is the same bit by bit but for its patches, which are left alone here."""
    tower = seeing.student(family, lighter=False).model.model.visual.to(number)
    tower.config._attn_implementation = "sdpa"
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]])
    pixels = torch.randn(32, tower.patch_embed.proj.weight[0].numel(), dtype=number)
    found = []
    for lighter in (False, True):
        if lighter:
            for one in tower.blocks:
                elementwise.lighten(one)
            assert elementwise.lighter(tower) == TOWERS.get(family, ["rotations"])
        tower.zero_grad()
        features = tower(pixels, grid_thw=grid).pooler_output
        features.backward(torch.linspace(-1, 1, features.numel(), dtype=number).view_as(features))
        found.append((features, {name: one.grad for name, one in tower.named_parameters() if one.grad is not None}))
    (wanted, gradients), (features, ours) = found
    assert torch.equal(features, wanted)
    assert distance(ours, gradients) < (2e-6 if number == torch.float32 else 4e-2)


@pytest.mark.parametrize(("conv", "shape"), [
    (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (5, 3, 2, 4, 4)),  # a row for each patch, as Qwen's towers are given them
    (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (2, 3, 5, 9, 11)),
    (nn.Conv2d(3, 8, 4, 4, padding="valid"), (2, 3, 16, 12)),  # whole images, as SigLIP is given them
    (nn.Conv2d(3, 8, (2, 5), (2, 5)), (1, 3, 7, 14)),
])
def test_patches_are_multiplied(conv: nn.Module, shape: tuple[int, ...]) -> None:
    """The convolution's results, shape and gradients, to 1e-12 in float64; what is left over beside patches, too."""
    conv, images, own = conv.double(), torch.randn(shape, dtype=torch.float64, requires_grad=True), {}
    for lighter in (False, True):
        assert elementwise.lighten(conv) == lighter if lighter else not elementwise.lighter(conv)
        found = conv(images)
        above = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
        own[lighter] = [found, *torch.autograd.grad(found, [images, *conv.parameters()], above)]
    assert elementwise.lighter(conv) == ["patches"]
    for one, other in zip(*own.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv(images[0]), own[True][0][0])


@pytest.mark.parametrize("conv", [
    nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 2, 2, groups=2),
    nn.Conv2d(3, 8, 2, 2, dilation=2), nn.Conv2d(3, 8, 1, padding="same"), nn.Conv1d(3, 8, 4, 4),
], ids=["overlapping", "padded", "grouped", "dilated", "same", "along a sequence"])
def test_other_convolutions_stay(conv: nn.Module) -> None:
    assert not elementwise.lighten(conv)


@pytest.mark.parametrize("kind", [llama.LlamaRMSNorm, qwen3.Qwen3RMSNorm])
def test_the_norm_of_many_tokens(kind: type[nn.Module]) -> None:
    """Sums over 65,536 rows in float32, one after another, against float64: 2.3e-6 was seen."""
    torch.manual_seed(0)
    norm, states = kind(64), torch.randn(1, 65536, 64)
    norm.weight.data.normal_()
    elementwise.lighten(norm)
    states.requires_grad_()
    above = torch.randn_like(states)
    norm(states).backward(above)
    true, weight = states.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    (weight * true * torch.rsqrt(true.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)).backward(above.double())
    found, wanted = (dict(enumerate(each)) for each in ((states.grad, norm.weight.grad), (true.grad, weight.grad)))
    assert distance(found, wanted) < 6e-6


@pytest.mark.parametrize("shape", [(5,), (1, 7), (2, 3, 4), (0,)])
def test_both_sums_over_rows(shape: tuple[int, ...]) -> None:
    """The second is of devices that this machine may lack."""
    products, scale = torch.randn(*shape, 6, dtype=torch.float64), torch.rand(*shape, 1, dtype=torch.float64)
    wanted = torch.einsum("rd,r->d", products.reshape(-1, 6), scale.flatten())
    for quick in (True, False):
        torch.testing.assert_close(elementwise._over_rows(products, scale, quick=quick), wanted)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_a_norm_in_another_format_than_its_states(weight: torch.dtype) -> None:
    norm, states = llama.LlamaRMSNorm(48).to(weight), torch.randn(3, 5, 48, dtype=torch.bfloat16, requires_grad=True)
    wanted = norm(states)
    wanted.float().sum().backward()
    of_states, states.grad = states.grad, None
    elementwise.lighten(norm)
    found = norm(states)
    found.float().sum().backward()
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert states.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == weight
    torch.testing.assert_close(states.grad, of_states, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("angles", [
    torch.randn(1, 7, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16, requires_grad=True),
    torch.randn(2, 7, 16, dtype=torch.float64), torch.randn(2, 7, 16).half(),
], ids=["of all rows", "of each row", "learnt", "wider", "narrower"])
@pytest.mark.parametrize("rows", [1, 2])
def test_states_are_turned_as_transformers_turns_them(angles: torch.Tensor, rows: int) -> None:
    """By whatever angles, those of both halves different: values bit by bit, gradients of all that is learnt."""
    found, wanted = [], []
    for turn, results in ((elementwise._turned, found), (llama.apply_rotary_pos_emb, wanted)):
        torch.manual_seed(2)
        states = [torch.randn(rows, heads, 7, 16, requires_grad=True) for heads in (4, 2)]
        cos, sin = (one.detach().requires_grad_(angles.requires_grad) for one in (angles.cos(), angles.sin()))
        turned = turn(*states, cos, sin)
        sum((one * torch.randn_like(one)).sum() for one in turned).backward()
        results += [*turned, *(one.grad for one in (*states, cos, sin) if one.grad is not None)]
    assert len(found) == (6 if angles.requires_grad else 4)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def kept(one: PreTrainedModel) -> list[int]:
    """How many of the four wide matrices of each gated layer are in memory between forward and backward."""
    seen: list[list[StorageWeakRef]] = []
    hooks = []
    for layer in one.model.layers:
        own: list[StorageWeakRef] = []
        seen.append(own)
        hooks += [
            each.register_forward_hook(lambda _, __, out, own=own: own.append(StorageWeakRef(out.untyped_storage())))
            for each in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.act_fn)
        ]
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given, own=own: own.append(StorageWeakRef(given[0].untyped_storage()))))
    loss = one(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
    found = [sum(not each.expired() for each in own) for own in seen]
    for hook in hooks:
        hook.remove()
    loss.backward()
    return found


def test_a_gated_layer_keeps_two_matrices_of_four() -> None:
    """None where all of the block is computed again; and not more than transformers where little of it is learnt."""
    one = model("qwen3")
    assert kept(one) == [4] * len(one.model.layers)
    elementwise.lighten(one)
    assert kept(one) == [2] * len(one.model.layers)
    blocks.compute_again(one)
    assert kept(one) == [0] * len(one.model.layers)
    little = Lora(rank=4, targets=("down_proj",))
    one = model("qwen3", settings=little)
    before = kept(one)
    elementwise.lighten(one)
    assert all(now <= then for now, then in zip(kept(one), before, strict=True)) and before[0] == 1


class _InItsPlace(nn.Module):
    """A layer that drops out in the memory of what it is given."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.dropout(states, 0.5, training=True, inplace=True))


def test_a_graph_that_is_dropped_is_gone() -> None:
    """Without a backward, and at once, also where a result is kept by what gave it, as of a hyperbolic tangent."""
    one, seen = model("qwen3"), []
    elementwise.lighten(one)
    for layer in one.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Tanh())
        layer.mlp.register_forward_hook(lambda _, __, out: seen.append(StorageWeakRef(out.untyped_storage())))
    gc.disable()
    try:
        one(input_ids=torch.arange(40)[None])
        assert len(seen) == len(one.model.layers) and all(each.expired() for each in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["act_fn", "down_proj"])
def test_what_is_changed_in_place_is_kept_as_it_is(part: str) -> None:
    """An activation in the gate's memory, a dropout in the product's."""
    one = model("qwen3")
    for layer in one.model.layers:
        layer.mlp.act_fn = nn.SiLU(inplace=True) if part == "act_fn" else nn.SiLU()
        if part == "down_proj":
            layer.mlp.down_proj = _InItsPlace(layer.mlp.down_proj)
    torch.manual_seed(3)
    _, wanted = learnt(one)
    elementwise.lighten(one)
    torch.manual_seed(3)
    _, found = learnt(one)
    assert distance(found, wanted) < 2e-6


def test_what_backward_needs_may_not_change() -> None:
    """As autograd itself says it, of weights and of what the product is made of again."""
    for name in ("down_proj", "gate_proj"):
        one = model("qwen3")
        elementwise.lighten(one)
        mlp, seen = one.model.layers[0].mlp, []
        mlp.gate_proj.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        loss = one(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss
        with torch.no_grad():
            (seen[0] if name == "gate_proj" else mlp.down_proj.weight).mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()


def test_weights_go_with_their_model() -> None:
    """At once, not when circles are looked for."""
    one = model("qwen3")
    elementwise.lighten(one)
    weights = [weakref.ref(module) for module in one.modules() if elementwise._is_lighter(module)]
    gc.disable()
    try:
        del one
        assert not any(each() is not None for each in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [
    None, Lora(rank=4), Lora(rank=4, dropout=0.5), Lora(rank=4, dropout=0.5, targets=("down_proj",)),
], ids=["full", "lora", "dropout", "down alone"])
def test_gates_alone_change_no_bit(settings: Lora | None) -> None:
    """Also where memory of what is made again is taken by other tensors of its size, as those of a dropout."""
    one = model("qwen3", settings=settings)
    torch.manual_seed(3)
    logits, wanted = learnt(one)
    elementwise.lighten(one)
    for module in one.modules():
        if elementwise._is_lighter(module) and not isinstance(module, qwen3.Qwen3MLP):
            module.__class__ = type(module).__base__
    assert elementwise.lighter(one) == ["gates"]
    for _ in range(2):
        torch.manual_seed(3)
        found, gradients = learnt(one)
        assert torch.equal(found, logits) and gradients.keys() == wanted.keys()
        assert all(torch.equal(gradients[name], each) for name, each in wanted.items())


def test_backward_may_run_twice() -> None:
    one = model("qwen3")
    elementwise.lighten(one)
    out = one(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None])
    first, second = (torch.autograd.grad(out.loss, list(one.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class _Other(llama.LlamaRMSNorm):
    """Llama's but for one number."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Same(llama.LlamaRMSNorm):
    """Llama's, written again."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Said of it."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_a_part_is_known_by_its_code() -> None:
    assert elementwise.lighten(_Other(8)) == 0 and elementwise.lighten(_Same(8)) == 1
    given = _Same(8)
    given.forward = types.MethodType(lambda self, states: states, given)
    assert elementwise.lighten(given) == 0, "what was given another forward keeps it"


def test_another_rotation_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function around other halves."""
    own = qwen3.apply_rotary_pos_emb
    names = {**own.__globals__, "rotate_half": lambda x: x}
    other = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__)
    monkeypatch.setattr(qwen3, "apply_rotary_pos_emb", other)
    elementwise._turning.cache_clear()
    one = model("qwen3")
    elementwise.lighten(one)
    elementwise._turning.cache_clear()
    assert elementwise.lighter(one) == ["gates", "norms"]


def test_what_stands_around_a_rotation_stays() -> None:
    """transformers renames arguments of former versions: the cache that is handed in by either name is filled."""
    one, cache = model("qwen3"), DynamicCache()
    elementwise.lighten(one)
    states = torch.randn(1, 3, one.config.hidden_size)
    angles = one.model.rotary_emb(states, torch.arange(3)[None])
    one.model.layers[0].self_attn(states, angles, None, past_key_values=cache)
    assert cache.get_seq_length() == 3


def test_nothing_but_this_model_is_lighter() -> None:
    """Neither transformers' modules nor another model of the class; a copy computes with its own weights."""
    one, other = model("qwen3"), model("qwen3")
    elementwise.lighten(one)
    assert not elementwise.lighter(other) and qwen3.apply_rotary_pos_emb.__module__.startswith("transformers.")
    with elementwise.as_written(one):
        assert not elementwise.lighter(one)
    assert elementwise.lighter(one) == ALL
    twin = copy.deepcopy(one)
    with torch.no_grad():
        for weight in one.parameters():
            weight.zero_()
    assert torch.equal(learnt(twin)[0], learnt(other)[0])

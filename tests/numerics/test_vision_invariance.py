"""One gradient equation for images too: packs, micro-batches and ranks change nothing, to 1e-9 in float64.

The oracle is transformers' own model, one example at a time, which finds positions, masks and DeepStack places for
itself. Tolerance as in `test_invariance`: float64 sums in another order, and nothing else.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seeing import example, examples, eyes, given, picture, plain_gradient, step, stored, student
from true_float64 import TrueFloat64

from schoolhouse import train
from schoolhouse.config import Lora
from schoolhouse.data import vision
from schoolhouse.model import elementwise, isolation, last_block, load, lora, sight
from schoolhouse.model.load import Student

TOLERANCE = 1e-9
IMAGES = {"text": [0] * 6, "single": [1] * 6, "several": [2, 3, 1, 2, 3, 2], "mixed": [0, 1, 0, 3, 2, 0]}
PACKS = {"unpacked": [[0], [1], [2], [3], [4], [5]], "one": [[0, 1, 2, 3, 4, 5]], "four": [[0, 4], [1, 5], [2], [3]]}


def gradient(one: Student) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one and is trained."""
    return {name: value.grad for name, value in one.model.named_parameters() if value.grad is not None}


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], seen: bool) -> None:
    """The same gradients; a vision tower that the oracle never ran has zeros here."""
    largest = max(float(value.norm()) for value in wanted.values())
    assert set(wanted) <= set(found)
    for name, value in found.items():
        target = wanted.get(name)
        if target is None:
            assert not seen and sight.part_of(name) != "language" and not value.any(), name
        else:
            assert float((value - target).norm()) <= TOLERANCE * max(largest, 1e-3), name


def check(one: Student, family: str, images: list[int], packs: list[list[int]], place: Path) -> None:
    """Loss and gradient of the packed step equal the oracle's."""
    seeing = eyes(family)
    rows = examples(seeing, images)
    with TrueFloat64():
        wanted_loss, wanted = plain_gradient(one.model, rows, seeing)
        one.model.zero_grad()
        loss, *_ = train.compute_gradient(one, step(stored(rows, place), packs, seeing), seed=0)
    assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
    check_equal(gradient(one), wanted, any(images))


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("images", IMAGES)
def test_invariance(images: str, packs: str, tmp_path: Path) -> None:
    check(student(), "qwen3_vl", IMAGES[images], PACKS[packs], tmp_path)


@pytest.mark.parametrize("family", [one for one in vision.FAMILIES if one != "qwen3_vl"])
def test_invariance_of_families(family: str, tmp_path: Path) -> None:
    check(student(family), family, IMAGES["mixed"], PACKS["four"], tmp_path)


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("images", IMAGES)
def test_invariance_where_visual_tokens_see_one_another(images: str, packs: str, tmp_path: Path) -> None:
    """Gemma 3's images, whose tokens attend in both directions, within the window of the layers that have one."""
    check(student("gemma3"), "gemma3", IMAGES[images], PACKS[packs], tmp_path)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("frozen", [("vision",), ("vision", "projector"), ("language",)], ids="+".join)
def test_invariance_with_frozen_parts(frozen: tuple[str, ...], family: str, tmp_path: Path) -> None:
    """The parts that are left have the whole model's gradient, the frozen ones none."""
    one, seeing = student(family), eyes(family)
    rows = examples(seeing, IMAGES["mixed"])
    with TrueFloat64():
        _, wanted = plain_gradient(one.model, rows, seeing)
        sight.freeze(one.model, frozen)
        train.compute_gradient(one, step(stored(rows, tmp_path), PACKS["four"], seeing), seed=0)
    left = {"vision", "projector", "language"} - set(frozen)
    assert {sight.part_of(name) for name in gradient(one)} == left
    kept = {name: value for name, value in wanted.items() if sight.part_of(name) in left}
    check_equal(gradient(one), kept, seen=True)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("targets", ["all-linear", r".*language_model.*_proj"], ids=["all", "language"])
def test_invariance_with_adapters(targets: str, family: str, tmp_path: Path) -> None:
    one = student(family)
    lora.inject(one.model, Lora(rank=3, targets=targets))
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
                parameter.add_(torch.randn_like(parameter) * 0.1)
    check(one, family, IMAGES["mixed"], PACKS["four"], tmp_path)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_two_data_ranks_of_which_one_has_no_image(family: str, tmp_path: Path) -> None:
    """Each rank runs every module, so each has every gradient; their sum is the whole step's."""
    seeing, one = eyes(family), student(family)
    rows, packs = examples(seeing, [1, 0, 2, 0, 3, 0]), [[0, 2], [1, 5], [4], [3]]
    kept = stored(rows, tmp_path)
    with TrueFloat64():
        _, wanted = plain_gradient(one.model, rows, seeing)
        parts = []
        for rank in (0, 1):
            one.model.zero_grad()
            for micro in step(kept, packs, seeing, rank, 2).micro_batches:
                (one.loss(micro).nll / float(kept.supervised.sum())).backward()
            parts.append({name: value.clone() for name, value in gradient(one).items()})
    assert parts[0].keys() == parts[1].keys() == {name for name, _ in one.model.named_parameters()}
    check_equal({name: parts[0][name] + parts[1][name] for name in parts[0]}, wanted, seen=True)
    assert not any(value.any() for name, value in parts[1].items() if sight.part_of(name) == "vision")


def test_an_empty_pack_runs_the_vision_tower_too(tmp_path: Path) -> None:
    check(student(), "qwen3_vl", IMAGES["mixed"], [[0, 1, 2, 3, 4, 5], []], tmp_path)


def test_positions_are_the_models_own(tmp_path: Path) -> None:
    """Our arithmetic against transformers' `get_rope_index`, on examples with up to five images side by side."""
    generator, one = np.random.default_rng(3), student()
    seeing = eyes()
    for number in range(40):
        row = example(seeing, number % 6, generator)
        ids = torch.tensor(row.input_ids[None].astype("int64"))
        grid = torch.tensor([picture.grid for picture in row.vision]) if row.vision else None
        wanted, _ = one.model.model.get_rope_index(ids, (ids == seeing.token).int(), image_grid_thw=grid)
        found = seeing.positions(row.input_ids, [picture.grid for picture in row.vision])
        assert np.array_equal(found, wanted[:, 0].numpy())


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_text_row_has_the_bits_of_plain_transformers(family: str, tmp_path: Path) -> None:
    """In float32, by our packed path with its blank image, and by transformers with PyTorch's attention: up to the
    last feed-forward part, where rows are left out, and so sums are others."""
    seeing, one = eyes(family), student(family)
    one.model.float().eval()
    (row,) = examples(seeing, [0], seed=5)
    micro = step(stored([row], tmp_path), [[0]], seeing).micro_batches[0]
    assert micro.vision is not None and not micro.vision.real
    met = []
    last_block.feed_forward(one.model).register_forward_pre_hook(lambda _, given: met.append(given[0]))
    with torch.no_grad():
        one.loss(micro)
        one.model.set_attn_implementation("sdpa")
        one.model(input_ids=micro.input_ids, use_cache=False)
    packed, plain = met
    assert torch.equal(packed, plain)


def test_proof_before_the_first_step_sees_images_that_do_not_see_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    one, seeing = student("gemma3"), eyes("gemma3")
    one.model.float()
    assert isolation.prove(one, seeing).difference < 2e-5
    monkeypatch.setattr(sight, "TOGETHER", ())
    with pytest.raises(load.ModelError, match="cannot be trained packed"):
        isolation.prove(one, seeing)


def test_proof_before_the_first_step_sees_a_wrong_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prove` accepts the miniature and refuses it when its image lands in the wrong places."""
    one, seeing = student(), eyes()
    one.model.float()
    assert isolation.prove(one, seeing).difference < 2e-5
    turned = type(seeing).positions
    monkeypatch.setattr(type(seeing), "positions", lambda *args: turned(*args)[[0, 2, 1]])
    with pytest.raises(load.ModelError, match="cannot be trained packed"):
        isolation.prove(one, seeing)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_images_of_one_size_attend_in_one_call(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of the tower computes the attention of five equal images at once, of a sixth in another call."""
    seeing, one, generator, calls = eyes(family), student(family), np.random.default_rng(2), []
    images = [picture(seeing, *size, generator) for size in [(16, 16)] * 5 + [(16, 24)]]
    grid = torch.tensor([image.grid for image in images])
    pixels = torch.from_numpy(np.concatenate([seeing.pixels(image, "test") for image in images])).double()
    plain = F.scaled_dot_product_attention
    counted = lambda *args, **more: calls.append(args) or plain(*args, **more)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    one.model.model.get_image_features(pixels, grid)
    assert len(calls) == 2 * len(one.model.model.visual.blocks)


def test_the_oracle_sees_the_image() -> None:
    """A dark image, other logits: the oracle would notice pixels that do not arrive."""
    seeing, one = eyes(), student()
    (row,) = examples(seeing, [1], seed=1)
    ids = torch.tensor(row.input_ids[None].astype("int64"))
    shown = given(row, ids, seeing)
    one.model.set_attn_implementation("eager")
    with torch.no_grad():
        seen, dark = (
            one.model(input_ids=ids, use_cache=False, **{**shown, "pixel_values": shown["pixel_values"] * share}).logits
            for share in (1, 0)
        )
    assert not torch.allclose(seen, dark)


@pytest.mark.parametrize(("family", "seed"), [("qwen2_vl", 8), ("qwen3_5", 7), ("qwen3_5", 12)])
def test_proof_does_not_take_rounding_for_a_fault(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself cuDNN rounds what it convolves to TF32, and cuBLAS does not what it multiplies, as patches are here:
    beside the model's own convolution that was seen to be refused."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def by_cudnn(self: torch.nn.Module, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
        narrow = torch.backends.cudnn.allow_tf32
        return plain(self, *map(rounded, (states, weight)), bias) if narrow else plain(self, states, weight, bias)

    plain = torch.nn.Conv3d._conv_forward
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", by_cudnn)
    one, seeing = student(family, seed=seed), eyes(family)
    one.model.float()
    assert torch.backends.cudnn.allow_tf32
    assert isolation.prove(one, seeing).difference < 5e-6 and torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(elementwise, "whole_convolutions", contextlib.nullcontext)
    with pytest.raises(load.ModelError, match="cannot be trained packed"):
        isolation.prove(one, seeing)

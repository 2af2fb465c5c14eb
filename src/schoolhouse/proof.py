"""The proof of an export: reloaded by plain transformers or PEFT, it must answer real prompts as what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel

from schoolhouse import export, inert
from schoolhouse.data import ahead
from schoolhouse.data.served import Served
from schoolhouse.data.vision import Sight
from schoolhouse.errors import CheckpointError
from schoolhouse.export import Trained
from schoolhouse.model import fourbit, load, lora, recurrent, sight
from schoolhouse.types import Picture, Vision

Prompt = tuple[str, Sequence[Picture]]
"""The text that is shown, and the images in it."""

MERGED = 1e-5
"""Merged against unmerged in float32, as a share of the largest logit: sums of 24-bit products in another order."""
MERGED_STATES = 1e-4
"""The same for models with recurrent layers: sums of gated steps amplify their rounding (2e-5 was seen)."""
ROUNDED = 1e-6
"""Merged in a 16-bit format against PEFT's own merge rounded once, as mean Kullback-Leibler divergence (nats a token),
both computed in float32. What the rounding itself costs, up to 2^-9 of each weight, is measured beside it, and said."""
COST = 1e-3
"""The most that this rounding may cost, in the same unit."""


def prove(base: Path, trained: Trained, served: Served, prompts: Sequence[Prompt], place: Path) -> str:
    """Compare the directory `place` with what was trained, and say how equal they are; raises CheckpointError.

    The two models are loaded one after the other: the memory is that of one, for merged weights in float32.
    """
    ids, texts = [_tokens(served, text, place) for text, _ in prompts], [text for text, _ in prompts]
    seen = [_seen(served, images) for _, images in prompts]
    if served.sight is not None:
        _same_eyes(served.sight, place)
    adapter = (place / "adapter_config.json").is_file()
    if not adapter:
        _same_layout(base, place)
    settings = GenerationConfig.from_pretrained(place)
    if settings.eos_token_id != list(served.stops.ids):
        raise _differs("stop tokens", "", place)
    if trained.lora is not None and not adapter:
        return _merged(base, trained, texts, lambda model: _logits(model, ids, seen, served), place)
    wanted = _logits(_reference(load.plain(base), trained), ids, seen, served)
    found = _logits(_with_adapter(base, place) if adapter else load.plain(place), ids, seen, served)
    for prompt, one, other in zip(texts, wanted, found, strict=True):
        if not torch.equal(one, other):
            raise _differs("logits", prompt, place)
    same = f"identical logits on {len(prompts)} prompts"
    if trained.lora is None or trained.lora.base != "nf4":
        return same
    model = _reference(load.plain(base), trained)
    fourbit.round_base(model)
    moved = max(map(_divergence, _logits(model, ids, seen, served), found))
    return f"{same}; trained beside 4 bits: beside the whole base, answers move by KL {moved:.1e}"


def _merged(
    base: Path, trained: Trained, prompts: Sequence[str], answer: Callable[[PreTrainedModel], Sequence[Tensor]],
    place: Path,
) -> str:
    """Compare merged weights with the adapters beside their base, everything computed in float32 (or wider).

    In a 16-bit format the export is W + scale B A rounded once: it is held to PEFT's merge rounded so, and what the
    rounding moves is measured against the unmerged model.
    """
    plain = load.plain(base)
    formats = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    narrow = any(one.itemsize < 4 for one in formats.values())
    model = _reference(_wide(plain), trained)
    if trained.lora.base == "nf4":
        fourbit.round_base(model)
    beside, limit = answer(model), MERGED_STATES if recurrent.layers(model) else MERGED
    if narrow:
        _merge_and_round(model, formats)
        rounded = answer(model)
    del model, plain
    found = answer(_wide(load.plain(place)))
    if not narrow:
        worst = _largest(prompts, beside, found, limit, place, _share)
        return f"relative difference of logits at most {worst:.1e}"
    worst = _largest(prompts, rounded, found, ROUNDED, place, _divergence)
    cost = _largest(prompts, beside, found, COST, place, _divergence)
    return f"KL divergence at most {worst:.1e} from W + scale B A rounded once; the rounding costs {cost:.1e}"


def _largest(
    prompts: Sequence[str], wanted: Sequence[Tensor], found: Sequence[Tensor], limit: float, place: Path,
    difference: Callable[[Tensor, Tensor], float],
) -> float:
    """The largest difference of a prompt's logits; raises CheckpointError above the limit."""
    worst = 0.0
    for prompt, one, other in zip(prompts, wanted, found, strict=True):
        differs = difference(one, other)
        worst = max(worst, differs)
        if not differs <= limit:
            raise _differs("logits", prompt, place, f"to {limit:.0e}, found {differs:.1e}")
    return worst


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    """Its parameters in float32 at least."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return model


@torch.no_grad()
def _merge_and_round(model: PreTrainedModel, formats: Mapping[str, torch.dtype]) -> None:
    """PEFT's own merge, then every weight rounded to the format it is stored in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    for name, parameter in model.named_parameters():
        if lora.plain_name(name) in formats:
            parameter.copy_(parameter.to(formats[lora.plain_name(name)]))


def _share(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def _divergence(one: Tensor, other: Tensor) -> float:
    """Mean KL(one || other) over positions, nats."""
    first, second = (logits.double().log_softmax(-1) for logits in (one, other))
    return float((first.exp() * (first - second)).sum(-1).mean().abs())


def _tokens(served: Served, prompt: str, place: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=inert.allowed())
    if tokenizer.chat_template != served.template.source:
        raise _differs("chat template", "", place)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids[0].tolist() != served.tokenize([prompt])[0]:
        raise _differs("tokenizer", prompt, place)
    return ids


def _same_layout(base: Path, place: Path) -> None:
    wanted, found = export.layout(base), export.layout(place)
    changed = sorted(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
    if changed:
        raise _differs(
            f"tensor {changed[0]}", "", place, f"{wanted.get(changed[0])}, found {found.get(changed[0])}"
        )


def _reference(model: PreTrainedModel, trained: Trained) -> PreTrainedModel:
    """What was trained, put into a plain model, in its number format."""
    sight.freeze(model, trained.frozen)
    if trained.lora is not None:
        lora.inject(model, trained.lora)
    export.put_weights(model, trained.weights)
    return model.eval()


def _with_adapter(base: Path, place: Path) -> PreTrainedModel:
    from peft import PeftModel

    return PeftModel.from_pretrained(load.plain(base), place, autocast_adapter_dtype=True)


@torch.no_grad()
def _logits(
    model: PreTrainedModel, ids: Sequence[Tensor], seen: Sequence[Vision | None], served: Served
) -> list[Tensor]:
    model.eval()
    inputs = [
        {} if vision is None else sight.own_inputs(model, vision, one == served.sight.token)
        for one, vision in zip(ids, seen, strict=True)
    ]
    return [model(input_ids=one, use_cache=False, **given).logits[0] for one, given in zip(ids, inputs, strict=True)]


def _seen(served: Served, images: Sequence[Picture]) -> Vision | None:
    """The images of a prompt, as the model takes them."""
    if served.sight is None:
        return None
    return ahead.vision(served.sight, images, torch.device("cpu"), "an image of a prompt")


def _same_eyes(eyes: Sight, place: Path) -> None:
    """The exported image processor is the one that was trained with."""
    again = AutoImageProcessor.from_pretrained(place, backend="pil", local_files_only=True, trust_remote_code=False)
    if again.to_dict() != eyes.processor.to_dict():
        raise _differs("image processor", "", place, "setting by setting")


def _differs(what: str, prompt: str, place: Path, how: str = "bit by bit") -> CheckpointError:
    return CheckpointError(
        f"the exported model's {what} differ from what was trained{f' on {prompt[:60]!r}' if prompt else ''}",
        required=f"equality, {how}", where=str(place), remedy="report this; the checkpoint is untouched",
    )

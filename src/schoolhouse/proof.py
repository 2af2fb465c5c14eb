"""The proof of an export: reloaded by plain transformers or PEFT, it must answer real prompts as what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel

from schoolhouse import export
from schoolhouse.data import ahead
from schoolhouse.data.served import Served
from schoolhouse.data.vision import Sight
from schoolhouse.errors import CheckpointError
from schoolhouse.export import Trained
from schoolhouse.model import load, lora, sight
from schoolhouse.types import Picture, Vision

Prompt = tuple[str, Sequence[Picture]]
"""The text that is shown, and the images in it."""

MERGED = 1e-5
"""Merged against unmerged in float32, as a share of the largest logit: sums of 24-bit products in another order."""
MERGED_NARROW = 1e-3
"""The same in 16-bit formats, as mean Kullback-Leibler divergence (nats a token): W + scale B A is rounded once more
when it is stored, by up to 2^-9 of each weight."""


def prove(base: Path, trained: Trained, served: Served, prompts: Sequence[Prompt], place: Path) -> str:
    """Compare the directory `place` with what was trained, and say how equal they are; raises CheckpointError.

    The two models are loaded one after the other: the memory is that of one.
    """
    ids, texts = [_tokens(served, text, place) for text, _ in prompts], [text for text, _ in prompts]
    seen = [_seen(served, images) for _, images in prompts]
    if served.sight is not None:
        _same_eyes(served.sight, place)
    adapter = (place / "adapter_config.json").is_file()
    if not adapter:
        _same_layout(base, place)
    wanted = _logits(_reference(base, trained), ids, seen, served)
    found = _logits(_with_adapter(base, place) if adapter else load.plain(place), ids, seen, served)
    settings = GenerationConfig.from_pretrained(place)
    if settings.eos_token_id != list(served.stops.ids):
        raise _differs("stop tokens", "", place)
    if trained.lora is None or adapter:
        for prompt, one, other in zip(texts, wanted, found, strict=True):
            if not torch.equal(one, other):
                raise _differs("logits", prompt, place)
        return f"identical logits on {len(prompts)} prompts"
    return _nearly(texts, wanted, found, place)


def _nearly(
    prompts: Sequence[str], wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], place: Path
) -> str:
    """Merged weights are sums computed in another order, so their logits are near, not equal."""
    worst = 0.0
    narrow = wanted[0].dtype.itemsize < 4
    limit = MERGED_NARROW if narrow else MERGED
    for prompt, one, other in zip(prompts, wanted, found, strict=True):
        difference = _divergence(one, other) if narrow else float((one - other).abs().max() / one.abs().max())
        worst = max(worst, difference)
        if not difference <= limit:
            raise _differs("logits", prompt, place, f"to {limit:.0e}, found {difference:.1e}")
    return f"{'KL divergence' if narrow else 'relative difference of logits'} at most {worst:.1e}"


def _divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(one || other) over positions, nats."""
    first, second = (logits.double().log_softmax(-1) for logits in (one, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def _tokens(served: Served, prompt: str, place: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
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


def _reference(base: Path, trained: Trained) -> PreTrainedModel:
    """What was trained, in the number format of the base's files."""
    model = load.plain(base)
    sight.freeze(model, trained.frozen)
    if trained.lora is not None:
        lora.inject(model, trained.lora)
    export.put_weights(model, trained.weights)
    return model.eval()


def _with_adapter(base: Path, place: Path) -> PreTrainedModel:
    from peft import PeftModel

    return PeftModel.from_pretrained(load.plain(base), place, autocast_adapter_dtype=False)


@torch.no_grad()
def _logits(
    model: PreTrainedModel, ids: Sequence[torch.Tensor], seen: Sequence[Vision | None], served: Served
) -> list[torch.Tensor]:
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

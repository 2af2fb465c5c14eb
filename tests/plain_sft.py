"""The oracle: supervised fine-tuning as plainly as it can be written.

One example at a time, transformers' own forward with its own attention, `F.cross_entropy` on the full logits, one sum,
one division. Nothing of schoolhouse is used but the example's arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from schoolhouse.types import Example


def as_written(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose every part computes by the code of its class, whatever was put in its place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        vars(module).pop("forward", None)
        if type(module).__module__.startswith("schoolhouse."):
            module.__class__ = type(module).__base__
    return model


def plain_gradient(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one optimizer step over `examples`: sum of weight x nll over the sum of weights."""
    model = as_written(model)
    model.set_attn_implementation("eager")
    model.zero_grad()
    supervised = sum(float(example.weights.sum(dtype="float64")) for example in examples)
    total = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor(example.input_ids[None].astype("int64"))).logits[0]
        labels = torch.tensor(example.labels.astype("int64"))
        nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        weights = torch.tensor(example.weights, dtype=nll.dtype)
        loss = (nll * weights).sum() / supervised
        loss.backward()
        total += loss.item()
    return total, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

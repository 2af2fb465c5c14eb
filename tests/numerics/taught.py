"""The oracle of what a step may add to the plain loss, one example at a time, in plain transformers.

    sum over examples of [ sum of weight x smoothed nll + balance x W x aux ] / N
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from plain_sft import as_written
from transformers import PreTrainedModel

from schoolhouse.model.teaching import Teaching
from schoolhouse.types import Example


def noise(seed: int, step: int, index: int, tokens: int, width: int, alpha: float) -> torch.Tensor:
    """NEFTune's noise of one example: of (seed, step, example) and nothing else."""
    key = int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    drawn = torch.rand(tokens, width, generator=torch.Generator().manual_seed(key), dtype=torch.float32)
    return (2 * drawn - 1) * (alpha / (tokens * width) ** 0.5)


def aux(logits: Sequence[torch.Tensor], chosen: int) -> torch.Tensor:
    """transformers' balance loss of one example by its definition, in the precision of the routers."""
    every = torch.cat(list(logits))
    probabilities = every.softmax(-1)
    taken = F.one_hot(probabilities.topk(chosen).indices, every.shape[-1]).to(every.dtype).mean(0)
    return (taken * probabilities.mean(0)).sum() * every.shape[-1]


def taught_gradient(
    model: PreTrainedModel, examples: Sequence[Example], added: Teaching, seed: int, step: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step that teaches with these additions."""
    model = as_written(model)
    model.set_attn_implementation("eager")
    model.zero_grad()
    supervised, total = sum(float(one.weights.sum(dtype="float64")) for one in examples), 0.0
    for index, example in enumerate(examples):
        embedded = model.get_input_embeddings()(torch.tensor(example.input_ids[None].astype("int64")))
        if added.noise:
            embedded = embedded + noise(seed, step, index, *embedded.shape[1:], added.noise).to(embedded.dtype)
        out = model(inputs_embeds=embedded, **({"output_router_logits": True} if added.balance else {}))
        labels = torch.tensor(example.labels.astype("int64"))
        nll = F.cross_entropy(
            out.logits[0], labels, reduction="none", ignore_index=-100, label_smoothing=added.smoothing
        )
        weights = torch.tensor(example.weights, dtype=nll.dtype)
        loss = (nll * weights).sum()
        if added.balance:
            loss = loss + added.balance * weights.sum() * aux(out.router_logits, model.config.num_experts_per_tok)
        (loss / supervised).backward()
        total += loss.item() / supervised
    return total, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

"""What a step costs in counts, not in seconds: a slower way of doing things shows on every machine."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from schoolhouse import optim
from schoolhouse.config import Optim
from schoolhouse.model import attention, elementwise
from schoolhouse.model.load import Student
from schoolhouse.starter import miniatures
from schoolhouse.types import MicroBatch

VOCABULARY, LENGTHS, ANSWER = 509, (90, 300, 310, 11, 313), 7
TOKENS = sum(LENGTHS)
CALLS_OF_A_LAYER = 360
"""Operations of a layer's forward and backward over three groups of examples, views included; 358 were seen with
torch 2.13 and transformers 5.24."""


@dataclass
class Calls(TorchDispatchMode):
    """Counts every operation, its largest result, and the rows of results that are as wide as the vocabulary."""

    made: Counter = field(default_factory=Counter)
    largest: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        self.made[call.name()] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if call.name().startswith("aten::mm") and result.shape[-1] == VOCABULARY:
                self.rows += result.shape[0]
        return result


def student(layers: int) -> Student:
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**miniatures.settings("qwen3", VOCABULARY, num_hidden_layers=layers))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32).train()
    elementwise.lighten(model)
    return Student(model)


def micro() -> MicroBatch:
    """Five examples in one pack, the last tokens of each supervised."""
    weights, ends = torch.zeros(1, TOKENS), tuple(itertools.accumulate(LENGTHS, initial=0))
    for end in ends[1:]:
        weights[0, end - ANSWER : end] = 1
    ids = torch.arange(TOKENS)[None] % VOCABULARY
    return MicroBatch(
        input_ids=ids, labels=ids, weights=weights, positions=torch.cat([torch.arange(one) for one in LENGTHS])[None],
        boundaries=ends, targets=weights.flatten().nonzero().flatten(), pack=tuple(range(len(LENGTHS))),
        supervised=float(weights.sum()),
    )


def learnt(layers: int) -> Calls:
    one, batch = student(layers), micro()
    with Calls() as calls:
        one.loss(batch).nll.backward()
    return calls


def test_only_supervised_rows_meet_the_vocabulary() -> None:
    assert learnt(1).rows == ANSWER * len(LENGTHS)


def test_nothing_is_as_large_as_a_mask_over_the_pack_or_its_logits() -> None:
    """The largest result of a step belongs to the model: a few times hidden or intermediate size for each token."""
    calls = learnt(2)
    assert calls.largest < TOKENS * VOCABULARY / 2
    assert calls.largest < TOKENS**2 / 4


def test_calls_grow_with_the_layers_alone() -> None:
    two, four = learnt(2), learnt(4)
    of_one = (four.made.total() - two.made.total()) / 2
    assert 0 < of_one <= CALLS_OF_A_LAYER, f"{of_one} operations a layer: {(four.made - two.made).most_common(8)}"


def test_no_result_is_waited_for_within_a_micro_batch() -> None:
    """A number read from a tensor stops a device's queue; metrics are read once a step, after its last backward."""
    assert learnt(2).made["aten::_local_scalar_dense"] == 0


def test_adamw_is_one_call_for_all_tensors() -> None:
    one = student(2)
    optimizer = optim.Optimizer(one.model, Optim(name="adamw"), "float32")
    one.loss(micro()).nll.backward()
    with Calls() as calls:
        optimizer.step(1e-3)
    moved = calls.made["aten::_fused_adamw_"]
    assert 0 < moved <= 2, "a call for what decays and one for what does not"

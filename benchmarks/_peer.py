"""One measurement of TRL's `SFTTrainer`, or of transformers' `Trainer`, in a process of its own; `throughput.py` starts
it and reads its JSON line. Attention on a GPU is FlashAttention where `flash_attn` is installed, else PyTorch's own."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _inputs as inputs
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import SFTConfig, SFTTrainer, pack_dataset

NUMBERS = {"float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
"""The weights' format and `bf16`: autocast computes in bfloat16 from float32 weights (TRL's default); in bfloat16
weights, gradients and both moments are all bfloat16, which is less exact than anything schoolhouse does."""
Row = dict[str, list[int]]


class Clock(TrainerCallback):
    """Wall time from the end of one optimizer step to the end of the next, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step, which is over when the device has done it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


class Counting:
    """A trainer that notes the tokens and the loss of every micro-batch."""

    counts: list[tuple[int, dict[str, Any]]]

    def training_step(self, model: Any, batch: dict[str, Any], *rest: Any) -> torch.Tensor:
        """Count, then train as usual; the losses of a step's micro-batches add up to the step's."""
        real = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        supervised = (batch["labels"][:, 1:] != -100).sum()
        loss = super().training_step(model, batch, *rest)
        counted = {"tokens": real, "supervised_tokens": supervised, "loss": loss.detach()}  # read when all is done
        self.counts.append((self.state.global_step, counted))
        return loss


class CountingTRL(Counting, SFTTrainer):
    """TRL's."""


class CountingTrainer(Counting, Trainer):
    """transformers' own."""


def main() -> None:
    """Train as the arguments say and print one JSON line."""
    arguments = parse()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20
    trainer, clock = build(arguments)
    if arguments.check_isolation:
        print(json.dumps(isolation(trainer, NUMBERS[arguments.numbers][1])))
        return
    trainer.train()
    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else 0.0
    print(json.dumps({"baseline_mib": baseline, "device_peak_mib": device, "steps": steps(trainer, clock)}))


def parse() -> argparse.Namespace:
    """The command line that `throughput.py` writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory with model/ and tokens.jsonl")
    parser.add_argument("--program", choices=["TRL", "Trainer"], default="TRL")
    parser.add_argument("--layout", choices=["padded", "padding_free", "packed"], required=True)
    parser.add_argument("--size", type=int, required=True, help="rows of a micro-batch; packed: tokens of a pack")
    parser.add_argument("--numbers", choices=list(NUMBERS), required=True)
    parser.add_argument("--examples", type=int, required=True, help="examples in an optimizer step")
    parser.add_argument("--optimizer-steps", type=int, required=True, help="steps of one pass over the rows")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--steps", type=int, default=-1, help="stop early")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: all weights are trained")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--check-isolation", action="store_true", help="whether packed examples see one another")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> tuple[Counting, Clock]:
    """The trainer on pre-tokenized rows."""
    rows = [json.loads(line) for line in (arguments.work / "tokens.jsonl").read_text().splitlines()]
    place = arguments.work / "model"
    dtype, _ = NUMBERS[arguments.numbers]
    clock, tokenizer = Clock(), AutoTokenizer.from_pretrained(place)
    flash = arguments.device == "cuda" and arguments.numbers != "float32" and find_spec("flash_attn")
    family = AutoModelForImageTextToText if "image" in rows[0] else AutoModelForCausalLM
    model = family.from_pretrained(place, dtype=dtype, attn_implementation="flash_attention_2" if flash else "sdpa")
    given = {"train_dataset": Dataset.from_list(rows), "callbacks": [clock], "processing_class": tokenizer}
    adapters = LoraConfig(r=arguments.lora, lora_alpha=2 * arguments.lora, target_modules="all-linear",
                          task_type="CAUSAL_LM") if arguments.lora else None
    if arguments.program == "TRL":
        trainer = CountingTRL(model=model, args=settings(arguments, rows), peft_config=adapters, **given)
    else:
        if adapters is not None:
            model = get_peft_model(model, adapters)
        collate = Pictures(place, tokenizer) if "image" in rows[0] else DataCollatorForSeq2Seq(tokenizer)
        trainer = CountingTrainer(model=model, args=plain(arguments), data_collator=collate, **given)
    trainer.counts = []
    return trainer, clock


class Pictures:
    """Padded rows with the pixels of their images, as transformers' Qwen3-VL wants them."""

    def __init__(self, place: Path, tokenizer: Any) -> None:
        self._pad = DataCollatorForSeq2Seq(tokenizer)
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(place)
        self._token = tokenizer.convert_tokens_to_ids(inputs.IMAGE)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: images end to end, one grid each."""
        seen = [inputs.pixels(self._processor, row["image"]) for row in rows]
        batch = self._pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        return {
            **batch, "mm_token_type_ids": (batch["input_ids"] == self._token).int(),
            **{name: torch.cat([one[name] for one in seen]) for name in ("pixel_values", "image_grid_thw")},
        }


def plain(arguments: argparse.Namespace) -> TrainingArguments:
    """The same for transformers' `Trainer`: padded rows of similar length, and its own loss, over every position."""
    return TrainingArguments(**common(arguments), per_device_train_batch_size=arguments.size,
                             gradient_accumulation_steps=arguments.examples // arguments.size,
                             train_sampling_strategy="group_by_length", remove_unused_columns=False)


def settings(arguments: argparse.Namespace, rows: list[Row]) -> SFTConfig:
    """TRL's layout, with its loss of supervised positions only."""
    loss = "nll" if arguments.liger else "chunked_nll"  # Liger has its own fused loss
    return SFTConfig(**layout(arguments, rows), **common(arguments), loss_type=loss)


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """One pass with schoolhouse's optimizer and clipping, and everything off that is not training."""
    _, autocast = NUMBERS[arguments.numbers]
    on_cpu = arguments.device == "cpu"
    return dict(
        output_dir=str(arguments.work / arguments.program), num_train_epochs=1, max_steps=arguments.steps,
        bf16=autocast, gradient_checkpointing=arguments.recompute, use_liger_kernel=arguments.liger, use_cpu=on_cpu,
        torch_compile=arguments.compile,
        optim="adamw_torch_fused", learning_rate=arguments.learning_rate, lr_scheduler_type="constant",
        weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0,
        dataloader_num_workers=0 if on_cpu else 2, dataloader_pin_memory=not on_cpu, logging_strategy="no",
        save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
    )


def layout(arguments: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    """How rows become micro-batches, and how many of these make a step."""
    if arguments.layout == "packed":
        length = arguments.size or max(len(row["input_ids"]) for row in rows)
        packs = len(pack_dataset(Dataset.from_list(rows), length, "bfd"))
        return {"packing": True, "packing_strategy": "bfd", "max_length": length, "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": -(-packs // arguments.optimizer_steps)}
    size = arguments.size or 1
    return {"padding_free": arguments.layout == "padding_free", "max_length": None,
            "train_sampling_strategy": "group_by_length", "per_device_train_batch_size": size,
            "gradient_accumulation_steps": arguments.examples // size}


def isolation(trainer: Counting, autocast: bool, tokens: int = 64) -> dict[str, float]:
    """Largest difference of an example's hidden states behind another in TRL's batch from those it has alone, with or
    without autocast.

    The control has positions that do not restart, which is how TRL's batch would look to a model that cannot tell.
    """
    first, second = ([*row["input_ids"][-tokens:]] for row in trainer.train_dataset.select([0, 1]))
    collated = trainer.data_collator([{"input_ids": row, "seq_lengths": [len(row)]} for row in (first, second)])
    collated.pop("labels")
    model = trainer.model.eval()
    place = next(model.parameters()).device
    collated = {name: one.to(place) if isinstance(one, torch.Tensor) else one for name, one in collated.items()}
    with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=autocast):
        alone = model.base_model(input_ids=torch.tensor([second], device=place)).last_hidden_state[0]
        behind = model.base_model(**collated).last_hidden_state[0, -len(second) :]
        control = model.base_model(input_ids=collated["input_ids"]).last_hidden_state[0, -len(second) :]
    errors = {"isolation_error": behind - alone, "control_error": control - alone}
    return {name: float(error.abs().max()) for name, error in errors.items()}


def steps(trainer: Counting, clock: Clock) -> list[dict[str, float]]:
    """One record an optimizer step: its seconds and the sums of its micro-batches."""
    records = [{"seconds": seconds, "tokens": 0, "supervised_tokens": 0, "loss": 0.0} for seconds in clock.seconds]
    for step, counted in trainer.counts:
        for key, value in counted.items():
            records[step][key] += torch.as_tensor(value).item()
    return records


if __name__ == "__main__":
    main()

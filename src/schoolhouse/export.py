"""From a run to a Hugging Face directory, proved equal by plain transformers before it is called exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schoolhouse.data.served import Served
from schoolhouse.errors import CheckpointError, ConfigError

MARK = "schoolhouse_export.txt"
"""The file that says a directory may be written again."""


def export(base: Path, weights: Mapping[str, torch.Tensor], served: Served, prompts: Sequence[str], out: Path) -> Path:
    """Write the trained model with tokenizer, chat template and stop tokens; compare the reloaded logits on `prompts`.

    Weights are stored in the type that the base model is stored in. Raises CheckpointError where anything differs.
    """
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} holds files that no export wrote", required="a new or empty directory, or an earlier export",
            where=str(out), remedy="choose another --out",
        )
    staging = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", trust_remote_code=False, use_safetensors=True, local_files_only=True
    ).eval()
    put_weights(model, weights)
    model.generation_config.eos_token_id = list(served.stops.ids)
    model.save_pretrained(staging)
    served.tokenizer.chat_template = served.template.source
    served.tokenizer.save_pretrained(staging)
    _compare(model, served, prompts, staging)
    (staging / MARK).write_text("written and verified by schoolhouse export\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return out


@torch.no_grad()
def put_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy trained weights into the parameters of the same name; every one of them must be there."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise CheckpointError(
            f"the model has no parameter {unknown[0]}", required="the architecture that was trained",
            where="model.path", remedy="put the base model back as it was when the run began",
        )
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def _compare(model: PreTrainedModel, served: Served, prompts: Sequence[str], place: Path) -> None:
    """The exported directory, loaded by plain transformers, must be what was trained, bit by bit."""
    again = AutoModelForCausalLM.from_pretrained(place, dtype="auto", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids[0].tolist() != served.tokenize([prompt])[0]:
            raise _differs("tokenizer", prompt, place)
        with torch.no_grad():
            if not torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits):
                raise _differs("logits", prompt, place)
    if tokenizer.chat_template != served.template.source:
        raise _differs("chat template", "", place)
    if again.generation_config.eos_token_id != list(served.stops.ids):
        raise _differs("stop tokens", "", place)


def _differs(what: str, prompt: str, place: Path) -> CheckpointError:
    return CheckpointError(
        f"the exported model's {what} differ from what was trained{f' on {prompt[:60]!r}' if prompt else ''}",
        required="equality, bit by bit", where=str(place), remedy="report this; the checkpoint is untouched",
    )

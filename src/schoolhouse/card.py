"""The model card of an export: what was taught on which rows, how its exam went, and the recipe that does it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import yaml

import schoolhouse
from schoolhouse import recipe as recipes
from schoolhouse.config import Recipe
from schoolhouse.report.read import ExamRecord, Run, ValidationRecord

Measured = TypeVar("Measured", ExamRecord, ValidationRecord)
Form = Literal["whole", "merged", "adapter"]
"""What an export is: a model, a model with its adapters merged, adapters alone."""
NAME = "README.md"

CARD = """\
---
{facts}---

# {title}

{base}, taught by schoolhouse {version}: {way}, step {step} of {steps}.

{scores}{rows}This export was compared before it got its name: {proof}.

## The recipe

{fence}yaml
{recipe}{fence}

## Use

```python
{use}```
"""

USE = {
    "text": """\
from transformers import pipeline

student = pipeline("text-generation", model={here!r})
print(student([{{"role": "user", "content": "…"}}], max_new_tokens=512)[0]["generated_text"][-1]["content"])
""",
    "sight": """\
from transformers import pipeline

student = pipeline("image-text-to-text", model={here!r})
question = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "…"}}]
print(student(text=[{{"role": "user", "content": question}}], max_new_tokens=512)[0]["generated_text"][-1]["content"])
""",
    "adapter": """\
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({here!r})
base = {loader}.from_pretrained({base!r}{revision})
student = PeftModel.from_pretrained(base, {here!r})
""",
}


def write(
    place: Path, out: Path, run: Run, recipe: Recipe, step: int, form: Form, *, base: str, public: bool, sees: bool,
    proof: str,
) -> None:
    """Write the card of an export that lies in `place` and will be `out`: of a `step` of a run, beside or in place of
    its `base`, which is one of the hub's where it is `public`."""
    kind = "image-text-to-text" if sees else "text-generation"
    facts = {
        **({"base_model": base, "base_model_relation": "adapter" if form == "adapter" else "finetune"} if public
           else {}),
        "library_name": "peft" if form == "adapter" else "transformers", "pipeline_tag": kind,
        "tags": ["schoolhouse", "sft"],
    }
    use = USE["adapter" if form == "adapter" else "sight" if sees else "text"].format(
        here=out.name, base=base, loader="AutoModelForImageTextToText" if sees else "AutoModelForCausalLM",
        revision=f", revision={recipe.model.revision!r}" if recipe.model.revision else "",
    )
    chosen = _short(recipe)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", chosen)), default=0))
    text = CARD.format(
        facts=yaml.safe_dump(facts, sort_keys=False), title=run.directory.resolve().name, base=f"`{recipe.model.path}`",
        version=schoolhouse.__version__, way=recipes.way(recipe), step=f"{step:,}",
        steps=f"{_count(run.section('derived').get('steps_total')) or step:,}", scores=_scores(run, step),
        rows=_rows(run), proof=proof, fence=fence, recipe=chosen, use=use,
    )
    (place / NAME).write_text(text, encoding="utf-8")


def _scores(run: Run, step: int) -> str:
    """A table of the exam and the validation before and after, where there were any."""
    rows = []
    if (exams := _before_and_after(run.exams, step)) is not None:
        rows.append(("exam", *(f"{one.correct} of {one.count} ({one.score:.1%})" for one in exams)))
    if (losses := _before_and_after(run.validations, step)) is not None:
        rows.append(("validation loss", *(f"{one.loss:.4f}" for one in losses)))
    if not rows:
        return ""
    lines = [f"| | before | after step {step:,} |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n\n"


def _before_and_after(records: Sequence[Measured], step: int) -> tuple[Measured, Measured] | None:
    """What was measured before the first step, and after this one; None where either was not."""
    found = {one.step: one for one in records}
    return (found[0], found[step]) if 0 in found and step in found else None


def _rows(run: Run) -> str:
    """How many rows were taught, and how many tokens of them."""
    ledger = run.ledgers.get("train", {})
    counts = [_count(ledger.get(key)) for key in ("rows", "kept", "examples", "tokens", "supervised_tokens")]
    if None in counts:
        return ""
    told = "{:,} rows were read and {:,} kept: {:,} examples of {:,} tokens, of which {:,} are taught.\n\n"
    return told.format(*counts)


def _count(value: object) -> int | None:
    """A number that a record holds; None where it is none."""
    return value if isinstance(value, int) else None


def _short(recipe: Recipe) -> str:
    """The recipe without what is left at its default, or says where things are kept and watched."""
    places = {"directory": True, "track": True, "data": {"cache"}}
    return recipes.written(recipe.model_dump(mode="json", exclude_defaults=True, exclude=places))

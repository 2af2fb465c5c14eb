"""A rehearsal: any recipe on any machine, with a miniature of its own architecture and a few rows of its form.

Everything else is the recipe's own: precision, adapters, template, supervision, optimizer, layout (with degrees that
fit the processes at hand). Nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from schoolhouse import checkpoint, inert, places
from schoolhouse import recipe as recipes
from schoolhouse.config import Recipe, Rows, Source
from schoolhouse.data.tokens import load_tokenizer
from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.starter import lessons, miniatures, students

STEPS = 4
MARK = ".rehearsal"
"""The file that says a directory may be emptied by the next rehearsal."""
_TOKENS, _EXAMPLES, _ANSWER_TOKENS = 2048, 4, 8
_ROWS = {"train": 24, "validation": 6, "exam": 4}
_ON_A_DEVICE = ("liger", "float8", "compile", "activation_offload")
"""Switches of the model that need what a machine for rehearsals may not have."""
_KEPT = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "final_logit_softcapping",
    "attn_logit_softcapping", "topk_method", "norm_topk_prob", "scoring_func", "attention_dropout", "residual_dropout",
)
"""What a miniature keeps of a model's own configuration; the rest are sizes."""
_TOKENIZER = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json")
_ANSWERS = ("answer", "response", "output", "completion", "assistant", "chosen")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A page that can be run at once, and how it differs from the recipe."""

    page: Path
    directory: Path
    """The run's directory."""
    changes: tuple[str, ...]


def prepare(recipe: Recipe, path: Path, processes: int) -> Rehearsal:
    """Write the miniature, its rows and its page beside the recipe's run directory; raises ConfigError."""
    place = recipes.directory(recipe, path).with_name(f"{recipes.directory(recipe, path).name}-rehearsal")
    _empty(place)
    model, of = _student(recipe, place)
    values = recipe.model_dump(mode="json")
    values["model"] |= {"path": model, "revision": None, **dict.fromkeys(_ON_A_DEVICE, False)}
    values |= {"directory": str(place / "run"), "device": "cpu", "parallel": _degrees(recipe, processes)}
    seeing = _shows(recipe, model)
    values["data"] |= _data(recipe, place, seeing)
    values["data"] |= {"cache": str(place / "cache"), "workers": 1}
    values["batch"] |= {
        "examples": min(_EXAMPLES, recipe.batch.examples), "tokens": min(_TOKENS, recipe.micro_batch)
    }
    values["train"] |= {"steps": STEPS, "patience": None}
    if recipe.lora is not None:
        values["lora"]["start"] = None  # adapters of the miniature are new ones
    values["checkpoint"] |= {"every": 2, "keep": 2}
    values["track"]["to"] = None
    values["validation"]["every"] = 2 if recipe.data.validation else 0
    if recipe.exam.data is not None:
        values["exam"] |= {
            "data": _source(recipe, recipe.exam.data, "exam", place, seeing), "every": 0,
            "max_new_tokens": min(_ANSWER_TOKENS, recipe.exam.max_new_tokens), "examples": _EXAMPLES,
        }
        if "-vl" in model and recipe.exam.grader == "gsm8k":  # answers that are made for images are no numbers
            values["exam"]["grader"] = "exact"
    page = place / f"{Path(path).stem}.yaml"
    page.write_text(recipes.dump(Recipe.model_validate(values)), encoding="utf-8")
    before, after = recipes.flat(recipe.model_dump(mode="json")), recipes.flat(values)
    other = [f"{key} {before.get(key)} → {after[key]}" for key in after if before.get(key) != after[key]]
    told = ("batch.", "parallel.", "train.", "track.", "exam.max", *(f"model.{name}" for name in _ON_A_DEVICE))
    sizes = [one for one in other if one.startswith(told)]
    return Rehearsal(page, place / "run", (of, *sizes))


def forget_the_last_half(directory: Path) -> None:
    """Put the run back to half its steps, as if it had been stopped there; what it came to is kept for comparison."""
    last = checkpoint.steps_in(directory / "checkpoints")[-1]
    last.rename(directory / "unbroken")


def compare_halves(directory: Path) -> None:
    """The resumed run's weights must be the unbroken one's, bit by bit; raises CheckpointError."""
    resumed = checkpoint.verify(checkpoint.steps_in(directory / "checkpoints")[-1])
    unbroken = checkpoint.verify(directory / "unbroken")
    one, other = (each.tensors(checkpoint.WEIGHTS) for each in (unbroken, resumed))
    changed = sorted(name for name in one if not one[name].equal(other[name]))
    if changed or resumed.step != unbroken.step:
        raise CheckpointError(
            f"the resumed run differs from the unbroken one in {len(changed)} tensors, such as {changed[:1]}",
            required="equality, bit by bit", where=str(directory), remedy="report this with the recipe",
        )


def _empty(place: Path) -> None:
    if place.exists() and not (place / MARK).is_file():
        raise ConfigError(
            f"{place} is there and no rehearsal wrote it", required="a directory that the rehearsal may empty",
            where=str(place), remedy="choose another directory=…",
        )
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / MARK).write_text("the next rehearsal empties this directory\n", encoding="utf-8")


def _student(recipe: Recipe, place: Path) -> tuple[str, str]:
    """A small model for the recipe's: its path, and what it is."""
    path = recipe.model.path
    if path.startswith("starter/"):
        return path, path
    local = Path(path)
    known = miniatures.MODELS.get(path)
    if isinstance(known, str):
        return known, f"{known} for {path}"
    if (local / "config.json").is_file():
        model_type, features = _read(local)
    elif known is not None:
        model_type, features = known
    else:
        raise ConfigError(
            f"the architecture of {path} is not known without the network",
            required="a local model directory, a starter student, or a model that the shipped recipes name",
            where="model.path", remedy="download the model and set model.path to its directory",
        )
    tokenizer = _tokenizer(path) or places.model_directory("starter/qwen3")
    _build(place / "model", model_type, features, tokenizer, recipe.model.precision)
    which = "its own tokenizer" if tokenizer.name != places.model_directory("starter/qwen3").name else "a starter one"
    return str(place / "model"), f"a miniature {model_type} for {path}, with {which}"


def _shows(recipe: Recipe, model: str) -> bool:
    """Whether rows that are made for a recipe have images: those of a student that sees, unless all that sees is frozen
    and its rows name no image."""
    if not model.startswith("starter/") or not students.sees(model.removeprefix("starter/")):
        return False
    named = any("<image>" in one.get("content", "") for one in recipe.data.messages or ())
    return named or "image" in (recipe.data.columns or {}) or not {"vision", "projector"} <= set(recipe.model.freeze)


def _read(directory: Path) -> tuple[str, Mapping[str, Any]]:
    """The architecture of a local model and what its miniature keeps of it."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model_type = settings.get("model_type", "")
    if model_type not in miniatures.ARCHITECTURES:
        raise ConfigError(
            f"there is no miniature of the architecture {model_type!r}",
            required=f"one of {', '.join(miniatures.ARCHITECTURES)}", where=str(directory / "config.json"),
            remedy="run the recipe itself with train.steps=4 data.limit=16",
        )
    return model_type, {name: settings[name] for name in _KEPT if name in settings}


def _tokenizer(path: str) -> Path | None:
    """The directory of the model's own tokenizer where it is on this machine."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, allow_patterns=list(_TOKENIZER), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if (found / "tokenizer_config.json").is_file() else None


def _build(place: Path, model_type: str, features: Mapping[str, Any], tokenizer: Path, precision: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = load_tokenizer(inert.checked(tokenizer))
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id}
    config = AutoConfig.for_model(**miniatures.settings(model_type, len(words), **{**features, **ends}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():  # stacks of experts come from some classes as they were allocated
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.05)
    model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]).save_pretrained(place)
    (place / "generation_config.json").unlink(missing_ok=True)
    for pattern in _TOKENIZER:
        for file in tokenizer.glob(pattern):
            shutil.copy(file, place / file.name)
    inert.copy_code(tokenizer, place)


def _degrees(recipe: Recipe, processes: int) -> dict[str, Any]:
    """The recipe's layout, each degree cut down to what divides the processes at hand."""
    ulysses = math.gcd(recipe.parallel.ulysses, processes)
    replicate = math.gcd(recipe.parallel.replicate, processes // ulysses)
    values = recipe.parallel.model_dump(mode="json")
    return {**values, "ulysses": ulysses, "replicate": replicate, "shard": -1, "offload": False}


def _data(recipe: Recipe, place: Path, seeing: bool) -> dict[str, Any]:
    data, longest = recipe.data, recipe.data.max_tokens
    values: dict[str, Any] = {
        "train": [_source(recipe, source, "train", place, seeing) for source in data.train], "limit": None,
        "max_tokens": longest and min(longest, _TOKENS),
        "too_long": "drop" if data.too_long == "error" else data.too_long,
    }
    if isinstance(data.validation, tuple):
        values["validation"] = [_source(recipe, source, "validation", place, seeing) for source in data.validation]
    return values


def _source(recipe: Recipe, source: Source, use: str, place: Path, seeing: bool) -> dict[str, Any]:
    """The source itself where it is on this machine, else as many made rows of the form that it is read in."""
    values = source.model_dump(mode="json")
    local = source.path.startswith("starter/") or Path(source.path.split(":")[0]).exists()
    if local:
        return {**values, "limit": _ROWS[use]}
    split = {"train": "train", "validation": "validation", "exam": "exam"}[use]
    own = Rows(**{name: getattr(source, name) for name in Rows.model_fields})
    rows = own if own != Rows() else Rows(**{name: getattr(recipe.data, name) for name in Rows.model_fields})
    file = place / f"{use}-{len(list(place.glob(f'{use}-*')))}.jsonl"
    made = islice(_made(rows, split, seeing), _ROWS[use])
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return {**values, "path": str(file), "limit": None}


def _made(rows: Rows, split: str, seeing: bool) -> Iterator[dict[str, Any]]:
    """Rows of a starter lesson in the columns that the recipe's row settings read."""
    for made in lessons.rows("sights" if seeing else "arithmetic", split):
        question, answer = made["question"], made["answer"]
        row: dict[str, Any] = {}
        for message in rows.messages or ():
            text = answer if message.get("role") == "assistant" else question
            for field in _FIELD.findall(message.get("content", "")):
                _put(row, field, text)
        for name, field in (rows.columns or {}).items():
            _put(row, field, _turns(question, answer) if name == "messages" else _text(name, question, answer))
        row = row or _plain(rows.format, question, answer)
        if seeing:
            picture = base64.b64encode(made["image"]["bytes"]).decode()
            _put(row, (rows.columns or {}).get("image", "image"), f"data:image/png;base64,{picture}")
        yield row


def _plain(form: str | None, question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": lambda: {"messages": _turns(question, answer)},
        "sharegpt": lambda: {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "alpaca": lambda: {"instruction": question, "output": answer},
        "prompt_completion": lambda: {"prompt": question, "completion": answer},
    }.get(form or "", lambda: {"question": question, "answer": answer})()


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation of two turns."""
    one = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*one, {"role": "user", "content": f"Again: {question}"}, {"role": "assistant", "content": answer}]


def _text(name: str, question: str, answer: str) -> str:
    return answer if name in _ANSWERS else question


def _put(row: dict[str, Any], field: str, value: Any) -> None:
    """Set a dotted column."""
    *above, last = field.split(".")
    for name in above:
        row = row.setdefault(name, {})
    if last:
        row[last] = value

"""What broke in other tools and concerns conversations, each by its name: the second table of their users' pains."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_sft import plain_gradient
from transformers import AutoModelForCausalLM, AutoTokenizer

from schoolhouse import cli, evaluate, places, train
from schoolhouse import recipe as recipes
from schoolhouse.config import Model, Rows
from schoolhouse.data import choose, loader, prepare, served
from schoolhouse.data import plan as plans
from schoolhouse.data.packs import partition
from schoolhouse.data.served import Rules, Served
from schoolhouse.data.store import Store
from schoolhouse.model import load
from schoolhouse.starter import lessons
from schoolhouse.types import EncodedRow, Origin, PlannedStep, Step

RULES = Rules("every", 100_000, "error")
ROWS = 60
"""Conversations of each real data set that are looked at."""


def starter() -> Path:
    return places.model_directory("starter/qwen3")


def conversations(place: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of the lesson, or of the real data in three languages and with tools."""
    if place is None:
        yield from itertools.islice(lessons.rows("recall", "train"), ROWS)
        return
    for name in ("sgd/sgd_test", "kdconv/kdconv_film_test", "kdconv/kdconv_music_test"):
        with (place / "conversations" / f"{name}.messages.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, itertools.islice(lines, ROWS))


@pytest.fixture(params=["starter", "qwen2.5-instruct"])
def taught(request: pytest.FixtureRequest) -> tuple[Served, Any, list[tuple[dict[str, Any], EncodedRow]]]:
    """Our tokenizer and template, transformers' own, and rows with what they became."""
    place = None if request.param == "starter" else request.getfixturevalue("shared")
    directory = starter() if place is None else place / "tokenizers" / request.param
    ours = served.load(served.serving(Model(path=str(directory)), directory))
    rows = list(conversations(place))
    told = ({name: row[name] for name in ("messages", "tools") if name in row} for row in rows)
    encoded = (ours.encode(row, Rows(), Origin("x", 1), RULES) for row in told)
    return ours, AutoTokenizer.from_pretrained(directory), list(zip(rows, encoded, strict=True))


def ids_of(own: Any, row: dict[str, Any], messages: int) -> list[int]:
    """What transformers would feed a model that is to write message number `messages`."""
    text = own.apply_chat_template(
        row["messages"][:messages], tools=row.get("tools"), add_generation_prompt=True, tokenize=False
    )
    return own(text, add_special_tokens=False)["input_ids"]


def whole(example: Any) -> list[int]:
    """All tokens of an example: its input, and the last target."""
    return [*example.input_ids.tolist(), int(example.labels[-1])]


def test_turn_ids_equal_inference_ids(taught: tuple[Served, Any, list[tuple[dict[str, Any], EncodedRow]]]) -> None:
    """At every turn taught, the tokens before the answer are those that serving feeds the model there, id for id."""
    _, own, rows = taught
    seen = 0
    for row, encoded in rows:
        assert len(encoded.examples) == 1, "these templates keep their history, so one sequence holds all turns"
        ids, weights = whole(encoded.examples[0]), encoded.examples[0].weights
        starts = [place for place in range(len(weights)) if weights[place] and not (place and weights[place - 1])]
        answers = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        for start, answer in zip(starts, answers, strict=True):
            assert ids[: start + 1] == ids_of(own, row, answer)
            seen += 1
    assert seen > 3 * ROWS


def test_stop_token_is_supervised(taught: tuple[Served, Any, list[tuple[dict[str, Any], EncodedRow]]]) -> None:
    """Counted in the targets, not in the text: each run of targets ends in the one stop token that it holds."""
    ours, own, rows = taught
    for row, encoded in rows:
        example = encoded.examples[0]
        runs = [
            [int(label) for label, _ in group]
            for supervised, group in itertools.groupby(
                zip(example.labels, example.weights, strict=True), key=lambda pair: pair[1] > 0
            )
            if supervised
        ]
        assert len(runs) == sum(message["role"] == "assistant" for message in row["messages"])
        for labels in runs:
            assert labels[-1] == own.eos_token_id and labels[-1] in ours.stops.ids
            assert not set(labels[:-1]) & set(ours.stops.ids)


# One run of two steps, on rows whose answers carry different weights.


@pytest.fixture(scope="module")
def weighted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of conversations with weights from 0 to 2."""
    place = tmp_path_factory.mktemp("weighted")
    rows = []
    for number, row in enumerate(itertools.islice(lessons.rows("recall", "train"), 12)):
        answers = itertools.count(number)
        rows.append({"messages": [
            {**message, "weight": (0, 0.5, 1, 2)[next(answers) % 4]} if message["role"] == "assistant" else message
            for message in row["messages"]
        ]})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = place / "recipe.yaml"
    recipe.write_text(
        f"model: starter/qwen3\ndata: {{train: {place / 'rows.jsonl'}, workers: 1}}\n"
        "batch: {examples: 5, tokens: 600}\ntrain: {steps: 2}\n"
        "optim: {learning_rate: 1e-2, schedule: constant, warmup: 0, clip: null}\n"
        f"directory: {place / 'run'}\n"
    )
    return recipe


def store_of(path: Path) -> Store:
    recipe = recipes.read(path)
    choice = choose.choices(recipe)["train"]
    return prepare.prepare(recipe.data, choice, served.serving(recipe.model, starter()), served.rules(recipe))


def test_logged_loss_is_the_optimised_loss(weighted: Path) -> None:
    """Each logged loss is the plain loss of the weights before that step; the first step's is the untrained model's.

    The second step's weights come from plain AdamW on plain gradients, so what is optimised is what is logged.
    """
    cli.main(["run", str(weighted)])
    lines = (weighted.parent / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [one["loss"] for one in map(json.loads, lines) if one["kind"] == "step"]
    recipe, store = recipes.read(weighted), store_of(weighted)
    plan = plans.plan(store, recipe)
    model = AutoModelForCausalLM.from_pretrained(starter(), dtype=torch.float32).train()
    decayed = [one for one in model.parameters() if one.ndim >= 2]
    plain = [one for one in model.parameters() if one.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2, betas=(recipe.optim.beta1, recipe.optim.beta2), eps=recipe.optim.epsilon,
    )
    for index in (1, 2):
        chosen = [store[one] for pack in plan.step(index).packs for one in pack]
        loss, gradients = plain_gradient(model, chosen)
        assert logged[index - 1] == pytest.approx(loss, rel=2e-5)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        adamw.step()
    assert logged[0] > 6 and logged[1] < logged[0] - 0.5, "the step was large enough to be seen in the next loss"


def test_eval_equals_train_equation(weighted: Path) -> None:
    """Validation over rows is the loss of one training step over the same rows: weighted targets, one division."""
    store, recipe = store_of(weighted), recipes.read(weighted)
    student = load.load(starter(), recipe.model, torch.device("cpu"))
    packs = partition(store.lengths, recipe.batch.tokens)
    planned = PlannedStep(
        1, 0, tuple(map(tuple, packs)), int(store.lengths.sum()), int(store.supervised_tokens.sum()),
        float(store.supervised.sum()),
    )
    step = Step(planned, [loader.micro_batch(store, pack) for pack in packs])
    loss, correct, _ = train.compute_gradient(student, step, seed=0)
    measured = evaluate.validation(student, store, 2 * recipe.batch.tokens)
    assert measured["loss"] == pytest.approx(loss, rel=1e-6)
    assert measured["accuracy"] * measured["supervised_tokens"] == pytest.approx(correct)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 9))
def test_every_rank_has_equal_steps(lengths: list[int], ranks: int, examples: int) -> None:
    """Steps, and micro-batches within each, are as many on every data rank, the last and smaller step included."""
    sizes = np.asarray(lengths)
    plan = plans.Plan(sizes, sizes.astype(float), sizes, examples, 60, seed=3, ranks=ranks)
    for index in range(1, 2 * plan.steps_per_epoch + 1):
        packs = plan.step(index).packs
        assert len({len(packs[rank::ranks]) for rank in range(ranks)}) == 1 and len(packs) >= ranks
    for packs in (partition(sizes, 60, ranks),):  # validation is laid out by this
        assert len(packs) % ranks == 0 and sorted(itertools.chain(*packs)) == list(range(len(lengths)))

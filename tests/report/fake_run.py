"""Run directories as training writes them, made up from a seed: whole, under way, torn, or hostile."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from schoolhouse.config import Recipe

STEPS, QUESTIONS = 600, 200
RESUMED = 350
CORRECT = {0: 3, 200: 121, 400: 176, 600: 188}
"""Right answers of the exam after so many steps."""


def write(directory: Path, steps: int = STEPS, status: str = "done", seed: int = 0, exams: bool = True) -> Path:
    """A run of `STEPS` planned steps of which `steps` are done."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    _json(directory / "run.json", facts(status, exams))
    _json(directory / "data.json", {"train": ledger(7473, 41, draw), "validation": ledger(512, 0, draw)})
    _jsonl(directory / "metrics.jsonl", metrics(steps, draw, exams))
    if exams:
        _jsonl(directory / "samples.jsonl", [*answers(0), *(answers(steps // 200 * 200) if steps >= 200 else [])])
    _jsonl(directory / "examples.jsonl", [example(row) for row in range(1, 4)])
    _jsonl(directory / "events.jsonl", events(steps, status))
    return directory


def facts(status: str = "done", exams: bool = True) -> dict[str, Any]:
    recipe = Recipe.model_validate({
        "model": "starter/qwen3",
        "data": {"train": "starter/arithmetic", "validation": "starter/arithmetic:validation"},
        "optim": {"learning_rate": 1e-3, "schedule": "cosine"},
        "train": {"epochs": 3},
        "validation": {"every": 100},
        "exam": {"data": "starter/arithmetic:exam", "every": 200} if exams else {},
    })
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_path": "examples/sft/gsm8k/starter.yaml",
        "derived": {"steps_total": STEPS, "steps_per_epoch": 200, "warmup_steps": 30, "parameters": 3_412_992,
                    "trainable": 3_412_992, "stop_tokens": ["<|im_end|>"]},
        "in_force": [
            {"asked": "model.precision: float32", "in force": "float32 weights and products"},
            {"asked": "attention", "in force": "schoolhouse (packed, isolated; SDPA for each example)"},
            {"asked": "loss", "in force": "only supervised rows meet the vocabulary, chunks of 1,024"},
            {"what": "supervision", "value": "every assistant turn, through its stop token"},
        ],
        "versions": {"schoolhouse": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.24.0"},
        "device": {"kind": "cpu", "name": "AMD EPYC 9B14", "cores": 2, "memory_gib": 15.6},
        "started": "2026-11-24T12:04:31.123456+00:00",
        "status": status,
        "seconds": 142.7,
    }


def ledger(rows: int, too_long: int, draw: random.Random) -> dict[str, Any]:
    kept = rows - too_long
    split = kept // 50
    edges = list(range(0, 544, 16))
    shape = [math.exp(-((math.log(edge + 8) - 5.2) ** 2) / 0.25) for edge in edges[:-1]]
    counts = [round((kept + split) * share / sum(shape)) for share in shape]
    counts[12] += kept + split - sum(counts)
    return {
        "rows": rows, "verdicts": {"one": kept - split, "split": split},
        "dropped": {"longer than data.max_tokens": too_long} if too_long else {}, "cut": 0,
        "examples": kept + split, "turns": kept + 2 * split, "stopped_turns": kept + 2 * split,
        "tokens": kept * 187, "supervised_tokens": kept * 98, "by_source": {"starter/arithmetic": rows},
        "kept": kept, "lengths": {"edges": edges, "counts": counts}, "stop_share": 1.0,
    }  # fmt: skip


def metrics(steps: int, draw: random.Random, exams: bool = True) -> Iterable[dict[str, Any]]:
    """Records in the order a run that was killed and resumed writes them."""
    yield from evaluations(0, exams)
    for step in [*range(1, min(steps, RESUMED + 20) + 1), *range(RESUMED + 1, steps + 1)]:
        yield step_record(step, draw)
        yield from evaluations(step, exams)


def step_record(step: int, draw: random.Random) -> dict[str, Any]:
    seconds = draw.gauss(0.19, 0.008) + (0.4 if step == 1 else 0)
    tokens = draw.randint(11_300, 12_400)
    warm, left = min(1.0, step / 30), 0.5 * (1 + math.cos(math.pi * max(0, step - 30) / (STEPS - 30)))
    noise, loss = math.exp(draw.gauss(0, 0.12)), _loss(step)
    return {
        "kind": "step", "step": step, "epoch": (step - 1) // 200, "loss": loss * noise,
        "accuracy": 1 - 0.2 * loss * noise, "grad_norm": (0.3 + 2.2 * loss) * noise**2,
        "learning_rate": 1e-3 * warm * left, "examples": 64, "tokens": tokens,
        "supervised_tokens": round(tokens * 0.52), "seconds": seconds, "data_seconds": 0.004, "peak_memory_gib": 1.37,
    }  # fmt: skip


def evaluations(step: int, exams: bool = True) -> Iterable[dict[str, Any]]:
    if step % 100 == 0:
        yield {"kind": "eval", "step": step, "name": "validation", "loss": _loss(step) * 1.04,
               "accuracy": 1 - 0.2 * _loss(step), "supervised_tokens": 50_176, "seconds": 1.9}  # fmt: skip
    if step % 200 == 0 and exams:
        correct = CORRECT[step]
        yield {"kind": "eval", "step": step, "name": "exam", "score": correct / QUESTIONS, "correct": correct,
               "count": QUESTIONS, "seconds": 6.2}  # fmt: skip


def answers(step: int) -> Iterable[dict[str, Any]]:
    """The answers of an exam; as many are right as `CORRECT` says, so that all kinds of change occur."""
    for index in range(QUESTIONS):
        first, second = 3 + index * 7 % 31, 2 + index * 5 % 17
        total = first + second
        correct = (index * 73 + (0 if step else 14)) % QUESTIONS < CORRECT.get(step, 188)
        said = total if correct else total + 1 + index % 9
        good = f"Mia has {first} apples. She gets {second} more.\n{first} + {second} = {said}\n#### {said}"
        yield {
            "step": step, "index": index,
            "question": [{"role": "user", "content": f"Mia has {first} apples and gets {second} more. How many now?"}],
            "reference": f"{first} + {second} = {total}\n#### {total}",
            "answer": good if step else f"{second} the the more {first} apples apples ####{said}" * 3,
            "extracted": str(said) if step or correct else None, "correct": correct, "stopped": bool(step),
            "tokens": 31 if step else 128,
        }  # fmt: skip


def example(row: int) -> dict[str, Any]:
    """A row of `show.to_json` of two turns, the second one lighter."""
    texts = [
        ("<|im_start|>", 0, True), (f"user\nTom reads {row} pages a day. How many in a week?", 0, False),
        ("<|im_end|>", 0, True), ("\n", 0, False), ("<|im_start|>", 0, True), ("assistant\n", 0, False),
        (f"He reads {row} pages on each of 7 days.\n{row} * 7 = {7 * row}\n#### {7 * row}", 1, False),
        ("<|im_end|>", 1, True), ("\n", 0, False), ("<|im_start|>", 0, True),
        ("user\nAnd in two weeks?", 0, False), ("<|im_end|>", 0, True), ("\n", 0, False),
        ("<|im_start|>", 0, True), ("assistant\n", 0, False),
        (f"#### {14 * row}", 0.5, False), ("<|im_end|>", 0.5, True),
    ]  # fmt: skip
    pieces = [{"text": text, "weight": weight, "special": special} for text, weight, special in texts]
    weights = [float(piece["weight"]) for piece in pieces for _ in range(max(1, len(piece["text"]) // 4))][1:]
    whole = "".join(text for text, _, _ in texts)
    return {
        "source": "starter/arithmetic", "row": row,
        "turns": [{"prompt": whole.split("He reads")[0], "completion": "".join(t for t, w, _ in texts if w == 1)},
                  {"prompt": whole.rsplit("####", 1)[0], "completion": "".join(t for t, w, _ in texts if w == 0.5)}],
        "ids": list(range(len(weights))),
        "labels": [index + 1 if weight else -100 for index, weight in enumerate(weights)],
        "weights": weights, "positions": list(range(len(weights))), "verdict": "one", "pieces": pieces,
    }  # fmt: skip


def events(steps: int, status: str) -> Iterable[dict[str, Any]]:
    yield {"time": "2026-11-24T12:04:31+00:00", "event": "started", "directory": "runs/starter"}
    for step in range(200, steps + 1, 200):
        yield {"time": f"2026-11-24T12:05:{step // 200 * 11}+00:00", "event": "checkpoint saved", "step": step,
               "path": f"checkpoints/step-{step:08}", "seconds": 0.12}  # fmt: skip
    if steps > RESUMED:
        yield {"time": "2026-11-24T12:06:02+00:00", "event": "resumed", "step": RESUMED}
    yield {"time": "2026-11-24T12:06:54+00:00", "event": status, "step": steps}


def _loss(step: int) -> float:
    return 0.021 + 3.1 * math.exp(-step / 35) + 0.55 * math.exp(-step / 170)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

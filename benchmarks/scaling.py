"""How work grows: with the length of an example, with the vocabulary, with the width, with the rows; and how evenly
ranks share it.

    python benchmarks/scaling.py length vocabulary width      a small Qwen2 on this machine, one process a point
    python benchmarks/scaling.py rows                         the command itself, on files of a lesson's rows
    python benchmarks/scaling.py balance --rows ROWS.jsonl --tokenizer DIRECTORY

`balance` computes nothing but plans: what a round of packs lasts against the mean of its ranks, in the plan's own cost
of an example. `bound` is what no plan can beat, for the sake of the dearest example of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

POINTS = {
    "length": [(length, 4096, 256) for length in (512, 2048, 8192, 32768)],
    "vocabulary": [(2048, vocabulary, 256) for vocabulary in (4096, 32768, 151936)],
    "width": [(2048, 4096, width) for width in (128, 256, 512, 1024)],
}
"""Tokens of the one example of a micro-batch, entries of the vocabulary, hidden size."""
QUESTIONS = (*POINTS, "rows", "balance")
ROWS = (1_000, 10_000, 100_000, 1_000_000)
"""Rows of the file that a student is taught from."""
RUN_STEPS, WARM_UP = 60, 10
"""Steps of each run, and those at its beginning that are not counted."""
TURNS = 5
"""Runs on each number of rows; figures are medians over them."""
RECIPE = "examples/sft/gsm8k/starter.yaml"
LAYOUTS = ((2, 32), (4, 64), (8, 128), (8, 256), (32, 1024), (64, 2048))
"""Ranks, and examples in a step."""
STEPS = 40


def main() -> None:
    """Measure what is asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="QUESTION", help=f"{', '.join(QUESTIONS)}; unset: all")
    parser.add_argument("--rows", type=Path, help="JSONL whose rows, as text, give real lengths for `balance`")
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.what) - set(QUESTIONS):
        parser.error(f"{min(unknown)} is none of {', '.join(QUESTIONS)}")
    if options.point:
        print(json.dumps(measured(*options.point)))
        return
    found: dict[str, list[dict]] = {}
    for what in options.what or QUESTIONS:
        found[what] = []
        for row in measurements(what, options):
            found[what].append(row)
            print(what, *(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in row.items()), sep="  ", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measurements(what: str, options: argparse.Namespace) -> Iterator[dict]:
    """The lines of one question."""
    if what == "balance":
        return balances(options.rows, options.tokenizer)
    return grown() if what == "rows" else points(what)


def points(what: str) -> Iterator[dict]:
    """Each point in a process of its own, so that its peak memory is its own."""
    for point in POINTS[what]:
        done = subprocess.run([sys.executable, __file__, "--point", *map(str, point)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        yield json.loads(done.stdout.splitlines()[-1])


def measured(length: int, vocabulary: int, width: int) -> dict:
    """Seconds a token and memory of steps over one example, half of it supervised: forward, backward and AdamW."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from schoolhouse.config import Optim
    from schoolhouse.model import attention, elementwise, flops
    from schoolhouse.model.load import Student
    from schoolhouse.optim import Optimizer
    from schoolhouse.types import MicroBatch

    attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), tie_word_embeddings=True,
        max_position_embeddings=length,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train()
    elementwise.lighten(model)
    student = Student(model)
    optimizer = Optimizer(student.model, Optim(), "float32")
    student.add_in_place(optimizer.total)
    weights = torch.zeros(1, length)
    weights[0, length // 2 :] = 1
    ids = torch.randint(0, vocabulary, (1, length))
    micro = MicroBatch(
        input_ids=ids, labels=ids, weights=weights, positions=torch.arange(length)[None], boundaries=(0, length),
        targets=weights.flatten().nonzero().flatten(), pack=(0,), supervised=float(weights.sum()),
    )
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(max(3, 8192 // length)):
        began = time.perf_counter()
        student.loss(micro, supervised=micro.supervised).backward()
        optimizer.clip()
        optimizer.step(1e-4)
        seconds.append(time.perf_counter() - began)
    took = statistics.median(seconds[1:])
    needed = flops.work(student.model).of_step(np.asarray([length]), length - length // 2)
    return {
        "length": length, "vocabulary": vocabulary, "width": width, "us_per_token": took / length * 1e6,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "mfu": needed / took / flops.rate(student.device, "float32"),
    }


def grown() -> Iterator[dict]:
    """The same steps of the command over ever more rows, drawn from a lesson: what a row's preparation and a token's
    training take, and what a start needs before and behind its steps. All are prepared first; then they are trained on
    in turn, since a shared machine is not as fast from one minute to the next."""
    from schoolhouse.starter import lessons

    lesson, random = [json.dumps(row) for row in lessons.rows("arithmetic", "train")], np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="scaling-") as work:
        places, prepared = {count: Path(work) / str(count) for count in ROWS}, {}
        for count, place in places.items():
            place.mkdir()
            drawn = random.integers(0, len(lesson), count)
            (place / "rows.jsonl").write_text("".join(lesson[one] + "\n" for one in drawn))
            prepared[count], _ = timed("check", *over(place))
        turns = [{count: taught_once(place) for count, place in places.items()} for _ in range(TURNS)]
    for count in ROWS:
        medians = {name: statistics.median(turn[count][name] for turn in turns) for name in turns[0][count]}
        yield {"rows": count, "prepare_us_per_row": prepared[count] / count * 1e6, **medians}


def over(place: Path) -> list[str]:
    """The recipe on the rows of a directory."""
    return [
        RECIPE, f"data.train={place}/rows.jsonl", "data.format=question_answer", f"data.cache={place}/cache",
        "data.validation=null", "exam.data=null", f"train.steps={RUN_STEPS}", f"directory={place}/run",
    ]


def taught_once(place: Path) -> dict[str, float]:
    """One run of the command on rows that are prepared."""
    shutil.rmtree(place / "run", ignore_errors=True)
    whole, peak = timed("run", *over(place))
    lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [one for one in map(json.loads, lines) if one["kind"] == "step"]
    counted = steps[WARM_UP:]
    return {
        "us_per_token": statistics.median(one["seconds"] / one["tokens"] for one in counted) * 1e6,
        "data_share": sum(one["data_seconds"] for one in counted) / sum(one["seconds"] for one in counted),
        "besides_steps_s": whole - sum(one["seconds"] for one in steps), "mib": peak,
    }


def timed(*words: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a command of ours."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "schoolhouse", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(errors.decode()[-2000:])
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def balances(rows: Path | None, tokenizer: Path | None) -> Iterator[dict]:
    """The plan's rounds over `STEPS` steps of each layout, of real lengths where rows are given, and of a long tail."""
    from schoolhouse.data import packs

    random = np.random.default_rng(0)
    tail = np.minimum(np.exp(random.normal(5.5, 1.2, 20000)).astype(np.int64) + 10, 8192)
    sets = [("long tail", tail, 8192), ("long tail", tail, 16384)]
    if rows is not None and tokenizer is not None:
        real = lengths_of(rows, tokenizer)
        sets.insert(0, (rows.parent.name, real, max(2048, int(real.max()))))
    for (name, lengths, tokens), (ranks, examples) in itertools.product(sets, LAYOUTS):
        over, bound = [], []
        for _ in range(STEPS):
            chosen = lengths[random.integers(0, len(lengths), examples)]
            costs = chosen * (1 + chosen / packs.ATTENTION_LENGTH)
            spent = np.asarray([costs[pack].sum() for pack in packs.partition(chosen, tokens, ranks)])
            mean = costs.sum() / ranks
            over.append(spent.reshape(-1, ranks).max(1).sum() / mean)
            bound.append(1 + max(0.0, costs.max() - densest(chosen, costs, ranks * tokens) / ranks) / mean)
        yield {"rows": name, "tokens": tokens, "ranks": ranks, "examples": examples,
               "slowest_over_mean": float(np.mean(over)), "bound": float(np.mean(bound))}


def densest(lengths: np.ndarray, costs: np.ndarray, room: int) -> float:
    """The most work that so many tokens can be. The round of the dearest example lasts as long as it, with no more work
    on all ranks than this; the rest of a step lasts at least as long as its share of the rest."""
    order = np.argsort(-costs / lengths)
    taken = np.clip(room - (np.cumsum(lengths[order]) - lengths[order]), 0, lengths[order])
    return float((taken * (costs / lengths)[order]).sum())


def lengths_of(rows: Path, tokenizer: Path) -> np.ndarray:
    """Tokens of each row's text."""
    from tokenizers import Tokenizer

    texts = [" ".join(map(str, json.loads(line).values())) for line in rows.read_text(encoding="utf-8").splitlines()]
    encoded = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode_batch_fast(texts)
    return np.asarray([len(one.ids) for one in encoded])


if __name__ == "__main__":
    main()

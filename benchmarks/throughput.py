"""Tokens per second and peak memory of schoolhouse against TRL's `SFTTrainer`, and with `--trainer` against
transformers' own, in one alternating run.

Both train the same random Qwen2 model on the same rows for one pass, `--examples` of them in a step. Every measurement
has a process of its own; they take turns (A B C A B C …), and the table holds medians over the turns. A turn's figure
is the median over its steps, the first two left out. TRL's layouts are searched first, the best ones take part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

WARM_UP = 2
"""Steps at the beginning of a measurement that are not counted."""
LEARNING_RATE = 1e-3
SEARCHED = ("padded:2", "padded:4", "padded:8", "padded:16", "padding_free:2", "packed:0")
"""TRL's layouts and micro-batch sizes that are tried: rows, or tokens of a pack (0: of the longest row)."""
FINALISTS = 2
"""TRL layouts of each number format that take part in the alternating run: the search is a single look."""
LEAK = 1e-3
"""A packed example whose hidden states (of the order of 1) differ this much from those it has alone sees others."""
NUMBERS = {"float32": ("float32",), "bfloat16": ("autocast", "bfloat16")}
"""TRL's counterparts of `model.precision`; see `_trl_worker.py`."""
QUIET = 0.1
"""Others use less than this share of the processors on a quiet machine."""
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Contender:
    """One column of the comparison: a program with its layout and number format."""

    program: str
    layout: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.program} {self.layout} {self.numbers}"


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has run to its end."""

    output: str
    peak_mib: float
    others: float
    """The share of the machine's processors that other programs used meanwhile."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One process: its memory and its optimizer steps."""

    baseline_mib: float
    """After the imports."""
    peak_mib: float
    others: float
    """The share of the machine's processors that other programs used meanwhile: a disturbed figure shows it."""
    steps: tuple[Mapping[str, float], ...]
    """Each with seconds, tokens, supervised_tokens, loss."""

    def rate(self, key: str) -> float:
        """Median over the counted steps of `key` per second."""
        return statistics.median(step[key] / step["seconds"] for step in self.steps[WARM_UP:])

    def total(self, key: str) -> float:
        """Sum of `key` over all steps."""
        return sum(step[key] for step in self.steps)

    @property
    def loss(self) -> float:
        """The loss per supervised token, over all steps."""
        return sum(step["loss"] * step["supervised_tokens"] for step in self.steps) / self.total("supervised_tokens")


def main() -> None:
    """Write the inputs, search TRL's layouts, alternate, print the tables."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="throughput-") as place:
        work = Path(place)
        facts = write_inputs_apart(options, work)
        found = search(options, work) if options.trl is None else named("TRL", options.trl, options)
        found += named("Trainer", options.trainer, options)
        run([sys.executable, "-m", "schoolhouse", "check", work / "recipe.yaml"], options)  # rows are prepared once
        contenders = [Contender("schoolhouse", f"packed:{options.tokens}", options.precision), *found]
        turns = alternate(contenders, options, work)
    print(f"\n{facts['rows']} rows, {facts['tokens']} tokens, {facts['supervised_tokens']} supervised")
    print(report(turns))
    for complaint in unequal(turns, facts):
        print(complaint)
    if options.json:
        options.json.write_text(json.dumps(document(options, facts, turns), indent=1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a turn, the first two not counted")
    parser.add_argument("--examples", type=int, default=32, help="examples in a step")
    parser.add_argument("--tokens", type=int, default=2048, help="schoolhouse's batch.tokens")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=Path, help="JSONL of question and answer; unset: the starter lesson")
    parser.add_argument("--tokenizer", type=Path, help="directory; cut down to --vocabulary by training it on the rows")
    parser.add_argument("--precision", choices=list(NUMBERS), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for other programs to be quiet")
    parser.add_argument("--trl", nargs="*", help="TRL layouts, e.g. padded:4 packed:1024; unset: search the best")
    parser.add_argument("--trainer", nargs="*", default=[], help="transformers.Trainer as well, e.g. padded:4")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--write-inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must exceed the {WARM_UP} that are not counted")
    if options.write_inputs:
        write_inputs(options, options.write_inputs)
        sys.exit()
    return options


# --- the inputs -------------------------------------------------------------------------------------------------------


def write_inputs_apart(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """`write_inputs` in a process of its own: a child's peak memory begins at its parent's, so this one stays small."""
    run([sys.executable, __file__, *sys.argv[1:], "--write-inputs", work], options)
    return json.loads((work / "facts.json").read_text())


def write_inputs(options: argparse.Namespace, work: Path) -> None:
    """The model and its tokenizer as a Hugging Face directory, the rows for either side, and our recipe."""
    rows = list(itertools.islice(read_rows(options.rows), options.steps * options.examples))
    tokenizer = cut_tokenizer(options)
    write_model(options, tokenizer, work / "model")
    encoded = [encode(tokenizer, row) for row in rows]
    write_lines(work / "rows.jsonl", rows)
    write_lines(work / "tokens.jsonl", encoded)
    (work / "recipe.yaml").write_text(recipe(options, work))
    facts = {
        "rows": len(rows), "tokens": sum(len(row["input_ids"]) for row in encoded),
        "supervised_tokens": sum(label != -100 for row in encoded for label in row["labels"]),
    }
    (work / "facts.json").write_text(json.dumps(facts))


def read_rows(path: Path | None) -> Iterable[dict[str, str]]:
    """Rows of question and answer."""
    from schoolhouse.starter import lessons

    if path is None:
        return lessons.rows("arithmetic", "train")
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cut_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer; one with more than `--vocabulary` entries is trained anew on the rows with fewer."""
    from transformers import AutoTokenizer

    from schoolhouse import places

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or places.model_directory("starter/qwen3"))
    if len(tokenizer) <= options.vocabulary:
        return tokenizer
    texts = (f"{row['question']}\n{row['answer']}" for row in read_rows(options.rows))
    return tokenizer.train_new_from_iterator(texts, options.vocabulary - len(tokenizer.get_added_vocab()))


def write_model(options: argparse.Namespace, tokenizer: Any, place: Path) -> None:
    """A Qwen2 model with random weights: heads of 64, half as many for keys and values, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = max(2, options.hidden // 64)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    ))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def encode(tokenizer: Any, row: Mapping[str, str]) -> dict[str, list[int]]:
    """What TRL is given: the row as plain transformers encodes it, its answer and stop token supervised.

    TRL's own preparation would also supervise the newline that Qwen's template writes behind the stop token.
    """
    messages = [{"role": "user", "content": row["question"]}]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def recipe(options: argparse.Namespace, work: Path) -> str:
    """Our recipe: one pass over the rows at a constant learning rate, with nothing else to do."""
    return json.dumps({
        "model": {"path": str(work / "model"), "precision": options.precision},
        "data": {"train": str(work / "rows.jsonl"), "format": "question_answer", "cache": str(work / "cache")},
        "batch": {"examples": options.examples, "tokens": options.tokens},
        "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.01,
                  "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "clip": 1.0},
        "device": "cpu",
    }, indent=1)  # JSON is YAML


# --- the measurements -------------------------------------------------------------------------------------------------


def search(options: argparse.Namespace, work: Path) -> list[Contender]:
    """TRL's fastest layouts by a short look at each; those that let examples see one another are left out."""
    leaking = {layout for layout in ("padding_free", "packed") if leaks(layout, options, work)}
    finalists = []
    for numbers in NUMBERS[options.precision]:
        rates = {}
        for layout in SEARCHED:
            if layout.partition(":")[0] in leaking:
                print(f"search: TRL {layout} {numbers}: left out, its examples see one another on this device")
                continue
            found = trl(Contender("TRL", layout, numbers), options, work, steps=WARM_UP + 2)
            rates[layout] = found.rate("tokens")
            print(f"search: TRL {layout} {numbers}: {brief(found)}", flush=True)
        best = sorted(rates, key=rates.__getitem__, reverse=True)[:FINALISTS]
        finalists += [Contender("TRL", layout, numbers) for layout in best]
    return finalists


def named(program: str, layouts: Sequence[str], options: argparse.Namespace) -> list[Contender]:
    """A program's layouts that were named, in every counterpart of the precision."""
    return [Contender(program, layout, numbers) for numbers in NUMBERS[options.precision] for layout in layouts]


def leaks(layout: str, options: argparse.Namespace, work: Path) -> bool:
    """Whether an example's hidden states change with what stands before it in TRL's batch."""
    command = trl_command(Contender("TRL", f"{layout}:0", "float32"), options, work)
    found = json.loads(run([*command, "--check-isolation"], options).output.splitlines()[-1])
    print(f"search: TRL {layout}: hidden states differ by {found['isolation_error']:.1e} from an example's alone "
          f"(by {found['control_error']:.1e} where its examples are made to see one another)")
    return found["isolation_error"] > LEAK


def alternate(
    contenders: Sequence[Contender], options: argparse.Namespace, work: Path
) -> dict[Contender, list[Measurement]]:
    """All contenders in turn, `--rounds` times."""
    turns: dict[Contender, list[Measurement]] = {contender: [] for contender in contenders}
    for turn, contender in itertools.product(range(options.rounds), contenders):
        measure = schoolhouse if contender.program == "schoolhouse" else trl
        found = measure(contender, options, work)
        turns[contender].append(found)
        print(f"turn {turn + 1}: {contender}: {brief(found)}", flush=True)
    return turns


def brief(found: Measurement) -> str:
    """A measurement in a few words."""
    return f"{found.rate('tokens'):,.0f} tokens/s, {found.peak_mib:,.0f} MiB (others used {found.others:.0%})"


def schoolhouse(contender: Contender, options: argparse.Namespace, work: Path) -> Measurement:
    """One run of our command line, read from its run directory."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        command = [sys.executable, "-m", "schoolhouse", "run", work / "recipe.yaml", f"directory={directory}"]
        finished = run(command, options)
        lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    steps = tuple(record for record in map(json.loads, lines) if record["kind"] == "step")
    imports = run([sys.executable, "-c", "import schoolhouse.commands, schoolhouse.train"], options)
    return Measurement(imports.peak_mib, finished.peak_mib, finished.others, steps)


def trl(contender: Contender, options: argparse.Namespace, work: Path, steps: int = -1) -> Measurement:
    """One run of TRL's trainer; of all rows, or of a few steps."""
    finished = run([*trl_command(contender, options, work), "--steps", str(steps)], options)
    found = json.loads(finished.output.splitlines()[-1])
    return Measurement(found["baseline_mib"], finished.peak_mib, finished.others, tuple(found["steps"]))


def trl_command(contender: Contender, options: argparse.Namespace, work: Path) -> list[str | Path]:
    """The worker's command line."""
    layout, _, size = contender.layout.partition(":")
    return [
        sys.executable, Path(__file__).with_name("_trl_worker.py"), "--work", work, "--layout", layout, "--size", size,
        "--numbers", contender.numbers, "--examples", str(options.examples), "--optimizer-steps", str(options.steps),
        "--learning-rate", str(LEARNING_RATE), "--program", contender.program,
    ]


def run(command: Sequence[str | Path], options: argparse.Namespace) -> Finished:
    """Run a command to its end; one that fails ends the benchmark."""
    settings = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    wait_for_quiet(options.patience)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        busy, began = busy_seconds(), time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=errors, env={**os.environ, **settings}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        share = max(0.0, others / (time.monotonic() - began) / os.cpu_count())
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{errors.read()[-3000:]}")
        return Finished(output.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB, share)


def wait_for_quiet(patience: float) -> None:
    """Wait, at most `patience` seconds, until other programs leave the processors alone for two seconds."""
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        before = busy_seconds()
        time.sleep(2)
        if (busy_seconds() - before) / 2 < QUIET * os.cpu_count():
            return


def busy_seconds() -> float:
    """Processor time used by all programs since the machine started; 0 where Linux does not tell."""
    place = Path("/proc/stat")
    if not place.is_file():
        return 0.0
    user, nice, system, _, _, interrupts, soft = map(int, place.read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


# --- the tables -------------------------------------------------------------------------------------------------------


def summary(found: Sequence[Measurement]) -> dict[str, float]:
    """A contender's medians over its turns."""
    return {
        "tokens/s": statistics.median(one.rate("tokens") for one in found),
        "supervised/s": statistics.median(one.rate("supervised_tokens") for one in found),
        "peak MiB": statistics.median(one.peak_mib for one in found),
        "above imports": statistics.median(one.peak_mib - one.baseline_mib for one in found),
        "loss": statistics.median(one.loss for one in found),
        "others %": statistics.median(100 * one.others for one in found),
    }


def ratios(turns: Mapping[Contender, Sequence[Measurement]]) -> dict[Contender, dict[str, float]]:
    """Ours over theirs, of medians, for every other contender: above 1 is faster, below 1 is smaller."""
    (ours,) = (summary(found) for contender, found in turns.items() if contender.program == "schoolhouse")
    theirs = {contender: summary(found) for contender, found in turns.items() if contender.program != "schoolhouse"}
    keys = ("tokens/s", "supervised/s", "peak MiB", "above imports")
    return {contender: {key: ours[key] / medians[key] for key in keys} for contender, medians in theirs.items()}


def report(turns: Mapping[Contender, Sequence[Measurement]]) -> str:
    """The medians, the ratios, and the ratio to the fastest peer in one line."""
    lines = table("median", {str(contender): summary(found) for contender, found in turns.items()})
    relative = ratios(turns)
    if relative:
        lines += ["", *table("schoolhouse / peer", {str(contender): values for contender, values in relative.items()})]
        best, values = min(relative.items(), key=lambda pair: pair[1]["tokens/s"])
        lines += ["", f"against the fastest ({best}): {values['tokens/s']:.2f} x tokens/s, "
                      f"{values['peak MiB']:.2f} x peak memory ({values['above imports']:.2f} x above the imports)"]
    return "\n".join(lines)


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Aligned lines; all rows have the same keys."""
    keys = list(next(iter(rows.values())))
    width = max(len(name) for name in [title, *rows])
    head = title.ljust(width) + "".join(f"{key:>15}" for key in keys)
    cells = {name: "".join(f"{number(row[key]):>15}" for key in keys) for name, row in rows.items()}
    return [head, *(name.ljust(width) + row for name, row in cells.items())]


def number(value: float) -> str:
    """Whole numbers from a hundred on, two places below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def unequal(turns: Mapping[Contender, Sequence[Measurement]], facts: Mapping[str, int]) -> list[str]:
    """One line for every contender: whether it trained exactly the supervised tokens that the rows hold."""
    lines = []
    for contender, found in turns.items():
        seen = {int(one.total("supervised_tokens")) for one in found}
        wanted = facts["supervised_tokens"]
        verdict = "all" if seen == {wanted} else f"NOT EQUAL: {sorted(seen)} of"
        lines.append(f"supervised tokens of {contender}: {verdict} {wanted:,}")
    return lines


def document(
    options: argparse.Namespace, facts: Mapping[str, int], turns: Mapping[Contender, Sequence[Measurement]]
) -> dict[str, Any]:
    """Everything measured, for a file."""
    packages = ("torch", "transformers", "trl", "schoolhouse")
    return {
        "options": {key: str(value) for key, value in vars(options).items()}, "rows": dict(facts),
        "machine": {"processor": processor(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in packages},
        "medians": {str(contender): summary(found) for contender, found in turns.items()},
        "ratios": {str(contender): values for contender, values in ratios(turns).items()},
        "turns": {str(contender): [asdict(one) for one in found] for contender, found in turns.items()},
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    place = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", place.read_text()) if place.is_file() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()

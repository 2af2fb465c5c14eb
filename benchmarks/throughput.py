"""Tokens per second and peak memory of schoolhouse against TRL's `SFTTrainer`, and with `--trainer` against
transformers' own, in one alternating run, on a CPU or a GPU.

Both train the same random model on the same rows for one pass, `--examples` of them in a step. Every measurement has a
process of its own; they take turns (A B C A B C …), and the table holds medians over the turns. A turn's figure is the
median over its steps, the first two left out. TRL's layouts are searched first, the best ones take part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _inputs as inputs
from _commands import Failed, processor, run

WARM_UP = 2
"""Steps at the beginning of a measurement that are not counted."""
SEARCHED = {
    "cpu": ("padded:2", "padded:4", "padded:8", "padded:16", "padding_free:2", "packed:0"),
    "cuda": ("padded:8", "padded:32", "padding_free:8", "padding_free:32", "packed:8192", "packed:16384"),
}
"""TRL's layouts and micro-batch sizes that are tried: rows, or tokens of a pack (0: of the longest row)."""
EXTRAS = ("compile", "liger")
"""What a layout's name may end with, each behind a plus: torch.compile, Liger's kernels."""
FINALISTS = 2
"""TRL layouts of each number format that take part in the alternating run: the search is a single look."""
LEAK = 0.1
"""A packed example sees others whose hidden states differ from those it has alone by this share of what they differ by
where others are shown to it."""
NUMBERS = {"float32": ("float32",), "bfloat16": ("autocast", "bfloat16")}
"""The peers' counterparts of `model.precision`; see `_peer.py`."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One column of the comparison: a program with its layout and number format."""

    program: str
    layout: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.program} {self.layout} {self.numbers}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One process: its memory and its optimizer steps."""

    baseline_mib: float
    """After the imports; on a GPU nothing."""
    peak_mib: float
    """Of the process; on a GPU what its tensors took there."""
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
    try:
        compare(options)
    except Failed as failed:
        sys.exit(str(failed))


def compare(options: argparse.Namespace) -> None:
    """The whole comparison; raises Failed where our own command, or all of a peer's, failed."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as place:
        work = Path(place)
        run([sys.executable, __file__, *sys.argv[1:], "--write-inputs", work], options)  # its peak is not ours
        facts = json.loads((work / "facts.json").read_text())
        found = search(options, work) if options.trl is None else named("TRL", options.trl, options, work)
        found += named("Trainer", options.trainer, options, work)
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["small", *inputs.SIZES], default="small", help="of the model")
    parser.add_argument("--lora", type=int, metavar="RANK", help="adapters beside frozen weights, on both sides")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, on both sides")
    parser.add_argument("--length", type=int, help="rows are joined to examples of nearly so many tokens")
    parser.add_argument("--pixels", type=int, default=256 * 256, help="images are enlarged to so many at least")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="more of our recipe")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=Path, help="JSONL of question and answer; unset: the starter lesson")
    parser.add_argument("--tokenizer", type=Path, help="directory; cut down to --vocabulary by training it on the rows")
    parser.add_argument("--precision", choices=list(NUMBERS), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for other programs to be quiet")
    parser.add_argument("--trl", nargs="*", help="TRL layouts, e.g. padded:4+compile packed:1024; unset: search")
    parser.add_argument("--trainer", nargs="*", default=[], help="transformers.Trainer as well, e.g. padded:4")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    parser.add_argument("--write-inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must exceed the {WARM_UP} that are not counted")
    if options.size in inputs.SEE and (options.trl != [] or options.rows is None):
        parser.error(f"{options.size} takes rows of images (--rows), and transformers' Trainer beside it: --trl "
                     "without layouts, --trainer padded:8. TRL's own way to images needs torchvision")
    if options.size in inputs.SEE and options.length:
        parser.error("rows with images are not joined: leave --length out")
    for program, layout in [("TRL", one) for one in options.trl or ()] + [("Trainer", one) for one in options.trainer]:
        if why := misfit(program, layout, options.examples):
            parser.error(f"{program} {layout}: {why}")
    if options.write_inputs:
        inputs.write(options, options.write_inputs)
        sys.exit()
    return options


# --- the measurements -------------------------------------------------------------------------------------------------


def search(options: argparse.Namespace, work: Path) -> list[Contender]:
    """TRL's fastest layouts by a short look at each; those that let examples see one another are left out."""
    liger = ("", "+liger") if options.device != "cpu" and find_spec("liger_kernel") else ("",)
    layouts = [one for one in SEARCHED[options.device] if not misfit("TRL", one, options.examples)]
    finalists = []
    for numbers in NUMBERS[options.precision]:
        rates = {}
        for contender in isolated("TRL", map("".join, itertools.product(layouts, liger)), numbers, options, work):
            try:
                found = peer(contender, options, work, steps=WARM_UP + 2)
            except Failed as failed:
                print(f"search: {contender}: left out: {failed.brief}")
                continue
            rates[contender] = found.rate("tokens")
            print(f"search: {contender}: {brief(found)}", flush=True)
        finalists += sorted(rates, key=rates.__getitem__, reverse=True)[:FINALISTS]
    return finalists


def named(program: str, layouts: Sequence[str], options: argparse.Namespace, work: Path) -> list[Contender]:
    """A program's layouts that were named, in every counterpart of the precision."""
    return [one for numbers in NUMBERS[options.precision] for one in isolated(program, layouts, numbers, options, work)]


def misfit(program: str, layout: str, examples: int) -> str:
    """Why a layout cannot take part in steps of so many examples; empty where it can."""
    kind, size, extras = parts(layout)
    if kind not in ("padded", "padding_free", "packed") or not size.isdecimal() or not {*extras} <= {*EXTRAS}:
        return f"a layout is padded:N, padding_free:N or packed:N, and may end with +{' or +'.join(EXTRAS)}"
    if program == "Trainer" and kind != "padded":
        return "transformers' Trainer pads: padded:N"
    if kind != "packed" and (int(size) < 1 or examples % int(size)):
        return f"{examples} examples of a step are not so many micro-batches"
    return ""


def parts(layout: str) -> tuple[str, str, list[str]]:
    """How a layout lays rows out, the number behind it, and its extras."""
    base, *extras = layout.split("+")
    kind, _, size = base.partition(":")
    return kind, size, extras


def isolated(
    program: str, layouts: Iterable[str], numbers: str, options: argparse.Namespace, work: Path
) -> Iterator[Contender]:
    """The contenders of these layouts whose examples do not see one another on this device, in this number format."""
    leaking: dict[str, bool] = {}
    for layout in layouts:
        kind = layout.partition(":")[0]
        if kind != "padded" and kind not in leaking:
            leaking[kind] = leaks(kind, numbers, options, work)
        contender = Contender(program, layout, numbers)
        if leaking.get(kind):
            print(f"{contender}: left out, its examples see one another on this device")
        else:
            yield contender


def leaks(layout: str, numbers: str, options: argparse.Namespace, work: Path) -> bool:
    """Whether an example's hidden states change with what stands before it in TRL's batch."""
    command = peer_command(Contender("TRL", f"{layout}:0", numbers), options, work)
    found = json.loads(run([*command, "--check-isolation"], options).output.splitlines()[-1])
    print(f"TRL {layout} {numbers}: hidden states differ by {found['isolation_error']:.1e} from an example's alone "
          f"(by {found['control_error']:.1e} where its examples are made to see one another)")
    return found["isolation_error"] > LEAK * found["control_error"]


def alternate(
    contenders: Sequence[Contender], options: argparse.Namespace, work: Path
) -> dict[Contender, list[Measurement]]:
    """All contenders in turn, `--rounds` times; a peer that fails, as where it needs too much memory, is left out."""
    turns: dict[Contender, list[Measurement]] = {contender: [] for contender in contenders}
    for turn, contender in itertools.product(range(options.rounds), contenders):
        if contender not in turns:
            continue
        measure = schoolhouse if contender.program == "schoolhouse" else peer
        try:
            found = measure(contender, options, work)
        except Failed as failed:
            if contender.program == "schoolhouse":
                raise
            print(f"turn {turn + 1}: {contender}: left out: {failed.brief}", flush=True)
            del turns[contender]
            continue
        turns[contender].append(found)
        print(f"turn {turn + 1}: {contender}: {brief(found)}", flush=True)
    return turns


def brief(found: Measurement) -> str:
    """A measurement in a few words."""
    return f"{found.rate('tokens'):,.0f} tokens/s, {found.peak_mib:,.0f} MiB (others used {found.others:.0%})"


def schoolhouse(contender: Contender, options: argparse.Namespace, work: Path) -> Measurement:
    """One run of our command line, read from its run directory."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        return ours(Path(directory), options.ours, options, work)


def ours(directory: Path, more: Sequence[str], options: argparse.Namespace, work: Path) -> Measurement:
    """One run of our command line into a directory, with more settings."""
    command = [sys.executable, "-m", "schoolhouse", "run", work / "recipe.yaml", f"directory={directory}"]
    finished = run([*command, *more], options)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    steps = tuple(record for record in map(json.loads, lines) if record["kind"] == "step")
    if options.device != "cpu":
        peak = max(step["peak_memory_gib"] for step in steps) * 1024
        return Measurement(0.0, peak, finished.others, steps)
    imports = run([sys.executable, "-c", "import schoolhouse.commands, schoolhouse.train"], options)
    return Measurement(imports.peak_mib, finished.peak_mib, finished.others, steps)


def peer(contender: Contender, options: argparse.Namespace, work: Path, steps: int = -1) -> Measurement:
    """One run of a peer's trainer; of all rows, or of a few steps."""
    finished = run([*peer_command(contender, options, work), "--steps", str(steps)], options)
    found = json.loads(finished.output.splitlines()[-1])
    steps_of_it = tuple(found["steps"])
    if options.device != "cpu":
        return Measurement(0.0, found["device_peak_mib"], finished.others, steps_of_it)
    return Measurement(found["baseline_mib"], finished.peak_mib, finished.others, steps_of_it)


def peer_command(contender: Contender, options: argparse.Namespace, work: Path) -> list[str | Path]:
    """The command line of a measurement of it."""
    layout, size, extras = parts(contender.layout)
    return [
        sys.executable, Path(__file__).with_name("_peer.py"), "--work", work, "--layout", layout, "--size", size,
        "--numbers", contender.numbers, "--examples", str(options.examples), "--optimizer-steps", str(options.steps),
        "--learning-rate", str(inputs.LEARNING_RATE), "--program", contender.program, "--device", options.device,
        "--lora", str(options.lora or 0), *(["--recompute"] if options.recompute else []),
        *(f"--{extra}" for extra in extras),
    ]


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
        lines += [f"MFU: schoolhouse {mfu:.3f}, {best} {mfu / values['tokens/s']:.3f}" for mfu in mfus(turns)]
    return "\n".join(lines)


def mfus(turns: Mapping[Contender, Sequence[Measurement]]) -> list[float]:
    """The median of our own `mfu`, where it is known; a peer's is in proportion, since a token is the same work."""
    (ours,) = (found for contender, found in turns.items() if contender.program == "schoolhouse")
    known = [step["mfu"] for one in ours for step in one.steps[WARM_UP:] if step.get("mfu")]
    return [statistics.median(known)] if known else []


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
    packages = ("torch", "transformers", "trl", "liger_kernel", "flash_attn", "schoolhouse")
    return {
        "options": {key: str(value) for key, value in vars(options).items()}, "rows": dict(facts),
        "machine": {"processor": processor(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: found for name in packages if (found := installed(name))},
        "medians": {str(contender): summary(found) for contender, found in turns.items()},
        "ratios": {str(contender): values for contender, values in ratios(turns).items()},
        "turns": {str(contender): [asdict(one) for one in found] for contender, found in turns.items()},
    }


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

"""`kill -9` at any instant, again and again: the same command goes on, and the result is that of an undisturbed run.

    scripts/torture --kills 200                   every case: {full, LoRA} x {text, images} x {1, 2 processes}
    scripts/torture --kills 16 --fresh            the same by the real command and its launcher, nothing forked
    scripts/torture --kills 10 --cases full-text-1 lora-images-2
    scripts/torture --trainer 20                  the same kills on transformers.Trainer, for comparison

A case is one run, killed over and over until it has its share of the kills: any one of its processes or all of them,
while it starts (1 of 10), between saves (5 of 10) and inside a save (4 of 10, where a half-written checkpoint is on the
disk at the instant of the kill). Every line of metrics that any of these processes ever wrote is compared with the
undisturbed run's, and at the end the weights and moments by SHA-256. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import victims
from victims import Victim

CASES = tuple(f"{way}-{rows}-{ranks}" for way in ("full", "lora") for rows in ("text", "images") for ranks in (1, 2))
RECIPE = """\
model: starter/{student}
data: {{train: [{{path: starter/{lesson}, limit: 64}}]}}
batch: {{examples: 4, tokens: 128}}
train: {{steps: {steps}}}
optim: {{learning_rate: 1e-3}}
checkpoint: {{every: 2}}
{lora}"""
LORA = "lora: {rank: 4, dropout: 0.1}\n"
STUDENTS = {"text": ("qwen3", "arithmetic"), "images": ("qwen3-vl", "sights")}
KINDS = ("save", "step", "step", "save", "start", "step", "save", "step", "step", "save")
"""Where ten kills fall; of fewer, too, a quarter falls inside a save."""


@dataclass(slots=True)
class Found:
    """What the kills of one case met, and what came out."""

    case: str
    kills: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    half_written: int = 0
    """Kills at which a half-written checkpoint was on the disk, of this start or left by the kill before."""
    one_of_two: int = 0
    """Kills of one process of two, or of a launcher alone."""
    continued: int = 0
    """Kills after which the same command went on by itself."""
    done_again: int = 0
    """Steps lost to kills."""
    differing: list[str] = field(default_factory=list)
    """What was not to the bit as in the undisturbed run."""
    seconds: float = 0.0


def main() -> None:
    """Torture every case, print the table, and write it as JSON."""
    options = _options()
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        if options.trainer:
            import torture_trainer

            found = torture_trainer.torture(Path(place), options.trainer, random.Random(options.seed))
            print(torture_trainer.told(found))
            _write(options.json, found)
            return
        if not options.fresh:
            victims.load()
        shares = _shares(options.kills, options.cases)
        results = []
        for case, kills in shares.items():
            results.append(torture(case, kills, Path(place), random.Random(f"{options.seed} {case}"), options.fresh))
            print(row(results[-1]), flush=True)
            _write(options.json, [asdict(one) for one in results])
    print(total(results))
    sys.exit(any(one.differing or one.continued != one.kills for one in results))


def torture(case: str, kills: int, place: Path, draw: random.Random, fresh: bool = False) -> Found:
    """Kill one run so often, and compare it with the same run undisturbed."""
    began = time.monotonic()
    way, rows, ranks = case.split("-")
    page = place / f"{case}.yaml"
    student, lesson = STUDENTS[rows]
    text = RECIPE.format(student=student, lesson=lesson, steps=10 + 6 * kills, lora=LORA if way == "lora" else "")
    page.write_text(text, encoding="utf-8")
    whole, run, screen = place / f"{case}-whole", place / f"{case}-killed", place / f"{case}.txt"
    undisturbed = victims.start(["run", str(page), f"directory={whole}"], int(ranks), screen, fresh=fresh)
    assert not any(undisturbed.ended()), undisturbed.said()
    found, wanted, words = Found(case), victims.lines(whole), ["run", str(page), f"directory={run}"]
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    draw.shuffle(kinds)
    try:
        for kind in kinds:
            _kill(victims.start(words, int(ranks), screen, fresh=fresh), kind, run, draw, found)
            found.differing += [f"step {step}" for step, line in victims.lines(run).items() if wanted[step] != line]
        last = victims.start(words, int(ranks), screen, fresh=fresh)
        if any(last.ended()):
            raise EndedError(last.said())
        found.continued = found.kills
        _compare(run, whole, wanted, found)
    except EndedError as error:
        found.differing.append(str(error))
    found.seconds = time.monotonic() - began
    return found


class EndedError(Exception):
    """A start that should have gone on ended by itself."""


def _kill(victim: Victim, kind: str, run: Path, draw: random.Random, found: Found) -> None:
    """At a random instant of this kind; raises EndedError where the run ended by itself before."""
    if kind == "start":
        time.sleep(draw.random() * 2.0)
    else:
        _wait(victim, lambda: _begun(victim), "training")
        seen = max(victims.lines(run), default=0)
        if kind == "step":
            _wait(victim, lambda: max(victims.lines(run), default=0) > seen, "a step")
            time.sleep(draw.random() * 0.2)
        else:
            _stop_inside_a_save(victim, run, draw)
    inside, every = victims.staged(run), victim.all()
    chosen = draw.choice([every, *([one] for one in every)]) if len(every) > 1 else every
    _wait(victim, lambda: True, "the kill")
    victim.signal(signal.SIGKILL, chosen)
    victim.signal(signal.SIGCONT)  # the peers of one that was killed while all stood still
    victim.ended()
    found.continued = found.kills  # those before: this start has gone on from them
    found.kills += 1
    found.kinds[kind] += 1
    found.one_of_two += chosen != every
    found.half_written += inside
    found.done_again += max(0, max(victims.lines(run), default=0) - _newest(run))


def _stop_inside_a_save(victim: Victim, run: Path, draw: random.Random) -> None:
    """Stand still while a half-written checkpoint is on the disk, a random time after it appeared."""
    while True:
        _wait(victim, lambda: victims.staged(run), "a save", pause=0.0002)
        time.sleep(draw.choice([0.0, draw.random() * 0.03]))
        victim.signal(signal.SIGSTOP)
        if victims.staged(run):
            return
        victim.signal(signal.SIGCONT)


def _begun(victim: Victim) -> bool:
    """Whether it says that it trains; what an earlier save left is gone by then."""
    said = victim.said()
    return "(verified)" in said or "step 1/" in said


def _wait(victim: Victim, seen: Any, what: str, pause: float = 0.002) -> None:
    limit = time.monotonic() + victims.PATIENCE
    while not seen() or not victim.alive():
        if not victim.alive() or time.monotonic() > limit:
            victim.signal(signal.SIGKILL)
            raise EndedError(f"{victim.ended()} before {what}: {victim.said()[-2000:]}")
        time.sleep(pause)


def _newest(run: Path) -> int:
    return max([0, *(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))])


def _compare(run: Path, whole: Path, wanted: Mapping[int, Any], found: Found) -> None:
    """The finished run and the undisturbed one."""
    if victims.lines(run) != wanted:
        found.differing.append("the metrics at the end")
    if victims.last_tensors(run) != victims.last_tensors(whole):
        found.differing.append("the last checkpoint")
    found.differing += [f"left over: {name}" for name in victims.left_over(run)]


def row(found: Found) -> str:
    """One case as a line of the table."""
    kinds = found.kinds
    return (
        f"{found.case:<14} {found.kills:>4} kills: {kinds['start']:>2} starting, {kinds['step']:>3} training,"
        f" {kinds['save']:>3} saving; a half-written checkpoint was there {found.half_written} times,"
        f" {found.one_of_two:>3} took one process of several; {found.continued} continued,"
        f" {len(found.differing)} differences, {found.done_again} steps done again, {found.seconds:.0f} s"
        + "".join(f"\n    differs: {one}" for one in found.differing[:5])
    )


def total(results: list[Found]) -> str:
    """The last line."""
    kills, went_on = sum(one.kills for one in results), sum(one.continued for one in results)
    saving, differing = sum(one.kinds["save"] for one in results), sum(len(one.differing) for one in results)
    return f"{went_on} of {kills} continued, {saving} of them killed inside a save; {differing} differences"


def _shares(kills: int, cases: list[str]) -> dict[str, int]:
    """The kills shared out over the cases."""
    return {case: kills // len(cases) + (number < kills % len(cases)) for number, case in enumerate(cases)}


def _write(path: str | None, value: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(value, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="over all cases (default 200)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--fresh", action="store_true", help="the real command each time, nothing forked")
    parser.add_argument("--trainer", type=int, default=0, metavar="N", help="instead: N kills of transformers.Trainer")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default 0)")
    parser.add_argument("--json", metavar="FILE", help="where the figures are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()

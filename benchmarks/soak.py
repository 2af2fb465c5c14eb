"""A long run of a tiny student, and many starts and stops: does anything grow, and is anything left?

    python benchmarks/soak.py --steps 20000 --cycles 50

Of the long run: resident memory and open files, looked at once a second after its first tenth, and how step times near
its end spread beside those near its beginning. Of the cycles (started, stopped by SIGTERM after a step or two): the
processes, shared memory and temporary files that are there afterwards and were not there before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import victims

PAGE = """\
model: starter/qwen3
data: {{train: [{{path: starter/arithmetic, limit: 5000}}]}}
batch: {{examples: 2, tokens: 512}}
train: {{steps: {steps}}}
optim: {{learning_rate: 1e-4}}
checkpoint: {{every: {every}}}
"""
SHARED = Path("/dev/shm")


def main() -> None:
    """Soak, cycle, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="of the long run (default 20000)")
    parser.add_argument("--cycles", type=int, default=50, help="starts and stops (default 50)")
    parser.add_argument("--json", metavar="FILE", help="where the figures are written")
    options = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        os.environ |= {"XDG_CACHE_HOME": f"{place}/cache", "TMPDIR": f"{place}/tmp"}
        tempfile.tempdir = None
        (Path(place) / "tmp").mkdir()
        victims.load()
        found = {"long": soak(Path(place), options.steps), "left": cycles(Path(place), options.cycles)}
    print(json.dumps(found, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


def soak(place: Path, steps: int) -> dict[str, Any]:
    """One run to its end."""
    page, run = place / "long.yaml", place / "long"
    page.write_text(PAGE.format(steps=steps, every=max(1, steps // 20)), encoding="utf-8")
    victim = victims.start(["run", str(page), f"directory={run}"], 1, place / "long.txt")
    looks, begun = [], False
    while victim.alive():  # from then on its records are not read: that takes longer as they grow, and its core
        begun = begun or max(victims.lines(run), default=0) >= steps // 10
        if begun:
            looks.append(_look(victim.processes[0]))
        time.sleep(1.0)
    assert victim.ended() == [0], victim.said()
    looks = looks[:-2]  # the last ones may have met the end
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    seconds = [record["seconds"] for record in records if record["kind"] == "step"][steps // 10 :]
    quarter = len(seconds) // 4
    first, last = _spread(seconds[:quarter]), _spread(seconds[-quarter:])
    return {
        "steps": steps, "resident_mib": [one[0] for one in (looks[0], looks[-1])],
        "resident_grown": looks[-1][0] / looks[0][0] - 1, "files": sorted({one[1] for one in looks}),
        "median_seconds": [statistics.median(seconds[:quarter]), statistics.median(seconds[-quarter:])],
        "p99_over_p50": [first, last], "drift": last / first - 1,
    }


def _look(process: int) -> tuple[float, int]:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{process}/fd").iterdir()))


def _spread(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98] / statistics.median(seconds)


def cycles(place: Path, number: int) -> dict[str, Any]:
    """Start and stop one run, on one process and on two in turn; what is there that was not."""
    page, run = place / "cycled.yaml", place / "cycled"
    page.write_text(PAGE.format(steps=1_000_000, every=1000), encoding="utf-8")
    before = _there(place)
    stopped = 0
    for cycle in range(number):
        victim = victims.start(["run", str(page), f"directory={run}"], 1 + cycle % 2, place / "cycled.txt")
        seen, limit = max(victims.lines(run), default=0), time.monotonic() + victims.PATIENCE
        while max(victims.lines(run), default=0) <= seen and victim.alive() and time.monotonic() < limit:
            time.sleep(0.01)
        victim.signal(signal.SIGTERM)
        stopped += all(code == 75 for code in victim.ended())
    after = _there(place)
    return {"cycles": number, "stopped": stopped, **{name: sorted(after[name] - before[name]) for name in before}}


def _there(place: Path) -> dict[str, set[str]]:
    """Processes of this program, which alone could hold its ports; temporary files; shared memory."""
    left = [*(place / "tmp").iterdir(), *(place / "cycled").rglob(".tmp-*"), *(place / "cache").rglob(".tmp-*")]
    return {
        "processes": set(_processes(str(place))), "files": {str(one) for one in left},
        "shared": {one.name for one in SHARED.iterdir()} if SHARED.is_dir() else set(),
    }


def _processes(place: str) -> Iterator[str]:
    """Those that were forked from this one, and those that they started."""
    own = Path("/proc/self/cmdline").read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = (process / "cmdline").read_bytes() == own or place.encode() in (process / "environ").read_bytes()
            if mine and process.name != str(os.getpid()):
                yield process.name


if __name__ == "__main__":
    main()

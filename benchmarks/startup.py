"""Seconds from the command to the end of the first step: cold (nothing prepared), warm (rows in the cache), and stopped
and started again (a checkpoint to read).

    python benchmarks/startup.py examples/sft/gsm8k/starter.yaml [key=value …]

Each is the real command in a process of its own, with validation and exam as the recipe has them unless overridden.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL = 0.02
"""Seconds between two looks at the run's metrics."""


def main() -> None:
    """Start three times, print seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="key=value, put over the recipe's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = {
            "cold": seconds(options, Path(work), "one"), "warm": seconds(options, Path(work), "two"),
            "continued": seconds(options, Path(work), "two"),
        }
    for name, took in found.items():
        print(f"{name:<10} {took:6.1f} s to the first step")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def seconds(options: argparse.Namespace, work: Path, name: str) -> float:
    """Start the recipe in a directory of `work` and stop it after the first step that it adds."""
    metrics = work / name / "metrics.jsonl"
    before = steps(metrics)
    command = [sys.executable, "-m", "schoolhouse", "run", options.recipe, f"directory={work / name}",
               *options.settings]
    began = time.perf_counter()
    said = work / f"{name}.txt"
    with said.open("wb") as screen:
        process = subprocess.Popen(
            command, env={**os.environ, "XDG_CACHE_HOME": str(work / "cache")}, stdout=screen, stderr=screen
        )
    while steps(metrics) == before:
        if process.poll() is not None:
            sys.exit(f"the run ended before its first step:\n{said.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(POLL)
    took = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)  # it saves and ends, so that it can go on
    process.wait()
    return took


def steps(metrics: Path) -> int:
    """The steps that a run has noted."""
    return metrics.read_text(encoding="utf-8").count('"kind": "step"') if metrics.exists() else 0


if __name__ == "__main__":
    main()

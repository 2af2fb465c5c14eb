"""Commands that are measured from outside: each runs to its end in a process of its own, on a quiet machine."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.1
"""Others use less than this share of the processors on a quiet machine."""
MIB = 1024 * 1024


class Failed(Exception):
    """A command ended badly; what it was, and its last words."""

    @property
    def brief(self) -> str:
        """Its last line."""
        return str(self).rstrip().splitlines()[-1][:160]


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has run to its end."""

    output: str
    peak_mib: float
    others: float
    """The share of the machine's processors that other programs used meanwhile."""


def run(command: Sequence[str | Path], options: argparse.Namespace) -> Finished:
    """Run a command to its end; raises Failed where it fails."""
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
            words = errors.read()[-3000:]
            raise Failed(f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{words}")
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


def processor() -> str:
    """The processor's name, where Linux tells it."""
    place = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", place.read_text()) if place.is_file() else None
    return found[1] if found else platform.processor()

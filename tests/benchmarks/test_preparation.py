"""The command that measures preparation: it runs, counts what it should, and its rows are what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from schoolhouse import places

COMMAND = Path(__file__).parents[2] / "benchmarks" / "preparation.py"


def test_it_measures(tmp_path: Path) -> None:
    """Two sizes, each in a process of its own: rows counted, rates positive, the table printed."""
    student, out = places.model_directory("starter/qwen3"), tmp_path / "out.json"
    arguments = [COMMAND, "--tokenizer", student, "--rows", "20", "300", "--json", out]
    done = subprocess.run([sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [one["rows"] for one in found] == [20, 300] and len(done.stdout.splitlines()) == 2
    assert all(one["tokens"] > 50 * one["rows"] and one["mb_per_s"] > 0 < one["tokenizer_mb_per_s"] for one in found)
    assert 600 < 1e6 * found[1]["megabytes"] / 300 < 1500, "about 1 kB a row"

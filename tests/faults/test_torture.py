"""F1: ten kills by the torture command; 200 are behind `scripts/torture --kills 200`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).parents[2] / "benchmarks" / "torture.py"


def test_f1_killed_ten_times_it_is_the_run_that_was_not_killed(tmp_path: Path) -> None:
    """Text with all weights on two processes, images with adapters on one: every kill is continued, to the bit."""
    words = ["--kills", "10", "--cases", "full-text-2", "lora-images-1", "--json", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, TORTURE, *words], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [(one["kills"], one["continued"], one["differing"]) for one in found] == [(5, 5, [])] * 2
    assert sum(one["half_written"] for one in found) >= 3, "a quarter at least falls inside a save"
    assert "10 of 10 continued" in done.stdout

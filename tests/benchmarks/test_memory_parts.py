"""What `benchmarks/memory.py` foresees is what is held."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from test_run import write_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("settings", [[], ["model.activation_checkpointing=true"], ["model.precision=bfloat16"]])
def test_what_is_foreseen_is_what_is_held(settings: list[str], tmp_path: Path) -> None:
    """States to the byte, but for one count of steps a tensor; activations within 30 %: on the device `meta` other
    kernels of attention and of rounding keep more for themselves.
    """
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.measure(write_recipe(tmp_path), settings)
    parts = found["parts"]
    for name in ("weights, masters", "gradients"):
        assert parts[name][0] == parts[name][1]
    assert parts["moments"][0] == pytest.approx(parts["moments"][1], rel=0.001)
    assert parts["kept by forward for backward"][0] == pytest.approx(parts["kept by forward for backward"][1], rel=0.3)
    assert found["targets"] > 50 and parts["peak"][2] > parts["program, rows and tokenizer"][2] > 0

"""What a layout costs, measured: bytes sent by a step equal the formulas, bytes kept for backward fall with the
Ulysses degree, and a conversation four times too long for one process trains on four."""

from __future__ import annotations

import group
import pytest
from measures import WIDTH

FLOAT = 4
TOKENS = 64


def exchanged(degree: int) -> int:
    """Bytes that a process sends to its Ulysses group in one step.

    Per layer and direction (U - 1) / U of S / U x (H K + 2 H' K + H K) values, H' the repeated key and value heads.
    """
    heads, size = WIDTH["num_attention_heads"], WIDTH["head_dim"]
    keys = WIDTH["num_key_value_heads"] * max(1, degree // WIDTH["num_key_value_heads"])
    values = TOKENS // degree * size * (2 * heads + 2 * keys)
    return 2 * WIDTH["num_hidden_layers"] * values * FLOAT * (degree - 1) // degree


def check(found: dict[str, int], processes: int, degree: int) -> None:
    """Blocks are gathered for forward and again for backward, the rest once; every gradient is scattered once."""
    share = FLOAT * (processes - 1) / processes
    assert found.get("alltoall_base_", 0) == (exchanged(degree) if degree > 1 else 0)
    assert found["_allgather_base_"] == share * (found["parameters"] + found["blocks"])
    assert found["_reduce_scatter_base_"] == share * found["parameters"]


def test_two_processes() -> None:
    """Traffic as the formulas say; the same long conversation keeps at most 60 % on each of two processes."""
    found = group.run("measures.py", 2, ["traffic 1x1x2", "traffic 1x2x1", "kept 2x1x1", "kept 1x1x2", "formats 1x2x1"])
    check(found["traffic 1x1x2"], 2, 2)
    check(found["traffic 1x2x1"], 2, 1)
    print(f"kept for backward: {found['kept 1x1x2'] / found['kept 2x1x1']:.1%} of one process")
    assert found["kept 1x1x2"] <= 0.6 * found["kept 2x1x1"]
    assert found["formats 1x2x1"] == [["torch.bfloat16"], ["torch.float32"]], "half the memory for what is frozen"


@pytest.mark.slow
def test_four_processes() -> None:
    """Where 2,000 tokens fit and 8,000 do not, four processes train 8,000 under the same cap of memory."""
    found = group.run("measures.py", 4, ["traffic 1x1x4", "fits 4x1x1 one", "fits 4x1x1 four", "fits 1x1x4 four"])
    check(found["traffic 1x1x4"], 4, 4)
    assert [found[f"fits {case}"] for case in ("4x1x1 one", "4x1x1 four", "1x1x4 four")] == [True, False, True]

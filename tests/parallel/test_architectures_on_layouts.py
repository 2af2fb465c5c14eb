"""Every architecture × {full, LoRA} with a sequence shared by two processes (U = 2), to 1e-9 in float64.

A family with fewer key and value heads than processes (Gemma: one) has them repeated.
"""

from __future__ import annotations

import architectures
import group


def test_every_architecture_shares_its_sequences() -> None:
    found = group.run("architectures.py", 2)
    assert list(found) == list(architectures.CASES)
    assert {name: worst for name, worst in found.items() if not worst <= 1e-9} == {}

"""Muon moves cut weights as it moves whole ones: in float64 to 1e-9 of the way, each matrix computed once.

In float32 gradients differ by about 1e-7 of the longest, and the iteration lengthens short directions by up to
3.4445^5 = 485: 1e-4 of the way. What is seen is 1e-14 and 2e-6.
"""

from __future__ import annotations

import group
import muon
import pytest


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_on_layouts(world: int) -> None:
    found = group.run("muon.py", world)
    assert list(found) == list(muon.named(world))
    once = {name: number for name, number in found.items() if "once" in name}
    assert once == dict.fromkeys(once, 0)
    worst = {name: value for name, value in found.items() if name not in once}
    assert {name: value for name, value in worst.items() if not value <= (1e-4 if "float32" in name else 1e-9)} == {}

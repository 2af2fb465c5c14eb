"""One gradient equation for images on every layout of two processes, to 1e-9 in float64: shards, replicas, Ulysses."""

from __future__ import annotations

import group
import sights


def test_images_on_layouts_of_two_processes() -> None:
    found = group.run("sights.py", 2)
    assert list(found) == list(sights.CASES)
    assert {name: worst for name, worst in found.items() if not worst <= 1e-9} == {}

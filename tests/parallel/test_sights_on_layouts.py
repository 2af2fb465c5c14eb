"""One gradient equation for images on every layout, to 1e-9 in float64: shards, replicas, Ulysses.

With Ulysses the images of a pack are divided: each is encoded once, by the process that has least to do.
"""

from __future__ import annotations

import group
import pytest
import sights
from hypothesis import given
from hypothesis import strategies as st

from schoolhouse.shares import share_out


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_images_on_layouts(world: int) -> None:
    found = group.run("sights.py", world)
    assert list(found) == list(sights.named(world))
    shown, wanted, uneven, decoded, images = found.pop("encoded")
    assert shown == wanted and uneven <= wanted / 4
    assert decoded == images, "each image by one process alone"
    assert {name: worst for name, worst in found.items() if not worst <= 1e-9} == {}


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 9))
def test_images_are_shared_out_evenly(costs: list[int], degree: int) -> None:
    """Each image once; nobody has more than the mean and one image (the dearest comes first, to the one with least)."""
    shares = share_out(costs, degree)
    assert sorted(image for images in shares for image in images) == list(range(len(costs)))
    dearest = max(sum(costs[image] for image in images) for images in shares)
    assert dearest <= sum(costs) / degree + max(costs, default=0) * (1 - 1 / degree) + 1e-9

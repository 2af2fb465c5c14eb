"""One gradient equation on every layout: replicas, shards and Ulysses groups of processes against the plain loop.

Tolerances as in `test_invariance.py`: float64 to 1e-9 of the longest gradient (sums of a few thousand terms in another
order differ by about 1e-13 of the largest), float32 to 1e-5. What is seen is 1e-15 and 7e-7.
"""

from __future__ import annotations

import group
import matrix
import pytest

CORE = (
    "tied, uneven, 1x2x1", "multi-query, uneven, 1x1x2", "untied, silent, 2x1x1", "mixture, few, 1x2x1",
    "latent, uneven, 1x1x2", "tied, branches, 1x1x2, filled up", "soft caps, branches, 2x1x1",
    "three heads of keys, uneven, 1x1x2, float32", "tied, uneven, 1x1x2, float32 recomputed",
    "tied, uneven, 1x1x2, blocks together", "4 bits, 1x2x1, float32 recomputed", "4 bits, 1x1x2, float32 recomputed",
)
"""One case of every kind for the normal suite; `--slow` runs all of them on 2 and 4 processes."""


def check(found: dict[str, float], names: list[str]) -> None:
    assert list(found) == names
    tolerance = {name: 1e-5 if "float32" in name else 1e-9 for name in names}
    assert {name: worst for name, worst in found.items() if not worst <= tolerance[name]} == {}


def test_invariance_of_the_core() -> None:
    check(group.run("matrix.py", 2, CORE), list(CORE))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_invariance_of_layouts(world: int) -> None:
    check(group.run("matrix.py", world), list(matrix.named(world)))

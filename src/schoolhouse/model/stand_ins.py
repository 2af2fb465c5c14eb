"""Rules that stand in for transformers' plain PyTorch inside its layers, where no kernel of a package does."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator

from torch import nn

from schoolhouse.model import delta, state_space

RULES = {
    "torch_chunk_gated_delta_rule": ("fla", delta.gated_delta_rule),
    "mamba2_chunk_scan": ("mamba_ssm", state_space.chunk_scan),
}
"""By transformers' name for a rule: the package whose kernels it takes where that is installed, and ours."""


@functools.cache
def of(kind: type[nn.Module]) -> dict[str, Callable]:
    """The rules that stand in for those that a kind of layer of transformers calls by name, and no kernel serves."""
    if not kind.__module__.startswith("transformers.models."):
        return {}
    names = vars(sys.modules[kind.__module__])
    return {name: rule for name, (package, rule) in RULES.items()
            if name in names and importlib.util.find_spec(package) is None}


@contextlib.contextmanager
def taken(kind: type[nn.Module]) -> Iterator[None]:
    """Inside, a layer of this kind computes its rule as it is here; one at a time, as layers are computed."""
    ours = of(kind)
    if not ours:
        yield
        return
    names = vars(sys.modules[kind.__module__])
    theirs = {name: names[name] for name in ours}
    names.update(ours)
    try:
        yield
    finally:
        names.update(theirs)

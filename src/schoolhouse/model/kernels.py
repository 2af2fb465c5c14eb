"""Liger's fused kernels (Hsu et al., 2024, arXiv:2410.10989), as an extra on CUDA: in force, or refused."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from schoolhouse.errors import ConfigError


def fuse(model: PreTrainedModel, place: torch.device) -> int:
    """Give the norms, rotary positions and gated layers of `model` their fused form; how many modules have it.

    Our loss is fused already, and Liger's stays off. Raises ConfigError where nothing would be fused.
    """
    if place.type != "cuda" or find_spec("liger_kernel") is None:
        missing = "liger-kernel is not installed" if place.type == "cuda" else f"the device is {place}"
        raise ConfigError(
            f"model.liger is set, and {missing}",
            required="a CUDA device and the extra `schoolhouse[liger]`", where="model.liger",
            remedy="pip install 'schoolhouse[liger]' on a CUDA machine, or set model.liger=false",
        )
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    before = _forwards(model)
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
    fused = sum(before[name] != now for name, now in _forwards(model).items())
    if not fused:
        raise ConfigError(
            f"Liger has no kernels for {type(model).__name__}", required="an architecture that Liger knows",
            where="model.liger", remedy="set model.liger=false",
        )
    return fused


def _forwards(model: PreTrainedModel) -> dict[str, str]:
    """The function each module computes with."""
    return {name: module.forward.__func__.__module__ for name, module in model.named_modules()}

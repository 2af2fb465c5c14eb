"""Float64 all the way: transformers casts norms and softmax to float32, which hides differences below 1e-7.

Inside the mode a cast of a float64 tensor to float32 does nothing, for the oracle and for us alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CASTS = (torch.Tensor.to, torch.Tensor.type)
SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


class TrueFloat64(TorchFunctionMode):
    """Leaves float64 tensors as they are where a model would narrow them."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if wide and function is torch.Tensor.float:
            return args[0]
        if wide and function in CASTS and torch.float32 in (*args[1:], kwargs.get("dtype")):
            return args[0]
        if wide and function in SOFTMAX and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)

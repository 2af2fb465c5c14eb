"""AdamW over float32 master weights, and the learning rate as a pure function of the step.

In float32 the masters are the model's own parameters. In bfloat16 the model holds bfloat16 copies for its matrix
products, while masters, gradient sums and moments stay in float32: an update far smaller than a bfloat16 step of a
weight is kept, not rounded away (Micikevicius et al., 2018, arXiv:1710.03740).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from schoolhouse.config import Optim
from schoolhouse.parallel import fsdp

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, by torch's names."""


class Optimizer:
    """The trained parameters by name: their float32 masters, gradients and moments."""

    def __init__(self, model: nn.Module, settings: Optim, precision: str) -> None:
        self._copies = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._settings = settings
        self.masters: Mapping[str, Tensor] = self._copies
        if precision == "bfloat16":
            self.masters = {name: copy.detach().clone() for name, copy in self._copies.items()}
            _narrow(model)
            for name, copy in self._copies.items():
                copy.register_post_accumulate_grad_hook(_move_gradient(self.masters[name]))
        self._adamw = torch.optim.AdamW(
            self._groups(), lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
        )

    def _groups(self) -> list[dict]:
        """Matrices decay, vectors (norms, biases) do not."""
        tensors = list(self.masters.values())
        return [
            {"params": [one for one in tensors if one.ndim >= 2], "weight_decay": self._settings.weight_decay},
            {"params": [one for one in tensors if one.ndim < 2], "weight_decay": 0.0},
        ]

    def clip(self) -> Tensor:
        """The norm of the whole gradient before clipping (scalar); longer gradients are shortened to `optim.clip`."""
        tensors = list(self.masters.values())
        norm = nn.utils.get_total_norm([one.grad for one in tensors if one.grad is not None])
        if self._settings.clip is not None:
            nn.utils.clip_grads_with_norm_(tensors, self._settings.clip, norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW update; gradients are gone afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_copies()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 masters by the model's parameter names."""
        return ((name, master.detach()) for name, master in self.masters.items())

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state by `moment.parameter`."""
        for name, master in self.masters.items():
            for moment, value in self._adamw.state.get(master, {}).items():
                yield f"{moment}.{name}", value

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Put a saved state back, exactly: of a master that is cut, the part that this process holds."""
        for name, master in self.masters.items():
            master.copy_(fsdp.as_cut(weights[name], master))
            if f"step.{name}" in moments:  # a parameter that never had a gradient has no moments
                state = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS}
                self._adamw.state[master] = {
                    moment: fsdp.as_cut(value.to(master.device), master if value.ndim else value)
                    for moment, value in state.items()
                }
        self._write_copies()

    @torch.no_grad()
    def _write_copies(self) -> None:
        for name, master in self.masters.items():
            if self._copies[name] is not master:
                self._copies[name].copy_(master)


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of `steps`: a linear rise to the peak, then down to `minimum` x peak."""
    warmup = warmup_steps(settings, steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[settings.schedule]
    return settings.learning_rate * (settings.minimum + (1 - settings.minimum) * shape)


def warmup_steps(settings: Optim, steps: int) -> int:
    """The number of steps in which the learning rate rises."""
    return round(settings.warmup * steps)


def _narrow(model: nn.Module) -> None:
    """Parameters to bfloat16; buffers (rotary frequencies) keep the precision their author chose."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _move_gradient(master: Tensor):
    """Add a copy's finished gradient to its master's float32 sum, and free it."""

    @torch.no_grad()
    def move(copy: Tensor) -> None:
        wide = copy.grad.to(master.dtype)
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        copy.grad = None

    return move

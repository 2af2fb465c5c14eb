"""AdamW, or Muon for matrices, over float32 master weights; the learning rate as a pure function of the step.

In float32 the masters are the model's own parameters. In bfloat16 the model holds bfloat16 copies for its matrix
products, while masters, gradient sums and moments stay in float32: an update far smaller than a bfloat16 step of a
weight is kept, not rounded away (Micikevicius et al., 2018, arXiv:1710.03740).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from schoolhouse import crossing
from schoolhouse.config import Optim
from schoolhouse.errors import ConfigError
from schoolhouse.model import eightbit, fourbit, lora, sight
from schoolhouse.model.muon import Muon
from schoolhouse.parallel import fsdp

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""The optimizers' state of a parameter, by torch's names: AdamW's, and Muon's."""
ADAPTERS = (1e-4, 4e-4)
"""Learning rates that adapters usually take with AdamW, ten times those of whole weights."""


class Sums:
    """The float32 sums of gradients that we make ourselves: of parameters with copies, and those added to in place."""

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.stay = False
        """Whether a sum leaves its memory to that of the next step: on a processor fresh pages take longer than what is
        written to them. Right where a step has several micro-batches, which find gradients in memory anyway."""
        self._masters = masters
        self._made: set[str] = set()
        self._free: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """The sum so far, to be added to."""
        master = self._masters[name]
        if master.grad is None:
            master.grad = self._memory(name).zero_()
        return master.grad

    @torch.no_grad()
    def take(self, name: str, copy: Tensor) -> None:
        """Add a copy's finished gradient, and free it."""
        if copy.grad is None:  # it was added to the master's in place
            return
        master = self._masters[name]
        if master.grad is None:
            master.grad = self._memory(name).copy_(copy.grad)
        else:  # of an embedding, the rows it met, which are added to a sum that is there
            master.grad.add_(copy.grad.to(master.dtype))
        copy.grad = None

    def _memory(self, name: str) -> Tensor:
        """Of any content."""
        self._made.add(name)
        return self._free.pop(name) if name in self._free else torch.empty_like(self._masters[name])

    def leave(self) -> None:
        """The step is done, and sums are of no use; their memory is, where it is to stay."""
        made = {name: self._masters[name].grad for name in self._made if self.stay}
        self._free |= {name: gradient for name, gradient in made.items() if gradient is not None}

    def clear(self) -> None:
        """Give up what is kept for the next step."""
        self._free.clear()


class Optimizer:
    """The trained parameters by name: their float32 masters, gradients and moments."""

    def __init__(self, model: nn.Module, settings: Optim, precision: str) -> None:
        self._copies = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._settings = settings
        self.masters: Mapping[str, Tensor] = self._copies
        self._names = {copy: name for name, copy in self._copies.items()}
        if precision == "bfloat16":
            self.masters = {name: copy.detach().clone() for name, copy in self._copies.items()}
            narrow(model)
        self.sums = Sums(self.masters)
        for name, copy in self._copies.items():
            if copy is not self.masters[name]:  # the hook knows no copy: a circle through it is never collected
                copy.register_post_accumulate_grad_hook(functools.partial(self.sums.take, name))
        self.matrices = hidden_matrices(model) & self.masters.keys() if settings.name == "muon" else set()
        """The names of the parameters that Muon moves."""
        self.factors = factors(self.masters, settings.rates)
        """What the learning rate is multiplied with, by parameter name."""
        rest = self._groups(self.masters.keys() - self.matrices)
        self._optimizers: list[torch.optim.Optimizer] = [_adamw(rest, settings)]
        if self.matrices:
            self._optimizers.append(Muon(self._groups(self.matrices), settings.momentum))

    def _groups(self, names: Iterable[str]) -> list[dict]:
        """Tensors that share a factor and a decay: matrices decay; vectors (norms, biases), and the biases
        of experts, do not."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, master in self.masters.items():
            if name in names:
                decay = self._settings.weight_decay if _is_matrix(master) and not name.endswith("bias") else 0.0
                groups.setdefault((self.factors[name], decay), []).append(master)
        return [
            {"params": tensors, "factor": factor, "weight_decay": decay} for (factor, decay), tensors in groups.items()
        ]

    def _state(self, name: str) -> dict[Tensor, dict[str, Tensor]]:
        """The state of the optimizer that moves a parameter."""
        return self._optimizers[name in self.matrices].state

    def describe(self) -> str:
        """What moves the weights, for the table of what is in force."""
        rest = len(self.masters) - len(self.matrices)
        name = "AdamW with 8-bit moments" if self._settings.name == "adamw8bit" else "AdamW"
        text = f"Muon for {len(self.matrices)} matrices, {name} for {rest} other tensors" if self.matrices else name
        counts = {factor: list(self.factors.values()).count(factor) for factor in self.factors.values()}
        rates = ", ".join(f"{counts[factor]} tensors × {factor:g}" for factor in sorted(counts))
        return f"{text}; learning rates: {rates}" if self._settings.rates else text

    def clip(self) -> Tensor:
        """The norm of the whole gradient before clipping (scalar); longer gradients are shortened to `optim.clip`."""
        tensors = list(self.masters.values())
        norm = nn.utils.get_total_norm([one.grad for one in tensors if one.grad is not None])
        if self._settings.clip is not None:
            nn.utils.clip_grads_with_norm_(tensors, self._settings.clip, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def total(self, parameter: Tensor) -> Tensor | None:
        """The sum of a trained parameter's gradients so far, in float32, to be added to; None for one not trained."""
        name = self._names.get(parameter)
        return None if name is None else self.sums.of(name)

    def forget(self) -> None:
        """Drop the gradient and its memory; weights and moments stay what they are."""
        self.sums.clear()
        for master in self.masters.values():
            master.grad = None

    def begin_again(self) -> None:
        """Drop gradients and moments, as before the first step."""
        self.forget()
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def step(self, learning_rate: float, finite: Tensor | None = None) -> None:
        """One update, or none where `finite` (bool scalar) is given and not true; gradients are gone afterwards.

        AdamW asks a `finite` that is where the weights are on the device; other optimizers wait for it.
        """
        if finite is None or self._asks(finite):
            self._update(learning_rate, finite)
        elif finite:
            self._update(learning_rate, None)
        self.sums.leave()
        for master in self.masters.values():
            master.grad = None

    def _asks(self, finite: Tensor) -> bool:
        """Whether the update itself looks at the flag: torch's kernel does on a processor and where things queue."""
        looks = self._settings.name == "adamw" and (finite.device.type == "cpu" or crossing.is_queue(finite.device))
        return looks and all(one.device == finite.device for one in self.masters.values())

    def _update(self, learning_rate: float, finite: Tensor | None) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(learning_rate * group["factor"])
                else:
                    group["lr"] = learning_rate * group["factor"]
            optimizer.found_inf = None if finite is None else (~finite).float()  # as torch's own GradScaler tells it
            self._move(optimizer)
        self._write_copies()

    def as_in_a_later_step(self, *, gradients: bool) -> None:
        """Moments of every parameter, all 0, by an update that moves nothing; and `gradients`, all 0, where wanted."""
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        zeros = [master.grad for master in self.masters.values()]
        self.step(0.0)
        for master, zero in zip(self.masters.values(), zeros, strict=True):
            master.grad = zero if gradients else None

    def later_bytes(self, place: torch.device, *, gradients: bool) -> int:
        """Of this process, what moments, and `gradients` where wanted, take on a device."""
        own = {name: fsdp.own_part(master) for name, master in self.masters.items()}
        return round(sum(
            one.numel() * ((4 if gradients else 0) + self._moments_of_a_weight(name))
            for name, one in own.items() if one.device.type == place.type
        ))

    def _move(self, optimizer: torch.optim.Optimizer) -> None:
        if self._settings.name == "adamw8bit":
            eightbit.step(optimizer)
        else:
            optimizer.step()

    def saved_bytes(self) -> int:
        """Bytes of weights and moments in a checkpoint, of all processes together."""
        return round(sum(
            master.numel() * (4 + self._moments_of_a_weight(name)) for name, master in self.masters.items()
        ))

    def _moments_of_a_weight(self, name: str) -> float:
        """Bytes: two of AdamW, one of Muon."""
        each = 1.0 if self._settings.name == "adamw8bit" else 4.0
        return each * (1 if name in self.matrices else 2)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 masters by the model's parameter names."""
        return ((name, master.detach()) for name, master in self.masters.items())

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizers' state by `moment.parameter`."""
        for name, master in self.masters.items():
            for moment, value in eightbit.apart(self._state(name).get(master, {})):
                yield f"{moment}.{name}", value

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Put a saved state back, exactly: of a master that is cut, the part that this process holds."""
        for name, master in self.masters.items():
            master.copy_(fsdp.as_cut(weights[name], master))
            state = {moment: moments[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in moments}
            if self._settings.name == "adamw8bit":
                state |= eightbit.together(name, moments)
            if state:  # a parameter that never had a gradient has no moments
                self._state(name)[master] = {
                    moment: fsdp.as_cut(value.to(master.device), master if value.ndim else value)
                    for moment, value in state.items()
                }
        self._write_copies()

    @torch.no_grad()
    def _write_copies(self) -> None:
        for name, master in self.masters.items():
            if self._copies[name] is not master:
                self._copies[name].copy_(master)


def _is_matrix(master: Tensor) -> bool:
    """Whether a tensor is more than a vector; one written in more axes, such as a decay [1, 1, H, 1], is not."""
    return master.ndim == 2 or sum(side > 1 for side in master.shape) > 1


def hidden_matrices(model: nn.Module) -> set[str]:
    """The names of the matrices between layers: of linear modules, but not the head, whose rows are tokens."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear))
    return {f"{name}.weight" for name, module in linear if module is not head}


def factors(names: Iterable[str], rates: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter's learning rate: that of the first of `rates` which names its part or is found in
    its name; 1 where none does. Raises ConfigError for one that decides nothing."""
    found = {}
    reached = set()
    for name in names:
        plain = lora.plain_name(name)
        first = next((one for one in rates if one == sight.part_of(plain) or re.search(one, plain)), None)
        found[name] = 1.0 if first is None else rates[first]
        reached.add(first)
    for one in rates:
        if one not in reached:
            raise ConfigError(
                f"{one!r} decides no trained parameter's learning rate",
                required="vision, projector, language, or a regex found in names that no earlier one matches",
                where="optim.rates", remedy=f"remove it, or look at names such as {next(iter(found), 'none')}",
            )
    return found


def _adamw(groups: list[dict], settings: Optim) -> torch.optim.Optimizer:
    groups = groups or [{"params": [], "factor": 1.0}]  # where another optimizer moves everything
    common = {"lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    if settings.name == "adamw8bit":
        return eightbit.adamw(groups, **common)
    return torch.optim.AdamW(groups, **common, fused=True)


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of `steps`: a linear rise to the peak, then down to `minimum` x peak. A single
    step has the peak: it would be the last, and try nothing."""
    if steps == 1:
        return settings.learning_rate
    warmup = warmup_steps(settings, steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    first = warmup if settings.falling is None else steps - falling_steps(settings, steps)
    done = max(0, step - first) / max(1, steps - first)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}.get(settings.schedule, 1 - done)
    return settings.learning_rate * (settings.minimum + (1 - settings.minimum) * shape)


def told(settings: Optim, steps: int, *, adapters: bool) -> str:
    """The learning rate of a run of so many steps, in words, with what adapters usually take where it is far less."""
    warm, last = warmup_steps(settings, steps), settings.learning_rate * settings.minimum
    down = f"then down to {last:.3g} ({settings.schedule})"
    if settings.schedule == "constant":
        down = "then constant"
    elif settings.falling is not None:
        down = f"then constant, in the last {falling_steps(settings, steps):,} down to {last:.3g} (wsd)"
    hint = f"; adapters usually take {ADAPTERS[0]:g} to {ADAPTERS[1]:g}"
    low = adapters and settings.learning_rate < ADAPTERS[0] / 2
    return f"up to {settings.learning_rate:.3g} in {warm:,} of {steps:,} steps, {down}{hint if low else ''}"


def warmup_steps(settings: Optim, steps: int) -> int:
    """The number of steps in which the learning rate rises."""
    return round(settings.warmup * steps)


def falling_steps(settings: Optim, steps: int) -> int:
    """The number of steps at the end in which the schedule wsd falls: at least one, and none of warm-up."""
    return min(max(1, round(settings.falling * steps)), steps - warmup_steps(settings, steps))


def narrow(model: nn.Module) -> None:
    """Parameters to bfloat16; buffers (rotary frequencies) keep the precision their author chose."""
    for parameter in model.parameters():
        if not fourbit.is_narrow(parameter):
            parameter.data = parameter.data.to(torch.bfloat16)


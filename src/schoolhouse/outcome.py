"""What a step came to: summed up on the device, read when it has come from there, and written down.

A processor is done when a step ends. An accelerator is told the next step first, and the one before is read meanwhile,
so that it never waits for a program that writes down numbers. A step without finite numbers has moved nothing: that is
decided on the device, and the one told after it stands on the same weights as if it had been left out.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schoolhouse import crossing, memory
from schoolhouse.crossing import Awaited, Moment
from schoolhouse.errors import NonFiniteError
from schoolhouse.model.load import Student
from schoolhouse.run import Run
from schoolhouse.types import PlannedStep, Step

NAMED_ROWS = 8
"""Rows of a failed step that an error names."""

Spared = tuple[int, float]
"""Tokens that were computed in another example, and the floating-point operations that this left out."""


class Outcome:
    """Of one step; `sums` f64[6] as `train.gradient` gives them, `norm` of the gradient, both on the device."""

    def __init__(self, step: Step, sums: Tensor, norm: Tensor, rate: float, data_seconds: float) -> None:
        self.step = step
        self.rate = rate
        """The learning rate."""
        self.data_seconds = data_seconds
        """How long the program waited for the step's rows; an accelerator may have been at the step before."""
        norm = norm.to(sums)
        self.finite = torch.isfinite(sums[0]) & torch.isfinite(norm)
        """Whether loss and gradient are finite numbers, on the device."""
        self._numbers = Awaited(torch.cat([sums, norm.view(1)]))

    def read(self, student: Student) -> tuple[float, int, Spared, float]:
        """Loss, correct targets, what was spared, and the gradient's norm, once the device has them."""
        *sums, norm = self._numbers.read()
        return *told(student, self.step, sums), norm


class Outcomes:
    """Those that are on their way, in the order of their steps."""

    def __init__(self, run: Run, show: Callable[[dict[str, Any]], None]) -> None:
        self._run, self._show = run, show
        self._coming: deque[tuple[Outcome, Moment]] = deque()
        self._before = Moment(run.student.device)
        """The end of the step before the first of them."""

    def add(self, outcome: Outcome) -> None:
        """A step is under way, its update too."""
        self._coming.append((outcome, Moment(self._run.student.device)))

    def write_down(self, *, all_of_them: bool) -> None:
        """Those of all steps, or of all that the device is not at; raises NonFiniteError for one too many that is no
        number."""
        late = 0 if all_of_them else delay(self._run.student.device)
        while len(self._coming) > late:
            outcome, end = self._coming.popleft()
            with NamingRows(self._run, outcome.step):
                loss, correct, spared, norm = outcome.read(self._run.student)
                end.wait()
            if math.isfinite(loss) and math.isfinite(norm):
                record = _record(self._run, outcome, loss, correct, spared, norm, end.since(self._before))
                self._run.note_step(record)
                self._show(record)
            else:
                self._skip_or_stop(outcome.step, loss, norm)
            self._before = end

    def _skip_or_stop(self, step: Step, loss: float, norm: float) -> None:
        """Loss or gradient was no number, and nothing was updated: go on where that is allowed once more, else stop.

        Both numbers are sums over all processes, so all of them come here, in the same step.
        """
        run = self._run
        rows = [str(run.store.origin(index)) for pack in step.planned.packs for index in pack]
        run.record.write("bad_step.json", {
            "step": step.index, "seed": run.recipe.seed, "loss": str(loss), "grad_norm": str(norm), "examples": rows,
            "packs": step.planned.packs,
        })
        allowed = run.recipe.train.skips
        if run.skipped < allowed:
            run.note_skipped(step.index, loss, norm)
            return
        for _, end in self._coming:  # what is under way needs every process: none may leave before
            end.wait()
        before = f" after {run.skipped} that were skipped" if run.skipped else ""
        raise NonFiniteError(
            f"step {step.index} has the loss {loss} and a gradient of norm {norm}{before}",
            required="finite numbers; nothing was updated, and what was saved before is sound",
            where=f"{run.record.directory / 'bad_step.json'} lists its {len(rows)} examples",
            remedy=f"`schoolhouse replay {run.record.directory}`; look at these rows, lower optim.learning_rate, "
            f"or set train.on_nonfinite=skip:{allowed + 3}",
        )

    def begin(self) -> None:
        """The next step begins now: what was measured and saved since the last one is no part of it."""
        if not self._coming:
            self._before = Moment(self._run.student.device)


def delay(device: torch.device) -> int:
    """How many steps may be under way when one is read: of an accelerator the next, of a processor none."""
    return int(crossing.is_queue(device))


def told(student: Student, step: Step, sums: Sequence[float]) -> tuple[float, int, Spared]:
    """A step's loss (nats per unit of weight), correct targets, and what was spared, by its sums over all processes.

    What the plan promised must be what met the vocabulary: a token lost or counted twice on the way stops the run.
    """
    nll, correct, weight, delivered, tokens, operations = sums
    promised, degree = step.planned.supervised_tokens, student.mesh.ulysses
    assert delivered == promised, f"step {step.index}: {promised} targets were promised, {delivered:.0f} met the loss"
    assert math.isclose(weight, step.supervised, rel_tol=1e-9), f"step {step.index}: weight {weight}"
    return nll / step.supervised, int(correct), (round(tokens / degree), operations / degree)


class NamingRows:
    """An error inside says at which step it happened, and in which rows of this process."""

    def __init__(self, run: Run, step: Step) -> None:
        self._run, self._step = run, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            rows = [str(self._run.store.origin(index)) for micro in self._step.micro_batches for index in micro.pack]
            more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
            late = " (or the one before)" if delay(self._run.student.device) else ""
            error.add_note(f"at step {self._step.index}{late}, in the rows {', '.join(rows[:NAMED_ROWS])}{more}")


def _record(
    run: Run, outcome: Outcome, loss: float, correct: int, spared: Spared, norm: float, seconds: float
) -> dict[str, Any]:
    planned = outcome.step.planned
    speed = (run.work_of(planned) - spared[1]) / seconds
    return {
        "kind": "step", "step": planned.index, "epoch": planned.epoch, "loss": loss,
        "accuracy": correct / planned.supervised_tokens, "grad_norm": norm, "learning_rate": outcome.rate,
        "examples": planned.examples, "drawn": _drawn(planned), "tokens": planned.tokens,
        "computed_tokens": planned.tokens - spared[0], "supervised_tokens": planned.supervised_tokens,
        "seconds": seconds, "data_seconds": outcome.data_seconds, "tokens_per_second": planned.tokens / seconds,
        "tflops": speed / 1e12, "mfu": speed / run.rate, "peak_memory_gib": memory.peak_gib(run.student.device),
    }


def _drawn(planned: PlannedStep) -> str:
    """The examples of a step as one short hash: equal where two runs learnt from the same ones, in whatever packs."""
    drawn = sorted(index for pack in planned.packs for index in pack)
    return hashlib.sha256(np.asarray(drawn, dtype=np.int64).tobytes()).hexdigest()[:12]

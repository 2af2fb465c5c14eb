"""Training. For every optimizer step, over all of its micro-batches and all processes,

    gradient = sum over targets of weight x d(-log p(target)) / N        N = sum of weights of the whole step

N is known from the plan before the first forward: packs, micro-batches and processes decide only where a term of the
sum is computed, never how much it counts; gradients of processes are added, never averaged. The loop below is the whole
of it, and every process runs it:

    rows --prepare--> Store --plan--> PlannedStep --loader--> Step of MicroBatches
    MicroBatch --student.loss--> LossSum --/ N, backward--> gradient --optimizer--> new weights

The order of the data is a pure function of (seed, epoch, step), and random numbers are keyed by (seed, step, pack).
So a run that was killed goes on from its newest checkpoint as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from schoolhouse import memory, optim
from schoolhouse.data import loader
from schoolhouse.errors import NonFiniteError, Stopped
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Drawn
from schoolhouse.parallel import fsdp, watch
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.run import Run
from schoolhouse.stopping import EARLY, StopRequest
from schoolhouse.types import PlannedStep, Step

NAMED_ROWS = 8
"""Rows of a failed step that an error names."""


def train(run: Run, stop: StopRequest) -> None:
    """Train from where the run stands to its end; raises Stopped when asked to, with everything saved."""
    mesh = run.student.mesh
    with watch.watching(mesh, run.recipe.parallel.hang_timeout, run.record.directory / "stacks"):
        if run.done == 0:
            run.look(0)
        _steps(run, stop, mesh)


def _steps(run: Run, stop: StopRequest, mesh: Mesh) -> None:
    """The loop."""
    ticks = time.perf_counter()
    with stop.deferred(), run.screen.steps(run.steps, run.done) as progress:
        if mesh.any(stop.asked):  # from here on all wait for one another's word: nobody may have left before
            raise Stopped(EARLY)
        if run.over:
            return
        for step in loader.steps(
            run.store, run.plan, run.done + 1, run.steps, run.student.device,
            rank=mesh.data_rank, ranks=mesh.data_ranks, sight=run.served.sight, share=mesh.seat,
        ):
            loaded = time.perf_counter()
            with _NamingRows(run, step):
                nll, correct, spared = compute_gradient(run.student, step, run.recipe.seed)
            norm = float(run.optimizer.clip())
            run.look_at_save()
            if math.isfinite(nll) and math.isfinite(norm):
                rate = optim.learning_rate(run.recipe.optim, step.index, run.steps)
                run.optimizer.step(rate)
                done = time.perf_counter()
                record = _record(run, step, nll, correct, spared, norm, rate, done - ticks, loaded - ticks)
                run.note_step(record)
                progress.show(record)
            else:
                _skip_or_stop(run, step, nll, norm)
            run.look(step.index)
            asked = mesh.any(stop.asked)  # one process's word for all: they stop after the same step
            if run.save_is_due(step.index, asked=asked):
                run.save(step.index, still=asked or run.over)
            if run.over:
                break
            if asked:
                run.finish_save()
                raise Stopped(f"stopped after step {step.index} of {run.steps}; the same command continues")
            ticks = time.perf_counter()
        run.finish_save()


Spared = tuple[int, float]
"""Tokens that were computed in another example, and the floating-point operations that this left out."""


def compute_gradient(student: Student, step: Step, seed: int) -> tuple[float, int, Spared]:
    """Accumulate the gradient of a whole step; its loss (nats per unit of weight), correct targets, and what was
    spared, over all ranks.

    What the plan promised must be what met the vocabulary: a token lost or counted twice on the way stops the run.
    """
    mesh = student.mesh
    sums, spared = torch.zeros(4, dtype=torch.float64, device=student.device), []
    for micro in step.micro_batches:
        torch.manual_seed(_key(seed, step.index, micro.pack, mesh.ulysses_rank))
        fsdp.expect(student, last=micro is step.micro_batches[-1])
        loss = student.loss(micro, Drawn(seed, step.index), step.supervised)
        loss.backward()
        sums += torch.stack([loss.nll.detach(), loss.correct, loss.supervised, torch.full_like(sums[0], loss.tokens)])
        spared += loss.spared
        del loss  # what is left of its graph would lie in the way of the next one's activations
    begins = np.asarray(spared, dtype=np.int64)
    left_out = sums.new_tensor([begins.sum(), student.work.of_step(begins, 0)])
    nll, correct, weight, delivered, tokens, operations = mesh.sum(torch.cat([sums, left_out])).tolist()
    promised = step.planned.supervised_tokens
    assert delivered == promised, f"step {step.index}: {promised} targets were promised, {delivered:.0f} met the loss"
    assert math.isclose(weight, step.supervised, rel_tol=1e-9), f"step {step.index}: weight {weight}"
    return nll / step.supervised, int(correct), (round(tokens / mesh.ulysses), operations / mesh.ulysses)


class _NamingRows:
    """An error inside says at which step it happened, and in which rows of this process."""

    def __init__(self, run: Run, step: Step) -> None:
        self._run, self._step = run, step

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            rows = [str(self._run.store.origin(index)) for micro in self._step.micro_batches for index in micro.pack]
            more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
            error.add_note(f"at step {self._step.index}, in the rows {', '.join(rows[:NAMED_ROWS])}{more}")


def _key(seed: int, step: int, pack: tuple[int, ...], part: int) -> int:
    """A random seed of its own for every pack of every step, whichever process computes it.

    Processes that share a pack draw for their own `part` of it: tokens, or heads inside attention.
    """
    words = np.random.SeedSequence([seed, step, *pack], spawn_key=(part,)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def _record(
    run: Run, step: Step, loss: float, correct: int, spared: Spared, norm: float, rate: float, seconds: float,
    data_seconds: float,
) -> dict[str, Any]:
    planned = step.planned
    speed = (run.work_of(planned) - spared[1]) / seconds
    return {
        "kind": "step", "step": step.index, "epoch": planned.epoch, "loss": loss,
        "accuracy": correct / planned.supervised_tokens, "grad_norm": norm, "learning_rate": rate,
        "examples": planned.examples, "drawn": _drawn(planned), "tokens": planned.tokens,
        "computed_tokens": planned.tokens - spared[0], "supervised_tokens": planned.supervised_tokens,
        "seconds": seconds, "data_seconds": data_seconds, "tokens_per_second": planned.tokens / seconds,
        "tflops": speed / 1e12, "mfu": speed / run.rate, "peak_memory_gib": memory.peak_gib(run.student.device),
    }


def _drawn(planned: PlannedStep) -> str:
    """The examples of a step as one short hash: equal where two runs learnt from the same ones, in whatever packs."""
    drawn = sorted(index for pack in planned.packs for index in pack)
    return hashlib.sha256(np.asarray(drawn, dtype=np.int64).tobytes()).hexdigest()[:12]


def _skip_or_stop(run: Run, step: Step, loss: float, norm: float) -> None:
    """Loss or gradient is no number: leave the update out where that is allowed once more, else stop before it.

    Both numbers are sums over all processes, so all of them come here, in the same step.
    """
    rows = [str(run.store.origin(index)) for pack in step.planned.packs for index in pack]
    _write_bad_step(run, step, loss, norm, rows)
    allowed = run.recipe.train.skips
    if run.skipped < allowed:
        run.optimizer.forget()
        run.note_skipped(step.index, loss, norm)
        return
    before = f" after {run.skipped} that were skipped" if run.skipped else ""
    raise NonFiniteError(
        f"step {step.index} has the loss {loss} and a gradient of norm {norm}{before}",
        required="finite numbers; nothing was updated, and what was saved before is sound",
        where=f"{run.record.directory / 'bad_step.json'} lists its {len(rows)} examples",
        remedy=f"`schoolhouse replay {run.record.directory}`; look at these rows, lower optim.learning_rate, "
        f"or set train.on_nonfinite=skip:{allowed + 3}",
    )


def _write_bad_step(run: Run, step: Step, loss: float, norm: float, rows: Sequence[str]) -> None:
    run.record.write("bad_step.json", {
        "step": step.index, "seed": run.recipe.seed, "loss": str(loss), "grad_norm": str(norm), "examples": rows,
        "packs": step.planned.packs,
    })

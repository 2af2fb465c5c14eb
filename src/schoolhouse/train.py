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

import time

import numpy as np
import torch
from torch import Tensor

from schoolhouse import crossing, optim
from schoolhouse.data import loader
from schoolhouse.errors import Stopped
from schoolhouse.model.load import Student
from schoolhouse.model.teaching import Drawn
from schoolhouse.outcome import NamingRows, Outcome, Outcomes, Spared, told
from schoolhouse.parallel import fsdp, watch
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.run import Run
from schoolhouse.stopping import EARLY, StopRequest
from schoolhouse.types import Step


def train(run: Run, stop: StopRequest) -> None:
    """Train from where the run stands to its end; raises Stopped when asked to, with everything saved."""
    mesh = run.student.mesh
    with watch.watching(mesh, run.recipe.parallel.hang_timeout, run.record.directory / "stacks"):
        if run.done == 0:
            run.look(0)
        _steps(run, stop, mesh)


def _steps(run: Run, stop: StopRequest, mesh: Mesh) -> None:
    """The loop."""
    with stop.deferred(), run.screen.steps(run.steps, run.done) as progress:
        if mesh.any(stop.asked):  # from here on all wait for one another's word: nobody may have left before
            raise Stopped(EARLY)
        if run.over:
            return
        outcomes, ticks = Outcomes(run, progress.show), time.perf_counter()
        for step in loader.steps(
            run.store, run.plan, run.done + 1, run.steps, run.student.device,
            rank=mesh.data_rank, ranks=mesh.data_ranks, sight=run.served.sight, share=mesh.seat,
        ):
            data_seconds = time.perf_counter() - ticks
            with NamingRows(run, step):
                sums = gradient(run.student, step, run.recipe.seed)
            rate = optim.learning_rate(run.recipe.optim, step.index, run.steps)
            outcome = Outcome(step, sums, run.optimizer.clip(), rate, data_seconds)
            run.optimizer.step(rate, outcome.finite)
            run.look_at_save()
            outcomes.add(outcome)
            outcomes.write_down(all_of_them=run.rests_after(step.index))
            run.look(step.index)
            asked = mesh.any(stop.asked)  # one process's word for all: they stop after the same step
            if asked:
                outcomes.write_down(all_of_them=True)
            if run.save_is_due(step.index, asked=asked):
                run.save(step.index, still=asked or run.over)
            if run.over:
                break
            if asked:
                run.finish_save()
                raise Stopped(f"stopped after step {step.index} of {run.steps}; the same command continues")
            outcomes.begin()
            ticks = time.perf_counter()
        run.finish_save()


def compute_gradient(student: Student, step: Step, seed: int) -> tuple[float, int, Spared]:
    """Accumulate the gradient of a whole step; its loss (nats per unit of weight), correct targets, and what was
    spared, over all ranks."""
    return told(student, step, gradient(student, step, seed).tolist())


def gradient(student: Student, step: Step, seed: int) -> Tensor:
    """Accumulate the gradient of a whole step. Its sums over all ranks, f64[6] on the device: weighted nll, correct
    targets, weight and number of those that met the vocabulary, tokens and operations that were spared.

    Nothing here waits for an accelerator, as far as the model does not.
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
    left_out = torch.tensor([begins.sum(), student.work.of_step(begins, 0)], dtype=torch.float64)
    return mesh.sum(torch.cat([sums, crossing.sent(left_out, sums.device)]))


def _key(seed: int, step: int, pack: tuple[int, ...], part: int) -> int:
    """A random seed of its own for every pack of every step, whichever process computes it.

    Processes that share a pack draw for their own `part` of it: tokens, or heads inside attention.
    """
    words = np.random.SeedSequence([seed, step, *pack], spawn_key=(part,)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))

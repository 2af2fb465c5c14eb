"""F14: what does not fit is said before the first step, with what would; what fits leaves no trace."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import here, program, steps_of, write_recipe

from schoolhouse import cli, estimate, fitting, memory, places
from schoolhouse import recipe as recipes
from schoolhouse import run as runs
from schoolhouse.data.plan import Plan
from schoolhouse.model import fourbit, load
from schoolhouse.model.load import Student
from schoolhouse.parallel.mesh import ALONE
from schoolhouse.screen import Screen


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def cap(patch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """An allocator that has no room for a micro-batch of more tokens; the sizes that were tried."""
    tried, whole = [], Student.loss

    def loss(self: Student, micro, *rest):
        tried.append(micro.input_ids.shape[1])
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("Tried to allocate 31.20 GiB, 23.70 GiB are free")
        return whole(self, micro, *rest)

    patch.setattr(Student, "loss", loss)
    return tried


def test_f14_what_does_not_fit_is_said_before_the_first_step(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Exit 5 with the allocator's words and a size that fits; with that size the run begins and ends."""
    tried = cap(monkeypatch, 160)
    wide = ("batch.examples=64", "exam.data=null", "exam.every=0", "train.steps=2")
    here("run", page, f"directory={tmp_path / 'run'}", *wide, code=5)
    said = capsys.readouterr().err
    assert "31.20 GiB" in said and "set batch.tokens=150" in said and "Traceback" not in said
    assert tried[-3] > 270 and all(120 < one <= 150 for one in tried[-2:]), "the full one, then two of its half"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    here("run", page, f"directory={tmp_path / 'again'}", *wide, "batch.tokens=150")


def test_f14_a_model_that_does_not_fit_is_said(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Its weights alone, before there is anything to rehearse."""
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 31.20 GiB, 23.70 GiB are free")

    monkeypatch.setattr(runs.spread, "proved", full)
    here("run", page, f"directory={tmp_path / 'run'}", code=5)
    said = capsys.readouterr().err
    assert "the model does not fit" in said and "31.20 GiB" in said and "lora.base=nf4" in said


def test_f14_the_rehearsal_is_undone_to_the_bit(page: Path, tmp_path: Path) -> None:
    """Weights, moments and gradients are those of a run that was never rehearsed."""
    run = runs.begin(recipes.read(page, [f"directory={tmp_path / 'run'}"]), page, Screen(), ALONE)
    before = {name: tensor.clone() for name, tensor in run.optimizer.weights()}
    fitting.Rehearsal(run.student, run.optimizer, run.store, None).attempt(run.plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.optimizer.weights())
    assert list(run.optimizer.moments()) == []
    assert all(master.grad is None for master in run.optimizer.masters.values())
    run.record.close()


@pytest.mark.parametrize("tokens", [160, 8000])
def test_f14_packs_are_tried_as_in_a_later_step(tokens: int, page: Path, tmp_path: Path, monkeypatch) -> None:
    """Each beside moments, and beside all gradients where a step has several micro-batches: their peak is a step's."""
    sizes = (*WIDE, f"batch.tokens={tokens}")
    run = runs.begin(recipes.read(page, [f"directory={tmp_path / 'run'}", *sizes]), page, Screen(), ALONE)
    seen, whole, masters = [], Student.loss, run.optimizer.masters.values()

    def loss(self: Student, micro, *rest):
        moments = len(list(run.optimizer.moments())) >= 2 * len(masters)
        seen.append((micro.input_ids.shape[1], moments, all(master.grad is not None for master in masters)))
        return whole(self, micro, *rest)

    monkeypatch.setattr(Student, "loss", loss)
    fitting.Rehearsal(run.student, run.optimizer, run.store, None).attempt(run.plan)
    packs = fitting.heaviest_packs(run.plan, run.store.largest_image)
    sizes = [int(run.store.lengths[list(pack)].sum()) for pack in packs]
    assert run.plan.several(1) is (tokens == 160)
    assert seen == [(size, True, tokens == 160) for size in sizes]
    run.record.close()


@pytest.mark.parametrize("words", [(), ("optim.name=muon",), ("optim.name=adamw8bit",), ("lora.rank=4",)])
def test_f14_no_rehearsal_moves_a_weight(words: tuple, page: Path, tmp_path: Path, monkeypatch) -> None:
    """Not even where the gradient is no number."""
    whole = Student.loss
    run = runs.begin(recipes.read(page, [f"directory={tmp_path / 'run'}", *words]), page, Screen(), ALONE)
    before = {name: tensor.clone() for name, tensor in run.optimizer.weights()}

    def loss(self: Student, micro, *rest):
        found = whole(self, micro, *rest)
        return replace(found, nll=found.nll * torch.nan)

    monkeypatch.setattr(Student, "loss", loss)
    run.student.totals = lambda _: None
    fitting.Rehearsal(run.student, run.optimizer, run.store, None).attempt(run.plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.optimizer.weights())
    run.record.close()


def test_f14_several_is_never_denied_wrongly() -> None:
    """Where a plan says that no rank has two micro-batches in a step, none has."""
    random, said = np.random.default_rng(0), []
    for _ in range(300):
        lengths = random.integers(10, 400, random.integers(2, 60))
        examples, ranks = int(random.integers(1, 12)), int(random.integers(1, 5))
        plan = Plan(lengths, lengths.astype(float), lengths, examples, int(random.integers(400, 3000)), 0, ranks)
        most = max(-(-len(plan.step(one).packs) // ranks) for one in range(1, 3 * plan.steps_per_epoch))
        said.append(plan.several(ranks))
        assert said[-1] or most == 1
    assert 50 < sum(said) < 250
    assert replace(plan, ranks=2, tokens=10**6).several(1), "of a run that goes on with fewer processes"


def test_f14_no_step_has_a_heavier_pack() -> None:
    """The rehearsed pack holds the longest example and is at most `batch.tokens`."""
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    plan = Plan(lengths, lengths.astype(float), lengths, 64, 128, 0)
    [pack] = fitting.heaviest_packs(plan, np.zeros(300, dtype=int))
    most = max(int(lengths[list(one)].sum()) for step in range(1, 200) for one in plan.step(step).packs)
    assert lengths[pack[0]] == lengths.max() and most <= int(lengths[list(pack)].sum()) <= 128


def test_f14_the_pack_with_the_most_targets_is_rehearsed_too() -> None:
    """What meets the vocabulary, and the last block's feed-forward part, are supervised tokens alone."""
    lengths, targets = np.array([90, 80, 20, 10]), np.array([3, 2, 18, 10])
    plan = Plan(lengths, targets.astype(float), targets, 64, 100, 0)
    assert fitting.heaviest_packs(plan, np.zeros(4, dtype=int)) == [(0, 3), (2, 3)]


def test_f14_the_pack_with_the_most_patches_is_rehearsed_too() -> None:
    """An example with few tokens and a large image makes the vision tower's heaviest micro-batch."""
    lengths, patches = np.array([90, 80, 20, 10]), np.array([4, 4, 400, 0])
    plan = Plan(lengths, lengths.astype(float), lengths, 64, 100, 0, patches=patches)
    assert fitting.heaviest_packs(plan, patches)[:2] == [(0, 3), (2, 1)]


def test_f14_a_pack_of_each_class_of_images_is_rehearsed() -> None:
    """Whatever the largest image of an example: a pack is rehearsed that begins with the most patches of its class."""
    random = np.random.default_rng(0)
    lengths, largest = random.integers(20, 100, 300), random.integers(0, 3000, 300)
    patches = largest * random.integers(1, 4, 300)
    plan = Plan(lengths, lengths.astype(float), lengths, 64, 256, 0, patches=patches)
    first = [pack[0] for pack in fitting.heaviest_packs(plan, largest)]
    for index in np.flatnonzero(largest):
        same = [one for one in first if 0 < largest[one] < 2 * largest[index] and 2 * largest[one] > largest[index]]
        assert any(patches[one] >= patches[index] for one in same), "no image as large, and no example as heavy"


WIDE = ("batch.examples=64", "exam.data=null", "exam.every=0", "train.steps=2")


def test_f14_auto_finds_the_largest_that_fits(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """1, 1.5, 2, 3, … times data.max_tokens: the same examples and losses as with any other size, also resumed."""
    auto = (*WIDE, "batch.tokens=auto", "data.max_tokens=120")
    with monkeypatch.context() as patch:
        tried = cap(patch, 250)
        here("run", page, f"directory={tmp_path / 'auto'}", *auto)
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["derived"]["micro_batch"] == 240
    assert max(one for one in tried if one <= 240) > 180 and 250 < max(tried) <= 360, "1, 1.5, 2 fit; 3 does not"
    here("run", page, f"directory={tmp_path / 'number'}", *WIDE, "batch.tokens=4000", "data.max_tokens=120")
    found, wanted = steps_of(tmp_path / "auto"), steps_of(tmp_path / "number")
    assert [one["drawn"] for one in found] == [one["drawn"] for one in wanted]
    assert [one["loss"] for one in found] == pytest.approx([one["loss"] for one in wanted], rel=0, abs=1e-6)
    with monkeypatch.context() as patch:
        tried = cap(patch, 250)
        longer = ("train.steps=4", "--allow-change", "train.steps")
        here("run", page, f"directory={tmp_path / 'auto'}", *auto, *longer)
    assert max(tried) <= 240, "it goes on with the size that it began with, and searches no more"


def test_f14_auto_needs_the_longest_example(page: Path, tmp_path: Path, capsys) -> None:
    here("run", page, f"directory={tmp_path / 'run'}", "batch.tokens=auto", code=2)
    assert "batch.tokens=auto needs data.max_tokens" in capsys.readouterr().err


def test_f14_a_cpu_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own limit: what goes beyond the free memory is an error of the allocator and not a kill."""
    monkeypatch.setattr(memory, "available", lambda: 64 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    refused = pytest.raises(fitting.DoesNotFitError, match="allocate")
    with refused, fitting._refused_memory(), memory.capped(torch.device("cpu")):
        torch.zeros(1 << 20).sum()
        torch.empty(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_f14_what_is_free_is_known() -> None:
    free = memory.available()
    assert free is None or 1 << 20 < free < 1 << 50


LITTLE = """\
import os
if os.environ.get("RANK") == "1":
    from schoolhouse import memory
    memory.available = lambda: 1 << 20
"""


def test_f14_one_rank_without_memory_ends_all(page: Path, tmp_path: Path) -> None:
    """Exit 5 with the cause and its rank, no hang, nothing trained."""
    (tmp_path / "sitecustomize.py").write_text(LITTLE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    wide = (*WIDE, "batch.examples=600", "batch.tokens=30000", "data.limit=null", "data.train=starter/arithmetic")
    done = program("run", page, f"directory={tmp_path / 'run'}", *wide, "--nproc", "2", code=5,
                   env={**os.environ, "PYTHONPATH": path})
    assert "does not fit" in done.stderr and "rank:     1" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


MEETS = """\
import os
from schoolhouse import fitting, memory
if os.environ.get("RANK") == "1":
    memory.available = lambda: {megabytes} << 20
tried = fitting.Rehearsal.attempt
def attempt(self, plan):
    with open("{log}." + os.environ.get("RANK", "0"), "a") as file:
        file.write(str(plan.tokens) + " ")
    tried(self, plan)
    assert memory.peak(self.student.device) > 100 << 20
fitting.Rehearsal.attempt = attempt
"""


def test_f14_auto_with_two_processes_stops_before_one_is_refused(page: Path, tmp_path: Path) -> None:
    """The one with little memory decides for both; neither tries what the other has no room for; the losses are those
    of any other size. With none to spare they stay at the smallest, with much they hold a whole step.
    """
    auto = (*WIDE, "batch.examples=60", "batch.tokens=auto", "data.max_tokens=120", "data.limit=null",
            "data.train=starter/arithmetic", "--nproc", "2")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = {}
    for megabytes in (64, 320, 4096):
        log, run = tmp_path / f"tried-{megabytes}", tmp_path / f"run-{megabytes}"
        (tmp_path / "sitecustomize.py").write_text(MEETS.format(megabytes=megabytes, log=log))
        program("run", page, f"directory={run}", *auto, env={**os.environ, "PYTHONPATH": path})
        tried = [(tmp_path / f"{log.name}.{rank}").read_text() for rank in (0, 1)]
        assert tried[0] == tried[1]
        found[megabytes] = json.loads((run / "run.json").read_text())["derived"]["micro_batch"]
    assert 120 <= found[64] < found[320] < found[4096], found
    losses = [[one["loss"] for one in steps_of(tmp_path / f"run-{size}")] for size in found]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-6) == losses[2]


@pytest.mark.parametrize(("length", "patches", "sizes", "growth"), [
    (510, None, (1000, 1500), 2.0), (600, None, (1000, 1500), 2.0), (90, None, (150, 200), 2.0),
    (100, 40, (150, 200), 2.0), (50, 0, (100, 150), 1.5),
])
def test_f14_growth_is_that_of_the_packs(length: int, patches: int | None, sizes: tuple, growth: float) -> None:
    """Not of `batch.tokens`: a second example finds room all at once, with its image."""
    lengths, images = np.full(50, length), np.full(50, patches or 0)
    first = Plan(lengths, lengths.astype(float), lengths, 64, sizes[0], 0, patches=images if patches else None)
    second = replace(first, tokens=sizes[1])
    expected = (sizes[1] // length) / (sizes[0] // length)
    assert fitting._growth(first, second, images) == pytest.approx(expected) == pytest.approx(growth)


@pytest.mark.parametrize(("words", "within"), [
    ((), 0.0), (("model.precision=bfloat16",), 0.0), (("optim.name=muon",), 0.0), (("lora.rank=4",), 0.0),
    (("model.precision=bfloat16", "lora.rank=4", "lora.dora=true", "lora.modules_to_save=[norm]"), 0.0),
    (("lora.rank=4", "lora.base=nf4"), 0.01), (("optim.name=adamw8bit",), 0.1),
])
def test_f14_check_foresees_what_is_held(words: tuple[str, ...], within: float, page: Path, tmp_path: Path) -> None:
    """Weights, gradients and moments before anything is loaded, beside those of the run, to the byte; scales of small
    matrices in 4 bits have some bytes of their own."""
    recipe = recipes.read(page, [f"directory={tmp_path / 'run'}", *words])
    skeleton = load.skeleton(places.model_directory("starter/qwen3"), recipe.lora)
    found = estimate.memory(recipe, skeleton)
    run = runs.begin(recipe, page, Screen(), ALONE)
    run.record.close()
    weights = list(run.student.model.parameters())
    held = sum(fourbit.bytes_of(one) if fourbit.is_narrow(one) else one.nbytes for one in weights)
    copies = {id(one) for one in run.student.model.parameters()}
    masters = [one for one in run.optimizer.masters.values()]
    held += sum(one.nbytes for one in masters if id(one) not in copies)
    trained = sum(one.nbytes for one in masters)
    moments = run.optimizer.saved_bytes() - trained
    for name, wanted in (("weights", held), ("gradients", trained), ("moments", moments)):
        assert found[name] * 2**30 == pytest.approx(wanted, rel=within or 1e-9), name


def test_f14_check_says_the_memory(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("check", page)
    assert "GiB (weights" in capsys.readouterr().out


def test_a_checkpoint_is_as_large_as_foreseen(page: Path, tmp_path: Path) -> None:
    """What the disk is asked for before the first step is what is written, with headers, to a thousandth."""
    for name in ("adamw", "muon"):
        here("run", page, f"directory={tmp_path / name}", f"optim.name={name}", "exam.data=null", "exam.every=0",
             "train.steps=1")
        run = runs.begin(
            recipes.read(page, [f"directory={tmp_path / name}", f"optim.name={name}", "exam.data=null", "exam.every=0",
                                "train.steps=1"]), page, Screen(), ALONE,
        )
        run.record.close()
        written = sum(one.stat().st_size for one in (tmp_path / name / "checkpoints").rglob("*.safetensors"))
        assert written == pytest.approx(run.optimizer.saved_bytes(), rel=0.005)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_products_of_ever_new_lengths_are_not_all_remembered() -> None:
    """What oneDNN keeps of 300 lengths is 700 MiB, where the processor multiplies bfloat16 itself; 40 were seen."""
    grown = """
import torch
from pathlib import Path
matrix = torch.randn(1024, 256).bfloat16().requires_grad_()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256
def learn(length):
    torch.nn.functional.linear(torch.randn(1, length, 256).bfloat16(), matrix).sum().backward()
for length in range(600, 800):
    learn(length)
before = resident()
for length in range(800, 1100):
    learn(length)
print(resident() - before)
"""
    environment = {**os.environ, **cli.CACHES}
    said = subprocess.run([sys.executable, "-c", grown], env=environment, check=True, capture_output=True, text=True)
    assert float(said.stdout) < 150


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory that it can give back")
def test_freed_matrices_go_back_to_the_system() -> None:
    """512 MiB of matrices between others that stay: as a model leaves that was read in float32 and became bfloat16."""
    program = """
import torch
from schoolhouse import memory
cpu = torch.device("cpu")
torch.empty((1 << 23) - 1024).fill_(1.0)  # one of 32 MiB: from here on glibc takes smaller ones from its heap
pairs = [(torch.ones(1 << 20), torch.ones(1 << 10)) for _ in range(128)]
kept = [small for _, small in pairs]
del pairs
before = memory.begin_peak(cpu)
memory.give_back(cpu)
print(before - memory.begin_peak(cpu))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(told) > 400 * 2**20

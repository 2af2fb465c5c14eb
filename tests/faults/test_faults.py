"""What breaks around a run: disks, damaged files, a second process, numbers that are none."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_run import check_same, copied, finished_run, here, last_step, program, records, started, write_recipe

from schoolhouse import checkpoint
from schoolhouse.record import Record

SECRETS = {"HF_TOKEN": "hf_verysecrettoken123", "WANDB_API_KEY": "0123456789abcdefverysecret"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happened."""
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return copied(whole, tmp_path)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newest(run: Path) -> Path:
    return checkpoint.steps_in(run / "checkpoints")[-1]


# Damaged checkpoints.


def test_f6_without_a_whole_checkpoint_it_begins_again(run: Path, page: Path, whole: Path) -> None:
    """All damaged, a staging directory left: exit 0, the same result, and no secret of the environment in any file."""
    for path in checkpoint.steps_in(run / "checkpoints"):
        (path / "index.json").unlink()
    (run / "checkpoints" / ".tmp-step-00000004-1").mkdir()
    done = program("run", page, f"directory={run}", env={**os.environ, **SECRETS})
    assert done.stderr.count("index.json is missing") >= 2 and "resumed" not in done.stderr
    check_same(run, whole)
    told = done.stdout + done.stderr + "".join(path.read_text("utf-8", "replace") for path in run.glob("*.*"))
    assert [name for name, secret in SECRETS.items() if secret in told] == []


def test_f5_a_damaged_checkpoint_is_named_and_an_earlier_one_used(run: Path, page: Path, whole: Path) -> None:
    """Also where the last line of each record is torn: the run falls back to what is whole, and ends as it would."""
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        content = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(content.rstrip("\n")[:-7], encoding="utf-8")
    flip(newest(run) / "weights-00000.safetensors")
    said = program("run", page, f"directory={run}").stderr
    assert "checkpoint step-00000008 rejected: weights-00000.safetensors sha256 mismatch; using step-00000006" in said
    assert "resumed from step 6 (verified)" in said
    check_same(run, whole)
    assert all(event["event"] for event in records(run, "events.jsonl"))


def test_f5_strict_resume_refuses_what_is_damaged(
    run: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 6 with the file, and nothing trained or removed."""
    flip(newest(run) / "optimizer-00000.safetensors")
    before = (run / "metrics.jsonl").read_bytes(), sorted((run / "checkpoints").rglob("*"))
    here("run", page, f"directory={run}", "--strict-resume", code=6)
    said = capsys.readouterr().err
    assert "step-00000008 rejected: optimizer-00000.safetensors sha256 mismatch" in said
    assert "to continue from step-00000006" in said and len(said.partition("error: ")[2].splitlines()) <= 6
    assert ((run / "metrics.jsonl").read_bytes(), sorted((run / "checkpoints").rglob("*"))) == before


# Another configuration.


def test_f7_what_decides_the_weights_changes_only_by_name(
    run: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 with old, new and the way; with it the run goes on, again and again, and says so in its events."""
    change = ("optim.learning_rate=1e-4", "train.steps=10")
    here("run", page, f"directory={run}", *change, code=2)
    said = capsys.readouterr().err
    assert "optim.learning_rate: 0.003 → 0.0001" in said and "train.steps: 8 → 10" in said
    assert "--allow-change train.steps --allow-change optim.learning_rate" in said and "Traceback" not in said
    allowed = ("--allow-change", "optim.learning_rate", "--allow-change", "train.steps")
    here("run", page, f"directory={run}", *change, *allowed)
    assert last_step(run) == 10
    told = [event["change"] for event in records(run, "events.jsonl") if event["event"] == "setting changed"]
    assert told == ["train.steps: 8 → 10", "optim.learning_rate: 0.003 → 0.0001"]
    here("run", page, f"directory={run}", *change, "checkpoint.keep=1", *allowed)


@pytest.mark.parametrize("key", ["batch.examples", "optim.name", "seed", "data.limit", "optim.lr"])
def test_f7_what_gives_the_moments_their_meaning_cannot_change(key: str, page: Path, tmp_path: Path, capsys) -> None:
    here("run", page, f"directory={tmp_path / 'run'}", "--allow-change", key, code=2)
    assert f"--allow-change {key}" in capsys.readouterr().err and not (tmp_path / "run").exists()


# Disks.


def test_f3_a_full_disk_stops_the_run_and_costs_nothing(run: Path, page: Path, whole: Path) -> None:
    """Files may not grow beyond 20 KiB: exit 6 with what to do, earlier checkpoints whole; with room it goes on."""
    shutil.rmtree(newest(run))
    done = program("run", page, f"directory={run}", code=6, preexec_fn=little_room)
    assert "was not written" in done.stderr and "make room" in done.stderr and "Traceback" not in done.stderr
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found is not None and found.step == 6 and rejected == []
    assert list((run / "checkpoints").glob(".tmp-*")) == []
    assert "resumed from step 6" in program("run", page, f"directory={run}").stderr
    check_same(run, whole)


def little_room() -> None:
    """In the child: no file beyond 20 KiB, less than any checkpoint or report."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, 20 << 10))


def test_f4_a_directory_that_cannot_be_made_is_refused_at_once(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is looked for: exit 6, and the place by name."""
    (tmp_path / "file").write_text("in the way")
    here("run", page, f"directory={tmp_path / 'file' / 'run'}", "model=starter/none", code=6)
    assert str(tmp_path / "file" / "run") in capsys.readouterr().err


def test_f4_a_directory_that_vanishes_is_said(page: Path, tmp_path: Path) -> None:
    """Moved away under a run: exit 6 in a few lines, neither a traceback nor a new directory without its records."""
    with started("run", page, f"directory={tmp_path / 'run'}", "train.steps=20") as process:
        process.wait_for_step(tmp_path / "run", 2)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        assert process.ended() == 6, process.said()
        assert "Traceback" not in process.said()


# Two at once.


def test_f9_a_second_process_is_refused_until_the_first_is_dead(page: Path, tmp_path: Path) -> None:
    """Exit 2 with the first one's number, and nothing touched; after `kill -9` the directory is free by itself."""
    run = tmp_path / "run"
    with started("run", page, f"directory={run}") as first:
        first.wait_for_step(run, 3)
        first.signal(signal.SIGSTOP)
        before = (run / "metrics.jsonl").read_bytes()
        second = program("run", page, f"directory={run}", code=2)
        assert f"pid {first.process.pid}" in second.stderr and "active" in second.stderr
        assert (run / "metrics.jsonl").read_bytes() == before
        first.signal(signal.SIGKILL)
        assert first.ended() == -signal.SIGKILL
    Record(run).close()


# Numbers.


def test_f11_a_loss_that_is_no_number_stops_before_the_update(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 4 with the step's rows in a file; the checkpoints there are hold numbers only."""
    run = tmp_path / "run"
    wild = ("optim.learning_rate=1e30", "optim.warmup=0", "checkpoint.every=1", "exam.data=null", "exam.every=0")
    here("run", page, f"directory={run}", *wild, code=4)
    assert "bad_step.json" in capsys.readouterr().err
    bad = json.loads((run / "bad_step.json").read_text())
    assert bad["step"] == last_step(run) + 1 <= 4 and len(bad["examples"]) == 4
    assert all(row.startswith("starter/arithmetic:") for row in bad["examples"])
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found is not None and rejected == []
    for kind in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        assert all(bool(torch.isfinite(one).all()) for one in found.tensors(kind).values())


WILD = ("optim.learning_rate=1e30", "optim.warmup=0", "checkpoint.every=1", "exam.data=null", "exam.every=0",
        "validation.every=0", "data.validation=null")
"""After one step the weights are so large that nothing is finite."""


def test_f11_updates_are_left_out_as_often_as_allowed_and_the_step_is_replayed(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three are skipped, counted over a resume, and leave the weights as they were; the fourth is exit 4."""
    run = tmp_path / "run"
    here("run", page, f"directory={run}", *WILD, "train.on_nonfinite=skip:3", code=4)
    assert "after 3 that were skipped" in capsys.readouterr().err
    first = last_step(run)
    skipped = [record["step"] for record in records(run, "metrics.jsonl") if record["kind"] == "skipped"]
    assert skipped == [first + 1, first + 2, first + 3] and (run / "report.html").is_file()
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found.step == first + 3 and found.state["skipped"] == 3 and rejected == []
    assert all(bool(torch.isfinite(one).all()) for one in found.tensors(checkpoint.WEIGHTS).values())
    here("run", page, f"directory={run}", *WILD, "train.on_nonfinite=skip:3", code=4)
    assert "after 3 that were skipped" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")}
    here("replay", run)
    said = capsys.readouterr().out
    assert f"{json.loads((run / 'bad_step.json').read_text())['grad_norm']} (reproduced)" in said
    assert "NOT FINITE" in said and "starter/arithmetic:" in said
    assert before == {path: path.read_bytes() for path in before}
    (run / "bad_step.json").unlink()
    here("replay", run, code=2)


def test_f11_two_processes_stop_before_the_same_update(page: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = program("run", page, f"directory={run}", *WILD, "--nproc", "2", code=4)
    assert "bad_step.json" in done.stderr and json.loads((run / "bad_step.json").read_text())["step"] >= 2
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found.step == last_step(run) and rejected == []


def test_f11_one_rank_of_two_has_no_number(page: Path, tmp_path: Path) -> None:
    """One row's weight is so large that its loss overflows, in one process alone: both stop before the update, exit 4,
    the checkpoint before is the last one, and the replay finds the one pack.
    """
    rows = [{"messages": [{"role": "user", "content": f"{one} + 1"},
                          {"role": "assistant", "content": f"{one + 1}", "weight": 1.0}]} for one in range(12)]
    rows[7]["messages"][1]["weight"] = 1.6e38
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    words = ("model=starter/qwen3", f"data.train={tmp_path / 'rows.jsonl'}", "data.validation=null",
             "validation.every=0", "exam.data=null", "exam.every=0", "checkpoint.every=1", "train.steps=3")
    done = program("run", page, f"directory={run}", *words, "--nproc", "2", code=4)
    assert "bad_step.json" in done.stderr and "Traceback" not in done.stderr
    bad = json.loads((run / "bad_step.json").read_text())
    assert any(one.endswith("rows.jsonl:8") for one in bad["examples"])
    assert last_step(run) == bad["step"] - 1
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert (found.step if found else 0) == bad["step"] - 1 and rejected == []
    told = program("replay", run).stdout if found else ""
    assert not found or (told.count("NOT FINITE") == 1 and "rows.jsonl:8" in told.partition("NOT FINITE")[2])


# Real disks.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"a file system can only be mounted by root: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


SMALL = ("exam.data=null", "exam.every=0", "checkpoint.keep=1")


def test_f3_too_little_room_is_said_before_the_first_step(page: Path, disk: Path) -> None:
    done = program("run", page, f"directory={disk / 'run'}", *SMALL, code=6)
    assert "there is no room for the checkpoints" in done.stderr and "GiB are free" in done.stderr
    assert "checkpoint.keep" in done.stderr and last_step(disk / "run") == 0 and "Traceback" not in done.stderr


def test_f4_a_read_only_disk_is_refused_before_the_model(page: Path, disk: Path) -> None:
    """Also where the directory is there already."""
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("run", "new"):
        said = program("run", page, f"directory={disk / name}", "model=starter/none", code=6).stderr
        assert "cannot be written" in said and str(disk / name) in said and "Traceback" not in said


def test_f3_a_disk_that_fills_up_costs_nothing(page: Path, tmp_path: Path, disk: Path, whole: Path) -> None:
    """Real ENOSPC in a save: exit 6, need and free and path, the earlier checkpoint whole; with room it goes on."""
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    run = disk / "run"
    with started("run", page, f"directory={run}") as process:
        process.wait_for_step(run, 3)
        process.signal(signal.SIGSTOP)
        used = shutil.disk_usage(disk).used
        subprocess.run(["mount", "-o", f"remount,size={used + (1 << 20)}", disk], check=True)
        process.signal(signal.SIGCONT)
        assert process.ended() == 6, process.said()
        said = process.said()
    assert "No space left" in said and "GiB are free" in said and str(run) in said and "Traceback" not in said
    found, rejected = checkpoint.newest(run / "checkpoints")
    assert found is not None and rejected == [] and list((run / "checkpoints").glob(".tmp-*")) == []
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    assert f"resumed from step {found.step}" in program("run", page, f"directory={run}").stderr
    check_same(run, whole)


def test_f24_secrets_of_the_environment_reach_nothing(page: Path, tmp_path: Path) -> None:
    """No file of the run, in whatever directory; no line on the screen; no argument of a process, of two workers."""
    run = tmp_path / "run"
    arguments = set()
    with started("run", page, f"directory={run}", "--nproc", 2, env={**os.environ, **SECRETS}) as process:
        while process.process.poll() is None:
            for one in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    arguments.add(one.read_bytes())
            time.sleep(0.5)
        assert process.ended() == 0, process.said()
        told = process.said().encode() + b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert any(str(run).encode() in one for one in arguments), "it was looked at"
    told += b"".join(arguments)
    assert [name for name, secret in SECRETS.items() if secret.encode() in told] == []


def test_f24_no_setting_holds_a_secret(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("run", page, "model.token=hf_verysecrettoken123", code=2)
    assert "hf_verysecrettoken123" not in capsys.readouterr().err

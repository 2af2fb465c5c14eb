"""A run directory is read as far as it is there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fake_run
import pytest

from schoolhouse.errors import ConfigError
from schoolhouse.report import read


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return fake_run.write(tmp_path / "run")


def test_a_whole_run_is_read_without_fault(run_directory: Path) -> None:
    run = read.read(run_directory)
    assert run.faults == () and run.status == "done"
    assert [step.step for step in run.steps] == list(range(1, fake_run.STEPS + 1))
    assert [(exam.step, exam.correct) for exam in run.exams] == list(fake_run.CORRECT.items())
    assert [record.step for record in run.validations] == list(range(0, 601, 100))
    assert len(run.answers) == 2 * fake_run.QUESTIONS and len(run.examples) == 3 and len(run.events) == 6
    assert set(run.ledgers) == {"train", "validation"}


def test_a_step_trained_again_after_a_kill_counts_once_as_it_was_last(run_directory: Path) -> None:
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    again = [record for record in map(json.loads, lines) if record.get("step") == fake_run.RESUMED + 10]
    assert len(again) == 2
    [kept] = [step for step in read.read(run_directory).steps if step.step == fake_run.RESUMED + 10]
    assert kept.loss == again[-1]["loss"] != again[0]["loss"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "examples.jsonl", "events.jsonl"])
def test_a_torn_last_line_costs_that_line_only(run_directory: Path, name: str) -> None:
    whole = (run_directory / name).read_bytes()
    lines = whole.splitlines(keepends=True)
    (run_directory / name).write_bytes(whole[: -len(lines[-1]) // 2 or None])
    run = read.read(run_directory)
    assert run.faults == (f"{name}:{len(lines)} is torn and was left out",)


def test_every_truncation_of_every_file_is_read(run_directory: Path) -> None:
    for path in sorted(run_directory.iterdir()):
        whole = path.read_bytes()
        for share in range(8):
            path.write_bytes(whole[: len(whole) * share // 8])
            read.read(run_directory)
        path.write_bytes(whole)
    assert read.read(run_directory).faults == ()


def test_bytes_that_are_no_text_are_a_fault_and_no_crash(run_directory: Path) -> None:
    for path in run_directory.iterdir():
        path.write_bytes(b"\xff\xfe\x00garbage\n[1, 2]\n")
    run = read.read(run_directory)
    assert len(run.faults) == 2 + 4 * 2 and run.steps == () and run.recipe == {}


def test_only_run_json_is_needed(run_directory: Path) -> None:
    for path in run_directory.iterdir():
        if path.name != "run.json":
            path.unlink()
    run = read.read(run_directory)
    assert run.faults == () and run.steps == () and run.ledgers == {} and run.recipe["seed"] == 0


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "step", "loss": 1.0},
        {"kind": "step", "step": "seven"},
        {"kind": "step", "step": 1e999},
        {"kind": "eval", "name": "exam", "step": 3, "correct": 2},
        {"kind": "eval", "name": "exam", "step": 3, "correct": 2, "count": 0},
        {"kind": "eval", "name": "exam", "step": 3, "correct": 9, "count": 5},
    ],
)
def test_a_record_without_its_sense_is_a_fault(tmp_path: Path, record: dict) -> None:
    directory = fake_run.write(tmp_path, steps=0)
    (directory / "metrics.jsonl").write_text(json.dumps(record))
    run = read.read(directory)
    assert len(run.faults) == 1 and run.steps == () and run.exams == ()


def test_a_figure_that_is_missing_is_not_a_number(tmp_path: Path) -> None:
    directory = fake_run.write(tmp_path, steps=0)
    (directory / "metrics.jsonl").write_text('{"kind":"step","step":1,"loss":NaN,"tokens":5,"grad_norm":"?"}\n')
    [step] = read.read(directory).steps
    assert math.isnan(step.loss) and math.isnan(step.grad_norm) and math.isnan(step.tokens_per_second)
    assert step.tokens == 5


def test_no_run_is_an_error_of_four_parts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as none:
        read.read(tmp_path / "nowhere")
    assert "there is no directory" in none.value.found and none.value.exit_code == 2
    with pytest.raises(ConfigError) as empty:
        read.read(tmp_path)
    assert "is not a run directory" in empty.value.found and empty.value.where == str(tmp_path)

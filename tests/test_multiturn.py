"""The multiturn classroom as its users press its buttons: a played exam in runs, evaluations and comparisons."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from schoolhouse import cli, jobs
from schoolhouse import recipe as recipes

CLASSROOM = Path(__file__).parents[1] / "examples" / "sft" / "multiturn"
SMALL = (
    "train.steps=2", "exam.data={path: starter/recall:exam, limit: 3}", "batch.examples=2", "exam.max_new_tokens=4",
    "exam.examples=2", "data.train={path: starter/recall, limit: 8}", "data.workers=1",
    "data.validation={path: starter/recall:validation, limit: 3}",
)
"""Settings that make the starter recipe a matter of seconds."""


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def program(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "schoolhouse", *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Two steps of the starter recipe on two processes that share each conversation, in a cache that is empty."""
    directory, empty = tmp_path_factory.mktemp("multiturn") / "run", str(tmp_path_factory.mktemp("empty"))
    program("run", CLASSROOM / "starter.yaml", "--nproc", "2", f"directory={directory}", *SMALL, XDG_CACHE_HOME=empty)
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The same two steps on one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    cli.main(["run", str(CLASSROOM / "starter.yaml"), "parallel.ulysses=1", f"directory={directory}", *SMALL])
    return directory


def test_tokens_are_counted_once_under_ulysses(run: Path, alone: Path) -> None:
    """Two processes share each conversation, and its tokens count once; the losses are those of one process.

    Float32 sums over two processes stand in another order: 2e-6 of the loss.
    """
    shared, whole = (
        [one for one in records(place, "metrics.jsonl") if one["kind"] == "step"] for place in (run, alone)
    )
    for name in ("step", "examples", "tokens", "supervised_tokens"):
        assert [one[name] for one in shared] == [one[name] for one in whole], name
    assert [one["loss"] for one in shared] == pytest.approx([one["loss"] for one in whole], rel=2e-6)


def test_eval_equals_train_equation_under_ulysses(run: Path, alone: Path) -> None:
    """Validation on two processes is that of one, which is the training equation (`test_regressions`)."""
    shared, whole = (
        [one for one in records(place, "metrics.jsonl") if one.get("name") == "validation"] for place in (run, alone)
    )
    assert [one["loss"] for one in shared] == pytest.approx([one["loss"] for one in whole], rel=2e-6)
    assert [one["accuracy"] for one in shared] == pytest.approx([one["accuracy"] for one in whole], abs=0.02)


def test_the_layout_of_the_recipe_is_in_force(run: Path) -> None:
    in_force = {row["what"]: row["value"] for row in json.loads((run / "run.json").read_text())["in_force"]}
    assert "ulysses 2" in in_force["layout"] and "4 attention layers exchange heads" in in_force["layout"]


def test_a_played_exam_is_recorded_turn_by_turn(run: Path) -> None:
    """Four graded answers of each conversation, and each stands in the history of those after it."""
    samples = [one for one in records(run, "samples.jsonl") if one["step"] == 2]
    assert len(samples) == 12 and {one["conversation"] for one in samples} == {0, 1, 2}
    for one in samples:
        later = [two for two in samples if two["conversation"] == one["conversation"] and two["turn"] > one["turn"]]
        assert all(two["question"][one["turn"]] == {"role": "assistant", "content": one["answer"]} for two in later)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The conversation before" in page


def test_one_process_gives_the_same_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` plays the exam on one process with the checkpoint that two trained: the recorded answers exactly."""
    cli.main(["eval", str(run), str(CLASSROOM / "starter.yaml"), "--json", *SMALL])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{"step": 2, **one} for one in answers] == [one for one in records(run, "samples.jsonl") if one["step"] == 2]


def test_two_students_are_compared_on_played_conversations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their histories differ from the first answer on; the questions that both are asked are the same."""
    cli.main(["compare", "starter/qwen3", str(run), str(CLASSROOM / "starter.yaml"), *SMALL, "exam.grader=contains"])
    said = capsys.readouterr().out.replace("\n", "")
    assert "starter/qwen3: 0 of 12" in said and "of 12" in said.split(str(run))[-1]


def test_two_machines_as_the_job_files_start_them(tmp_path: Path) -> None:
    """One process on each of two "machines", joined by torchrun's variables; a stop asked of one is exit 75 of both."""
    directory, port = tmp_path / "run", str(free_port())
    words = [sys.executable, "-m", "schoolhouse", "run", CLASSROOM / "starter.yaml", "--nproc", "1",
             f"directory={directory}", *SMALL, "train.steps=4000", "exam.data=null"]
    joined = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    machines = [
        subprocess.Popen(words, env={**os.environ, **joined, "PET_NODE_RANK": str(number)}, stderr=subprocess.DEVNULL)
        for number in range(2)
    ]
    try:
        metrics = directory / "metrics.jsonl"
        until(lambda: metrics.is_file() and '"kind": "step"' in metrics.read_text(), machines)
        machines[1].send_signal(signal.SIGTERM)
        assert [machine.wait(timeout=120) for machine in machines] == [75, 75]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    assert json.loads((directory / "run.json").read_text())["status"] == "stopped"
    assert len(list((directory / "checkpoints").glob("step-*"))) == 1


def until(seen: Callable[[], bool], machines: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until something is seen while all are alive; four minutes, for busy machines."""
    end = time.monotonic() + 240
    while not seen():
        assert all(machine.poll() is None for machine in machines) and time.monotonic() < end
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("path", sorted(CLASSROOM.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_recipe_asks_for_a_layout_that_its_remote_control_can_start(path: Path) -> None:
    recipe = recipes.read(path)
    assert recipe.parallel.ulysses == 2 and recipe.data.supervise == "every"
    assert jobs.job(str(path), (), recipe.parallel, None, None).gpus % 2 == 0
    script = CLASSROOM / f"run_{path.stem}.sh"
    assert os.access(script, os.X_OK) and f"/{path.name}" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.slow
def test_a_student_learns_to_remember(tmp_path: Path) -> None:
    """The whole recipe by its remote control on two processes: at most 10 % before, at least 90 % after."""
    bin_directory = Path(sys.executable).parent
    command = [CLASSROOM / "run_starter.sh", "2", tmp_path / "run"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"})
    exams = [one["score"] for one in records(tmp_path / "run", "metrics.jsonl") if one.get("name") == "exam"]
    assert exams[0] <= 0.1 and exams[-1] >= 0.9

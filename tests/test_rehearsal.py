"""Every recipe there is, the whole way in miniature: check, show, train, resume, validation, exam, export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import here

from schoolhouse import recipe as recipes
from schoolhouse.starter import miniatures

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "sft").glob("*/*.yaml"))
SHARED_OUT = [one for one in RECIPES if recipes.read(ROOT / one).parallel.ulysses > 1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_rehearsed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, without a network, with its own settings; the resumed half equals the unbroken one bit by bit."""
    monkeypatch.chdir(ROOT)
    here("run", name, "--rehearse", f"directory={tmp_path}/run")
    said = capsys.readouterr().out
    assert "rehearsed: check, show, 4 steps, resumed bit by bit, export" in said
    recipe = recipes.read(name)
    assert said.count("exported and verified") == (2 if recipe.lora else 1)
    run = tmp_path / "run-rehearsal" / "run"
    info = json.loads((run / "run.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps if one["kind"] == "step"] == [1, 2, 3, 4] and info["status"] == "done"
    assert info["recipe"]["model"]["precision"] == recipe.model.precision
    assert (info["recipe"]["lora"] or {}).get("rank") == (recipe.lora and recipe.lora.rank)


@pytest.mark.parametrize("name", [
    one if one.endswith("qwen3_8b_peft_sp2.yaml") else pytest.param(one, marks=pytest.mark.slow) for one in SHARED_OUT
])
def test_recipes_that_split_conversations_rehearse_so(name: str, tmp_path: Path) -> None:
    """With two processes the degree of Ulysses is in force, with adapters too."""
    command = [sys.executable, "-m", "schoolhouse", "run", name, "--rehearse", "--nproc", "2"]
    done = subprocess.run(
        [*command, f"directory={tmp_path}/run"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "run-rehearsal" / "run" / "run.json").read_text())
    layout = next(row["value"] for row in info["in_force"] if row["what"] == "layout")
    assert "ulysses 2" in layout


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_remote_control(name: str) -> None:
    """`run_x.sh <nproc> <run directory> [key=value …]` beside `x.yaml`: valid shell, the right page, executable."""
    script = (ROOT / name).with_name(f"run_{Path(name).stem}.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert f"/{Path(name).name}\"" in script.read_text() and script.stat().st_mode & 0o111
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage:" in done.stderr


def test_a_model_that_nobody_knows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.yaml"
    page.write_text("model: someone/unknown\ndata: starter/arithmetic\n")
    here("run", page, "--rehearse", f"directory={tmp_path}/run", code=2)
    assert "architecture of someone/unknown is not known" in capsys.readouterr().err


def test_a_directory_that_no_rehearsal_wrote_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text("model: starter/qwen3\ndata: starter/arithmetic\n")
    (tmp_path / "run-rehearsal").mkdir()
    (tmp_path / "run-rehearsal" / "mine").write_text("")
    here("run", page, "--rehearse", f"directory={tmp_path}/run", code=2)
    assert (tmp_path / "run-rehearsal" / "mine").exists()


def test_every_model_of_the_recipes_has_a_miniature() -> None:
    named = {recipes.read(ROOT / name).model.path for name in RECIPES}
    assert {one for one in named if not one.startswith("starter/")} <= set(miniatures.MODELS)


def test_patience_and_adapters_are_the_long_runs_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal takes all of its four steps, with new adapters: those of the model would not fit its miniature."""
    page = tmp_path / "page.yaml"
    page.write_text(
        "model: starter/qwen3\ndata: starter/arithmetic\nlora: {rank: 2, start: someone/adapters}\n"
        "train: {patience: 1}\nexam: {data: starter/arithmetic:exam, every: 1, max_new_tokens: 4}\n"
    )
    here("run", page, "--rehearse", f"directory={tmp_path}/run")
    assert "4 steps, resumed bit by bit" in capsys.readouterr().out

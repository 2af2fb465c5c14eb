"""The same kills on transformers.Trainer: how many of them the same command survives, and with what result.

The command is what its documentation says: `trainer.train(resume_from_checkpoint=True)` where there is a checkpoint,
a save every two steps, the same student and rows, the same seed. Half of the kills fall inside a save.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import victims

STEPS = 14
EVERY = 2


def torture(place: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Each kill has a run of its own: started, killed, and started once more."""
    from schoolhouse import places

    victims.load()
    _load()
    student = places.model_directory("starter/qwen3")
    wanted = _once(place / "whole", student)
    found: dict[str, Any] = {"kills": kills, "inside": 0, "continued": 0, "same": 0, "errors": []}
    for number in range(kills):
        run = place / f"killed-{number}"
        found["inside"] += _killed(run, student, draw, inside=number % 2 == 0)
        result = _once(run, student)
        found["continued"] += isinstance(result, dict)
        found["same"] += result == wanted
        found["errors"] += [] if isinstance(result, dict) else [result]
        print(f"  kill {number + 1}: {'went on' if isinstance(result, dict) else result}, "
              f"{'the same' if result == wanted else 'not the same'}", flush=True)
    return found


def told(found: dict[str, Any]) -> str:
    """The line of the table."""
    return (
        f"transformers.Trainer: {found['continued']} of {found['kills']} continued, {found['inside']} kills met a save;"
        f" {found['same']} of {found['kills']} with the losses and weights of the undisturbed run"
    )


def _load() -> None:
    import accelerate
    from transformers import Trainer

    assert accelerate and Trainer


def _once(run: Path, student: Path) -> dict[str, Any] | str:
    """Losses and weights of a run to its end, or the last line of its error."""
    number = _fork(lambda: _train(run, student), run)
    _, status = os.waitpid(number, 0)
    if os.waitstatus_to_exitcode(status):
        lines = (run / "screen.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:160]
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def _killed(run: Path, student: Path, draw: random.Random, *, inside: bool) -> bool:
    """Kill a run after its second save began or between saves; whether it met a save."""
    number = _fork(lambda: _train(run, student), run)
    first = draw.choice(range(2 * EVERY, STEPS - EVERY, EVERY))
    current = run / f"checkpoint-{first}"
    while not current.exists():
        assert os.waitpid(number, os.WNOHANG) == (0, 0), "it ended before the kill"
        time.sleep(0.0002)
    if inside:
        time.sleep(draw.random() * 0.03)
    else:
        while not (current / "trainer_state.json").exists():
            time.sleep(0.001)
        time.sleep(0.02 + draw.random() * 0.05)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return any(not (path / "trainer_state.json").exists() for path in run.glob("checkpoint-*"))


def _fork(work: Callable[[], None], run: Path) -> int:
    run.mkdir(exist_ok=True)
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        output = os.open(run / "screen.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _train(run: Path, student: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 40, (64, 24), generator=draw)]
    model = AutoModelForCausalLM.from_pretrained(student)
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=STEPS, per_device_train_batch_size=4, save_steps=EVERY, save_total_limit=2,
        logging_steps=1, learning_rate=1e-3, seed=0, use_cpu=True, report_to=[], disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) is not None)
    losses = {one["step"]: one["loss"].hex() for one in trainer.state.log_history if "loss" in one}
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()
    (run / "result.json").write_text(json.dumps({"losses": losses, "weights": weights}), encoding="utf-8")

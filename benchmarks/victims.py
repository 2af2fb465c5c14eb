"""Runs of the program that are there to be killed, and what they leave.

Loading torch takes longer than the lessons here. So a process that has loaded everything forks each run: the child has
a session of its own and calls the program's `main` with the words of the command line, like `python -m schoolhouse`. Of
two processes it plays the agent: it names them to each other, and ends the other one when one died. With `fresh`
nothing is forked: each run is the real command, with its real launcher.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 600.0
"""Seconds after which something that should happen counts as a hang."""
AGENT_SECONDS = 4.0
"""How long the peers of a dead process may take to end, before they are killed: as the program's launcher does it."""


def load() -> None:
    """Everything that a run imports, before the first fork."""
    from schoolhouse import cli

    os.environ.update({**cli.ENVIRONMENT, **os.environ})
    import peft
    import transformers.models.qwen3
    import transformers.models.qwen3_vl

    from schoolhouse import commands, run, train
    from schoolhouse.report import page

    assert all((peft, transformers, commands, run, train, page))


@dataclass(frozen=True, slots=True)
class Victim:
    """The processes of one start of a run: its ranks, or a launcher that has its own."""

    processes: Sequence[int]
    screen: Path
    began: float

    def said(self) -> str:
        """All that they have written."""
        return self.screen.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int, processes: Sequence[int] | None = None) -> None:
        """To these processes; unset: to all of them, a launcher's workers too."""
        for process in self.all() if processes is None else processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def all(self) -> list[int]:
        """The processes of the run: its ranks, or the launcher first and then its workers."""
        return [*self.processes, *(child for one in self.processes for child in _children(one))]

    def alive(self) -> bool:
        """Whether none of them has ended; none is reaped."""
        return not any(_over(one) for one in self.processes)

    def ended(self) -> list[int]:
        """Exit codes, minus a signal's number; the peers of one that failed are ended, as the agent does it."""
        codes: dict[int, int] = {}
        self._reap(codes, PATIENCE, until_one_fails=True)
        for number, patience in ((signal.SIGTERM, AGENT_SECONDS), (signal.SIGKILL, PATIENCE)):
            if len(codes) < len(self.processes):
                self.signal(number, [one for one in self.processes if one not in codes])
                self._reap(codes, patience)
        return [codes[one] for one in self.processes]

    def _reap(self, codes: dict[int, int], patience: float, until_one_fails: bool = False) -> None:
        limit = time.monotonic() + patience
        while len(codes) < len(self.processes) and time.monotonic() < limit:
            codes.update(_reaped([one for one in self.processes if one not in codes]))
            if until_one_fails and any(codes.values()):
                return
            time.sleep(0.01)


def _children(number: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _over(number: int) -> bool:
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reaped(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    for number in numbers:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            yield number, os.waitstatus_to_exitcode(status)


def start(words: Sequence[str], ranks: int, screen: Path, *, fresh: bool = False) -> Victim:
    """Start `schoolhouse WORDS` in `ranks` processes."""
    screen.write_text("", encoding="utf-8")
    began = time.monotonic()
    if fresh:
        command = [sys.executable, "-m", "schoolhouse", *words, "--nproc", str(ranks)]
        with screen.open("w", encoding="utf-8") as output:
            launcher = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        launcher.returncode = 0  # it is reaped here, by its number
        return Victim([launcher.pid], screen, began)
    port = _free_port()
    return Victim([_fork(words, rank, ranks, port, screen) for rank in range(ranks)], screen, began)


def _fork(words: Sequence[str], rank: int, ranks: int, port: int, screen: Path) -> int:
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setsid()
        output = os.open(screen, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ranks > 1:
            os.environ.update({
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            })
        code = _main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(words: Sequence[str]) -> int:
    from schoolhouse import cli

    try:
        cli.main(words)
        return 0
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def lines(run: Path) -> dict[int, tuple[str, ...]]:
    """What the metrics say of each step, to the bit: loss, gradient norm and learning rate as hexadecimal floats, and
    the examples drawn. A last line that a kill tore is left out."""
    path = run / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    steps = [record for record in map(json.loads, whole) if record["kind"] == "step"]
    return {record["step"]: _line(record) for record in steps}


def _line(record: dict[str, Any]) -> tuple[str, ...]:
    return (*(record[name].hex() for name in ("loss", "grad_norm", "learning_rate")), record["drawn"])


def last_tensors(run: Path) -> dict[str, str]:
    """SHA-256 of the weights and moments of the last checkpoint, by the names of their files."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = sorted(newest.glob("*.safetensors"))
    return {f"{newest.name}/{one.name}": hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def staged(run: Path) -> bool:
    """Whether a half-written checkpoint is there."""
    try:
        return any(name.startswith(".tmp-step-") for name in os.listdir(run / "checkpoints"))  # noqa: PTH208
    except FileNotFoundError:
        return False


def left_over(run: Path) -> list[str]:
    """Temporary files that a run which ended has left."""
    return [str(path.relative_to(run)) for path in run.rglob(".tmp-*")]

"""Starting the processes of a run on this machine by torchrun's elastic agent, and saying why they ended.

The agent starts, watches, restarts and ends the workers; each worker is the same command with the agent's environment.
What is added here: a stop asked of the launcher reaches every worker, the cause of a failure is told apart from its
consequences and said last, and its exit code becomes the command's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from schoolhouse import orphans
from schoolhouse.errors import PeerError, Stopped
from schoolhouse.stopping import INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

OFFICE = "SCHOOLHOUSE_OFFICE"
"""The variable that names the directory in which a launcher and its workers leave word for one another."""
LAUNCHER = "SCHOOLHOUSE_LAUNCHER"
"""The variable that names the launcher's process, whose end is the end of its workers."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The agent's variable: where a worker writes why it failed."""
STOP, STOPPED = "stop", "stopped"
SHUTDOWN_SECONDS = 4
"""How long workers may take to end after one failed, before they are killed."""
GRACE_SECONDS = 3.0
"""How long a worker that lost a peer waits before it ends, so that the peer's own failure is seen first."""
CONSEQUENCES = (-signal.SIGTERM, PeerError.exit_code)
"""Exit codes of workers that ended because another had failed."""


def launch(processes: int, restarts: int, words: Sequence[str]) -> int:
    """Run `words` in `processes` workers; the exit code of the whole. Several machines: `PET_…`, as for torchrun."""
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own account of a failure; ours follows
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="schoolhouse-") as office:
        os.environ[OFFICE], os.environ[LAUNCHER] = office, str(os.getpid())
        several = "PET_RDZV_ENDPOINT" in os.environ or "PET_MASTER_ADDR" in os.environ
        here = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
        options = torchrun.get_args_parser().parse_args([
            *([] if several else here), f"--nproc-per-node={processes}", f"--max-restarts={restarts}",
            f"--log-dir={office}", "--signals-to-handle=SIGHUP,SIGQUIT", "-m", "schoolhouse",
        ])
        options.training_script_args = list(words)
        config, command, arguments = torchrun.config_from_args(options)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        _forward_signals(Path(office))
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as failed:
            return _explain(failed.failures)
        return Stopped.exit_code if (Path(office) / STOPPED).exists() else 0


def _forward_signals(office: Path) -> None:
    """SIGTERM and ctrl-C go to every worker, and are found by those that have not begun yet."""

    def forward(number: int, _: object) -> None:
        (office / STOP).touch()
        for path in office.glob("worker-*"):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):  # it has died, departs, begins
                os.kill(int(path.read_text(encoding="utf-8")), number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)


def attend() -> None:
    """Called by a worker when it can be stopped: tell the launcher; raises Stopped if that was asked already."""
    if ERROR_FILE in os.environ:
        sys.excepthook = _report_unexpected
    office = os.environ.get(OFFICE)
    if office is not None and "RANK" in os.environ:
        orphans.live_no_longer_than(int(os.environ[LAUNCHER]))
        path = Path(office) / f"worker-{os.environ['LOCAL_RANK']}"
        (path.parent / STOPPED).unlink(missing_ok=True)  # of a worker that ended because its peer had died
        path.write_text(str(os.getpid()), encoding="utf-8")
        if (path.parent / STOP).exists():
            raise Stopped("stopped before it began")


def _report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leave word of an error that nobody expected, and show it as Python does."""
    report(error, 1)
    sys.__excepthook__(kind, error, trace)


def depart() -> None:
    """Called by a worker that ends as it should: its peers need not look for it."""
    if is_worker(os.environ):
        (Path(os.environ[OFFICE]) / f"worker-{os.environ['LOCAL_RANK']}").unlink(missing_ok=True)


def lost_peers() -> list[int]:
    """The processes of this machine's workers that ended without departing."""
    if not is_worker(os.environ):
        return []
    noted = []
    for path in Path(os.environ[OFFICE]).glob("worker-*"):
        with contextlib.suppress(FileNotFoundError):  # it departs
            noted.append(int(path.read_text(encoding="utf-8") or 0))
    return [number for number in noted if number and not _alive(number)]


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def finish_the_word() -> None:
    """Called by a worker that says why it fails: the agent, ending it as the peer of another, must not cut it short."""
    if is_worker(os.environ):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def is_worker(environment: Mapping[str, str]) -> bool:
    """Whether a launcher of ours will say why this process ended."""
    return OFFICE in environment and ERROR_FILE in environment


def report(error: BaseException, exit_code: int) -> None:
    """Leave word of why this worker fails, in the agent's format, so that `torchrun` can print it as well."""
    if ERROR_FILE in os.environ:
        shown = "".join(traceback.format_exception_only(error)).strip() if exit_code == 1 else str(error)
        stack = "".join(traceback.format_exception(error))
        extra = {"timestamp": int(time.time()), "exit_code": exit_code, "py_callstack": stack}
        text = json.dumps({"message": {"message": shown, "extraInfo": extra}})
        Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")


def stop_asked() -> bool:
    """Whether the launcher of this worker was asked to stop."""
    return is_worker(os.environ) and (Path(os.environ[OFFICE]) / STOP).exists()


def note_stopped() -> int:
    """The exit code of a stopped worker: 0 where a launcher is told of it, so that it does not start it again."""
    if not is_worker(os.environ):
        return Stopped.exit_code
    depart()
    (Path(os.environ[OFFICE]) / STOPPED).touch()
    return 0


def end_as_consequence(exit_code: int) -> NoReturn:
    """End this process after a moment in which the peer's own failure is seen first; the agent's signal shortens it.

    At once and without cleaning up: threads may wait for peers that are no more.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)
    sys.stderr.flush()
    os._exit(exit_code)


def _explain(failures: Mapping[int, ProcessFailure]) -> int:
    """Say which worker failed first and why, as the last thing on the screen; its exit code."""
    rank, cause = min(failures.items(), key=lambda pair: (pair[1].exitcode in CONSEQUENCES, pair[1].timestamp, pair[0]))
    if cause.exitcode < 0:
        error = PeerError(
            f"rank {rank} died: {cause.signal_name()}", required="every process alive to the end",
            where=f"process {cause.pid}, rank {rank}",
            remedy="run the same command again, it continues from the last checkpoint; "
            "SIGKILL is often the system's answer to exhausted memory",
        )
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if cause.exitcode == INTERRUPTED:
        return INTERRUPTED
    message = cause.message["message"] if isinstance(cause.message, dict) else f"exit code {cause.exitcode}"
    print(f"error: {message}\n  rank:     {rank}", file=sys.stderr, flush=True)
    return cause.exitcode

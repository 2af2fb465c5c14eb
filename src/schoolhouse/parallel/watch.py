"""What several processes cannot see from within: a hang, of which all write their stacks; a peer that was lost; a stop
that somebody did not hear of, since he waits for another."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from schoolhouse.errors import PeerError, Stopped
from schoolhouse.parallel import launch
from schoolhouse.parallel.mesh import Mesh
from schoolhouse.stopping import EARLY, StopRequest

LOOK_SECONDS = 0.5
LOST_SECONDS = 4.0
"""How long after a peer's death this process may take to end by itself."""
STACKS_SECONDS = 2.0
"""From writing stacks to ending: the peers, who waited for this process, write theirs meanwhile."""


@contextlib.contextmanager
def watching(mesh: Mesh, timeout: float, directory: Path) -> Iterator[None]:
    """Inside, `timeout` seconds without a sign of all processes end them, with their stacks in `directory`.

    The signs are the mesh's own collectives: in host memory they return only when every process takes part, and each
    step has one.
    """
    mesh.pulse.beat()
    with _looking(mesh.world > 1, min(LOOK_SECONDS, timeout / 4), lambda: _find_hang(mesh, timeout, directory)):
        yield


@contextlib.contextmanager
def losses(mesh: Mesh) -> Iterator[None]:
    """Inside, what a collective raises when a peer is gone becomes a PeerError, and this process ends in any case."""
    with _looking(mesh.world > 1, LOOK_SECONDS, _Peers().look):
        try:
            yield
        except RuntimeError as error:
            if mesh.world == 1 or not _is_loss(error):
                raise
            raise PeerError(
                f"another process was lost: {' '.join(str(error).split())[:120]}",
                required="every process alive to the end", where=f"rank {mesh.rank}",
                remedy="look at the other processes' messages; run the same command again to continue",
            ) from error


@contextlib.contextmanager
def stops(stop: StopRequest, world: int) -> Iterator[None]:
    """Inside, a stop that all processes were asked for is one in each of them: also where one waits, in a place that no
    signal reaches, for a peer that has left already, or where such a peer breaks what they do together."""
    with _looking(world > 1, LOOK_SECONDS, _Stop(stop).look):
        try:
            yield
        except (RuntimeError, PeerError) as error:
            if launch.stop_asked() and (isinstance(error, PeerError) or _is_loss(error)):
                raise Stopped(EARLY) from error
            raise


def _is_loss(error: RuntimeError) -> bool:
    """Whether a collective raised it, because a peer is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def _looking(several: bool, seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Inside, `look` is called every so often by a thread, where there are several processes."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=repeat, daemon=True)
    if several:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if several:
            thread.join()


class _Stop:
    """Ends this process where it should have stopped long ago; before training there is nothing to save."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._since: float | None = None

    def look(self) -> None:
        if self._stop.heard or not launch.stop_asked():
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > LOST_SECONDS:
            if os.environ["RANK"] == "0":
                print(EARLY, file=sys.stderr, flush=True)
            os._exit(launch.note_stopped())


class _Peers:
    """Ends this process where the agent or a peer died: it may wait for them in a place that no signal reaches."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._lost: float | None = None

    def look(self) -> None:
        if os.getppid() != self._parent:
            os._exit(PeerError.exit_code)
        if not launch.lost_peers():
            self._lost = None
        elif self._lost is None:
            self._lost = time.monotonic()
        elif time.monotonic() - self._lost > LOST_SECONDS:
            os._exit(PeerError.exit_code)


def _find_hang(mesh: Mesh, timeout: float, directory: Path) -> None:
    if mesh.pulse.age() > timeout:
        _end(mesh, timeout, directory)


def _end(mesh: Mesh, timeout: float, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"rank-{mesh.rank:05d}.txt").open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    error = PeerError(
        f"no step ended for {timeout:g} seconds: a process hangs", required="every process taking part in every step",
        where=f"the stacks of all processes are in {directory}",
        remedy="look for the one that is not waiting; parallel.hang_timeout is the patience; run again to continue",
    )
    launch.report(error, error.exit_code)
    time.sleep(STACKS_SECONDS)
    os._exit(error.exit_code)

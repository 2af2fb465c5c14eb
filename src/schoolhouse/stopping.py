"""SIGTERM and ctrl-C: finish the step, save, and leave; a second ctrl-C within three seconds leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from schoolhouse.errors import Stopped

IMPATIENT_SECONDS = 3.0
EARLY = "stopped; the same command continues from the last checkpoint, or begins where there is none"
SOON = 0.1
"""Seconds until a request that came during an import is looked at again."""
INTERRUPTED = 130
"""Exit code of a process that ctrl-C ended."""


class StopRequest:
    """Whether the user asked the run to stop. Before and after training there is nothing to save: it stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.heard = False
        """Whether the program was told: it leaves, or will after its step."""
        self._deferring = False
        self._last = -IMPATIENT_SECONDS
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def over(self) -> None:
        """The program goes on without the run: signals do what they did before it."""
        self.heard = True
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `asked`, for the loop to see after its step."""
        self._deferring = self.heard = True  # whatever comes is looked at after each step
        try:
            yield
        finally:
            self._deferring, self.heard = False, self.asked  # what it was asked for is what ends it

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._last < IMPATIENT_SECONDS:
            os._exit(INTERRUPTED)
        if number == signal.SIGINT:
            self._last = now
        self.asked = True
        if self._deferring or self.heard:  # what leaves is not cut short by another word
            return
        if _importing(frame):
            again = threading.Timer(SOON, self._again)
            again.daemon = True
            again.start()
            return
        self.heard = True
        raise Stopped(EARLY)

    def _again(self) -> None:
        """The signal once more, unless what ended the import has stopped the program by now."""
        if not self.heard:
            os.kill(os.getpid(), signal.SIGTERM)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: what is raised there gets lost in its C++, or becomes an error of its own."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

"""A process that lives no longer than the one that started it, also where that one is killed without a word.

A worker left behind would hold the run's lock, its port and its memory, and the same command could not continue.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>: the signal that this process gets when its parent ends."""


def live_no_longer_than(parent: int) -> None:
    """End this process, by SIGKILL, when `parent` ends, which must be the process that started it.

    Linux does it from now on; elsewhere, only a parent that has ended already is found.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

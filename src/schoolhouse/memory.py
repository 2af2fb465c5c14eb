"""How much memory the process has used at most, and how much it may still take."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def peak_gib(device: torch.device) -> float:
    """The peak in GiB: of the accelerator that computes, else of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def begin_peak(device: torch.device) -> int | None:
    """Look for a peak anew; the bytes that are held now: of the accelerator, else resident in main memory.

    None where the system cannot begin anew: then there is no peak to ask for.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return torch.accelerator.memory_reserved(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    except OSError:
        return None


def peak(device: torch.device) -> int:
    """The most bytes that were held since `begin_peak`."""
    return _status("VmHWM") if device.type == "cpu" else torch.accelerator.max_memory_reserved(device)


def _status(name: str) -> int | None:
    """Bytes that Linux tells of this process; None where it does not."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def give_back(device: torch.device) -> None:
    """Memory that was freed goes back to the system or the accelerator, so that what is made next meets no splinters.

    glibc keeps freed matrices of less than 32 MiB between those in use: a model of 0.5 billion weights that became
    bfloat16 left 0.7 GiB behind, which activations did not use.
    """
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        return
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def room(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where nothing says."""
    return available() if device.type == "cpu" else torch.accelerator.get_memory_info(device)[0]


def available() -> int | None:
    """Bytes of main memory that are free for this process: of the machine, and of its control group; Linux only."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text(encoding="ascii").strip() != "max":
        free = min(free, max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))))
    return free


@contextlib.contextmanager
def capped(device: torch.device) -> Iterator[None]:
    """Inside, a CPU's allocator refuses what is not there, as an accelerator's does.

    Linux promises more memory than it has, and kills whoever uses it; so the address space is limited meanwhile.
    """
    free = available() if device.type == "cpu" else None
    if free is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + free
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

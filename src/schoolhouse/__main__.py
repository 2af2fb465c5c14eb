"""`python -m schoolhouse` and `schoolhouse`: the command line, in a process whose memory suits matrices.

What is read when a process begins has to stand in its environment before: then it begins once more, as itself.
"""

import contextlib
import os
import sys

TUNABLES, AGAIN = "GLIBC_TUNABLES", "schoolhouse"
SUITED = {
    "tcache_count": (0, ""), "mmap_max": (0, "MALLOC_MMAP_MAX_"),
    "trim_threshold": (1 << 40, "MALLOC_TRIM_THRESHOLD_"),
}
"""What glibc.malloc is told, each unless the environment says it, by that name or its former one.

glibc keeps small pieces that were freed, some of every size, where they are: between the activations of one
micro-batch, whose memory the next then finds in splinters. LoRA of Qwen2.5-0.5B took 350 MiB more. Matrices of 32 MiB
and more it fetches from the system and gives back each time; clearing pages was a tenth of its step in float32."""


def main() -> None:
    """Run the command of this process's arguments."""
    if sys.platform == "linux":
        _begin_suited()
    from schoolhouse import cli

    cli.main()


def _begin_suited() -> None:
    """Begin once more with what glibc is to be told; then take it back, for processes that this one starts."""
    own = [one for one in os.environ.get(TUNABLES, "").split(":") if one]
    added = sys._xoptions.get(AGAIN)
    if added is not None:
        _put(own[: max(0, len(own) - int(added))])
    elif _plainly_started(sys.orig_argv, sys.argv):
        said = {one.partition("=")[0] for one in own}
        more = [f"glibc.malloc.{name}={value}" for name, (value, former) in SUITED.items()
                if f"glibc.malloc.{name}" not in said and former not in os.environ]
        if more:
            _put([*own, *more])
            with contextlib.suppress(OSError, ValueError):  # where it may not, it goes on as it is
                os.execv(sys.executable, [sys.executable, "-X", f"{AGAIN}={len(more)}", *sys.orig_argv[1:]])
            _put(own)


def _put(tunables: list[str]) -> None:
    os.environ.pop(TUNABLES, None)
    if tunables:
        os.environ[TUNABLES] = ":".join(tunables)


def _plainly_started(whole: list[str], words: list[str]) -> bool:
    """Whether Python was asked for this program and nothing else, as neither debuggers nor notebooks do: by options
    alone, then its name. Not so where it began once more: the option given then has a word of its own."""
    head = whole[1 : len(whole) - len(words) + 1]
    return bool(head) and head[-1].rpartition("/")[2] == "schoolhouse" and all(one[:1] == "-" for one in head[:-1])


if __name__ == "__main__":
    main()

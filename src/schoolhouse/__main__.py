"""`python -m schoolhouse` and `schoolhouse`: the command line, in a process whose memory suits matrices.

What is read when a process begins has to stand in its environment before: then it begins once more, as itself.
"""

import contextlib
import os
import sys

TUNABLES, MALLOC = "GLIBC_TUNABLES", "glibc.malloc."
SUITED = ("tcache_count=0", "mmap_max=0", f"trim_threshold={1 << 40}")
"""glibc keeps small pieces that were freed, some of every size, where they are: between the activations of one
micro-batch, whose memory the next then finds in splinters. LoRA of Qwen2.5-0.5B took 350 MiB more. Matrices of 32 MiB
and more it fetches from the system and gives back each time; clearing pages was a tenth of its step in float32."""


def main() -> None:
    """Run the command of this process's arguments."""
    own = os.environ.get(TUNABLES, "")
    if sys.platform == "linux" and MALLOC not in own and _plainly_started(sys.orig_argv, sys.argv):
        os.environ[TUNABLES] = ":".join([*filter(None, [own]), *(MALLOC + one for one in SUITED)])
        with contextlib.suppress(OSError, ValueError):  # where it may not, it goes on as it is
            os.execv(sys.executable, [sys.executable, "-X", "schoolhouse", *sys.orig_argv[1:]])
    from schoolhouse import cli

    cli.main()


def _plainly_started(whole: list[str], words: list[str]) -> bool:
    """Whether Python was asked for this program and nothing else, as neither debuggers nor notebooks do: by options
    alone, then its name. Not so where it began once more: the option given then has a word of its own."""
    head = whole[1 : len(whole) - len(words) + 1]
    return bool(head) and head[-1].rpartition("/")[2] == "schoolhouse" and all(one[:1] == "-" for one in head[:-1])


if __name__ == "__main__":
    main()

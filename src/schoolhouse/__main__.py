"""`python -m schoolhouse` and `schoolhouse`: the command line, in a process whose memory suits matrices.

What is read when a process begins has to stand in its environment before: then it begins once more, as itself.
"""

import os
import sys

ALLOCATOR = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
"""glibc keeps small pieces that were freed, some of every size, where they are: between the activations of one
micro-batch, whose memory the next then finds in splinters. LoRA of Qwen2.5-0.5B took 450 MiB more."""


def main() -> None:
    """Run the command of this process's arguments."""
    name, value = ALLOCATOR
    if sys.platform == "linux" and name not in os.environ and sys.gettrace() is None:  # a debugger would lose us
        os.environ[name] = value
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from schoolhouse import cli

    cli.main()


if __name__ == "__main__":
    main()

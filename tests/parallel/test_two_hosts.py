"""Two machines: two network namespaces joined by a cable, torchrun's rendezvous across them, one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_processes import check_same, finished, page

ADDRESSES = ("10.77.13.1", "10.77.13.2")
SECONDS = 300


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each, able to reach one another and nothing else."""
    names = [f"school{os.getpid()}{side}" for side in "ab"]
    try:
        made = ip("netns", "add", names[0])
    except FileNotFoundError:
        pytest.skip("needs the program ip")
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        steps = [
            ("netns", "add", names[1]),
            ("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1]),
            *(step for name, address in zip(names, ADDRESSES, strict=True) for step in (
                ("-n", name, "addr", "add", f"{address}/24", "dev", "cable0"),
                ("-n", name, "link", "set", "cable0", "up"), ("-n", name, "link", "set", "lo", "up"),
            )),
        ]
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"virtual cables are not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_train_as_one(hosts: list[str], tmp_path: Path) -> None:
    recipe = page(tmp_path, "starter/qwen3", "parallel: {ulysses: 2}\n")
    finished(recipe, f"directory={tmp_path / 'one'}", "--nproc", "2")
    started = []
    for number, (name, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            "--nproc-per-node=1", f"--node-rank={number}", "--rdzv-backend=c10d", "--rdzv-id=lesson",
            f"--rdzv-endpoint={ADDRESSES[0]}:29411", f"--rdzv-conf=is_host={1 - number}", f"--local-addr={address}",
            "-m", "schoolhouse", "run", str(recipe), f"directory={tmp_path / 'two'}",
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable0", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [one.communicate(timeout=SECONDS)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0], "\n".join(said)
    check_same(tmp_path / "one", tmp_path / "two", within=0.0)

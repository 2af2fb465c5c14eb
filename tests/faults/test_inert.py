"""F22, F24: what is offline opens no connection, and a model that brings code or a pickle leaves no trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from test_run import here, write_recipe

from schoolhouse import places

WATCHED = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect" or event == "socket.getaddrinfo":
        print("NETWORK", event, arguments[-1:], file=sys.stderr)
        os._exit(99)
sys.addaudithook(watch)
from schoolhouse import cli
cli.main(sys.argv[1:])
"""


def test_f24_a_run_opens_no_connection(tmp_path: Path) -> None:
    """The interpreter's own audit ends the process at the first address that is looked up or met."""
    words = ["run", str(write_recipe(tmp_path)), f"directory={tmp_path / 'run'}", "train.steps=2"]
    done = subprocess.run([sys.executable, "-c", WATCHED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-2000:]
    probe = WATCHED.replace("from schoolhouse import cli\ncli.main(sys.argv[1:])",
                            "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 99


def test_f22_code_and_pickles_of_a_model_leave_no_trace(tmp_path: Path, capsys) -> None:
    """A configuration that names code of its own, beside weights as a pickle: an error, and the code never ran."""
    model, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(places.model_directory("starter/qwen3"), model)
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Own: pass\n"
    (model / "own.py").write_text(code)
    settings = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": own}))
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    page = write_recipe(tmp_path)
    here("run", page, f"directory={tmp_path / 'run'}", f"model={model}", code=2)
    assert not trace.exists() and "Traceback" not in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(settings))
    here("run", page, f"directory={tmp_path / 'run'}", f"model={model}", code=2)
    assert not trace.exists()

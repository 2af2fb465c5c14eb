"""A model's directory runs nothing of its author's, unless the command line of this very command allows its code."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from schoolhouse.errors import SafetyError

OPTION = "--trust-remote-code"
CODE = ".py"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".mdl")
"""Endings of weights that are read by pickle."""
_given: set[str] = set()


def allow() -> None:
    """For this process and the workers it starts: code that models bring is run. Only the command line calls this."""
    _given.add(OPTION)


def allowed() -> bool:
    """What transformers is told as `trust_remote_code`, wherever it could run code of a model."""
    return OPTION in _given


def checked(directory: Path) -> Path:
    """The directory, if loading its model runs nothing of its author but what is allowed; raises SafetyError.

    transformers is asked not to run code of a model. But it has read some of these keys all the same: CVE-2026-4372
    (`_attn_implementation_internal`), CVE-2026-5241 (`trust_remote_code` of an inner configuration), and CVE-2026-93348
    was a `model_type` with a line break, written into a program.
    """
    for path in sorted(directory.glob("*.json")):
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            continue  # who reads it says what is wrong with it
        if path.name.endswith("config.json"):
            _refuse_keys(found, path)
    weights = {path.suffix for path in directory.iterdir()}
    if ".safetensors" not in weights and weights & set(PICKLES):
        raise SafetyError(
            "the weights are a pickle, which runs what its author wrote when it is read", required="safetensors",
            where=str(directory), remedy="convert them where nothing can be lost, or take another copy of the model",
        )
    if allowed():
        _say(directory)
    return directory


def code(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of code that the model may run now; none where that is not allowed."""
    files = sorted(directory.glob(f"*{CODE}")) if allowed() else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refuse_code(error: Exception, directory: Path) -> None:
    """Raises SafetyError where transformers did not load something because that would run code of the model."""
    if "trust_remote_code" in str(error):
        raise SafetyError(
            "the model brings code of its own, which is not run", required="a model that transformers knows",
            where=str(directory),
            remedy=f"take a newer transformers; or read the model's code, and add {OPTION} to the command line",
        ) from None


@functools.cache
def _say(directory: Path) -> None:
    """Loudly, once: whose code may run. A hub model's directory names its repository and commit."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for name, digest in code(directory).items():
            print(f"{OPTION}: may run {directory / name} (sha256 {digest})", file=sys.stderr)


def _refuse_keys(value: Any, path: Path) -> None:
    """Look through a configuration and the configurations in it."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_keys(inner, path)
    if not isinstance(value, dict):
        return
    bad = [key for key in ("_attn_implementation_internal", "trust_remote_code") if key in value]
    if not re.fullmatch(r"[\w.-]*", str(value.get("model_type") or ""), re.ASCII):
        bad.append("model_type")
    if allowed() and "--" in json.dumps(value.get("auto_map")):  # code of another repository, which nobody has shown
        bad.append("auto_map")
    if bad:
        raise SafetyError(
            f"the model's configuration has {bad[0]}: {str(value[bad[0]])!r:.100}", required="a plain description",
            where=str(path), remedy="do not use this model, or remove the key if you know what it is for",
        )

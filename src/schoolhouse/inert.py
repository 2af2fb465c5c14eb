"""A model's directory runs nothing of its author's, unless the command line of this very command allows its code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from schoolhouse.errors import ConfigError, SafetyError

OPTION = "--trust-remote-code"
CODE = ".py"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".mdl")
"""Endings of weights that are read by pickle."""
_given: set[str] = set()


def allow(trusting: bool) -> None:
    """For this process and the workers it starts: code that models bring is run. Only the command line calls this."""
    _given.clear()
    if trusting:
        _given.add(OPTION)


def allowed() -> bool:
    """What transformers is told as `trust_remote_code`, wherever it could run code of a model."""
    return OPTION in _given


def words() -> list[str]:
    """What a command line that this one writes must say, too."""
    return [OPTION] if allowed() else []


def faults() -> tuple[type[Exception], ...]:
    """What code of a model may raise besides while it is loaded: it imports what is not there, or is not for here."""
    return (ImportError, AttributeError, TypeError, SyntaxError, NameError) if allowed() else ()


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
        _refuse_generation(directory)
        _say(directory)
    return directory


def code(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of code that the model may run now; none where that is not allowed."""
    files = sorted(path for path in directory.rglob(f"*{CODE}") if path.is_file()) if allowed() else []
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy_code(directory: Path, place: Path) -> None:
    """Put the code that the model may run now beside a copy of its configuration."""
    for name in code(directory):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(directory / name, place / name)


def refuse_code(error: Exception, directory: Path) -> None:
    """Raises SafetyError where transformers did not load something because that would run code of the model."""
    if "trust_remote_code" in str(error):
        raise SafetyError(
            "the model brings code of its own, which is not run", required="a model that transformers knows",
            where=str(directory), remedy="the code of image processors is never run; take one that transformers knows"
            if allowed() else
            f"take a newer transformers; or read the model's code, and add {OPTION} to the command line",
        ) from None


@contextlib.contextmanager
def code_refused(directory: Path) -> Iterator[None]:
    """Inside, what transformers does not load because it would run code of the model is a SafetyError."""
    try:
        yield
    except ValueError as error:
        refuse_code(error, directory)
        raise


def refuse_other_code(previous: Mapping[str, Any], directory: Path, run: Path) -> None:
    """A run whose model's code is another, or is not run any more, is not the one that began: ConfigError."""
    now = code(directory)
    before = previous.get("code", {}) if previous else now
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if changed:
        raise ConfigError(
            f"the model's code is not that with which the run began: {', '.join(changed[:5])}",
            required=f"the same files, and {OPTION} or not as before", where=str(run),
            remedy="put them back, or start anew with another directory=…",
        )


def _leads_out(named: Any) -> bool:
    """Whether classes of an `auto_map` are code of another repository or directory, which nobody has shown."""
    if isinstance(named, dict | list):
        return any(map(_leads_out, named.values() if isinstance(named, dict) else named))
    return named is not None and not re.fullmatch(r"\w+\.\w+", str(named), re.ASCII)


def _refuse_generation(directory: Path) -> None:
    """transformers would put the model's own way of writing in the place of ours, without being asked to."""
    if (directory / "custom_generate").exists():
        raise SafetyError(
            "the model brings its own way of writing answers", required="generation by transformers' own code",
            where=str(directory / "custom_generate"), remedy="remove the directory from a copy of the model",
        )


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
    if "configuration_files" in value:  # transformers would read another configuration than was looked through
        bad.append("configuration_files")
    if allowed() and _leads_out(value.get("auto_map")):
        bad.append("auto_map")
    if bad:
        raise SafetyError(
            f"the model's configuration has {bad[0]}: {str(value[bad[0]])!r:.100}", required="a plain description",
            where=str(path), remedy="do not use this model, or remove the key if you know what it is for",
        )

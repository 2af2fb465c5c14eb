"""Where things are: the cache, and a model's name as a local directory in the hub's layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from schoolhouse.config import Model
from schoolhouse.errors import CheckpointError, ConfigError, SafetyError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".mdl")
"""Endings of weights that are read by pickle."""
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "chat_templates/*")
"""What is fetched of a hub model: never a pickle, never code."""


def cache_directory(setting: str | None = None) -> Path:
    """The cache of prepared data and starter students: the recipe's, else `$XDG_CACHE_HOME/schoolhouse`."""
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "schoolhouse"


def built_once(place: Path, build: Callable[[Path], None]) -> Path:
    """The directory `place`, built by one process and renamed when whole; others wait and use it."""
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if place.is_dir():
                return place
            for left in place.parent.glob(f".tmp-{place.name}-*"):  # of a killed process: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f".tmp-{place.name}-", dir=place.parent))
            try:
                build(staging)
                staging.rename(place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the cache cannot be written: {error}", required="a writable directory with free space",
            where=str(place.parent), remedy="set data.cache or XDG_CACHE_HOME to one",
        ) from error
    return place


def model_directory(path: str, revision: str | None = None) -> Path:
    """A local directory with the model's files: the path itself, a starter student, or the hub's (cached) snapshot."""
    if path.startswith("starter/"):
        return _student(path.removeprefix("starter/"))
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(
                f"{path} holds no model", required="a directory with config.json and tokenizer files",
                where="model.path", remedy="name the directory that holds config.json",
            )
        return inert(local)
    return inert(_snapshot(path, revision))


def inert(directory: Path) -> Path:
    """The directory, if loading its model runs nothing of its author; raises SafetyError. Starter students are ours.

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
    return directory


def refuse_own_code(error: Exception, directory: Path) -> None:
    """Raises SafetyError where transformers did not load something because that would run code of the model."""
    if "trust_remote_code" in str(error):
        raise SafetyError(
            "the model brings code of its own, which is never run here", required="a model that transformers knows",
            where=str(directory), remedy="take a version of it that needs no code, or a newer transformers",
        ) from None


def _refuse_keys(value: Any, path: Path) -> None:
    """Look through a configuration and the configurations in it."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_keys(inner, path)
    if not isinstance(value, dict):
        return
    bad = [key for key in ("_attn_implementation_internal", "trust_remote_code") if key in value]
    if not re.fullmatch(r"[\w.-]*", str(value.get("model_type") or ""), re.ASCII):
        bad.append("model_type")
    if bad:
        raise SafetyError(
            f"the model's configuration has {bad[0]}: {str(value[bad[0]])!r:.100}", required="a plain description",
            where=str(path), remedy="do not use this model, or remove the key if you know what it is for",
        )


def directory_of(settings: Model) -> Path:
    """The directory of a recipe's model; with `new_tokens`, a copy in the cache that has them."""
    found = model_directory(settings.path, settings.revision)
    if not settings.new_tokens:
        return found
    from schoolhouse import enlarge

    name = f"{found.name[:40]}-{enlarge.fingerprint(found, settings.new_tokens)[:16]}"
    place = cache_directory() / "enlarged" / name
    return built_once(place, lambda staging: enlarge.build(found, settings.new_tokens, staging))


def _student(name: str) -> Path:
    from schoolhouse.starter import students

    place = cache_directory() / "students" / f"{name}-{students.fingerprint(name)[:16]}"
    return built_once(place, lambda staging: students.build(name, staging))


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the model {name!r} was not found: {first:.160}",
            required="a local directory, starter/NAME, or a model of the Hugging Face hub",
            where="model.path", remedy="check the name, the network, and `hf auth login` for gated models",
        ) from None

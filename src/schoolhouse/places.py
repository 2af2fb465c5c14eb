"""Where things are: the cache, and a model's name as a local directory in the hub's layout."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from schoolhouse import inert
from schoolhouse.config import Model
from schoolhouse.errors import CheckpointError, ConfigError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")
"""What is fetched of a hub model: never a pickle; code only where the command line allows it."""


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
        if error.errno is None:  # not the system's: transformers raises such for a model without weights
            raise
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
            adapter = (local / "adapter_config.json").is_file()
            raise ConfigError(
                f"{path} holds {'an adapter, and ' if adapter else ''}no model", where="model.path",
                required="a directory with config.json and tokenizer files", remedy="write a whole model with "
                "`schoolhouse export RUN --merge`, or train the adapter on: lora.start, and its base in model.path"
                if adapter else "name the directory that holds config.json",
            )
        return inert.checked(local)
    _is_local(path, "model.path")
    return inert.checked(_snapshot(path, revision, "model.path"))


def _is_local(path: str, where: str) -> bool:
    """Whether a path is a directory; raises ConfigError where it is none, and no name of the hub either."""
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError(
            f"there is no directory {path}", where=where, remedy="check the path",
            required="a local directory, starter/NAME, or a model of the Hugging Face hub",
        )
    return Path(path).is_dir()


def adapter_directory(path: str) -> Path:
    """A local directory with adapters: the path itself, or the hub's (cached) snapshot."""
    return Path(path) if _is_local(path, "lora.start") else inert.checked(_snapshot(path, None, "lora.start"))


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


def _snapshot(name: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = [*MODEL_FILES, *([f"*{inert.CODE}"] if inert.allowed() else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the model {name!r} was not found: {first:.160}",
            required="a local directory, starter/NAME, or a model of the Hugging Face hub",
            where=where, remedy="check the name, the network, and `hf auth login` for gated models",
        ) from None

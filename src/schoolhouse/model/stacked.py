"""Experts that are stacked on reading, stacked once in the cache: then every process maps its part of them.

The files of most mixtures hold a matrix for each expert; transformers stacks those of a layer into one tensor, which
is new memory, and of many processes each would hold the whole model. Written down stacked, weights stay in their files
until a block is cut. Writing takes the memory of a tensor at a time (transformers' offloading to disk, by accelerate).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

from schoolhouse import inert, places
from schoolhouse.model import load, sight

INDEX = "model.safetensors.index.json"
COPIED = ("config.json", "generation_config.json")
OFFLOADED = "offloaded"
"""The directory inside the staging one that transformers writes stacked tensors into."""


def directory_of(directory: Path, number: torch.dtype) -> Path:
    """The directory itself, or where its model would be stacked on reading, a copy in the cache that need not be.

    The copy takes as much space as the weights. `number` is the format of the files. A model of which more than its
    experts would be made anew on reading is left as it is.
    """
    wanted = load.skeleton(directory, None)
    kept = _names(directory)
    tied = dict(wanted.named_parameters(remove_duplicate=False)).keys() - dict(wanted.named_parameters()).keys()
    made = {name for name in wanted.state_dict() if name not in kept and name not in tied}
    shapes = {name: one.ndim for name, one in wanted.named_parameters()}
    if not made or any(shapes.get(name) != 3 for name in made):
        return directory
    place = places.cache_directory() / "stacked" / f"{directory.name[:40]}-{_fingerprint(directory)[:16]}"
    own = kept & wanted.state_dict().keys()
    return places.built_once(place, lambda staging: _build(directory, number, own, staging))


def _names(directory: Path) -> set[str]:
    """The names of all tensors in a directory's files."""
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            found.update(file.keys())
    return found


def _build(directory: Path, number: torch.dtype, kept: Iterable[str], staging: Path) -> None:
    """Write stacked tensors, a file each, and beside them what is kept of each file, with an index of all."""
    with inert.code_refused(directory):
        sight.loader(directory).from_pretrained(
            directory, dtype=number, device_map={"": "disk"}, offload_folder=staging / OFFLOADED,
            trust_remote_code=inert.allowed(), use_safetensors=True, local_files_only=True,
        )
    files: dict[str, str] = {}
    for path in sorted((staging / OFFLOADED).glob("*.safetensors")):
        path.rename(staging / path.name)
        files[path.name.removesuffix(".safetensors")] = path.name
    shutil.rmtree(staging / OFFLOADED)
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            own = {name: file.get_tensor(name) for name in file.keys() if name in kept}  # noqa: SIM118
        if own:
            kept_in = f"kept-{path.name}"  # a file named model.safetensors would be taken for the whole model
            save_file(own, staging / kept_in, {"format": "pt"})
            files |= dict.fromkeys(own, kept_in)
    (staging / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    for name in COPIED:
        if (directory / name).is_file():
            shutil.copy(directory / name, staging / name)
    inert.copy_code(directory, staging)


def _fingerprint(directory: Path) -> str:
    """Of all that decides the copy; weights by size and time of their files."""
    code = json.dumps(inert.code(directory)).encode()
    found = hashlib.sha256(transformers.__version__.encode() + Path(__file__).read_bytes() + code)
    for path in sorted(directory.glob("*.safetensors")):
        about = path.stat()
        found.update(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode())
    for name in COPIED:
        if (directory / name).is_file():
            found.update((directory / name).read_bytes())
    return found.hexdigest()

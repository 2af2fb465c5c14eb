"""From a run to a Hugging Face directory: the base's own tensors, streamed file by file, with what was trained put in.

Three forms: the whole model; the model with its adapters merged (W + scale B A); the adapter alone, in PEFT's format.
Names, shapes and number formats of the tensors are the base's, so whatever loads the base loads the export.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from schoolhouse import inert
from schoolhouse.config import Lora
from schoolhouse.data.served import Served
from schoolhouse.errors import CheckpointError, ConfigError
from schoolhouse.model import adapter_files, fourbit, load, lora
from schoolhouse.model.lora import Adapted

MARK = "schoolhouse_export.txt"
"""The file that says a directory may be written again."""
SHARD_BYTES = 4 << 30
"""Tensors of one file: as many as stay under this number of bytes are in memory at once."""
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<which>gate|up|down)_proj\.weight")


@dataclass(frozen=True, slots=True)
class Trained:
    """What was trained: tensors by their names in the trained model, and the adapters' settings where there are any."""

    weights: Mapping[str, Tensor]
    lora: Lora | None
    frozen: tuple[str, ...] = ()
    """`model.freeze`: adapters stand beside nothing in these parts."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Which part of the model's tensor a tensor of the base's files is."""

    tensor: str
    expert: int | None = None
    half: int | None = None
    """0: the gate, 1: the rest of a stack that holds both."""

    def cut(self, whole: Tensor) -> Tensor:
        """This part of the model's tensor."""
        part = whole if self.expert is None else whole[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]


def staged(out: Path) -> Path:
    """An empty directory beside `out`; raises ConfigError where `out` holds what no export wrote."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} holds files that no export wrote", required="a new or empty directory, or an earlier export",
            where=str(out), remedy="choose another --out",
        )
    staging = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, out: Path, proof: str) -> None:
    """Give a proved directory its name."""
    (staging / MARK).write_text(f"written and verified by schoolhouse export: {proof}\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


def write_model(base: Path, trained: Trained, served: Served, place: Path) -> None:
    """The whole model, adapters merged; about one file's tensors are in memory at once."""
    skeleton = load.skeleton(base, trained.lora, trained.frozen)
    adapters = {one.tensor: one for one in lora.adapted(skeleton)} if trained.lora else {}
    pieces = _pieces(base, skeleton)
    changed = {name for name in trained.weights if "lora_" not in name} | set(adapters)
    if changed <= {piece.tensor for piece in pieces.values()}:
        _write_files(place, _stream(base, lambda key, old: _new(pieces.get(key), old, adapters, trained)))
        shutil.copy(base / "config.json", place / "config.json")
    else:  # the base's files name their tensors in another way than the model: transformers knows the way back
        _write_whole(base, adapters, trained, place)
    _write_beside(base, served, place)


def write_adapter(base: Path, name: str, revision: str | None, trained: Trained, served: Served, place: Path) -> None:
    """The adapter alone as PEFT saves it, for the base model `name` (a hub id or a directory)."""
    model = load.skeleton(base, None, trained.frozen)
    configuration = lora.config(model, trained.lora, name)
    configuration.revision, configuration.inference_mode = revision, True
    configuration.save_pretrained(place)
    save_file(adapter_files.tensors(model, trained.weights), place / adapter_files.TENSORS, metadata={"format": "pt"})
    _write_beside(base, served, place)


@torch.no_grad()
def put_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy trained weights into the parameters of the same name; every one of them must be there."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise CheckpointError(
            f"the model has no parameter {unknown[0]}", required="the architecture that was trained",
            where="model.path", remedy="put the base model back as it was when the run began",
        )
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def layout(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and number format of every tensor in a model directory."""
    found = {}
    for file in _files(directory):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - a handle, not a dict
                piece = opened.get_slice(key)
                found[key] = (tuple(piece.get_shape()), piece.get_dtype())
    return found


def _files(directory: Path) -> list[Path]:
    """The weight files that transformers would read."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(named))]
    return [directory / "model.safetensors"]


def _pieces(base: Path, skeleton: torch.nn.Module) -> dict[str, _Piece]:
    """For every tensor of the base's files, which part of the model's tensors it is; unknown ones are left out."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names[lora.plain_name(name)] = first.setdefault(id(parameter), lora.plain_name(name))  # tied: one tensor
    found = {}
    for key in layout(base):
        matched = _EXPERT.fullmatch(key)
        if key in names:
            found[key] = _Piece(names[key])
        elif matched:
            which, number = matched["which"], int(matched["number"])
            stack = f"{matched['stack']}.{'down_proj' if which == 'down' else 'gate_up_proj'}"
            if stack in names:
                found[key] = _Piece(stack, number, {"gate": 0, "up": 1, "down": None}[which])
    return found


def _new(piece: _Piece | None, old: Tensor, adapters: Mapping[str, Adapted], trained: Trained) -> Tensor:
    """What stands in the place of a tensor of the base."""
    if piece is None:
        return old
    if piece.tensor in trained.weights:
        return piece.cut(trained.weights[piece.tensor]).to(old.dtype)
    if piece.tensor in adapters:
        one = adapters[piece.tensor]
        if piece.expert is None:
            beside = fourbit.rounded(old) if trained.lora.base == "nf4" and not one.embedding else old
            return lora.merged(beside, one, trained.weights, trained.lora).to(old.dtype)
        delta = lora.delta(one, trained.weights, trained.lora, piece.expert)
        return (old.to(delta.dtype) + (delta if piece.half is None else delta.chunk(2)[piece.half])).to(old.dtype)
    return old


def _stream(base: Path, change: Callable[[str, Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    for file in _files(base):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                yield key, change(key, opened.get_tensor(key))


def _write_files(place: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, `SHARD_BYTES` a file, with the index that several files need."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, place / f".shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for key, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[key] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (place / ".shard-0").rename(place / "model.safetensors")
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (place / f".shard-{number}").rename(place / name)
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_whole(base: Path, adapters: Mapping[str, Adapted], trained: Trained, place: Path) -> None:
    model = load.plain(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_new(_Piece(name), parameter, adapters, trained))
    model.save_pretrained(place)


def _write_beside(base: Path, served: Served, place: Path) -> None:
    """Tokenizer, chat template, the stop tokens in the generation settings, and the base's other settings and code."""
    inert.copy_code(base, place)
    served.tokenizer.chat_template = served.template.source
    served.tokenizer.save_pretrained(place)
    path = base / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings["eos_token_id"] = list(served.stops.ids)
    (place / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if (base / name).is_file():
            shutil.copy(base / name, place / name)
    if served.sight is not None:  # with the recipe's own limit of tokens, as it was trained
        served.sight.processor.save_pretrained(place)
        path = place / "processor_config.json"  # where transformers 5 keeps the image processor: read before the other
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "image_processor" in told:
            told["image_processor"] = json.loads(served.sight.processor.to_json_string())
            path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

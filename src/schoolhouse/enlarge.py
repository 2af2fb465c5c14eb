"""A model with new tokens is a directory of its own, as a starter student is: a tokenizer that knows them, and rows for
them in the embeddings and the head. Whatever loads, trains or exports a model needs no word about it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from schoolhouse import inert
from schoolhouse.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def fingerprint(base: Path, tokens: Sequence[str]) -> str:
    """Of all that decides the enlarged model: texts by their bytes, weights by size and time of their files."""
    parts = [list(tokens), version("transformers"), inert.code(base)]
    found = hashlib.sha256(json.dumps(parts).encode() + Path(__file__).read_bytes())
    for path in sorted([*base.iterdir(), *base.glob("additional_chat_templates/*")]):
        if path.suffix == ".safetensors":
            about = path.stat()
            found.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
        elif path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def build(base: Path, tokens: Sequence[str], directory: Path) -> None:
    """Write the model of `base` with new tokens; the memory is that of the model in the format of its files.

    Spare rows that a model has behind its tokenizer's words are used first. A new token begins as the mean of all
    known ones, in the embeddings and in the head, so that it is neither likely nor unlikely.
    """
    from transformers import AddedToken, AutoTokenizer

    with inert.code_refused(base):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=inert.allowed())
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise ConfigError(
            f"{known[0]!r} is a token of this model already", required="tokens that it does not know",
            where="model.new_tokens", remedy="leave it out: it can be used as it is",
        )
    words = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".lock")):
            shutil.copy(path, directory / path.name)
    inert.copy_code(base, directory)
    tokenizer.save_pretrained(directory)
    with inert.code_refused(base):
        _enlarged(base, tokenizer, words).save_pretrained(directory)


def _enlarged(base: Path, tokenizer: PreTrainedTokenizerFast, words: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = "vision_config" in json.loads((base / "config.json").read_text(encoding="utf-8"))
    try:
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
            base, dtype="auto", trust_remote_code=inert.allowed(), use_safetensors=True, local_files_only=True
        )
    except OSError as error:
        raise ModelError(
            f"the model does not load: {' '.join(str(error).split())[:200]}", where=str(base),
            required="a model of transformers, in safetensors", remedy="check config.json and the weights",
        ) from None
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in module.parameters():  # a head's bias too
                parameter[words : len(tokenizer)] = parameter[:words].float().mean(0).to(parameter.dtype)
    return model

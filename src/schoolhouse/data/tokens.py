"""The tokenizer side of a model directory: text to ids as serving does it, and the tokens that end an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schoolhouse.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)
"""Everything in a model directory that decides what a row becomes."""


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end an answer, in training, in the exam, and in what is exported."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from files only; code that comes with a model is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"the tokenizer does not load: {str(error).splitlines()[0]:.200}",
            required="tokenizer files that transformers loads without remote code",
            where=str(directory), remedy="check that tokenizer.json and tokenizer_config.json are whole",
        ) from None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text alone to ids; nothing is added, because a chat template writes its own special tokens.

    Special tokens are barriers: a tokenizer cuts them out first and treats what stands between them alone. So texts
    that repeat one another (the prompts of a long conversation) share pieces, and each piece is tokenized once.
    """
    barrier = _barrier(tokenizer)
    pieces = [[piece for piece in barrier.split(text) if piece] if barrier else [text] for text in texts]
    unique = list(dict.fromkeys(piece for text in pieces for piece in text))
    if not unique:
        return [[] for _ in texts]
    encoded = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    known = dict(zip(unique, encoded, strict=True))
    return [[token for piece in text for token in known[piece]] for text in pieces]


def _barrier(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the place before each special token that is taken as it stands, blanks beside it included or not.

    The token stays at the head of its piece, so that a rule for the very first word of a text meets the same word.
    """
    plain = [
        token.content for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    longest_first = sorted(plain, key=len, reverse=True)
    return re.compile(f"(?={'|'.join(map(re.escape, longest_first))})") if plain else None


def stop_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase, named: Sequence[str]) -> Stops:
    """The stop tokens the recipe names, else the generation configuration's, else the tokenizer's end token."""
    unknown = [text for text in named if tokenizer.convert_tokens_to_ids(text) in (None, tokenizer.unk_token_id)]
    if unknown:
        raise ConfigError(
            f"the tokenizer has no token {unknown[0]!r}", required="tokens of the tokenizer's vocabulary",
            where="model.stop_tokens", remedy="check its spelling in tokenizer_config.json",
        )
    ids = [tokenizer.convert_tokens_to_ids(text) for text in named] or _generation_stops(directory)
    if not ids and tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id]
    if not ids:
        raise ConfigError(
            "the model has no stop token", required="a token that ends each answer",
            where=str(directory), remedy="set model.stop_tokens",
        )
    return Stops(tuple(ids), tuple(tokenizer.decode([token]) for token in ids))


def _generation_stops(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if value is None else value if isinstance(value, list) else [value]

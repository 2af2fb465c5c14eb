"""The tokenizer side of a model directory: text to ids as serving does it, and the tokens that end an answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from schoolhouse import inert
from schoolhouse.data import pieces, words
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json",
)
MORE_FILES = ("processor_config.json", "additional_chat_templates/*")
"""Everything in a model directory that decides what a row becomes; of these what is there: the file in which
transformers 5 keeps an image processor, and templates with a name, such as `tool_use`."""
PROBES = (
    "18 + 1234 = <<18+1234=1252>>1252", "They don't; WE'LL see, it's 3.5%!", "  two blanks,\t\ta tab\n\n and lines\r\n",
    "你好，世界。今天25日", "naïve café re\u0301sume\u0301 हिन्दी ไทย", "def f(x):\n    return x**2  # _y_",
    "🙂👍🏽 ①½ ﬁ",
)
"""What tokenizers' rules are known to cut in different ways: digits, contractions, blanks, marks, code, symbols."""


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end an answer, in training, in the exam, and in what is exported."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    known: tuple[str, ...] = ()
    """The tokenizer's other added tokens: candidates, where a template ends its answers with none of `texts`."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from files only.

    Classes of transformers 5 keep the vocabulary and the merges in Python's objects as well, for nothing once the
    backend has them (Whisper's alone writes its files from them): 57 MiB of Qwen2.5's.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=inert.allowed(), local_files_only=True)
    except (OSError, ValueError, KeyError, *inert.faults()) as error:
        inert.refuse_code(error, directory)
        raise ConfigError(
            f"the tokenizer does not load: {str(error).splitlines()[0]:.200}",
            required="tokenizer files that transformers loads without remote code",
            where=str(directory), remedy="check that tokenizer.json and tokenizer_config.json are whole",
        ) from None
    if loaded.is_fast and type(loaded).__module__.startswith("transformers."):
        for copied in ("_vocab", "_merges"):
            vars(loaded).pop(copied, None)
    return loaded


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer in force, and whether it makes of text what tokenizer.json says.

    transformers 5 chooses the class by the model's type, and most classes put their own rules and special tokens in the
    place of the file's: a Qwen2 model with another tokenizer than Qwen2's is then read as it never was before, in
    training and by servers that load it so. Servers that read the file itself see other tokens.
    """
    name, path = type(tokenizer).__name__, Path(tokenizer.name_or_path) / "tokenizer.json"
    if not tokenizer.is_fast or not path.is_file():
        return name
    other = _otherwise(tokenizer.backend_tokenizer, path)
    if other is None:
        return f"{name}, as tokenizer.json"
    return f"{name}, NOT as tokenizer.json, which makes other tokens of {other!r}"


def _otherwise(loaded: Tokenizer, path: Path) -> str | None:
    """The first text of which a tokenizer makes other tokens than its file; None where there is none."""
    from tokenizers import Tokenizer

    both = loaded, Tokenizer.from_file(str(path))
    added = dict.fromkeys(one.content for each in both for one in each.get_added_tokens_decoder().values())
    texts = [*added, *PROBES]
    for each in both:
        _whole(each)
    ids = ([one.ids for one in each.encode_batch(texts, add_special_tokens=False)] for each in both)
    return next((text for text, one, other in zip(texts, *ids, strict=True) if one != other), None)


def _whole(backend: Tokenizer) -> None:
    """Have it neither cut nor fill up texts: a tokenizer.json may ask for both."""
    backend.no_truncation()
    backend.no_padding()


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text alone to ids; nothing is added, because a chat template writes its own special tokens."""
    reader = _reader(tokenizer)
    return [np.frombuffer(ids, np.int32).tolist() for ids in _encode(reader, list(reader.barrier.split_all(texts)))]


def tokenize_turns(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Turn]]
) -> list[list[tuple[bytes, bytes]]]:
    """The ids, as int32, of prompt and completion of each turn of each row; what texts share is tokenized once.

    A prompt is tokenized alone, as serving does it, a completion as the model goes on behind a prompt.
    """
    reader = _reader(tokenizer)
    turns = [turn for row in rows for turn in row]
    prompts = [text for row in rows for text in reader.barrier.split_all(turn.prompt for turn in row)]
    completions = list(reader.barrier.split_all(turn.completion for turn in turns))
    ids = _encode(reader, [*prompts, *completions])
    shown, written = ids[: len(turns)], ids[len(turns):]
    if reader.marks_beginning:
        behind = _behind(reader, [turn.completion for turn in turns])
        written = [behind.get(turn.completion, alone) if turn.prompt else alone
                   for turn, alone in zip(turns, written, strict=True)]
    pairs = zip(shown, written, strict=True)
    return [list(islice(pairs, len(row))) for row in rows]


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tokenizer with what was found out about it."""

    tokenizer: PreTrainedTokenizerBase
    barrier: pieces.Barrier
    words: words.Words | None
    """None where each text has to be tokenized as a whole."""

    @property
    def marks_beginning(self) -> bool:
        """Whether a text's first word is another one behind a prompt: SentencePiece's kind writes a blank before it."""
        lead, *texts = _encode(self, [[text] for text in ("\n", "a", " a", "\na", "\n a")])
        return texts[2:] != [lead + ids for ids in texts[:2]]


@functools.lru_cache(maxsize=4)
def _reader(tokenizer: PreTrainedTokenizerBase) -> _Reader:
    """Found out once: a tokenizer does not change after it was loaded."""
    barrier = pieces.barrier(tokenizer)
    if not tokenizer.is_fast:
        return _Reader(tokenizer, barrier, None)
    backend = tokenizer.backend_tokenizer
    _whole(backend)
    return _Reader(tokenizer, barrier, words.words(backend, barrier))


def _encode(reader: _Reader, texts: Sequence[Sequence[str]]) -> list[bytes]:
    """The ids of texts that are given in pieces; each distinct piece is tokenized once."""
    unique = list(dict.fromkeys(chain.from_iterable(texts)))
    known = dict(zip(unique, _alone(reader, unique), strict=True))
    return [b"".join(map(known.__getitem__, text)) for text in texts]


def _alone(reader: _Reader, texts: list[str]) -> list[bytes]:
    """The ids of each text alone."""
    if reader.words:
        return reader.words.ids(texts)
    if reader.tokenizer.is_fast:
        return words.encoded(reader.tokenizer.backend_tokenizer, texts)
    plain = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [words.packed(ids) for ids in reader.tokenizer(texts, **plain)["input_ids"]] if texts else []


def _behind(reader: _Reader, texts: Sequence[str]) -> dict[str, bytes]:
    """The ids of texts as they stand behind another, of which they must not change the ids."""
    found: dict[str, bytes] = {}
    for lead in ("\n", ".", "a"):
        unknown = [text for text in texts if text not in found]
        mark, *longer = _encode(reader, list(reader.barrier.split_all([lead, *(lead + text for text in unknown)])))
        both = zip(unknown, longer, strict=True)
        found |= {text: ids[len(mark):] for text, ids in both if ids.startswith(mark)}
    return found


def own_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str] | None:
    """The chat template that comes with a model; older ones with images keep it in a file of its own."""
    path = directory / "chat_template.json"
    if tokenizer.chat_template or not path.is_file():
        return tokenizer.chat_template
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


def stop_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase, named: Sequence[str]) -> Stops:
    """The stop tokens the recipe names, else the generation configuration's, else the tokenizer's end token."""
    ids = [_named(tokenizer, text) for text in named] or _generation_stops(directory)
    if not ids and tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id]
    if not ids:
        raise ConfigError(
            "the model has no stop token", required="a token that ends each answer",
            where=str(directory), remedy="set model.stop_tokens",
        )
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    texts = [added.get(token) or tokenizer.decode([token]) for token in ids]
    if "" in texts:
        raise DataError(
            f"the tokenizer has no token {ids[texts.index('')]}", required="stop tokens of the tokenizer's vocabulary",
            where=f"eos_token_id in {directory / 'generation_config.json'}", remedy="set model.stop_tokens",
        )
    return Stops(tuple(ids), tuple(texts), tuple(text for text in added.values() if text not in texts))


def vocabulary(directory: Path) -> int | None:
    """The number of embeddings that the model's configuration tells."""
    return _setting(directory, "vocab_size")


def positions(directory: Path) -> int | None:
    """The number of tokens that the model was made for, as its configuration tells it."""
    return _setting(directory, "max_position_embeddings", "n_positions")


def _setting(directory: Path, *names: str) -> int | None:
    """The first of these settings that is there; models of several parts tell it in one."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = (config, config.get("text_config") or {})
    return next((part[name] for name in names for part in parts if part.get(name)), None)


def beyond(directory: Path, longest: int) -> dict[str, str]:
    """What to say of an example that is longer than the model was made for; nothing where none is."""
    made_for = positions(directory)
    if made_for is None or longest <= made_for:
        return {}
    return {"positions": f"the longest example has {longest:,} tokens, and the model was made for {made_for:,}: what "
                         "stands behind them is new to it (data.max_tokens)"}


def _named(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a token that the recipe names."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or (token == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise ConfigError(
            f"the tokenizer has no token {text!r}", required="tokens of the tokenizer's vocabulary",
            where="model.stop_tokens", remedy="check its spelling in tokenizer_config.json",
        )
    return token


def _generation_stops(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if value is None else value if isinstance(value, list) else [value]

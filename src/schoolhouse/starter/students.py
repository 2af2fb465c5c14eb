"""Students that are made, not downloaded: small models with random weights, in the Hugging Face layout.

A student is an ordinary directory: plain `AutoModelForCausalLM` and `AutoTokenizer` load it, and nothing in this
program treats it otherwise. Its tokenizer is trained on a lesson, its weights come from a fixed seed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schoolhouse.errors import ConfigError
from schoolhouse.starter import lessons

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerFast

_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
}
_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "initializer_range": 0.08,
}
_ROTARY = {"rope_type": "default", "rope_theta": 200.0}
_PLACED = {**_ROTARY, "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
"""Positions in time, height and width."""
_STUDENTS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **_TEXT, "rope_parameters": _ROTARY, "tie_word_embeddings": True},
    "qwen3-vl": {
        "model_type": "qwen3_vl",
        "text_config": {**_TEXT, "rope_parameters": _PLACED},
        "vision_config": {**_TOWER, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
    },
    "qwen3.5": {
        "model_type": "qwen3_5",
        "text_config": {
            **_TEXT,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {**_PLACED, "partial_rotary_factor": 1.0},
        },
        "vision_config": _TOWER,
        "tie_word_embeddings": True,
    },
}
"""The configuration of each student; the vocabulary and the special tokens are the tokenizer's."""

NAMES = tuple(_STUDENTS)
"""The students there are."""

_SEED = 0
_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

_VOCABULARY = 1024
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_THINKING = ("<think>", "</think>")
_SEEING = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}
"""The tokens of a student that sees, by the name of their id in its configuration."""

_WORDS = (
    r"\p{N}"
    r"| = \$?<<"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+(?:\n| (?=\p{N}))?"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+| (?=\p{N}))?"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where words part: each digit stands alone; a word carries the blank before it, and one between it and a number."""

_CORPUS, _CORPUS_ROWS = "arithmetic", 4000
"""The lesson whose rows the tokenizer learns its words from; the other lessons speak of the same people and things."""
_SIGHTS = "sights"
"""The lesson whose words a student that sees knows too."""


def build(name: str, directory: Path) -> None:
    """Write a student; raises ConfigError when there is none of that name."""
    _require(name)
    settings = _STUDENTS[name]
    tokenizer = _tokenizer(_SEEING if _sees(settings) else {}, settings["model_type"])
    tokenizer.save_pretrained(directory)
    _model(settings, tokenizer).save_pretrained(directory)
    if _sees(settings):
        _image_processor(settings).save_pretrained(directory)


def sees(name: str) -> bool:
    """Whether a student takes images; raises ConfigError when there is none of that name."""
    _require(name)
    return _sees(_STUDENTS[name])


def _sees(settings: Mapping[str, Any]) -> bool:
    return "vision_config" in settings


def _image_processor(settings: Mapping[str, Any]) -> BaseImageProcessor:
    """Qwen's image processor for small pictures: from four tokens to 256."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patch = settings["vision_config"]["patch_size"]
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": (4 * patch) ** 2, "longest_edge": (32 * patch) ** 2},
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
    )


def fingerprint(name: str) -> str:
    """The sha256 of all that decides the student: this file, the template, the lesson, the libraries' versions."""
    _require(name)
    parts = [name, *(version(library) for library in ("torch", "transformers", "tokenizers"))]
    parts += [lessons.fingerprint(lesson, "train") for lesson in (_CORPUS, _SIGHTS)]
    files = Path(__file__).read_bytes() + _TEMPLATE.read_bytes()
    return hashlib.sha256(json.dumps(parts).encode() + files).hexdigest()


def _require(name: str) -> None:
    if name in NAMES:
        return
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5) or NAMES[:1]
    raise ConfigError(
        f"there is no starter student `{name}`",
        required=f"one of: {', '.join(f'starter/{known}' for known in NAMES)}",
        where=f"model: starter/{name}",
        remedy=f"did you mean `starter/{near[0]}`?",
    )


def _model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, the same each time; the caller's random numbers are left as they were."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    size, loader = {"vocab_size": len(tokenizer)}, AutoModelForCausalLM
    if _sees(settings):
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _SEEING.items()}
        settings, loader = {**settings, "text_config": {**settings["text_config"], **size, **ends}}, (
            AutoModelForImageTextToText)
        size = ids
    config = AutoConfig.for_model(**settings, **ends, **size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(_SEED)
        model = loader.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ends)
    return model


def _tokenizer(seeing: Mapping[str, str], model_type: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016): no byte is ever lost, no digit is ever merged.

    Of Qwen3.5's models transformers reads any tokenizer by their own rules for words, so these are theirs here, too.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    bpe, words = Tokenizer(models.BPE()), _WORDS
    if model_type == "qwen3_5":
        bpe.normalizer, words = normalizers.NFC(), PRETOKENIZE_REGEX
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(_corpus(bool(seeing)), trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(_THINKING) - len(seeing),
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    bpe.add_tokens([AddedToken(token, normalized=False) for token in (*_THINKING, *seeing.values())])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_END,
        pad_token=_PAD,
        chat_template=_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def _corpus(seeing: bool) -> Iterator[str]:
    """The text the tokenizer learns its words from: the first rows of the lesson, and the roles' names."""
    if seeing:
        for row in islice(lessons.rows(_SIGHTS, "train"), _CORPUS_ROWS):
            yield f"{row['question']}\n{row['answer']}"
    for row in islice(lessons.rows(_CORPUS, "train"), _CORPUS_ROWS):
        yield "system\nuser\nassistant\n"
        yield from row.values()

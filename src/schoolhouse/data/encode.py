"""From turns to examples: tokenized as serving meets them, merged where that is exact, shifted once, cut at turns."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from schoolhouse.errors import DataError, TemplateError
from schoolhouse.types import UNSUPERVISED, Example, Origin, Picture, Turn

Ids = tuple[bytes, bytes]
"""Token ids of a turn's prompt and of its completion, as int32: so they are put together and compared at once."""
_SIZE = 4
"""Bytes of an id."""
TooLong = Literal["error", "drop", "turns"]


class TooLongError(DataError):
    """A row has more tokens than an example may have."""

    tokens = 0
    """What it has; a worker process counts them and hands the error on without."""


@dataclass(slots=True)
class _Sequence:
    """Tokens of turns that continue one another, before they become an example."""

    tokens: bytes = b""
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    """Of each turn: the places of its completion's first token and behind its stop token, and its weight."""
    images: list[tuple[Picture, ...]] = field(default_factory=list)
    """The images shown up to the end of each turn."""

    def append(self, prompt: bytes, completion: bytes, turn: Turn) -> None:
        self.tokens = prompt + completion
        self.spans.append((len(prompt) // _SIZE, len(self.tokens) // _SIZE, turn.weight))
        self.images.append(turn.images)

    def example(self, turns: int, origin: Origin) -> Example:
        """The first turns as inputs and aligned targets: the one shift of the whole program."""
        end = self.spans[turns - 1][1]
        tokens = np.frombuffer(self.tokens, np.int32, end)
        weights, labels = np.zeros(end - 1, np.float32), np.full(end - 1, UNSUPERVISED, np.int32)
        for first, last, weight in self.spans[:turns]:
            if np.float32(weight):
                target, place = max(first, 1), slice(max(first, 1) - 1, last - 1)
                weights[place], labels[place] = weight, tokens[target:last]
        return Example(tokens[:-1], labels, weights, origin, self.images[turns - 1])


def to_examples(
    turns: Sequence[Turn], ids: Sequence[Ids], stop_ids: Collection[int], origin: Origin,
    *, max_tokens: int, too_long: TooLong,
) -> tuple[tuple[Example, ...], int, int]:
    """The examples of a row, the number of turns cut, and the tokens of the longest sequence before any was.

    There is no example where the row is to be dropped.

    A turn continues the example before it when that example's tokens are a prefix of its prompt's tokens, which is
    what a serving engine with a prefix cache would find; otherwise it begins a new one.
    """
    sequences = _merge(turns, ids, stop_ids, origin)
    longest = max((sequence.spans[-1][1] - 1 for sequence in sequences), default=0)
    examples, cut = [], 0
    for sequence in sequences:
        fitting = sum(end - 1 <= max_tokens for _, end, _ in sequence.spans)
        if fitting < len(sequence.spans) and too_long != "turns":
            if too_long == "error":
                raise _too_long(longest, max_tokens, origin)
            return (), 0, longest
        cut += len(sequence.spans) - fitting
        if fitting:
            examples.append(sequence.example(fitting, origin))
    return tuple(examples), cut, longest


def _merge(
    turns: Sequence[Turn], ids: Sequence[Ids], stop_ids: Collection[int], origin: Origin
) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for turn, (prompt, completion) in zip(turns, ids, strict=True):
        _check_stop(completion, stop_ids, turn, origin)
        if not sequences or not prompt.startswith(sequences[-1].tokens):
            sequences.append(_Sequence())
        sequences[-1].append(prompt, completion, turn)
    return sequences


def _check_stop(completion: bytes, stop_ids: Collection[int], turn: Turn, origin: Origin) -> None:
    """The stop token must be the last target and the only one of its kind, as generation would end there."""
    marks = tuple(stop.to_bytes(_SIZE, sys.byteorder) for stop in stop_ids)
    if completion.endswith(marks) and sum(map(completion.count, marks)) == 1:
        return  # told at once; bytes of two ids that look like a third go the long way
    tokens = np.frombuffer(completion, np.int32).tolist()
    stops = [place for place, token in enumerate(tokens) if token in stop_ids]
    if stops != [len(tokens) - 1]:
        raise TemplateError(
            f"the answer's stop token is not one token: {turn.completion[-40:]!r} becomes {tokens[-8:]}",
            required=f"a last token among {sorted(stop_ids)}",
            where=str(origin),
            remedy="set model.stop_tokens to a token of the tokenizer's vocabulary",
        )


def _too_long(tokens: int, max_tokens: int, origin: Origin) -> TooLongError:
    error = TooLongError(
        f"the row has {tokens} tokens, more than {max_tokens}",
        required="rows that fit in data.max_tokens (unset: batch.tokens)",
        where=str(origin),
        remedy="raise them, or set data.too_long to `drop` or `turns` (cuts whole turns from the end)",
    )
    error.tokens = tokens
    return error

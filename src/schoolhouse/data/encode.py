"""From turns to examples: tokenized as serving meets them, merged where that is exact, shifted once, cut at turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from schoolhouse.errors import DataError, TemplateError
from schoolhouse.types import UNSUPERVISED, Example, Origin, Picture, Turn

Ids = tuple[list[int], list[int]]
"""Token ids of a turn's prompt and of its completion."""
TooLong = Literal["error", "drop", "turns"]


class TooLongError(DataError):
    """A row has more tokens than an example may have."""

    tokens = 0
    """What it has; a worker process counts them and hands the error on without."""


@dataclass(slots=True)
class _Sequence:
    """Tokens of turns that continue one another, before they become an example."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """The number of tokens through the stop token of each turn."""
    images: list[tuple[Picture, ...]] = field(default_factory=list)
    """The images shown up to each of these ends."""

    def append(self, prompt: list[int], completion: list[int], turn: Turn) -> None:
        new = len(prompt) - len(self.tokens)
        self.weights += [0.0] * new + [turn.weight] * len(completion)
        self.tokens = prompt + completion
        self.ends.append(len(self.tokens))
        self.images.append(turn.images)

    def example(self, end: int, origin: Origin) -> Example:
        """The first `end` tokens as inputs and aligned targets: the one shift of the whole program."""
        tokens = np.asarray(self.tokens[:end], dtype=np.int32)
        weights = np.asarray(self.weights[1:end], dtype=np.float32)
        labels = np.where(weights != 0, tokens[1:], np.int32(UNSUPERVISED)).astype(np.int32)
        return Example(tokens[:-1], labels, weights, origin, self.images[self.ends.index(end)])


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
    longest = max((sequence.ends[-1] - 1 for sequence in sequences), default=0)
    examples, cut = [], 0
    for sequence in sequences:
        fitting = [end for end in sequence.ends if end - 1 <= max_tokens]
        if len(fitting) < len(sequence.ends) and too_long != "turns":
            if too_long == "error":
                raise _too_long(longest, max_tokens, origin)
            return (), 0, longest
        cut += len(sequence.ends) - len(fitting)
        if fitting:
            examples.append(sequence.example(fitting[-1], origin))
    return tuple(examples), cut, longest


def _merge(
    turns: Sequence[Turn], ids: Sequence[Ids], stop_ids: Collection[int], origin: Origin
) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for turn, (prompt, completion) in zip(turns, ids, strict=True):
        _check_stop(completion, stop_ids, turn, origin)
        if not sequences or prompt[: len(sequences[-1].tokens)] != sequences[-1].tokens:
            sequences.append(_Sequence())
        sequences[-1].append(prompt, completion, turn)
    return sequences


def _check_stop(completion: list[int], stop_ids: Collection[int], turn: Turn, origin: Origin) -> None:
    """The stop token must be the last target and the only one of its kind, as generation would end there."""
    stops = [place for place, token in enumerate(completion) if token in stop_ids]
    if stops != [len(completion) - 1]:
        raise TemplateError(
            f"the answer's stop token is not one token: {turn.completion[-40:]!r} becomes {completion[-8:]}",
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

"""Where a text can be cut without changing its tokens, so that what texts share is tokenized once.

A tokenizer cuts its added tokens out first and treats what stands between them alone. So a text may be cut before each
of them: the pieces' tokens, one after another, are the text's. This holds for added tokens that are taken as they
stand; where the tokenizer normalizes text first, only those that it looks for before that. (Hugging Face tokenizers,
`AddedVocabulary.extract_and_normalize`: leftmost-longest matches, first of tokens that are not normalized, then,
in what is left, of those that are.)
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Barrier:
    """Finds the places where a tokenizer's text can be cut."""

    first: re.Pattern[str]
    """The added tokens that are looked for before normalization."""
    second: re.Pattern[str]
    """Those looked for after it, where there is no normalization."""
    plain: frozenset[str]
    """Those of both that take nothing of their neighbourhood with them."""
    longest: int
    """Characters of the longest of all."""
    all_plain: bool
    """Whether there is no other added token, so that a piece holds none but perhaps one at its beginning."""

    def places(self, text: str, start: int = 0) -> list[int]:
        """The places from `start`, a place itself or 0, before which the text can be cut."""
        matches = self._matches if self.second is not _NEVER else self.first.finditer
        return [match.start() for match in matches(text, start) if match[0] in self.plain]

    def head(self, piece: str) -> int:
        """The length of the added token at the beginning of a piece; 0 where there is none."""
        match = self.first.match(piece)
        if match is None and self.second is not _NEVER:
            match = self.second.match(piece)
        return match.end() if match else 0

    def _matches(self, text: str, start: int) -> Iterator[re.Match[str]]:
        for match in self.first.finditer(text, start):
            yield from self.second.finditer(text, start, match.start())
            yield match
            start = match.end()
        yield from self.second.finditer(text, start)

    def split_all(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """The pieces of each text; of a text that begins with the one before it, only what is new is searched.

        A place found in a text is one of its continuation too if no longer token could begin before it.
        """
        before, places, pieces = "", [0], [""]
        for text in texts:
            kept = bisect.bisect_right(places, len(before) - self.longest) - 1 if text.startswith(before) else 0
            kept = max(kept, 0)
            start = places[kept]
            new = self.places(text, start)
            new = new if new and new[0] == start else [start, *new]
            places = places[:kept] + new
            pieces = pieces[:kept] + [text[first:last] for first, last in pairwise([*new, len(text)])]
            before = text
            yield pieces


def barrier(tokenizer: PreTrainedTokenizerBase) -> Barrier:
    """The barrier of a tokenizer; one that finds nothing for a tokenizer written in Python."""
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.encode_special_tokens:
        return Barrier(_NEVER, _NEVER, frozenset(), 0, False)
    added = list(tokenizer.added_tokens_decoder.values())
    first = [token for token in added if not token.normalized]
    second = [token for token in added if token.normalized] if tokenizer.backend_tokenizer.normalizer is None else []
    plain = frozenset(token.content for token in first + second if _is_plain(token))
    longest = max((len(token.content) for token in added), default=0)
    return Barrier(_any(first), _any(second), plain, longest, len(plain) == len(added))


def _is_plain(token: AddedToken) -> bool:
    alone = not (token.lstrip or token.rstrip or token.single_word)
    return alone and token.content == token.content.strip()


def _any(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Matches the longest of the tokens at a place."""
    longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else _NEVER

"""A tokenizer's words: it makes tokens of each alone, so the tokens of a word that was met before are known.

A tokenizer with a byte-level vocabulary first cuts a text into words by regular expressions (its pre-tokenizer), and
then looks at each word alone. Here the same expressions are run by Python's `re`, several times faster than the way
through the tokenizer, which only sees words that are new. That gives the same tokens where `re` means the same by an
expression as the tokenizer's own engine (Oniguruma, as Ruby writes it). So an expression is rewritten from parts that
mean the same in both; classes of characters such as `\\p{L}` are not looked up in Python's Unicode tables but asked of
that engine. Texts with characters beyond the basic plane, or that the tokenizer would normalize, are not cut.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, filterfalse
from typing import TYPE_CHECKING, Any

import numpy as np

from schoolhouse.data.pieces import Barrier

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Callable[[str], list[str]]

MOST_CHARACTERS = 1 << 20
"""Of all words that are remembered; when there are more, remembering begins again."""
_ALONE = ("Split", "Digits", "Punctuation", "ByteLevel")
"""Pre-tokenizers that treat every piece alone."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel itself cuts by, where it is asked to."""

_FOLDED = {"İ": "i", "ı": "i", "ſ": "s", "\u212a": "k", "ß": "ss", "ẞ": "ss", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl",
           "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
"""Letters beyond ASCII that are letters of ASCII where case is ignored."""

_LINE = "two words"
_SAMPLE = ("def f(x_1):\r\n\t\treturn x_1**2 + 12345.67  # don't, I'LL\n\n\n  Café, naïve – “Größe” … ½ kg",
           "北京的天气怎么样？ 我今年25岁。\u3000कि 가나다 שלום ١٢٣ Ελλάδα\x85\u2028 \xa0 x  ", " \n \n  a", "''s'")
"""What each tokenizer is asked before its words are believed: versions of its engine may differ, too."""

_CLASS = r"\\[pP]\{\^?\w+\}|\\[sSdDwW]"
_LETTER = r"\\[rnt]|\\[^\w\s]"
_ITEM = re.compile(rf"(?P<asked>{_CLASS})|(?P<letter>{_LETTER}|[^\[\]\\&-])(?P<to>-(?:{_LETTER}|[^\[\]\\&-]))?")
_ATOM = re.compile(
    r"(?P<folded>\(\?i:(?:[A-Za-z'|]|\[[A-Za-z]+\])+\))"
    r"|(?P<kept>\(\?[:=!]|\)|\||[?*+][?+]?|\{\d+(?:,\d*)?\}(?![?+]))"
    rf"|(?P<set>\[\^?(?:{_CLASS}|{_LETTER}|[^\[\]\\&-](?:-(?:{_LETTER}|[^\[\]\\&-]))?)+\])"
    rf"|(?P<asked>{_CLASS})|(?P<letter>{_LETTER}|[^.^$*+?{{}}\[\]\\|()])"
)
"""The parts of an expression that mean the same to Oniguruma and to Python."""


@dataclass(slots=True)
class Words:
    """Cuts texts into a tokenizer's words, and remembers their tokens."""

    tokenizer: Tokenizer
    barrier: Barrier
    """Knows the added token at the beginning of a piece."""
    stages: tuple[Split, ...]
    """One after another they cut a text into words."""
    bare: Tokenizer
    """The same tokenizer for words alone: it normalizes nothing, cuts no words and finds no added tokens."""
    strange: str
    """Letters beyond ASCII that an expression which ignores case counts to ASCII."""
    known: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    """The characters of all words that are known."""

    def ids(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text alone, as int32; the texts are pieces that the barrier has cut."""
        if self.size > MOST_CHARACTERS:
            self.known, self.size = {}, 0
        cut = list(map(self._cut, texts))
        found = list(map(self._joined, cut))
        unknown = chain.from_iterable(words for words, ids in zip(cut, found, strict=True) if words and ids is None)
        self._learn(set(filterfalse(self.known.__contains__, unknown)))
        found = [self._joined(words) if ids is None else ids for words, ids in zip(cut, found, strict=True)]
        whole = iter(encoded(self.tokenizer, [text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(whole) if ids is None else ids for ids in found]

    def _joined(self, words: list[str] | None) -> bytes | None:
        """The ids of a text's words; None where one is not known."""
        try:
            return None if words is None else b"".join(map(self.known.__getitem__, words))
        except KeyError:
            return None

    def _cut(self, text: str) -> list[str] | None:
        """The words of a text; None where it is not known that both engines find the same."""
        if not text.isascii() and not self._is_plain(text):
            return None
        head = self.barrier.head(text)
        rest = text[head:] if head else text
        words = self.stages[0](rest) if rest else []
        for split in self.stages[1:]:
            words = list(chain.from_iterable(map(split, words)))
        return [text[:head], *words] if head else words

    def _is_plain(self, text: str) -> bool:
        """Whether both engines read the characters of a text alike, and the tokenizer takes it as it stands."""
        if not _known_characters(self.strange).fullmatch(text):
            return False
        normalizer = self.tokenizer.normalizer
        if normalizer is None:
            return True
        settled = _settled_characters().fullmatch(text)
        return unicodedata.is_normalized("NFC", text) if settled else normalizer.normalize_str(text) == text

    def _learn(self, new: set[str]) -> None:
        """Remember the words that stay whole where they stand alone; a text with another is not cut."""
        whole = [word for word in new if self._cut(word) == [word]]
        added = list(filter(self.barrier.plain.__contains__, whole))
        words = list(filterfalse(self.barrier.plain.__contains__, whole))
        self.known |= zip(words, encoded(self.bare, words), strict=True)
        self.known |= zip(added, encoded(self.tokenizer, added), strict=True)
        self.size += sum(map(len, whole))


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """The ids of each text alone, as int32: without offsets and masks."""
    if not texts:
        return []
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [packed(encoding.ids) for encoding in encodings]


def packed(ids: Sequence[int]) -> bytes:
    """Ids as int32."""
    return array("i", ids).tobytes()


def words(tokenizer: Tokenizer, barrier: Barrier) -> Words | None:
    """The words of a tokenizer; None where it is not understood, and must see every text itself."""
    from tokenizers import models

    if not (barrier.all_plain and isinstance(tokenizer.model, models.BPE) and tokenizer.pre_tokenizer is not None):
        return None
    if tokenizer.model.dropout or (tokenizer.normalizer and _settings(tokenizer.normalizer) != {"type": "NFC"}):
        return None
    found = _words(tokenizer, barrier)
    sample = list(chain.from_iterable(barrier.split_all(_SAMPLE)))
    return found if found and found.ids(sample) == encoded(tokenizer, sample) else None


def _settings(part: Any) -> dict[str, Any]:
    """How a part of a tokenizer would be written into tokenizer.json."""
    return json.loads(part.__getstate__())


def _words(tokenizer: Tokenizer, barrier: Barrier) -> Words | None:
    """The first stages of the pre-tokenizer, through the one that cuts a line into words; None for foreign ones."""
    settings = _settings(tokenizer.pre_tokenizer)
    stages = settings.get("pretokenizers", [settings])
    if any(stage["type"] not in _ALONE or stage.get("add_prefix_space") for stage in stages):
        return None
    splits, sources = [], []
    for number, stage in enumerate(stages):
        source = _source(stage)
        split = _split(source) if source else None
        if split is None:
            return None
        splits.append(split)
        sources.append(source)
        if len(split(_LINE)) > 1:
            behind = [{**stage, "use_regex": False}] if stage["type"] == "ByteLevel" else []
            return Words(
                tokenizer, barrier, tuple(splits), _bare(tokenizer, [*behind, *stages[number + 1 :]]), _strange(sources)
            )
    return None


def _bare(tokenizer: Tokenizer, stages: Sequence[dict[str, Any]]) -> Tokenizer:
    """The model of a tokenizer behind these stages of its pre-tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers

    bare, rest = Tokenizer(tokenizer.model), pre_tokenizers.Sequence([])
    rest.__setstate__(json.dumps({"type": "Sequence", "pretokenizers": list(stages)}).encode())
    bare.pre_tokenizer = rest
    return bare


def _source(stage: dict[str, Any]) -> str | None:
    """The expression by which a stage cuts a text, where everything that it finds and that is between is a piece."""
    if stage["type"] == "ByteLevel" and stage["use_regex"]:
        return _GPT2
    if stage["type"] != "Split" or stage["behavior"] != "Isolated" or stage["invert"]:
        return None
    return stage["pattern"].get("Regex")


def _split(source: str) -> Split | None:
    """Cuts a text into what the expression finds and what stands between; None where the expression is foreign."""
    expression = _rewritten(source)
    if expression is None or re.fullmatch(expression, ""):  # nothing is found everywhere
        return None
    find = re.compile(expression).findall
    cut = functools.cache(lambda: re.compile(f"({expression})").split)  # seldom needed, and long to compile
    covers = "".join(find(_LINE)) == _LINE  # then it mostly finds everything, which is told faster

    def split(text: str) -> list[str]:
        found = find(text) if covers else []
        return found if len("".join(found)) == len(text) else list(filter(None, cut()(text)))

    return split


def _rewritten(source: str) -> str | None:
    """The same expression for Python; None where a part of it is not known to mean the same."""
    atoms, end = [], 0
    while match := _ATOM.match(source, end):
        if match["set"]:
            atoms.append(_rewritten_set(match["set"]))
        elif match["asked"]:
            atoms.append(f"[{_members(match['asked'])}]")
        else:
            atoms.append(re.escape(match["letter"]) if match["letter"] and match["letter"][0] != "\\" else match[0])
        end = match.end()
    return "".join(atoms) if end == len(source) else None


def _rewritten_set(text: str) -> str:
    """A set of characters in brackets."""
    negated = text.startswith("[^")
    inner = text[2 if negated else 1 : -1]
    items = (_members(item["asked"]) if item["asked"] else _escaped(item[0]) for item in _ITEM.finditer(inner))
    return f"[{'^' if negated else ''}{''.join(items)}]"


def _escaped(item: str) -> str:
    """A letter, or a range of them, as it stands in a set."""
    return item if "\\" in item else "-".join(map(re.escape, (item[0], item[2:]))) if len(item) > 1 else re.escape(item)


@functools.lru_cache(maxsize=64)
def _members(kind: str) -> str:
    """The characters of the basic plane that the tokenizer's own engine counts to a class, as ranges in a set."""
    from tokenizers import Regex, normalizers

    found = normalizers.Replace(Regex(f"[^{kind}]"), "").normalize_str(_PLANE)
    return _ranges(list(map(ord, found)))


def _ranges(codes: Sequence[int]) -> str:
    """Sorted codes of characters as ranges in a set."""
    sorted_ = np.asarray(codes)
    ends = np.flatnonzero(np.diff(sorted_) != 1)
    first, last = np.r_[sorted_[:1], sorted_[ends + 1]], np.r_[sorted_[ends], sorted_[-1:]]
    return "".join(f"\\u{one:04x}-\\u{other:04x}" for one, other in zip(first.tolist(), last.tolist(), strict=True))


def _strange(sources: Sequence[str]) -> str:
    """The letters beyond ASCII that are some of ASCII where one of the expressions ignores case."""
    ignoring = "".join(re.findall(r"\(\?i:([^()]*)\)", "".join(sources))).lower()
    return "".join(letter for letter, same in _FOLDED.items() if same in ignoring)


@functools.lru_cache(maxsize=4)
def _known_characters(strange: str) -> re.Pattern[str]:
    """Matches texts of the basic plane without strange letters."""
    return re.compile(f"[^\ud800-\udfff\U00010000-\U0010ffff{strange}]*")


@functools.cache
def _settled_characters() -> re.Pattern[str]:
    """Matches texts of characters that Unicode has had since version 3.2: every later version normalizes them alike.

    (Unicode's stability policy: a text of assigned characters stays normalized.)
    """
    category = unicodedata.ucd_3_2_0.category
    return re.compile(f"[^{_ranges([ord(letter) for letter in _PLANE if category(letter) == 'Cn'])}]*")


_PLANE = "".join(map(chr, chain(range(0xD800), range(0xE000, 0x10000))))
"""All characters of the basic plane but the halves of surrogate pairs."""

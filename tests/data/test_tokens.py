"""Text to ids exactly as the tokenizer does it, whatever is shared between texts; and the tokens that end an answer."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schoolhouse.data import pieces, tokens, words
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import Turn

SHARED = Path(__file__).resolve().parents[3] / "shared"
REAL = ("deepseek-coder-instruct", "gpt2", "llama2", "qwen2.5-instruct", "qwen3", "qwen3-vl")
HOSTILE = st.characters(exclude_categories=["Cs"])
SNIPPETS = (
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u200d", "\ufeff", "\x00", "e\u0301", "\u0301", "ﬁ",
    "▁", "Ġ", "👩‍👩‍👧", "你好", "ש", "<", "<|", "|>", "<|im_start", "im_end|>", "ý", "Á", "1234", "don't", "a", " b",
    "<0x0A>",
)


@pytest.fixture(params=REAL)
def real(request) -> PreTrainedTokenizerBase:
    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers of ../shared")
    return loaded(request.param)


CACHE: dict[str, PreTrainedTokenizerBase] = {}


def loaded(name: str) -> PreTrainedTokenizerBase:
    if name not in CACHE:
        CACHE[name] = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    return CACHE[name]


def texts_with(added: list[str]) -> st.SearchStrategy[str]:
    """Hostile texts in which added tokens stand close together."""
    part = st.one_of(st.sampled_from(SNIPPETS), st.sampled_from(added), st.text(HOSTILE, max_size=6))
    return st.lists(part, max_size=12).map("".join)


def tokenized(tokenizer: PreTrainedTokenizerBase, row: list[Turn]) -> list[tuple[list[int], ...]]:
    """The ids of each turn of a row."""
    [found] = tokens.tokenize_turns(tokenizer, [row])
    return [tuple(np.frombuffer(ids, np.int32).tolist() for ids in turn) for turn in found]


def directly(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=150)
@given(st.data())
def check_tokenize(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    """Texts that begin with one another, and others: each becomes what the tokenizer makes of the whole text."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    parts = data.draw(st.lists(texts_with(added), min_size=1, max_size=5))
    texts = [*accumulate(parts), *parts]
    assert tokens.tokenize(tokenizer, texts) == [directly(tokenizer, text) for text in texts]


def test_tokenizing_in_pieces_is_tokenizing_the_whole(real) -> None:
    check_tokenize(real)


WORDS = ("Café", "don'T", "'S", "'ſ", "'\u212a", "ﬅ", "ß", "İı", "'ll", "12345", "١٢", "½", "二", "…", "_", "+=",
         "\x1c", "\x85", "\u2028", "\u3000", "\r", "\t", "  ", " \n ", "\n\n", "𝒳", "😀", "Å", "A\u030a", "कि", "가",
         "ᆨ", "–", "`", "~", "abc", "ab")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(SNIPPETS), st.text(HOSTILE, max_size=3)),
                         max_size=14).map("".join), max_size=6))
def check_words(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Words known from earlier texts, and those of later ones: each text becomes what the tokenizer makes of it."""
    assert tokens.tokenize(tokenizer, texts) == [directly(tokenizer, text) for text in texts]


def test_known_words_have_the_tokens_they_had(real) -> None:
    check_words(real)


def understood(tokenizer: PreTrainedTokenizerBase) -> bool:
    return words.words(tokenizer.backend_tokenizer, pieces.barrier(tokenizer)) is not None


def test_real_tokenizers_whose_words_are_understood(shared) -> None:
    """SentencePiece's kind has no words: it goes on over blanks."""
    assert [name for name in REAL if not understood(loaded(name))] == ["llama2"]


@pytest.mark.parametrize("source", [r"\p{L}+", r"\p{N}+", r"\s+", r"\p{P}+", r"[^\s\p{L}\p{N}]+"])
def test_every_character_of_the_basic_plane(source: str) -> None:
    """Both engines see the same letters, digits and blanks, whatever Unicode they were made for."""
    text = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    pieces_ = pre_tokenizers.Split(Regex(source), "isolated").pre_tokenize_str(text)
    assert words._split(source)(text) == [piece for piece, _ in pieces_]


def test_letters_that_are_others_where_case_is_ignored() -> None:
    """Engines differ in what they take for the same, so texts with such letters are left to the tokenizer."""
    same = {letter for code in range(128, 0x10000) if not 0xD800 <= code < 0xE000 and (letter := chr(code)) and any(
        one and one.isascii() for one in (letter.lower()[:1], letter.upper(), letter.casefold()))}
    assert same == set(words._FOLDED)
    backend = splitting(LLAMA3).backend_tokenizer
    cut = words.words(backend, pieces.barrier(splitting(LLAMA3)))._cut
    assert cut("'ſ") is None and cut("'ß") == ["'ß"]


def splitting(pattern: str, behavior: str = "isolated", **more: bool) -> PreTrainedTokenizerBase:
    """A tokenizer that cuts by an expression and joins `ab` and two line breaks."""
    tokenizer = made(merges=(("a", "b"), ("Ċ", "Ċ"), ("Ġ", "a"), ("'", "s")))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=more.pop("prefix", False), use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior, **more)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    return tokenizer


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
          r"|\s+(?!\S)|\s+")
EXPRESSIONS = (LLAMA3, CL100K, r" ?[a-zA-Z]+|\d|\W", r"[^\S\n]*\w+|\s", r"\s?\p{Ll}\p{Lu}*|\p{P}+",
               r"[a-c\-\]]+?b| +", r"[aĀ-ſ]+|\s+", r"(?:ab)+|(?=b)b|\P{L}", r"ab(?=c)|\w|\s")


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_expressions_that_are_understood(pattern: str) -> None:
    tokenizer = splitting(pattern)
    assert understood(tokenizer)
    check_words(tokenizer)


@pytest.mark.parametrize("pattern", [
    r"a.b| ", r"^a| ", r"a$| ", r"(?<=a)b| ", r"[a-c&&[b]]| ", r"[[:alpha:]]+| ", r"\b| ", r"a*", r"(a| )", r"\h+| ",
    r"a{2}+| ", r"(?i:\p{L})| ", r"(?m:a)| ", r"\R| ",
])
def test_expressions_that_are_not_understood_are_left_to_the_tokenizer(pattern: str) -> None:
    tokenizer = splitting(pattern)
    assert not understood(tokenizer)
    check_words(tokenizer)


def test_words_of_which_one_is_another_are_not_believed(monkeypatch) -> None:
    monkeypatch.setattr(words, "_rewritten", lambda source: r"\w+|\s|[^\w\s]+")
    assert not understood(splitting(LLAMA3))


def test_other_ways_of_cutting_are_left_to_the_tokenizer() -> None:
    assert not understood(splitting(" ", "removed")) and not understood(splitting(" ", "merged_with_next"))
    assert not understood(splitting(" ", invert=True)) and not understood(splitting(" ", prefix=True))
    assert not understood(made(normalizer=normalizers.NFKC())) and understood(made(normalizer=normalizers.NFC()))
    assert not understood(made(token("<l>", lstrip=True))) and not understood(made(metaspace="first"))


def test_words_are_forgotten_when_they_are_too_many(monkeypatch) -> None:
    monkeypatch.setattr(words, "MOST_CHARACTERS", 40)
    tokenizer = splitting(LLAMA3)
    known = words.words(tokenizer.backend_tokenizer, pieces.barrier(tokenizer))
    for number in range(100):
        assert known.ids([f"a{number} b"]) == words.encoded(tokenizer.backend_tokenizer, [f"a{number} b"])
        assert len(known.known) < 30


def test_long_texts_are_cut_where_the_tokenizer_has_special_tokens(real) -> None:
    """Else each prompt of a long conversation would be tokenized from its beginning."""
    added = next((token for token in real.added_tokens_decoder.values() if token.special), None)
    [cut] = pieces.barrier(real).split_all([f"a{added}b{added}c"])
    assert cut == ["a", f"{added}b", f"{added}c"]


def made(
    *added: AddedToken, normalizer=None, metaspace: str | None = None, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes or, with `metaspace`, of SentencePiece's kind, whose letters are tokens."""
    alphabet = "▁\nabcdefghijklmnopqrstuvwxyzABHxyz12é好<>_. " if metaspace else pre_tokenizers.ByteLevel.alphabet()
    vocabulary = [*dict.fromkeys(sorted(alphabet)), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(vocabulary)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
        blank = decoders.Replace("▁", " ")
        tokenizer.decoder = decoders.Sequence([blank, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def token(text: str, **more: bool) -> AddedToken:
    return AddedToken(text, **{"normalized": False, "special": False, **more})


LOWER = normalizers.Lowercase()
AWKWARD = {
    "one holds another": made(token("<a>"), token("x<a>y"), token("a>")),
    "one goes on after another": made(token("<a>"), token("<a><a>z"), token("<a")),
    "blanks beside them": made(token("<a>"), token("<l>", lstrip=True), token("<r>", rstrip=True)),
    "only as a word": made(token("<a>"), token("word", single_word=True)),
    "blank themselves": made(token("<a>"), token("\n\n"), token("<r>", rstrip=True)),
    "after normalization": made(token("<A>"), token("<B>", normalized=True), normalizer=LOWER),
    "both kinds": made(token("<a>"), token("<b>", normalized=True), token("b><a", normalized=True), token("<b><a")),
    "prepend first": made(token("<a>"), metaspace="first"),
    "prepend always": made(token("<a>"), metaspace="always"),
    "prepend by normalizer": made(token("<a>"), token("<b>", normalized=True), normalizer=normalizers.Prepend("_")),
    "no added tokens": made(),
}
FRAGMENTS = st.sampled_from(
    ["<a>", "<A>", "<b>", "<B>", "<l>", "<r>", "word", "x", "y", "z", "a>", "<a", " ", "\n", "\n\n"]
)


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_added_tokens(kind: str) -> None:
    """Added tokens that overlap, take blanks with them, or are looked for after normalization."""

    @settings(deadline=None, max_examples=150)
    @given(st.lists(st.lists(FRAGMENTS, max_size=8).map("".join), min_size=1, max_size=4))
    def check(parts: list[str]) -> None:
        texts = [*accumulate(parts), *parts]
        assert tokens.tokenize(AWKWARD[kind], texts) == [directly(AWKWARD[kind], text) for text in texts]

    check()


def test_special_tokens_may_be_switched_off() -> None:
    """A tokenizer that reads its special tokens as text has nowhere to be cut."""
    tokenizer = made(token("<a>", special=True))
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert list(pieces.barrier(tokenizer).split_all(["x<a>y"])) == [["x<a>y"]]


# Prompts and completions.


@settings(deadline=None, max_examples=60)
@given(st.data())
def check_turns(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    """A prompt is tokenized alone; what is written behind it reads in its place as it was written."""
    word = st.sampled_from(["Hello", " there", "\nnew", "12", "é", "好", "  two", "<b>"])
    parts = data.draw(st.lists(st.lists(word, min_size=1, max_size=5).map("".join), min_size=2, max_size=6))
    row = [Turn(prompt, parts[place + 1], 1.0) for place, prompt in enumerate(accumulate(parts[:-1]))]
    for turn, (prompt, completion) in zip(row, tokenized(tokenizer, row), strict=True):
        assert prompt == directly(tokenizer, turn.prompt)
        assert tokenizer.decode(prompt + completion) == tokenizer.decode(prompt) + turn.completion


def test_completions_go_on_behind_their_prompts(real) -> None:
    check_turns(real)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_completions_go_on_where_every_line_break_would_join_them(scheme: str) -> None:
    """A vocabulary in which a line break joins what follows it."""
    check_turns(made(metaspace=scheme, merges=tuple(("\n", letter) for letter in "▁H1\nn<")))


@pytest.mark.parametrize("name", [name for name in REAL if name != "llama2"])
def test_where_the_beginning_of_a_text_is_not_marked_completions_are_tokenized_alone(shared, name: str) -> None:
    [(_, completion)] = tokenized(loaded(name), [Turn("q", " an answer", 1.0)])
    assert completion == directly(loaded(name), " an answer")


def test_sentencepiece_writes_no_blank_behind_a_prompt(shared) -> None:
    """Llama 2 marks the beginning of a text with a blank; an answer behind `[/INST]` must not begin with two."""
    llama = loaded("llama2")
    [(prompt, completion)] = tokenized(llama, [Turn("[INST] q [/INST]", " an answer</s>", 1.0)])
    assert prompt + completion == directly(llama, "[INST] q [/INST] an answer</s>")
    [(_, alone)] = tokenized(llama, [Turn("", "an answer</s>", 1.0)])
    assert alone == directly(llama, "an answer</s>")


def test_nothing_to_tokenize(real) -> None:
    assert tokens.tokenize(real, []) == [] and tokens.tokenize(real, [""]) == [[]]
    assert tokens.tokenize_turns(real, []) == [] and tokens.tokenize_turns(real, [[], []]) == [[], []]


# Stop tokens.


def stops(directory: Path, tokenizer, *named: str, eos: object = ...) -> tokens.Stops:
    if eos is not ...:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return tokens.stop_tokens(directory, tokenizer, named)


def ended(tokenizer: PreTrainedTokenizerBase, eos: str) -> PreTrainedTokenizerBase:
    tokenizer.eos_token = eos
    return tokenizer


def test_stop_tokens_come_from_the_recipe_the_model_or_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = ended(made(token("<end>"), token("<turn>"), token("<other>")), "<end>")
    end, turn, other = tokenizer.convert_tokens_to_ids(["<end>", "<turn>", "<other>"])
    assert stops(tmp_path, tokenizer) == tokens.Stops((end,), ("<end>",), ("<turn>", "<other>"))
    assert stops(tmp_path, tokenizer, eos=None).ids == (end,)
    assert stops(tmp_path, tokenizer, eos=turn) == tokens.Stops((turn,), ("<turn>",), ("<end>", "<other>"))
    assert stops(tmp_path, tokenizer, eos=[turn, end]).texts == ("<turn>", "<end>")
    assert stops(tmp_path, tokenizer, "<other>").ids == (other,)


def test_padding_with_the_end_token_changes_nothing(shared) -> None:
    """GPT-2 pads with its end token: the stop token is a target all the same."""
    gpt2 = loaded("gpt2")
    assert gpt2.pad_token_id == gpt2.eos_token_id
    assert tokens.stop_tokens(shared / "tokenizers" / "gpt2", gpt2, ()).ids == (gpt2.eos_token_id,)
    [(_, completion)] = tokenized(gpt2, [Turn("q", "an answer<|endoftext|>", 1.0)])
    assert completion[-1] == gpt2.eos_token_id


def test_the_unknown_token_may_be_a_stop_token(tmp_path: Path) -> None:
    """Some tokenizers have one token for everything."""
    tokenizer = ended(made(token("<end>")), "<end>")
    tokenizer.unk_token = "<end>"
    assert stops(tmp_path, tokenizer, "<end>").texts == ("<end>",)
    with pytest.raises(ConfigError, match="no token '<nowhere>'"):
        stops(tmp_path, tokenizer, "<nowhere>")


def test_a_stop_token_is_found_as_its_template_writes_it(shared) -> None:
    """SentencePiece's decoder would write a blank for the mark in DeepSeek's end token."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    tokenizer.add_special_tokens({"eos_token": token("<｜end▁of▁sentence｜>", special=True)})
    assert tokens.stop_tokens(shared, tokenizer, ()).texts == ("<｜end▁of▁sentence｜>",)


def test_no_stop_token_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stop token") as caught:
        stops(tmp_path, made())
    assert "model.stop_tokens" in caught.value.remedy


def test_an_end_token_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token 99999") as caught:
        stops(tmp_path, made(), eos=[5, 99999])
    assert "generation_config.json" in caught.value.where


def test_rules_that_are_not_the_files_are_told(tmp_path: Path) -> None:
    """transformers 5 reads a Qwen2 model's tokenizer by Qwen2's rules, whatever tokenizer.json says."""
    plain = splitting(r".|\n")
    plain.save_pretrained(tmp_path)
    alone = tokens.load_tokenizer(tmp_path)
    assert tokens.describe(alone) == f"{type(alone).__name__}, as tokenizer.json"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    as_qwen2 = tokens.load_tokenizer(tmp_path)
    assert directly(as_qwen2, "a tab") != directly(plain, "a tab")
    assert tokens.describe(as_qwen2).startswith("Qwen2Tokenizer, NOT as tokenizer.json, which makes other tokens of ")


def test_tokens_that_are_not_in_the_file_are_told(tmp_path: Path) -> None:
    """tokenizer_config.json may add tokens, of which the file makes several."""
    splitting(r".|\n").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": ["<|im_start|>"]}))
    told = tokens.describe(tokens.load_tokenizer(tmp_path))
    assert told.endswith("NOT as tokenizer.json, which makes other tokens of '<|im_start|>'")


def test_a_file_that_cuts_and_fills_up_texts_makes_no_other_tokens(tmp_path: Path) -> None:
    """Neither is done in training."""
    plain = splitting(r".|\n")
    plain.add_special_tokens({"pad_token": "<pad>"})
    plain.backend_tokenizer.enable_truncation(4)
    plain.backend_tokenizer.enable_padding(length=60, pad_id=plain.pad_token_id, pad_token="<pad>")
    plain.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert tokens.describe(tokens.load_tokenizer(tmp_path)).endswith(", as tokenizer.json")


def test_special_tokens_that_are_not_the_files_are_told(shared) -> None:
    """These files are of two models: <|image_pad|> is 151,655 in tokenizer.json, and 151,647 when transformers reads it
    with the other's tokenizer_config.json."""
    assert "NOT as tokenizer.json" in tokens.describe(loaded("qwen3-vl"))
    assert tokens.describe(loaded("qwen3")) == "Qwen2Tokenizer, as tokenizer.json"


def test_a_vocabulary_is_held_once(shared) -> None:
    """Not in Python's objects beside the backend's."""
    for name in ("qwen2.5-instruct", "llama2", "gpt2"):
        one = tokens.load_tokenizer(SHARED / "tokenizers" / name)
        held = {key: len(value) for key, value in vars(one).items() if isinstance(value, dict | list)}
        assert max(held.values()) < 1000 < len(one), name
        assert directly(one, "two apples") == directly(loaded(name), "two apples")


def test_a_tokenizer_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="does not load") as caught:
        tokens.load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.where

"""Text to ids exactly as the tokenizer does it, whatever is shared between texts; and the tokens that end an answer."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schoolhouse.data import pieces, tokens
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
    [found] = tokens.tokenize_turns(tokenizer, [row])
    for turn, (prompt, completion) in zip(row, found, strict=True):
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
    [[(_, completion)]] = tokens.tokenize_turns(loaded(name), [[Turn("q", " an answer", 1.0)]])
    assert completion == directly(loaded(name), " an answer")


def test_sentencepiece_writes_no_blank_behind_a_prompt(shared) -> None:
    """Llama 2 marks the beginning of a text with a blank; an answer behind `[/INST]` must not begin with two."""
    llama = loaded("llama2")
    [[(prompt, completion)]] = tokens.tokenize_turns(llama, [[Turn("[INST] q [/INST]", " an answer</s>", 1.0)]])
    assert prompt + completion == directly(llama, "[INST] q [/INST] an answer</s>")
    [[(_, alone)]] = tokens.tokenize_turns(llama, [[Turn("", "an answer</s>", 1.0)]])
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
    [[(_, completion)]] = tokens.tokenize_turns(gpt2, [[Turn("q", "an answer<|endoftext|>", 1.0)]])
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


def test_a_tokenizer_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="does not load") as caught:
        tokens.load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.where

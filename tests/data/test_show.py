"""Coloured tokens: the pieces are the tokens that are trained, and no text can harm who looks at them."""

from __future__ import annotations

import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from schoolhouse.data import show
from schoolhouse.data.show import Piece
from schoolhouse.types import UNSUPERVISED, Conversation, EncodedRow, Example, Origin, Turn

ORIGIN = Origin("lessons/train.jsonl", 17)
HOSTILE = "<script>alert(1)</script>\x00\x1b[2J\x1b]0;x\x07\u202e\ud800\r[bold]\u2066&\"'\x9b31m"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer in which every byte is a token: the hardest case for showing characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return made


SPECIAL = {256, 257}


def decoder(tokenizer: Tokenizer) -> show.Decode:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def example_of(ids: list[int], weights: list[float]) -> Example:
    """An example of these tokens, each with the weight it has as a target."""
    targets = np.asarray(weights[1:], dtype=np.float32)
    labels = np.where(targets != 0, np.asarray(ids[1:]), UNSUPERVISED).astype(np.int32)
    return Example(np.asarray(ids[:-1], dtype=np.int32), labels, targets, ORIGIN)


def row_of(tokenizer: Tokenizer, *texts: tuple[str, str, float]) -> EncodedRow:
    """A row of one example from (context, answer, weight) for each turn."""
    ids, weights, turns, prompt = [], [], [], ""
    for context, answer, weight in texts:
        for text, one in ((context, 0.0), (answer, weight)):
            found = tokenizer.encode(text, add_special_tokens=False).ids
            ids, weights = ids + found, weights + [one] * len(found)
        prompt += context
        turns.append(Turn(prompt, answer, weight))
        prompt += answer
    return EncodedRow(Conversation((), ORIGIN), "one", tuple(turns), (example_of(ids, weights),))


TWO_TURNS = (
    ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", "1 🦜<|im_end|>", 1.0),
    ("\n<|im_start|>user\n二?<|im_end|>\n<|im_start|>assistant\n", "é\t2<|im_end|>", 0.5),
)


def shown(tokenizer: Tokenizer, *texts: tuple[str, str, float]) -> dict:
    [only] = show.to_json(row_of(tokenizer, *texts), decoder(tokenizer), SPECIAL)
    return only


# ---- pieces


def test_pieces_are_runs_of_equal_weight_with_special_tokens_apart(tokenizer: Tokenizer) -> None:
    row = row_of(tokenizer, *TWO_TURNS)
    assert show.pieces(row.examples[0], decoder(tokenizer), SPECIAL) == [
        Piece("<|im_start|>", 0, True), Piece("user\nOne?", 0, False), Piece("<|im_end|>", 0, True),
        Piece("\n", 0, False), Piece("<|im_start|>", 0, True), Piece("assistant\n", 0, False),
        Piece("1 🦜", 1, False), Piece("<|im_end|>", 1, True),
        Piece("\n", 0, False), Piece("<|im_start|>", 0, True), Piece("user\n二?", 0, False),
        Piece("<|im_end|>", 0, True), Piece("\n", 0, False), Piece("<|im_start|>", 0, True),
        Piece("assistant\n", 0, False), Piece("é\t2", 0.5, False), Piece("<|im_end|>", 0.5, True),
    ]  # fmt: skip


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXTS.map("<|im_start|>{}".format), TEXTS.map("{}<|im_end|>".format),
                          st.sampled_from([0.25, 1.0, 2.0])), min_size=1, max_size=4))  # fmt: skip
def test_pieces_are_the_whole_text_and_what_is_trained_is_the_completions(
    tokenizer: Tokenizer, texts: list[tuple[str, str, float]]
) -> None:
    example = row_of(tokenizer, *texts).examples[0]
    found = show.pieces(example, decoder(tokenizer), SPECIAL)
    assert "".join(piece.text for piece in found) == "".join(context + answer for context, answer, _ in texts)
    for weight in (0.25, 1.0, 2.0):
        trained = "".join(piece.text for piece in found if piece.weight == weight)
        assert trained == "".join(answer for _, answer, one in texts if one == weight)


def test_a_character_that_is_cut_by_a_change_of_weight_is_shown_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦜b").ids
    found = show.pieces(example_of(ids, [0, 0, 0, 1, 1, 1]), decoder(tokenizer), SPECIAL)
    assert found == [Piece("a", 0, False), Piece("🦜b", 1, False)]


def test_bytes_that_are_no_character_do_not_swallow_their_neighbours(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a").ids, *tokenizer.encode("🦜").ids[:2], 257, *tokenizer.encode("bcdefghij").ids]
    found = show.pieces(example_of(ids, [0.0] * 4 + [1.0] * 9), decoder(tokenizer), SPECIAL)
    assert [piece.text.replace(show.BROKEN, "") for piece in found] == ["a", "<|im_end|>", "bcdefghij"]
    assert show.BROKEN in found[0].text and found[2].text == "bcdefghij"


def test_a_decoder_that_drops_the_first_space_loses_none_between_pieces() -> None:
    words = ["▁She", "▁has", "▁2", "</s>"]

    def decode(ids: list[int]) -> str:
        return "".join(words[index] for index in ids).replace("▁", " ").removeprefix(" ")

    found = show.pieces(example_of([0, 1, 2, 3], [0, 0, 1, 1]), decode, {3})
    assert [piece.text for piece in found] == ["She has", " 2", "</s>"]


def test_a_target_that_is_not_the_next_token_stops_the_program() -> None:
    wrong = Example(np.array([1, 2, 3]), np.array([7, 3, 4]), np.array([1.0, 1.0, 1.0]), ORIGIN)
    with pytest.raises(AssertionError, match=r"lessons/train\.jsonl:17"):
        show.pieces(wrong, str, set())


# ---- to_json


def test_json_holds_exactly_what_is_trained(tokenizer: Tokenizer) -> None:
    row = row_of(tokenizer, *TWO_TURNS)
    example = row.examples[0]
    found = json.loads(json.dumps(show.to_json(row, decoder(tokenizer), SPECIAL)))[0]
    assert list(found) == ["source", "row", "turns", "ids", "labels", "weights", "positions", "verdict", "pieces"]
    assert (found["source"], found["row"], found["verdict"]) == ("lessons/train.jsonl", 17, "one")
    assert found["ids"] == example.input_ids.tolist() and found["labels"] == example.labels.tolist()
    assert np.array_equal(np.asarray(found["weights"], np.float32), example.weights)
    assert found["positions"] == list(range(len(example.input_ids)))
    assert found["turns"] == [{"prompt": turn.prompt, "completion": turn.completion} for turn in row.turns]


def turns(*names: str) -> tuple[Turn, ...]:
    return tuple(Turn(name, name, 1.0) for name in names)


def counted(weights: list[list[float]], names: str, cut: int = 0) -> list[str]:
    """The turns that `to_json` gives to each example, as one string an example."""
    examples = tuple(example_of(list(range(len(one))), one) for one in weights)
    row = EncodedRow(Conversation((), ORIGIN), "split", turns(*names), examples, cut)
    return ["".join(turn["prompt"] for turn in one["turns"]) for one in show.to_json(row, str, set())]


def test_each_example_of_a_split_row_has_the_turns_it_supervises() -> None:
    assert counted([[0, 1, 1, 0, 1], [0, 0, 1]], "abc") == ["ab", "c"]
    assert counted([[0, 1, 0, 1]], "abc", cut=1) == ["ab"]
    assert counted([[0, 1, 1, 1]], "ab") == ["ab"]  # two answers with no context between them
    assert counted([[0, 1], [0, 1]], "abc", cut=1) == ["abc", "abc"]  # which one was cut cannot be told


# ---- the terminal


def printed(examples: list[dict], **options: object) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    console.print(show.terminal(examples))
    return console.file.getvalue()


def test_terminal_says_in_plain_text_what_is_trained(tokenizer: Tokenizer) -> None:
    assert printed([shown(tokenizer, *TWO_TURNS)]).splitlines()[1:] == [
        "",
        "━━ lessons/train.jsonl:17  verdict: one",
        "── turn 1 · context",
        "<|im_start|>user↵",
        "One?<|im_end|>↵",
        "<|im_start|>assistant↵",
        "── turn 1 · trained, weight 1",
        "1 🦜<|im_end|>",
        "── turn 2 · context",
        "↵",
        "<|im_start|>user↵",
        "二?<|im_end|>↵",
        "<|im_start|>assistant↵",
        "── turn 2 · trained, weight 0.5",
        "é⇥      2<|im_end|>",
        "── turn 1 as served · prompt '<|im_start|>user\\nOne?<|im_end|>\\n<|im_start|>assistant\\n' · ",
        "completion '1 🦜<|im_end|>'",
        "── turn 2 as served · prompt '<|im_start|>user\\nOne?<|im_end|>\\n<|im_sta … ",
        "user\\n二?<|im_end|>\\n<|im_start|>assistant\\n' · completion 'é\\t2<|im_end|>'",
        "── 58 tokens, 12 supervised (20.7 %)",
    ]


def test_terminal_puts_exactly_the_trained_text_on_green(tokenizer: Tokenizer) -> None:
    colours = printed([shown(tokenizer, *TWO_TURNS)], force_terminal=True, color_system="truecolor")
    body = colours.split("━━")[1]
    greens = dict.fromkeys(re.findall(r"48;2;(\d+;\d+;\d+)m", body))
    assert len(greens) == 2, "a full and a half weight are two shades"
    trained = "".join(re.findall(r"\x1b\[[\d;]*48;2;[\d;]+m(.*?)\x1b\[0m", body))
    assert re.sub(r"⇥ *", "\t", trained) == "1 🦜<|im_end|>é\t2<|im_end|>"


def test_data_cannot_drive_the_terminal(tokenizer: Tokenizer) -> None:
    example = shown(tokenizer, ("<|im_start|>" + "x", "y<|im_end|>", 1.0))
    example["pieces"][1]["text"] = example["source"] = HOSTILE
    text = printed([example], force_terminal=True, color_system="truecolor")
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not show.UNSAFE.search(plain)
    assert "⟨U+001B⟩[2J" in plain and "⟨U+202E⟩" in plain and "[bold]" in plain
    text.encode()


# ---- the page


class Reader(html.parser.HTMLParser):
    """Elements, attributes and the text inside `mark`; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.marked: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "mark" in self.open and "pre" in self.open and data not in show.SIGNS.values():
            self.marked.append(data)


def test_html_marks_exactly_the_trained_text_and_numbers_the_turns(tokenizer: Tokenizer) -> None:
    reader = Reader(show.html([shown(tokenizer, *TWO_TURNS)]))
    assert not reader.open
    assert "".join(reader.marked) == "1 🦜<|im_end|>é\t2<|im_end|>"
    begun = [given["data-turn"] for name, given in reader.elements if name == "mark" and "data-turn" in given]
    assert begun == ["1", "2"]
    assert "verdict one · 58 tokens, 12 supervised (20.7 %)" in reader.texts
    served = [text for text in reader.texts if text.startswith("\n<|im_start|>user\nOne?")]
    assert served[0].removeprefix("\n") == TWO_TURNS[0][0]


def test_weights_are_shades_of_the_largest(tokenizer: Tokenizer) -> None:
    texts = [("<|im_start|>", "a<|im_end|>", weight) for weight in (0.1, 0.5, 1.0, 2.0)]
    classes = re.findall(r'<mark class="(s\d)" title="trained, weight ([\d.]+)"', show.html([shown(tokenizer, *texts)]))
    assert classes == [("s1", "0.1"), ("s1", "0.5"), ("s2", "1"), ("s5", "2")]


def test_data_cannot_become_markup(tokenizer: Tokenizer) -> None:
    example = shown(tokenizer, *TWO_TURNS)
    example["pieces"][1]["text"] = example["source"] = example["verdict"] = HOSTILE
    example["turns"] = [{"prompt": HOSTILE, "completion": HOSTILE}]
    text = show.page(show.html([example]), HOSTILE)
    reader = Reader(text)
    assert [name for name, _ in reader.elements].count("script") == 1
    assert "<script>alert" not in text and not show.UNSAFE.search(text)
    assert not any(key.startswith("on") or key == "style" for _, given in reader.elements for key in given)
    text.encode()


def test_page_allows_only_its_own_style_and_script() -> None:
    text = show.page(show.tag("p", "x"), "t", style="p { color: red }", script="let a = 1 < 2;")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    for kind in ("style", "script"):
        content = re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[0]
        assert f"{kind}-src {show._hash(content)}" in policy


def test_showing_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, schoolhouse.data.show; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"

"""Coloured tokens: what is trained and what is only context, in the terminal and on a page.

`pieces` is the one function that decides what is coloured; `to_json` puts its result beside the numbers that are
trained, and both renderers, `terminal` and `html`, read nothing else. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import base64
import hashlib
import html as escaping
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from schoolhouse.types import EncodedRow, Example, Turn

Decode = Callable[[list[int]], str]
"""Token ids to text, special tokens included and spaces left alone."""

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""

LONGEST_CHARACTER = 8
"""Tokens that are tried together before a broken character is taken as it stands; UTF-8 needs at most 4 bytes."""

SHOWN_END = 40
"""Characters of each end of a prompt or a completion that a terminal shows as served; a page shows them whole."""

SHADES = 5
"""Steps of intensity between a weight of nearly 0 and the largest weight."""


# ---- the pieces ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that are treated alike."""

    text: str
    weight: float
    """0 is context; anything else is trained with this weight."""
    special: bool


def pieces(example: Example, decode: Decode, special: Collection[int]) -> list[Piece]:
    """The whole sequence, its final target included, as runs of equal weight; special tokens stand alone."""
    ids, weights = _sequence(example)
    groups = []
    for start, end in _characters(ids, decode, special):
        token = ids[start] if ids[start] in special else None
        groups.append((start, end, max(weights[start:end]), token))
    found = []
    for (weight, token), run in itertools.groupby(groups, key=lambda group: group[2:]):
        whole = list(run)
        found.append(Piece(_text(ids, whole[0][0], whole[-1][1], decode), weight, token is not None))
    return found


def to_json(
    row: EncodedRow, decode: Decode, special: Collection[int], seen: Callable[[Example], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One dict for each example of the row: exactly the ids, labels and weights that are trained, and their pieces.

    `seen` tells what a model that sees makes of an example: its positions, and its images with thumbnails.
    """
    return [
        {
            "source": example.origin.source,
            "row": example.origin.row,
            "turns": [{"prompt": turn.prompt, "completion": turn.completion} for turn in turns],
            "ids": example.input_ids.tolist(),
            "labels": example.labels.tolist(),
            "weights": example.weights.tolist(),
            "positions": list(range(len(example.input_ids))),
            "verdict": row.verdict,
            "pieces": [asdict(piece) for piece in pieces(example, decode, special)],
            **({} if seen is None else seen(example)),
        }
        for example, turns in zip(row.examples, _turns_of_examples(row), strict=True)
    ]


def _sequence(example: Example) -> tuple[list[int], list[float]]:
    """All tokens, the last target included, and the weight with which each of them is a target."""
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    weights = [0.0, *example.weights.tolist()]
    if weights[-1]:
        ids.append(labels[-1])
    for label, following, weight in zip(labels, ids[1:], weights[1:], strict=False):
        assert not weight or label == following, f"{example.origin}: a target is not the token that follows"
    return ids, weights[: len(ids)]


def _characters(ids: list[int], decode: Decode, special: Collection[int]) -> Iterator[tuple[int, int]]:
    """Smallest neighbouring groups of tokens that are whole characters, as start and end."""
    start = 0
    while start < len(ids):
        end = _character_end(ids, start, decode, special)
        yield start, end
        start = end


def _character_end(ids: list[int], start: int, decode: Decode, special: Collection[int]) -> int:
    """Where the characters begun by token `start` are whole; the next token when they never are."""
    if ids[start] in special:
        return start + 1
    for end in range(start + 1, min(start + LONGEST_CHARACTER, len(ids)) + 1):
        if ids[end - 1] in special:
            break
        if BROKEN not in decode(ids[start:end]):
            return end
    return start + 1


def _text(ids: list[int], start: int, end: int, decode: Decode) -> str:
    """The text of a run as it reads after the token before it: some decoders drop a space at the very start."""
    if start:
        before, both = decode(ids[start - 1 : start]), decode(ids[start - 1 : end])
        if both.startswith(before):
            return both[len(before) :]
    return decode(ids[start:end])


def _turns_of_examples(row: EncodedRow) -> list[tuple[Turn, ...]]:
    """The turns that each example supervises; all of the row's where that cannot be told."""
    if len(row.examples) == 1:
        return [row.turns[: len(row.turns) - row.cut_turns]]
    counts = [_supervised_runs(example) for example in row.examples]
    if sum(counts) != len(row.turns):
        return [row.turns] * len(counts)
    ends = itertools.accumulate(counts)
    return [row.turns[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _supervised_runs(example: Example) -> int:
    """How many separate stretches of the example are trained: one for each turn."""
    return sum(supervised for supervised, _ in itertools.groupby(bool(weight) for weight in example.weights.tolist()))


# ---- what both renderers say -----------------------------------------------------------------------------------

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that drive a terminal, reorder or hide text, or cannot be written: all but tab and newline."""
SIGNS = {"\n": "↵", "\t": "⇥"}
"""What is shown before a line end and a tab."""


def visible(text: str) -> str:
    """The text with its number in place of every character that could drive a terminal, reorder a line, or hide."""
    return UNSAFE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def _counts(example: Mapping[str, Any]) -> str:
    """The count line: tokens, supervised tokens and their share."""
    tokens, supervised = len(example["ids"]), sum(1 for weight in example["weights"] if weight)
    share = f" ({100 * supervised / tokens:.1f} %)" if tokens else ""
    images = example.get("images", ())
    seen = f", {_plural(len(images), 'image')} of {sum(one['tokens'] for one in images):,}" if images else ""
    return f"{_plural(tokens, 'token')}{seen}, {supervised:,} supervised{share}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


_REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")
"""A special token that stands many times in a row, as in the places of an image."""


def _text_of(piece: Mapping[str, Any]) -> str:
    """What is shown of a piece: a special token that is repeated stands once, with its number."""
    if not piece["special"]:
        return str(piece["text"])
    return _REPEATED.sub(lambda run: f"{run[1]} ×{len(run[0]) // len(run[1])}", piece["text"])


def _segments(example: Mapping[str, Any]) -> Iterator[tuple[bool, list[Mapping[str, Any]]]]:
    """The pieces of each stretch of context and of each supervised turn, in order."""
    for trained, run in itertools.groupby(example["pieces"], key=lambda piece: bool(piece["weight"])):
        yield trained, list(run)


def _largest_weight(example: Mapping[str, Any]) -> float:
    return max([1.0, *example["weights"]])


def _shade(weight: float, largest: float) -> int:
    """1 for the faintest weight, `SHADES` for the largest."""
    return max(1, min(SHADES, round(SHADES * weight / largest)))


def _weights(run: Iterable[Mapping[str, Any]]) -> str:
    """The weights in a stretch, in words."""
    distinct = sorted({piece["weight"] for piece in run})
    return f"weight {', '.join(f'{weight:g}' for weight in distinct)}"


# ---- the terminal ----------------------------------------------------------------------------------------------

GREENS = ("rgb(226,243,230)", "rgb(203,234,211)", "rgb(177,223,189)", "rgb(148,211,166)", "rgb(116,198,141)")
CONTEXT = Style(dim=True)
CONTEXT_SPECIAL = Style(dim=True, color="cyan")
HEADING = Style(bold=True)


def terminal(examples: Iterable[Mapping[str, Any]]) -> Group:
    """The examples of `to_json` for a rich console: trained text on green, the stronger the heavier; context dim."""
    return Group(_legend(), *itertools.chain.from_iterable(_lines(example) for example in examples))


def _trained(shade: int, special: bool) -> Style:
    """Dark ink on green, readable on a light and on a dark terminal."""
    return Style(color="rgb(0,0,150)" if special else "rgb(0,0,0)", bgcolor=GREENS[shade - 1], bold=special)


def _legend() -> Text:
    scale = [(f" {share / SHADES:g} ", _trained(share, special=False)) for share in range(1, SHADES + 1)]
    return Text.assemble(
        ("trained, by weight", HEADING), " ", *scale, "  ", ("context", CONTEXT), "  ",
        ("<special>", CONTEXT_SPECIAL), " ", ("<special, trained>", _trained(SHADES, special=True)), "  ↵ line end",
    )  # fmt: skip


def _lines(example: Mapping[str, Any]) -> Iterator[Text]:
    """One example: where it comes from, then each turn's context and what is trained of it, then the counts."""
    place = visible(f"{example['source']}:{example['row']}")
    yield Text.assemble("\n", (f"━━ {place}", HEADING), f"  verdict: {visible(example['verdict'])}")
    largest, turn = _largest_weight(example), 1
    for trained, run in _segments(example):
        what = f"trained, {_weights(run)}" if trained else "context"
        yield Text(f"── turn {turn} · {what}", style=HEADING if trained else CONTEXT)
        yield _coloured(run, largest)
        turn += trained
    for number, served in enumerate(example["turns"], start=1):
        ends = (f"{what} {_ends_of(served[what])}" for what in ("prompt", "completion"))
        yield Text(visible(f"── turn {number} as served · {' · '.join(ends)}"), style=CONTEXT)
    yield Text(f"── {_counts(example)}", style=HEADING)


def _ends_of(text: str) -> str:
    """A text on one line; of a long one, both ends."""
    return repr(text if len(text) <= 2 * SHOWN_END else f"{text[:SHOWN_END]} … {text[-SHOWN_END:]}")


def _coloured(run: Iterable[Mapping[str, Any]], largest: float) -> Text:
    """The text of one stretch in its colours."""
    text = Text()
    for piece in run:
        if piece["weight"]:
            style = _trained(_shade(piece["weight"], largest), piece["special"])
        else:
            style = CONTEXT_SPECIAL if piece["special"] else CONTEXT
        text.append(re.sub("[\n\t]", lambda end: SIGNS[end[0]] + end[0], visible(_text_of(piece))), style)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


# ---- the page --------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --panel: #f5f3ec; --ink: #22241f; --quiet: #62655c; --line: #dedbd0;
  --accent: #1c6b48; --special: #7a4a00; --s1: #e3f2e8; --s2: #cfe9d8; --s3: #b8dfc6; --s4: #9fd4b3; --s5: #84c89f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --paper: #151917; --panel: #1d2320; --ink: #e6e8e2; --quiet: #9ba39b;
  --line: #333b36; --accent: #7cc9a0; --special: #e3b268; --s1: #1b2f25; --s2: #1d3b2c; --s3: #1f4834; --s4: #21563d;
  --s5: #246546; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
.sheet { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
.shown-legend { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; align-items: baseline; font-size: .85rem;
  color: var(--quiet); margin: 0 0 1rem; }
.shown-legend .tokens { display: inline; border: 0; padding: 0; background: none; }
.shown { margin: 0 0 1.75rem; }
.shown-head { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; margin: 0 0 .45rem; }
.shown-head h3 { font: 600 .9rem/1.4 var(--mono); margin: 0; overflow-wrap: anywhere; }
.shown-head p { margin: 0; font-size: .85rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.seen { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0 0 .6rem; }
.seen figure { margin: 0; } .seen img { display: block; min-width: 48px; border: 1px solid var(--line); }
.seen figcaption { font-size: .75rem; color: var(--quiet); font-variant-numeric: tabular-nums; }
.tokens, .served pre { font: .84rem/1.7 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  unicode-bidi: plaintext; }
.tokens { margin: 0; padding: .8rem 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  max-height: 34rem; overflow: auto; color: var(--quiet); }
.tokens mark { color: var(--ink); padding: .12em 0; border-radius: 2px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; unicode-bidi: isolate; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.tokens .s1 { background: var(--s1); } .tokens .s2 { background: var(--s2); } .tokens .s3 { background: var(--s3); }
.tokens .s4 { background: var(--s4); } .tokens .s5 { background: var(--s5); }
.tokens .special { color: var(--special); font-weight: 600; }
.tokens mark.special { color: var(--ink); text-decoration: underline dotted; text-underline-offset: .2em; }
.tokens .end { opacity: .55; user-select: none; }
.tokens [data-turn]::before { content: attr(data-turn); font: 600 .68rem/1 var(--sans); color: var(--paper);
  background: var(--accent); border-radius: 1em; padding: .15em .5em; margin-right: .3em; vertical-align: .12em; }
.served-box { margin: .45rem 0 0; font-size: .85rem; }
.served-box summary { cursor: pointer; color: var(--quiet); }
.served { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem;
  margin: .6rem 0 0; }
.served h4 { font: 600 .78rem/1.4 var(--sans); color: var(--quiet); margin: 0 0 .2rem; }
.served pre { margin: 0; padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; max-height: 20rem;
  overflow: auto; }
@media print { .tokens, .served pre { max-height: none; overflow: visible; } }
"""
"""Colours and typography of the coloured tokens, in light and in dark; a report adds its own to it."""


class Html(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()


VOID = ("meta", "link", "br", "img", "input")
"""Elements that hold nothing and are not closed."""
Child = str | int | float | None
"""What may stand in an element: text, a number, HTML, or nothing."""


def tag(name: str, /, *children: Child, **attributes: Child) -> Html:
    """An element with everything in it escaped. `class_` is class, `aria_label` aria-label; None leaves out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{_escape(value)}"' for key, value in given.items())
    inner = ("\n" if name == "pre" else "") + join(children)  # HTML drops the first line end of a pre
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{inner}</{name}>")


def join(parts: Iterable[Child]) -> Html:
    """Parts one after the other, escaped where they are not HTML yet."""
    return Html("".join(_escape(part) for part in parts if part is not None))


def _escape(child: Child) -> str:
    return child if isinstance(child, Html) else escaping.escape(visible(str(child)))


def html(examples: Iterable[Mapping[str, Any]]) -> Html:
    """The examples of `to_json` as a fragment: coloured tokens, and below them the turns as served."""
    return join([_html_legend(), *(_html_example(example) for example in examples)])


def page(fragment: Html, title: str, *, style: str = "", script: str = "") -> str:
    """A self-contained page that can load nothing and run nothing but this style and this script, known by hash."""
    style = STYLE + style
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join([
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    ])
    body = tag("body", tag("main", fragment, class_="sheet"), Html(f"<script>{script}</script>"))
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}{body}</html>\n'


def _hash(content: str) -> str:
    """The content-security-policy source that allows exactly this content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _html_legend() -> Html:
    """What the colours mean."""
    scale = [
        tag("span", tag("mark", f" {share / SHADES:g} ", class_=f"s{share}"), class_="tokens")
        for share in range(1, SHADES + 1)
    ]
    return tag(
        "p", tag("span", "trained, by weight: ", *scale), tag("span", "plain: context"),
        tag("span", tag("span", tag("span", "<special>", class_="special"), class_="tokens"), " token"),
        tag("span", "↵ line end"), tag("span", tag("span", tag("span", data_turn="1"), class_="tokens"), "turn"),
        class_="shown-legend",
    )  # fmt: skip


def _html_example(example: Mapping[str, Any]) -> Html:
    """One example: its place and counts, its tokens in colour, its turns as served."""
    head = tag(
        "header",
        tag("h3", f"{example['source']}:{example['row']}"),
        tag("p", f"verdict {example['verdict']} · {_counts(example)}"),
        class_="shown-head",
    )
    return tag(
        "article", head, _html_images(example), _html_tokens(example), _html_turns(example["turns"]), class_="shown"
    )


def _html_images(example: Mapping[str, Any]) -> Html | None:
    """The images in their order, each with its size and its visual tokens."""
    figures = [
        tag("figure", tag("img", src=one["thumbnail"], alt=f"image {number}"),
            tag("figcaption", f"{number}: {one['width']} × {one['height']} px, {_plural(one['tokens'], 'token')}"))
        for number, one in enumerate(example.get("images", ()), 1)
    ]
    return tag("div", *figures, class_="seen") if figures else None


def _html_tokens(example: Mapping[str, Any]) -> Html:
    """The whole sequence in its colours, each supervised turn numbered where it begins."""
    largest, turn, parts = _largest_weight(example), 0, []
    for trained, run in _segments(example):
        turn += trained
        for index, piece in enumerate(run):
            parts.append(_html_piece(piece, largest, turn if trained and index == 0 else None))
    return tag("pre", *parts, class_="tokens")


def _html_piece(piece: Mapping[str, Any], largest: float, turn: int | None) -> Html:
    """One run of tokens; `turn` is given where a supervised turn begins with it."""
    text = join(_ends(visible(_text_of(piece))))
    special = "special" if piece["special"] else ""
    if not piece["weight"]:
        return tag("span", text, class_=special) if special else text
    classes = f"s{_shade(piece['weight'], largest)} {special}".strip()
    return tag("mark", text, class_=classes, title=f"trained, weight {piece['weight']:g}", data_turn=turn)


def _ends(text: str) -> Iterator[Child]:
    """The text with a sign before each line end and tab, which is seen but not copied."""
    for part in re.split("([\n\t])", text):
        if part in SIGNS:
            yield tag("span", SIGNS[part], class_="end")
        yield part


def _html_turns(turns: Sequence[Mapping[str, str]]) -> Html:
    """Each turn's prompt and completion side by side, closed at first."""
    boxes = [
        tag("div", tag("h4", f"turn {number} · {what}"), tag("pre", turn[what]))
        for number, turn in enumerate(turns, start=1)
        for what in ("prompt", "completion")
    ]
    summary = tag("summary", f"As served: prompt and completion of {_plural(len(turns), 'turn')}")
    return tag("details", summary, tag("div", *boxes, class_="served"), class_="served-box")

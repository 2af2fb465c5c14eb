"""The values that flow along the straight line. All are frozen; only a raw row is a dict.

Legend of shapes, used everywhere: T tokens of an example, S tokens of a micro-batch, E examples in it,
M supervised tokens, D hidden size, V vocabulary, H heads, K head size, I images, P patches of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

UNSUPERVISED = -100
"""The label of a position that has no target: the value `torch.nn.functional.cross_entropy` ignores."""

Verdict = Literal["one", "split", "prefilled", "refused"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from; printed in every data error."""

    source: str
    """The file or data set, as the user wrote it; of a directory, the file."""
    row: int
    """Line of a line-based file, else the position in the source; counted from 1."""

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class ImageSource:
    """What the data gave for an image, unread, and what it may be read from."""

    value: Any
    """A path, a data URI, bytes, {"bytes", "path"}, or a PIL image."""
    root: str | None = field(repr=False)
    """The only folder whose files may be read; None allows none."""
    most_pixels: int = field(repr=False)
    """An image of more is refused unread."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a message's content."""

    kind: Literal["text", "image", "video"]
    value: Any
    """The text; of an image its `ImageSource`."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a row: where its bytes are, and what a model makes of its size. Its pixels are not read."""

    path: str
    """The resolved file; empty where the row holds the bytes itself."""
    content: bytes
    """The encoded image (PNG, JPEG, …) of a row that holds it, else empty."""
    digest: bytes
    """SHA-256 of the encoded image."""
    size: tuple[int, int]
    """Height and width in pixels, as seen: an EXIF rotation is applied."""
    grid: tuple[int, int, int]
    """Patches in time, height and width after the model's own resizing."""
    tokens: int
    """Visual tokens: the places the image takes in the text."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as the data has it."""

    role: str
    parts: tuple[Part, ...]
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """OpenAI form: `{"type", "id", "function": {"name", "arguments"}}`, arguments as the data has them."""
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None
    """What the data says about learning this message: None leaves it to the recipe's rule, 0 is context only."""

    @property
    def text(self) -> str:
        """The text parts, joined."""
        if len(self.parts) == 1 and self.parts[0].kind == "text":
            return self.parts[0].value
        return "".join(part.value for part in self.parts if part.kind == "text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole row: its messages, the tools on offer, and where it came from."""

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One supervised answer exactly as it is served: the prompt shown, and the text to be written."""

    prompt: str
    completion: str
    """The text of the answer; encoding cuts it after its first stop token."""
    weight: float
    prefilled: bool = False
    """The generation prompt ends in an empty thinking block that the full render drops."""
    images: tuple[Picture, ...] = ()
    """The images the prompt shows, in order; it holds a place for each of their tokens."""


@dataclass(frozen=True, slots=True)
class Example:
    """What is trained: one sequence, its targets already aligned. Nobody downstream shifts anything."""

    input_ids: np.ndarray
    """i32[T]"""
    labels: np.ndarray
    """i32[T]: `labels[t]` is the target of position t, `UNSUPERVISED` where there is none."""
    weights: np.ndarray
    """f32[T]: 0 exactly where the label is `UNSUPERVISED`."""
    origin: Origin
    vision: tuple[Picture, ...] = ()
    """The images whose tokens stand in `input_ids`, in order."""

    @property
    def supervised(self) -> int:
        """The number of positions that have a target."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row all the way: its conversation, the turns as served, and the examples trained."""

    conversation: Conversation
    verdict: Verdict
    turns: tuple[Turn, ...]
    examples: tuple[Example, ...]
    cut_turns: int = 0
    """Supervised turns cut from the end because the row was too long."""
    longest: int = 0
    """Tokens of the longest sequence before anything was cut."""


@dataclass(frozen=True, slots=True)
class Vision:
    """The images of a micro-batch, ready for the model's vision tower, in the order of their tokens."""

    pixels: torch.Tensor
    """f32[P, …] patches of images end to end, as the model's own processor gives: of all, or of this process's."""
    grid: torch.Tensor
    """i64[I, 3]: patches of each image in time, height and width; in host memory."""
    real: bool = True
    """Whether the text has places for them. A micro-batch without images carries one blank patch that is given the
    weight 0, so that every process runs its vision tower in every micro-batch."""
    shares: tuple[tuple[int, ...], ...] | None = None
    """The images that each process of a Ulysses group encodes; None where one encodes all."""
    part: tuple[int, int] | None = None
    """Start and length of the sequence's part that this process goes on with once features are in their places."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What examples of a micro-batch begin with as others do: computed once. Of its S tokens S' are computed. In host
    memory."""

    kept: torch.Tensor
    """i64[S']: the tokens that are computed, in order."""
    targets: torch.Tensor
    """i64[M]: where among these the positions that have a target are, each in a place of its own."""
    places: torch.Tensor
    """i64[S]: where among these each token's states are."""
    begins: tuple[int, ...]
    """E: the first tokens of each example that are computed in another, always fewer than it has."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One pack: examples laid end to end, isolated by `boundaries`. In host memory, until the model computes it."""

    input_ids: torch.Tensor
    """i64[1, S]"""
    labels: torch.Tensor
    """i64[1, S]"""
    weights: torch.Tensor
    """f32[1, S]"""
    positions: torch.Tensor
    """i64[1, S], or i64[3, 1, S] in time, height and width for a model that sees: restart at 0 for each example."""
    boundaries: tuple[int, ...]
    """E + 1 offsets of the examples in the whole sequence, from 0 to S."""
    targets: torch.Tensor
    """i64[M]: the positions that have a target."""
    pack: tuple[int, ...]
    """The examples of the store in this micro-batch, in order."""
    supervised: float
    """The supervised weight the plan promised for this pack."""
    vision: Vision | None = None
    """The images; None for a model that does not see."""
    shared: Shared | None = None
    """What may be computed once; None where that is nothing worth while."""


@dataclass(frozen=True, slots=True)
class Position:
    """The whole state of the data stream. `step` counts the optimizer steps done, over all epochs."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One optimizer step, in integers: the same on every rank."""

    index: int
    """Counted from 1 over the whole run."""
    epoch: int
    """Counted from 0."""
    packs: tuple[tuple[int, ...], ...]
    """Each pack is a tuple of examples of the store; their number is a multiple of the data ranks."""
    tokens: int
    supervised_tokens: int
    supervised: float
    """N: the supervised weight of the step over all ranks."""

    @property
    def examples(self) -> int:
        """The number of examples in the step."""
        return sum(len(pack) for pack in self.packs)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as this rank executes it."""

    planned: PlannedStep
    micro_batches: Sequence[MicroBatch]

    @property
    def index(self) -> int:
        """The step, counted from 1 over the whole run."""
        return self.planned.index

    @property
    def supervised(self) -> float:
        """N: the supervised weight of the step over all ranks."""
        return self.planned.supervised


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sums over supervised positions, so that adding two of them is exact."""

    nll: torch.Tensor
    """Scalar with a graph: sum of weight x negative log-likelihood (nats)."""
    correct: torch.Tensor
    """Scalar: the number of supervised positions whose most likely token is the target."""
    supervised: torch.Tensor
    """f64 scalar: the sum of weights that met the vocabulary."""
    tokens: int
    """The number of supervised positions that met the vocabulary."""
    share: float = 1.0
    """What its gradient counts: 1 / N of a step, whose gradients are added up."""
    spared: tuple[int, ...] = ()
    """The tokens that each example of the micro-batch begins with and that were computed in another, if any were."""

    def backward(self) -> None:
        """Add `share` x the gradient of `nll` to what weights have."""
        (self.nll * self.share).backward()


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every row accounted for: `rows == kept + sum(dropped)`, and kept rows by verdict."""

    rows: int
    """Rows drawn from the sources."""
    verdicts: Mapping[str, int]
    """Rows kept, by verdict."""
    dropped: Mapping[str, int]
    """Rows not kept, by reason."""
    cut: int
    """Rows kept of which whole turns were cut from the end."""
    examples: int
    turns: int
    """Supervised turns."""
    stopped_turns: int
    """Supervised turns whose stop token is a target; equal to `turns`, or the preparation is refused."""
    tokens: int
    supervised_tokens: int
    by_source: Mapping[str, int] = field(default_factory=dict)
    """Rows drawn, by source."""
    not_drawn: Mapping[str, int] = field(default_factory=dict)
    """Rows that a proportion or a limit left in their source, by source; no part of `rows`."""

    @property
    def kept(self) -> int:
        """Rows that became examples."""
        return sum(self.verdicts.values())

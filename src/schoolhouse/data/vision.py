"""What a model sees: which family it is, how many tokens an image of a size takes, its pixels and its positions.

A family is one entry of `FAMILIES`. Lengths follow from sizes alone, by the arithmetic of the model's own processor:

    text      the template writes `placeholder` once for each image; `shown` puts one for each visual token there
    pixels    the model's own processor, whose arithmetic is `data.eyes`
    positions multimodal rotary positions in time, height and width (Qwen2-VL, Wang et al., 2024, arXiv:2409.12191)
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schoolhouse import inert
from schoolhouse.data import pictures
from schoolhouse.data.eyes import Grids, Squares
from schoolhouse.errors import ConfigError, DataError
from schoolhouse.types import Conversation, Example, ImageSource, Message, Picture, Turn

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

_MARK = re.compile(r"<[^<>\s]+>")
MARKS = ("<image>", "<video>")
"""How rows write a place into a text. A model that sees would learn to answer without what is meant. With an end
(`</video>`) it is HTML or XML."""
THUMBNAIL = 160
"""Pixels of the longer side of an image where it is shown."""
PROCESSOR = "preprocessor_config.json"
"""The file that describes a model's image processor."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of a family take images."""

    placeholder: str
    """The token a chat template writes for an image, and that is repeated for each visual token."""
    placed_by_grid: bool
    """Visual tokens have positions in time, height and width; else they count on like text."""
    visual: str
    """The token of each visual place."""
    before: str = ""
    """What the model's processor writes before the visual tokens of an image, and behind them."""
    after: str = ""


_QWEN = Family("<|image_pad|>", placed_by_grid=True, visual="<|image_pad|>")
FAMILIES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "gemma3": Family("<start_of_image>", placed_by_grid=False, visual="<image_soft_token>",
                     before="\n\n<start_of_image>", after="<end_of_image>\n\n"),
}
"""By the `model_type` of a model's configuration."""
PLACED_BY_GRID = tuple(name for name, family in FAMILIES.items() if family.placed_by_grid)
"""Model types whose vision tower takes the grid of patches beside the pixels."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A model's family, its image processor, and its limit: enough to know an image's tokens from its size."""

    name: str
    family: Family
    eyes: Grids | Squares
    token: int
    """The id of the token in every visual place."""

    @property
    def processor(self) -> BaseImageProcessor:
        """transformers' own for this model."""
        return self.eyes.processor

    def look(self, source: ImageSource, where: str) -> Picture:
        """An image of a row: its header read, its tokens counted."""
        raw = pictures.open_picture(source.value, source.root, source.most_pixels, where)
        grid = self.eyes.grid(raw.size)
        return Picture(raw.path, b"" if raw.path else raw.encoded, raw.digest, raw.size, grid, self.eyes.tokens(grid))

    def pixels(self, picture: Picture, where: str) -> np.ndarray:
        """f32[…]: the decoded image as the model's processor gives it."""
        made, grid = self.eyes.pixels(pictures.decode(encoded(picture, where), where))
        assert grid == picture.grid, f"{where}: {picture.grid} patches were promised, the processor made {grid}"
        return np.ascontiguousarray(made, dtype=np.float32)

    def positions(self, ids: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """i64[3, T]: the positions of an example in time, height and width.

        Text counts on in all three. The tokens of an image stand at their row and column behind the place where it
        begins, and text goes on behind the longer of its sides.
        """
        found = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
        if not self.family.placed_by_grid or not grids:
            return found
        place, visual = 0, np.flatnonzero(ids == self.token)
        for time, rows, columns in grids:
            rows, columns = rows // self.eyes.merge, columns // self.eyes.merge
            start, begin = int(visual[place]), int(found[0, visual[place]])
            end = start + time * rows * columns
            found[:, start:end] = begin + np.indices((time, rows, columns)).reshape(3, -1)
            found[:, end:] = begin + max(rows, columns) + np.arange(len(ids) - end)
            place += end - start
        return found

    def shown(self, conversation: Conversation, turns: Sequence[tuple[int, Turn]]) -> list[Turn]:
        """Turns, each with the index of its answer, with a place for each visual token in their texts."""
        seen = _pictures_of(conversation, self)
        return [self._shown(turn, seen[:index], str(conversation.origin)) for index, turn in turns]

    def prompt(self, text: str, messages: Sequence[Message], where: str) -> tuple[str, tuple[Picture, ...]]:
        """The text shown for some messages with a place for each visual token, and the images."""
        images = tuple(picture for message in messages for picture in _pictures(message, self, where))
        return self._expanded(text, images, where), images

    def _shown(self, turn: Turn, seen: Sequence[Sequence[Picture]], where: str) -> Turn:
        images = tuple(picture for message in seen for picture in message)
        if {self.family.placeholder, self.family.visual} & set(_MARK.findall(turn.completion)):
            raise _astray("the answer holds the token of an image", where)
        return replace(turn, prompt=self._expanded(turn.prompt, images, where), images=images)

    def _expanded(self, text: str, images: Sequence[Picture], where: str) -> str:
        family, pieces = self.family, text.split(self.family.placeholder)
        strange = family.visual != family.placeholder and family.visual in text
        if len(pieces) - 1 != len(images) or strange:
            raise _astray(f"the text has {len(pieces) - 1} places for {len(images)} images", where)
        places = [f"{family.before}{family.visual * picture.tokens}{family.after}" for picture in images]
        return "".join(piece + place for piece, place in zip(pieces, [*places, ""], strict=True))


def _astray(found: str, where: str) -> DataError:
    return DataError(
        found, required="one place for each image, and the token of places nowhere else", where=where,
        remedy="take the token out of the row's text, or set model.chat_template to one that shows images",
    )


def _pictures_of(conversation: Conversation, sight: Sight) -> list[list[Picture]]:
    """The images of each message."""
    return [
        _pictures(message, sight, f"{conversation.origin} message {number}")
        for number, message in enumerate(conversation.messages, 1)
    ]


def _pictures(message: Message, sight: Sight, where: str) -> list[Picture]:
    texts = [part.value for part in message.parts if part.kind == "text"]
    marks = [mark for mark in MARKS for text in texts if mark in text and mark.replace("<", "</") not in text]
    if marks and message.role != "assistant":  # a place that has its image is a part of its own by now
        raise DataError(
            f"{marks[0]} stands in a text that is shown, and the row has no image for it", where=where,
            required="an image in the row's column for each such place", remedy="name the column that has it "
            "(data.columns), mend the row, or write the word otherwise where it is no place",
        )
    return [sight.look(part.value, where) for part in message.parts if part.kind == "image"]


def encoded(picture: Picture, where: str) -> bytes:
    """The bytes of an image, the very ones that were prepared."""
    content = picture.content or _again(picture, where)
    if hashlib.sha256(content).digest() != picture.digest:
        raise DataError(
            f"the image {Path(picture.path).name} is not the one that was prepared", where=where,
            required="the same bytes as when the rows were prepared",
            remedy="put it back, or delete the prepared data (`check` prints where it is)",
        )
    return content


def _again(picture: Picture, where: str) -> bytes:
    try:
        return Path(picture.path).read_bytes()
    except OSError as error:
        raise DataError(
            f"the image {picture.path} is gone: {error.strerror}", required="the images that were prepared",
            where=where, remedy="put it back",
        ) from None


def seen(example: Example, sight: Sight) -> dict[str, Any]:
    """An example as it is shown: positions in time, height and width where the model has them, and its images."""
    found: dict[str, Any] = {}
    if sight.family.placed_by_grid:
        found["positions"] = sight.positions(example.input_ids, [one.grid for one in example.vision]).tolist()
    if example.vision:
        found["images"] = [described(one, str(example.origin)) for one in example.vision]
    return found


def described(picture: Picture, where: str) -> dict[str, Any]:
    """What is shown of an image: where it is, its size, its visual tokens, and a thumbnail as a data URI."""
    small = pictures.thumbnail(encoded(picture, where), THUMBNAIL, where)
    return {
        "path": picture.path or None, "height": picture.size[0], "width": picture.size[1], "tokens": picture.tokens,
        "grid": list(picture.grid), "thumbnail": f"data:image/png;base64,{base64.b64encode(small).decode()}",
    }


def blind(conversation: Conversation, family: str | None) -> None:
    """Refuse images for a model of a family that does not see, or whose sight is not known here."""
    kinds = {part.kind for message in conversation.messages for part in message.parts} - {"text"}
    if kinds:
        raise DataError(
            f"the row has an {min(kinds)}, and the model sees none here ({family or 'of no known family'})",
            required=f"a model of {', '.join(FAMILIES)}, or text alone",
            where=str(conversation.origin), remedy="choose another model, or leave it out with data.messages",
        )


def sees(directory: Path) -> bool:
    """Whether the model of a directory takes images in a way that is known here."""
    return model_type(directory) in FAMILIES


def has_tower(directory: Path) -> bool:
    """Whether the model of a directory sees at all."""
    return bool(_settings(directory).get("vision_config"))


def sight(
    directory: Path, tokenizer: PreTrainedTokenizerBase, most_tokens: int | None
) -> Sight | None:
    """How the model of a directory sees; None for a model that does not."""
    from transformers import AutoConfig

    name = model_type(directory)
    family = FAMILIES.get(name)
    if family is None:
        return None
    configuration = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=inert.allowed())
    token = tokenizer.convert_tokens_to_ids(family.visual)
    if configuration.image_token_id != token:
        raise ConfigError(
            f"the tokenizer has {family.visual} as {token}, the model as {configuration.image_token_id}",
            required="a tokenizer and a configuration that belong together", where=str(directory),
            remedy="copy both from the same model",
        )
    processor = _processor(directory)
    eyes = _grids(processor, most_tokens) if family.placed_by_grid else _squares(processor, configuration, most_tokens)
    return Sight(name, family, eyes, token)


def _grids(processor: BaseImageProcessor, most_tokens: int | None) -> Grids:
    """With a smaller limit of tokens, where one is asked for."""
    if most_tokens is not None:
        unit, size = (processor.patch_size * processor.merge_size) ** 2, processor.size
        processor.size = {name: min(size[name], most_tokens * unit) for name in ("shortest_edge", "longest_edge")}
    return Grids(processor)


def _squares(processor: BaseImageProcessor, configuration: PretrainedConfig, most_tokens: int | None) -> Squares:
    """Raises ConfigError where an image cannot have so few tokens, or would be cut into several."""
    count = configuration.mm_tokens_per_image
    if most_tokens is not None and most_tokens < count:
        raise ConfigError(
            f"model.image_tokens={most_tokens}, and every image of this model has {count}", where="model.image_tokens",
            required=f"at least {count}", remedy="leave it out",
        )
    if processor.do_pan_and_scan:
        raise ConfigError(
            "the image processor cuts wide images into several (do_pan_and_scan)", where=PROCESSOR,
            required="one image for each image of a row", remedy="set do_pan_and_scan to false there",
        )
    return Squares(processor, configuration.vision_config.patch_size, count)


@functools.cache
def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def model_type(directory: Path) -> str | None:
    """The family that a model's configuration names."""
    return _settings(directory).get("model_type")


def _processor(directory: Path) -> BaseImageProcessor:
    """The model's own image processor on Pillow."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            directory, backend="pil", trust_remote_code=False, local_files_only=True
        )
    except ImportError as error:  # before 5.18 transformers had no image processor without torchvision
        raise ConfigError(
            f"the image processor does not load: {' '.join(str(error).split()):.160}", where=str(directory),
            required="transformers 5.18 or newer, or torchvision", remedy="pip install -U transformers",
        ) from None
    except (OSError, ValueError, KeyError) as error:
        inert.refuse_code(error, directory)
        raise ConfigError(
            f"the image processor does not load: {' '.join(str(error).split()):.160}",
            required=f"{PROCESSOR}, which belongs to a model that sees", where=str(directory),
            remedy="copy the file from the model",
        ) from None

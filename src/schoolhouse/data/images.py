"""Images in a conversation: those of a row's column go where the row says, and each knows what it may be read from.

A place is an image part without an image, or the text `<image>` in a message that is shown (not in an answer). A row
that has images and no place shows them before the text of its first user message, as TRL and LLaVA read such rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from schoolhouse.config import Rows
from schoolhouse.errors import DataError
from schoolhouse.types import ImageSource, Message, Origin, Part

MARK = "<image>"
"""How rows write the place of an image into a text."""


def listed(value: Any) -> tuple[Any, ...]:
    """The images of a column that holds one, several, or none."""
    if value is None:
        return ()
    return tuple(one for one in value if one is not None) if isinstance(value, list | tuple) else (value,)


def has_place(message: Message) -> bool:
    """Whether a message that is shown has a place for an image of the row's column."""
    return message.role != "assistant" and any(_is_place(part) for part in message.parts)


def placed(
    messages: tuple[Message, ...], given: Sequence[Any], rows: Rows, origin: Origin
) -> tuple[Message, ...]:
    """The messages with every image in its place and able to be read; a place too many or too few is an error."""
    if given and not any(map(has_place, messages)):
        messages = _in_front(messages, len(given), str(origin))
    if not given and not any(part.kind != "text" for message in messages for part in message.parts):
        return messages
    wrapped = iter(given)
    places = sum(_places(message) for message in messages) if given else _empty(messages)
    if places != len(given):
        raise DataError(
            f"{places} places for {len(given)} images", where=str(origin),
            required=f"one {MARK}, or one part of type image, for each image of the row's column",
            remedy="mend or delete the row",
        )
    reader = _Reader(root(rows, origin.source), rows.image_pixels, bool(given))
    return tuple(replace(message, parts=tuple(_filled(message, wrapped, reader, origin))) for message in messages)


class _Reader:
    """What the images of a row may be read from."""

    def __init__(self, root: str | None, most_pixels: int, marks: bool) -> None:
        self.root, self.most_pixels, self.marks = root, most_pixels, marks

    def part(self, value: Any) -> Part:
        return Part("image", ImageSource(value, self.root, self.most_pixels))


def _filled(message: Message, given: Iterator[Any], reader: _Reader, origin: Origin) -> Iterator[Part]:
    """The parts of a message with its images in their places."""
    for part in message.parts:
        if part.kind == "video":
            yield from _frames(part.value, reader, origin)
        elif part.kind == "image":
            _refuse_drawing(message, origin)
            yield reader.part(next(given) if part.value is None else part.value)
        elif reader.marks and message.role != "assistant":
            first, *others = part.value.split(MARK)
            yield from [Part("text", first)] if first else []
            for text in others:
                yield reader.part(next(given))
                yield from [Part("text", text)] if text else []
        else:
            yield part


def _frames(value: Any, reader: _Reader, origin: Origin) -> Iterator[Part]:
    """A video given as a list of its frames is shown as so many images; a video file is refused."""
    frames = value if isinstance(value, list | tuple) else ()
    if not frames:
        raise DataError(
            "a video that is no list of frames", required="a list of images: the frames to show", where=str(origin),
            remedy="cut the video into frames, e.g. with ffmpeg",
        )
    yield from map(reader.part, frames)


def _refuse_drawing(message: Message, origin: Origin) -> None:
    if message.role == "assistant":
        raise DataError(
            "an image in an assistant message", required="answers in text: no model here draws", where=str(origin),
            remedy="move the image to the message before, or delete the row",
        )


def _in_front(messages: tuple[Message, ...], count: int, where: str) -> tuple[Message, ...]:
    """Places for all images before the text of the first user message."""
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError(
            "images, and no user message to show them in", required="a user message", where=where,
            remedy="mend or delete the row",
        )
    seen = replace(messages[first], parts=(*(Part("image", None),) * count, *messages[first].parts))
    return (*messages[:first], seen, *messages[first + 1 :])


def _is_place(part: Part) -> bool:
    return (part.kind == "image" and part.value is None) or (part.kind == "text" and MARK in part.value)


def _places(message: Message) -> int:
    if message.role == "assistant":
        return 0
    marks = sum(part.value.count(MARK) for part in message.parts if part.kind == "text")
    return marks + sum(part.kind == "image" and part.value is None for part in message.parts)


def _empty(messages: Sequence[Message]) -> int:
    """Image parts without an image, in rows that have no column of images."""
    return sum(part.kind == "image" and part.value is None for message in messages for part in message.parts)


def root(rows: Rows, source: str) -> str | None:
    """The folder that images may be read from: the recipe's, else the one that holds the rows; None for hub ids."""
    if rows.image_root is not None:
        return os.path.realpath(Path(rows.image_root).expanduser())
    head = source.rpartition(":")[0]  # `data:train` is a split of a directory
    found = next((path for one in (source, head) if one and (path := Path(one).expanduser()).exists()), None)
    if found is None:
        return None
    return os.path.realpath(found if found.is_dir() else found.parent)



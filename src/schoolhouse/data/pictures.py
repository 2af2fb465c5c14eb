"""Images of rows, read safely: only from the named folder or from the row itself, never from a network.

`open_picture` reads the bytes and the header: type, size, orientation, wholeness. No pixel is decoded to know a size.
`decode` makes the pixels: upright 8-bit RGB, always the same for the same bytes.

What is refused, and why, stands in `_check_*`; conversions are Pillow's and numpy's, integer arithmetic only:
16-bit grey keeps its high byte, CMYK goes through Pillow's formula, transparency is laid on white (as vLLM serves it).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from schoolhouse.errors import DataError, SafetyError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may try; its other readers (among them PostScript, which runs programs) are never asked."""
MOST_BYTES = 64 * 2**20
"""Bytes of the largest encoded image."""
MOST_ELONGATED = 200
"""The longest side may be so many times the shortest: the limit of Qwen's own resizing."""
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):|\s*[/\\]{2}")
_DATA_URI = re.compile(r"data:image/[\w.+*-]+(?:;[\w=.-]+)*;base64,", re.ASCII | re.IGNORECASE)
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, IndexError, KeyError, TypeError)
"""What Pillow raises on damaged files."""


@dataclass(frozen=True, slots=True)
class Raw:
    """An image's bytes with what their header says."""

    path: str
    """The resolved file; empty where the row holds the bytes."""
    encoded: bytes
    digest: bytes
    size: tuple[int, int]
    """Height and width, upright."""


def open_picture(value: Any, root: str | None, most_pixels: int, where: str) -> Raw:
    """The bytes and the header of an image: a path below `root`, a data URI, bytes, {"bytes", "path"} or a PIL image.

    Raises DataError for what is no whole still image of at most `most_pixels`, SafetyError for a path or an address
    outside of `root`.
    """
    path, encoded = _bytes_of(value, root, where)
    size = header(encoded, most_pixels, where)
    return Raw(path, encoded, hashlib.sha256(encoded).digest(), size)


def content(value: Any) -> Any:
    """What an image of a row holds, unread, by values whose `repr` is the same in every process."""
    if isinstance(value, Image.Image):
        try:
            return value.mode, value.size, value.getpalette(), hashlib.sha256(value.tobytes()).hexdigest()
        except _DAMAGE:  # the row will be refused where its image is read
            return value.mode, value.size
    if isinstance(value, Mapping):
        return {name: content(inside) for name, inside in value.items()}
    return bytes(value) if isinstance(value, memoryview) else value


def decode(encoded: bytes, where: str) -> np.ndarray:
    """u8[height, width, 3]: the pixels of an image that `header` has seen, upright, transparency on white."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            warnings.simplefilter("ignore")
            turn = _TURNS.get(_orientation(image))
            image.load()
            rgb = _to_rgb(image)
            return np.asarray(rgb if turn is None else rgb.transpose(turn))
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        found = f"the image cannot be decoded: {' '.join(str(error).split()):.120}"
        raise _bad(found, where, "a whole image") from None


def thumbnail(encoded: bytes, side: int, where: str) -> bytes:
    """A PNG of the image, its longer side at most `side` pixels."""
    image = Image.fromarray(decode(encoded, where))
    image.thumbnail((side, side))
    return _png(image)


# Where the bytes are.


def _bytes_of(value: Any, root: str | None, where: str) -> tuple[str, bytes]:
    """The resolved path, or an empty one, and the bytes."""
    if isinstance(value, Image.Image):
        try:
            return "", _png(value)
        except _DAMAGE as error:
            raise _bad(f"the image cannot be read: {error}", where, "a whole image") from None
    if isinstance(value, Mapping):
        inside, path = value.get("bytes"), value.get("path")
        return _bytes_of(inside if inside is not None else path, root, where)
    if isinstance(value, bytes | bytearray | memoryview):
        _check_length(len(value), where)
        return "", bytes(value)
    if not isinstance(value, str) or not value:
        raise _bad(f"{value!r:.60} is no image", where, 'a path, a data URI, bytes, or {"bytes", "path"}')
    if value[:5].lower() == "data:":
        return "", _of_data_uri(value, where)
    return _of_path(value, root, where)


def _png(image: Image.Image) -> bytes:
    """A PIL image, from a user's function, without loss."""
    buffer = io.BytesIO()
    plain = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    plain.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _of_data_uri(value: str, where: str) -> bytes:
    match = _DATA_URI.match(value)
    if match is None:
        raise _unsafe(f"a data URI that is no base64 image: {value:.40}", where)
    _check_length(len(value) * 3 // 4, where)
    try:
        return base64.b64decode(value[match.end():], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"broken base64: {error}", where, "data:image/…;base64, and whole base64") from None


def _of_path(value: str, root: str | None, where: str) -> tuple[str, bytes]:
    """A file below the root, symbolic links followed first."""
    if _SCHEME.match(value):
        raise _unsafe(f"an address instead of a path: {value:.80}", where)
    if root is None:
        raise _unsafe(f"a path, and no folder that images may be read from: {value:.80}", where)
    try:
        folder = Path(os.path.realpath(root, strict=True))
        real = Path(os.path.realpath(folder / value))
        if not real.is_relative_to(folder):
            raise _unsafe(f"the path leads out of {root}: {value:.80}", where)
        real = Path(os.path.realpath(folder / value, strict=True))
        return str(real), _read(real, where)
    except (OSError, ValueError) as error:  # missing, a loop of links, no permission, a NUL byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _bad(f"the image {value!r:.80} cannot be read: {reason}", where, f"a file below {root}") from None


def _read(path: Path, where: str) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise _bad(f"{path.name} is no file", where, "an image file")
    _check_length(found.st_size, where)
    return path.read_bytes()


def _check_length(length: int, where: str) -> None:
    if length > MOST_BYTES:
        raise _bad(f"the image has {length:,} bytes", where, f"at most {MOST_BYTES:,}")
    if not length:
        raise _bad("the image is empty: 0 bytes", where, "an image")


# What the header says.


def header(encoded: bytes, most_pixels: int, where: str) -> tuple[int, int]:
    """Height and width of a whole still image, upright, from its header; DataError for anything else."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # Pillow's own limit warns; ours refuses
            _check_size(image.size, most_pixels, where)
            turned = _orientation(image) >= 5
            _check_still(image, where)
            _check_whole(image, encoded, where)
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise _too_large(str(error), most_pixels, where) from None
    except UnidentifiedImageError:
        what = "an SVG, which is a program that draws" if b"<svg" in encoded[:2048].lower() else "no image"
        raise _bad(f"{what}: it begins {encoded[:16]!r}", where, f"one of {', '.join(FORMATS)}") from None
    except _DAMAGE as error:
        raise _bad(f"the image is damaged: {' '.join(str(error).split()):.120}", where, "a whole image") from None
    return (width, height) if turned else (height, width)


def _check_size(size: tuple[int, int], most_pixels: int, where: str) -> None:
    width, height = size
    if width * height > most_pixels:
        raise _too_large(f"{width} x {height} pixels", most_pixels, where)
    if min(size) < 1 or max(size) > MOST_ELONGATED * min(size):
        raise _bad(
            f"the image is {width} x {height} pixels", where,
            f"sides whose ratio is at most {MOST_ELONGATED}; data.image_pixels limits their product to {most_pixels:,}",
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none; of a PNG only what stands before its pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to look behind them
    value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and value in _TURNS else 1


def _check_still(image: Image.Image, where: str) -> None:
    """An animation or several pages are more than one image; a camera's MPO holds one image and its previews."""
    if image.format == "MPO":
        return
    try:
        image.seek(1)
    except EOFError:
        return
    raise _bad(f"the {image.format} holds several pictures: an animation, or pages", where,
               "one still image; give the frames as a list of images")


def _check_whole(image: Image.Image, encoded: bytes, where: str) -> None:
    """Refuse a file that was cut short: its pixels would end in grey. Rare formats are decoded to know it."""
    whole = {"PNG": _whole_png, "JPEG": _whole_jpeg, "MPO": _whole_jpeg, "WEBP": _whole_webp}.get(str(image.format))
    if whole is None:
        decode(encoded, where)
    elif not whole(encoded):
        raise _bad(f"the {image.format} is truncated or damaged", where, "a whole image")


def _whole_png(encoded: bytes) -> bool:
    """Every chunk up to IEND is there and has its checksum."""
    place = 8
    while place + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        end = place + 12 + length
        if end > len(encoded):
            return False
        if zlib.crc32(encoded[place + 4 : end - 4]) != struct.unpack_from(">I", encoded, end - 4)[0]:
            return False
        if kind == b"IEND":
            return True
        place = end
    return False


def _whole_jpeg(encoded: bytes) -> bool:
    """The end marker stands behind the last beginning of a scan."""
    return encoded.rfind(b"\xff\xd9") > encoded.rfind(b"\xff\xda") > 0


def _whole_webp(encoded: bytes) -> bool:
    return len(encoded) >= 12 and struct.unpack_from("<I", encoded, 4)[0] + 8 <= len(encoded)


# Pixels.


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a loaded image."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image)  # Pillow's own conversion would clip at 255
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}); save it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        top = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", top.size, (255, 255, 255, 255)), top).convert("RGB")
    return image.convert("RGB")


# Refusals.


def _too_large(found: str, most_pixels: int, where: str) -> DataError:
    return DataError(
        f"the image is too large to be decoded safely: {found:.120}", where=where,
        required=f"at most {most_pixels:,} pixels (data.image_pixels)",
        remedy="shrink the image, or raise data.image_pixels if you trust the file",
    )


def _bad(found: str, where: str, required: str) -> DataError:
    return DataError(found, required=required, where=where, remedy="mend the image, or delete the row")


def _unsafe(found: str, where: str) -> SafetyError:
    return SafetyError(
        found, required="a path below data.image_root, a data:image/…;base64, or the bytes in the row", where=where,
        remedy="download the image yourself and put it into data.image_root; nothing is fetched from a network",
    )

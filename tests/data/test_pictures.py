"""F18 to F21: what may be read, what is refused and how, and that the same bytes always give the same pixels."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schoolhouse.data import pictures
from schoolhouse.errors import DataError, SafetyError

LIMIT = 50_000_000


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **settings)
    return buffer.getvalue()


def refused(value: object, root: Path | None = None, error: type = DataError) -> str:
    """What an image is refused with; the row stands in it."""
    with pytest.raises(error) as caught:
        pictures.open_picture(value, None if root is None else str(root), LIMIT, "rows.jsonl:7")
    assert type(caught.value) is error and caught.value.where == "rows.jsonl:7"
    assert len(str(caught.value).splitlines()) <= 6
    return str(caught.value)


# Where from.


def test_a_path_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "ü.png").write_bytes(encode(noise()))
    for path in ("a b/ü.png", "./a b/../a b/ü.png", str(tmp_path / "a b" / "ü.png")):
        raw = pictures.open_picture(path, str(tmp_path), LIMIT, "row")
        assert (raw.path, raw.size) == (str(tmp_path / "a b" / "ü.png"), (20, 30))


@pytest.mark.parametrize("value", [
    "../../etc/passwd", "/etc/passwd", "a/../../x.png", "file:///etc/passwd", "http://169.254.169.254/latest",
    "https://example.org/a.png", "http://2852039166/", "ftp://x/y.png", "//host/share/a.png", "\\\\host\\share\\a.png",
    "data:text/html;base64,PGI+", "data:image/png,raw", "gopher:x", " HTTP://x/y.png", "s3://bucket/a.png",
])
def test_f21_outside_is_refused_for_safety(value: str, tmp_path: Path) -> None:
    """Exit code 8, and nothing was opened: the folder does not even hold these names."""
    assert "data.image_root" in refused(value, tmp_path, SafetyError)
    assert SafetyError.exit_code == 8


def test_f21_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "images-too"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(encode(noise()))
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "folder").symlink_to(outside)
    for path in ("link.png", "folder/a.png", "../images-too/a.png"):  # the sibling has the root's name as a prefix
        refused(path, inside, SafetyError)


def test_f21_no_root_allows_no_path() -> None:
    refused("a.png", None, SafetyError)


def test_f19_what_cannot_be_read_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert "No such file" in refused("missing.png", tmp_path)
    assert "0 bytes" in refused("empty.png", tmp_path)
    assert "symbolic links" in refused("loop.png", tmp_path)
    assert "no file" in refused("folder.png", tmp_path)
    assert "no file" in refused("pipe.png", tmp_path)
    refused("a\0b.png", tmp_path)


@pytest.mark.parametrize("value", [None, 7, "", [], {"bytes": None, "path": None}])
def test_f19_what_is_no_image_at_all(value: object, tmp_path: Path) -> None:
    refused(value, tmp_path)


def test_bytes_and_their_wrappings_are_the_same_image(tmp_path: Path) -> None:
    encoded = encode(noise())
    uri = "data:image/png;base64," + base64.b64encode(encoded).decode()
    values = [encoded, bytearray(encoded), {"bytes": encoded, "path": "x.png"}, {"bytes": encoded}, uri,
              uri.replace("png", "*"), Image.fromarray(noise())]
    found = [pictures.open_picture(value, None, LIMIT, "row") for value in values]
    assert {raw.size for raw in found} == {(20, 30)} and {raw.path for raw in found} == {""}
    assert all(np.array_equal(pictures.decode(raw.encoded, "row"), noise()) for raw in found)
    refused("data:image/png;base64,%%%")


# What it is.


def test_f20_text_svg_and_documents_are_no_images() -> None:
    assert "SVG" in refused(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for encoded in (b"GIF", b"hello, world", postscript, b"%PDF-1.4", b"\0" * 99):
        refused(encoded)


KINDS = {"PNG": {}, "JPEG": {}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "TIFF": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_f19_a_truncated_file_is_refused_unless_its_pixels_are_whole(kind: str) -> None:
    """Cut anywhere: an error before training, never a grey half."""
    encoded = encode(noise(40, 40), kind, **KINDS[kind])
    whole = pictures.decode(encoded, "row")
    pictures.header(encoded, LIMIT, "row")
    size = len(encoded)
    for end in {1, 8, 30, size // 2, size * 3 // 4, size - 200, size - 13, size - 2}:
        try:
            pictures.header(encoded[:end], LIMIT, "row")
        except DataError:
            continue
        assert np.array_equal(pictures.decode(encoded[:end], "row"), whole), f"{kind} cut at {end}"


def test_a_flipped_bit_of_a_png_is_noticed() -> None:
    encoded = bytearray(encode(noise()))
    for place in range(8, len(encoded), 97):
        encoded[place] ^= 4
        refused(bytes(encoded))
        encoded[place] ^= 4


def a_png(width: int, height: int) -> bytes:
    """A small file that says it is an image of this size, of one colour."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = zlib.compressobj(9)
    content = lines.compress(bytes(min(width * height, 10**6))) + lines.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def a_tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, height), (279, 4, width * height % 2**32)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def a_webp(width: int, height: int) -> bytes:
    """The extended header alone."""
    size = lambda value: struct.pack("<I", value - 1)[:3]  # noqa: E731
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size(width) + size(height)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("encoded", [
    a_png(20_000, 20_000), a_png(8_000, 8_000), a_tiff(60_000, 60_000), a_webp(16_000, 16_000), a_png(1_000_000, 1),
    a_png(1, 1_000_000),
], ids=["png 400 Mpx", "png 64 Mpx", "tiff", "webp", "strip", "column"])
def test_f20_a_bomb_is_refused_by_its_header(encoded: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(encoded)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024, "decoded it"
    assert "data.image_pixels" in message or encoded[8:12] == b"WEBP"  # a WebP of headers alone is damaged first


def test_f19_animations_and_pages_are_refused() -> None:
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        assert "several pictures" in refused(encode(frames[0], kind, save_all=True, append_images=frames[1:]))


# Pixels.


def digest(encoded: bytes) -> str:
    pictures.header(encoded, LIMIT, "row")
    return hashlib.sha256(pictures.decode(encoded, "row").tobytes()).hexdigest()[:16]


def test_f19_sixteen_bits_keep_their_high_byte() -> None:
    wide = np.arange(0, 65536, 111, dtype=np.uint16)[:512].reshape(16, 32)
    found = pictures.decode(encode(Image.fromarray(wide)), "row")
    assert np.array_equal(found, np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, 2))


def test_f19_cmyk_is_converted_by_its_formula() -> None:
    ink = noise(channels=4)
    found = pictures.decode(encode(Image.fromarray(ink, "CMYK"), "TIFF"), "row").astype(int)
    colour, key = ink[..., :3].astype(int), ink[..., 3:].astype(int)
    assert np.abs(found - (255 - colour) * (255 - key) / 255).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_f19_an_exif_rotation_is_applied(orientation: int) -> None:
    """The size of the header, and the pixels, are those that a person sees."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    for kind, settings in (("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})):
        encoded = encode(noise(), kind, exif=exif.tobytes(), **settings)
        wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))
        found = pictures.decode(encoded, "row")
        assert pictures.header(encoded, LIMIT, "row") == found.shape[:2] == wanted.shape[:2]
        assert np.array_equal(found, wanted)


def test_transparency_is_laid_on_white() -> None:
    clear = noise(channels=4)
    clear[..., 3] = np.where(np.arange(30) < 15, 0, 255)
    found = pictures.decode(encode(clear), "row")
    assert (found[:, :15] == 255).all() and np.array_equal(found[:, 15:], clear[:, 15:, :3])
    palette = Image.fromarray(noise()).convert("P")
    assert pictures.decode(encode(palette, transparency=3), "row").shape == (20, 30, 3)


def test_the_same_bytes_give_the_same_pixels() -> None:
    """Hashes, so that another Pillow that converts otherwise is noticed."""
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    found = {
        "16-bit": digest(encode(Image.fromarray(grey))),
        "cmyk": digest(encode(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4), "CMYK"), "TIFF")),
        "grey+alpha": digest(encode(Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 8, 2), "LA"))),
    }
    assert found == {"16-bit": "1a88ca46001697b4", "cmyk": "dced9741e0125007", "grey+alpha": "7dd2f5d11299b7c7"}


def test_random_damage_is_a_data_error_or_an_image() -> None:
    """Thousands of damaged files: no other exception, ever."""
    generator = np.random.default_rng(1)
    originals = [encode(noise(12, 12), kind, **settings) for kind, settings in KINDS.items()]
    for number in range(1500):
        encoded = bytearray(originals[number % len(originals)])
        for place in generator.integers(0, len(encoded), int(generator.integers(1, 6))):
            encoded[place] = generator.integers(0, 256)
        try:
            pictures.header(bytes(encoded), LIMIT, "row")
            pictures.decode(bytes(encoded), "row")
        except DataError:
            pass

"""Raster files: the film in PNG, JPEG, TIFF and WebP, and damage to their structures."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks.mutations.base import MARKER, Input, damage, film, number, saved

_TURN = {  # EXIF orientation → what undoes it in the stored picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def raster(rng: np.random.Generator, made: Input, grey: np.ndarray, form: str = "") -> None:
    """The film in an ordinary format, in another mode and orientation."""
    eight = Image.fromarray(np.round(grey * 255).astype(np.uint8))
    form = form or str(rng.choice(["PNG", "JPEG", "TIFF", "WEBP"], p=[0.35, 0.3, 0.25, 0.1]))
    modes = {
        "PNG": ["L", "RGB", "RGBA", "P", "LA", "16", "half"],
        "JPEG": ["L", "RGB", "CMYK"],
        "TIFF": ["L", "RGB", "16", "white", "16white"],
        "WEBP": ["RGB"],
    }[form]
    mode = str(rng.choice(modes))
    turn = int(rng.integers(1, 9)) if rng.random() < 0.6 else 1
    picture: Image.Image = eight
    if mode in ("16", "16white"):
        picture = Image.fromarray(np.round((1 - grey if mode == "16white" else grey) * 65535).astype(np.uint16))
    elif mode == "half":
        picture = Image.fromarray(np.round(grey * 127).astype(np.uint8))
    elif mode == "white":
        picture = eight  # Pillow turns 8-bit values over itself when it writes WhiteIsZero
    elif mode != "L":
        picture = eight.convert(mode)
    turning = _TURN[turn]
    if turning is not None:
        picture = picture.transpose(turning)
    options: dict[str, Any] = {}
    if form == "TIFF":
        tags = {0x112: turn} if turn != 1 else {}
        if mode in ("white", "16white"):
            tags[0x106] = 0
        options = {"tiffinfo": tags, "compression": str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate"]))}
        if mode in ("16", "16white"):
            options["compression"] = "raw"
    else:
        if turn != 1:
            exif = Image.Exif()
            exif[0x112] = turn
            options["exif"] = exif
        if form == "JPEG":
            options["quality"] = int(rng.integers(97, 101))
        elif form == "WEBP":
            options["lossless"] = True
    if form == "PNG" and rng.random() < 0.3:
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", MARKER)
        options["pnginfo"] = info
    made.data = saved(picture, form, **options)
    made.may_refuse = form == "WEBP"
    suffixes = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}
    made.name = "film" + (suffixes[form] if rng.random() < 0.9 else ".png")
    made.note = f"{form} {mode} orientation {turn}"


def png(rng: np.random.Generator, made: Input) -> None:
    """Chunks of a PNG removed, repeated, damaged or added."""
    raster(rng, made, film(0), "PNG")
    chunks, place = [], 8
    while place + 8 <= len(made.data):
        (length,) = struct.unpack(">I", made.data[place : place + 4])
        chunks.append((made.data[place + 4 : place + 8], made.data[place + 8 : place + 8 + length]))
        place += 12 + length
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(len(chunks)))
        name, body = chunks[at]
        action = int(rng.integers(6))
        if action == 0:
            chunks.pop(at)
        elif action == 1:
            chunks.insert(int(rng.integers(len(chunks))), (name, body))
        elif action == 2:
            chunks[at] = (name, damage(rng, body) if body else rng.bytes(9))
        elif action == 3:
            size = [struct.pack(">I", number(rng)) for _ in range(2)]
            chunks[0] = (b"IHDR", size[0] + size[1] + chunks[0][1][8:])
        elif action == 4:
            chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes(map(int, rng.integers(0, 20, 5))))
        else:
            extra = [b"tRNS", b"gAMA", b"PLTE", b"eXIf", b"iCCP", b"zTXt", b"acTL", b"bKGD", b"sBIT"]
            chunks.insert(1, (extra[rng.integers(len(extra))], rng.bytes(int(rng.integers(0, 64)))))
        if not chunks:
            break
    made.data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    made.note = "PNG chunks"


def jpeg(rng: np.random.Generator, made: Input) -> None:
    """A segment of a JPEG removed, repeated, or with a wrong size."""
    raster(rng, made, film(0), "JPEG")
    data = bytearray(made.data)
    marks = []
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        marks.append(place)
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    at = marks[rng.integers(len(marks))]
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    action = int(rng.integers(5))
    if action == 0:
        del data[at : at + 2 + length]
    elif action == 1:
        data[at:at] = data[at : at + 2 + length]
    elif action == 2:
        data[at + 2 : at + 4] = struct.pack(">H", number(rng, 65536))
    elif action == 3:
        for frame in (m for m in marks if data[m + 1] in (0xC0, 0xC1, 0xC2)):
            data[frame + 5 : frame + 9] = struct.pack(">HH", number(rng, 65536), number(rng, 65536))
    else:
        data[at + 4 : at + 2 + length] = rng.bytes(length - 2)
    made.data, made.note = bytes(data), f"JPEG segment {action}"


def tiff(rng: np.random.Generator, made: Input) -> None:
    """Wrong entries in the directory of a TIFF."""
    raster(rng, made, film(0), "TIFF")
    data = bytearray(made.data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[start : start + 2])
    for _ in range(int(rng.integers(1, 3))):
        at = start + 2 + 12 * int(rng.integers(count))
        field_at, size = [(at, 2), (at + 2, 2), (at + 4, 4), (at + 8, 4)][rng.integers(4)]
        data[field_at : field_at + size] = struct.pack(
            order + ("H" if size == 2 else "I"), number(rng, 2 ** (8 * size))
        )
    made.data, made.note = bytes(data), "TIFF directory"


def raster_bytes(rng: np.random.Generator, made: Input) -> None:
    """An ordinary format with damaged bytes."""
    raster(rng, made, film(0))
    made.data = damage(rng, made.data)
    made.note += ", damaged"

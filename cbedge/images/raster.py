"""Decode PNG, JPEG, TIFF and WebP radiographs with Pillow, as a viewer shows them."""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from cbedge.errors import RadiographError
from cbedge.images.intensity import Transform, averaged, blocks, stretch, to_uint8, turned
from cbedge.images.memory import PartedFile, kept_bytes, reduction, working_memory
from cbedge.images.tags import MAX_FRAMES, check_tags
from cbedge.images.tone import tone_curve, unusable

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")  # JPEG includes MPO, the cameras' multi-picture format
EIGHT_BIT_MODES = ("1", "P", "PA", "La", "LA", "CMYK", "YCbCr", "RGBA", "RGBa", "RGBX", "RGB", "HSV")
MIN_SIDE = 32
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # a RIFF file can be anything
# Pillow's warnings about large and damaged images are replaced by the messages here. The filter is permanent because
# warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF tag and value
_SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 339, 1, 2  # TIFF tag and values
_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH = 0x112, 322, 323
_BITS_PER_SAMPLE = 258
_UNSUPPORTED = re.compile("unknown raw mode|conversion from .* not supported")  # in Pillow's messages
_MAX_READS = 1_000_000  # read calls per file; a PNG of 60 MB needs 40,000
_MAX_EXIF_BYTES = 2**20


@dataclass
class _Picture:
    """A decoded image with its stored values.

    Attributes:
        grey: integers or floats [rows, columns].
        colour: uint8 [rows, columns, 3] for an image in colour, reduced like the radiograph's pixels.
        chroma: colourfulness, 0 to 1.
        orientation: as in EXIF, 1 to 8.
        is_negative: whether small values are bright.
        bits: significant bits of the grey values.
        tone: function from stored to displayed values, both 0 to 1; ``None`` if they are the same.
        warnings: as in :class:`Raster`.
    """

    grey: np.ndarray
    colour: np.ndarray | None
    chroma: float
    orientation: int
    is_negative: bool
    bits: int
    tone: Transform | None
    warnings: tuple[str, ...]


class Raster(NamedTuple):
    """What an image file or a Pillow image shows; see :class:`cbedge.images.radiograph.Radiograph`."""

    pixels: np.ndarray
    chroma: float
    stored: np.ndarray | None
    warnings: tuple[str, ...]


def decode_raster(data: bytes, name: str, max_pixels: int) -> Raster:
    """Decode an image file.

    Args:
        data: the file's bytes.
        name: name for error messages.
        max_pixels: limit on the number of pixels, checked before decoding.

    Raises:
        RadiographError: the format is unknown, or the image is damaged, too large, or has several frames.
    """
    _silence_libtiff()
    image = _open(data, name, max_pixels)
    copies = 3 if image.format == "WEBP" else 1
    with working_memory(_needed(image) + copies * len(data), name, image.size):
        picture = _picture(image, name)
        image.close()
        return _shown(picture)


def image_values(image: Image.Image, name: str) -> Raster:
    """The values of a Pillow image, rotated according to its orientation tag.

    Raises:
        RadiographError: the image is damaged, or its pixel type is not supported.
    """
    _silence_libtiff()
    with working_memory(_needed(image), name, image.size):
        return _shown(_picture(image, name))


def stored_values(values: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """The value of :attr:`Radiograph.stored` for an array [rows, columns(, channels)], reduced like the pixels."""
    if values.dtype != np.uint8:
        return None
    if values.ndim == 3:
        grey = all(np.array_equal(values[..., 0], values[..., i]) for i in range(1, min(3, values.shape[2])))
        values = values[..., 0] if grey else values[..., :3]
    if values.ndim == 2 and np.array_equal(to_uint8(pixels), values):
        return None
    return np.ascontiguousarray(values)


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Check that (columns, rows) are plausible for a radiograph.

    Raises:
        RadiographError: there are too many or too few.
    """
    columns, rows = size
    if columns * rows > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; the limit is {max_pixels:,}: scale it down")
    if min(columns, rows) < MIN_SIDE:
        raise RadiographError(
            f"{name} has {columns} x {rows} pixels; the minimum is {MIN_SIDE} x {MIN_SIDE}: give the original image"
        )


@cache
def _silence_libtiff() -> None:
    """Stop libtiff from writing errors to standard error; Pillow stops only the warnings."""
    package = Path(PIL.__file__).parent
    for path in (*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).TIFFSetErrorHandler(None)


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    tiff_frames, page = check_tags(data, name)
    try:
        image = Image.open(PartedFile(io.BytesIO(data), name, _MAX_READS), formats=FORMATS)  # type: ignore[arg-type]
        if page:
            image.seek(page)
        # Additional frames of an MPO are previews. For a TIFF, Pillow would read all frames to count them.
        frames = tiff_frames or (1 if image.format == "MPO" else getattr(image, "n_frames", 1))
        exif = len(image.info.get("exif") or image.info.get("Raw profile type exif") or "")
    except RadiographError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_STARTS):
            raise RadiographError(
                f"{name} has a damaged header or an unsupported pixel type; save it as 8 or 16 bit greyscale PNG"
            ) from error
        raise RadiographError(
            f"{name} is not a supported image; give PNG, JPEG, TIFF, WebP or DICOM (CR or DX)"
        ) from None
    except Image.DecompressionBombError:
        raise RadiographError(f"{name} has far too many pixels; the limit is {max_pixels:,}: scale it down") from None
    except Exception as error:  # Pillow raises various exceptions for damaged headers
        raise RadiographError(f"{name} has a damaged header: export it again") from error
    check_size(image.size, name, max_pixels)
    if frames > 1:
        raise RadiographError(
            f"{name} has {frames if frames < MAX_FRAMES else 'very many'} frames; give a single radiograph"
        )
    if exif > _MAX_EXIF_BYTES:
        raise RadiographError(
            f"{name} has {exif:,} bytes of EXIF data; the limit is {_MAX_EXIF_BYTES:,}: export it without EXIF"
        )
    return image


def _needed(image: Image.Image) -> int:
    """Bytes of memory for decoding an image and mapping its values."""
    (columns, rows), mode = image.size, image.mode
    stored = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
    grey = stored if mode.startswith("I") or mode == "F" else 1
    kept = kept_bytes(rows, columns, _kept_per_pixel(mode))
    copy = 4 if _kept_per_pixel(mode) == 7 and mode not in ("RGB", "1", "LA", "La") else 0  # used by _chroma
    decoding, tile, tags = stored, 0, getattr(image, "tag_v2", {})
    if image.format == "WEBP":
        decoding = 16  # two canvases, the frame and its bytes
    elif image.format in ("JPEG", "MPO"):
        decoding += 2 * len(image.getbands())  # DCT coefficients, except for simple baseline files
    elif tags:
        decoding *= 2  # one strip may hold the whole image, or a rotated copy is made
        across, down = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)
        tile = 4 * across * down if isinstance(across, int) and isinstance(down, int) else 0
    pixels = rows * columns
    return max(pixels * decoding + tile, pixels * (stored + grey + copy) + kept * 3 // 7, pixels * grey + kept)


def _kept_per_pixel(mode: str) -> int:
    """Bytes per pixel of a radiograph after reading (pixels and stored values), by image mode."""
    return 4 if mode.startswith("I") or mode == "F" else 5 if mode == "L" else 7


def _picture(image: Image.Image, name: str) -> _Picture:
    try:
        if _loses_depth(image):
            raise RadiographError(f"{name} has several channels of more than 8 bits; save it as 16 bit greyscale")
        if image.format == "TIFF" and _PHOTOMETRIC not in getattr(image, "tag_v2", {}):
            raise RadiographError(
                f"{name} lacks the TIFF tag PhotometricInterpretation, which says whether 0 is black or white: save it "
                "again with it, or as PNG"
            )
        # The tags are lost after loading.
        white_is_zero, stored, bits = _is_white_zero(image), _stored_type(image), _bits(image, 64)
        image.load()
        image = image.convert("LA") if image.mode == "La" else image  # Pillow has no other conversion
        colour = _colour(image) if image.mode in EIGHT_BIT_MODES else None
        grey = _grey(image, name)
        grey = grey if stored is None else grey.view(stored)
        tone, told = tone_curve(image)
        if tone is not None and grey.dtype.kind != "u":  # a curve is for values from 0 to the most that is possible
            tone, told = None, unusable(image)
        bits = min(max(8, bits), 8 * grey.dtype.itemsize)
        return _Picture(grey, colour, _chroma(image), _orientation(image), white_is_zero, bits, tone, told)
    except RadiographError:
        raise
    except Exception as error:  # Pillow's decoders raise various exceptions for damaged data
        if _UNSUPPORTED.search(str(error)):
            raise _unsupported(image, name) from error
        raise RadiographError(f"{name} is damaged or truncated: export it again") from error


def _unsupported(image: Image.Image, name: str) -> RadiographError:
    return RadiographError(f"{name} has the unsupported pixel type {image.mode}; save it as 8 or 16 bit greyscale PNG")


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data of a loaded image, 1 to 8, also if its type is not the standard's."""
    exif, profile = image.getexif(), image.info.get("Raw profile type APP1")  # the latter by older software, in PNG
    data = bytes.fromhex("".join(profile.split("\n")[3:])) if isinstance(profile, str) else b""
    if _ORIENTATION not in exif and data.startswith(b"Exif\0\0"):
        exif = Image.Exif()
        exif.load(data)
    value = exif.get(_ORIENTATION, 1)
    value = value[0] if isinstance(value, bytes | tuple) and value else value
    return int(value) if value in range(1, 9) else 1


def _shown(picture: _Picture) -> Raster:
    grey, colour, negative, transform = picture.grey, picture.colour, picture.is_negative, None
    if picture.tone is not None:
        tone, most, inverted, negative = picture.tone, 2**picture.bits - 1, negative, False
        transform = lambda v: tone(np.clip((most - v if inverted else v) / most, 0, 1))  # noqa: E731
    rows, columns = grey.shape
    factor = reduction(rows, columns, 7 if colour is not None else 5 if grey.dtype == np.uint8 else 4)
    pixels = stretch(grey, transform=transform, inverted=negative, factor=factor)
    values = averaged(grey, factor) if colour is None and grey.dtype == np.uint8 else colour
    stored = None if values is None else stored_values(values, pixels)
    orientation = picture.orientation
    turns = orientation > 4, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    stored = None if stored is None else turned(stored, *turns)
    return Raster(turned(pixels, *turns), picture.chroma, stored, picture.warnings)


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF with more than 8 bits stores white as 0; Pillow inverts TIFFs of 1 to 8 bits itself."""
    tags = getattr(image, "tag_v2", None)
    deep = image.mode.startswith("I") or image.mode == "F"
    return tags is not None and deep and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _loses_depth(image: Image.Image) -> bool:
    """Whether Pillow would cut the values of an image with several channels to their high bytes."""
    return image.mode in EIGHT_BIT_MODES and (
        _bits(image, 8) > 8 or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    )


def _bits(image: Image.Image, default: int) -> int:
    """Bits per sample according to the tags of a TIFF."""
    tags = getattr(image, "tag_v2", None)
    return max(tags.get(_BITS_PER_SAMPLE, (8,)), default=8) if tags is not None else default


def _stored_type(image: Image.Image) -> str | None:
    """The correct sample type of a TIFF that Pillow misinterprets; ``None`` otherwise."""
    tags = getattr(image, "tag_v2", None)
    found = (image.mode, tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))) if tags is not None else None
    return "u4" if found == ("I", (_UNSIGNED,)) else "i1" if found == ("L", (_SIGNED,)) else None


def _parts(image: Image.Image, factor: int = 1) -> Iterator[tuple[slice, Image.Image]]:
    """Blocks of rows of an image, to bound the memory of intermediate results."""
    columns, rows = image.size
    for part in blocks(np.broadcast_to(np.uint8(0), (rows, columns)), factor):
        yield part, image.crop((0, part.start, columns, min(part.stop, rows)))


def _grey(image: Image.Image, name: str) -> np.ndarray:
    """Grey values [rows, columns]."""
    known = image.mode == "L" or image.mode in EIGHT_BIT_MODES or image.mode.startswith("I") or image.mode == "F"
    if not known:
        raise _unsupported(image, name)
    grey: np.ndarray | None = None
    for rows, part in _parts(image):
        values = np.asarray(_opaque(part).convert("L") if image.mode in EIGHT_BIT_MODES else part)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise RadiographError(f"{name} has values that are not finite; export it again")
        if grey is None:
            grey = np.empty(image.size[::-1], values.dtype.newbyteorder("="))
        grey[rows] = values
    assert grey is not None
    return grey


def _colour(image: Image.Image) -> np.ndarray | None:
    """Values of an 8-bit image, uint8 [rows, columns, 3], on black where it is transparent."""
    factor = reduction(image.size[1], image.size[0], _kept_per_pixel(image.mode))
    colour = np.empty((-(-image.size[1] // factor), -(-image.size[0] // factor), 3), np.uint8)
    for rows, part in _parts(image, factor):
        values = np.asarray(_opaque(part).convert("RGB").reduce(factor))
        start = rows.start // factor
        colour[start : start + len(values)] = values
    return colour


def _opaque(image: Image.Image) -> Image.Image:
    """The image on black where it is transparent."""
    if image.mode in ("La", "LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return 0.0
    columns, rows = image.size
    scale = min(1, 256 / max(columns, rows))
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    small = image if image.mode == "RGB" else image.convert("RGB")
    channels = np.asarray(small.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0), np.float32) / 255
    return float((channels.max(2) - channels.min(2)).mean())

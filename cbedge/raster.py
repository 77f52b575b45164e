"""Decode PNG, JPEG, TIFF and WebP radiographs with Pillow, as every viewer shows them."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cbedge.errors import RadiographError
from cbedge.intensity import stretch

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")  # JPEG brings MPO, of cameras
EIGHT_BIT_MODES = ("1", "P", "PA", "La", "LA", "CMYK", "YCbCr", "RGBA", "RGBa", "RGBX", "RGB", "HSV", "LAB")
# Pillow warns of large and of damaged images; what matters is said here in one line. For good, since
# warnings.catch_warnings is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
_MAX_STORED = 50_000_000  # pixels
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a TIFF's tag


def decode_raster(data: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, float, np.ndarray | None]:
    """Decode a file's bytes.

    Args:
        data: the file.
        name: what to call it in a message.
        max_pixels: refuse more, from the header, before decoding.

    Returns:
        As :func:`image_values`.

    Raises:
        RadiographError: no image of a known format, damaged, too large, or of several frames.
    """
    return image_values(_open(data, name, max_pixels), name)


def image_values(image: Image.Image, name: str) -> tuple[np.ndarray, float, np.ndarray | None]:
    """The values of a Pillow image, turned as its orientation tag says.

    Returns:
        pixels, float32 [rows, columns] in 0..1; how colourful they are, 0 to 1; and the stored 8-bit values, as
        :attr:`cbedge.radiograph.Radiograph.stored`.

    Raises:
        RadiographError: damaged, or of a pixel type that is not supported.
    """
    try:
        white_is_zero = _is_white_zero(image)  # loading forgets the tags
        image.load()
        image = ImageOps.exif_transpose(image)
        grey = _grey(image, name)
        if white_is_zero:
            grey = grey.max() - grey
        pixels = stretch(grey)
        return pixels, _chroma(image), stored_values(image, pixels)
    except RadiographError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged data
        raise RadiographError(f"{name} is damaged or cut short: export it again") from error


def stored_values(source: Image.Image | np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """What :attr:`Radiograph.stored` holds of an 8-bit image, or of an array [rows, columns(, channels)]."""
    if pixels.size > _MAX_STORED:
        return None
    if isinstance(source, np.ndarray):
        values = source[..., :3] if source.ndim == 3 else source
    elif source.mode == "L" or source.mode in EIGHT_BIT_MODES:
        values = np.asarray(source if source.mode == "L" else _opaque(source).convert("RGB"))
    else:
        return None
    if values.dtype != np.uint8:
        return None
    if values.ndim == 3 and all(np.array_equal(values[..., 0], values[..., i]) for i in range(1, values.shape[2])):
        values = values[..., 0]
    if values.ndim == 2 and np.array_equal(np.rint(pixels * 255), values):
        return None
    return np.ascontiguousarray(values)


def check_size(size: tuple[int, int], name: str, max_pixels: int, min_side: int) -> None:
    """See that (columns, rows) are those of a radiograph.

    Raises:
        RadiographError: they are too many or too few.
    """
    columns, rows = size
    if columns * rows > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; at most {max_pixels:,} in all: scale it down")
    if min(columns, rows) < min_side:
        raise RadiographError(f"{name} has {columns} x {rows} pixels, too few for a radiograph (at least {min_side})")


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # an MPO's others are previews
    except UnidentifiedImageError:
        raise RadiographError(
            f"{name} is not an image that cbedge reads; give PNG, JPEG, TIFF, WebP or DICOM (CR or DX)"
        ) from None
    except Image.DecompressionBombError:
        raise RadiographError(f"{name} has far too many pixels; at most {max_pixels:,} in all: scale it down") from None
    except Exception as error:  # likewise on damaged headers
        raise RadiographError(f"{name} has a damaged header: export it again") from error
    check_size(image.size, name, max_pixels, 1)
    if frames > 1:
        raise RadiographError(f"{name} holds {frames} frames; give a single radiograph")
    return image


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF of more than 8 bits stores white as 0; Pillow inverts those of 1 to 8 bits itself."""
    tags = getattr(image, "tag_v2", None)
    deep = image.mode.startswith("I") or image.mode == "F"
    return tags is not None and deep and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _grey(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in EIGHT_BIT_MODES:
        image = _opaque(image).convert("L")
    if image.mode == "L":
        return np.asarray(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise RadiographError(f"{name} holds values that are not finite; export it again")
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    raise RadiographError(f"{name} has pixel type {image.mode}, which is not supported; save it as 8 or 16 bit grey")


def _opaque(image: Image.Image) -> Image.Image:
    """The image over black where it is transparent."""
    if image.mode in ("La", "LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return 0.0
    small = image.convert("RGB")
    small.thumbnail((256, 256))
    channels = np.asarray(small, np.float32) / 255
    return float((channels.max(2) - channels.min(2)).mean())

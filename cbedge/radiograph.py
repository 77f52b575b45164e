"""Read a chest radiograph from PNG, JPEG, TIFF, DICOM or an array.

:mod:`cbedge.preprocess` turns it into a model's input, in training and inference alike.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cbedge.errors import RadiographError

MAX_PIXELS = 100_000_000
MAX_BYTES = 512 * 1024 * 1024
MIN_SIDE = 32
_RASTER_FORMATS = ("PNG", "JPEG", "TIFF")
_EIGHT_BIT_MODES = ("1", "P", "PA", "LA", "CMYK", "YCbCr", "RGBA", "RGB", "HSV", "LAB")
_MAX_STORED = 50_000_000  # pixels


@dataclass(frozen=True)
class Radiograph:
    """A decoded radiograph.

    Attributes:
        pixels: float32 [rows, columns], 0 (air, dark) to 1 (bone, bright).
        view: ``frontal`` or ``lateral`` where the file says so, else ``None``.
        sha256: hash of the input file's bytes (of the raw pixels for an array).
        indication: what a DICOM header says of why the study was requested, else ``None``.
        chroma: how colourful the file is: mean difference of a pixel's largest and smallest channel, 0 (grey) to 1.
        read_ms: how long reading and decoding took, in milliseconds.
        study_uid: of the study that a DICOM header names.
        warnings: what a reader of the draft must know about the file, such as an attribute that could not be used; one
            sentence each, without patient data.
        stored: an 8-bit file's own values, uint8 [rows, columns] or in colour [rows, columns, 3], where ``pixels`` do
            not hold them: the file is in colour, or its range was stretched. For models whose preprocessing takes
            stored values (:mod:`cbedge.preprocess`). ``None`` otherwise, and above 50 megapixels.
    """

    pixels: np.ndarray
    view: str | None
    sha256: str
    indication: str | None = None
    chroma: float = 0.0
    read_ms: float = 0.0
    study_uid: str | None = None
    warnings: tuple[str, ...] = ()
    stored: np.ndarray | None = None


def load_radiograph(source: Any, max_pixels: int = MAX_PIXELS) -> Radiograph:
    """Read a radiograph from a path, bytes, a PIL image or an array.

    Args:
        source: a path (``str`` or ``Path``), the file's ``bytes``, a ``PIL.Image.Image``, or an array
            [rows, columns] or [rows, columns, 3 or 4]: uint8, uint16, bool, or float in 0..1.
        max_pixels: refuse more pixels than this, before decoding.

    Raises:
        RadiographError: the input is missing, empty, damaged, too large, or no single-frame radiograph.
    """
    if isinstance(source, Radiograph):
        return source
    start = perf_counter()
    radiograph = _load(source, max_pixels)
    return replace(radiograph, read_ms=1000 * (perf_counter() - start))


def _load(source: Any, max_pixels: int) -> Radiograph:
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        _check_size(source.size, "the image", max_pixels)
        try:
            pixels, chroma = _image_to_unit(source, "the image"), _chroma(source)
            stored = _stored_values(source, pixels)
        except (OSError, SyntaxError, ValueError) as error:
            raise RadiographError("the image is damaged or cut short: export it again") from error
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
        return Radiograph(pixels, None, digest, chroma=chroma, stored=stored)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the input", max_pixels)
    if isinstance(source, str | Path):
        path = Path(source)
        return _decode(_read_bytes(path), path.name, max_pixels)
    raise RadiographError(
        f"cannot read a radiograph from a {type(source).__name__}; give a path, bytes, a PIL image or a NumPy array"
    )


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Deprecated: :func:`cbedge.preprocess.preprocess` with the default settings; float32 [1, 3, 224, 224]."""
    from cbedge.preprocess import Preprocessing, preprocess

    warnings.warn("use cbedge.preprocess.preprocess with a model's settings", DeprecationWarning, stacklevel=2)
    return preprocess(pixels, Preprocessing())


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise RadiographError(f"{path.name} is a folder; give one image file")
        size = path.stat().st_size
        if not path.is_file():
            raise RadiographError(f"{path.name} is not a regular file; give one image file")
        if size > MAX_BYTES:
            raise RadiographError(f"{path.name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise RadiographError(f"no such file: {path.name}; check the path") from None
    except PermissionError:
        raise RadiographError(f"no permission to read {path.name}; change its permissions or copy it") from None
    except (OSError, ValueError) as error:
        raise RadiographError(f"cannot read {path.name!r}: {type(error).__name__}; check the path") from None


def _decode(data: bytes, name: str, max_pixels: int) -> Radiograph:
    if not data:
        raise RadiographError(f"{name} is empty (0 bytes); export it again")
    digest = hashlib.sha256(data).hexdigest()
    if data[128:132] == b"DICM":
        from cbedge.dicom import read_dicom

        pixels, view, indication, study = read_dicom(data, name, max_pixels)
        return Radiograph(_checked(pixels, name), view, digest, indication, study_uid=study)
    pixels, chroma, stored = _decode_raster(data, name, max_pixels)
    return Radiograph(_checked(pixels, name), None, digest, chroma=chroma, stored=stored)


def _decode_raster(data: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, float, np.ndarray | None]:
    # Pillow warns of large and of damaged images on standard error; what matters of it is said here, in one line.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open_raster(data, name, max_pixels)
        try:
            image.load()
            pixels = _image_to_unit(image, name)
            return pixels, _chroma(image), _stored_values(image, pixels)
        except RadiographError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds on damaged data
            raise RadiographError(f"{name} is damaged or cut short: export it again") from error


def _open_raster(data: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_RASTER_FORMATS)
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise RadiographError(
            f"{name} is not an image that cbedge reads; give PNG, JPEG, TIFF or DICOM (CR or DX)"
        ) from None
    except Image.DecompressionBombError:
        raise RadiographError(f"{name} has far too many pixels; at most {max_pixels:,} in all: scale it down") from None
    except Exception as error:  # likewise on damaged headers
        raise RadiographError(f"{name} has a damaged header: export it again") from error
    _check_size(image.size, name, max_pixels)
    if frames > 1:
        raise RadiographError(f"{name} holds {frames} frames; give a single radiograph")
    return image


def _image_to_unit(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in _EIGHT_BIT_MODES:
        image = _opaque(image).convert("L")
    if image.mode == "L":
        return np.asarray(image, dtype=np.float32) / 255.0
    if image.mode.startswith("I") or image.mode == "F":
        return _stretch(np.asarray(image, dtype=np.float32))
    raise RadiographError(f"{name} has pixel type {image.mode}, which is not supported; save it as 8 or 16 bit grey")


def _opaque(image: Image.Image) -> Image.Image:
    """The image over black where it is transparent."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image


def _stored_values(source: Image.Image | np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
    """What :attr:`Radiograph.stored` holds of an 8-bit image, or of an array [rows, columns(, channels)]."""
    if pixels.size > _MAX_STORED:
        return None
    if isinstance(source, np.ndarray):
        values = source[..., :3] if source.ndim == 3 else source
    elif source.mode == "L" or source.mode in _EIGHT_BIT_MODES:
        values = np.asarray(source if source.mode == "L" else _opaque(source).convert("RGB"))
    else:
        return None
    if values.dtype != np.uint8:
        return None
    if values.ndim == 3 and all(np.array_equal(values[..., 0], values[..., i]) for i in range(1, values.shape[2])):
        values = values[..., 0]
    some = (slice(None, None, 16),) * 2  # a stretched range shows in every part of the image
    if values.ndim == 2 and np.array_equal(np.rint(pixels[some] * 255), values[some]):
        return None
    return np.ascontiguousarray(values)


def _chroma(image: Image.Image) -> float:
    if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"):
        return 0.0
    small = image.convert("RGB")
    small.thumbnail((256, 256))
    channels = np.asarray(small, np.float32) / 255
    return float((channels.max(2) - channels.min(2)).mean())


def _stretch(values: np.ndarray) -> np.ndarray:
    """Map values of unknown depth (12 bits in a 16 bit file, say) to 0..1 by their own range."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise RadiographError("the image holds values that are not finite; export it again")
    if high <= low:
        return np.zeros_like(values, dtype=np.float32)
    return ((values - low) / (high - low)).astype(np.float32)


def _from_array(array: np.ndarray, max_pixels: int) -> Radiograph:
    name = "the array"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise RadiographError(f"{name} has shape {array.shape}; give [rows, columns] or [rows, columns, 3]")
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    grey = array[..., :3].astype(np.float32).mean(axis=2) if array.ndim == 3 else array.astype(np.float32)
    if array.dtype == np.uint8:
        grey = grey / 255.0
    elif array.dtype == np.uint16:
        grey = _stretch(grey)
    elif array.dtype.kind == "f":
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise RadiographError(f"{name} is float but not within 0..1; scale it, or give uint8 or uint16")
    elif array.dtype != np.bool_:
        raise RadiographError(f"{name} has dtype {array.dtype}; give uint8, uint16, bool or float in 0..1")
    chroma = 0.0
    if array.ndim == 3 and array.shape[2] >= 3:
        colours = array[..., :3].astype(np.float32) / (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1)
        chroma = float((colours.max(2) - colours.min(2)).mean())
    return Radiograph(_checked(grey, name), None, digest, chroma=chroma, stored=_stored_values(array, grey))


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    columns, rows = size
    if columns * rows > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; at most {max_pixels:,} in all: scale it down")
    if min(columns, rows) < MIN_SIDE:
        raise RadiographError(f"{name} has {columns} x {rows} pixels, too few for a radiograph (at least {MIN_SIDE})")


def _checked(pixels: np.ndarray, name: str) -> np.ndarray:
    if float(pixels.max()) - float(pixels.min()) < 1e-3:
        raise RadiographError(f"{name} is blank: every pixel has the same value; give a radiograph")
    return np.ascontiguousarray(pixels, dtype=np.float32)


_DEPRECATED = {"IMAGE_SIZE": "image_size", "IMAGE_MEAN": "mean", "IMAGE_STD": "std"}


def __getattr__(name: str) -> Any:
    """Deprecated constants: the settings are a part of each model, see :class:`cbedge.preprocess.Preprocessing`."""
    if name not in _DEPRECATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cbedge.preprocess import Preprocessing

    warnings.warn(f"{name} is deprecated: use the model's Manifest.preprocessing", DeprecationWarning, stacklevel=2)
    return getattr(Preprocessing(), _DEPRECATED[name])

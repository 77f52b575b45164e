"""Read a chest radiograph from PNG, JPEG, TIFF, WebP, DICOM or an array.

:mod:`cbedge.preprocess` turns it into a model's input, in training and inference alike.
"""

import hashlib
import os
import stat
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cbedge.errors import RadiographError
from cbedge.intensity import stretch
from cbedge.raster import check_size, decode_raster, image_values, stored_values

if TYPE_CHECKING:
    from cbedge.dicom import DicomFilm

MAX_PIXELS = 64_000_000  # the largest digitizers and detectors give some 30 million
MAX_BYTES = 512 * 1024 * 1024
MIN_SIDE = 32


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
    """Read a radiograph from a path, bytes, a file object, a PIL image, an array or a pydicom dataset.

    Args:
        source: a path (``str`` or ``os.PathLike``), the file's bytes, a binary file object (read from where it stands),
            a ``PIL.Image.Image``, a ``pydicom.Dataset`` with its pixels, or an array [rows, columns] or
            [rows, columns, 1, 3 or 4]: bool, integers of any size, or float in 0..1.
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
        check_size(source.size, "the image", max_pixels, MIN_SIDE)
        pixels, chroma, stored = image_values(source, "the image")
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
        return Radiograph(_checked(pixels, "the image"), None, digest, chroma=chroma, stored=stored)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the input", max_pixels)
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        return _decode(_read_bytes(path), printable(path.name), max_pixels)
    pydicom = sys.modules.get("pydicom")
    if pydicom is not None and isinstance(source, pydicom.Dataset):
        from cbedge.dicom import decode_dataset

        digest = hashlib.sha256(source.get("PixelData") or b"").hexdigest()
        return _from_dicom(decode_dataset(source, "the dataset", max_pixels), digest, "the dataset")
    if callable(getattr(source, "read", None)):
        return _decode(_read_stream(source), "the input", max_pixels)
    raise RadiographError(
        f"cannot read a radiograph from a {type(source).__name__}; give a path, bytes, a file object, a PIL image, a "
        "pydicom dataset or a NumPy array"
    )


def printable(name: str) -> str:
    """A file's name as a message can hold it: on one line, undecodable bytes and control characters escaped."""
    escaped = name.encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-30:]}"


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Deprecated: :func:`cbedge.preprocess.preprocess` with the default settings; float32 [1, 3, 224, 224]."""
    from cbedge.preprocess import Preprocessing, preprocess

    warnings.warn("use cbedge.preprocess.preprocess with a model's settings", DeprecationWarning, stacklevel=2)
    return preprocess(pixels, Preprocessing())


def _read_bytes(path: Path) -> bytes:
    name = printable(path.name)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RadiographError(f"{name} is a folder; give one image file")
        if not stat.S_ISREG(status.st_mode):
            raise RadiographError(f"{name} is not a regular file; give one image file")
        if status.st_size > MAX_BYTES:
            raise RadiographError(f"{name} has {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise RadiographError(f"no such file: {name}; check the path") from None
    except PermissionError:
        raise RadiographError(f"no permission to read {name}; change its permissions or copy it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RadiographError(f"cannot read {name} ({reason}): check the path") from None


def _read_stream(source: Any) -> bytes:
    try:
        data = source.read(MAX_BYTES + 1)
    except Exception as error:  # whatever the object raises
        raise RadiographError(f"the file object cannot be read ({type(error).__name__}): open it anew") from None
    if not isinstance(data, bytes | bytearray):
        raise RadiographError("the file object gives text, not bytes: open it in binary mode")
    if len(data) > MAX_BYTES:
        raise RadiographError(f"the input has more than {MAX_BYTES:,} bytes; scale the radiograph down")
    return bytes(data)


def _decode(data: bytes, name: str, max_pixels: int) -> Radiograph:
    if not data:
        raise RadiographError(f"{name} is empty (0 bytes); export it again")
    digest = hashlib.sha256(data).hexdigest()
    if data[128:132] == b"DICM" or data[:2] in (b"\x02\x00", b"\x08\x00"):
        from cbedge.dicom import read_dicom

        return _from_dicom(read_dicom(data, name, max_pixels), digest, name)
    pixels, chroma, stored = decode_raster(data, name, max_pixels)
    check_size(pixels.shape[::-1], name, max_pixels, MIN_SIDE)
    return Radiograph(_checked(pixels, name), None, digest, chroma=chroma, stored=stored)


def _from_dicom(film: "DicomFilm", digest: str, name: str) -> Radiograph:
    check_size(film.pixels.shape[::-1], name, MAX_PIXELS, MIN_SIDE)
    return Radiograph(
        _checked(film.pixels, name), film.view, digest, film.indication, film.chroma, study_uid=film.study_uid,
        warnings=film.warnings,
    )  # fmt: skip


def _from_array(array: np.ndarray, max_pixels: int) -> Radiograph:
    name = "the array"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise RadiographError(f"{name} has shape {array.shape}; give [rows, columns] or [rows, columns, 3]")
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise RadiographError(f"{name} has dtype {array.dtype}; give bool, integers or float in 0..1")
    check_size((array.shape[1], array.shape[0]), name, max_pixels, MIN_SIDE)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    values = array.astype(array.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise RadiographError(f"{name} is float but not within 0..1; scale it, or give integers")
    chroma, grey = 0.0, values if values.ndim == 2 else values[..., 0]
    if values.ndim == 3 and values.shape[2] >= 3:
        channels = values[..., :3].astype(np.float32)
        grey = channels if np.ptp(channels, axis=2).max() > 0 else grey
        if grey is channels:
            most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
            chroma = float(np.ptp(channels, axis=2).mean()) / most
            grey = channels @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = grey.astype(np.uint8) if grey.dtype.kind == "b" else grey
    pixels = stretch(grey)
    return Radiograph(_checked(pixels, name), None, digest, chroma=chroma, stored=stored_values(array, pixels))


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

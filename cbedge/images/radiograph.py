"""Read a chest radiograph from PNG, JPEG, TIFF, WebP, DICOM or an array.

:mod:`cbedge.images.preprocess` turns it into a model's input, in training and inference alike.
"""

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from cbedge.errors import RadiographError
from cbedge.images.file_type import is_dicom
from cbedge.images.film import Radiograph as Radiograph
from cbedge.images.film import checked
from cbedge.images.intensity import averaged, blocks, stretch
from cbedge.images.memory import MAX_BYTES, MAX_PIXELS, file_memory, kept_bytes, reduction, working_memory
from cbedge.images.raster import Raster, check_size, decode_raster, image_values, stored_values

if TYPE_CHECKING:
    import pydicom


if TYPE_CHECKING:
    ImageSource: TypeAlias = (
        str
        | os.PathLike[str]
        | bytes
        | bytearray
        | memoryview
        | IO[bytes]
        | Image.Image
        | np.ndarray
        | pydicom.Dataset
        | Radiograph
    )


def load_radiograph(source: "ImageSource", max_pixels: int = MAX_PIXELS) -> Radiograph:
    """Read a radiograph from a path, bytes, a file object, a PIL image, an array or a pydicom dataset.

    Args:
        source: a path (``str`` or ``os.PathLike``), the file's bytes, a binary file object (read from its position),
            a ``PIL.Image.Image``, a ``pydicom.Dataset`` with its pixels, or an array [rows, columns] or
            [rows, columns, 1, 3 or 4]: bool, integers of any size, or float in 0..1; a fourth channel is opacity.
        max_pixels: limit on the number of pixels, checked before decoding.

    Raises:
        RadiographError: the input is missing, empty, damaged, too large, or not a single-frame radiograph.
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
        check_size(source.size, "the image", max_pixels)
        return _from_raster(raster := image_values(source, "the image"), _digest(raster.pixels), "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        with file_memory(memoryview(source).nbytes):
            return _decode(bytes(source), "the input", max_pixels)
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(os.fsdecode(source)), max_pixels)
    pydicom = sys.modules.get("pydicom")
    if pydicom is not None and isinstance(source, pydicom.Dataset):
        from cbedge.images.dicom import decode_dataset, pixel_bytes

        pixels = pixel_bytes(source, "the dataset")
        return decode_dataset(source, pixels, hashlib.sha256(pixels).hexdigest(), "the dataset", max_pixels)
    if callable(getattr(source, "read", None)):
        data = _read_stream(source)
        with file_memory(len(data)):
            return _decode(data, "the input", max_pixels)
    raise RadiographError(
        f"cannot read a radiograph from a {type(source).__name__}; give a path, bytes, a file object, a PIL image, a "
        "pydicom dataset or a NumPy array"
    )


def printable(name: str) -> str:
    """A file name for messages: one line, with undecodable bytes and control characters escaped, shortened."""
    escaped = name.encode("utf-8", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-30:]}"


def _read_file(path: Path, max_pixels: int) -> Radiograph:
    name = printable(path.name or str(path))
    with _file_errors(name):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RadiographError(f"{name} is a folder; give one image file")
        if not stat.S_ISREG(status.st_mode):
            raise RadiographError(f"{name} is not a regular file; give one image file")
        if status.st_size > MAX_BYTES:
            raise RadiographError(f"{name} has {status.st_size:,} bytes; the limit is {MAX_BYTES:,}: scale it down")
    with file_memory(status.st_size):
        with _file_errors(name):
            data = path.read_bytes()
        return _decode(data, name, max_pixels)


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    """Convert errors of reading a file to one-line messages."""
    try:
        yield
    except FileNotFoundError:
        raise RadiographError(f"no such file: {name}; check the path") from None
    except PermissionError:
        raise RadiographError(f"no permission to read {name}; change its permissions or copy it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RadiographError(f"cannot read {name} ({reason}): check the path") from None


def _read_stream(source: Any) -> bytes:
    data = bytearray()
    while len(data) <= MAX_BYTES:
        try:
            part = source.read(MAX_BYTES + 1 - len(data))  # an unbuffered file may return less than there is
        except Exception as error:  # whatever the object raises
            raise RadiographError(f"the file object cannot be read ({type(error).__name__}): open it again") from None
        if not isinstance(part, bytes | bytearray):
            raise RadiographError("the file object returns text, not bytes: open it in binary mode")
        if not part:
            return bytes(data)
        data += part
    raise RadiographError(f"the input has more than {MAX_BYTES:,} bytes: scale the radiograph down")


def _decode(data: bytes, name: str, max_pixels: int) -> Radiograph:
    if not data:
        raise RadiographError(f"{name} is empty (0 bytes); export it again")
    digest = hashlib.sha256(data).hexdigest()
    if is_dicom(data[:132]):
        from cbedge.images.dicom import read_dicom

        return read_dicom(data, digest, name, max_pixels)
    return _from_raster(decode_raster(data, name, max_pixels), digest, name)


def _from_raster(raster: Raster, digest: str, name: str) -> Radiograph:
    pixels, chroma, stored, told = raster
    return Radiograph(checked(pixels, name), None, digest, chroma=chroma, stored=stored, warnings=told)


def _from_array(array: np.ndarray, max_pixels: int) -> Radiograph:
    name = "the array"
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise RadiographError(f"{name} has masked pixels: give them a value, such as array.filled(0)")
    array = np.asarray(array)  # without the rules of subclasses such as np.matrix
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise RadiographError(f"{name} has shape {array.shape}; give [rows, columns] or [rows, columns, 3]")
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise RadiographError(f"{name} has dtype {array.dtype}; give bool, integers or float in 0..1")
    check_size((array.shape[1], array.shape[0]), name, max_pixels)
    rows, columns = array.shape[:2]
    coloured = array.ndim == 3 and array.shape[2] >= 3
    alpha = 3 * array.dtype.itemsize if coloured and array.shape[2] == 4 else 0
    size = array.dtype.itemsize if array.dtype.kind in "iu" else 0
    needed = (8 * array.size if size > 4 else 0) + 2 * kept_bytes(rows, columns, 7)
    needed += ((8 if size > 2 else 4) + alpha) * rows * columns if coloured else 0
    with working_memory(needed, name, (columns, rows)):
        values = array.astype(array.dtype.newbyteorder("="), copy=False)
        values = _without_offset(_on_black(values) if alpha else values)
        for part in blocks(values):
            block = values[part]
            if values.dtype.kind == "f" and not (np.isfinite(block).all() and block.min() >= 0 and block.max() <= 1):
                raise RadiographError(f"{name} has float values outside 0..1: scale them, or give integers")
        grey, chroma = _in_grey(values) if coloured else (values.reshape(rows, columns), 0.0)
        grey = grey.view(np.uint8) if grey.dtype.kind == "b" else grey
        is_stored = values.dtype == np.uint8
        factor = reduction(rows, columns, 4 + (values.size // (rows * columns) if is_stored else 0))
        pixels = stretch(grey, factor=factor)
        eight_bits = values[..., :3] if coloured else values.reshape(rows, columns)
        stored = stored_values(averaged(eight_bits, factor), pixels) if is_stored else None
        return Radiograph(checked(pixels, name), None, _digest(array), chroma=chroma, stored=stored)


def _on_black(values: np.ndarray) -> np.ndarray:
    """The colours of an array [rows, columns, 4] on black where it is transparent: [rows, columns, 3]."""
    most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    shown = np.empty((*values.shape[:2], 3), values.dtype)
    for part in blocks(values):
        block = values[part]
        opaque = (block[..., 3:] == most).all()
        mixed = block[..., :3] if opaque else block[..., :3] * (block[..., 3:].astype(np.float64) / most)
        shown[part] = mixed if values.dtype.kind == "f" or opaque else np.rint(mixed)
    return shown


def _without_offset(values: np.ndarray) -> np.ndarray:
    """Integers of 64 bits less their minimum, uint64, if they are exact as float64 only then."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return values
    least, most = int(values.min()), int(values.max())
    if most - least >= 2**53 or max(-least, most) < 2**53:
        return values
    moved = values.astype(np.uint64)
    moved -= np.uint64(least % 2**64)
    return moved


def _in_grey(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Grey values of an array [rows, columns, 3], float if it is in colour, and its colourfulness, 0 to 1."""
    exact = np.float64 if values.dtype.kind in "iu" and values.dtype.itemsize > 2 else np.float32
    grey, colour = np.empty(values.shape[:2], exact), 0.0
    for part in blocks(values):
        channels = values[part][..., :3].astype(exact)
        colour += float(np.ptp(channels, axis=2).sum(dtype=np.float64))
        grey[part] = channels @ np.array([0.299, 0.587, 0.114], exact)
    most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    return (grey, colour / grey.size / most) if colour else (values[..., 0], 0.0)


def _digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes, without copying them."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()

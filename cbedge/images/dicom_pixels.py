"""Decode DICOM pixel data to stored values: checks of the header, bit depth, sign, padding.

Missing or invalid header attributes are replaced by defaults, with a warning that names the attribute. An image is
refused only if its pixels cannot be decoded. :mod:`cbedge.images.dicom_display` maps stored values to displayed ones.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cbedge.errors import RadiographError
from cbedge.images.codestream import Codestream, CodestreamError, check_run_lengths, read_jpeg, read_jpeg2000
from cbedge.images.intensity import blocks
from cbedge.images.memory import kept_bytes

if TYPE_CHECKING:
    from pydicom import Dataset

_MOST_STRAY = 0.05  # fraction of pixels above BitsStored that may be an overlay; with more, BitsStored is wrong
_SAMPLE, _LEAST_LEVELS, _LEAST_SHARE = 2**18, 16, 0.02  # pixels looked at; levels and share of pixels of each sign
_FRAME_START = re.compile(  # of JPEG, JPEG 2000, JP2, run lengths
    rb"\xff\xd8\xff|\xff\x4f\xff\x51|\0\0\0\x0cjP|[\1-\x0f]\0\0\0\x40\0\0\0"
)
_ITEM = b"\xfe\xff\x00\xe0"  # tag before a fragment
_DECODER_BYTES = 4  # per sample, used by pylibjpeg's decoders in addition to their output


class Warnings(list[str]):
    """Warnings about one header, without duplicates."""

    def add(self, attribute: str, problem: str) -> None:
        """Add a warning that an attribute could not be used, and what was done instead."""
        sentence = f"The DICOM attribute {attribute} {problem}."
        if sentence not in self:
            self.append(sentence)


def integer(dataset: Dataset, name: str, default: int) -> int:
    """An attribute as an integer; the default if it is missing or invalid."""
    try:
        value = dataset.get(name)
        return default if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def number(dataset: Dataset, name: str, position: int = 0) -> float | None:
    """The number at a position of an attribute; ``None`` if it is missing or not a finite number."""
    try:
        value: Any = dataset.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__"):
            value = value[position]
        elif position:
            return None
        found = float(value)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def byte_order(dataset: Dataset) -> Literal["little", "big"]:
    """The byte order of values that pydicom leaves as bytes."""
    return "big" if dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2" else "little"


def repair_pixel_attributes(dataset: Dataset, warnings: Warnings) -> None:
    """Correct the attributes that decoding needs, in place."""
    allocated = integer(dataset, "BitsAllocated", 0)
    if allocated not in (1, 8, 16, 32):
        guess = 16 if integer(dataset, "BitsStored", 16) > 8 else 8
        warnings.add("BitsAllocated", f"is missing or invalid; {guess} was assumed")
        allocated = dataset.BitsAllocated = guess
    stored = integer(dataset, "BitsStored", 0)
    if not 1 <= stored <= allocated:
        warnings.add("BitsStored", "is missing or invalid; all bits were used")
        stored = dataset.BitsStored = allocated
    high = integer(dataset, "HighBit", -1)
    if not stored - 1 <= high < allocated:
        if "HighBit" in dataset and not warnings:
            warnings.add("HighBit", "does not match BitsStored; the lowest bits were used")
        dataset.HighBit = stored - 1
    if integer(dataset, "PixelRepresentation", -1) not in (0, 1):
        warnings.add("PixelRepresentation", "is missing or invalid; unsigned values were assumed")
        dataset.PixelRepresentation = 0
    if integer(dataset, "SamplesPerPixel", 0) not in (1, 3):
        dataset.SamplesPerPixel = 1
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset.PlanarConfiguration = 0  # codestreams have their own order
    elif dataset.SamplesPerPixel == 3 and integer(dataset, "PlanarConfiguration", -1) not in (0, 1):
        warnings.add("PlanarConfiguration", "is missing or invalid; 0 was assumed")
        dataset.PlanarConfiguration = 0
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip(" \0").upper()
    monochrome = re.fullmatch(r"MONO[A-Z]*[^A-Z0-9]*([12])", photometric)  # such as "MONOCHROME 1"
    photometric = f"MONOCHROME{monochrome[1]}" if monochrome else photometric
    known = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
    if photometric not in known:
        photometric = "MONOCHROME2" if dataset.SamplesPerPixel == 1 else "RGB"
        warnings.add("PhotometricInterpretation", f"is missing or unknown; {photometric} was assumed")
    dataset.PhotometricInterpretation = photometric


def repair_pixel_data(dataset: Dataset, name: str, warnings: Warnings) -> None:
    """Join the fragments of uncompressed Pixel Data, and remove an offset table that is wrong for one frame, in place.

    Raises:
        RadiographError: the pixels are compressed although the transfer syntax is not, or have several frames.
    """
    from pydicom.encaps import generate_fragments

    element, syntax = dataset["PixelData"], dataset.file_meta.TransferSyntaxUID
    data = element.value
    if not syntax.is_encapsulated and not element.is_undefined_length and not data.startswith(_ITEM):
        return
    fragments = generate_fragments(data, endianness="<" if byte_order(dataset) == "little" else ">")
    try:
        table = next(fragments, b"")
        if not syntax.is_encapsulated:
            element.value, element.is_undefined_length = b"".join(fragments), False
            if _FRAME_START.match(element.value):
                raise RadiographError(
                    f"{name} has compressed pixels, but an uncompressed TransferSyntaxUID: export it again"
                )
            warnings.add("PixelData", "has fragments, which uncompressed pixels do not have; they were joined")
            return
        starts = [_FRAME_START.match(fragment) is not None for fragment in fragments]
    except ValueError:
        return  # decoding will fail
    offsets = len(table) // 4
    frames = sum(starts) if offsets <= len(starts) else offsets  # a fragment may be the part of a frame
    if frames > 1:
        raise RadiographError(f"{name} has {frames:,} frames; give a single radiograph")
    if table.strip(b"\0") or len(table) > 4:
        element.value = data[:4] + bytes(4) + data[8 + len(table) :]
        warnings.add("PixelData", "has an offset table that is wrong for one frame and was ignored")


def decode_pixels(dataset: Dataset, name: str) -> tuple[np.ndarray, float]:
    """Decode the pixels of a dataset after :func:`repair_pixel_attributes` to greyscale. Its Photometric Interpretation
    is adjusted, and compressed Pixel Data are removed.

    Returns:
        integers [rows, columns], possibly sharing memory with the dataset; and their colourfulness, 0 to 1.

    Raises:
        RadiographError: the pixels are damaged, have several frames, or contradict the size in the header.
    """
    from pydicom.pixels.decoders.base import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    options: dict[str, Any] = {"raw": True, "correct_unused_bits": False, "allow_excess_frames": False}
    options |= {"view_only": True} if decoder.is_native else {"index": 0}
    try:
        decoded, properties = decoder.as_array(dataset, **options)
    except Exception:
        raise RadiographError(
            f"{name} is damaged or truncated: its pixels cannot be decoded; export it again"
        ) from None
    if syntax.is_encapsulated:
        del dataset.PixelData
    decoded = decoded.astype(decoded.dtype.newbyteorder("="), copy=False)
    if decoded.ndim == 2:
        return decoded, 0.0
    if dataset.PhotometricInterpretation != "MONOCHROME1":  # three equal planes
        dataset.PhotometricInterpretation = "MONOCHROME2"
    return _in_grey(decoded, str(properties["photometric_interpretation"]).startswith("YBR_FULL"))


def _in_grey(decoded: np.ndarray, is_ybr: bool) -> tuple[np.ndarray, float]:
    """Grey values of colour pixels, integers [rows, columns, 3], and their colourfulness, 0 to 1."""
    from pydicom.pixels.processing import convert_color_space

    grey = np.empty(decoded.shape[:2], decoded.dtype)
    most, colour = 1.0, 0.0
    for rows in blocks(decoded):
        block = decoded[rows]
        if is_ybr:
            block = convert_color_space(np.ascontiguousarray(block), "YBR_FULL", "RGB")
        channels = block.astype(np.float32)
        most = max(most, float(channels.max()))
        colour += float(np.ptp(channels, axis=2).sum(dtype=np.float64))
        grey[rows] = np.rint(channels @ np.array([0.299, 0.587, 0.114], np.float32))
    return grey, colour / grey.size / most


def stored_values(dataset: Dataset, decoded: np.ndarray, warnings: Warnings) -> np.ndarray:
    """Decoded pixels, integers [rows, columns], with the correct sign, without unused bits (overlays). The dataset's
    Pixel Representation is corrected for sign-extended pixels, after :func:`repair_pixel_attributes`."""
    bits = int(dataset.BitsStored)
    if _is_sign_extended(decoded, bits):
        _use_sign(dataset, "the pixels", warnings)
        decoded = decoded.view(f"i{decoded.dtype.itemsize}")
    elif dataset.PixelRepresentation == 1 and dataset.HighBit == bits - 1 and _is_wrapped(decoded, bits):
        _use_sign(dataset, "the pixels", warnings, 0)
        decoded = decoded.view(f"u{decoded.dtype.itemsize}")
    if decoded.dtype.kind not in "iu" or bits >= 8 * decoded.dtype.itemsize:
        return decoded
    signed = dataset.PixelRepresentation == 1
    raw = decoded.view(f"u{decoded.dtype.itemsize}")
    shift = int(dataset.HighBit) + 1 - bits
    shift = 0 if dataset.file_meta.TransferSyntaxUID.is_compressed else shift
    mask, sign = raw.dtype.type((1 << bits) - 1), raw.dtype.type(1 << (bits - 1))
    values, stray = np.empty(raw.shape, f"{'i' if signed else 'u'}{raw.dtype.itemsize}"), 0
    for rows in blocks(raw):
        block = raw[rows] >> raw.dtype.type(shift)
        masked = block & mask
        values[rows] = ((masked ^ sign) - sign if signed else masked).view(values.dtype)
        if not shift:  # the bits above are a sign extension, zero, or something else
            stray += int(np.count_nonzero((block != masked) & (block != values[rows].view(raw.dtype))))
    if stray > _MOST_STRAY * raw.size and not _has_embedded_overlay(dataset):
        warnings.add("BitsStored", "is too small for the stored values; all bits were used")
        return decoded
    return values


def _use_sign(dataset: Dataset, pixels: str, warnings: Warnings, sign: int = 1) -> None:
    kind = "signed" if sign else "unsigned"
    warnings.add("PixelRepresentation", f"contradicts {pixels}, which are {kind}; {kind} values were used")
    dataset.PixelRepresentation = sign


def _is_sign_extended(decoded: np.ndarray, bits: int) -> bool:
    """Whether unsigned pixels are clearly signed values of fewer bits: read as signed, they leave the highest bits of
    the type unused and continue across zero; read as unsigned, they would leave the middle of the range unused."""
    wide = decoded.dtype.itemsize
    if decoded.dtype.kind != "u" or wide == 1:
        return False
    step = max(1, math.isqrt(decoded.size // _SAMPLE))
    levels, counts = np.unique(decoded[::step, ::step].view(f"i{wide}"), return_counts=True)
    limit, negative = 1 << min(bits - 1, 8 * wide - 2), levels < 0
    below, above = levels[negative], levels[~negative]
    if min(below.size, above.size) < _LEAST_LEVELS or below[0] < -limit or above[-1] >= limit:
        return False
    share = counts[negative].sum() / counts.sum()
    gap, extent = int(above[0]) - int(below[-1]), int(above[-1]) - int(below[0])
    return bool(_LEAST_SHARE < share < 1 - _LEAST_SHARE and 32 * gap <= extent)


def _is_wrapped(decoded: np.ndarray, bits: int) -> bool:
    """Whether signed pixels are clearly unsigned values: both ends of the signed range are in use, and neighbouring
    pixels differ much less if they are read as unsigned."""
    sample = decoded[:: max(1, decoded.size // _SAMPLE)].astype(np.int64) % (1 << bits)
    signed = sample - ((sample >> (bits - 1)) << bits)
    ends = signed[abs(signed) >= 1 << max(0, bits - 2)]
    shares = [np.count_nonzero(end) / sample.size for end in (ends > 0, ends < 0)]
    steps, wrapped = (int(abs(np.diff(values, axis=1)).sum()) for values in (signed, sample))
    return bool(min(shares) > _LEAST_SHARE and np.unique(ends).size > _LEAST_LEVELS and wrapped < 0.8 * steps)


def check_pixels(dataset: Dataset, name: str, warnings: Warnings) -> int:
    """Check before decoding, after :func:`repair_pixel_attributes`, that the pixel data match the header. The dataset's
    Pixel Representation is corrected for signed compressed pixels, with a warning.

    Returns:
        Bytes of memory that decoding and mapping need, Pixel Data included.

    Raises:
        RadiographError: the pixels have another size or several frames, or cannot be found.
    """
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    count, wide, length = rows * columns * samples, -(-int(dataset.BitsAllocated) // 8), len(dataset.PixelData)
    pixels, kept = rows * columns, kept_bytes(rows, columns)
    mask = 4 * pixels if "ShutterShape" in dataset else pixels if "PixelPaddingValue" in dataset else 0
    is_copied = samples > 1 or int(dataset.BitsStored) < 8 * wide  # for example by stored_values
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        frames = 8 * length // (count * int(dataset.BitsAllocated))
        if frames > 1:
            raise RadiographError(f"{name} has pixels for {frames:,} frames; give a single radiograph")
        unpacked = count * wide if dataset.PhotometricInterpretation == "YBR_FULL_422" else 0
        copied = pixels * wide if is_copied else 0
        return max(length + unpacked + copied, (copied or length) + kept) + mask
    frame = _only_frame(dataset.PixelData)
    try:
        found = _codestream(dataset, frame)
    except CodestreamError:
        raise RadiographError(
            f"{name} is damaged or truncated: its pixels cannot be decoded; export it again"
        ) from None
    if (found.rows, found.columns) != (rows, columns):
        raise RadiographError(
            f"{name} has {found.columns:,} x {found.rows:,} compressed pixels, but Columns and Rows are "
            f"{columns:,} x {rows:,}: export it again"
        )
    if found.components != samples:
        raise RadiographError(
            f"{name} has compressed pixels with {found.components} components, but SamplesPerPixel is {samples}: "
            "export it again"
        )
    if found.is_signed and dataset.PixelRepresentation == 0:
        _use_sign(dataset, "the compressed pixels", warnings)
    allocated = next(bits for bits in (8, 16, 32, found.bits) if bits >= found.bits)
    if allocated != dataset.BitsAllocated:
        warnings.add("BitsAllocated", f"contradicts the compressed pixels, which have {found.bits} bits")
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, found.bits, found.bits - 1
    wide = max(wide, -(-found.bits // 8))
    decoding = length + len(frame) + count * (_DECODER_BYTES + 2 * wide) + found.overhead
    return max(decoding, (count + pixels) * wide + mask + kept)


def _only_frame(data: bytes) -> bytes:
    from pydicom.encaps import generate_frames

    try:
        return next(generate_frames(data, number_of_frames=1), b"")
    except Exception:
        return b""


def _codestream(dataset: Dataset, frame: bytes) -> Codestream:
    from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == RLELossless:
        rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
        check_run_lengths(frame, rows * columns, samples * int(dataset.BitsAllocated) // 8)
        return Codestream(rows, columns, samples, int(dataset.BitsAllocated))
    return read_jpeg2000(frame) if syntax in JPEG2000TransferSyntaxes else read_jpeg(frame)


def _has_embedded_overlay(dataset: Dataset) -> bool:
    return any(
        element.tag.group & 0xFF00 == 0x6000 and element.tag.element == 0x0102 and element.value for element in dataset
    )

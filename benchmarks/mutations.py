"""The inputs of :mod:`benchmarks.robustness`: well-formed films in other containers, and damaged files and requests.

Input ``i`` of a seed is the same on every machine with the same versions of NumPy, Pillow and pydicom. All of them are
made of the repository's example radiograph; no other data is needed.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "chest_pa.dcm"
MARKER = "Zzyzxmarker"  # stands in every header as the patient's name, and may stand in no log
FILMS = 4
_SIDE = 512

pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


@dataclass
class Input:
    """One input of the campaign.

    Attributes:
        index: of the seed.
        kind: what it is; see :data:`KINDS`.
        route: ``api``, ``generate``, ``batch``, ``serve`` or ``listen``.
        data: the file's or the request's bytes.
        name: of the file, as the user gives it.
        array: given instead of a file, to the Python API.
        film: number of the film that it shows unchanged, for equivalents; ``None`` for others.
        may_refuse: an equivalent may be refused in one line.
        options: indication, comparison, view, template, format and so on.
        note: what was done, for the record of failures.
    """

    index: int
    kind: str
    route: str
    data: bytes = b""
    name: str = "film.png"
    array: np.ndarray | None = None
    film: int | None = None
    may_refuse: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@cache
def film(number: int) -> np.ndarray:
    """The example radiograph, float64 [rows, columns] of 0 to 1, cut and exposed a little differently by number."""
    ds = pydicom.dcmread(EXAMPLE)
    grey = ds.pixel_array.astype(np.float64)
    low, high = np.percentile(grey, (0.2, 99.8))
    grey = np.clip((grey - low) / (high - low), 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    rows, columns = grey.shape
    cut = 0.01 * number
    grey = grey[int(cut * rows) : rows - int(cut * rows), int(cut * columns) : columns - int(cut * columns)]
    width = round(_SIDE * grey.shape[1] / grey.shape[0])
    small = Image.fromarray(grey.astype(np.float32)).resize((width, _SIDE), Image.Resampling.BOX)
    values = np.clip(np.asarray(small, np.float64), 0, 1) ** (1 + 0.1 * number)
    # 255 steps: what 8 bits cannot hold would differ between containers.
    return np.round((values - values.min()) / (values.max() - values.min()) * 255) / 255


def plan(seed: int, index: int, only: str | None = None) -> tuple[str, str]:
    """The kind and the route of an input."""
    rng = np.random.default_rng([seed, index, 0])
    names = list(KINDS)
    weights = np.array([KINDS[name].weight for name in names], float)
    kind = only or str(rng.choice(names, p=weights / weights.sum()))
    routes = KINDS[kind].routes
    return kind, str(np.random.default_rng([seed, index, 2]).choice(list(routes), p=[*routes.values()]))


def make_input(seed: int, index: int, only: str | None = None) -> Input:
    """Input ``index`` of a seed, of one kind alone where ``only`` names it."""
    kind, route = plan(seed, index, only)
    made = Input(index, kind, route)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind].make(np.random.default_rng([seed, index, 1]), made)
    return made


# Equivalents: the same film, in another way.


def _equivalent(rng: np.random.Generator, made: Input) -> None:
    made.film = int(rng.integers(FILMS))
    makers: list[Callable[[np.random.Generator, Input, np.ndarray], None]] = [_raster, _raster, _dicom, _dicom, _dicom]
    if made.route == "api":
        makers.append(_array)
    if made.route == "listen":
        makers = [_dicom]
    makers[rng.integers(len(makers))](rng, made, film(made.film))


def _array(rng: np.random.Generator, made: Input, grey: np.ndarray) -> None:
    kind = str(rng.choice(["u1", "u2", "f4", "f8", "f2", "rgb", "rgba", "big", "fortran", "strided"]))
    made.note = f"array {kind}"
    eight, sixteen = np.round(grey * 255).astype(np.uint8), np.round(grey * 65535).astype(np.uint16)
    made.may_refuse = kind == "big"
    arrays: dict[str, np.ndarray] = {
        "u1": eight,
        "u2": sixteen,
        "f4": grey.astype(np.float32),
        "f8": grey,
        "f2": grey.astype(np.float16),
        "rgb": np.repeat(eight[..., None], 3, 2),
        "rgba": np.dstack([eight] * 3 + [np.full_like(eight, 255)]),
        "big": sixteen.astype(">u2"),
        "fortran": np.asfortranarray(eight),
        "strided": np.repeat(eight, 2, 1)[:, ::2],
    }
    made.array = arrays[kind]


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


def _raster(rng: np.random.Generator, made: Input, grey: np.ndarray, form: str = "") -> None:
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
    made.data = _saved(picture, form, **options)
    made.may_refuse = form == "WEBP"
    suffixes = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}
    made.name = "film" + (suffixes[form] if rng.random() < 0.9 else ".png")
    made.note = f"{form} {mode} orientation {turn}"


def _saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def _base_dataset(made: Input, rng: np.random.Generator) -> pydicom.FileDataset:
    ds = pydicom.dcmread(EXAMPLE, stop_before_pixels=True)
    for name in (
        "WindowCenter",
        "WindowWidth",
        "VOILUTSequence",
        "VOILUTFunction",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
        "PixelPaddingValue",
        "PresentationLUTShape",
        "SmallestImagePixelValue",
        "LargestImagePixelValue",
        "ModalityLUTSequence",
        "PatientOrientation",
    ):
        if name in ds:
            delattr(ds, name)
    token = str(rng.integers(2**62))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[token, "image"])
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[token, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[token, "series"])
    ds.PatientName, ds.PatientID, ds.AccessionNumber = f"{MARKER}^Test", f"{MARKER}1", "A1"
    ds.ViewPosition = "PA"
    made.name = "film.dcm"
    return ds


def _put_pixels(ds: pydicom.Dataset, stored: np.ndarray, bits: int, photometric: str) -> None:
    ds.PhotometricInterpretation, ds.SamplesPerPixel = photometric, 1
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    ds["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    ds["PixelData"].is_undefined_length = False


def _dicom(rng: np.random.Generator, made: Input, grey: np.ndarray) -> None:
    ds = _base_dataset(made, rng)
    bits = int(rng.choice([8, 10, 12, 14, 16]))
    top = 2**bits - 1
    notes = [f"{bits} bits"]
    photometric = "MONOCHROME2"
    inversions = rng.random(2) < 0.3
    if inversions[0]:
        photometric = "MONOCHROME1"
    elif inversions[1]:
        ds.PresentationLUTShape = "INVERSE"
    inverted = bool(inversions.any())
    if inverted:
        grey = 1 - grey
        notes.append("MONOCHROME1" if inversions[0] else "LUT shape INVERSE")
    elif rng.random() < 0.15:
        photometric = "monochrome2"
        notes.append("lower case")
    extra = str(
        rng.choice(
            ["", "", "padding", "mirrored", "window", "windows", "signed", "slope", "width 0", "no function", "hot"]
        )
    )
    notes.append(extra)
    if extra == "mirrored":
        grey, ds.PatientOrientation = grey[:, ::-1], ["R", "F"]
    elif rng.random() < 0.5:
        ds.PatientOrientation = ["L", "F"]
    stored = np.round(grey * top).astype(np.uint8 if bits == 8 else np.uint16)
    if extra == "padding" and bits in (10, 12, 14):
        pad, ds.BitsStored = 6, 16
        stored = np.pad(stored, pad, constant_values=65535)
    elif extra == "signed" and bits > 8:
        stored = (stored.astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
        ds.RescaleIntercept, ds.RescaleSlope = str(2 ** (bits - 1)), "1"
    elif extra == "slope":
        ds.RescaleIntercept, ds.RescaleSlope = "-1024", "0.25"
    elif extra == "hot" and bits in (10, 12, 14):
        stored = stored.copy()
        stored[5, 5] = 65535
    if extra in ("window", "windows"):
        values = ["C", "W"] if extra == "window" else ["C", "W", "W"]
        _set_window(ds, top, len(values) - 1)
    elif extra == "width 0":
        ds.WindowCenter, ds.WindowWidth = str(top // 2), "0"
    elif extra == "no function":
        _set_window(ds, top, 1)
        ds.VOILUTFunction = "NOT A FUNCTION"
    wide = extra in ("padding", "hot") and bits in (10, 12, 14)
    _put_pixels(ds, np.ascontiguousarray(stored), 16 if wide else bits, photometric)
    if extra == "padding" and wide:
        ds.add_new(0x00280120, "US", 65535)
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian]
    if stored.dtype.kind == "u" and photometric != "monochrome2":
        syntaxes += [RLELossless, JPEG2000Lossless, JPEG2000Lossless]
    if made.route == "listen":
        syntaxes = syntaxes[:1]
    syntax = syntaxes[rng.integers(len(syntaxes))]
    notes.append(syntax.name)
    made.data = _written(ds, syntax, np.ascontiguousarray(stored))
    made.note = "DICOM " + ", ".join(filter(None, notes))
    if rng.random() < 0.15:
        made.name = "film"


def _set_window(ds: pydicom.Dataset, top: int, count: int) -> None:
    ds.WindowCenter = [str((top + 1) / 2)] * count if count > 1 else str((top + 1) / 2)
    ds.WindowWidth = [str(top + 1)] * count if count > 1 else str(top + 1)


def _written(ds: pydicom.Dataset, syntax: UID, stored: np.ndarray) -> bytes:
    if syntax == JPEG2000Lossless:
        ds.file_meta.TransferSyntaxUID = syntax
        code = _saved(Image.fromarray(stored), "JPEG2000", irreversible=False, no_jp2=True)
        ds.PixelData = encapsulate([code])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        if stored.dtype.itemsize == 2:
            ds.PixelData = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
        buffer = io.BytesIO()
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(buffer, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
        return buffer.getvalue()
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# Damage.


def _flip(rng: np.random.Generator, data: bytes, first: int = 0) -> bytes:
    changed = bytearray(data)
    end = len(changed) if rng.random() < 0.5 else min(len(changed), first + 2000)
    for place in rng.integers(min(first, end - 1), end, int(rng.integers(1, 30))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data)) if rng.random() < 0.5 else rng.integers(0, 300))]


def _splice(rng: np.random.Generator, data: bytes) -> bytes:
    a, b = sorted(map(int, rng.integers(0, len(data), 2)))
    part = data[a : min(b, a + 5000)]
    return [
        data[:a] + data[b:],
        data[:b] + part + data[b:],
        data[:a] + rng.bytes(len(part)) + data[a + len(part) :],
        data[:a] + bytes(len(part)) + data[a + len(part) :],
        data + rng.bytes(500),
    ][rng.integers(5)]


def _damage(rng: np.random.Generator, data: bytes) -> bytes:
    return [_flip, _cut, _splice][rng.integers(3)](rng, data)


_NUMBERS = (0, 1, 2, 7, 31, 255, 256, 32767, 32768, 65535, 65536, 99_999, 2**31 - 1, 2**31, 2**32 - 1)


def _number(rng: np.random.Generator, limit: int = 2**32) -> int:
    fitting = [value for value in _NUMBERS if value < limit]
    return fitting[rng.integers(len(fitting))]


def _png(rng: np.random.Generator, made: Input) -> None:
    _raster(rng, made, film(0), "PNG")
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
            chunks[at] = (name, _damage(rng, body) if body else rng.bytes(9))
        elif action == 3:
            size = [struct.pack(">I", _number(rng)) for _ in range(2)]
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


def _jpeg(rng: np.random.Generator, made: Input) -> None:
    _raster(rng, made, film(0), "JPEG")
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
        data[at + 2 : at + 4] = struct.pack(">H", _number(rng, 65536))
    elif action == 3:
        for frame in (m for m in marks if data[m + 1] in (0xC0, 0xC1, 0xC2)):
            data[frame + 5 : frame + 9] = struct.pack(">HH", _number(rng, 65536), _number(rng, 65536))
    else:
        data[at + 4 : at + 2 + length] = rng.bytes(length - 2)
    made.data, made.note = bytes(data), f"JPEG segment {action}"


def _tiff(rng: np.random.Generator, made: Input) -> None:
    _raster(rng, made, film(0), "TIFF")
    data = bytearray(made.data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[start : start + 2])
    for _ in range(int(rng.integers(1, 3))):
        at = start + 2 + 12 * int(rng.integers(count))
        field_at, size = [(at, 2), (at + 2, 2), (at + 4, 4), (at + 8, 4)][rng.integers(4)]
        data[field_at : field_at + size] = struct.pack(
            order + ("H" if size == 2 else "I"), _number(rng, 2 ** (8 * size))
        )
    made.data, made.note = bytes(data), "TIFF directory"


def _raster_bytes(rng: np.random.Generator, made: Input) -> None:
    _raster(rng, made, film(0))
    made.data = _damage(rng, made.data)
    made.note += ", damaged"


def _dicom_bytes(rng: np.random.Generator, made: Input) -> None:
    _dicom(rng, made, film(0))
    first = 132 if rng.random() < 0.8 else 0
    made.data = _flip(rng, made.data, first) if rng.random() < 0.6 else _damage(rng, made.data)
    made.note += ", damaged"


_PIXEL_TAGS = (
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "SamplesPerPixel",
    "PixelRepresentation",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "WindowCenter",
    "WindowWidth",
    "RescaleSlope",
    "RescaleIntercept",
    "VOILUTFunction",
    "PresentationLUTShape",
    "PatientOrientation",
    "ViewPosition",
    "Modality",
    "PlanarConfiguration",
    "BodyPartExamined",
    "ImageType",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "VOILUTSequence",
    "ViewCodeSequence",
    "SmallestImagePixelValue",
    "PixelAspectRatio",
    "PixelData",
    "RescaleType",
    "BurnedInAnnotation",
)
_PATIENT_TAGS = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "PatientSex",
    "PatientBirthDate",
    "PatientAge",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "StudyDescription",
    "SeriesDescription",
    "ReasonForStudy",
    "RequestedProcedureDescription",
    "SeriesNumber",
    "InstanceNumber",
    "ContentDate",
    "AcquisitionDate",
    "Manufacturer",
    "InstitutionName",
    "RequestAttributesSequence",
    "OtherPatientIDsSequence",
    "IssuerOfPatientID",
    "TimezoneOffsetFromUTC",
    "PatientComments",
    "AdmittingDiagnosesDescription",
    "ReasonForTheRequestedProcedure",
    "Laterality",
)
_BY_VR: dict[str, tuple[Any, ...]] = {
    "DA": ("", "1940", "00000000", "20201341", "2020-01-01", "2020.01.01", "yesterday", "20200101-20200202"),
    "TM": ("", "12:30:11", "25", "246060", "12", "120000.1234567", "noon"),
    "CS": ("", "U", "f", "MALE", "A\\B", "a b", "X" * 40, "\x00", "é"),
    "DS": ("", "0", "-1", "1e400", "nan", "inf", "1,5", "abc", "1\\2\\3", " 7 ", "1" * 40),
    "IS": ("", "0", "-1", "99999999999", "1.5", "abc", "1\\2"),
    "UI": ("", "1.2.3.4", "1.2.840.10008.5.1.4.1.1.7", "abc", "1..2", "1." * 60, "0"),
    "PN": ("", "A\\B", "A^B^C^D^E^F^G", "=", "山田^太郎", "Müller^Ö", "X" * 300, "\x1b$B", "a\r\nb"),
    "LO": ("", "A\\B", "X" * 300, "Ünïcödé", "\x1b(J", "a\tb\x00c", " "),
    "SH": ("", "A\\B", "X" * 60, "\x07"), "ST": ("", "a\\b", "X" * 2000), "LT": ("", "X" * 20000, "\r\n"),
    "AS": ("", "045Y", "45", "-1Y", "999Y", "abcd"), "US": (0, 1, 2, 3, 255, 4096, 65535),
    "US or SS": (0, 1, 255, 65535), "SS": (-1, 0, 32767),
}  # fmt: skip
_SETS = ("", "ISO_IR 6", "ISO_IR 100", "ISO_IR 192", "FOO", "\\ISO 2022 IR 87", "ISO 2022 IR 6\\ISO 2022 IR 149",
         "GB18030", "GBK", "ISO_IR 13", "ISO 2022 IR 58", "iso_ir 100", "latin1")  # fmt: skip


def _set_header(rng: np.random.Generator, ds: pydicom.Dataset, names: tuple[str, ...]) -> str:
    name = names[rng.integers(len(names))]
    vr = dictionary_VR(name)
    action = rng.random()
    if action < 0.12 and name in ds:
        delattr(ds, name)
        return f"{name} taken away"
    if name == "SpecificCharacterSet":
        value: Any = str(rng.choice(_SETS)).split("\\")
    elif vr == "SQ":
        inner = pydicom.Dataset()
        inner.add_new(0x00080100, "SH", "X" * int(rng.integers(0, 40)))
        value = [[], [pydicom.Dataset()], [inner] * 3][rng.integers(3)]
    elif name == "PixelData":
        value = [b"", b"\0", rng.bytes(1000), bytes(4_000_000)][rng.integers(4)]
    else:
        choices = _BY_VR.get(vr, _BY_VR["LO"])
        value = choices[rng.integers(len(choices))]
    if action < 0.2 and vr not in ("SQ", "OB or OW"):  # the value's representation is wrong too
        return _put_raw(ds, name, "UN", rng.bytes(int(rng.integers(0, 20)) * 2), "bytes")
    vr = {"US or SS": "US", "OB or OW": "OW"}.get(vr, vr)
    if vr == "SQ" or name == "PixelData" or name == "SpecificCharacterSet":
        ds.add_new(name, vr, value)
        return f"{name} {str(value)[:30]!r}"
    raw = struct.pack("<h", value) if vr == "SS" else struct.pack("<H", value) if vr == "US" else value.encode()
    return _put_raw(ds, name, vr, raw, str(value)[:30])


def _put_raw(ds: pydicom.Dataset, name: str, vr: str, raw: bytes, told: str) -> str:
    """Set an element to bytes, for pydicom would not take some of these values."""
    raw += b" " * (len(raw) % 2)
    tag = Tag(tag_for_keyword(name) or 0)
    ds[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)
    return f"{name} in {vr} {told!r}"


def _header(rng: np.random.Generator, made: Input, names: tuple[str, ...]) -> None:
    ds = _base_dataset(made, rng)
    stored = np.round(film(0) * 4095).astype(np.uint16)
    _put_pixels(ds, stored, 12, "MONOCHROME2")
    made.note = "; ".join(_set_header(rng, ds, names) for _ in range(int(rng.integers(1, 4))))
    syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    try:
        made.data = _written(ds, syntaxes[rng.integers(2)], stored)
    except Exception as error:  # what pydicom itself does not write is written by damage to bytes instead
        ds = _base_dataset(made, rng)
        _put_pixels(ds, stored, 12, "MONOCHROME2")
        made.data = _flip(rng, _written(ds, ExplicitVRLittleEndian, stored), 300)
        made.note += f" (not written: {type(error).__name__}; bytes flipped)"
    made.options["format"] = str(rng.choice(["json", "sr", "fhir", "text"]))


def _dicom_pixels(rng: np.random.Generator, made: Input) -> None:
    _header(rng, made, _PIXEL_TAGS)


def _dicom_patient(rng: np.random.Generator, made: Input) -> None:
    _header(rng, made, _PATIENT_TAGS)


def _dicom_lies(rng: np.random.Generator, made: Input) -> None:
    """Sizes that are not so: codestreams, deflated data, lengths of elements, depth of sequences."""
    ds = _base_dataset(made, rng)
    action = int(rng.integers(5))
    made.note = f"size lie {action}"
    stored = np.round(film(0)[:64, :64] * 4095).astype(np.uint16)
    _put_pixels(ds, stored, 12, "MONOCHROME2")
    if action == 1:  # up to 300 MB of zeros, deflated
        made.data = _bomb(ds, int(rng.choice([50_000_000, 300_000_000])))
        return
    if action == 0:
        big = np.zeros((int(rng.integers(65, 4000)), int(rng.integers(65, 4000))), np.uint8)
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = encapsulate([_saved(Image.fromarray(big), "JPEG2000", no_jp2=True)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif action == 2:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.Rows, ds.Columns = _number(rng, 65536), _number(rng, 65536)
    elif action == 3:  # sequences of undefined length, none of them closed
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        depth = int(rng.integers(50, 3000))
        opened = b"\x08\x00\x40\x11\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
        head = _saved_dataset(ds)
        place = head.find(b"\x10\x00\x10\x00")
        made.data = head[:place] + opened * depth + head[place:]
        return
    else:
        ds.file_meta.TransferSyntaxUID = RLELossless
        ds.PixelData = encapsulate([rng.bytes(int(rng.integers(0, 500))) for _ in range(int(rng.integers(1, 4)))])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    made.data = _saved_dataset(ds)


def _saved_dataset(ds: pydicom.FileDataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _bomb(ds: pydicom.FileDataset, size: int) -> bytes:
    del ds.PixelData
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = _saved_dataset(ds)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    deflated = _saved_dataset(ds)
    head_end = 144 + int.from_bytes(deflated[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    element = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, size)
    parts = [packer.compress(plain[144 + int.from_bytes(plain[140:144], "little") :] + element)]
    parts += [packer.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)]
    return deflated[:head_end] + b"".join(parts) + packer.flush()


# Words.

_WORDS = (
    "",
    " ",
    "-",
    ".",
    "?",
    "n/a",
    "XXXX",
    "cough",
    "Husten, Fieber",
    "咳嗽",
    "кашель",
    "سعال",
    "😀" * 20,
    "a" * 5000,
    "\x00",
    "\x1b[31mred",
    "\u202eabc",
    "line\r\nline",
    "FINDINGS: none",
    "IMPRESSION:",
    "{{7*7}}",
    "%s%n",
    "../../x",
    "<script>",
    "' OR 1=1",
    "\ufeffcough",
    "e\u0301" * 400,
    "\ud7ff\ue000",
    "1e309",
    "None",
    "\t\t",
    "cough\u2028fever",
    "pneumothorax?" * 30,
    '"',
    "'",
    "`id`",
    "\\",
    "&amp;",
    MARKER,
)
_TEMPLATES = (
    "FINDINGS: The lungs are clear. The heart is normal in size. IMPRESSION: No acute disease.",
    "Lungs: Clear.\nHeart: Normal size.\nPleura: No effusion.\nIMPRESSION: 1. No acute disease. 2. Stable.",
    "Herz und Mediastinum regelrecht. Kein Erguss. Beurteilung: Unauffälliger Befund.",
    "FINDINGS:\n\nIMPRESSION:\n",
    "The lungs are clear." * 200,
    "IMPRESSION: Normal. FINDINGS: Normal.",
    "TECHNIQUE: PA and lateral.\nFINDINGS: No consolidation.\nIMPRESSION: Normal chest.",
)


def _word(rng: np.random.Generator) -> str:
    text = _WORDS[rng.integers(len(_WORDS))]
    return text if rng.random() < 0.7 else text + _WORDS[rng.integers(len(_WORDS))]


def _text(rng: np.random.Generator, made: Input) -> None:
    made.data, made.name = _plain_png(), "film.png"
    for name in ("indication", "comparison", "view"):
        if rng.random() < 0.5:
            made.options[name] = _word(rng)
    if rng.random() < 0.5:
        template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
        raw = template.encode() if rng.random() < 0.5 else _damage(rng, template.encode())
        made.options["template"] = raw
    made.note = "words"


@cache
def _plain_png() -> bytes:
    return _saved(Image.fromarray(np.round(film(0) * 255).astype(np.uint8)), "PNG")


def _table(rng: np.random.Generator, made: Input) -> None:
    columns = ["image", "id", "indication", "comparison", "view", "lateral"]
    header = columns if rng.random() < 0.6 else list(rng.permutation(columns))[: int(rng.integers(1, 7))]
    if rng.random() < 0.3:
        header[int(rng.integers(len(header)))] = str(
            rng.choice(["Indication", "image ", "IMAGE", "", "age", "indicaton"])
        )
    rows = [header]
    for number in range(int(rng.integers(0, 4))):
        row = ["film.png", str(number), _word(rng), _word(rng), str(rng.choice(["", "PA", "frontal", "x"])), ""]
        rows.append([row[columns.index(name)] if name in columns else _word(rng) for name in header])
    separator = "," if rng.random() < 0.8 else ";"
    quoted = rng.random() < 0.7
    lines = [separator.join('"' + c.replace('"', '""') + '"' if quoted else c for c in row) for row in rows]
    text = str(rng.choice(["\n", "\r\n"])).join(lines) + str(rng.choice(["", "\n", "\n\n", "\x00\x00"]))
    encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"], p=[0.6, 0.15, 0.1, 0.15]))
    made.data = text.encode(encoding, "replace")
    if rng.random() < 0.2:
        made.data = _damage(rng, made.data)
    made.name, made.note = "table.csv", "table"


def _http(rng: np.random.Generator, made: Input) -> None:
    """A request as raw bytes, sent on a socket."""
    boundary = "b0undary"
    parts = []
    fields = [
        ("indication", _word(rng)),
        ("view", _word(rng)),
        ("format", str(rng.choice(["json", "x", "text"]))),
        ("indicaton", "cough"),
        ("stream", str(rng.choice(["true", "1", "maybe"]))),
        ("template", _TEMPLATES[rng.integers(len(_TEMPLATES))]),
    ]
    for name, value in fields:
        if rng.random() < 0.3:
            parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode("utf-8", "replace"))
    for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
        image = _plain_png() if rng.random() < 0.5 else _damage(rng, _plain_png())
        parts.append(f'Content-Disposition: form-data; name="image"; filename="{MARKER}.png"\r\n\r\n'.encode() + image)
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    body += b"--" + boundary.encode() + b"--\r\n"
    if rng.random() < 0.2:
        body = _damage(rng, body)
    method = str(rng.choice(["POST", "POST", "POST", "GET", "PUT", "OPTIONS", "HEAD", "post", "X" * 300]))
    path = str(
        rng.choice(
            [
                "/v1/reports",
                "/v1/reports",
                "/v1/reports",
                "/",
                "/metrics",
                "/../etc/passwd",
                "/v1/%00",
                "/readyz",
                "*",
                "/" + "a" * 9000,
            ]
        )
    )
    length = {0: str(len(body)), 1: "0", 2: "-1", 3: "99999999999", 4: "abc", 5: str(max(0, len(body) - 7))}[
        int(rng.choice(6, p=[0.75, 0.05, 0.05, 0.05, 0.05, 0.05]))
    ]
    host = str(rng.choice(["127.0.0.1", "evil.example", "", "localhost", "[::1]"], p=[0.7, 0.1, 0.05, 0.1, 0.05]))
    kind = str(
        rng.choice(
            [
                f"multipart/form-data; boundary={boundary}",
                "multipart/form-data",
                "application/json",
                "text/plain; charset=\xff",
                "",
            ],
            p=[0.8, 0.05, 0.05, 0.05, 0.05],
        )
    )
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    head += "Connection: close\r\n\r\n"
    made.data = head.encode("latin-1", "replace") + (b"" if method in ("GET", "HEAD", "OPTIONS") else body)
    if rng.random() < 0.1:
        made.data = _damage(rng, made.data)
    made.name, made.note = "request", f"{method[:8]} {path[:20]} length {length}"


def _pdu(rng: np.random.Generator, made: Input) -> None:
    """Bytes for the DICOM node's port that are no association, or a broken one."""
    kind = int(rng.integers(4))
    lead = bytes([int(rng.integers(0, 9)), 0]) + struct.pack(">I", _number(rng))
    made.data = [rng.bytes(int(rng.integers(0, 300))), lead, lead + rng.bytes(80), b"GET / HTTP/1.1\r\n\r\n"][kind]
    made.name, made.note = "pdu", f"PDU {kind}"


@dataclass(frozen=True)
class Kind:
    """How often a kind of input occurs, the routes that it takes with their shares, and what makes it."""

    weight: float
    routes: dict[str, float]
    make: Callable[[np.random.Generator, Input], None]


_FILES = {"api": 0.45, "generate": 0.2, "batch": 0.1, "serve": 0.15, "listen": 0.1}
_FILM = {"api": 0.55, "generate": 0.2, "batch": 0.1, "serve": 0.15}
KINDS: dict[str, Kind] = {
    "equivalent": Kind(25, {"api": 0.6, "generate": 0.15, "batch": 0.1, "serve": 0.15}, _equivalent),
    "png": Kind(8, _FILM, _png),
    "jpeg": Kind(8, _FILM, _jpeg),
    "tiff": Kind(8, _FILM, _tiff),
    "raster-bytes": Kind(10, _FILM, _raster_bytes),
    "dicom-bytes": Kind(10, _FILES, _dicom_bytes),
    "dicom-pixels": Kind(10, _FILES, _dicom_pixels),
    "dicom-header": Kind(8, {"api": 0.2, "generate": 0.3, "serve": 0.2, "listen": 0.3}, _dicom_patient),
    "dicom-sizes": Kind(2, _FILES, _dicom_lies),
    "text": Kind(4, {"api": 0.3, "generate": 0.4, "serve": 0.3}, _text),
    "table": Kind(4, {"batch": 1.0}, _table),
    "http": Kind(4, {"serve": 1.0}, _http),
    "pdu": Kind(1, {"listen": 1.0}, _pdu),
}


def describe(made: Input) -> str:
    """What was done, in one line, without the marker."""
    options = {k: v for k, v in made.options.items() if isinstance(v, str)}
    return f"{made.route} {made.note} {json.dumps(options) if options else ''}".strip().replace(MARKER, "NAME")

"""DICOM files: the film in many encodings, wrong headers, wrong sizes, damaged bytes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pydicom
from PIL import Image
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

from benchmarks.mutations.base import EXAMPLE, MARKER, TABLES, Input, damage, film, flip, number, saved

pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


def _base_dataset(made: Input, rng: np.random.Generator) -> pydicom.FileDataset:
    ds = pydicom.dcmread(EXAMPLE, stop_before_pixels=True)
    for name in TABLES["dropped"]:
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


_EXTRAS = ["", "", "padding", "mirrored", "window", "windows", "signed", "slope", "width 0", "no function", "hot"]


def dicom(rng: np.random.Generator, made: Input, grey: np.ndarray) -> None:
    """The film as a DICOM object in another depth, polarity, transfer syntax, window, padding or sign."""
    ds = _base_dataset(made, rng)
    bits = int(rng.choice([8, 10, 12, 14, 16]))
    photometric, grey, note = _inverted(rng, ds, grey)
    extra = str(rng.choice(_EXTRAS))
    notes = [f"{bits} bits", note, extra]
    if extra == "mirrored":
        grey, ds.PatientOrientation = grey[:, ::-1], ["R", "F"]
    elif rng.random() < 0.5:
        ds.PatientOrientation = ["L", "F"]
    wide = extra in ("padding", "hot") and bits in (10, 12, 14)
    stored = _stored(ds, grey, bits, extra, wide)
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


def _inverted(rng: np.random.Generator, ds: pydicom.Dataset, grey: np.ndarray) -> tuple[str, np.ndarray, str]:
    """The photometric interpretation, the pixels for it, and what was done."""
    first, second = rng.random(2) < 0.3
    if first:
        return "MONOCHROME1", 1 - grey, "MONOCHROME1"
    if second:
        ds.PresentationLUTShape = "INVERSE"
        return "MONOCHROME2", 1 - grey, "LUT shape INVERSE"
    return ("monochrome2", grey, "lower case") if rng.random() < 0.15 else ("MONOCHROME2", grey, "")


def _stored(ds: pydicom.Dataset, grey: np.ndarray, bits: int, extra: str, wide: bool) -> np.ndarray:
    """The stored values, and the attributes that go with them."""
    top = 2**bits - 1
    stored = np.round(grey * top).astype(np.uint8 if bits == 8 else np.uint16)
    if extra == "padding" and wide:
        stored = np.pad(stored, 6, constant_values=65535)
    elif extra == "signed" and bits > 8:
        stored = (stored.astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
        ds.RescaleIntercept, ds.RescaleSlope = str(2 ** (bits - 1)), "1"
    elif extra == "slope":
        ds.RescaleIntercept, ds.RescaleSlope = "-1024", "0.25"
    elif extra == "hot" and wide:
        stored = stored.copy()
        stored[5, 5] = 65535
    elif extra in ("window", "windows"):
        _set_window(ds, top, 1 if extra == "window" else 2)
    elif extra == "width 0":
        ds.WindowCenter, ds.WindowWidth = str(top // 2), "0"
    elif extra == "no function":
        _set_window(ds, top, 1)
        ds.VOILUTFunction = "NOT A FUNCTION"
    return stored


def _set_window(ds: pydicom.Dataset, top: int, count: int) -> None:
    ds.WindowCenter = [str((top + 1) / 2)] * count if count > 1 else str((top + 1) / 2)
    ds.WindowWidth = [str(top + 1)] * count if count > 1 else str(top + 1)


def _written(ds: pydicom.FileDataset, syntax: UID, stored: np.ndarray) -> bytes:
    if syntax == JPEG2000Lossless:
        ds.file_meta.TransferSyntaxUID = syntax
        code = saved(Image.fromarray(stored), "JPEG2000", irreversible=False, no_jp2=True)
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
    return _saved_dataset(ds)


def dicom_bytes(rng: np.random.Generator, made: Input) -> None:
    """The film as a DICOM object with damaged bytes."""
    dicom(rng, made, film(0))
    first = 132 if rng.random() < 0.8 else 0
    made.data = flip(rng, made.data, first) if rng.random() < 0.6 else damage(rng, made.data)
    made.note += ", damaged"


def _set_header(rng: np.random.Generator, ds: pydicom.Dataset, names: list[str]) -> str:
    name = names[rng.integers(len(names))]
    vr = dictionary_VR(name)
    action = rng.random()
    if action < 0.12 and name in ds:
        delattr(ds, name)
        return f"{name} taken away"
    if name == "SpecificCharacterSet":
        value: Any = str(rng.choice(TABLES["character_sets"])).split("\\")
    elif vr == "SQ":
        inner = pydicom.Dataset()
        inner.add_new(0x00080100, "SH", "X" * int(rng.integers(0, 40)))
        value = [[], [pydicom.Dataset()], [inner] * 3][rng.integers(3)]
    elif name == "PixelData":
        value = [b"", b"\0", rng.bytes(1000), bytes(4_000_000)][rng.integers(4)]
    else:
        choices = TABLES["values"].get(vr, TABLES["values"]["LO"])
        value = choices[rng.integers(len(choices))]
    if action < 0.2 and vr not in ("SQ", "OB or OW"):  # with a wrong value representation
        return _put_raw(ds, name, "UN", rng.bytes(int(rng.integers(0, 20)) * 2), "bytes")
    vr = {"US or SS": "US", "OB or OW": "OW"}.get(vr, vr)
    if vr == "SQ" or name == "PixelData" or name == "SpecificCharacterSet":
        ds.add_new(name, vr, value)
        return f"{name} {str(value)[:30]!r}"
    raw = struct.pack("<h", value) if vr == "SS" else struct.pack("<H", value) if vr == "US" else value.encode()
    return _put_raw(ds, name, vr, raw, str(value)[:30])


def _put_raw(ds: pydicom.Dataset, name: str, vr: str, raw: bytes, shown: str) -> str:
    """Set an element to bytes, because pydicom would refuse some of these values."""
    raw += b" " * (len(raw) % 2)
    tag = Tag(tag_for_keyword(name) or 0)
    ds[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)
    return f"{name} in {vr} {shown!r}"


def _header(rng: np.random.Generator, made: Input, names: list[str]) -> None:
    """Up to three attributes of a good object missing or set to unusual values."""
    ds = _base_dataset(made, rng)
    stored = np.round(film(0) * 4095).astype(np.uint16)
    _put_pixels(ds, stored, 12, "MONOCHROME2")
    made.note = "; ".join(_set_header(rng, ds, names) for _ in range(int(rng.integers(1, 4))))
    syntaxes = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    try:
        made.data = _written(ds, syntaxes[rng.integers(2)], stored)
    except Exception as error:  # pydicom refuses to write some values: damage bytes instead
        ds = _base_dataset(made, rng)
        _put_pixels(ds, stored, 12, "MONOCHROME2")
        made.data = flip(rng, _written(ds, ExplicitVRLittleEndian, stored), 300)
        made.note += f" (not written: {type(error).__name__}; bytes flipped)"
    made.options["format"] = str(rng.choice(["json", "sr", "fhir", "text"]))


def dicom_pixels(rng: np.random.Generator, made: Input) -> None:
    """Wrong attributes that describe the pixels."""
    _header(rng, made, TABLES["pixel_attributes"])


def dicom_patient(rng: np.random.Generator, made: Input) -> None:
    """Wrong attributes of patient, study and equipment."""
    _header(rng, made, TABLES["patient_attributes"])


def dicom_lies(rng: np.random.Generator, made: Input) -> None:
    """Sizes that are wrong: of codestreams, deflated data and elements, depth of sequences."""
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
        ds.PixelData = encapsulate([saved(Image.fromarray(big), "JPEG2000", no_jp2=True)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif action == 2:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.Rows, ds.Columns = number(rng, 65536), number(rng, 65536)
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

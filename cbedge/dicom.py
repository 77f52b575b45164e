"""Read a DICOM radiograph (CR or DX): its pixels as a viewer shows them, its view and what its header says."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.dicom_header import UNREADABLE
from cbedge.dicom_pixels import (
    Warnings,
    check_codestream,
    crop_box,
    display_values,
    integer,
    is_inverted,
    padding_mask,
    repair_pixel_attributes,
    stored_values,
)
from cbedge.dicom_view import orient, view_of
from cbedge.errors import ContextError, RadiographError
from cbedge.prompt import ClinicalContext

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES = ("CR", "DX", "DR", "RG")  # DR and RG: computed and film radiography of older devices
_MODALITY_OF_CLASS = {"1.2.840.10008.5.1.4.1.1.1": "CR"}
_DX_CLASSES = "1.2.840.10008.5.1.4.1.1.1.1"
_CHEST = ("CHEST", "THORA", "LUNG", "RIB", "HEART", "CARDI", "TORAX", "PULMO", "STERN", "MEDIAST", "TRUNK", "BODY")
_INDICATIONS = (
    "ReasonForStudy", "ReasonForTheRequestedProcedure", "RequestedProcedureDescription",
    "AdmittingDiagnosesDescription",
)  # fmt: skip
_DEFLATED, _DEFLATED_FRAMES = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1"
_STARTS = (b"\x02\x00", b"\x08\x00")  # of a DICOM file without the preamble
_TEXT = ("PN", "LO", "SH", "ST", "LT", "UC", "UT")
_GB2312 = b"\x1b$)A"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_MAX_PIXELS = 64_000_000  # of a deflated file whose header alone is read
_MAX_HEADER_BYTES = 16 * 2**20  # beside the pixels, of a deflated file


@dataclass(frozen=True)
class DicomFilm:
    """What a DICOM file holds of a radiograph.

    Attributes:
        pixels: float32 [rows, columns] in 0..1, upright and as seen from the front, padding cut off or dark.
        view: ``frontal``, ``lateral`` or ``None`` where the header does not say.
        indication: why the study was requested, or ``None``.
        study_uid: of the study, or ``None``.
        chroma: how colourful the pixels are, 0 to 1.
        warnings: what could not be used of the header, a sentence each, without patient data.
    """

    pixels: np.ndarray
    view: str | None
    indication: str | None
    study_uid: str | None
    chroma: float
    warnings: tuple[str, ...]


def silence_pydicom() -> None:
    """Keep pydicom and highdicom from printing header values, which are patient data, in any thread and for good.

    ``warnings.catch_warnings`` changes the filters of all threads and back again: with several threads a value slips
    through.
    """
    from pydicom import charset

    for library in ("pydicom", "highdicom"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # Latin-9 has been in the standard since 2018 and is missing in pydicom 3.0.
    charset.python_encoding.setdefault("ISO_IR 203", "iso8859_15")
    charset.python_encoding.setdefault("ISO 2022 IR 203", "iso8859_15")
    charset.CODES_TO_ENCODINGS.setdefault(charset.ESC + b"-b", "iso8859_15")


def read_dicom(data: bytes, name: str, max_pixels: int) -> DicomFilm:
    """Decode one single-frame CR or DX image.

    Args:
        data: the file's bytes, with or without the preamble and the file meta information.
        name: what to call it in a message.
        max_pixels: refuse more than this, from the header, before decoding.

    Raises:
        RadiographError: not a single-frame CR or DX image, an unknown transfer syntax, too large, or damaged.
    """
    return decode_dataset(_parse(data, name, max_pixels), name, max_pixels)


def decode_dataset(dataset: Dataset, name: str, max_pixels: int) -> DicomFilm:
    """The radiograph of a dataset in memory, which is left as it is; see :func:`read_dicom`."""
    from pydicom.pixels import get_decoder

    silence_pydicom()
    found = Warnings()
    meta = getattr(dataset, "file_meta", None)
    dataset = _copied(dataset)
    if meta is not None:
        dataset.file_meta = copy.deepcopy(meta)
    _check_header(dataset, name, max_pixels, found)
    try:
        check_codestream(dataset, name)
        decoded, _ = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, correct_unused_bits=False)  # type: ignore[arg-type]
    except RadiographError:
        raise
    except Exception:
        raise RadiographError(
            f"{name} is damaged or cut short: its pixels cannot be decoded; export it again"
        ) from None
    chroma = 0.0
    if decoded.ndim == 3 and decoded.shape[2] == 3:
        channels = decoded.astype(np.float32)
        chroma = float(np.ptp(channels, axis=2).mean()) / max(float(channels.max()), 1.0)
        decoded = np.rint(channels @ np.array([0.299, 0.587, 0.114], np.float32)).astype(decoded.dtype)
        dataset.PhotometricInterpretation = "MONOCHROME2"
    if decoded.ndim != 2:
        raise RadiographError(f"{name} decodes to {decoded.ndim} dimensions; give a single grey radiograph")
    view = view_of(dataset, found)
    pixels = orient(_film(dataset, decoded, found), view)
    _check_body_part(dataset, found)
    return DicomFilm(
        pixels, view.name, header_indication(dataset), str(dataset.get("StudyInstanceUID") or "") or None, chroma,
        tuple(found),
    )  # fmt: skip


def _film(dataset: Dataset, decoded: np.ndarray, found: Warnings) -> np.ndarray:
    """Decoded values → 0..1, padding cut off at the edges and dark elsewhere."""
    padded = padding_mask(dataset, decoded)
    values = stored_values(dataset, decoded, found)
    if padded is not None:
        box = crop_box(padded)
        values, padded = values[box], padded[box]
        padded = padded if padded.any() else None
    pixels = display_values(dataset, values, None if padded is None else ~padded, found)
    if is_inverted(dataset):
        np.subtract(np.float32(1), pixels, out=pixels)
    if padded is not None:
        pixels[padded] = 0
    return pixels


def _parse(data: bytes, name: str, max_pixels: int) -> Dataset:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    silence_pydicom()
    try:
        dataset = _inflated(data, name, max_pixels)
        if dataset is None:
            dataset = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
        meta = getattr(dataset, "file_meta", None)
        if meta is not None and len(dataset) and not meta.get("TransferSyntaxUID"):
            explicit = dataset.original_encoding[0] is False
            meta.TransferSyntaxUID = ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian
    except RadiographError:
        raise
    except Exception:
        raise RadiographError(f"{name} is not a DICOM file that can be read: export it again") from None
    return dataset


def _inflated(data: bytes, name: str, max_pixels: int) -> Dataset | None:
    """The dataset of a deflated file, inflated with a bound on its size; ``None`` for other files."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import ExplicitVRLittleEndian

    if data[128:138] != b"DICM\x02\0\0\0UL" or _DEFLATED.encode() not in data[: 2**12]:
        return None
    start = 144 + int.from_bytes(data[140:144], "little")  # behind the file meta information
    meta = FileMetaDataset(read_dataset(io.BytesIO(data[144:start]), is_implicit_VR=False, is_little_endian=True))
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return None
    most = 2 * max_pixels + _MAX_HEADER_BYTES
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data[start:], most)
    if inflater.unconsumed_tail:
        raise RadiographError(f"{name} is deflated and holds more than {most:,} bytes: export it uncompressed")
    dataset = read_dataset(io.BytesIO(content), is_implicit_VR=False, is_little_endian=True)
    dataset.set_original_encoding(False, True, None)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    return dataset


def read_header(source: Path | bytes | None, needed: bool = True) -> Dataset | None:
    """The header of a DICOM file without its pixels; ``None`` where ``source`` is none, or no DICOM file.

    A value whose bytes cannot be decoded is replaced by the text :data:`cbedge.dicom_header.UNREADABLE`.

    Args:
        source: the file, with or without the preamble, or its bytes.
        needed: raise where the file is a DICOM file that cannot be read; otherwise return ``None``.

    Raises:
        RadiographError: ``needed``, and it is a DICOM file that cannot be read.
    """
    import pydicom

    if source is None:
        return None
    silence_pydicom()
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            start = file.read(2**12)
            if start[128:132] != b"DICM" and start[:2] not in _STARTS:
                return None
            file.seek(0)
            if _DEFLATED.encode() in start and (dataset := _inflated(file.read(), "the radiograph", _MAX_PIXELS)):
                for name in _PIXELS:
                    dataset.pop(name, None)
                return _decodable(dataset)
            file.seek(0)
            return _decodable(pydicom.dcmread(file, stop_before_pixels=True, force=start[128:132] != b"DICM"))
    except Exception:
        if needed:
            raise RadiographError("the DICOM header cannot be read: export the radiograph again") from None
        return None


def _decodable(dataset: Dataset) -> Dataset:
    """The same with a mark in place of every value that cannot be decoded, in place.

    pydicom decodes an element when asked for it, and raises what it likes where the bytes are damaged. Bytes beyond
    ASCII that no character set is named for it reads as Latin-1, which would be a guess. It leaves the escape sequence
    of ISO 2022 IR 58 in the text.
    """
    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.valuerep import PersonName

    ascii_first = _starts_in_ascii(dataset)
    for tag in [*dataset.keys()]:
        try:
            raw = dataset.get_item(tag)
            element = dataset[tag]
            if element.VR not in _TEXT or not isinstance(raw, RawDataElement) or raw.value is None:
                continue
            if not (ascii_first and _is_unnamed(raw.value, element.VR)):
                if _GB2312 in raw.value and isinstance(element.value, str | PersonName):
                    text = str(element.value).replace(_GB2312.decode(), "")
                    dataset[tag] = DataElement(tag, element.VR, text)
                continue
        except Exception:
            pass
        dataset[tag] = DataElement(tag, "LO", UNREADABLE)
    return dataset


def _starts_in_ascii(dataset: Dataset) -> bool:
    """Whether text is ASCII up to the first escape sequence: no character set is named, or none that is known."""
    from pydicom.charset import convert_encodings, default_encoding

    try:
        named = dataset.get("SpecificCharacterSet") or ""
        names = [named] if isinstance(named, str) else [str(name) for name in named]
        return convert_encodings(names)[0] == default_encoding
    except Exception:
        return True


def _is_unnamed(raw: bytes, vr: str) -> bool:
    """Whether bytes beyond ASCII stand where no escape sequence names their character set; delimiters end one."""
    parts = re.split(rb"[\\\r\n\t\f^=]" if vr == "PN" else rb"[\\\r\n\t\f]", raw)
    return any(not part.partition(b"\x1b")[0].isascii() for part in parts)


def _copied(dataset: Dataset) -> Dataset:
    """A dataset whose elements can be replaced without changing the other's, without those that cannot be decoded."""
    from pydicom import Dataset

    copied = Dataset()
    for tag in [*dataset.keys()]:
        try:
            copied[tag] = copy.copy(dataset[tag])
        except Exception:  # pydicom raises what it likes where a byte of a type is damaged
            continue
    return copied


def header_indication(dataset: Dataset) -> str | None:
    """Why the study was requested, as the header says: the first of four attributes that says anything.

    ``-``, ``n/a``, ``none`` and the like say nothing (:func:`cbedge.prompt.is_no_text`).
    """
    for name in _INDICATIONS:
        text = str(dataset.get(name) or "").strip()
        try:
            if text and (said := ClinicalContext(indication=text).indication):
                return said
        except ContextError:
            continue
    return None


def _check_header(dataset: Any, name: str, max_pixels: int, found: Warnings) -> None:
    _check_modality(dataset, name, found)
    if "PixelData" not in dataset:
        raise RadiographError(f"{name} holds no image (no Pixel Data); export it with its pixels")
    frames = integer(dataset, "NumberOfFrames", 1)
    rows, columns = integer(dataset, "Rows", 0), integer(dataset, "Columns", 0)
    if rows < 1 or columns < 1:
        raise RadiographError(f"{name} lacks Rows or Columns: export it again")
    if frames > 1:
        raise RadiographError(f"{name} holds {frames} frames; give a single radiograph")
    if rows * columns > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; at most {max_pixels:,} in all: scale it down")
    _check_syntax(dataset, name, found)
    repair_pixel_attributes(dataset, found)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raise RadiographError(f"{name} is in palette colour; a CR or DX radiograph is grey: export it as such")


def _check_modality(dataset: Any, name: str, found: Warnings) -> None:
    modality = str(dataset.get("Modality") or "").strip(" \0").upper()
    kind = str(dataset.get("SOPClassUID") or "")
    if not modality:
        modality = "DX" if kind.startswith(_DX_CLASSES) else _MODALITY_OF_CLASS.get(kind, "")
        if modality:
            found.say("Modality", f"is missing; {modality} was taken from the SOP Class UID")
    if modality not in _MODALITIES:
        shown = modality if modality.isalnum() and len(modality) <= 8 else "none" if not modality else "unknown"
        raise RadiographError(f"{name} has modality {shown}; cbedge reads CR and DX radiographs only")


def _check_syntax(dataset: Any, name: str, found: Warnings) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian

    if getattr(dataset, "file_meta", None) is None:
        dataset.file_meta = FileMetaDataset()
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        found.say("TransferSyntaxUID", "is missing; uncompressed pixels were taken")
        syntax = dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    try:
        available = syntax != _DEFLATED_FRAMES and get_decoder(syntax).is_available
    except (AttributeError, NotImplementedError):
        available = False
    if not available:
        raise RadiographError(
            f"{name} is in transfer syntax {getattr(syntax, 'name', None) or 'unknown'}, which cbedge does not decode; "
            "convert it to an uncompressed, JPEG or JPEG 2000 syntax"
        )


def _check_body_part(dataset: Dataset, found: Warnings) -> None:
    part = str(dataset.get("BodyPartExamined") or "").strip(" \0").upper()
    if part and not any(word in part for word in _CHEST):
        found.say("BodyPartExamined", "names another part of the body than the chest: check that this is a chest film")


def header_view(dataset: Dataset) -> str | None:
    """``frontal``, ``lateral`` or ``None`` from a header's view and orientation."""
    return view_of(dataset, Warnings()).name

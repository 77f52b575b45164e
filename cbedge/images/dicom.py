"""Read a DICOM radiograph (CR or DX): its pixels as a viewer shows them, its view, and its indication."""

from __future__ import annotations

import copy
import io
import re
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.errors import ContextError, RadiographError
from cbedge.images.dicom_display import display_values
from cbedge.images.dicom_file import INDICATIONS, decodable, parse_dicom, read_header, silence_pydicom
from cbedge.images.dicom_header import UNREADABLE
from cbedge.images.dicom_padding import crop_box, padding_mask
from cbedge.images.dicom_pixels import (
    Warnings,
    check_pixels,
    decode_pixels,
    integer,
    repair_pixel_attributes,
    repair_pixel_data,
    stored_values,
)
from cbedge.images.dicom_view import view_of
from cbedge.images.film import Radiograph, checked
from cbedge.images.intensity import turned
from cbedge.images.memory import MAX_BYTES, MAX_PIXELS, working_memory
from cbedge.images.raster import check_size
from cbedge.prompt import MAX_CONTEXT_CHARACTERS, ClinicalContext

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES = ("CR", "DX", "DR", "RG")  # DR and RG: computed and film radiography of older devices
_MODALITY_OF_CLASS = {"1.2.840.10008.5.1.4.1.1.1": "CR"}
_DX_CLASSES = "1.2.840.10008.5.1.4.1.1.1.1"
_CHEST = re.compile(  # also in other languages; the numbers are those of SNOMED CT and RT
    "CHEST|THORA|LUNG|RIB|HEART|CARDI|PULMO|STERN|MEDIAST|TRUNK|BODY|51185008|T-D3000|"
    "TORA[XC]|BRUST|PECHO|POITRINE|BORST|BRYST|BROST|HRUDN|KLATKA|ГРУД|胸|肺|가슴|흉"
)
_SPINE = re.compile("SPINE|SPINAL|VERTEB")
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
_HL7_ESCAPE = re.compile(r"X[0-9A-F]{2,4}|\.br|[EFHNRST]")  # between backslashes, which separate values in DICOM


def read_dicom(data: bytes, digest: str, name: str, max_pixels: int) -> Radiograph:
    """Decode a file, with or without the preamble and the file meta information, that is one single-frame CR or DX
    image. Messages call it ``name``; ``digest`` is its SHA-256. The number of pixels is checked before decoding.

    Raises:
        RadiographError: not a single-frame CR or DX image, an unknown transfer syntax, too large, or damaged.
    """
    return _decoded(parse_dicom(io.BytesIO(data), name), digest, name, max_pixels, len(data))


def decode_dataset(dataset: Dataset, pixels: bytes, digest: str, name: str, max_pixels: int) -> Radiograph:
    """Decode a dataset in memory with its :func:`pixel_bytes`, without changing it; see :func:`read_dicom`."""
    silence_pydicom()
    return _decoded(dataset, digest, name, max_pixels, 0, pixels)


def pixel_bytes(dataset: Dataset, name: str) -> bytes:
    """The Pixel Data of a dataset, which pydicom also accepts as a bytearray or file object; empty if it has none.

    Raises:
        RadiographError: the pixels cannot be read, or are too large.
    """
    pixels: Any = dataset.get("PixelData") or b""
    try:
        if hasattr(pixels, "read"):
            at = pixels.tell()
            pixels.seek(0)
            content = pixels.read(MAX_BYTES + 1)
            pixels.seek(at)
        else:
            content = bytes(pixels)  # pydicom holds a bytearray as a list of integers
    except (OSError, TypeError, ValueError):
        raise RadiographError(f"{name} has Pixel Data that cannot be read: give bytes or an open file") from None
    if len(content) > MAX_BYTES:
        raise RadiographError(f"{name} has more than {MAX_BYTES:,} bytes of Pixel Data: scale the radiograph down")
    return content


def _decoded(
    dataset: Dataset, digest: str, name: str, max_pixels: int, file_bytes: int, content: bytes = b""
) -> Radiograph:
    found = Warnings()
    meta, indication = getattr(dataset, "file_meta", None), header_indication(dataset, found)
    dataset = _copied(dataset)
    if meta is not None:
        dataset.file_meta = copy.deepcopy(meta)
    if content and not isinstance(dataset["PixelData"].value, bytes):
        dataset["PixelData"].value = content
    _check_header(dataset, name, max_pixels, found)
    needed = check_pixels(dataset, name, found) + file_bytes
    with working_memory(needed, name, (int(dataset.Columns), int(dataset.Rows))):
        pixels, chroma = _film(dataset, name, found)
        view = view_of(dataset, found)
        pixels = turned(pixels, view.transpose, view.flip_rows, view.flip_columns)
    _check_body_part(dataset, found)
    check_size(pixels.shape[::-1], name, MAX_PIXELS)
    study = str(dataset.get("StudyInstanceUID") or "") or None
    return Radiograph(
        checked(pixels, name), view.name, digest, indication, chroma, study_uid=study, warnings=tuple(found)
    )


def _film(dataset: Dataset, name: str, found: Warnings) -> tuple[np.ndarray, float]:
    """Pixels in 0..1, with padding cropped at the edges and black elsewhere; and their colourfulness."""
    decoded, chroma = decode_pixels(dataset, name)
    values = stored_values(dataset, decoded, found)
    padded = padding_mask(dataset, decoded, values, found)
    if not np.may_share_memory(values, decoded):
        dataset.pop("PixelData", None)  # free the memory
    del decoded
    if padded is not None:
        box = crop_box(padded)
        values, padded = values[box], padded[box]
    film = None if padded is None or not padded.any() else np.logical_not(padded, out=padded)
    return display_values(dataset, values, film, found), chroma


def _copied(dataset: Dataset) -> Dataset:
    """A copy whose elements can be replaced independently; elements that cannot be decoded are dropped."""
    from pydicom import Dataset

    copied = Dataset()
    for tag in [*dataset.keys()]:
        try:
            copied[tag] = copy.copy(dataset[tag])
        except Exception:  # pydicom raises various exceptions for damaged elements
            continue
    return copied


def header_indication(dataset: Dataset, found: Warnings) -> str | None:
    """The indication in the header: the first of four attributes that has content. Several values are joined.

    ``-``, ``n/a``, ``none`` and the like count as empty (:func:`cbedge.prompt.is_no_text`). An attribute whose text
    cannot be decoded or is too long gets a warning.
    """
    header = _indication_elements(dataset)
    for name in INDICATIONS:
        value = header.get(name)
        several = not isinstance(value, str) and hasattr(value, "__iter__")
        parts = [str(part).strip() for part in (value if several else [value or ""])]
        text = ", ".join(part for part in parts if part and not _HL7_ESCAPE.fullmatch(part))
        if UNREADABLE in text:
            found.add(name, "has text that its character set cannot decode, and was ignored")
            continue
        try:
            if text and (indication := ClinicalContext(indication=text).indication):
                return indication
        except ContextError:
            found.add(name, f"has more than {MAX_CONTEXT_CHARACTERS:,} characters and was ignored")
    return None


def _indication_elements(dataset: Dataset) -> Dataset:
    """A header's elements that may hold an indication; undecodable text is :data:`UNREADABLE`."""
    from pydicom import Dataset

    header = Dataset()
    for name in ("SpecificCharacterSet", *INDICATIONS):
        with suppress(Exception):  # pydicom raises various exceptions for damaged elements
            if name in dataset:
                header[name] = copy.copy(dataset.get_item(name))
    return decodable(header)


def _check_header(dataset: Any, name: str, max_pixels: int, found: Warnings) -> None:
    _check_modality(dataset, name, found)
    if not dataset.get("PixelData"):
        raise RadiographError(f"{name} has no image (no Pixel Data); export it with its pixels")
    frames = integer(dataset, "NumberOfFrames", 1)
    if frames < 1:
        found.add("NumberOfFrames", "is invalid; 1 was assumed")
        dataset.NumberOfFrames = 1
    rows, columns = integer(dataset, "Rows", 0), integer(dataset, "Columns", 0)
    if rows < 1 or columns < 1:
        raise RadiographError(f"{name} lacks Rows or Columns: export it again")
    if frames > 1:
        raise RadiographError(f"{name} has {frames} frames; give a single radiograph")
    if rows * columns > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; the limit is {max_pixels:,}: scale it down")
    _check_syntax(dataset, name, found)
    repair_pixel_attributes(dataset, found)
    repair_pixel_data(dataset, name, found)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raise RadiographError(f"{name} is in palette colour, but a radiograph is greyscale: export it as greyscale")


def _check_modality(dataset: Any, name: str, found: Warnings) -> None:
    modality = str(dataset.get("Modality") or "").strip(" \0").upper()
    kind = str(dataset.get("SOPClassUID") or "")
    if not modality:
        modality = "DX" if kind.startswith(_DX_CLASSES) else _MODALITY_OF_CLASS.get(kind, "")
        if modality:
            found.add("Modality", f"is missing; {modality} was derived from the SOP Class UID")
    if modality not in _MODALITIES:
        shown = modality if modality.isalnum() and len(modality) <= 8 else "none" if not modality else "unknown"
        raise RadiographError(f"{name} has modality {shown}; cbedge reads CR and DX radiographs only")


def _check_syntax(dataset: Any, name: str, found: Warnings) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import ExplicitVRLittleEndian

    if getattr(dataset, "file_meta", None) is None:
        dataset.file_meta = FileMetaDataset()
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        found.add("TransferSyntaxUID", "is missing; uncompressed pixels were assumed")
        syntax = dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    try:
        available = syntax != _DEFLATED_FRAMES and get_decoder(syntax).is_available
    except (AttributeError, NotImplementedError):
        available = False
    if not available:
        raise RadiographError(
            f"{name} has the unsupported transfer syntax {getattr(syntax, 'name', None) or 'unknown'}; "
            "convert it to an uncompressed, JPEG or JPEG 2000 syntax"
        )


def _check_body_part(dataset: Dataset, found: Warnings) -> None:
    part, region = str(dataset.get("BodyPartExamined") or ""), ""
    with suppress(Exception):  # a damaged sequence
        codes = dataset.get("AnatomicRegionSequence") or ()
        region = " ".join(f"{code.get('CodeValue')} {code.CodeMeaning}" for code in codes if code.get("CodeMeaning"))
    for name, text in (("BodyPartExamined", part), ("AnatomicRegionSequence", region)):
        with suppress(UnicodeError):  # UTF-8, which pydicom reads as Latin-1 in this attribute
            text = text.encode("latin-1").decode()
        letters = unicodedata.normalize("NFKD", text.strip(" \0").upper())
        text = unicodedata.normalize("NFC", "".join(c for c in letters if not unicodedata.combining(c)))
        is_spine = "CHEST" not in text and _SPINE.search(text)
        if text and (is_spine or not _CHEST.search(text)):
            found.add(name, "names a body part other than the chest: check that this is a chest radiograph")


def study_and_view(path: Path) -> tuple[tuple[str, str] | None, str | None]:
    """Study and patient of a file (:func:`study_and_patient`), and its view: ``frontal`` or ``lateral``; each ``None``
    if the header does not state it, or cannot be read, which drafting will report."""
    header = read_header(path, needed=False)
    if header is None:
        return None, None
    try:
        return study_and_patient(header), view_of(header, Warnings()).name
    except Exception:  # damaged headers raise various exceptions
        return None, None


def study_and_patient(dataset: Dataset | None) -> tuple[str, str] | None:
    """Study Instance UID and Patient ID (or an empty text) in a header; ``None`` if it has no study."""
    if dataset is None:
        return None
    study, patient = (str(dataset.get(name) or "").strip() for name in ("StudyInstanceUID", "PatientID"))
    return (study, patient) if study else None

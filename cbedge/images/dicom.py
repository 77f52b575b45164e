"""Read a DICOM radiograph (CR or DX): its pixels as a viewer shows them, its view and what its header says."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.errors import ContextError, RadiographError
from cbedge.images.dicom_file import INDICATIONS, parse_dicom, silence_pydicom
from cbedge.images.dicom_pixels import (
    Warnings,
    check_pixels,
    crop_box,
    decode_pixels,
    display_values,
    integer,
    padding_mask,
    repair_pixel_attributes,
    stored_values,
)
from cbedge.images.dicom_view import orient, view_of
from cbedge.images.memory import working_memory
from cbedge.prompt import ClinicalContext

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES = ("CR", "DX", "DR", "RG")  # DR and RG: computed and film radiography of older devices
_MODALITY_OF_CLASS = {"1.2.840.10008.5.1.4.1.1.1": "CR"}
_DX_CLASSES = "1.2.840.10008.5.1.4.1.1.1.1"
_CHEST = ("CHEST", "THORA", "LUNG", "RIB", "HEART", "CARDI", "TORAX", "PULMO", "STERN", "MEDIAST", "TRUNK", "BODY")
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"


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


def read_dicom(data: bytes, name: str, max_pixels: int) -> DicomFilm:
    """Decode one single-frame CR or DX image.

    Args:
        data: the file's bytes, with or without the preamble and the file meta information.
        name: what to call it in a message.
        max_pixels: refuse more than this, from the header, before decoding.

    Raises:
        RadiographError: not a single-frame CR or DX image, an unknown transfer syntax, too large, or damaged.
    """
    return _decoded(parse_dicom(io.BytesIO(data), name), name, max_pixels, len(data))


def decode_dataset(dataset: Dataset, name: str, max_pixels: int) -> DicomFilm:
    """The radiograph of a dataset in memory, which is left as it is; see :func:`read_dicom`."""
    silence_pydicom()
    return _decoded(dataset, name, max_pixels, 0)


def _decoded(dataset: Dataset, name: str, max_pixels: int, held: int) -> DicomFilm:
    found = Warnings()
    meta = getattr(dataset, "file_meta", None)
    dataset = _copied(dataset)
    if meta is not None:
        dataset.file_meta = copy.deepcopy(meta)
    _check_header(dataset, name, max_pixels, found)
    needed = check_pixels(dataset, name, found) + held
    with working_memory(needed, name, (int(dataset.Columns), int(dataset.Rows))):
        pixels, chroma = _film(dataset, name, found)
        view = view_of(dataset, found)
        pixels = orient(pixels, view)
    _check_body_part(dataset, found)
    return DicomFilm(
        pixels, view.name, header_indication(dataset), str(dataset.get("StudyInstanceUID") or "") or None, chroma,
        tuple(found),
    )  # fmt: skip


def _film(dataset: Dataset, name: str, found: Warnings) -> tuple[np.ndarray, float]:
    """Pixels in 0..1, padding cut off at the edges and dark elsewhere; and how colourful they are."""
    decoded, chroma = decode_pixels(dataset, name)
    values = stored_values(dataset, decoded, found)
    padded = padding_mask(dataset, decoded, values)
    if not np.may_share_memory(values, decoded):
        dataset.pop("PixelData", None)  # memory that is used no more
    del decoded
    if padded is not None:
        box = crop_box(padded)
        values, padded = values[box], padded[box]
    film = None if padded is None or not padded.any() else np.logical_not(padded, out=padded)
    return display_values(dataset, values, film, found), chroma


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
    for name in INDICATIONS:
        text = str(dataset.get(name) or "").strip()
        try:
            if text and (said := ClinicalContext(indication=text).indication):
                return said
        except ContextError:
            continue
    return None


def _check_header(dataset: Any, name: str, max_pixels: int, found: Warnings) -> None:
    _check_modality(dataset, name, found)
    if not dataset.get("PixelData"):
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

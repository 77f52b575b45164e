"""Read the pixels of a DICOM radiograph (CR or DX) as the modality meant them to be seen."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbedge.errors import ContextError, RadiographError
from cbedge.prompt import ClinicalContext, normalize_view

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES = ("CR", "DX")
_INDICATIONS = (
    "ReasonForStudy", "ReasonForTheRequestedProcedure", "RequestedProcedureDescription",
    "AdmittingDiagnosesDescription",
)  # fmt: skip


def read_dicom(data: bytes, name: str, max_pixels: int) -> tuple[np.ndarray, str | None, str | None, str | None]:
    """Decode one single-frame CR or DX image.

    Modality rescale and the first VOI LUT or window are applied; MONOCHROME1 is turned round so that bone is bright.

    Args:
        data: the file's bytes.
        name: what to call it in a message.
        max_pixels: refuse more than this, from the header, before decoding.

    Returns:
        float32 [rows, columns] in 0..1; ``frontal``, ``lateral`` or ``None`` from View Position; the indication
        that the header tells, or ``None``; and the UID of the study, or ``None``.

    Raises:
        RadiographError: not a single-frame CR or DX image, an unknown transfer syntax, too large, or damaged.
    """
    import pydicom

    # pydicom warns and logs with values out of the header, which may hold patient data: keep both quiet.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = _decodable(pydicom.dcmread(io.BytesIO(data)))
        except Exception:
            raise RadiographError(f"{name} is not a DICOM file that can be read: export it again") from None
        _check_header(dataset, name, max_pixels)
        try:
            values = _display_values(dataset)
        except Exception:
            raise RadiographError(
                f"{name} is damaged or cut short: its pixels cannot be decoded; export it again"
            ) from None
        study = str(dataset.get("StudyInstanceUID") or "") or None
        return _to_unit(dataset, values, name), header_view(dataset), header_indication(dataset), study


def read_header(source: Path | bytes | None, needed: bool = True) -> Dataset | None:
    """The header of a DICOM file without its pixels; ``None`` where ``source`` is none, or no DICOM file.

    Raises:
        RadiographError: ``needed``, and it is a DICOM file that cannot be read.
    """
    import pydicom

    if source is None:
        return None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            return _decodable(pydicom.dcmread(file, stop_before_pixels=True))
        except pydicom.errors.InvalidDicomError:
            return None
        except Exception:
            if needed:
                raise RadiographError("the DICOM header cannot be read: export the radiograph again") from None
            return None


def _decodable(dataset: Dataset) -> Dataset:
    """The same without elements whose values cannot be decoded: pydicom decodes one when it is asked for it, and raises
    what it likes where a byte of its type is damaged."""
    for tag in [*dataset.keys()]:
        try:
            dataset[tag]
        except Exception:
            del dataset[tag]
    return dataset


def header_indication(dataset: Dataset) -> str | None:
    """Why the study was requested, as the header says: the first of four attributes that says anything."""
    for name in _INDICATIONS:
        text = str(dataset.get(name) or "").strip()
        try:
            if text:
                return ClinicalContext(indication=text).indication
        except ContextError:
            continue
    return None


def _check_header(dataset, name: str, max_pixels: int) -> None:  # type: ignore[no-untyped-def]
    from pydicom.pixels import get_decoder

    modality = str(dataset.get("Modality", "") or "none")
    if modality not in _MODALITIES:
        raise RadiographError(f"{name} has modality {modality[:16]}; cbedge reads CR and DX radiographs only")
    if "PixelData" not in dataset:
        raise RadiographError(f"{name} holds no image (no Pixel Data); export it with its pixels")
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        samples = int(dataset.get("SamplesPerPixel") or 1)
    except (AttributeError, TypeError, ValueError):
        raise RadiographError(f"{name} lacks its rows, columns or frames: export it again") from None
    if frames > 1:
        raise RadiographError(f"{name} holds {frames} frames; give a single radiograph")
    if rows * columns > max_pixels:
        raise RadiographError(f"{name} has {columns:,} x {rows:,} pixels; at most {max_pixels:,} in all: scale it down")
    if samples != 1:
        raise RadiographError(f"{name} has {samples} colour channels; a CR or DX radiograph has one")
    try:
        syntax = dataset.file_meta.TransferSyntaxUID
        available = get_decoder(syntax).is_available
    except (AttributeError, NotImplementedError):
        available = False
    if not available:
        told = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        raise RadiographError(
            f"{name} is in transfer syntax {getattr(told, 'name', None) or 'unknown'}, which cbedge does not decode; "
            "convert it to an uncompressed, JPEG or JPEG 2000 syntax"
        )


def _display_values(dataset) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Pixels after modality rescale and VOI, float32; each stored value, of which there are few, is looked up once."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    def shown(values: np.ndarray) -> np.ndarray:
        return np.asarray(apply_voi_lut(apply_modality_lut(values, dataset), dataset, index=0)).astype(np.float32)

    pixels = dataset.pixel_array
    if pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        return shown(pixels)
    least = int(pixels.min())
    levels = np.arange(least, int(pixels.max()) + 1).astype(pixels.dtype)
    return shown(levels)[pixels.astype(np.intp) - least]


def _to_unit(dataset, values: np.ndarray, name: str) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Stretch float32 values to 0..1, in place, by the image's own range, which after a window is the window's."""
    if values.ndim != 2:
        raise RadiographError(f"{name} decodes to {values.ndim} dimensions; give a single grey radiograph")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise RadiographError(f"{name} holds values that are not finite: export it again")
    values -= np.float32(low)
    values /= np.float32(max(high - low, 1e-6))
    # A VOI LUT or window comes before the photometric interpretation; Presentation LUT Shape INVERSE says the same.
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        np.subtract(np.float32(1), values, out=values)
    return values


def header_view(dataset: Dataset) -> str | None:
    """``frontal``, ``lateral`` or ``None`` from a header's View Position."""
    try:
        return normalize_view(str(dataset.get("ViewPosition") or "") or None)
    except ContextError:
        return None

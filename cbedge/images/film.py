"""A decoded radiograph, as all readers return it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbedge.errors import RadiographError


@dataclass(frozen=True)
class Radiograph:
    """A decoded radiograph.

    Attributes:
        pixels: float32 [rows, columns], 0 (air, dark) to 1 (bone, bright). Images of more than 36 megapixels (29 with 8
            bits, 20 in colour) are reduced by averaging blocks of 2 x 2 or more pixels, to at most 144 MB.
        view: ``frontal`` or ``lateral`` according to the file, else ``None``.
        sha256: hash of the input file's bytes (of the raw pixels for an array).
        indication: reason for the study from the DICOM header, else ``None``.
        chroma: colourfulness: mean difference of a pixel's largest and smallest channel, 0 (grey) to 1.
        read_ms: time for reading and decoding, in milliseconds.
        study_uid: Study Instance UID from the DICOM header, else ``None``.
        warnings: what a reader of the draft must know about the file, such as an attribute that could not be used; one
            sentence each, without patient data.
        stored: stored values of an 8-bit file, uint8 [rows, columns] or in colour [rows, columns, 3], for models whose
            preprocessing uses them (:mod:`cbedge.images.preprocess`), reduced like ``pixels``. ``None`` if ``pixels``
            represent them exactly, or for other files.
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


def checked(pixels: np.ndarray, name: str) -> np.ndarray:
    """Pixels as contiguous float32.

    Raises:
        RadiographError: every pixel has the same value.
    """
    if float(pixels.max()) - float(pixels.min()) < 1e-3:
        raise RadiographError(f"{name} is blank: every pixel has the same value; give a radiograph")
    return np.ascontiguousarray(pixels, dtype=np.float32)

"""Determine the view of a DICOM radiograph, and rotate or flip it so that it is upright and viewed from the front.

Three attributes state the view: View Position, View Code Sequence and Patient Orientation. The last one gives the
directions of rows and columns by the first letters of left, right, anterior, posterior, head and feet (PS3.3
C.7.6.1.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cbedge.images.dicom_pixels import Warnings

if TYPE_CHECKING:
    from pydicom import Dataset

# CID 4010 and its SNOMED RT codes of older devices.
_CODES = {
    "399033003": "frontal", "399348003": "frontal", "272479007": "frontal",
    "R-10202": "frontal", "R-10206": "frontal", "R-10214": "frontal",
    "399067008": "lateral", "399173006": "lateral", "399198007": "lateral", "399352003": "lateral",
    "399260004": "lateral", "R-10228": "lateral", "R-10230": "lateral", "R-10232": "lateral", "R-10236": "lateral",
    "R-10238": "lateral",
}  # fmt: skip
_POSITIONS = {
    **dict.fromkeys(
        (
            "FRONTAL",
            "PA",
            "AP",
            "APPA",
            "PAAP",
            "POSTEROANTERIOR",
            "ANTEROPOSTERIOR",
            "PAUPRIGHT",
            "APUPRIGHT",
            "APSUPINE",
            "APSITTING",
            "PAERECT",
            "APERECT",
            "PORTABLE",
            "SUPINE",
            "APPORTABLE",
            "PACHEST",
            "APCHEST",
            "CHESTPA",
            "CHESTAP",
        ),
        "frontal",
    ),
    # A lateral decubitus view is a frontal view of a patient who lies on the side.
    **dict.fromkeys(("LLD", "RLD", "LEFTLATERALDECUBITUS", "RIGHTLATERALDECUBITUS", "DECUBITUS", "LATDEC"), "frontal"),
    **dict.fromkeys(
        (
            "LATERAL",
            "LAT",
            "LL",
            "RL",
            "LLAT",
            "RLAT",
            "LATL",
            "LATR",
            "LLATERAL",
            "RLATERAL",
            "LEFTLATERAL",
            "RIGHTLATERAL",
            "LATERALLEFT",
            "LATERALRIGHT",
            "LMLO",
            "LM",
            "ML",
            "LATLAT",
        ),
        "lateral",
    ),
    **dict.fromkeys(("RLO", "LLO", "RAO", "LAO", "RPO", "LPO", "OBL", "OBLIQUE", "OBLIQUES"), "oblique"),
}
_DECUBITUS = ("LLD", "RLD", "LEFTLATERALDECUBITUS", "RIGHTLATERALDECUBITUS", "DECUBITUS", "LATDEC")
_AXES = {"L": 0, "R": 0, "A": 1, "P": 1, "H": 2, "F": 2}


@dataclass(frozen=True)
class View:
    """The view of a radiograph according to its header.

    Attributes:
        name: ``frontal``, ``lateral`` or ``None`` if unknown.
        transpose: swap rows and columns, before flipping.
        flip_rows, flip_columns: flip vertically, horizontally.
        oriented: whether Patient Orientation is known, so that the result is upright and not mirrored.
    """

    name: str | None
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    oriented: bool = False


def view_of(dataset: Dataset, warnings: Warnings) -> View:
    """The view that a header states.

    Args:
        dataset: the header.
        warnings: collects unknown values and contradictions.
    """
    position, code = _by_position(dataset, warnings), _by_code(dataset, warnings)
    orientation = _by_orientation(dataset, warnings)
    stated = position or code
    if position and code and position != code:
        warnings.add("ViewPosition", "contradicts ViewCodeSequence: check the view")
    if stated == "oblique":
        warnings.add(
            "ViewPosition" if position else "ViewCodeSequence",
            "states an oblique view: the draft treats it as a frontal view",
        )
        stated = None
    elif stated and orientation.name and stated != orientation.name:
        warnings.add("PatientOrientation", f"does not match a {stated} view: check the view")
        return View(stated)
    return View(
        stated or orientation.name,
        orientation.transpose,
        orientation.flip_rows,
        orientation.flip_columns,
        orientation.oriented,
    )


def orient(pixels: np.ndarray, view: View) -> np.ndarray:
    """Pixels [rows, columns] with the head up and, in a frontal view, the patient's left on the right."""
    turned = pixels.T if view.transpose else pixels
    turned = turned[::-1] if view.flip_rows else turned
    turned = turned[:, ::-1] if view.flip_columns else turned
    return np.ascontiguousarray(turned)


def _by_position(dataset: Dataset, warnings: Warnings) -> str | None:
    text = str(dataset.get("ViewPosition") or "").strip(" \0").upper()
    name = "".join(c for c in text if c.isalnum())
    if not name:
        return None
    if name not in _POSITIONS:
        warnings.add("ViewPosition", "has an unknown value: check the view")
        return None
    if name in _DECUBITUS:
        warnings.add(
            "ViewPosition", "states a decubitus view: air and fluid are distributed differently than in an upright view"
        )
    return _POSITIONS[name]


def _by_code(dataset: Dataset, warnings: Warnings) -> str | None:
    try:
        sequence = dataset.get("ViewCodeSequence")
        if not sequence:
            return None
        code = str(sequence[0].get("CodeValue") or "").strip()
        meaning = str(sequence[0].get("CodeMeaning") or "").lower()
    except Exception:  # a damaged sequence
        warnings.add("ViewCodeSequence", "cannot be read: check the view")
        return None
    if code in _CODES:
        return _CODES[code]
    for word, view in (
        ("obliq", "oblique"),
        ("lateral", "lateral"),
        ("frontal", "frontal"),
        ("antero", "frontal"),
        ("postero", "frontal"),
    ):
        if word in meaning and "decubitus" not in meaning:
            return view
    warnings.add("ViewCodeSequence", "has an unknown value: check the view")
    return None


def _by_orientation(dataset: Dataset, warnings: Warnings) -> View:
    value = dataset.get("PatientOrientation")
    if not value:
        return View(None)
    parts = value.split("\\") if isinstance(value, str) else [str(part) for part in value]
    letters = [part.strip(" \0").upper()[:1] for part in parts]
    axes = [_AXES.get(letter) for letter in letters]
    if len(axes) != 2 or None in axes or 2 not in axes or axes[0] == axes[1]:
        if any(letters):
            warnings.add("PatientOrientation", "has no valid directions; the stored orientation was used")
        return View(None)
    transpose = axes[0] == 2  # rows run from head to feet
    across, down = (letters[1], letters[0]) if transpose else letters
    frontal = across in "LR"
    return View("frontal" if frontal else "lateral", transpose, down == "H", frontal and across == "R", True)

"""Which view a DICOM radiograph is, and how it is turned to be seen upright and from the front.

Three attributes can say it: View Position, View Code Sequence and Patient Orientation, which names the directions of
rows and columns by the first letters of left, right, anterior, posterior, head and feet (PS3.3 C.7.6.1.1.1).
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
    **dict.fromkeys(("FRONTAL", "PA", "AP", "APPA", "PAAP", "POSTEROANTERIOR", "ANTEROPOSTERIOR", "PAUPRIGHT",
                     "APUPRIGHT", "APSUPINE", "APSITTING", "PAERECT", "APERECT", "PORTABLE", "SUPINE", "APPORTABLE",
                     "PACHEST", "APCHEST", "CHESTPA", "CHESTAP"), "frontal"),
    # In a lateral decubitus view the patient lies on the side: the film is a frontal one.
    **dict.fromkeys(("LLD", "RLD", "LEFTLATERALDECUBITUS", "RIGHTLATERALDECUBITUS", "DECUBITUS", "LATDEC"), "frontal"),
    **dict.fromkeys(("LATERAL", "LAT", "LL", "RL", "LLAT", "RLAT", "LATL", "LATR", "LLATERAL", "RLATERAL",
                     "LEFTLATERAL", "RIGHTLATERAL", "LATERALLEFT", "LATERALRIGHT", "LMLO", "LM", "ML", "LATLAT"),
                    "lateral"),
    **dict.fromkeys(("RLO", "LLO", "RAO", "LAO", "RPO", "LPO", "OBL", "OBLIQUE", "OBLIQUES"), "oblique"),
}  # fmt: skip
_DECUBITUS = ("LLD", "RLD", "LEFTLATERALDECUBITUS", "RIGHTLATERALDECUBITUS", "DECUBITUS", "LATDEC")
_AXES = {"L": 0, "R": 0, "A": 1, "P": 1, "H": 2, "F": 2}


@dataclass(frozen=True)
class View:
    """What a header says of a radiograph's view.

    Attributes:
        name: ``frontal``, ``lateral`` or ``None`` where it does not say.
        transpose: rows and columns are to be exchanged, before flipping.
        flip_rows, flip_columns: top and bottom, left and right are to be exchanged.
        oriented: whether Patient Orientation said so, so that the result is known to be upright and not mirrored.
    """

    name: str | None
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    oriented: bool = False


def view_of(dataset: Dataset, warnings: Warnings) -> View:
    """The view that a header tells.

    Args:
        dataset: the header.
        warnings: get what is unknown or contradicts itself.
    """
    position, code = _by_position(dataset, warnings), _by_code(dataset, warnings)
    orientation = _by_orientation(dataset, warnings)
    said = position or code
    if position and code and position != code:
        warnings.say("ViewPosition", "contradicts ViewCodeSequence: check the view")
    if said == "oblique":
        warnings.say("ViewPosition" if position else "ViewCodeSequence",
                     "says that the view is oblique: the draft is made as for a frontal one")  # fmt: skip
        said = None
    elif said and orientation.name and said != orientation.name:
        warnings.say("PatientOrientation", f"does not fit a {said} view: check the view")
        return View(said)
    return View(
        said or orientation.name, orientation.transpose, orientation.flip_rows, orientation.flip_columns,
        orientation.oriented,
    )  # fmt: skip


def orient(pixels: np.ndarray, view: View) -> np.ndarray:
    """Pixels [rows, columns] turned so that the head is up and, of a frontal view, the patient's left is right."""
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
        warnings.say("ViewPosition", "is none that is known: check the view")
        return None
    if name in _DECUBITUS:
        warnings.say("ViewPosition", "says that the patient lies on the side: air and fluid lie otherwise than upright")
    return _POSITIONS[name]


def _by_code(dataset: Dataset, warnings: Warnings) -> str | None:
    try:
        sequence = dataset.get("ViewCodeSequence")
        if not sequence:
            return None
        code = str(sequence[0].get("CodeValue") or "").strip()
        meaning = str(sequence[0].get("CodeMeaning") or "").lower()
    except Exception:  # a damaged sequence
        warnings.say("ViewCodeSequence", "cannot be read: check the view")
        return None
    if code in _CODES:
        return _CODES[code]
    for word, view in (("obliq", "oblique"), ("lateral", "lateral"), ("frontal", "frontal"),
                       ("antero", "frontal"), ("postero", "frontal")):  # fmt: skip
        if word in meaning and "decubitus" not in meaning:
            return view
    warnings.say("ViewCodeSequence", "holds no view that is known: check the view")
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
            warnings.say("PatientOrientation", "has no usable directions; the film is shown as it is stored")
        return View(None)
    transpose = axes[0] == 2  # rows run from head to feet
    across, down = (letters[1], letters[0]) if transpose else letters
    frontal = across in "LR"
    return View("frontal" if frontal else "lateral", transpose, down == "H", frontal and across == "R", True)

"""Determine the view of a DICOM radiograph, and rotate or flip it so that it is upright and viewed from the front.

Three attributes state the view: View Position, View Code Sequence and Patient Orientation. The last one gives the
directions of rows and columns by the first letters of left, right, anterior, posterior, head and feet (PS3.3
C.7.6.1.1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cbedge.images.dicom_pixels import Warnings

if TYPE_CHECKING:
    from pydicom import Dataset

# View codes, of CID 4010 and of SNOMED RT in older devices.
_CODES = {
    **dict.fromkeys(("399033003", "399348003", "272479007", "R-10202", "R-10206", "R-10214"), "frontal"),
    **dict.fromkeys(("399067008", "399173006", "399198007", "399352003", "399260004"), "lateral"),
    **dict.fromkeys(("R-10228", "R-10230", "R-10232", "R-10236", "R-10238"), "lateral"),
}
# Letters and digits of View Position, without words that do not change the view. A lateral decubitus view is a frontal
# view of a patient who lies on the side.
_QUALIFIERS = re.compile("UPRIGHT|ERECT|STANDING|SITTING|CHEST|THORAX|(X|CROSS)TABLE")
_DECUBITUS = re.compile("[LR]LD|(LEFT|RIGHT|[LR])?(LAT(ERAL)?)?DEC(UB(ITUS)?)?")
_POSITIONS = {
    "frontal": re.compile(
        f"{_DECUBITUS.pattern}|FRONT(AL)?|POST(ERO)?ANT(ERIOR)?|ANT(ERO)?POST(ERIOR)?|PA|AP|PAAP|"
        "APPA|(AP)?(SUPINE|PORTABLE)"
    ),
    "lateral": re.compile("(LEFT|RIGHT|[LR])?LAT(ERAL)?|LAT(ERAL)?(LEFT|RIGHT|[LR])|LATLAT|[LR]L|LMLO|LM|ML"),
    "oblique": re.compile("[LR]([AP]|L)O|OBL(IQUES?)?"),
}
_AXES = {"L": 0, "R": 0, "A": 1, "P": 1, "H": 2, "F": 2}


@dataclass(frozen=True)
class View:
    """The view of a radiograph according to its header, and what turns the head up and, in a frontal view, the
    patient's left to the right.

    Attributes:
        name: ``frontal``, ``lateral`` or ``None`` if unknown.
        transpose: swap rows and columns, before flipping.
        flip_rows, flip_columns: flip vertically, horizontally.
    """

    name: str | None
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def view_of(dataset: Dataset, warnings: Warnings) -> View:
    """The view that a header states; unknown values and contradictions get warnings."""
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
    return replace(orientation, name=stated or orientation.name)


def _by_position(dataset: Dataset, warnings: Warnings) -> str | None:
    text = str(dataset.get("ViewPosition") or "").strip(" \0").upper()
    name = _QUALIFIERS.sub("", "".join(c for c in text if c.isalnum()))
    if not text:
        return None
    if _DECUBITUS.fullmatch(name):
        warnings.add(
            "ViewPosition", "states a decubitus view: air and fluid are distributed differently than in an upright view"
        )
    view = next((view for view, pattern in _POSITIONS.items() if pattern.fullmatch(name)), None)
    if view is None:
        warnings.add("ViewPosition", "has an unknown value: check the view")
    return view


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
    for view, words in (("oblique", "obliq"), ("lateral", "lateral"), ("frontal", "frontal|antero|postero")):
        if re.search(words, meaning) and "decubitus" not in meaning:
            return view
    warnings.add("ViewCodeSequence", "has an unknown value: check the view")
    return None


def _by_orientation(dataset: Dataset, warnings: Warnings) -> View:
    value = dataset.get("PatientOrientation")
    if not value:
        return View(None)
    text = value if isinstance(value, str) else "\\".join(str(part) for part in value)
    parts = re.split(r"[\\/,]|\s+", re.sub(r"\s*([\\/,])\s*", r"\1", text.upper().strip(" \0")))
    if len(parts) == 1 and len(parts[0]) == 2:
        parts = [*parts[0]]  # both directions without a separator
    letters = [part[:1] for part in parts]
    axes = [_AXES.get(letter) for letter in letters]
    if len(axes) != 2 or None in axes or 2 not in axes or axes[0] == axes[1]:
        if any(letters):
            warnings.add("PatientOrientation", "has no valid directions; the stored orientation was used")
        return View(None)
    transpose = axes[0] == 2  # rows run from head to feet
    across, down = (letters[1], letters[0]) if transpose else letters
    frontal = across in "LR"
    return View("frontal" if frontal else "lateral", transpose, down == "H", frontal and across == "R")

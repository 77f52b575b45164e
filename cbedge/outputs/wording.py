"""Codes and sentences that several formats share."""

from __future__ import annotations

from collections.abc import Sequence

# LOINC codes; DICOM calls the scheme LN.
REPORT = ("18748-4", "Diagnostic imaging study")
FINDINGS = ("59776-5", "Procedure findings")
IMPRESSION = ("19005-8", "Radiology imaging study")
UNFAMILIARITY = "Unfamiliarity of the image: 0 typical, above 1 unlike training"


def left_out(names: Sequence[str]) -> list[str]:
    """A sentence that lists the invalid attributes of a DICOM header; empty if there are none."""
    if not names:
        return []
    return [f"Invalid attributes of the DICOM header that were not copied: {', '.join(names)}."]

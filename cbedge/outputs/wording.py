"""Codes and sentences that several formats share."""

from __future__ import annotations

from collections.abc import Sequence

# LOINC codes; DICOM calls the scheme LN.
REPORT = ("18748-4", "Diagnostic imaging study")
FINDINGS = ("59776-5", "Procedure findings")
IMPRESSION = ("19005-8", "Radiology imaging study")


def left_out(names: Sequence[str]) -> list[str]:
    """A sentence on the attributes of a DICOM header that were not usable, where there are any."""
    if not names:
        return []
    return [f"Left out of what is copied from the DICOM header, because not usable: {', '.join(names)}."]

"""The formats of a draft: one entry each.

A new format is a module with a function that writes it, and an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbedge.errors import CbedgeError, OptionError, OutputError, RadiographError, install_extra, memory_errors
from cbedge.report import Report

SCHEMA = Path(__file__).parent / "report.schema.json"
BATCH_SCHEMA = SCHEMA.with_name("batch.schema.json")
Source = Path | bytes | None


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        writer: ``module:function`` that makes the bytes of a file of a report and of the radiograph's file.
        media_type: for HTTP.
        suffix: of a file.
        package: a module that must be installed, with the extra ``hospital``.
        check: ``module:function`` that raises an error for a radiograph's file of which the format cannot be written.
    """

    writer: str
    media_type: str
    suffix: str
    package: str | None = None
    check: str | None = None


FORMATS = {
    "text": Format("cbedge.outputs.plain:write_text", "text/plain", ".txt"),
    "json": Format("cbedge.outputs.plain:write_json", "application/json", ".json"),
    "sr": Format("cbedge.outputs.sr:write", "application/dicom", ".sr.dcm", "highdicom", "cbedge.outputs.sr:check"),
    "fhir": Format("cbedge.outputs.fhir:write", "application/fhir+json", ".fhir.json", "fhir.resources"),
}


def check_format(name: str) -> None:
    """Check that a format exists and its library is installed, before any work is done.

    Raises:
        OptionError: the format is unknown.
        OutputError: its library is missing.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise OptionError(f"unknown format {str(name)[:20]!r}; give one of: {', '.join(FORMATS)}")
    package = FORMATS[name].package
    try:
        if package is not None:
            importlib.import_module(package)
    except ImportError as error:
        raise OutputError(
            f"--format {name} needs the package {error.name}; type: {install_extra('hospital')}"
        ) from None


def check_source(name: str, source: Source) -> None:
    """Check that a report on a radiograph's file can be written in a format, before the report is drafted.

    Raises:
        RadiographError: for ``sr``, the radiograph is not a DICOM file or its header lacks identifiers.
    """
    check = FORMATS[name].check
    if check is not None:
        with rendering(name):
            _load(check)(source)


def render(report: Report, form: str, source: Source = None) -> bytes:
    """Write a report in one of :data:`FORMATS`.

    Args:
        report: the draft.
        form: the format.
        source: the radiograph's file, whose header identifies patient and study; required for ``sr``, used by ``fhir``.

    Raises:
        OptionError: the format is unknown.
        OutputError: its library is missing.
        RadiographError: for ``sr``, the radiograph is not a DICOM file or its header lacks identifiers; or the draft of
            this radiograph cannot be written in the format.
    """
    check_format(form)
    with rendering(form):
        return _load(FORMATS[form].writer)(report, source)


@contextmanager
def rendering(form: str) -> Iterator[None]:
    """Convert any exception of the library that writes a format to one message, so that it is not taken for an error of
    the disk.

    Raises:
        RadiographError: there was one.
    """
    try:
        with memory_errors():
            yield
    except CbedgeError:
        raise
    except Exception as error:  # its text may contain header values
        reason = f"a draft of this radiograph cannot be written as {form} ({type(error).__name__})"
        raise RadiographError(f"{reason}: give another format, or export the radiograph again") from error


def _load(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)

"""Readable text, and JSON."""

from cbedge.outputs.registry import Source
from cbedge.report import Report


def write_text(report: Report, source: Source) -> bytes:
    """Write sections, notes and the draft statement."""
    return f"{report.to_text()}\n".encode()


def write_json(report: Report, source: Source) -> bytes:
    """Write all fields of the report; see ``report.schema.json``."""
    return f"{report.to_json()}\n".encode()

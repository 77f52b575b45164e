"""Text for people, and JSON."""

from cbedge.outputs.registry import Source
from cbedge.report import Report


def write_text(report: Report, source: Source) -> bytes:
    """A section a paragraph, the notes, and that it is a draft."""
    return f"{report.to_text()}\n".encode()


def write_json(report: Report, source: Source) -> bytes:
    """All fields of the report; see ``report.schema.json``."""
    return f"{report.to_json()}\n".encode()

"""A draft as text, JSON, DICOM SR or FHIR R4.

SR and FHIR say that they are preliminary and unverified, which model wrote them, and of which image. Their libraries
come with the extra ``hospital``.
"""

from cbedge.outputs.registry import FORMATS, SCHEMA, Format, check_format, render

__all__ = ["FORMATS", "SCHEMA", "Format", "check_format", "render"]

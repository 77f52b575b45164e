"""Output formats of a draft: text, JSON, DICOM SR and FHIR R4.

SR and FHIR documents are marked preliminary and unverified, and name the model and the image. Their libraries are
installed with the extra ``hospital``.
"""

from cbedge.outputs.registry import BATCH_SCHEMA, FORMATS, SCHEMA, Format, check_format, check_source, render

__all__ = ["BATCH_SCHEMA", "FORMATS", "SCHEMA", "Format", "check_format", "check_source", "render"]

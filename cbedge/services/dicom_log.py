"""Log of the DICOM node."""

from __future__ import annotations

import logging
import threading

from cbedge.images.dicom_file import silence_pydicom
from cbedge.services import json_log

_log = logging.getLogger("cbedge.listen")


def log(text: str) -> None:
    """Log a message; it must not contain header values."""
    _log.info(text)


def log_to_stderr() -> None:
    """Log to standard error, and stop libraries and threads from printing received data."""
    json_log.log_to_stderr(_log, "pynetdicom")
    silence_pydicom()
    threading.excepthook = lambda ended: log(f"a connection ended with an error: {ended.exc_type.__name__}")
